"""A big model's card, run as it stands on a memory budget, and checked against a plain load. `make demo` runs this.

An embedded Hub serves a bigscience/T0pp in miniature (all 48 layers, random weights, so its answer is noise). The
script of the model card, `t0pp_card.py`, runs through `python -m hf_bigload` with too little memory for the weights.
Then plain Transformers loads the same repository into RAM. The plan has to put weights on disk, and both have to give
the same answer, or this exits with 1.
With `--real`, the original is downloaded from the real Hub (some 44 GB) and only the card runs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parent
CARD = EXAMPLES / "t0pp_card.py"
REPO_ID = "bigscience/T0pp"
REVIEW = "Is this review positive or negative? Review: this is the best cast iron skillet you will ever buy"

# Wide enough that 24 + 24 layers are 85 MB in 16 bit, narrow enough that a run takes seconds.
DEMO_WIDTHS: Mapping[str, Any] = {"d_model": 256, "d_kv": 32, "d_ff": 640}
DEMO_BUDGET = "48MB"
# Warnings about the card's own arguments, and progress bars, would bury the plan.
QUIET = {"TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}

sys.path.insert(0, str(EXAMPLES.parent))  # `python examples/demo.py` has only examples/ on its path


class DemoFailure(Exception):
    """What went wrong, for the person at the terminal."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; return the exit code."""
    options = _parse(arguments)
    if options.plain:
        print(json.dumps(answer_plainly()))
        return 0
    try:
        with served_model(options.real) as environment:
            card_answer, plan = run_card(environment, options.max_memory)
            if not options.real:
                check_plan(plan)
                check_same_answer(card_answer, run_plain(environment))
    except DemoFailure as failure:
        print(f"\nFAILED: {failure}", file=sys.stderr)
        return 1
    return 0


@contextlib.contextmanager
def served_model(real: bool) -> Iterator[dict[str, str]]:
    """The environment in which a subprocess finds T0pp: the real Hub's, or an embedded one's while the block runs."""
    if real:
        yield os.environ | QUIET
        return
    from examples.embedded_hub import EmbeddedHub, write_tiny_t0pp

    with tempfile.TemporaryDirectory(prefix="hf_bigload-demo-") as scratch:
        folder = write_tiny_t0pp(Path(scratch, "T0pp"), dtype="float16", **DEMO_WIDTHS)
        with EmbeddedHub({REPO_ID: folder}) as hub:
            print(f"Embedded Hub at {hub.url}, serving {REPO_ID} in miniature")
            # Nobody loads this model again: what is downloaded and converted for it goes when it goes.
            caches = {"HF_BIGLOAD_CACHE": str(Path(scratch, "cache"))}
            # An accelerator would hold all of it, and rounds differently from the plain load in RAM.
            cpu_only = {"CUDA_VISIBLE_DEVICES": ""}
            yield hub.environment(Path(scratch, "home")) | caches | cpu_only | QUIET


def run_card(environment: Mapping[str, str], max_memory: Sequence[str]) -> tuple[str, str]:
    """Run the unmodified card through the plugin; print and return its answer and its plan.

    Args:
        max_memory: budgets as `python -m hf_bigload --max-memory` takes them, such as "cpu=48MB".
    """
    options = [part for budget in max_memory for part in ("--max-memory", budget)] + ["--explain"]
    _headline(f"python -m hf_bigload {' '.join(options)} examples/{CARD.name}")
    answer, plan, seconds = run_program([sys.executable, "-m", "hf_bigload", *options, str(CARD)], environment)
    print(f"answer: {answer}\n({seconds:.1f} s, download included)")
    return answer, plan


def run_plain(environment: Mapping[str, str]) -> str:
    """Load and run the same model with plain Transformers in another process; print and return its answer."""
    _headline("the same model, loaded into RAM by plain Transformers")
    output, _, seconds = run_program([sys.executable, __file__, "--plain"], environment)
    result = json.loads(output)
    print(f"answer: {result['answer']}\ntokens: {' '.join(map(str, result['ids']))}\n({seconds:.1f} s)")
    return result["answer"]


def answer_plainly(repo_id: str = REPO_ID) -> dict[str, object]:
    """What plain Transformers generates for the card's review: `{"ids": [token id, ...], "answer": text}`."""
    import torch
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(repo_id)
    model = AutoModelForSeq2SeqLM.from_pretrained(repo_id, dtype=torch.float16)
    ids = model.generate(tokenizer.encode(REVIEW, return_tensors="pt"))[0]
    return {"ids": ids.tolist(), "answer": tokenizer.decode(ids)}


def check_plan(plan: str) -> None:
    """Raise DemoFailure unless `plan`, as `--explain` prints it, says that something went to disk.

    Without this the demo would also pass if the plugin left the load to the library, which ignores its budget.
    """
    if "disk" not in plan.lower():
        raise DemoFailure("no plan with weights on disk was printed: hf_bigload did not load this model on its budget")


def check_same_answer(card_answer: str, plain_answer: str) -> None:
    """Raise DemoFailure unless the two answers are the same text."""
    if card_answer != plain_answer:
        raise DemoFailure(
            f"the answers differ.\n  through hf_bigload: {card_answer}\n  plain Transformers: {plain_answer}"
        )
    print("\nOK: the same answer, word for word.")


def run_program(
    command: Sequence[str], environment: Mapping[str, str], folder: Path = EXAMPLES.parent
) -> tuple[str, str, float]:
    """Run `command` in `folder` and show its stderr as it comes; return its stdout, its stderr and the seconds."""
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as stdout:
        with subprocess.Popen(
            command, env=dict(environment), cwd=folder, stdout=stdout, stderr=subprocess.PIPE, text=True
        ) as process:
            stderr = "".join(_echoed(process.stderr or ()))
        if process.returncode:
            raise DemoFailure(f"exit code {process.returncode} from: {shlex.join(command)}")
        stdout.seek(0)
        return stdout.read().strip(), stderr, time.perf_counter() - started


def _echoed(lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        print(line, end="", file=sys.stderr, flush=True)
        yield line


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", action="store_true", help="use the real Hub and the real model")
    parser.add_argument(
        "--max-memory",
        action="append",
        metavar="KEY=SIZE",
        help=f"budget to run the card on; default cpu={DEMO_BUDGET}, and with --real whatever the machine has",
    )
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)  # the comparison's own process
    options = parser.parse_args(arguments)
    if options.max_memory is None:
        options.max_memory = [] if options.real else [f"cpu={DEMO_BUDGET}"]
    return options


def _headline(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
