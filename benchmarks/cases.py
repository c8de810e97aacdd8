"""The cases of `benchmarks.streaming`: what each runs, what it is held against, and what it has to reach.

Every case is a ratio of medians in one run. Whatever a case measures, the logits of ours, of stock and of a plain load
must have the same bits, or the case raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.measure import shards
from benchmarks.processes import ResultsDifferError, Runner, Steady, judged
from benchmarks.report import Row, Target, duration, rate, size

Report = dict[str, Any]

FEW, MANY = 1, 64
"""Input tokens of a forward that the disk limits, and of one that the arithmetic does."""
T0_TOKENS = 16


@dataclass(frozen=True)
class Setup:
    """A checkpoint, the memory that a plan may use and, in bytes, what the cgroup around it allows."""

    checkpoint: Path
    budget: str
    limit: int
    tokens: tuple[int, ...]

    @property
    def files(self) -> list[Path]:
        return shards(self.checkpoint)

    @property
    def name(self) -> str:
        return self.checkpoint.name


@dataclass
class Bench:
    """Runs every process that the cases need, and each only once: several cases read their figures from one."""

    runner: Runner
    llama: Setup
    t0: Setup
    small: Path
    """A checkpoint whose forward takes about a millisecond."""
    forwards: int = 3
    warm_up: int = 1
    """Forwards from disk before those that are measured."""
    small_forwards: int = 3000
    small_blocks: int = 200
    _plain: dict[tuple[str, str | None], Report] = field(default_factory=dict)
    _streamed: dict[tuple[str, str | None], Steady[Report]] = field(default_factory=dict)

    def forward(self, engine: str, setup: Setup, *more: object, limited: bool = False, forwards: int = 0) -> Report:
        """Figures of a process that loads and runs `setup`."""
        tokens = ",".join(map(str, setup.tokens))
        arguments = ("--engine", engine, "--checkpoint", setup.checkpoint, "--tokens", tokens, *more)
        count = ("--forwards", forwards or self.forwards)
        return self.runner.run("forward", *arguments, *count, limit=setup.limit if limited else None)

    def plain(self, setup: Setup, dtype: str | None = None) -> Report:
        """The model in RAM without a limit: the bits that all must give, and the time of the arithmetic alone."""
        key = (setup.name, dtype)
        if key not in self._plain:
            self.runner.warm(setup.files)
            self._plain[key] = self.forward("plain", setup, *_dtype(dtype), "--warm-up", 1)
        return self._plain[key]

    def streamed(self, setup: Setup) -> Steady[Report]:
        """Ours with the budget and the limit, from cold; the bits are compared before anything is dropped."""
        key = (setup.name, None)
        if key not in self._streamed:
            plain = self.plain(setup)
            budget = ("--max-memory", f"cpu={setup.budget}")
            stock = self.forward("stock", setup, *budget, forwards=1)

            def run() -> Report:
                self.runner.chill(setup.files)
                return self.forward("hf_bigload", setup, *budget, "--warm-up", self.warm_up, limited=True)

            self._streamed[key] = self.runner.steady(setup.files, run)
            assert_same_bits(hf_bigload=self._streamed[key].value, stock=stock, plain=plain)
        return self._streamed[key]

    @property
    def streamed_runs(self) -> list[Report]:
        """Of every streaming setup that was measured, and of the Llama's at least."""
        self.streamed(self.llama)
        return [steady.value for steady in self._streamed.values()]


@dataclass(frozen=True)
class Case:
    name: str
    title: str
    target: Target
    measure: Callable[[Bench], Row]
    """A row with figures; the title and the target are put in by `rows`."""

    def rows(self, bench: Bench) -> list[Row]:
        return [replace(self.measure(bench), case=self.title, target=self.target)]


# ---------------------------------------------------------------- figures of a report


def forwards_of(report: Report, tokens: int) -> list[Report]:
    return [run for run in report["forwards"] if run["tokens"] == tokens]


def middle(runs: Iterable[Report], figure: str) -> float:
    return median(run[figure] for run in runs)


def assert_same_bits(**reports: Report) -> None:
    """Raises ResultsDifferError unless all forwards of as many tokens have the same logits."""
    seen: dict[int, dict[str, set[str]]] = {}
    for engine, report in reports.items():
        for run in [*report.get("warm_up", ()), *report["forwards"]]:
            seen.setdefault(run["tokens"], {}).setdefault(run["logits_sha256"], set()).add(engine)
    different = {tokens: hashes for tokens, hashes in seen.items() if len(hashes) > 1}
    if different:
        listed = [
            f"{tokens} tokens: "
            + "; ".join(f"{', '.join(sorted(who))} {digest[:12]}" for digest, who in hashes.items())
            for tokens, hashes in different.items()
        ]
        raise ResultsDifferError("the logits differ. " + " | ".join(listed))


def assert_same_hashes(hashes: dict[str, str]) -> None:
    """The same for a process that ran several engines itself."""
    if len(set(hashes.values())) > 1:
        raise ResultsDifferError("; ".join(f"{engine} {digest[:12]}" for engine, digest in hashes.items()))


def _dtype(dtype: str | None) -> tuple[str, ...]:
    return () if dtype is None else ("--dtype", dtype)


# ---------------------------------------------------------------- from disk


def _over_raw(bench: Bench, setup: Setup, tokens: int) -> Row:
    measured = bench.streamed(setup)
    runs = forwards_of(measured.value, tokens)
    speed, raw = median(run["streamed_bytes"] / run["seconds"] for run in runs), measured.bytes_per_second
    moved = f"{size(middle(runs, 'streamed_bytes'))} in {duration(middle(runs, 'seconds'))}"
    return judged(Row("", f"{rate(speed)} ({moved})", f"raw {rate(raw)}", speed / raw), measured)


def disk_bound(bench: Bench) -> Row:
    return _over_raw(bench, bench.llama, FEW)


def t0_streaming(bench: Bench) -> Row:
    return _over_raw(bench, bench.t0, T0_TOKENS)


def compute_bound(bench: Bench) -> Row:
    measured = bench.streamed(bench.llama)
    runs = forwards_of(measured.value, MANY)
    in_ram = middle(forwards_of(bench.plain(bench.llama), MANY), "seconds")
    reading = middle(runs, "streamed_bytes") / measured.bytes_per_second
    seconds, bound = middle(runs, "seconds"), max(in_ram, reading)
    beside = f"{duration(bound)} (in RAM {duration(in_ram)}, reading {duration(reading)})"
    return judged(Row("", duration(seconds), beside, seconds / bound), measured)


def cpu_per_gigabyte(bench: Bench) -> Row:
    measured = bench.streamed(bench.llama)
    runs = forwards_of(measured.value, FEW)
    in_ram = middle(forwards_of(bench.plain(bench.llama), FEW), "cpu_seconds")
    cpu, streamed = middle(runs, "cpu_seconds"), middle(runs, "streamed_bytes") / 1e9
    row = Row("", f"{duration(cpu)} CPU for {streamed:.2f} GB", f"in RAM {duration(in_ram)}", (cpu - in_ram) / streamed)
    return judged(row, measured)


def bf16_second_load(bench: Bench) -> Row:
    setup = Setup(bench.llama.checkpoint, bench.llama.budget, bench.llama.limit, (FEW,))
    more = ("--dtype", "bfloat16", "--max-memory", f"cpu={setup.budget}")
    first = bench.forward("hf_bigload", setup, *more, limited=True, forwards=1)

    def run() -> dict[str, Report]:
        reports = {}
        for engine in ("hf_bigload", "stock"):
            bench.runner.chill(setup.files)
            reports[engine] = bench.forward(engine, setup, *more, "--warm-up", bench.warm_up, limited=True)
        return reports

    measured = bench.runner.steady(setup.files, run)
    assert_same_bits(first=first, plain=bench.plain(setup, "bfloat16"), **measured.value)
    ours, stock = (middle(measured.value[engine]["forwards"], "seconds") for engine in ("hf_bigload", "stock"))
    return judged(Row("", duration(ours), f"stock {duration(stock)}", stock / ours), measured)


def peak_memory(bench: Bench) -> Row:
    """Of a forward over a single token: a plan counts weights and rings, and more tokens compute with more memory."""
    run = bench.streamed(bench.llama).value
    few = forwards_of(run, FEW)[-1]  # those over more tokens come later
    peak, figure = few["peak_anon_bytes"] - run["runtime_anon_bytes"], _planned(run)
    more = max(_peak(each) / _planned(each) for each in bench.streamed_runs)
    groups = [each["cgroup"] for each in bench.streamed_runs if "cgroup" in each]
    met, killed = (sum(group[key] for group in groups) for key in ("failcnt", "oom_kills"))
    note = f"limit met {met} times, {killed} killed" if groups else "no cgroup"
    note += f"; with what {MANY} tokens compute with: {more:.3f}"
    verdict = "NOT MET" if met or killed else None
    return Row("", size(peak), f"plan {size(figure)}", peak / figure, note=note, verdict=verdict)


def _peak(report: Report) -> int:
    return report["peak_anon_bytes"] - report["runtime_anon_bytes"]


def _planned(report: Report) -> int:
    return report["plan"]["used"]["cpu"]


# ---------------------------------------------------------------- from RAM


def _loads(bench: Bench, dtype: str, repetitions: int) -> Row:
    """Loads of ours and stock in turns, all in RAM, with the checkpoint in the page cache."""
    setup = Setup(bench.llama.checkpoint, bench.llama.budget, bench.llama.limit, (FEW,))
    plain = bench.plain(setup, dtype)
    seconds: dict[str, list[float]] = {"hf_bigload": [], "stock": []}
    read = 0
    for _ in range(repetitions):
        for engine, times in seconds.items():
            report = bench.forward(engine, setup, *_dtype(dtype), forwards=1)
            assert_same_bits(plain=plain, **{engine: report})
            times.append(report["load"]["seconds"])
            read += report["load"]["read_bytes"]
    ours, stock = median(seconds["hf_bigload"]), median(seconds["stock"])
    note = f"{size(read)} came from disk" if read > 1e7 else ""
    return Row("", duration(ours), f"stock {duration(stock)}", ours / stock, note=note)


def load_cast(bench: Bench) -> Row:
    return _loads(bench, "bfloat16", bench.forwards)


def load_mapped(bench: Bench) -> Row:
    return _loads(bench, "float32", 2 * bench.forwards - 1)


def resident_small(bench: Bench) -> Row:
    options = ("--checkpoint", bench.small, "--forwards", bench.small_forwards)
    rounds = bench.runner.run("resident_forward", *options)["rounds"]
    for each in rounds:
        assert_same_hashes(each["logits_sha256"])
    ours, plain = (median(each["seconds"][engine] for each in rounds) for engine in ("hf_bigload", "plain"))
    ratio = median(each["seconds"]["hf_bigload"] / each["seconds"]["plain"] for each in rounds)
    return Row(
        "",
        duration(ours),
        f"plain {duration(plain)}",
        ratio,
        note=f"{bench.small_forwards} forwards, {len(rounds)} times",
    )


def python_per_block(bench: Bench) -> Row:
    report = bench.runner.run("block_time", "--forwards", bench.small_blocks)
    assert_same_hashes(report["logits_sha256"])
    ours, stock, resident = (report["seconds"][engine] for engine in ("hf_bigload", "stock", "resident"))
    ratio = (ours - resident) / (stock - resident)
    note = f"beside {duration(resident)} without any offload; with that, the ratio is {ours / stock:.2f}"
    return Row("", duration(ours - resident), f"stock {duration(stock - resident)}", ratio, note=note)


LEAST, MOST = True, False
CASES: Sequence[Case] = (
    Case("python_per_block", "Python time per streamed block", Target(0.5, MOST), python_per_block),
    Case("resident_small", "resident forward of a small model", Target(1.01, MOST), resident_small),
    Case("load_mapped", "load without a cast, warm", Target(1.0, MOST), load_mapped),
    Case("load_cast", "load with a cast (bf16 from fp32), warm", Target(0.4, MOST), load_cast),
    Case("disk_bound", "disk-bound forward, bytes per second", Target(0.90, LEAST), disk_bound),
    Case("compute_bound", "compute-bound forward, time", Target(1.15, MOST), compute_bound),
    Case("cpu_per_gigabyte", "CPU seconds per GB streamed", Target(0.25, MOST), cpu_per_gigabyte),
    Case("bf16_second_load", "bf16 from fp32, second load, stock over ours", Target(2.0, LEAST), bf16_second_load),
    Case("t0_streaming", "T0 in bf16, bytes per second", Target(0.85, LEAST), t0_streaming),
    Case("peak_memory", "peak memory over the plan's", Target(1.03, MOST), peak_memory),
)
"""In this order: first what wants a warm page cache, last what reads the others' figures."""
