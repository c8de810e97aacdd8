"""Less of a model on an accelerator that has run out of memory: which blocks go, and where to.

Every block goes on computing where it did, since a cache may already be there: only homes change. The first blocks go
first, as the planner keeps the last. What streams needs a ring, so a few blocks have to go before any memory is free.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import NamedTuple

from .errors import human_bytes
from .planner import MapValue, execution_device_first, resting, rings
from .settings import parse_size
from .specs import CPU, DISK, BlockSpec, Placement, Plan

SHARE = 8
"""At least one part in so many of what a plan has on the device is freed: a cache grows on."""

_SIZE = re.compile(r"tried to allocate ([\d.]+) ?(bytes|[kmgt]i?b)", re.IGNORECASE)
_DEVICE = re.compile(r"\b(?:GPU |cuda:|xpu:|npu:|sim:)(\d+)", re.IGNORECASE)


def shortage(plan: Plan, message: str) -> tuple[str, int]:
    """(device, bytes to free there), as an allocator's error tells it; the main device where it does not."""
    devices = [d for d in plan.used if d not in (CPU, DISK)] or [plan.main_device]
    index = _DEVICE.search(message)
    named = [d for d in devices if index is not None and d.rpartition(":")[2] == index[1]]
    device = next(iter(named), plan.main_device if plan.main_device in devices else devices[0])
    asked = _SIZE.search(message)
    nbytes = 0 if asked is None else parse_size(f"{asked[1]} {asked[2].replace('bytes', 'B')}")
    return device, max(2 * nbytes, plan.used.get(device, 0) // SHARE)


def demoted(plan: Plan, device: str, nbytes: int, ram: int, passage: int = 0, map_value: MapValue = str) -> Plan | None:
    """`plan` with `nbytes` bytes less on `device`, or as many less as can be; None where there is nothing to gain.

    `ram`: bytes of RAM that may be used more than now, for what leaves the device and for what comes from disk to pass
    through; the rest goes to disk. `passage`: bytes that may be passed through where nothing may rest in RAM.
    """
    candidates = _candidates(plan, device)
    choice = _choose(plan, [plan.placements[at] for at in candidates], device, nbytes, ram, passage)
    if choice is None:
        return None
    placements = list(plan.placements)
    left = choice.ram
    for at in candidates[: choice.blocks]:
        weights = _weights(placements[at].block)
        home = CPU if weights <= left else DISK
        left -= weights if home == CPU else 0
        placements[at] = replace(placements[at], home=home, at_home=placements[at].block.gathers)
    return with_placements(plan, placements, map_value, choice.depth)


def told_of(plan: Plan, lower: Plan) -> str:
    """The difference of two plans, as a sentence."""
    gone = [p for p, q in zip(plan.placements, lower.placements, strict=True) if p.home != q.home]
    homes = sorted({q.home for p, q in zip(plan.placements, lower.placements, strict=True) if p.home != q.home})
    if not gone:
        return "The buffers that weights stream through were made smaller."
    size = human_bytes(sum(p.block.nbytes for p in gone))
    names = f"{gone[0].block.name!r}" + (f" to {gone[-1].block.name!r}" if len(gone) > 1 else "")
    return f"{len(gone)} blocks ({names}, {size}) were demoted from {gone[0].home} to {' and '.join(homes)}."


def _candidates(plan: Plan, device: str) -> list[int]:
    """Positions of blocks that rest on `device`, compute there, and lend nothing to others."""
    lent = {name for placement in plan.placements for name in placement.block.borrows}
    return [
        at
        for at, p in enumerate(plan.placements)
        if p.home == p.device == device
        and not p.exceptions
        and any(not t.is_buffer for t in p.block.tensors)
        and not any(t.name in lent for t in p.block.tensors)
    ]


class _Choice(NamedTuple):
    """How many of the candidates leave, for rings of how many blocks, and the bytes of RAM that they may rest in."""

    blocks: int
    depth: int
    ram: int


def _choose(
    plan: Plan, candidates: Sequence[Placement], device: str, nbytes: int, ram: int, passage: int
) -> _Choice | None:
    """The fewest blocks that free `nbytes`, else those that free most; None if none do.

    From running sums alone: at a thousand blocks, a plan for each number of them would take minutes.
    """
    before, used = plan.ring.get(CPU, 0), plan.used[device]
    away = {t.name: t.nbytes for p in plan.placements for t in p.block.tensors if p.home_of(t.name) != device}
    arriving = [_arriving(p.block, away) for p in candidates]
    freed = list(accumulate((_freed(p.block, plan.offload_buffers) for p in candidates), initial=0))
    resting_in_ram = list(accumulate((_weights(p.block) for p in candidates), initial=0))
    best, least = None, used
    for depth in (2, 1):  # blocks that a ring holds: with one, nothing comes while something runs
        on_device, in_ram = (_windows(plan, place, arriving, depth) for place in (device, CPU))
        for blocks, (weights, gone) in enumerate(zip(resting_in_ram, freed, strict=True)):
            left = used - plan.ring.get(device, 0) - gone + on_device[blocks]
            if left >= least:
                continue
            room = _room(weights, max(0, in_ram[0] - before), max(0, in_ram[blocks] - before), ram, passage)
            if room is not None:
                best, least = _Choice(blocks, depth, room), left
            if used - least >= nbytes:
                return best
    return best


def _room(weights: int, passing: int, passing_at_most: int, ram: int, passage: int) -> int | None:
    """Bytes of RAM that `weights` bytes may rest in, beside what passes through it; None if there is too little.

    `passing`: if all of them rest in RAM, and `passing_at_most`, if they rest on disk.
    """
    if weights + passing <= ram:
        return ram
    if passing_at_most <= ram:
        return ram - passing_at_most
    return 0 if passing_at_most <= passage else None


def _weights(block: BlockSpec) -> int:
    return block.nbytes - block.buffer_bytes


def _freed(block: BlockSpec, offload_buffers: bool) -> int:
    """Bytes that leave the device with a block."""
    return block.nbytes if offload_buffers or block.gathers else _weights(block)


def _arriving(block: BlockSpec, away: Mapping[str, int]) -> int:
    """Bytes that come each time a block runs which has left, with what it borrows from those that are `away`."""
    return 0 if block.gathers else _weights(block) + sum(away.get(name, 0) for name in block.borrows)


def _windows(plan: Plan, place: str, arriving: Sequence[int], depth: int) -> list[int]:
    """Bytes of the ring at `place`, for each number of these that arrive there beside what does already."""
    sizes = [rings(plan.placements, n).get(place, 0) for n in range(depth + 1)]
    largest = [after - before for before, after in pairwise(sizes)]
    windows = [sum(largest)]
    for nbytes in arriving:
        largest = sorted((*largest, nbytes), reverse=True)[:depth]
        windows.append(sum(largest))
    return windows


def with_placements(plan: Plan, placements: Sequence[Placement], map_value: MapValue = str, depth: int = 2) -> Plan:
    """`plan` with its blocks, the same ones, elsewhere; its predictions hold no more."""
    ring = rings(placements, depth)
    homes = {t.name: map_value(p.home_of(t.name)) for p in placements for t in p.block.tensors}
    homes |= {name: homes[owner] for name, owner in plan.ties.items() if owner in homes}
    return replace(
        plan,
        placements=tuple(placements),
        device_map=execution_device_first(homes, map_value(plan.main_device)),
        used=_used(plan, placements, ring),
        ring=ring,
        predicted=(),
        bound=0.0,
    )


def _used(plan: Plan, placements: Sequence[Placement], ring: Mapping[str, int]) -> dict[str, int]:
    """What the plan counts, with the ring and the weights in their new places."""
    used = dict(plan.used)
    before, after = resting(plan.placements, plan.offload_buffers), resting(placements, plan.offload_buffers)
    for sign, each in ((-1, plan.ring), (-1, before), (1, ring), (1, after)):
        for place, nbytes in each.items():
            used[place] = used.get(place, 0) + sign * nbytes
    return {place: nbytes for place, nbytes in used.items() if nbytes}
