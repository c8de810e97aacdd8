"""What plans promise, held against what happens, and against the incumbent where the choice of a placement decides.

    python -m benchmarks.planning [--case prediction] [--record benchmarks/RESULTS.md]
    python -m benchmarks.planning --tiny      # the whole logic in a minute, without root

`prediction`: seconds of the first token (the encoder and the prompt with it) and of those after it, and the peak of
memory, as the plan says them before the run and as they were in it. The machine is measured first, as `hf-bigload
doctor` does it.
`plan_time`: seconds of planning for a thousand blocks and for a hundred thousand modules, and the gap to the bound.
`encoder_decoder`: `generate` with an encoder-decoder and a budget that holds its decoder, ours beside stock's.

Checkpoints are looked for in build/bench and written if missing (15 GB; 22 GB more with --t0pp).
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.cases import assert_same_hashes
from benchmarks.measure import shards
from benchmarks.memory_cgroup import parse_bytes
from benchmarks.processes import Runner, can_isolate, guarded
from benchmarks.report import Row, Target, Within, append, duration, machine, markdown, print_table, rate, size
from benchmarks.write_checkpoint import ensure_checkpoint
from hf_bigload import bandwidth
from hf_bigload.planner import make_plan
from hf_bigload.specs import BlockSpec, Hardware, ModelSpec, TensorSpec

FOLDER = Path("build/bench")
Report = dict[str, Any]
CASES = ("prediction", "plan_time", "encoder_decoder")


@dataclass(frozen=True)
class Request:
    """A model, the budget it is given, and what is asked of it."""

    model: str
    budget: str
    context: int
    new_tokens: int = 12
    dtype: str | None = None

    @property
    def title(self) -> str:
        dtype = f" as {self.dtype}" if self.dtype else ""
        return f"{self.model}{dtype}, {self.budget}, {self.context} tokens"

    def arguments(self, engine: str, folder: Path) -> tuple[object, ...]:
        asked = ("--context", self.context, "--new-tokens", self.new_tokens)
        dtype = ("--dtype", self.dtype) if self.dtype else ()
        budget = () if engine == "plain" else ("--max-memory", f"cpu={self.budget}")
        return ("--engine", engine, "--checkpoint", folder, *budget, *asked, *dtype)


PREDICTED = (
    Request("t0_3b", "3.8GB", 64),
    Request("t0_3b", "2GB", 64),
    Request("llama_1b", "1.5GB", 16),
    Request("llama_1b", "3GB", 64),
    Request("llama_1b", "1.5GB", 512, new_tokens=4),
    Request("llama_1b", "1.2GB", 64, dtype="bfloat16"),
    Request("llama_1b", "6GB", 64),
    Request("mixtral_1b", "1.5GB", 64),
    Request("mixtral_1b", "4GB", 64),
    Request("t0_3b", "8GB", 256),
)
TINY_PREDICTED = (
    Request("t0_3b_tiny", "300KB", 8, 4),
    Request("mixtral_1b_tiny", "1.2MB", 8, 4),
)
DECODER_STAYS = Request("t0_3b", "3.8GB", 16, new_tokens=16)
T0PP_DECODER_STAYS = Request("t0pp", "15GB", 16, new_tokens=16)
LIMITS = {DECODER_STAYS: 4_800_000_000, T0PP_DECODER_STAYS: 18_000_000_000}
"""Of the cgroup, bytes: so little above the budget that the page cache cannot hold what streams."""
BESIDE = 2_000_000_000
"""The same where nothing is compared: room for the runtime."""


@dataclass
class Bench:
    runner: Runner
    folder: Path
    tiny: bool
    t0pp: bool

    def checkpoint(self, request: Request) -> Path:
        return ensure_checkpoint(request.model, self.folder / request.model).resolve()

    def limited(self, engine: str, request: Request) -> Report:
        """From cold, in memory that leaves the page cache little beside budget and runtime."""
        folder = self.checkpoint(request)
        self.runner.chill(shards(folder))
        limit = LIMITS.get(request) or parse_bytes(request.budget) + BESIDE
        return self.runner.run("generate", *request.arguments(engine, folder), limit=limit)


# ---------------------------------------------------------------- prediction


def predictions(bench: Bench, request: Request) -> Iterator[Row]:
    report = bench.limited("hf_bigload", request)
    phases = {phase["name"]: phase for phase in report["plan"]["phases"]}
    first, *_ = report["runs"][-1]["tokens"]
    begins = sum(phase["seconds"] for name, phase in phases.items() if name != "decode")
    yield _predicted(f"{request.title}: the first token", begins, first["seconds"])
    decode = phases["decode"]
    each = median(report["runs"][-1]["forwards"][1:])
    yield _predicted(f"{request.title}: a step", decode["seconds"] / decode["calls"], each)
    if report["plan"]["ring"]:  # else weights are clean pages of their files, as many as were touched
        held, planned = report["peak_anon_bytes"] - report["runtime_anon_bytes"], report["plan"]["used"]["cpu"]
        yield Row(f"{request.title}: peak memory", size(planned), size(held), planned / held, Within(0.05))


def _predicted(case: str, predicted: float, measured: float) -> Row:
    return Row(case, duration(predicted), duration(measured), predicted / measured, Within(0.2))


# ---------------------------------------------------------------- the decoder stays


def decoder_stays(bench: Bench, request: Request) -> Iterator[Row]:
    folder = bench.checkpoint(request)
    ours = bench.limited("hf_bigload", request)
    stock = bench.limited("stock", request)
    hashes = {f"{report['engine']} {i}": run["tokens_sha256"] for report in (ours, stock) for i, run in _runs(report)}
    assert_same_hashes(hashes)
    (our_bytes, our_seconds), (stock_bytes, stock_seconds) = map(_per_token, (ours, stock))
    title = f"{folder.name}, {request.budget}, {request.new_tokens} tokens generated"
    sizes = size(our_bytes), size(stock_bytes)
    yield Row(f"{title}: read per token after the first", *sizes, our_bytes / max(stock_bytes, 1), Target(0, False))
    speeds = f"{1 / our_seconds:.2f} a second", f"{1 / stock_seconds:.2f} a second"
    yield Row(f"{title}: tokens after the first", *speeds, stock_seconds / our_seconds, Target(1, True))
    firsts = [report["runs"][-1]["tokens"][0]["seconds"] for report in (ours, stock)]
    yield Row(f"{title}: the first token", *map(duration, firsts), firsts[0] / firsts[1], Target(1, False))


def _runs(report: Report) -> Iterator[tuple[int, Report]]:
    return enumerate(report["runs"])


def _per_token(report: Report) -> tuple[float, float]:
    """Bytes and seconds of a token after the first."""
    tokens = report["runs"][-1]["tokens"][1:]
    return sum(t["streamed_bytes"] for t in tokens) / len(tokens), median(t["seconds"] for t in tokens)


# ---------------------------------------------------------------- how long planning takes


def plan_times() -> Iterator[Row]:
    """Blocks of unequal sizes on half of the memory that they need, a quarter of them in RAM."""
    for blocks, leaves, target in ((1000, 1, 0.1), (1000, 100, 5.0)):
        spec = _unequal(blocks, leaves)
        hardware = Hardware({"cuda:0": spec.nbytes // 2}, spec.nbytes // 4)
        seconds = []
        for _ in range(5):
            started = time.perf_counter()
            plan = make_plan(spec, hardware)
            seconds.append(time.perf_counter() - started)
        title, gap = (
            f"planning {blocks:,} blocks of {leaves:,} modules",
            f"{plan.seconds / plan.bound:.3f} of the bound",
        )
        yield Row(title, duration(median(seconds)), "", median(seconds), Target(target, False), gap)


def _unequal(blocks: int, leaves: int) -> ModelSpec:
    rng = random.Random(1)

    def leaf(i: int, j: int) -> BlockSpec:
        name, size = f"{i}.{j}", rng.randint(10**5, 2 * 10**6)
        return BlockSpec(name, (TensorSpec(f"{name}.w", size, "uint8", (size,)),), whole=False, part_of=str(i))

    parts = [tuple(leaf(i, j) for j in range(leaves)) for i in range(blocks)]
    tensors = [tuple(t for part in each for t in part.tensors) for each in parts]
    return ModelSpec(tuple(BlockSpec(str(i), tensors[i], whole=True, parts=parts[i]) for i in range(blocks)))


# ---------------------------------------------------------------- all of it


def run(bench: Bench, names: Sequence[str] | None) -> Iterator[tuple[Row, bool]]:
    if not names or "prediction" in names:
        for request in TINY_PREDICTED if bench.tiny else PREDICTED:
            yield from guarded(Row(request.title), partial(predictions, bench, request))
    if not names or "plan_time" in names:
        yield from guarded(Row("planning"), plan_times)
    if not names or "encoder_decoder" in names:
        wanted = [TINY_PREDICTED[0]] if bench.tiny else [DECODER_STAYS, *[T0PP_DECODER_STAYS] * bench.t0pp]
        for request in wanted:
            yield from guarded(Row(request.title), partial(decoder_stays, bench, request))


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What plans promise, held against what happens.")
    parser.add_argument("--case", action="append", choices=CASES, help="default: all")
    parser.add_argument("--tiny", action="store_true", help="models of some hundred kilobytes: the logic alone")
    parser.add_argument("--t0pp", action="store_true", help="the encoder-decoder of 22 GB too")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the checkpoints (build/bench)")
    parser.add_argument("--record", type=Path, help="append the table to this file, as markdown")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_options(argv)
    options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="planning-", dir=options.folder.resolve()) as scratch:
        cache = os.path.join(scratch, "cache")
        figures = bandwidth.measured(cache, fresh=True).bandwidths
        isolated = not options.tiny and can_isolate()
        runner = Runner({"HF_BIGLOAD_CACHE": cache}, isolated, read_limit=200 * 10**9)
        bench = Bench(runner, options.folder if not options.tiny else Path(scratch), options.tiny, options.t0pp)
        results = list(run(bench, options.case))
    rows = [row for row, _ in results]
    about = machine(
        f"Measured before: disk {rate(figures.disk)}. Read from disk by all of it: {size(runner.read_bytes)}.",
        "`ours` is the prediction and `beside` the measurement where the target is a range.",
    )
    print_table(rows, "Plans")
    print("\n".join(about))
    if options.record:
        append(options.record, markdown(rows, "Plans: `python -m benchmarks.planning`", about))
    return 0 if all(right for _, right in results) else 1


if __name__ == "__main__":
    sys.exit(main())
