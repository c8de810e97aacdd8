"""The search for the residency that makes a request shortest, within the budgets. Figures only: no blocks, no devices.

Each item rests in one of three tiers. Whatever does not rest in the first one streams through a ring, and what comes
from the last one also through a staging ring; a ring takes room for as many of the largest that pass through it as it
has slots. So the search starts from every size that may be the largest to stream (what is larger stays resident), fills
what room is left in several orders, and keeps the starts whose schedules are shortest. From the best of these it
descends by single moves and swaps, each followed by filling what room it made. Schedules judge.
The work is counted, and after enough of it the best so far is taken: a model of thousands of blocks has many plans
that are as good. Few choices are all tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product, takewhile
from math import isqrt, prod
from typing import NamedTuple

from .schedule import Task, phase_seconds, window

DEVICE, RAM, FILES = 0, 1, 2
"""Tiers: where it is computed, memory, disk."""

MOST_STEPS = 3000
_FEW_CHOICES = 3**8
_STEPS_TIMES_ITEMS = 30_000
_FEWEST_STEPS = 12
"""Steps of a search (choices filled, schedules followed), each of which takes time proportional to the items."""

_HIDDEN = 0.1
"""Of a second of travel, what it costs at least."""

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

    @property
    def least(self) -> int:
        """Bytes that it takes of whichever memory spares it the disk."""
        return min(
            (size for tier, size in ((DEVICE, self.on_device), (RAM, self.in_ram)) if tier in self.tiers), default=0
        )


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

    def cost(self, choice: Sequence[int]) -> float:
        """What is minimised: the length of the schedule, and a little of what travels even where that is hidden behind
        arithmetic. It shares memory and cores with that, and a prediction may be wrong about what is hidden."""
        travel = sum(
            calls * sum(task.read + task.copy for step in steps for task in (step.by_tier[choice[step.item]],))
            for calls, steps in self.phases
        )
        return self.seconds(choice) + _HIDDEN * travel

    def moved(self, choice: Sequence[int]) -> int:
        """Bytes that travel for one request, those from disk counted twice."""
        return sum(item.ring * item.calls * tier for item, tier in zip(self.items, choice, strict=True))

    def gained_by_a_slot(self, choice: Sequence[int]) -> float:
        """The share of what travels that room for one more item could spare, at most."""
        streaming = [item for item, tier in zip(self.items, choice, strict=True) if tier != DEVICE]
        spared = max((item.ring for item in streaming), default=0) * max((item.calls for item in streaming), default=0)
        return FILES * spared / max(1, self.moved(choice))

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

    def lower_bound(self) -> float:
        """Seconds that no choice can beat: as if rings took no room, items could be divided, and everything that can
        happen at once did. What does not fit on the device is copied; what fits in memory neither, is read."""
        copied = self._fluid(self.device, lambda task: task.copy)
        return max(copied, self._fluid(self.device + self.ram, lambda task: task.read))

    def _fluid(self, room: int, travel: Callable[[Task], float]) -> float:
        """The same with one thing that takes time beside arithmetic, if `room` bytes are spared it: what gains most
        for its bytes first, as long as something that runs together with it waits at all."""
        seconds, left = 0.0, float(max(room, 0))
        gains: list[tuple[float, float, int]] = []
        waits: list[float] = []
        for group in self._together():
            waits.append(0.0)
            gained: dict[int, float] = {}
            for calls, steps in group:
                computing = sum(min(task.compute for task in step.by_tier) for step in steps)
                travelling = sum(travel(step.by_tier[FILES]) for step in steps)
                seconds += calls * max(computing, travelling)
                if travelling > computing:
                    waits[-1] += calls * (travelling - computing)
                    for step in steps:
                        gained[step.item] = gained.get(step.item, 0.0) + calls * travel(step.by_tier[FILES])
            gains += [(gain, self.items[i].least, len(waits) - 1) for i, gain in gained.items() if gain]
        for gain, size, group_index in sorted(gains, key=lambda each: each[1] / each[0]):
            share = min(1.0, left / size) if size else 1.0
            spared = min(gain * share, waits[group_index])
            waits[group_index] -= spared
            seconds -= spared
            left -= size * spared / gain
        return seconds

    def _together(self) -> list[list[tuple[int, tuple[Step, ...]]]]:
        """The phases in groups; no two groups share an item."""
        groups: list[tuple[set[int], list[tuple[int, tuple[Step, ...]]]]] = []
        for phase in self.phases:
            items, members = {step.item for step in phase[1]}, [phase]
            apart = []
            for others, phases in groups:
                if others & items:
                    items, members = items | others, members + phases
                else:
                    apart.append((others, phases))
            groups = [*apart, (items, members)]
        return [members for _, members in groups]


@dataclass
class Search:
    """One search; `steps` counts its work. `in_order`: the first items go up first, and nothing is chosen by time."""

    problem: Problem
    in_order: bool = False
    steps: int = 0
    known: dict[Choice, tuple[float, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.items = self.problem.items
        self.most = min(MOST_STEPS, max(_FEWEST_STEPS, _STEPS_TIMES_ITEMS // max(1, len(self.items))))

    def best(self) -> Choice | None:
        """The best choice found; None where none was found that keeps the budgets."""
        every = [item.tiers for item in self.items]
        if self.in_order:
            return max(self._starts(), key=self._resident, default=None)
        if len(every) < 20 and prod(map(len, every)) <= _FEW_CHOICES:
            return min(filter(self.problem.fits, product(*every)), key=self._cost_of, default=None)
        ranked = sorted(dict.fromkeys(self._starts()), key=self._cost_of)
        return min(map(self._descend, ranked[:_DESCENTS]), key=self._cost_of, default=None)

    def _cost_of(self, choice: Choice) -> tuple[float, int]:
        if choice not in self.known:
            self.steps += 1
            self.known[choice] = (self.problem.cost(choice), self.problem.moved(choice))
        return self.known[choice]

    def _resident(self, choice: Choice) -> tuple[int, ...]:
        """Bytes in each tier, the first one before the others."""
        return tuple(
            sum(item.ring for item, at in zip(self.items, choice, strict=True) if at == tier) for tier in (DEVICE, RAM)
        )

    def _is_better(self, one: Choice, other: Choice) -> bool:
        (cost, moved), (others, others_moved) = self._cost_of(one), self._cost_of(other)
        if abs(cost - others) <= _SAME * others:
            return moved < others_moved
        return cost < others

    # ------------------------------------------------------------ starts

    def _starts(self) -> Iterator[Choice]:
        """Every order with every size, so mixed that the first ones have some of each: not all may be affordable."""
        orders, lowest, stagings = list(self._orders()), list(self._lowest()), self._sizes(lambda item: item.staging)
        for i, j, k in sorted(product(range(len(orders)), range(len(lowest)), range(len(stagings))), key=sum):
            if self.steps >= self.most // 3:
                return
            filled = self._filled(lowest[j], orders[i], stagings[k])
            if filled is not None:
                yield filled

    def _lowest(self) -> Iterator[list[int]]:
        """For each size of what may stream, what is larger resident; with two slots also all but one of what is."""
        sizes = self._affordable()
        for excepted in (None, *(sizes if self.problem.slots > 1 else ())):
            for ring in sizes:
                if excepted is not None and excepted <= ring:
                    continue
                but_one = next((i for i, item in enumerate(self.items) if item.ring == excepted), None)
                yield [
                    DEVICE if item.ring > ring and DEVICE in item.tiers and i != but_one else FILES
                    for i, item in enumerate(self.items)
                ]

    def _sizes(self, size: Callable[[Item], int]) -> list[int]:
        """The sizes that may be the largest to pass through a ring, among them the largest and none; some if many."""
        return self._some([*sorted({size(item) for item in self.items} - {0}, reverse=True), 0])

    def _some(self, sizes: Sequence[int]) -> list[int]:
        step = max(1, -(-len(sizes) // max(1, isqrt(self.most // 12))))
        return list(dict.fromkeys([*sizes[:1], *sizes[-1:], *sizes[step::step]]))

    def _affordable(self) -> list[int]:
        """The sizes that may be the largest to stream to the device, as all that is larger fits there (with one
        excepted if there are two slots); some if many."""
        sizes = [*sorted({item.ring for item in self.items} - {0}, reverse=True), 0]
        larger = sorted(((i.ring, i.on_device) for i in self.items if DEVICE in i.tiers), reverse=True)
        rings = sorted((item.ring for item in self.items), reverse=True)
        affordable, resident, taken, below = [], 0, 0, 0
        for size in sizes:
            while taken < len(larger) and larger[taken][0] > size:
                resident, taken = resident + larger[taken][1], taken + 1
            while below < len(rings) and rings[below] > size:
                below += 1
            spared = max((on_device for _, on_device in larger[:taken]), default=0) if self.problem.slots > 1 else 0
            if resident - spared + sum(rings[below : below + self.problem.slots]) <= self.problem.device:
                affordable.append(size)
        return self._some(affordable)

    def _orders(self) -> Iterator[list[int]]:
        """Who gets room first: what is called most (or least) often; of these the last, or some all along the model."""
        every = range(len(self.items))
        if self.in_order:
            yield list(every)
            return
        for sign in (-1, 1):
            yield sorted(every, key=lambda i: (sign * self.items[i].calls, -i))
            yield sorted(every, key=lambda i: (sign * self.items[i].calls, i * _GOLDEN % 1))
        yield sorted(every, key=lambda i: (-self.items[i].ring, i))

    def _filled(self, choice: Sequence[int], order: Sequence[int], staging: int | None = None) -> Choice | None:
        """`choice` with items moved up in that order while there is room; None where a budget is exceeded even so.

        With `staging`, what is larger does not come from disk.
        """
        self.steps += 1
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
        """Better neighbours until there is none, or the steps are used up."""
        orders = [*self._orders(), []]  # with none, a neighbour is taken as it is: disk may be better than memory
        better: Choice | None = choice
        while better is not None:
            choice = better
            filled = (self._filled(changed, order) for changed in self._neighbours(choice) for order in orders)
            affordable = takewhile(lambda _: self.steps < self.most, filled)
            better = next((other for other in affordable if other and self._is_better(other, choice)), None)
        return choice

    def _neighbours(self, choice: Choice) -> Iterator[list[int]]:
        """One item elsewhere; two in each other's tiers; one moved up, and the others of that tier chosen anew."""
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
        for i, item in enumerate(self.items):
            for tier in item.tiers:
                if tier < choice[i]:
                    anew = [of.tiers[-1] if at == tier else at for of, at in zip(self.items, choice, strict=True)]
                    yield [*anew[:i], tier, *anew[i + 1 :]]
