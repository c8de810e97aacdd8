"""How long a placement takes: the length of the schedule that the executor keeps.

A request is a row of phases, each a list of blocks that is called some times: what runs once (an encoder, a vision
tower), the first token with the whole prompt (prefill), the tokens after it (decode). In a phase blocks run one after
another. A block that streams is *sent* when the block that had its slot before it has ended: with two slots that is
while the block before it runs, with one it is after that. Sent, it is read from disk if it rests there, then copied to
an accelerator if it runs on one; the disk and the bus each do one thing at a time, both beside the arithmetic.
Weights in memory may be written to between two calls, so they are never sent before their call begins.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from .specs import CPU, DISK, DTYPE_BYTES, Arithmetic, BlockSpec, Needs, PhaseTime, Placement, Speeds, Work, Workload

_PASSES = 3
"""Calls that are followed one by one; the others take as long as the last of them."""


class Task(NamedTuple):
    """One call of one block, in seconds. Without `read` and `copy` the block is resident."""

    read: float
    copy: float
    compute: float
    from_memory: bool = False
    """It rests in RAM: nothing is sent for the next call before that begins."""


def phase_seconds(tasks: Sequence[Task], calls: int, slots: int) -> float:
    """Seconds that `calls` calls of `tasks` take one after another, with a ring of `slots` slots."""
    now = before = disk_free = bus_free = 0.0
    ends = deque([0.0] * slots, maxlen=slots)
    passes = min(calls, _PASSES)
    for _ in range(passes):
        before, held_until = now, 0.0
        for read, copy, compute, from_memory in tasks:
            if not read and not copy:
                now += compute
                continue
            if from_memory:
                held_until = before
            arrived = max(ends[0], held_until)
            if read:
                arrived = disk_free = max(disk_free, arrived) + read
            if copy:
                arrived = bus_free = max(bus_free, arrived) + copy
            now = max(now, arrived) + compute
            ends.append(now)
    return now + (calls - passes) * (now - before)


@dataclass(frozen=True)
class Phase:
    """`calls` calls of the blocks at the indices `blocks`, each with `tokens` tokens; the `first` sees the prompt."""

    name: str
    blocks: tuple[int, ...]
    calls: int
    tokens: int
    first: bool = True


def phases(blocks: Sequence[BlockSpec], workload: Workload) -> tuple[Phase, ...]:
    """The phases of one request.

    A block with `calls` of its own is called as often, over the whole context; the others once per new token, and of
    these the ones that see the `prompt` once over the context before that.
    """
    groups: dict[int | None, list[int]] = {}
    for index, block in enumerate(blocks):
        groups.setdefault(block.calls, []).append(index)
    each, prompt = workload.batch_size, workload.batch_size * workload.context_length
    found = []
    for calls, members in sorted(groups.items(), key=lambda group: group[0] is None):  # encoders run before decoders
        if calls is not None:
            found.append(Phase("encode" if calls == 1 else f"{calls} calls", tuple(members), calls, prompt))
            continue
        sees_prompt = all(blocks[i].prompt for i in members)
        found.append(Phase("prefill", tuple(members), 1, prompt if sees_prompt else each))
        found.append(Phase("decode", tuple(members), workload.new_tokens - 1, each, first=False))
    return tuple(phase for phase in found if phase.calls > 0)


def task(placement: Placement, phase: Phase, needs: Needs, speeds: Speeds, borrowed: int = 0) -> Task:
    """What a call of a block takes where it is placed; `borrowed` bytes of others' weights come with its own."""
    home, on_cpu = placement.home, placement.device == CPU or placement.at_home
    moved = 0 if placement.at_home else placement.streamed_bytes + borrowed
    from_disk = moved > 0 and placement.is_on_disk
    # what is computed where it rests comes page by page, while it is computed with
    paged = placement.block.nbytes if placement.at_home and home == DISK and not placement.block.gathers else 0
    # what comes from disk into memory takes of its bandwidth, and arithmetic there waits for as much
    shared = moved / speeds.host if on_cpu else 0.0
    return Task(
        read=moved / speeds.disk if from_disk else 0.0,
        copy=0.0 if on_cpu else moved / speeds.bus,
        compute=_compute(placement.block, phase, needs, speeds.cpu if on_cpu else speeds.device, borrowed)
        + paged / speeds.disk
        + shared,
        from_memory=moved > 0 and not from_disk,
    )


def _compute(block: BlockSpec, phase: Phase, needs: Needs, speed: Arithmetic, borrowed: int) -> float:
    """Seconds of multiplying by every weight, or of the work that is known; a table is gathered."""
    if block.gathers:
        return 0.0
    elements = block.elements + borrowed / DTYPE_BYTES.get(block.dtype, 2)
    known = needs.work.get(block.name if block.part_of is None else leaf_of(block.part_of, block.name))
    work = known[0 if phase.first else 1] if known else Work(2 * elements * phase.tokens)
    tokens = work.operations / (2 * elements) if elements else 0
    small = speed.per_weight * len(block.tensors) + speed.per_value * work.values
    return speed.seconds(block.dtype, elements, tokens) + small


def leaf_of(block: str, leaf: str) -> str:
    """What `Needs.work` calls a leaf of a block that was cut."""
    return f"{block}:{leaf}"


def with_leaves(needs: Needs, blocks: Sequence[BlockSpec]) -> Needs:
    """`needs` with the work of each block shared out among its leaves, by their elements."""
    work = dict(needs.work)
    for block in blocks:
        known = work.get(block.name)
        if known and block.elements:
            for leaf in block.parts:
                share = leaf.elements / block.elements
                first, step = (Work(each.operations * share, each.values * share) for each in known)
                work[leaf_of(block.name, leaf.name)] = first, step
    return replace(needs, work=work)


def predict(placements: Sequence[Placement], needs: Needs, speeds: Speeds, slots: int) -> tuple[PhaseTime, ...]:
    """Seconds that each phase of one request takes."""
    borrowed = borrowed_bytes(placements)
    found = []
    for phase in phases([p.block for p in placements], needs.workload):
        tasks = [task(placements[i], phase, needs, speeds, borrowed[i]) for i in phase.blocks]
        found.append(PhaseTime(phase.name, phase.calls, phase_seconds(tasks, phase.calls, max(slots, 1))))
    return tuple(found)


def borrowed_bytes(placements: Sequence[Placement]) -> list[int]:
    """Bytes per block of the weights of others that have to come to where it runs."""
    sizes = {t.name: t.nbytes for p in placements for t in p.block.tensors}
    homes = {t.name: p.home_of(t.name) for p in placements for t in p.block.tensors}
    return [0 if p.at_home else _away(p.block.borrows, p.device, homes, sizes) for p in placements]


def _away(names: Iterable[str], device: str, homes: Mapping[str, str], sizes: Mapping[str, int]) -> int:
    return sum(sizes[name] for name in names if homes.get(name, device) != device)


def window(sizes: Iterable[int], depth: int) -> int:
    """Bytes of a ring in which any `depth` blocks of these sizes fit together."""
    return sum(sorted(sizes, reverse=True)[:depth])
