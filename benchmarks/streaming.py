"""Every target of the streaming engine in one run and one table. `make bench` is this.

    python -m benchmarks.streaming [--case disk_bound] [--record benchmarks/RESULTS.md]
    python -m benchmarks.streaming --model llama_1b_tiny      # the whole logic in seconds, without root

Checkpoints are looked for in build/bench and written if missing (4.4 and 5.7 GB). Memory limits and dropped caches need
root; without it, and with tiny models, the run says that it went without. Exits with 1 if results differ or a process
fails; a target that is not met is only reported.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from benchmarks.cases import CASES, FEW, MANY, T0_TOKENS, Bench, Setup
from benchmarks.measure import shards
from benchmarks.memory_cgroup import parse_bytes
from benchmarks.processes import ATTEMPTS, Runner, can_isolate, guarded
from benchmarks.report import Row, append, machine, markdown, print_table, rate, size
from benchmarks.write_checkpoint import ARCHITECTURES, ensure_checkpoint

FOLDER = Path("build/bench")
SMALL = "llama_1b_tiny"
BUDGET, TINY_BUDGET = "1.5GB", "350KB"
WITHOUT_ISOLATION = "Without memory cgroups and dropped caches: figures from disk and of memory are not comparable."


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Every target of the streaming engine, in one table.")
    parser.add_argument("--case", action="append", choices=[case.name for case in CASES], help="default: all")
    parser.add_argument("--model", choices=sorted(ARCHITECTURES), default="llama_1b", help="an fp32 decoder")
    parser.add_argument("--checkpoint", type=Path, help="its folder, written if missing (build/bench/MODEL)")
    parser.add_argument("--t0-model", choices=sorted(ARCHITECTURES), help="default: t0_3b, or its tiny one")
    parser.add_argument("--t0-checkpoint", type=Path, help="its folder (build/bench/T0_MODEL)")
    parser.add_argument("--budget", help=f"what a plan may use of RAM ({BUDGET}; tiny: {TINY_BUDGET})")
    parser.add_argument("--limit", type=parse_bytes, default=3 * 10**9, help="of the memory cgroup (3GB)")
    parser.add_argument("--forwards", type=int, default=3, help="measured of each kind; the median counts")
    parser.add_argument("--warm-up", type=int, default=1, help="forwards from disk before those (1)")
    parser.add_argument("--small-forwards", type=int, help="of the resident small model, each engine and round (3000)")
    parser.add_argument("--read-limit", type=parse_bytes, default=60 * 10**9, help="no repetition beyond it (60GB)")
    parser.add_argument("--record", type=Path, help="append the table to this file, as markdown")
    options = parser.parse_args(argv)
    options.tiny = options.model.endswith("_tiny")
    options.t0_model = options.t0_model or ("t0_3b_tiny" if options.tiny else "t0_3b")
    options.small_forwards = options.small_forwards or (20 if options.tiny else 3000)
    return options


@contextmanager
def prepared(options: argparse.Namespace) -> Iterator[Bench]:
    """A bench whose checkpoints are there; what it spills goes into a folder of its own, removed at the end."""
    budget = options.budget or (TINY_BUDGET if options.tiny else BUDGET)
    llama = ensure_checkpoint(options.model, options.checkpoint or FOLDER / options.model)
    t0 = ensure_checkpoint(options.t0_model, options.t0_checkpoint or FOLDER / options.t0_model)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=llama.resolve().parent) as scratch:
        isolated = not options.tiny and can_isolate()
        yield Bench(
            runner=Runner(
                {"HF_BIGLOAD_CACHE": f"{scratch}/cache"},
                isolated,
                options.read_limit,
                attempts=1 if options.tiny else ATTEMPTS,  # a tiny file's speed says nothing
            ),
            llama=Setup(llama, budget, options.limit, (FEW, MANY)),
            t0=Setup(t0, budget, options.limit, (T0_TOKENS,)),
            small=ensure_checkpoint(SMALL, Path(scratch) / SMALL),
            forwards=options.forwards,
            warm_up=options.warm_up,
            small_forwards=options.small_forwards,
            small_blocks=20 if options.tiny else 200,
        )


def run(bench: Bench, names: Sequence[str] | None) -> Iterator[tuple[Row, bool]]:
    """Each chosen case's row, and whether its results were right."""
    for case in CASES:
        if not names or case.name in names:
            yield from guarded(Row(case.title, target=case.target), partial(case.rows, bench))


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_options(argv)
    with prepared(options) as bench:
        raw = bench.runner.raw(bench.llama.files)
        results = list(run(bench, options.case))
        about = machine(
            f"Disk, 8 threads with O_DIRECT: {rate(raw)} at the start. "
            f"Read from disk by all of it: {size(bench.runner.read_bytes)}.",
            f"Models: {bench.llama.name} ({_size(bench.llama)}), {bench.t0.name} ({_size(bench.t0)}); budget "
            f"{bench.llama.budget}, cgroup {size(options.limit) if bench.runner.isolated else 'none'}.",
        )
        if not bench.runner.isolated:
            about.append(WITHOUT_ISOLATION)
    rows = [row for row, _ in results]
    print_table(rows, "Streaming")
    print("\n".join(about))
    if options.record:
        append(options.record, markdown(rows, "Streaming: `make bench`", about))
    return 0 if all(right for _, right in results) else 1


def _size(setup: Setup) -> str:
    return size(sum(file.stat().st_size for file in shards(setup.checkpoint)))


if __name__ == "__main__":
    sys.exit(main())
