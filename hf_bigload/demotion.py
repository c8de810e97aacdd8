"""Less of a model on an accelerator that has run out of memory: which blocks go, and where to.

Every block goes on computing where it did, since a cache may already be there: only homes change. The first blocks go
first, as the planner keeps the last. What streams needs a ring, so a few blocks have to go before any memory is free.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from .errors import human_bytes
from .planner import MapValue, execution_device_first, resting, rings
from .settings import parse_size
from .specs import CPU, DISK, Placement, Plan

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
    best, least = None, plan.used[device]
    candidates = _candidates(plan, device)
    for depth in (2, 1):  # blocks that a ring holds: with one, nothing comes while something runs
        for count in range(len(candidates) + 1):
            lower = _without(plan, candidates[:count], ram, passage, depth, map_value)
            left = least if lower is None else lower.used.get(device, 0)
            if left < least:
                best, least = lower, left
            if plan.used[device] - least >= nbytes:
                return best
    return best


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


def _without(plan: Plan, chosen: Sequence[int], ram: int, passage: int, depth: int, map_value: MapValue) -> Plan | None:
    """`plan` with the blocks at these positions elsewhere; None if RAM has no room for what has to be there."""
    placements, ring, resting_there = _moved(plan, chosen, ram, depth)
    staging = max(0, ring.get(CPU, 0) - plan.ring.get(CPU, 0))
    if staging and resting_there + staging > ram:
        placements, ring, resting_there = _moved(plan, chosen, ram - staging, depth)
        staging = max(0, ring.get(CPU, 0) - plan.ring.get(CPU, 0))
    if resting_there + staging > (ram if resting_there or not passage else passage):
        return None
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


def _moved(plan: Plan, chosen: Sequence[int], ram: int, depth: int) -> tuple[list[Placement], Mapping[str, int], int]:
    """Placements, rings, and the bytes that come to rest in RAM."""
    placements, left = list(plan.placements), ram
    for at in chosen:
        block = placements[at].block
        weights = block.nbytes - block.buffer_bytes
        home = CPU if weights <= left else DISK
        left -= weights if home == CPU else 0
        placements[at] = replace(placements[at], home=home, at_home=block.gathers)
    return placements, rings(placements, depth), ram - left


def _used(plan: Plan, placements: Sequence[Placement], ring: Mapping[str, int]) -> dict[str, int]:
    """What the plan counts, with the ring and the weights in their new places."""
    used = dict(plan.used)
    before, after = resting(plan.placements, plan.offload_buffers), resting(placements, plan.offload_buffers)
    for sign, each in ((-1, plan.ring), (-1, before), (1, ring), (1, after)):
        for place, nbytes in each.items():
            used[place] = used.get(place, 0) + sign * nbytes
    return {place: nbytes for place, nbytes in used.items() if nbytes}
