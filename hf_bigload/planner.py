"""The planner: a home and an execution device for every block, within the budgets.

`make_plan` decides by itself, `follow_map` does what a device map says. Both end in the same frozen `Plan`.

It first tries to stream nothing. Otherwise the accelerators after the first are filled with blocks that stay there, and
`search` looks for the residency of the others whose predicted schedule is shortest; `schedule` says how long that is.
Rings have two slots, so that one block comes while another runs; one slot, where two do not fit or cost
too much. A block that fits nowhere is cut into its leaves; a leaf larger than the device is computed where it rests.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from math import inf
from typing import Any, NamedTuple

from .errors import BudgetError, human_bytes
from .schedule import Phase, Task, borrowed_bytes, phases, predict, task, window, with_leaves
from .search import DEVICE, FILES, RAM, Choice, Item, Problem, Search, Step
from .specs import CPU, DISK, BlockSpec, Hardware, ModelSpec, Needs, Placement, Plan, Workload

logger = logging.getLogger(__name__)

STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
_DEPTHS = (2, 1)
"""Blocks that a ring holds at once, the best first: with one, nothing comes while something runs."""

_WORTH_A_SLOT = 0.1
"""Share of the time that a plan without prefetch has to gain: a second slot also hides what no prediction knows."""

_HEAP = 2
"""Times the bytes of activations that a process takes for them on the CPU: of what is freed between others, a heap
keeps about as much as is in use (a Llama of 1.1 billion parameters and 512 tokens: 140 MB for 70)."""

MapValue = Callable[[str], Any]
"""Device name -> how device maps write it (accelerators by number)."""


def make_plan(
    spec: ModelSpec,
    hardware: Hardware,
    strategy: str = "auto",
    offload_buffers: bool = False,
    map_value: MapValue = str,
    needs: Needs | None = None,
) -> Plan:
    """Place every block of `spec` on `hardware`.

    Args:
        strategy: "auto" and "balanced" spread a model that fits evenly over the accelerators; "balanced_low_0" leaves
            the first as empty as it can; "sequential" fills them in order.
        offload_buffers: buffers of streamed blocks rest with their weights, instead of on the execution device.
        needs: what a request takes beside the weights: room is kept for it, and where not everything can be resident,
            its predicted time is minimised.

    Raises:
        BudgetError: no placement keeps the budgets; names what fits nowhere, its bytes and the budgets.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"device_map={strategy!r}: choose one of {', '.join(STRATEGIES)}, a device, or a dict.")
    needs = with_leaves(needs or Needs(Workload()), spec.blocks)
    resident = _resident(spec, hardware, strategy, needs)
    if resident is None:
        placements, depth, bound = _Offload(spec, hardware, offload_buffers, strategy == "sequential", needs).found()
    else:
        placements, depth, bound = _borrowers_follow(resident, {}), 0, 0.0
    computes = {placement.device for placement in placements}
    main = next((name for name in hardware.devices if name in computes), CPU)
    plan = _finish(spec, placements, main, hardware, needs, offload_buffers, map_value, depth)
    plan = replace(plan, bound=bound or (0.0 if plan.streams else plan.seconds))
    if not plan.keeps_budget:
        raise BudgetError(f"No placement was found that keeps the budgets {_listing(hardware)}. Raise max_memory.")
    return plan


def make_plan_with_room(spec: ModelSpec, hardware: Hardware, needs: Needs, firm: bool, **options: Any) -> Plan:
    """`make_plan` with room for `needs`. Where these are not `firm` (nobody named a workload) and no placement has room
    for them, or none that uses the accelerator, without."""
    try:
        plan = make_plan(spec, hardware, needs=needs, **options)
        if firm or not hardware.devices or plan.main_device != CPU:
            return plan
    except BudgetError:
        if firm:
            raise
    plan = make_plan(spec, hardware, needs=replace(needs, activations=0, cache={}), **options)
    logger.warning(
        "No room is kept for what a request takes beside the weights: %s for activations and %s for caches, with %s. "
        "Shorter requests may run; hf_bigload.workload(...) says what to plan for.",
        human_bytes(needs.activations), human_bytes(sum(needs.cache.values())), needs.workload,
    )  # fmt: skip
    return plan


def follow_map(
    spec: ModelSpec,
    home_of: Callable[[str], str],
    main_device: str,
    hardware: Hardware,
    offload_buffers: bool = False,
    map_value: MapValue = str,
    needs: Needs | None = None,
) -> Plan:
    """The plan that a complete device map describes: `home_of(tensor name)` is its home.

    A block whose tensors the map sends to several places is cut into its leaves.
    """
    placements = []
    for block in spec.blocks:
        homes = {home_of(t.name) for t in block.tensors}
        cut = block.whole and (len(homes) > 1 or (homes <= {CPU, DISK} and is_mostly_tables(block)))
        placements += [_as_mapped(unit, home_of, main_device) for unit in (block.parts if cut else (block,))]
    placements = _borrowers_follow(placements, {**hardware.devices, CPU: hardware.ram})
    needs = with_leaves(needs or Needs(Workload()), spec.blocks)
    finish = partial(_finish, spec, placements, main_device, hardware, needs, offload_buffers, map_value)
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


def _resident(spec: ModelSpec, hardware: Hardware, strategy: str, needs: Needs) -> list[Placement] | None:
    """A placement without any offload, or None if there is none."""
    budgets = hardware.devices or {CPU: hardware.ram}
    budgets = {name: budget - _activations(needs, name) for name, budget in budgets.items()}
    fill = partial(_fill, spec.blocks, size=lambda block: block.nbytes + needs.cache.get(block.name, 0))
    for limits in _limits(budgets, strategy, lambda tried: None not in fill(tried)):
        filled = fill(limits)
        if None not in filled:
            return [Placement(b, home, home) for b, home in zip(spec.blocks, filled, strict=True) if home is not None]
    return None


Budgets = dict[str, int]


def _limits(budgets: Budgets, strategy: str, fits: Callable[[Budgets], bool]) -> Iterator[Budgets]:
    """Budgets to try in turn, from the most even to what the hardware has."""
    first, *others = budgets
    if strategy == "balanced_low_0" and others:
        yield from _capped({**budgets, first: 0}, others, fits)
        yield from _capped(budgets, [first], fits)  # for what the others cannot take
    elif strategy != "sequential" and others:
        yield from _capped(budgets, [first, *others], fits)
    yield budgets


def _capped(budgets: Budgets, names: Sequence[str], fits: Callable[[Budgets], bool]) -> Iterator[Budgets]:
    """The budgets with the lowest cap on the devices `names` that a contiguous cut can keep; nothing if none can."""
    if not fits(budgets):
        return
    low, high = 0, max(budgets[name] for name in names)
    while low < high:
        middle = (low + high) // 2
        if fits({n: min(b, middle) if n in names else b for n, b in budgets.items()}):
            high = middle
        else:
            low = middle + 1
    yield {n: min(b, high) if n in names else b for n, b in budgets.items()}


Size = Callable[[BlockSpec], int]


def _fill(blocks: Sequence[BlockSpec], budgets: Budgets, size: Size) -> list[str | None]:
    """Blocks in order onto devices in order; None for one that no device from there on can take."""
    homes: list[str | None] = []
    left, names, current = dict(budgets), list(budgets), 0
    for block in blocks:
        nbytes = size(block)
        at = next((i for i in range(current, len(names)) if nbytes <= left[names[i]]), None)
        if at is None:
            homes.append(None)
            continue
        current = at
        left[names[at]] -= nbytes
        homes.append(names[at])
    return homes


# ---------------------------------------------------------------- with offload


class _Found(NamedTuple):
    """A placement, the blocks that its rings hold, and the seconds that no other could beat (0: not known)."""

    placements: list[Placement]
    depth: int
    bound: float


class _Offload:
    """Placements of a model that is too large: the accelerators after the main one are filled with blocks that stay
    there; what is left shares the main device, RAM and disk, and streams."""

    def __init__(
        self, spec: ModelSpec, hardware: Hardware, offload_buffers: bool, in_order: bool, needs: Needs
    ) -> None:
        self.spec, self.hardware, self.needs = spec, hardware, needs
        self.offload_buffers, self.in_order = offload_buffers, in_order
        self.main = next(iter(hardware.devices), CPU)
        self.on_cpu = self.main == CPU
        self.sizes = {t.name: t.nbytes for block in spec.blocks for t in block.tensors}
        leaves = [leaf for block in spec.blocks for leaf in (block.parts or (block,))]
        self.read_whole = {name for leaf in leaves if not leaf.gathers for name in leaf.borrows}
        self.caches = {block.parts[0].name: block.name for block in spec.blocks if block.parts}
        elsewhere = self._roughly_elsewhere(spec.blocks)
        self.limit = self._limit([block for block, home in zip(spec.blocks, elsewhere, strict=True) if home is None])

    def found(self) -> _Found:
        """The fastest placement that is found."""
        if self.limit < 0 and not self.on_cpu:  # not even what stays there fits on the accelerator: do without it
            others = {name: size for name, size in self.hardware.devices.items() if name != self.main}
            smaller = replace(self.hardware, devices=others, ram=self.hardware.ram or self.hardware.passage)
            return _Offload(self.spec, smaller, self.offload_buffers, self.in_order, self.needs).found()
        # what comes from disk passes through RAM: whole blocks may be too large for that
        passing = self.hardware.ram or self.hardware.passage
        for largest in dict.fromkeys((self.limit, min(self.limit, passing))):
            found = self._fastest(self._cut(largest))
            if found is not None:
                return found
        raise self._refusal(self._cut(0))

    def _fastest(self, units: Sequence[BlockSpec]) -> _Found | None:
        """With two slots; with one only where two do not fit, or where that gains more than prefetch may be worth."""
        best, least, worthwhile = None, inf, True
        for depth in _DEPTHS:
            if best is not None and (self.in_order or not worthwhile):
                break
            homes = self._on_others(units, depth)
            problem = self._problem([u for u, home in zip(units, homes, strict=True) if home is None], depth)
            if min(problem.ram, problem.passage) < 0:
                continue
            choice = Search(problem, self.in_order).best()
            if choice is not None and (cost := problem.cost(choice)) < least * (1 - _WORTH_A_SLOT):
                bound = 0.0 if any(homes) else problem.lower_bound()
                best, least = _Found(self._at(units, homes, choice), depth, bound), cost
                worthwhile = problem.gained_by_a_slot(choice) > _WORTH_A_SLOT
        return best

    def _at(self, units: Sequence[BlockSpec], homes: Sequence[str | None], choice: Choice) -> list[Placement]:
        names = {DEVICE: self.main, RAM: CPU, FILES: DISK}
        tiers = iter(choice)
        placed = [self._placement(u, home or names[next(tiers)]) for u, home in zip(units, homes, strict=True)]
        return _borrowers_follow(placed, {self.main: self.limit})

    def _roughly_elsewhere(self, blocks: Sequence[BlockSpec]) -> list[str | None]:
        """Which of the other accelerators would hold a block, if nothing streamed."""
        budgets = {name: size - _activations(self.needs, name) for name, size in self.hardware.devices.items()}
        if not self.in_order:
            budgets = dict(reversed(budgets.items()))
        step = 1 if self.in_order else -1
        homes = _fill(blocks[::step], budgets, self._with_cache)[::step]
        return [None if home == self.main else home for home in homes]

    def _on_others(self, units: Sequence[BlockSpec], depth: int) -> list[str | None]:
        """Which of the other accelerators holds a unit: the last units, or if in order, those after the main one's."""
        homes: list[str | None] = [None] * len(units)
        others = {n: b - _activations(self.needs, n) for n, b in self.hardware.devices.items() if n != self.main}
        if not others:
            return homes
        wanted = [i for i, unit in enumerate(units) if unit.tensors]  # the others follow what they borrow
        if self.in_order:
            first = Search(self._problem(units, depth), in_order=True).best()
            wanted = [i for i in wanted if first is None or first[i] != DEVICE]
        step = 1 if self.in_order else -1
        filled = _fill([units[i] for i in wanted[::step]], dict(list(others.items())[::step]), self._with_cache)
        for i, home in zip(wanted[::step], filled, strict=True):
            homes[i] = home
        return homes

    # ------------------------------------------------------------ in figures

    def _problem(self, units: Sequence[BlockSpec], slots: int) -> Problem:
        """Units for the main device, RAM and disk."""
        owner = {t.name: i for i, unit in enumerate(units) for t in unit.tensors}
        lenders = [
            next((owner[n] for n in u.borrows if n in owner), i) if not u.tensors else i for i, u in enumerate(units)
        ]
        found = []
        for phase in phases(units, self.needs.workload):
            steps = (Step(lenders[i], self._tasks(units[i], units[lenders[i]], phase)) for i in phase.blocks)
            found.append((phase.calls, tuple(steps)))
        ram = 0 if self.on_cpu else self.hardware.ram
        at_home = sum(self._buffers(u) for u in units if self._too_large(u) or (ram and u.gathers))
        return Problem(
            items=tuple(map(self._item, units)),
            phases=tuple(found),
            device=self._limit(units),
            ram=ram and ram - at_home,
            passage=self.hardware.passage - (0 if ram else at_home),
            slots=slots,
        )

    def _limit(self, units: Sequence[BlockSpec]) -> int:
        """Bytes of the main device for weights and ring: without what stays there, and what a forward takes."""
        budget = self.hardware.ram if self.on_cpu else self.hardware.devices[self.main]
        return budget - _activations(self.needs, self.main) - sum(self._buffers(u) + self._cache(u) for u in units)

    def _item(self, unit: BlockSpec) -> Item:
        arrival, calls = self._arrival(unit), unit.calls or self.needs.workload.new_tokens
        resident = unit.nbytes - self._buffers(unit)
        if self.on_cpu:
            return Item(resident, 0, ring=arrival, staging=0, calls=calls, tiers=(DEVICE, FILES))
        if self._too_large(unit):
            return Item(0, unit.nbytes, ring=0, staging=0, calls=calls, tiers=(RAM, FILES))
        return Item(resident, unit.nbytes, ring=arrival, staging=arrival, calls=calls)

    def _tasks(self, unit: BlockSpec, lender: BlockSpec, phase: Phase) -> tuple[Task, ...]:
        """A call of `unit` for each tier that `lender` may rest in: itself, or the block whose weights it uses."""
        tasks = []
        for home in (self.main, CPU, DISK):
            placement, borrowed = self._placement(unit, home), 0
            if unit is not lender:
                placement = _following(placement, self._placement(lender, home), {self.main: self.limit})
                away = home != self.main and not placement.at_home
                borrowed = sum(self.sizes.get(name, 0) for name in unit.borrows) if away else 0
            tasks.append(task(placement, phase, self.needs, self.hardware.speeds, borrowed))
        return tuple(tasks)

    def _cut(self, largest: int) -> tuple[BlockSpec, ...]:
        """The blocks, or the leaves of those that need more than `largest` bytes at once."""
        units: list[BlockSpec] = []
        for block in self.spec.blocks:
            cut = block.whole and (self._arrival(block) > largest or is_mostly_tables(block))
            units += block.parts if cut else (block,)
        return tuple(units)

    def _arrival(self, unit: BlockSpec) -> int:
        """Bytes that must be on the device at once for `unit` to run, if nothing of it is resident there."""
        if unit.gathers and not any(t.name in self.read_whole for t in unit.tensors):
            return 0  # rows travel, never the table
        borrowed = sum(self.sizes.get(name, 0) for name in unit.borrows) if unit.tensors else 0
        return unit.nbytes - self._buffers(unit) + borrowed

    def _buffers(self, unit: BlockSpec) -> int:
        """Bytes that stay where the unit is computed, wherever its weights rest."""
        return 0 if self.offload_buffers else unit.buffer_bytes

    def _cache(self, unit: BlockSpec) -> int:
        """Bytes that the unit remembers where it is computed; those of a block that was cut count with its first."""
        name = unit.name if unit.part_of is None else self.caches.get(unit.name, unit.name)
        return self.needs.cache.get(name, 0)

    def _with_cache(self, unit: BlockSpec) -> int:
        return unit.nbytes + self._cache(unit)

    def _too_large(self, unit: BlockSpec) -> bool:
        return not self.on_cpu and self._arrival(unit) > self.limit

    def _placement(self, unit: BlockSpec, home: str) -> Placement:
        if home not in (CPU, DISK):
            return Placement(unit, home, home)
        return Placement(unit, home, self.main, at_home=self._too_large(unit) or _gathers_at(unit, home, self.main))

    def _refusal(self, units: Sequence[BlockSpec]) -> BudgetError:
        largest = max(units, key=self._arrival)
        needed, cache = self._arrival(largest), sum(self.needs.cache.values())
        beside = human_bytes(cache + self.needs.activations)
        room = (
            f" beside {beside} for what a request computes with and remembers" if cache + self.needs.activations else ""
        )
        return BudgetError(
            f"No placement fits: {largest.name or 'the model itself'!r} alone needs {human_bytes(needed)} "
            f"({needed} bytes) of memory while it runs{room}, and the budgets are {_listing(self.hardware)}. "
            "Raise max_memory on one device to more than that, or load in a smaller dtype."
        )


def _listing(hardware: Hardware) -> str:
    budgets = {**hardware.devices, CPU: hardware.ram}
    return ", ".join(f"{name}: {human_bytes(size)}" for name, size in budgets.items())


# ---------------------------------------------------------------- the plan as a whole


def _finish(
    spec: ModelSpec,
    placements: list[Placement],
    main: str,
    hardware: Hardware,
    needs: Needs,
    offload_buffers: bool,
    map_value: MapValue,
    depth: int,
) -> Plan:
    cache = _caches(placements, needs)
    activations = {p.device: _activations(needs, p.device) for p in placements} if needs.activations else {}
    ring = rings(placements, depth)
    return Plan(
        placements=tuple(placements),
        device_map=device_map_of(placements, spec.ties, main, map_value),
        main_device=main,
        budget={**hardware.devices, CPU: hardware.ram or hardware.passage},
        used=_summed(resting(placements, offload_buffers), ring, cache, activations),
        ring=ring,
        cache=cache,
        activations=activations,
        ties=dict(spec.ties),
        offload_buffers=offload_buffers,
        predicted=predict(placements, needs, hardware.speeds, depth),
        workload=needs.workload,
        measured=hardware.speeds.measured,
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
    weights = lender.block.nbytes - lender.block.buffer_bytes
    too_large = home != device != CPU and weights > budget.get(device, weights)
    at_home = too_large or _gathers_at(placement.block, home, device)
    return replace(placement, home=home, device=device, at_home=at_home)


def rings(placements: Sequence[Placement], depth: int) -> dict[str, int]:
    """Bytes of each device's ring; what comes from disk to an accelerator passes through one in RAM."""
    arriving: dict[str, list[int]] = {}
    for p, borrowed in zip(placements, borrowed_bytes(placements), strict=True):
        arriving.setdefault(p.device, []).append(p.streamed_bytes + borrowed)
        if p.device != CPU and p.is_on_disk:
            arriving.setdefault(CPU, []).append(p.streamed_bytes + borrowed)
    return {device: size for device, each in arriving.items() if (size := window(each, depth))}


def device_map_of(
    placements: Sequence[Placement], ties: Mapping[str, str], main: str, map_value: MapValue
) -> dict[str, Any]:
    """A placement as libraries write it, with the execution device first."""
    homes = {t.name: map_value(p.home_of(t.name)) for p in placements for t in p.block.tensors}
    homes.update({name: homes[owner] for name, owner in ties.items() if owner in homes})
    return execution_device_first(homes, map_value(main))


def resting(placements: Sequence[Placement], offload_buffers: bool) -> dict[str, int]:
    """Bytes of weights and buffers by where they rest."""
    at_rest: dict[str, int] = {}
    for p in placements:
        for tensor in p.block.tensors:
            home = p.home_of(tensor.name)
            if tensor.is_buffer and not offload_buffers:
                home = CPU if p.at_home else p.device
            at_rest[home] = at_rest.get(home, 0) + tensor.nbytes
    return at_rest


def _activations(needs: Needs, device: str) -> int:
    """Bytes to keep on a device for what a forward computes with."""
    return needs.activations * (_HEAP if device == CPU else 1)


def _caches(placements: Sequence[Placement], needs: Needs) -> dict[str, int]:
    """Bytes that blocks remember, by where they are computed; a block that was cut counts where its first leaf is."""
    where: dict[str, str] = {}
    for p in placements:
        where.setdefault(p.block.name if p.block.part_of is None else p.block.part_of, p.device)
    caches: dict[str, int] = {}
    for block, size in needs.cache.items():
        if size and block in where:
            caches[where[block]] = caches.get(where[block], 0) + size
    return caches


def _summed(*by_device: Mapping[str, int]) -> dict[str, int]:
    total: dict[str, int] = {}
    for sizes in by_device:
        for device, size in sizes.items():
            total[device] = total.get(device, 0) + size
    return total


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


def execution_device_first(homes: Mapping[str, Any], main: Any) -> dict[str, Any]:
    """The map of `homes`, whose first value libraries take for the device to send inputs to: "disk" would not do."""
    if main not in homes.values():
        return {"": main, **compress(homes, root=False)}
    device_map = compress(homes)
    first = next(name for name, home in device_map.items() if home == main)
    return {first: main, **device_map}
