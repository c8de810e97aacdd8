"""All architectures, each in a process of its own: `python -m tests.architectures [NAME ...]`.

With names, prints how they fare; without, compares everything (in fp32, in bf16, and as stock Transformers with
Accelerate does it) and writes RESULTS.md beside this file. About 15 minutes on one core.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection, wait
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any

import torch

from .compare import BUDGET, Record, compare
from .patches import NOT_BUILDABLE
from .tiny import Architecture, architectures

RESULTS = Path(__file__).with_name("RESULTS.md")
PACKAGES = ("torch", "transformers", "accelerate", "safetensors")
LIMIT_S = 180
"""Seconds that one architecture may take."""


@dataclass(frozen=True)
class Run:
    """One way to load them all."""

    title: str
    engine: str = "hf_bigload"
    dtype: torch.dtype = torch.float32
    budget: float = BUDGET


RUNS = (
    Run("hf_bigload"),
    Run("hf_bigload, the fp32 checkpoint loaded in bf16", dtype=torch.bfloat16),
    Run("stock: Transformers with Accelerate", engine="stock"),
    Run("stock, with less memory", engine="stock", budget=0.1),
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.architectures", description=__doc__)
    parser.add_argument("names", nargs="*", help='architectures: "llama", or "causal:bart" for one of two')
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time")
    options = parser.parse_args(arguments)
    chosen = [a for a in architectures() if not options.names or {a.name, a.name.partition(":")[2]} & {*options.names}]
    torch.set_num_threads(1)
    results = {run: sorted(records_of(run, chosen, options.jobs), key=lambda r: r.name) for run in RUNS}
    if not options.names:
        RESULTS.write_text(report(results))


def records_of(run: Run, chosen: Sequence[Architecture], jobs: int = 1) -> Iterator[Record]:
    """How each of `chosen` fares, as they end. A crash or a hang costs its own architecture only."""
    waiting = deque(chosen)
    running: list[_Running] = []
    while waiting or running:
        while waiting and len(running) < jobs:
            running.append(_Running.start(run, waiting.popleft()))
        wait([r.process.sentinel for r in running], timeout=max(0.0, min(r.deadline for r in running) - monotonic()))
        for one in [r for r in running if r.is_over]:
            running.remove(one)
            record = one.record()
            print(f"{run.title}: {record.name}: {_first_line(_why(record)) or 'equal'}", flush=True)
            yield record


@dataclass(frozen=True, eq=False)
class _Running:
    """A comparison in a process of its own."""

    which: Architecture
    process: Any
    answer: Connection
    deadline: float

    @classmethod
    def start(cls, run: Run, which: Architecture) -> _Running:
        context = multiprocessing.get_context("fork")  # the libraries' imports take longer than most comparisons
        answer, sender = context.Pipe(duplex=False)
        process = context.Process(target=_compare_alone, args=(run, which, sender))
        process.start()
        sender.close()
        return cls(which, process, answer, monotonic() + LIMIT_S)

    @property
    def is_over(self) -> bool:
        return not self.process.is_alive() or monotonic() >= self.deadline

    def record(self) -> Record:
        answered = self.answer.poll() and not self.process.is_alive()
        self.process.kill()
        self.process.join()
        try:
            if answered:
                return self.answer.recv()
        except EOFError:  # it ended without a word
            pass
        failure = f"no answer (exit code {self.process.exitcode}, limit {LIMIT_S} s)"
        return Record(self.which.name, self.which.model_class.__name__, differences={"any": failure})


def _compare_alone(run: Run, which: Architecture, sender: Connection) -> None:
    warnings.simplefilter("ignore")
    with open(os.devnull, "w") as null, redirect_stdout(null), redirect_stderr(null), TemporaryDirectory() as folder:
        sender.send(compare(which, Path(folder), run.engine, run.dtype, run.budget))


# ---------------------------------------------------------------- the report


def report(results: dict[Run, list[Record]]) -> str:
    """RESULTS.md."""
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    parts = [
        "# Every architecture, bit for bit",
        "Written by `python -m tests.architectures`: a tiny random model of each configuration that "
        "`AutoModelForCausalLM` and `AutoModelForSeq2SeqLM` list, saved in shards, loaded plainly and under each "
        "placement. Equal means: all outputs of a forward, before and after a greedy `generate`, its tokens, the whole "
        "`state_dict` and every buffer have the same bits, nothing is on the meta device, and the plan did stream. "
        "Released slots are filled with not-a-numbers.",
        "A percentage: a budget of RAM, of the bytes of the weights, that includes what is streamed through. A plan "
        "that uses more is counted as not equal. Stock is asked for outputs and tokens only. `disk`: everything on "
        "disk. `alternate`: every second weight on disk.",
        f"CPU, one thread; {packages}.",
    ]
    return "\n\n".join([*parts, *(_section(run, records) for run, records in results.items())]) + "\n"


def _section(run: Run, records: list[Record]) -> str:
    built = [r for r in records if not r.not_built]
    placements = dict.fromkeys(p for r in built for p in r.differences)
    rows = [f"| {p} | {_equal_under(p, built)} of {len(built)} |" for p in placements]
    generating = sum(r.generates for r in built)
    lines = [
        f"## {run.title}",
        "",
        f"{len(records)} architectures, {len(built)} built, {generating} of them with `generate`.",
        "",
        "| placement | equal |",
        "| --- | --- |",
        *rows,
        *_listed("Not equal", [r for r in built if not r.equal], _why),
        *_listed("Not built, or not run, by the library", [r for r in records if r.not_built], _why),
    ]
    return "\n".join(lines)


def _equal_under(placement: str, records: list[Record]) -> int:
    return sum(record.differences.get(placement) == "" for record in records)


def _listed(title: str, records: list[Record], why: Callable[[Record], str]) -> list[str]:
    lines = [f"- {r.name} ({r.model}): {_first_line(why(r))}" for r in records]
    return ["", f"{title}:", "", *lines] if lines else []


def _why(record: Record) -> str:
    if record.not_built:
        return NOT_BUILDABLE.get(record.name, record.not_built)
    return "; ".join(f"{p}: {found}" for p, found in record.differences.items() if found)


def _first_line(text: str) -> str:
    return " ".join(text.split())[:240]


if __name__ == "__main__":
    main()
