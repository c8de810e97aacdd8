"""The search for the residency that makes a request shortest, within the budgets. Figures only: no blocks, no devices.

Each item rests in one of three tiers. Whatever does not rest in the first one streams through a ring, and what comes
from the last one also through a staging ring; a ring takes room for as many of the largest that pass through it as it
has slots. So the search starts from every size that may be the largest to stream (what is larger stays resident), fills
what room is left in several orders, and keeps the starts whose schedules are shortest. From the best of these it
descends by single moves and swaps, each followed by filling what room it made. Schedules judge; they are counted,
and when there were enough the best so far is taken: a model of thousands of blocks has many plans that are as good.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import prod
from typing import NamedTuple

from .schedule import Task, phase_seconds, window

DEVICE, RAM, FILES = 0, 1, 2
"""Tiers: where it is computed, memory, disk."""

MOST_SCHEDULES = 1200
_SCHEDULED_ITEMS = 20_000
_FEWEST_SCHEDULES = 6
_DESCENTS = 4
_SAME = 1e-9
"""Schedules that differ by less are as long as each other; the one that moves fewer bytes is better."""
_GOLDEN = 0.6180339887498949

Choice = tuple[int, ...]
"""A tier per item."""


class Item(NamedTuple):
    """What an item takes, in bytes: of each tier where it rests, of each ring where it streams."""

    on_device: int
    in_ram: int
    ring: int
    staging: int
    calls: int
    tiers: tuple[int, ...] = (DEVICE, RAM, FILES)


@dataclass(frozen=True)
class Step:
    """One call of something that rests where item `item` does."""

    item: int
    by_tier: tuple[Task, ...]


@dataclass(frozen=True)
class Problem:
    """Items, the phases over them as (calls, steps), and the budgets in bytes.

    `passage` is what staging may take where `ram` is 0: nothing may rest there.
    """

    items: tuple[Item, ...]
    phases: tuple[tuple[int, tuple[Step, ...]], ...]
    device: int
    ram: int
    passage: int
    slots: int

    def seconds(self, choice: Sequence[int]) -> float:
        """The length of the schedule."""
        return sum(
            phase_seconds([step.by_tier[choice[step.item]] for step in steps], calls, self.slots)
            for calls, steps in self.phases
        )

    def moved(self, choice: Sequence[int]) -> int:
        """Bytes that travel for one request, those from disk counted twice."""
        return sum(item.ring * item.calls * tier for item, tier in zip(self.items, choice, strict=True))

    def room(self, choice: Sequence[int]) -> tuple[int, int]:
        """Bytes left on the device and in RAM; negative where a budget is exceeded."""
        device, ram, rings, stagings = self.device, self.ram, [], []
        for item, tier in zip(self.items, choice, strict=True):
            if tier == DEVICE:
                device -= item.on_device
                continue
            rings.append(item.ring)
            if tier == RAM:
                ram -= item.in_ram
            else:
                stagings.append(item.staging)
        staging = window(stagings, self.slots)
        passes = self.ram == ram == 0 and staging <= self.passage
        return device - window(rings, self.slots), ram if passes else ram - staging

    def fits(self, choice: Sequence[int]) -> bool:
        return min(self.room(choice)) >= 0


@dataclass
class Search:
    """One search; `schedules` counts how many were looked at."""

    problem: Problem
    most: int = 0
    schedules: int = 0
    known: dict[Choice, tuple[float, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.items = self.problem.items
        if not self.most:
            affordable = _SCHEDULED_ITEMS // max(1, len(self.items))
            self.most = min(MOST_SCHEDULES, max(_FEWEST_SCHEDULES, affordable))

    def best(self, starts: Iterable[Choice] = ()) -> Choice | None:
        """The best choice found, from `starts` and from those that it makes; None where no choice keeps the budgets."""
        found: dict[Choice, None] = {}
        for start in (*starts, *self._starts()):
            if self.problem.fits(start):
                found.setdefault(start)
                if len(found) > self.most // 2:
                    break
        ranked = sorted(found, key=self._length)
        descended = [self._descend(choice) for choice in ranked[:_DESCENTS]]
        return min(descended, key=self._length, default=None)

    def _length(self, choice: Choice) -> tuple[float, int]:
        if choice not in self.known:
            self.schedules += 1
            self.known[choice] = (self.problem.seconds(choice), self.problem.moved(choice))
        return self.known[choice]

    def _is_better(self, one: Choice, other: Choice) -> bool:
        (seconds, moved), (others, others_moved) = self._length(one), self._length(other)
        if abs(seconds - others) <= _SAME * others:
            return moved < others_moved
        return seconds < others

    # ------------------------------------------------------------ starts

    def _starts(self) -> Iterator[Choice]:
        if prod(len(item.tiers) for item in self.items) <= self.most // 2:
            yield from product(*(item.tiers for item in self.items))
            return
        orders = list(self._orders())
        for ring in self._sizes(lambda item: item.ring):
            lowest = [DEVICE if item.ring > ring and DEVICE in item.tiers else FILES for item in self.items]
            for staging in self._sizes(lambda item: item.staging):
                for order in orders:
                    filled = self._filled(lowest, order, staging)
                    if filled is not None:
                        yield filled

    def _sizes(self, size: Callable[[Item], int]) -> list[int]:
        """The sizes that may be the largest to pass through a ring: all of them, or some if they are many."""
        sizes = sorted({size(item) for item in self.items} | {0}, reverse=True)
        most = max(2, int((self.most / 4) ** 0.5))
        step = -(-len(sizes) // most)
        return sizes[::step]

    def _orders(self) -> Iterator[list[int]]:
        """Who gets room first: what is called most (or least) often; of these the last, or some all along the model."""
        every = range(len(self.items))
        for sign in (-1, 1):
            yield sorted(every, key=lambda i: (sign * self.items[i].calls, -i))
            yield sorted(every, key=lambda i: (sign * self.items[i].calls, i * _GOLDEN % 1))
        yield sorted(every, key=lambda i: (-self.items[i].ring, i))

    def _filled(self, choice: Sequence[int], order: Sequence[int], staging: int | None = None) -> Choice | None:
        """`choice` with items moved up in that order while there is room; None where a budget is exceeded even so.

        With `staging`, what is larger does not come from disk.
        """
        filled = list(choice)
        device, _ = self.problem.room(filled)
        if device < 0:
            return None
        for i in order:
            item = self.items[i]
            if filled[i] != DEVICE and DEVICE in item.tiers and item.on_device <= device:
                device -= item.on_device
                filled[i] = DEVICE
        if staging is not None:
            filled = [
                RAM if t == FILES and RAM in i.tiers and i.staging > staging else t
                for i, t in zip(self.items, filled, strict=True)
            ]
        _, ram = self.problem.room(filled)
        for i in order:
            item = self.items[i]
            if filled[i] == FILES and RAM in item.tiers and item.in_ram <= ram:
                ram -= item.in_ram
                filled[i] = RAM
        return tuple(filled) if ram >= 0 else None

    # ------------------------------------------------------------ descent

    def _descend(self, choice: Choice) -> Choice:
        """Better neighbours until there is none, or schedules ran out."""
        orders = list(self._orders())
        improved = True
        while improved:
            improved = False
            for changed in self._neighbours(choice):
                for filled in {self._filled(changed, order): None for order in orders}:
                    if self.schedules >= self.most:
                        return choice
                    if filled is not None and filled not in self.known and self._is_better(filled, choice):
                        choice, improved = filled, True
                if improved:
                    break
        return choice

    def _neighbours(self, choice: Choice) -> Iterator[list[int]]:
        for i, item in enumerate(self.items):
            for tier in item.tiers:
                if tier != choice[i]:
                    yield [*choice[:i], tier, *choice[i + 1 :]]
        for i, one in enumerate(choice):
            for j in range(i + 1, len(choice)):
                other = choice[j]
                if one != other and one in self.items[j].tiers and other in self.items[i].tiers:
                    changed = list(choice)
                    changed[i], changed[j] = other, one
                    yield changed
