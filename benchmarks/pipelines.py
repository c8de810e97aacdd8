"""A pipeline whose denoiser fits and whose text encoders do not: what a call moves, holds and takes, beside diffusers.

    python -m benchmarks.pipelines                           # on the accelerator there is, with real widths
    python -m benchmarks.pipelines --device sim --steps 30   # tiny, on the simulated device: bytes, no times

Each engine is a process that makes the same image several times; the last call counts. Exits with 1 if our pixels are
not the resident pipeline's. A peer that fails or gives other pixels fails its own row.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.accelerator import SIMULATED, opened
from benchmarks.pipeline_call import DENOISER, ENCODERS, PEERS, file_bytes
from benchmarks.processes import ResultsDifferError, Runner, WorkerError, guarded
from benchmarks.report import Row, Target, Within, append, duration, machine, markdown, print_table, size
from benchmarks.write_pipeline import SIZES, dtype_of, ensure_pipeline

Report = dict[str, Any]

TITLE = "Pipelines"
NO_TIME = "no time on a simulated device"


@dataclass
class PipelineBench:
    """The processes that call one pipeline, each started once."""

    run: Callable[..., Report]
    """Of a measuring module, with these arguments; see `Runner.run`."""
    device_name: str
    checkpoint: Path
    size: str
    steps: int
    calls: int = 2

    def call(self, engine: str) -> Report:
        """Figures of a process that calls the pipeline; its pixels are the resident one's, or this raises."""
        dtype = str(dtype_of(self.size)).removeprefix("torch.")
        options: list[object] = ["--checkpoint", self.checkpoint, "--dtype", dtype, "--device", self.device_name]
        options += ["--steps", self.steps, "--calls", self.calls]
        options += [] if SIZES[self.size] is None else ["--full-size"]
        report = self.run("pipeline_call", "--engine", engine, *options)
        if engine != "resident":
            assert_same_pixels(report, self.resident)
        return report

    @cached_property
    def resident(self) -> Report:
        return self.call("resident")

    @cached_property
    def ours(self) -> Report:
        return self.call("hf_bigload")


def assert_same_pixels(report: Report, resident: Report) -> None:
    """Every call of both made the same image; raises ResultsDifferError otherwise."""
    wanted = {call["pixels_sha256"] for call in resident["calls"]}
    found = {call["pixels_sha256"] for call in report["calls"]}
    if found != wanted or len(wanted) != 1:
        raise ResultsDifferError(f"{report['engine']}: pixels {_short(found)}, resident {_short(wanted)}")


def _short(hashes: set[str]) -> str:
    return ", ".join(sorted(value[:12] for value in hashes))


# ---------------------------------------------------------------- the rows


def pipeline_rows(bench: PipelineBench) -> Iterator[Row]:
    """What ours moved, by component; then bytes, memory and time beside each other way."""
    yield Row("pipeline: same pixels as resident", f"{len(bench.ours['calls'])} calls", verdict="met")
    yield _denoiser(bench)
    yield from (_each_block_once(bench, name) for name in ENCODERS)
    moved = sum(bench.ours["moved"]["vae"].values())
    yield Row("pipeline: vae, copied per call", size(moved), "weights " + size(file_bytes(bench.checkpoint, "vae")))
    for peer in PEERS:
        yield from _beside(bench, peer)


def _denoiser(bench: PipelineBench) -> Row:
    moved, weights = sum(bench.ours["moved"][DENOISER].values()), file_bytes(bench.checkpoint, DENOISER)
    title = f"pipeline: {DENOISER}, copied per call"
    return Row(
        title, size(moved), f"weights {size(weights)}", moved / weights, Target(0, False), f"{bench.steps} steps"
    )


def _each_block_once(bench: PipelineBench, name: str) -> Row:
    """The ratio is that of the block that is farthest from having come once."""
    moved, streamed = bench.ours["moved"][name], bench.ours["streamed"][name]
    title = f"pipeline: {name}, copied per call"
    rows_of_tables = sum(copied for block, copied in moved.items() if block not in streamed)
    if not streamed:
        return Row(title, size(rows_of_tables), verdict="rests on the device")
    ratios = {block: moved.get(block, 0) / nbytes for block, nbytes in streamed.items()}
    worst = max(ratios, key=lambda block: abs(ratios[block] - 1))
    note = f"{len(streamed)} blocks; ratio of {worst}" + (
        f"; and {size(rows_of_tables)} of rows of tables" if rows_of_tables else ""
    )
    copied = sum(moved.get(block, 0) for block in streamed)
    return Row(title, size(copied), f"once {size(sum(streamed.values()))}", ratios[worst], Within(0), note)


def _beside(bench: PipelineBench, peer: str) -> Iterator[Row]:
    """A peer's bytes, peak and seconds; a peer that fails or gives other pixels fails its row, and not the run."""
    try:
        report = bench.resident if peer == "resident" else bench.call(peer)
    except (ResultsDifferError, WorkerError) as error:
        print(f"{peer}: {error}", file=sys.stderr, flush=True)
        yield Row(f"pipeline, {peer}", verdict=f"{peer} failed", note=str(error).strip().splitlines()[-1])
        return
    theirs, ours = report["calls"][-1], bench.ours["calls"][-1]
    if ours["copied_bytes"] is None:
        mine = sum(sum(blocks.values()) for blocks in bench.ours["moved"].values())
        yield Row(f"pipeline, {peer}: copied per call", size(mine), note="the device does not count a peer's bytes")
    else:
        yield _ratio(f"pipeline, {peer}: copied per call", size, ours["copied_bytes"], theirs["copied_bytes"])
    yield _ratio(f"pipeline, {peer}: peak on the device", size, ours["peak_bytes"], theirs["peak_bytes"])
    verdict = NO_TIME if bench.device_name == SIMULATED else None
    yield _ratio(f"pipeline, {peer}: a call", duration, ours["seconds"], theirs["seconds"], verdict)


def _ratio(title: str, told: Callable[[float], str], ours: float, theirs: float, verdict: str | None = None) -> Row:
    return Row(title, told(ours), told(theirs), ours / theirs, verdict=verdict)


# ---------------------------------------------------------------- the command line


def about(bench: PipelineBench, device: torch.device) -> list[str]:
    name = torch.get_device_module(device).get_device_name(device)
    encoders = size(file_bytes(bench.checkpoint, *ENCODERS))
    lines = machine(
        f"Device: {name}. Flux, {bench.size}: {size(file_bytes(bench.checkpoint))}, of which the denoiser "
        f"{size(file_bytes(bench.checkpoint, DENOISER))} and the text encoders {encoders}; {bench.steps} steps, call "
        f"{bench.calls} counts."
    )
    if "ours" in vars(bench):
        lines.append(f"Our budget for weights on the device: {size(bench.ours['budget'])}; peaks hold activations too.")
    if bench.device_name == SIMULATED:
        lines.append(
            "The simulated device runs on the host's processor and copies in no time: its seconds say nothing. Its "
            "bytes are those of copies to it, with inputs, and with ours the gaps between tensors in a ring."
        )
    return lines


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A pipeline under one budget, beside diffusers' own offloads.")
    parser.add_argument("--device", help="cuda, xpu, ..., or sim; default: what there is")
    parser.add_argument("--size", choices=list(SIZES), help="short; on the simulated device tiny")
    parser.add_argument("--steps", type=int, default=30, help="of the denoiser")
    parser.add_argument("--calls", type=int, default=2, help="the last one counts")
    parser.add_argument("--folder", type=Path, default=Path("build/bench"), help="for the pipeline (build/bench)")
    parser.add_argument("--record", type=Path, help="append the table to this file, as markdown")
    options = parser.parse_args(argv)
    options.size = options.size or ("tiny" if options.device == SIMULATED else "short")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_options(argv)
    options.folder.mkdir(parents=True, exist_ok=True)
    with opened(options.device) as device, tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        checkpoint = ensure_pipeline(options.size, options.folder / f"pipeline_{options.size}", device)
        runner = Runner({"HF_BIGLOAD_CACHE": f"{scratch}/cache"}, isolated=False, read_limit=0)
        bench = PipelineBench(runner.run, device.type, checkpoint, options.size, options.steps, options.calls)
        results = list(guarded(Row("pipeline"), lambda: pipeline_rows(bench)))
        lines = about(bench, device)
    rows = [row for row, _ in results]
    print_table(rows, TITLE)
    print("\n".join(lines))
    if options.record:
        append(options.record, markdown(rows, f"{TITLE}: `python -m benchmarks.pipelines`", lines))
    return 0 if all(right for _, right in results) else 1


if __name__ == "__main__":
    sys.exit(main())
