"""What a person reads of a plan, a run, an estimate or a machine."""

from __future__ import annotations

import io
import math
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from .errors import human_bytes
from .specs import CPU, DISK, DTYPE_BYTES, BlockSpec, Needs, PhaseTime, Placement, Plan
from .timeline import Timeline

if TYPE_CHECKING:
    from .doctor import Diagnosis
    from .estimate import Estimate


def plan_table(plan: Plan, title: str = "model") -> str:
    """The plan as text: which blocks rest where and run where, and what each device has to hold."""
    return _as_text([_blocks(plan, title), _budgets(plan)])


def plan_view(plan: Plan, title: str = "model") -> Group:
    """The plan for a terminal: the memory of each device as a bar, then the table of blocks."""
    return Group(_bars(plan), _blocks(plan, title))


def prediction(plan: Plan) -> str:
    """In words, how long a request is predicted to take."""
    workload = plan.workload
    many = f"{workload.batch_size} sequences" if workload.batch_size > 1 else "one sequence"
    what = f"{many} of {workload.context_length:,} tokens and {workload.new_tokens:,} new ones"
    calls = ", ".join(_phase(phase) for phase in plan.predicted)
    how = "as this machine was measured" if plan.measured else "with round figures; `hf-bigload doctor` measures"
    best = f" No placement could take less than {_seconds(plan.bound)}." if plan.bound else ""
    return f"Predicted for {what}: {_seconds(plan.seconds)} ({calls}), {how}.{best}"


def travel(plan: Plan) -> str:
    """In words, how long weights are on their way for one image: of a pipeline, the arithmetic is not known."""
    calls = ", ".join(_phase(phase) for phase in plan.predicted)
    return f"Weights alone keep a request of the default number of steps busy for {_seconds(plan.seconds)} ({calls})."


def components_table(blocks: Sequence[BlockSpec]) -> Table:
    """The components of a pipeline in the order in which they run, and how often they are called for one request."""
    table = Table()
    for column in ("component", "weights", "calls"):
        table.add_column(column, justify="left" if column == "component" else "right")
    for component, group in groupby(blocks, key=lambda block: block.name.partition(".")[0]):
        members = list(group)
        table.add_row(component, human_bytes(sum(b.nbytes for b in members)), str(members[0].calls or 1))
    return table


def _phase(phase: PhaseTime) -> str:
    if phase.calls == 1:
        return f"{phase.name} {_seconds(phase.seconds)}"
    return f"{phase.name} {phase.calls:,} times {_seconds(phase.seconds_per_call)}"


def _seconds(seconds: float) -> str:
    if seconds >= 600:
        return f"{seconds / 60:.0f} min"
    if seconds < 0.1:
        return f"{seconds * 1000:.2g} ms"
    return f"{seconds:.2g} s" if seconds < 100 else f"{seconds:.0f} s"


def _blocks(plan: Plan, title: str) -> Table:
    blocks = Table(title=f"hf_bigload plan for {title}", title_justify="left")
    for column, justify in (("blocks", "left"), ("rest in", "left"), ("run on", "left"), ("size", "right")):
        blocks.add_column(column, justify=justify)  # type: ignore[arg-type]
    for (home, runs), group in groupby(plan.placements, key=lambda p: (p.home, runs_on(p))):
        members = list(group)
        blocks.add_row(_names(members), rests_in(home), runs, human_bytes(sum(p.block.nbytes for p in members)))
    return blocks


def _budgets(plan: Plan) -> Table:
    budgets = Table()
    for column in ("device", "kept for the model", "of which ring", "cache, activations", "budget"):
        budgets.add_column(column, justify="left" if column == "device" else "right")
    for each in memory_of(plan):
        parts = dict(each.parts)
        beside = parts.get("cache", 0) + parts.get("activations", 0)
        budget = "-" if each.budget is None else human_bytes(each.budget)
        sizes = (each.used, parts.get("ring", 0), beside)
        budgets.add_row(each.device, *map(human_bytes, sizes), budget)
    return budgets


def _devices(plan: Plan) -> list[str]:
    return sorted({*plan.used, *plan.budget}, key=_order)


# ---------------------------------------------------------------- bars

_BAR_WIDTH = 40
_PART_STYLES = {
    "weights": ("green", "█", "#"),
    "ring": ("yellow", "▓", "="),
    "cache": ("blue", "▒", "+"),
    "activations": ("magenta", "▚", "*"),
}
"""Of each part of a device's memory: its colour, and its signs with and without the characters of a drawn bar."""


@dataclass(frozen=True)
class DeviceMemory:
    """What a plan keeps in the memory of one device: (label, bytes) for each part, and the budget, if it has one."""

    device: str
    parts: tuple[tuple[str, int], ...]
    budget: int | None

    @property
    def used(self) -> int:
        return sum(nbytes for _, nbytes in self.parts)


def memory_of(plan: Plan) -> list[DeviceMemory]:
    """Each device's memory, part by part: accelerators first, then RAM, then the disk."""
    memory = []
    for device in _devices(plan):
        beside = {
            "ring": plan.ring.get(device, 0),
            "cache": plan.cache.get(device, 0),
            "activations": plan.activations.get(device, 0),
        }
        weights = plan.used.get(device, 0) - sum(beside.values())
        parts = {"weights": weights} | {label: nbytes for label, nbytes in beside.items() if nbytes}
        memory.append(DeviceMemory(device, tuple(parts.items()), plan.budget.get(device)))
    return memory


@dataclass(frozen=True)
class MemoryBar:
    """The parts of one device's memory, and what is left of the budget."""

    parts: tuple[tuple[str, int], ...]
    budget: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        *counts, free = self.cells()
        text = Text()
        for (label, _), count in zip(self.parts, counts, strict=True):
            style, sign, plain = _PART_STYLES[label]
            text.append((plain if options.ascii_only else sign) * count, style)
        yield text.append(("." if options.ascii_only else "░") * free, "bright_black")

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(_BAR_WIDTH, _BAR_WIDTH)

    def cells(self) -> tuple[int, ...]:
        """Characters of each part and of the rest; what is there has one at least, wherever there is room for it."""
        whole = max(self.budget, sum(nbytes for _, nbytes in self.parts), 1)
        counts: list[int] = []
        for _, nbytes in self.parts:
            counts.append(min(_share(nbytes, whole, _BAR_WIDTH), _BAR_WIDTH - sum(counts)))
        return *counts, _BAR_WIDTH - sum(counts)


def _share(part: int, whole: int, width: int) -> int:
    return max(round(part * width / whole), 1 if part else 0)


def _bars(plan: Plan) -> Table:
    memory = memory_of(plan)
    there = {label for each in memory for label, _ in each.parts} | {"weights", "ring"}
    labels = [label for label in _PART_STYLES if label in there]
    table = Table(box=None, pad_edge=False)
    for column in ("device", "memory", *labels, "budget"):
        table.add_column(column, justify="left" if column in ("device", "memory") else "right")
    for each in memory:
        bar: MemoryBar | str = "" if each.budget is None else MemoryBar(each.parts, each.budget)
        parts = dict(each.parts)
        sizes = [human_bytes(parts[label]) if label in parts else "-" for label in labels]
        table.add_row(rests_in(each.device), bar, *sizes, human_bytes(each.budget) if each.budget else "-")
    return table


# ---------------------------------------------------------------- runs

LANE_NAMES = {"read": "disk to RAM", "copy": "copies to", "compute": "compute on", "stall": "waiting on"}
_LONGEST_STALLS = 5


def timeline_table(timeline: Timeline) -> str:
    """A recorded run as text: how each lane was used, and which blocks were waited for longest."""
    return _as_text([_lanes(timeline), _stalls(timeline)] if timeline.stalls() else [_lanes(timeline)])


def lane_name(lane: str, device: str) -> str:
    """What a reader calls a lane: "disk to RAM", "copies to cuda:0"."""
    return LANE_NAMES[lane] if lane == "read" else f"{LANE_NAMES[lane]} {device}"


def _lanes(timeline: Timeline) -> Table:
    table = Table(title=f"a run of {timeline.model}: {human_seconds(timeline.seconds)}", title_justify="left")
    for column in ("", "busy", "of the time", "spans", "bytes", "a second"):
        table.add_column(column, justify="right" if column else "left")
    for use in timeline.uses():
        share = f"{use.busy / timeline.seconds:.0%}" if timeline.seconds else "-"
        moved = (human_bytes(use.nbytes), f"{use.rate / 1e9:.2f} GB") if use.nbytes else ("-", "-")
        table.add_row(lane_name(use.lane, use.device), human_seconds(use.busy), share, str(use.spans), *moved)
    return table


def _stalls(timeline: Timeline) -> Table:
    table = Table(title="longest waited for", title_justify="left")
    table.add_column("block")
    table.add_column("in all", justify="right")
    for block, seconds in timeline.stalls()[:_LONGEST_STALLS]:
        table.add_row(Text(block or "(root)"), human_seconds(seconds))
    return table


def human_seconds(seconds: float) -> str:
    """Seconds for a reader, three significant digits: "1.92 s", "35.1 ms", "801 µs"."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size or unit == "µs":
            value = seconds / size
            return f"{value:.{max(0, 2 - int(math.log10(value)) if value >= 1 else 2)}f} {unit}"
    raise AssertionError("unreachable")


# ---------------------------------------------------------------- estimates


def estimate_view(estimate: Estimate) -> Group:
    """What a model and a request take: the table of its blocks, and what that comes to."""
    return Group(kinds_table(estimate.spec.blocks, estimate.needs), _sums(estimate))


def estimate_table(estimate: Estimate) -> str:
    """The same as text."""
    table = kinds_table(estimate.spec.blocks, estimate.needs)
    table.title, table.title_justify = f"hf_bigload estimate of {estimate.name}", "left"
    return _as_text([table, _sums(estimate)])


def kinds_table(blocks: Sequence[BlockSpec], needs: Needs) -> Table:
    """Blocks of an unplaced model; those whose names differ in numbers only are one row."""
    kinds: dict[str, list[BlockSpec]] = {}
    for block in blocks:
        kinds.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", block.name) or "(root)", []).append(block)
    table = Table()
    for column in ("blocks", "number", "largest", "together", "cache"):
        table.add_column(column, justify="left" if column == "blocks" else "right")
    for name, members in kinds.items():
        sizes = [block.nbytes for block in members]
        cache = sum(needs.cache.get(block.name, 0) for block in members)
        if sum(sizes) or cache:
            figures = (human_bytes(max(sizes)), human_bytes(sum(sizes)), human_bytes(cache) if cache else "-")
            table.add_row(name, str(len(sizes)), *figures)
    return table


def _sums(estimate: Estimate) -> Table:
    needs, workload = estimate.needs, estimate.needs.workload
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(justify="right")
    table.add_column()
    table.add_row(human_bytes(estimate.weights[""]), "weights")
    table.add_row(human_bytes(estimate.buffers), "buffers")
    if needs.method == "none":
        table.add_row("?", "cache and activations: it is not known how this model is called")
        return table
    request = f"{workload.batch_size} x ({workload.context_length} + {workload.new_tokens}) tokens"
    how = f"traced, within {needs.error:.0%}" if needs.method == "trace" else "at most: it could not be traced"
    table.add_row(human_bytes(estimate.cache), f"cache at the end of {request}")
    table.add_row(human_bytes(estimate.activations), f"activations at their peak ({how})")
    table.add_row(human_bytes(estimate.total), "together, beside the runtime itself")
    return table


# ---------------------------------------------------------------- machines


def machine_view(found: Diagnosis) -> Group:
    """What `hf-bigload doctor` found: the machine, how fast it moves weights, its libraries, and what is wrong."""
    return Group(_memory(found), _speeds(found), _arithmetic(found), _libraries(found), _problems(found))


def _memory(found: Diagnosis) -> Table:
    table = Table(title=f"{found.system}, {found.cpus} CPUs", title_justify="left")
    for column in ("memory", "free", "of"):
        table.add_column(column, justify="left" if column == "memory" else "right")
    for each in found.accelerators:
        table.add_row(f"{each.name} ({each.model})", human_bytes(each.free), human_bytes(each.total))
    table.add_row("RAM, as far as it may be used", human_bytes(found.ram_free), human_bytes(found.ram_total))
    for limit, used in found.container_limits:
        table.add_row("of a container", human_bytes(max(0, limit - used)), human_bytes(limit))
    table.add_row(f"disk of {found.cache_folder}", human_bytes(found.disk_free), "")
    return table


def _speeds(found: Diagnosis) -> Table | str:
    if found.measurement is None:
        return "No bandwidths were measured."
    figures = found.measurement.bandwidths
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(found.measurement.measured_at))
    table = Table(title=f"bandwidth, measured {when}", title_justify="left")
    table.add_column("from")
    table.add_column("to")
    table.add_column("a second", justify="right")
    how = "past the page cache" if figures.direct else "through the page cache"
    table.add_row(f"disk, {how}", "RAM", human_bytes(figures.disk))
    table.add_row("RAM", "RAM, one thread", human_bytes(figures.host_copy))
    for name, rate in figures.to_device.items():
        table.add_row("RAM" if name in figures.not_pinned else "RAM, page-locked", name, human_bytes(rate))
    return table


def _arithmetic(found: Diagnosis) -> Table | str:
    """How fast weights are multiplied by: what memory gives for one token, and arithmetic for many."""
    if found.measurement is None:
        return ""
    table = Table(title="multiplication by weights", title_justify="left")
    for column in ("on", "dtype", "for one token", "for many"):
        table.add_column(column, justify="right" if column.startswith("for") else "left")
    for device, arithmetic in found.measurement.bandwidths.arithmetic.items():
        for dtype, curve in filter(itemgetter(0), arithmetic.curves.items()):  # "" stands for any other
            (few, slow), (many, fast) = curve[0], curve[-1]
            read = human_bytes(few * DTYPE_BYTES.get(dtype, 2) / slow)
            table.add_row(device, dtype, f"{read} a second", f"{2e-12 * many / fast:.2f} TFLOP/s")
    return table


def _libraries(found: Diagnosis) -> Table:
    table = Table()
    for column in ("library", "version", "what is hooked"):
        table.add_column(column)
    for each in found.libraries:
        hooked = "" if each.seams is None else "has moved" if each.moved else "is where it should be"
        table.add_row(each.name, each.version or "not installed", hooked)
    return table


def _problems(found: Diagnosis) -> str:
    return "\n".join(f"! {problem}" for problem in found.problems) or "Nothing is wrong."


# ---------------------------------------------------------------- words


def runs_on(placement: Placement) -> str:
    """Where a block is computed, in words."""
    return "cpu, where it rests" if placement.at_home and placement.device != CPU else placement.device


def rests_in(home: str) -> str:
    """What a reader calls the place."""
    return {CPU: "RAM", DISK: "disk"}.get(home, home)


def _names(placements: list[Placement]) -> str:
    first, last = (p.block.name or "(root)" for p in (placements[0], placements[-1]))
    return first if len(placements) == 1 else f"{first} ... {last} ({len(placements)})"


def _order(device: str) -> tuple[int, str]:
    return ({CPU: 1, DISK: 2}.get(device, 0), device)


def _as_text(tables: Sequence[Table]) -> str:
    """For wherever the text goes: a pipe or terminal without the characters of a drawn box gets plain ones."""
    plain = not _can_draw(getattr(sys.stdout, "encoding", None) or "utf-8")
    console = Console(file=io.StringIO(), width=110, force_terminal=False)
    for table in tables:
        table.box = box.ASCII2 if plain else table.box
        console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return text.replace("µs", "us") if plain else text


def _can_draw(encoding: str) -> bool:
    try:
        "┏━┓│µ".encode(encoding)
    except UnicodeEncodeError:
        return False
    return True
