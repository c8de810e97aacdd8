"""The planner: a home and an execution device for every block, within the budgets.

`make_plan` decides by itself, `follow_map` does what a device map says. Both end in the same frozen `Plan`.

It first tries to stream nothing. Otherwise `search` looks for the residency, and for the ring of two slots or one,
whose predicted schedule is shortest for the workload; `schedule` says how long that is. For "sequential", for several
accelerators and where the search finds nothing, blocks fill the devices in order: each block size is tried as the
largest that may stream, whatever is larger is kept resident, and the ring that leaves the most bytes resident is taken.
A block that fits nowhere is cut into its leaves; a leaf larger than the device is computed where it rests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from math import inf
from typing import Any

from .errors import BudgetError, human_bytes
from .schedule import Task, phases, predict, task, window
from .search import DEVICE, FILES, RAM, Choice, Item, Problem, Search, Step
from .specs import CPU, DISK, BlockSpec, Hardware, ModelSpec, Placement, Plan, Workload

STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
_MAX_RING_CANDIDATES = 32

_DEPTHS = (2, 1)
"""Blocks that a ring holds at once, the best first: with one, nothing comes while something runs."""

_WORTH_A_SLOT = 0.01
"""What a plan without prefetch has to gain: a second slot also hides latencies, which no prediction knows."""

MapValue = Callable[[str], Any]
"""Device name -> how device maps write it (accelerators by number)."""


def make_plan(
    spec: ModelSpec,
    hardware: Hardware,
    strategy: str = "auto",
    offload_buffers: bool = False,
    map_value: MapValue = str,
    workload: Workload | None = None,
) -> Plan:
    """Place every block of `spec` on `hardware`.

    Args:
        strategy: "auto" and "balanced" spread a model that fits evenly over the accelerators; "balanced_low_0" leaves
            the first as empty as it can; "sequential" fills them in order.
        offload_buffers: buffers of streamed blocks rest with their weights, instead of on the execution device.
        workload: what a request is, whose predicted time is minimised where not everything can be resident.

    Raises:
        BudgetError: no placement keeps the budgets; names what fits nowhere, its bytes and the budgets.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"device_map={strategy!r}: choose one of {', '.join(STRATEGIES)}, a device, or a dict.")
    workload = workload or Workload()
    resident = _resident(spec, hardware, strategy)
    if resident is None:
        placements, depth = _offloaded(spec, hardware, strategy, offload_buffers, workload)
    else:
        placements, depth = resident, 0
    computes = {placement.device for placement in placements}
    main = next((name for name in hardware.devices if name in computes), CPU)
    return _finish(spec, placements, main, hardware, workload, offload_buffers, map_value, depth)


def _offloaded(
    spec: ModelSpec, hardware: Hardware, strategy: str, offload_buffers: bool, workload: Workload
) -> tuple[list[Placement], int]:
    """A placement with offload, and the blocks that its rings hold: the fastest that the search finds."""
    last_first = strategy != "sequential"
    best: tuple[list[Placement], int] | None = None
    if last_first and len(hardware.devices) <= 1:
        offload, shortest = _Offload(spec, hardware, offload_buffers, last_first, depth=1), inf
        problem = offload.problem(workload)
        for depth in _DEPTHS:
            problem = replace(problem, slots=depth)
            choice = Search(problem).best()
            seconds = inf if choice is None else problem.seconds(choice)
            if choice is not None and seconds < shortest * (1 - _WORTH_A_SLOT):
                best, shortest = (offload.at(choice), depth), seconds
    return best or _filled_in_order(spec, hardware, offload_buffers, last_first)


def _filled_in_order(
    spec: ModelSpec, hardware: Hardware, offload_buffers: bool, last_first: bool
) -> tuple[list[Placement], int]:
    """The same for "sequential", several accelerators, and where blocks have to be cut to pass through RAM."""
    for depth in _DEPTHS[:-1]:
        try:
            return _Offload(spec, hardware, offload_buffers, last_first, depth).placements(), depth
        except BudgetError:
            continue
    return _Offload(spec, hardware, offload_buffers, last_first, _DEPTHS[-1]).placements(), _DEPTHS[-1]


def follow_map(
    spec: ModelSpec,
    home_of: Callable[[str], str],
    main_device: str,
    hardware: Hardware,
    offload_buffers: bool = False,
    map_value: MapValue = str,
    workload: Workload | None = None,
) -> Plan:
    """The plan that a complete device map describes: `home_of(tensor name)` is its home.

    A block whose tensors the map sends to several places is cut into its leaves.
    """
    placements = []
    for block in spec.blocks:
        homes = {home_of(t.name) for t in block.tensors}
        cut = block.whole and (len(homes) > 1 or (homes <= {CPU, DISK} and is_mostly_tables(block)))
        placements += [_as_mapped(unit, home_of, main_device) for unit in (block.parts if cut else (block,))]
    finish = partial(
        _finish, spec, placements, main_device, hardware, workload or Workload(), offload_buffers, map_value
    )
    for depth in _DEPTHS:
        plan = finish(depth)
        if plan.keeps_budget:
            break
    return plan


def _as_mapped(block: BlockSpec, home_of: Callable[[str], str], main: str) -> Placement:
    homes = {t.name: home_of(t.name) for t in block.tensors}
    home = next(iter(homes.values()), main)
    device = next((h for h in homes.values() if h not in (CPU, DISK)), main)
    exceptions = {name: h for name, h in homes.items() if h != home}
    return Placement(block, home, device, at_home=_gathers_at(block, home, device), exceptions=exceptions)


def is_mostly_tables(block: BlockSpec) -> bool:
    """Whether cutting a block at its leaves spares more than half of what would travel: tables are gathered."""
    return block.whole and 2 * sum(part.nbytes for part in block.parts if part.gathers) > block.nbytes


def _gathers_at(block: BlockSpec, home: str, device: str) -> bool:
    """A table's few rows are cheaper to move than the table."""
    return block.gathers and home in (CPU, DISK) and home != device


# ---------------------------------------------------------------- everything resident


def _resident(spec: ModelSpec, hardware: Hardware, strategy: str) -> list[Placement] | None:
    """A placement without any offload, or None if there is none."""
    if not hardware.devices:
        if spec.nbytes > hardware.ram:
            return None
        return [Placement(b, CPU, CPU) for b in spec.blocks]
    for limits in _limits(spec, hardware, strategy):
        filled = _fill(spec.blocks, limits)
        if all(home is not None for home in filled):
            return [Placement(b, home, home) for b, home in zip(spec.blocks, filled, strict=True) if home is not None]
    return None


def _limits(spec: ModelSpec, hardware: Hardware, strategy: str) -> Iterator[dict[str, int]]:
    """Budgets to try in turn, from the most even to what the hardware has."""
    budgets = dict(hardware.devices)
    first, *others = budgets
    if strategy == "balanced_low_0" and others:
        yield from _capped(spec.blocks, {**budgets, first: 0}, others)
        yield from _capped(spec.blocks, budgets, [first])  # for what the others cannot take
    elif strategy != "sequential" and others:
        yield from _capped(spec.blocks, budgets, [first, *others])
    yield budgets


def _capped(blocks: Sequence[BlockSpec], budgets: dict[str, int], names: Sequence[str]) -> Iterator[dict[str, int]]:
    """The budgets with the lowest cap on the devices `names` that a contiguous cut can keep; nothing if none can."""
    if not _fits(blocks, budgets):
        return
    low, high = 0, max(budgets[name] for name in names)
    while low < high:
        middle = (low + high) // 2
        if _fits(blocks, {n: min(b, middle) if n in names else b for n, b in budgets.items()}):
            high = middle
        else:
            low = middle + 1
    yield {n: min(b, high) if n in names else b for n, b in budgets.items()}


def _fits(blocks: Sequence[BlockSpec], budgets: dict[str, int]) -> bool:
    return None not in _fill(blocks, budgets)


Size = Callable[[BlockSpec, str], int]


def _whole_size(block: BlockSpec, _device: str) -> int:
    return block.nbytes


def _fill(blocks: Sequence[BlockSpec], budgets: dict[str, int], size: Size = _whole_size) -> list[str | None]:
    """Blocks in order onto devices in order; None for one that no device from there on can take."""
    homes: list[str | None] = []
    left, names, current = dict(budgets), list(budgets), 0
    for block in blocks:
        at = next((i for i in range(current, len(names)) if size(block, names[i]) <= left[names[i]]), None)
        if at is None:
            homes.append(None)
            continue
        current = at
        left[names[at]] -= size(block, names[at])
        homes.append(names[at])
    return homes


# ---------------------------------------------------------------- with offload


@dataclass(frozen=True)
class _Choice:
    ring: int
    homes: tuple[str | None, ...]
    resident_bytes: int


class _Offload:
    """Accelerators first, then RAM, then disk, with room kept for what streams."""

    def __init__(
        self, spec: ModelSpec, hardware: Hardware, offload_buffers: bool, last_first: bool, depth: int
    ) -> None:
        self.spec, self.hardware, self.offload_buffers, self.depth = spec, hardware, offload_buffers, depth
        self.step = -1 if last_first else 1
        self.main = next(iter(hardware.devices), CPU)
        self.on_cpu = self.main == CPU
        self.kept = sum(map(self._kept_buffers, spec.blocks))
        # what streams to an accelerator has to fit beside the buffers there
        self.limit = hardware.ram if self.on_cpu else max(0, hardware.devices[self.main] - self.kept)
        self.sizes = {t.name: t.nbytes for block in spec.blocks for t in block.tensors}
        leaves = [leaf for block in spec.blocks for leaf in (block.parts or (block,))]
        self.read_whole = {name for leaf in leaves if not leaf.gathers for name in leaf.borrows}
        self.units = self._cut(self.limit)

    def placements(self) -> list[Placement]:
        """Filled in order: accelerators, RAM, disk."""
        if self.on_cpu:
            return self._below([None] * len(self.units))
        if self.depth > 1:
            return self._below(list(self._best_ring().homes))
        try:
            return self._below(list(self._best_ring().homes))
        except BudgetError:  # what comes from disk passes through RAM: whole blocks may be too large for that
            self.units = self._cut(min(self.limit, self.hardware.ram or self.hardware.passage))
            return self._below(list(self._best_ring().homes))

    def at(self, choice: Choice) -> list[Placement]:
        """The units placed as the search chose."""
        names = {DEVICE: self.main, RAM: CPU, FILES: DISK}
        return [self._placement(unit, names[tier]) for unit, tier in zip(self.units, choice, strict=True)]

    def problem(self, workload: Workload) -> Problem:
        """The units in figures."""
        owner = {t.name: i for i, unit in enumerate(self.units) for t in unit.tensors}
        lenders = [
            next((owner[n] for n in u.borrows if n in owner), i) if not u.tensors else i
            for i, u in enumerate(self.units)
        ]
        found = []
        for phase in phases(self.units, workload):
            steps = (
                Step(lenders[i], self._tasks(self.units[i], self.units[lenders[i]], phase.tokens)) for i in phase.blocks
            )
            found.append((phase.calls, tuple(steps)))
        return Problem(
            items=tuple(self._item(unit, workload) for unit in self.units),
            phases=tuple(found),
            device=self.limit - (self.kept if self.on_cpu else 0),
            ram=0 if self.on_cpu else self.hardware.ram,
            passage=self.hardware.passage,
            slots=self.depth,
        )

    def _item(self, unit: BlockSpec, workload: Workload) -> Item:
        arrival, calls = self._arrival(unit), unit.calls or workload.new_tokens
        resident = unit.nbytes - self._kept_buffers(unit)
        if self.on_cpu:
            return Item(resident, 0, ring=arrival, staging=0, calls=calls, tiers=(DEVICE, FILES))
        if arrival > self.limit:
            return Item(0, unit.nbytes, ring=0, staging=arrival, calls=calls, tiers=(RAM, FILES))
        return Item(resident, unit.nbytes, ring=arrival, staging=arrival, calls=calls)

    def _tasks(self, unit: BlockSpec, lender: BlockSpec, tokens: int) -> tuple[Task, ...]:
        """A call of `unit` for each tier that `lender` may rest in: itself, or the block whose weights it uses."""
        tasks = []
        for home in (self.main, CPU, DISK):
            placement, borrowed = self._placement(unit, home), 0
            if unit is not lender:
                placement = _following(placement, self._placement(lender, home), {self.main: self.limit})
                away = home != self.main and not placement.at_home
                borrowed = sum(self.sizes.get(name, 0) for name in unit.borrows) if away else 0
            tasks.append(task(placement, tokens, self.hardware.speeds, borrowed))
        return tuple(tasks)

    def _cut(self, limit: int) -> tuple[BlockSpec, ...]:
        """The blocks, or the leaves of those that need more than `limit` bytes at once."""
        units: list[BlockSpec] = []
        for block in self.spec.blocks:
            cut = block.whole and (self._arrival(block) > limit or is_mostly_tables(block))
            units += block.parts if cut else (block,)
        return tuple(units)

    def _arrival(self, unit: BlockSpec) -> int:
        """Bytes that must be on the device at once for `unit` to run, if nothing of it is resident there."""
        if unit.gathers and not any(t.name in self.read_whole for t in unit.tensors):
            return 0  # rows travel, never the table
        borrowed = sum(self.sizes.get(name, 0) for name in unit.borrows) if unit.tensors else 0
        return unit.nbytes - self._kept_buffers(unit) + borrowed

    def _best_ring(self) -> _Choice:
        sizes = sorted({size for u in self.units if (size := self._arrival(u)) <= self.limit} | {0})
        step = max(1, len(sizes) // _MAX_RING_CANDIDATES)
        candidates = sorted({*sizes[::step], *sizes[-1:]})
        choices = [c for ring in candidates if (c := self._with_ring(ring)) is not None]
        if not choices and self.depth > 1:
            raise self._refusal(self.units)
        if not choices:  # not even the buffers fit: compute on the CPU what does not
            return _Choice(0, (None,) * len(self.units), 0)
        return max(choices, key=lambda c: (c.resident_bytes, -c.ring))

    def _window(self, units: Sequence[BlockSpec], largest: int) -> int:
        """Bytes of a ring for those of `units` that are no larger than `largest`."""
        return window((size for u in units if (size := self._arrival(u)) <= largest), self.depth)

    def _with_ring(self, largest: int) -> _Choice | None:
        """Accelerator homes if blocks of at most `largest` bytes stream; None where a larger one would have to."""
        budgets = dict(self.hardware.devices)
        ring = self._window(self.units, largest)
        budgets[self.main] -= ring + sum(map(self._kept_buffers, self.units))
        if budgets[self.main] < 0:
            return None
        must = [largest < self._arrival(u) <= self.limit for u in self.units]
        homes = self._fill_first(must, budgets)
        if any(m and h is None for m, h in zip(must, homes, strict=True)):
            return None
        return _Choice(ring, tuple(homes), sum(u.nbytes for u, h in zip(self.units, homes, strict=True) if h))

    def _kept_buffers(self, unit: BlockSpec) -> int:
        return 0 if self.offload_buffers else unit.buffer_bytes

    def _size_on(self, unit: BlockSpec, device: str) -> int:
        return unit.nbytes - (self._kept_buffers(unit) if device == self.main else 0)

    def _fill_first(self, must: list[bool], budgets: dict[str, int]) -> list[str | None]:
        """Those that must be resident before the others; contiguous over the devices, from the end or the beginning."""
        homes: list[str | None] = [None] * len(self.units)
        for wanted in (True, False):
            group = [i for i, m in enumerate(must) if m is wanted][:: self.step]
            in_order = dict(list(budgets.items())[:: self.step])
            filled = _fill([self.units[i] for i in group], in_order, self._size_on)
            for i, home in zip(group, filled, strict=True):
                homes[i] = home
                if home is not None:
                    budgets[home] -= self._size_on(self.units[i], home)
        return homes

    def _below(self, homes: list[str | None]) -> list[Placement]:
        """RAM, then disk, for what no accelerator took."""
        rest = [i for i, home in enumerate(homes) if home is None]
        for i, in_ram in zip(rest, self._ram_share([self.units[i] for i in rest]), strict=True):
            homes[i] = CPU if in_ram else DISK
        return [self._placement(u, home) for u, home in zip(self.units, homes, strict=True) if home is not None]

    def _ram_share(self, units: Sequence[BlockSpec]) -> list[bool]:
        """Which units rest in RAM: as many bytes as fit beside the buffers that disk blocks pass through."""
        if sum(u.nbytes for u in units) <= self.hardware.ram:
            return [True] * len(units)
        sizes = sorted({self._arrival(u) for u in units})
        step = max(1, len(sizes) // _MAX_RING_CANDIDATES)
        candidates = [c for s in {*sizes[::step], *sizes[-1:]} if (c := self._with_staging(units, s)) is not None]
        if not candidates:
            raise self._refusal(units)
        return max(candidates, key=lambda chosen: sum(u.nbytes for u, c in zip(units, chosen, strict=True) if c))

    def _with_staging(self, units: Sequence[BlockSpec], largest: int) -> list[bool] | None:
        """In RAM: every block of more than `largest` bytes, then what else fits."""
        staging = self._window(units, largest)
        chosen = [self._arrival(u) > largest for u in units]
        resident = sum(u.nbytes for u, c in zip(units, chosen, strict=True) if c)
        kept = sum(self._kept_in_ram(u) for u, c in zip(units, chosen, strict=True) if not c)
        if not self.hardware.ram and not resident and staging <= self.hardware.passage:
            return chosen  # RAM was not named: nothing rests there, and what comes from disk may pass through
        left = self.hardware.ram - staging - resident - kept
        if left < 0:
            return None
        for i in range(len(units))[:: self.step]:
            more = units[i].nbytes - self._kept_in_ram(units[i])
            if not chosen[i] and more <= left:
                chosen[i] = True
                left -= more
        return chosen

    def _kept_in_ram(self, unit: BlockSpec) -> int:
        """Bytes of a unit that stay in RAM even if it rests on disk: buffers that the CPU computes with."""
        return self._kept_buffers(unit) if self.on_cpu else 0

    def _refusal(self, units: Sequence[BlockSpec]) -> BudgetError:
        largest = max(units, key=self._arrival)
        budgets = {**self.hardware.devices, CPU: self.hardware.ram}
        allowed = ", ".join(f"{name}: {human_bytes(size)}" for name, size in budgets.items())
        needed = self._arrival(largest)
        return BudgetError(
            f"No placement fits: {largest.name or 'the model itself'!r} alone needs {human_bytes(needed)} "
            f"({needed} bytes) of memory while it runs, and the budgets are {allowed}. Raise max_memory on one device "
            f"to more than that, or load in a smaller dtype."
        )

    def _placement(self, unit: BlockSpec, home: str) -> Placement:
        if home not in (CPU, DISK):
            return Placement(unit, home, home)
        too_large = not self.on_cpu and self._arrival(unit) > self.limit
        return Placement(unit, home, self.main, at_home=too_large or _gathers_at(unit, home, self.main))


# ---------------------------------------------------------------- the plan as a whole


def _finish(
    spec: ModelSpec,
    placements: list[Placement],
    main: str,
    hardware: Hardware,
    workload: Workload,
    offload_buffers: bool,
    map_value: MapValue,
    depth: int,
) -> Plan:
    placements = _borrowers_follow(placements, {**hardware.devices, CPU: hardware.ram})
    ring = _rings(placements, depth)
    homes = {t.name: map_value(p.home_of(t.name)) for p in placements for t in p.block.tensors}
    homes.update({name: homes[owner] for name, owner in spec.ties.items() if owner in homes})
    device_map = _execution_device_first(homes, map_value(main))
    return Plan(
        placements=tuple(placements),
        device_map=device_map,
        main_device=main,
        budget={**hardware.devices, CPU: hardware.ram or hardware.passage},
        used=_used(placements, ring, offload_buffers),
        ring=ring,
        ties=dict(spec.ties),
        offload_buffers=offload_buffers,
        predicted=predict(placements, workload, hardware.speeds, depth),
    )


def _borrowers_follow(placements: list[Placement], budget: Mapping[str, int]) -> list[Placement]:
    """A block with no tensor of its own runs where the owner of what it borrows does, so that no copy is needed."""
    owner = {t.name: p for p in placements for t in p.block.tensors}
    followed = []
    for placement in placements:
        lender = next((owner[n] for n in placement.block.borrows if n in owner), None)
        if lender is not None and not placement.block.tensors:
            placement = _following(placement, lender, budget)
        followed.append(placement)
    return followed


def _following(placement: Placement, lender: Placement, budget: Mapping[str, int]) -> Placement:
    home, device = lender.home, lender.device
    too_large = home != device != CPU and lender.block.nbytes > budget.get(device, lender.block.nbytes)
    at_home = too_large or _gathers_at(placement.block, home, device)
    return replace(placement, home=home, device=device, at_home=at_home)


def _rings(placements: Sequence[Placement], depth: int) -> dict[str, int]:
    """Bytes of each device's ring; what comes from disk to an accelerator passes through one in RAM."""
    arriving: dict[str, list[int]] = {}
    sizes = {t.name: t.nbytes for p in placements for t in p.block.tensors}
    homes = {t.name: p.home_of(t.name) for p in placements for t in p.block.tensors}
    for p in placements:
        borrowed = 0 if p.at_home else sum(sizes[n] for n in p.block.borrows if homes.get(n, p.device) != p.device)
        arriving.setdefault(p.device, []).append(p.streamed_bytes + borrowed)
        if p.device != CPU and DISK in (p.home, *p.exceptions.values()):
            arriving.setdefault(CPU, []).append(p.streamed_bytes + borrowed)
    return {device: size for device, each in arriving.items() if (size := window(each, depth))}


def _used(placements: Sequence[Placement], ring: Mapping[str, int], offload_buffers: bool) -> dict[str, int]:
    used = dict(ring)
    for p in placements:
        for tensor in p.block.tensors:
            home = p.home_of(tensor.name)
            if tensor.is_buffer and not offload_buffers:
                home = p.device if home == DISK or not p.at_home else CPU
            used[home] = used.get(home, 0) + tensor.nbytes
    return used


def compress(homes: Mapping[str, Any], root: bool = True) -> dict[str, Any]:
    """The shortest map that sends every tensor where `homes` does: a module's name where all below it agree.

    Without `root`, no entry stands for the model as a whole.
    """
    values: dict[str, set[Any]] = {}
    for name, home in homes.items():
        for prefix in _prefixes(name):
            values.setdefault(prefix, set()).add(home)
    short: dict[str, Any] = {}
    for name, home in homes.items():
        highest = next(p for p in _prefixes(name) if len(values[p]) == 1 and (p or root))
        short.setdefault(highest, home)
    return short


def _prefixes(name: str) -> list[str]:
    return ["", *accumulate(name.split("."), "{}.{}".format)]


def _execution_device_first(homes: Mapping[str, Any], main: Any) -> dict[str, Any]:
    """The map of `homes`, whose first value libraries take for the device to send inputs to: "disk" would not do."""
    if main not in homes.values():
        return {"": main, **compress(homes, root=False)}
    device_map = compress(homes)
    first = next(name for name, home in device_map.items() if home == main)
    return {first: main, **device_map}
