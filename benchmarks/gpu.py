"""What an accelerator shows: the same results wherever weights rest, and how close loads and decoding come to the bus.

    bash benchmarks/gpu.sh                                   # sets up what is missing, tests, then runs this
    python -m benchmarks.gpu [--model llama_8b] [--minutes 8]
    python -m benchmarks.gpu --device sim --tiny             # the whole logic, on the simulated device

A decoder with random weights is written to the local disk, loaded whole, and then run with a half and a quarter of the
accelerator memory that it would need, from RAM and from disk: ours, stock, and diffusers' streamed group offload.
Exits with 1 if any result differs from the resident model's, or a process fails.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.accelerator import opened, pinned_bandwidth
from benchmarks.measure import shards
from benchmarks.pipelines import PipelineBench, pipeline_rows
from benchmarks.processes import (
    ATTEMPTS,
    RAW_BYTES,
    NotRunError,
    ResultsDifferError,
    Runner,
    WorkerError,
    can_isolate,
    guarded,
    judged,
    sample,
)
from benchmarks.raw_disk import Mode, measure
from benchmarks.report import Row, Target, append, duration, machine, markdown, print_table, rate, size
from benchmarks.write_checkpoint import ARCHITECTURES, ensure_checkpoint
from benchmarks.write_pipeline import ensure_pipeline

Report = dict[str, Any]

FACTORS = (2, 4)
"""How often the model's weights exceed the accelerator memory that it may use."""
OF_THE_BUS, OF_THE_LOAD, OVER_STOCK = Target(0.90, True), Target(0.8, True), Target(4.0, True)
STAGING = 0.125
"""The share of the model's size that stays in RAM where the rest is on disk."""
RUNTIME_BYTES = 6 * 10**9
"""What a process with an accelerator's libraries takes of a memory limit, besides weights."""
COPY_BYTES, TINY_COPY_BYTES = 256 << 20, 1 << 20
DISK_STEPS = 3
PIPELINE_STEPS, TINY_PIPELINE_STEPS = 30, 2
SOME_TINY_MODELS = ("llama", "t5")
GIGABYTE = 10**9


@dataclass
class GpuBench:
    """The processes of one run, each started once."""

    runner: Runner
    device: torch.device
    name: str
    """What the workers are told to open."""
    checkpoint: Path
    middle: Path
    """A model of middle size, compared wherever its weights rest."""
    tiny_models: Sequence[str]
    """Of the tiny models, those to compare; none stands for all."""
    steps: int
    copy_bytes: int
    pipeline: str
    """Its size."""
    pipeline_steps: int

    @property
    def files(self) -> list[Path]:
        return shards(self.checkpoint)

    @cached_property
    def nbytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)

    @cached_property
    def bus(self) -> float:
        """Bytes per second from pinned memory to the device."""
        return pinned_bandwidth(self.device, self.copy_bytes)

    @cached_property
    def page_cache(self) -> float:
        """Bytes per second that eight threads read the files with where they are cached."""
        self.runner.warm(self.files)
        reading = measure(Mode(direct=False, threads=8, cached=True), list(sample(self.files, 8 * RAW_BYTES, 0)))
        return reading.nbytes / reading.seconds

    def run(self, module: str, *arguments: object, limit: int | None = None) -> Report:
        return self.runner.run(module, "--device", self.name, *arguments, limit=limit)

    def decode(self, engine: str, *more: object, limit: int | None = None) -> Report:
        """Figures of a process that decodes; its logits are the resident model's, or this raises."""
        report = self.run("decode", "--engine", engine, "--checkpoint", self.checkpoint, *more, limit=limit)
        if engine != "resident":
            assert_same_logits(engine, report, self.resident)
        return report

    @cached_property
    def resident(self) -> Report:
        """The whole model on the device: the bits that all must give, and the time of the arithmetic alone."""
        return self.decode("resident", "--steps", self.steps)

    @cached_property
    def group_offload(self) -> Report:
        """It knows no budget: every block comes from RAM for every token."""
        return self.decode("group_offload", "--steps", self.steps)

    def load(self) -> Report:
        """Ours, whole on the device; a fresh process every time."""
        return self.decode("hf_bigload", "--steps", 1)


def assert_same_logits(what: str, report: Report, resident: Report) -> None:
    """Every forward that both ran gave the same bits; raises ResultsDifferError naming the first that did not."""
    pairs = zip([report["prompt"], *report["steps"]], [resident["prompt"], *resident["steps"]], strict=False)
    for number, (found, wanted) in enumerate(pairs):
        if found["logits_sha256"] != wanted["logits_sha256"]:
            raise ResultsDifferError(f"{what}: the logits of forward {number} are not the resident model's")


# ---------------------------------------------------------------- the rows


def correctness(bench: GpuBench) -> Iterator[Row]:
    tiny = [option for name in bench.tiny_models for option in ("--tiny", name)]
    for title, more in (("tiny models", tiny), (bench.middle.name, ["--checkpoint", bench.middle])):
        found = bench.run("placements", *more)["comparisons"]
        wrong = [f"{each['model']}, {each['placement']}" for each in found if not each["is_same"]]
        if wrong:
            raise ResultsDifferError(f"not as the resident model: {'; '.join(wrong)}")
        models, places = ({each[key] for each in found} for key in ("model", "placement"))
        note = f"{len(models)} models, {len(places)} placements; logits and generated tokens"
        yield Row(f"same bits as resident: {title}", f"{len(found)} of {len(found)}", verdict="met", note=note)


def hardware(bench: GpuBench) -> Iterator[Row]:
    yield Row("pinned memory to device", rate(bench.bus))
    yield Row("disk, 8 threads with O_DIRECT", rate(bench.runner.raw(bench.files)))
    yield Row("page cache, 8 threads", rate(bench.page_cache))


def load_warm(bench: GpuBench) -> Iterator[Row]:
    bound = min(bench.page_cache, bench.bus)  # this also brings the files into the page cache
    yield _load_row(bench, "load, from the page cache", bench.load(), bound, "page cache or bus")


def load_cold(bench: GpuBench) -> Iterator[Row]:
    def run() -> Report:
        bench.runner.chill(bench.files)
        return bench.load()

    steady = bench.runner.steady(bench.files, run)
    bound = min(steady.bytes_per_second, bench.bus)
    row = _load_row(bench, "load, from disk", steady.value, bound, "disk or bus")
    yield judged(row, steady)


def _load_row(bench: GpuBench, title: str, report: Report, bound: float, what: str) -> Row:
    speed = report["weight_bytes"] / report["load"]["seconds"]
    ours = f"{rate(speed)} ({duration(report['load']['seconds'])})"
    return Row(title, ours, f"{what} {rate(bound)}", speed / bound, OF_THE_LOAD)


def from_ram(bench: GpuBench, factor: int) -> Iterator[Row]:
    options = ("--max-memory", f"0={bench.nbytes // factor},cpu={4 * bench.nbytes}", "--steps", bench.steps)
    ours = bench.decode("hf_bigload", *options)
    title = f"decode, {factor}x its budget, from RAM"
    yield _transfer_row(bench, title, ours, "copied_bytes", bench.bus, "pinned")
    yield _against(title, ours, "stock", lambda: bench.decode("stock", *options), OVER_STOCK)
    yield _against(title, ours, "group_offload", lambda: bench.group_offload)


def from_disk(bench: GpuBench, factor: int) -> Iterator[Row]:
    in_ram = int(STAGING * bench.nbytes)
    options = ("--max-memory", f"0={bench.nbytes // factor},cpu={in_ram}", "--steps", DISK_STEPS)

    def run(engine: str = "hf_bigload") -> Report:
        bench.runner.chill(bench.files)
        return bench.decode(engine, *options, limit=in_ram + RUNTIME_BYTES)

    steady = bench.runner.steady(bench.files, run)
    title = f"decode, {factor}x its budget, from disk"
    bound = min(steady.bytes_per_second, bench.bus)
    yield judged(_transfer_row(bench, title, steady.value, "read_bytes", bound, "disk or bus"), steady)
    note = "" if bench.runner.isolated else "without a memory limit stock may read the page cache"
    yield _against(title, steady.value, "stock", lambda: run("stock"), OVER_STOCK, note)


def _transfer_row(bench: GpuBench, title: str, report: Report, figure: str, bound: float, what: str) -> Row:
    """Bytes per second of the steps that are measured: the first one still learns what follows what."""
    steps = report["steps"][1:] or report["steps"]
    speed = median(step[figure] / step["seconds"] for step in steps)
    seconds, nbytes = _step_seconds(report), median(step[figure] for step in steps)
    ours = f"{rate(speed)} ({size(nbytes)} in {duration(seconds)} a token)"
    note = f"resident {duration(_step_seconds(bench.resident))} a token"
    return Row(title, ours, f"{what} {rate(bound)}", speed / bound, OF_THE_BUS, note)


def _against(
    title: str, ours: Report, peer: str, run: Callable[[], Report], target: Target | None = None, note: str = ""
) -> Row:
    """A token's time, a peer's over ours. A peer that fails or gives other bits fails its row, and not the run."""
    title, package = f"{title}: {peer} over ours", {"stock": "accelerate", "group_offload": "diffusers"}[peer]
    if importlib.util.find_spec(package) is None:
        return Row(title, verdict=f"not run: no {package}")
    try:
        theirs, mine = _step_seconds(run()), _step_seconds(ours)
    except (ResultsDifferError, WorkerError) as error:
        print(f"{title}: {error}", file=sys.stderr, flush=True)
        return Row(title, verdict=f"{peer} failed", note=str(error).splitlines()[0])
    return Row(title, duration(mine), f"{peer} {duration(theirs)}", theirs / mine, target, note)


def _step_seconds(report: Report) -> float:
    return median(step["seconds"] for step in report["steps"][1:] or report["steps"])


def pipeline(bench: GpuBench) -> Iterator[Row]:
    if importlib.util.find_spec("diffusers") is None:
        raise NotRunError("not run: no diffusers")
    folder = bench.checkpoint.parent / f"pipeline_{bench.pipeline}"
    checkpoint = ensure_pipeline(bench.pipeline, folder, bench.device)
    yield from pipeline_rows(
        PipelineBench(bench.runner.run, bench.name, checkpoint, bench.pipeline, bench.pipeline_steps)
    )


Part = tuple[str, Callable[[GpuBench], Iterator[Row]]]


def parts() -> list[Part]:
    """In order: what must be right, then what costs least."""
    ordered: list[Part] = [
        ("correctness", correctness),
        ("hardware", hardware),
        ("load_warm", load_warm),
    ]
    ordered += [(f"ram_{factor}x", partial(from_ram, factor=factor)) for factor in FACTORS]
    ordered += [("load_cold", load_cold)]
    ordered += [(f"disk_{factor}x", partial(from_disk, factor=factor)) for factor in FACTORS[::-1]]
    return [*ordered, ("pipeline", pipeline)]


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Correctness and bandwidth on an accelerator, in one table.")
    parser.add_argument("--device", help="cuda, xpu, ..., or sim; default: what there is")
    parser.add_argument("--tiny", action="store_true", help="tiny models, for the logic alone")
    parser.add_argument("--model", choices=sorted(ARCHITECTURES), help="a decoder (llama_8b)")
    parser.add_argument(
        "--middle", choices=sorted(ARCHITECTURES), help="of middle size, to compare (llama_1b, in bf16)"
    )
    parser.add_argument("--folder", type=Path, default=Path("build/bench"), help="for checkpoints (build/bench)")
    parser.add_argument("--part", action="append", choices=[name for name, _ in parts()], help="default: all")
    parser.add_argument("--steps", type=int, default=8, help="tokens decoded from RAM")
    parser.add_argument("--minutes", type=float, default=8, help="after which what is left is not run")
    parser.add_argument("--read-limit", type=float, default=200, help="GB read from disk, beyond which no repetition")
    parser.add_argument("--record", type=Path, help="append the table to this file, as markdown")
    options = parser.parse_args(argv)
    options.model = options.model or ("llama_8b_tiny" if options.tiny else "llama_8b")
    options.middle = options.middle or ("llama_1b_tiny" if options.tiny else "llama_1b")
    return options


def prepare(options: argparse.Namespace, device: torch.device, scratch: str) -> GpuBench:
    deadline = time.monotonic() + 60 * options.minutes
    runner = Runner(
        {"HF_BIGLOAD_CACHE": f"{scratch}/cache"},
        isolated=not options.tiny and can_isolate(),
        read_limit=int(options.read_limit * GIGABYTE),
        attempts=1 if options.tiny else ATTEMPTS,
        deadline=deadline,
    )
    return GpuBench(
        runner=runner,
        device=device,
        name=device.type,
        checkpoint=ensure_checkpoint(options.model, options.folder / options.model),
        middle=ensure_checkpoint(options.middle, options.folder / f"{options.middle}_bf16", torch.bfloat16),
        tiny_models=SOME_TINY_MODELS if options.tiny else (),
        steps=options.steps,
        copy_bytes=TINY_COPY_BYTES if options.tiny else COPY_BYTES,
        pipeline="tiny" if options.tiny else "short",
        pipeline_steps=TINY_PIPELINE_STEPS if options.tiny else PIPELINE_STEPS,
    )


def about(bench: GpuBench) -> list[str]:
    device = torch.get_device_module(bench.device).get_device_name(bench.device)
    lines = machine(
        f"Device: {device}. Model: {bench.checkpoint.name}, {size(bench.nbytes)}. "
        f"Read from disk: {size(bench.runner.read_bytes)}."
    )
    return lines if bench.runner.isolated else [*lines, "Without memory cgroups and dropped caches."]


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_options(argv)
    options.folder.mkdir(parents=True, exist_ok=True)
    with opened(options.device) as device, tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        bench = prepare(options, device, scratch)
        chosen = [part for part in parts() if not options.part or part[0] in options.part]
        results = [result for name, rows in chosen for result in guarded(Row(name), partial(rows, bench))]
        lines = about(bench)
    rows = [row for row, _ in results]
    print_table(rows, "Accelerator")
    print("\n".join(lines))
    if options.record:
        append(options.record, markdown(rows, "Accelerator: `benchmarks/gpu.sh`", lines))
    return 0 if all(right for _, right in results) else 1


if __name__ == "__main__":
    sys.exit(main())
