#!/usr/bin/env bash
# Everything there is to see on a machine with one accelerator and no network, in under ten minutes:
# the tests for accelerators, then benchmarks/gpu.py. Exits with 1 if a result differs from the resident model's.
#
#     bash benchmarks/gpu.sh [options of benchmarks/gpu.py]
#
# PYTHON   the interpreter that has torch for the device (default: python3)
# WHEELS   a folder with wheels of what it lacks; they go into an environment of the run's own, the machine's stays
# FOLDER   where that environment and the checkpoints go (default: build); needs some 25 GB on a local disk
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
FOLDER=${FOLDER:-build}
ENVIRONMENT=$FOLDER/gpu-venv
export PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 PYTHONPATH=$PWD
STARTED=$SECONDS

# An environment that looks into the machine's own packages after its own: those stay as they are.
mkdir -p "$FOLDER"
if [ ! -x "$ENVIRONMENT/bin/python" ]; then
    "$PYTHON" -m venv --without-pip "$ENVIRONMENT"
    outer=$("$PYTHON" -c 'import site; print(*site.getsitepackages(), sep="\n")')
    inner=$("$ENVIRONMENT/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    echo "$outer" > "$inner/machine.pth"
    if [ -n "${WHEELS:-}" ]; then
        "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$inner" "$WHEELS"/*.whl
    fi
fi
PYTHON=$ENVIRONMENT/bin/python

"$PYTHON" - <<'CHECK'
import importlib.metadata as metadata, re, sys

def version(name):
    try:
        return tuple(int(n) for n in re.findall(r"\d+", metadata.version(name))[:2])
    except metadata.PackageNotFoundError:
        return None

needed = {"torch": (2, 6), "transformers": (5, 20), "safetensors": (0, 5), "huggingface_hub": (1, 0), "numpy": (1, 26),
          "psutil": (5, 9), "rich": (13, 0), "wrapt": (1, 16), "pytest": (8, 0)}
compared = {"accelerate": "stock", "diffusers": "group offload, and no pipeline"}
lacking = [f"{name}>={a}.{b} (found {'.'.join(map(str, found)) if (found := version(name)) else 'none'})"
           for name, (a, b) in needed.items() if (version(name) or (0,)) < (a, b)]
for name, what in compared.items():
    if version(name) is None:
        print(f"gpu.sh: without {name} there is no comparison with {what}")
if lacking:
    sys.exit("gpu.sh: missing here: " + ", ".join(lacking) + "\nPut their wheels into a folder and name it: WHEELS=...")
CHECK

status=0
if [[ " $* " != *" --device sim "* ]]; then
    "$PYTHON" -m pytest -q -rs -p no:cacheprovider tests/gpu || status=1
fi
left=$(awk "BEGIN { print (540 - ($SECONDS - $STARTED)) / 60 }")
"$PYTHON" -m benchmarks.gpu --folder "$FOLDER/bench" --minutes "$left" "$@" || status=1
exit $status
