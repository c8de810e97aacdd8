"""The user's own script, unmodified, over a T0pp of real size, in a memory cgroup smaller than the model.

    python -m benchmarks.t0pp_card --checkpoint FOLDER --limit 12GiB [--max-memory cpu=8GB]

`examples/t0pp_card.py` asks for "bigscience/T0pp". It finds it in a Hub cache made for the run, whose snapshot links to
the files of FOLDER (see `write_checkpoint`) and to a small tokenizer; nothing is downloaded, and nothing of it stays.
The script is run by `python -m hf_bigload`, which is the only difference from running it by hand.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from benchmarks.memory_cgroup import drop_caches, parse_bytes, run_limited
from examples.embedded_hub import write_tiny_t0pp

REPO = "bigscience/T0pp"
COMMIT = "0" * 39 + "1"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
SCRIPT = Path(__file__).parents[1] / "examples" / "t0pp_card.py"


def link_into_cache(home: Path, checkpoint: Path) -> None:
    """A Hub cache below `home` that has `REPO`: links to the checkpoint's files, and a tokenizer."""
    root = home / "hub" / f"models--{REPO.replace('/', '--')}"
    snapshot = root / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(COMMIT)
    small = write_tiny_t0pp(home / "small", num_layers=1, num_decoder_layers=1, shards=1)
    tokenizer = [small / name for name in TOKENIZER_FILES if (small / name).exists()]
    for source in (*checkpoint.resolve().iterdir(), *tokenizer):
        (snapshot / source.name).symlink_to(source)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--limit", default="12GiB")
    parser.add_argument("--max-memory", action="append", default=[], help="KEY=SIZE; by default what the cgroup allows")
    parser.add_argument("--script", type=Path, default=SCRIPT)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=options.checkpoint.parent) as scratch:
        home = Path(scratch)
        link_into_cache(home, options.checkpoint)
        env = {
            **os.environ,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "1",
            "HF_BIGLOAD_CACHE": str(home / "bigload"),
            "OMP_NUM_THREADS": str(os.cpu_count()),
        }
        budget = [flag for given in options.max_memory for flag in ("--max-memory", given)]
        command = [sys.executable, "-m", "hf_bigload", "--explain", *budget, str(options.script)]
        drop_caches()
        result = run_limited(command, parse_bytes(options.limit), env=env)
    print(json.dumps(asdict(result)))
    return result.exit_code


if __name__ == "__main__":
    raise SystemExit(main())
