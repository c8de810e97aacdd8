"""An image model's card, run as it stands on a memory budget, and checked against a plain pipeline. `make demo` runs
this, too.

An embedded Hub serves a black-forest-labs/FLUX.1-schnell in miniature (random weights: its image is noise). The script
of the card, `flux_card.py`, runs through `python -m hf_bigload` with too little memory for the weights. Then plain
Diffusers loads the same repository into RAM. Both have to save the same pixels, or this exits with 1.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent
sys.path.insert(0, str(EXAMPLES.parent))  # `python examples/image_demo.py` has only examples/ on its path

from examples.demo import QUIET, DemoFailure, check_plan, run_program  # noqa: E402
from examples.embedded_hub import EmbeddedHub, write_tiny_flux  # noqa: E402

CARD = EXAMPLES / "flux_card.py"
REPO_ID = "black-forest-labs/FLUX.1-schnell"
IMAGE = "flux-schnell.png"
BUDGET = "cpu=1MB"


def main() -> int:
    """Run the demo; return the exit code."""
    with tempfile.TemporaryDirectory(prefix="hf_bigload-demo-") as scratch:
        folder = write_tiny_flux(Path(scratch, "flux"))
        try:
            with EmbeddedHub({REPO_ID: folder}) as hub:
                print(f"Embedded Hub at {hub.url}, serving {REPO_ID} in miniature", flush=True)
                caches = {"HF_BIGLOAD_CACHE": str(Path(scratch, "cache"))}
                # An accelerator rounds differently from the plain pipeline in RAM
                environment = hub.environment(Path(scratch, "home")) | caches | QUIET | {"CUDA_VISIBLE_DEVICES": ""}
                environment["PYTHONPATH"] = str(EXAMPLES.parent)
                ours = run_card(Path(scratch), environment)
                plain = run_plain(Path(scratch), environment)
            if ours != plain:
                raise DemoFailure("the images differ")
        except DemoFailure as failure:
            print(f"\nFAILED: {failure}", file=sys.stderr)
            return 1
    print("\nOK: the same image, bit for bit.")
    return 0


def run_card(scratch: Path, environment: dict[str, str]) -> bytes:
    """Run the unmodified card through the plugin; return the pixels that it saved."""
    options = ["--device-map", "auto", "--max-memory", BUDGET, "--explain"]
    print(f"\n== python -m hf_bigload {' '.join(options)} examples/{CARD.name}", flush=True)
    _, plan, _ = run_program([sys.executable, "-m", "hf_bigload", *options, str(CARD)], environment, scratch)
    check_plan(plan)
    return _pixels(scratch)


def run_plain(scratch: Path, environment: dict[str, str]) -> bytes:
    """Run the same without the plugin, and so without the offloading that needs an accelerator."""
    print("\n== the same pipeline, loaded into RAM by plain Diffusers", flush=True)
    script = scratch / "plain.py"
    script.write_text(CARD.read_text().replace("pipe.enable_model_cpu_offload()\n", ""))
    run_program([sys.executable, str(script)], environment, scratch)
    return _pixels(scratch)


def _pixels(scratch: Path) -> bytes:
    from PIL import Image

    file = scratch / IMAGE
    with Image.open(file) as image:
        pixels = image.tobytes()
    file.unlink()
    return pixels


if __name__ == "__main__":
    sys.exit(main())
