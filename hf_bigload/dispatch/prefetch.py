"""Which blocks run next, and their weights on the way before they do.

The blocks that a thread enters follow each other much as they did the last time. A table says which block came after
which two, and, where these two never met, after the last one; it starts with the plan's order. While a block runs, the
next ones on that chain are sent as far as the rings have room. A wrong guess costs a read that nobody needed: it is
dropped when its slot is wanted, and the table is corrected.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from .machine import Load
from .residency import Residency, State, state_of
from .ring import Look
from .transfer import Transfer

WINDOW = 4
"""Blocks that may be on their way at once: several small ones hide the latency of each."""


class Stop(Protocol):
    """A block that streams, as the prefetcher knows it."""

    @property
    def runs_on(self) -> torch.device: ...

    name: str
    recipe: Recipe | None

    def weights(self) -> Sequence[torch.Tensor]:
        """What it would lease now."""
        ...


class Sender(Protocol):
    """What sends weights: the executor."""

    def send_ahead(self, stop: Stop, must_keep: bool) -> Ahead | None:
        """Start bringing what a block will need.

        None where the rings have no room now, or where somebody could change a weight unnoticed, and `must_keep`.
        """
        ...


@dataclass(eq=False)
class Recipe:
    """How the weights of a block come, as long as they rest where they did when this was made."""

    weights: Sequence[torch.Tensor]
    states: list[State]
    loads: list[tuple[Load, list[tuple[torch.Tensor, Residency]]]]
    """What has to come, and what of it travels together."""

    def __post_init__(self) -> None:
        self.keeps = all(residency.keeps for _, group in self.loads for _, residency in group)
        """Whether it may be sent ahead while anybody may write to weights at rest."""
        self.largest = max((load for load, _ in self.loads), key=lambda load: load.nbytes, default=None)
        self.where = {
            id(tensor): (number, position, residency)
            for number, (_, group) in enumerate(self.loads)
            for position, (tensor, residency) in enumerate(group)
        }
        """Tensor id -> the number of its load, its position in that, and where it rests."""

    def fits(self, weights: Sequence[torch.Tensor]) -> bool:
        """Whether these are the same, and untouched as far as that is seen without effort."""
        if len(weights) != len(self.weights):
            return False
        for one, other, state in zip(weights, self.weights, self.states, strict=True):
            if one is not other or state != state_of(one):
                return False
        return True


class Sent(NamedTuple):
    """One weight that is under way."""

    residency: Residency
    data: torch.Tensor
    transfer: Transfer
    look: Look

    @property
    def state(self) -> State:
        """The weight's, once it has this data: known without asking torch, which takes longer."""
        position, dtype, shape, stride, _nbytes = self.look
        return self.transfer.slot.address + position, self.residency.state[1], dtype, shape, stride  # type: ignore[return-value]


class Ahead:
    """All that was sent ahead for one block, by one thread."""

    def __init__(self, recipe: Recipe | None = None) -> None:
        self.recipe = recipe
        self.thread = threading.get_ident()
        self.transfers: list[Transfer] = []
        """In the order of the recipe's loads."""
        self.used: list[Transfer] = []
        """Those of them that somebody took over."""

    @property
    def keeps(self) -> bool:
        return self.recipe is None or self.recipe.keeps

    def use(self, tensor: torch.Tensor) -> Sent | None:
        """What was sent of a weight that rests here now, if it is what would be sent now."""
        if self.recipe is None:
            return None
        where = self.recipe.where.get(id(tensor))
        if where is None or not where[2].is_current(tensor):
            return None
        transfer = self.transfers[where[0]]
        look = self.recipe.loads[where[0]][0].looks[where[1]]
        return Sent(where[2], transfer.tensors[where[1]], transfer, look)

    def drop(self) -> None:
        """Give back what nobody took over."""
        for transfer in self.transfers:
            if transfer not in self.used:
                transfer.release()

    @property
    def is_settled(self) -> bool:
        return all(transfer.is_done for transfer in self.transfers)

    def settle(self) -> None:
        """Wait until what was dropped has given its slots back."""
        for transfer in self.transfers:
            transfer.settle()


@dataclass(frozen=True)
class Step:
    to: Stop
    outside: bool
    """Whether the thread leaves the model on the way: its caller may write to weights."""


class Trail(threading.local):
    """Where a thread has been: the last two blocks. (Weakly: what a thread holds cannot be found to be garbage.)"""

    def __init__(self) -> None:
        self._stops: tuple[weakref.ref[Stop] | None, weakref.ref[Stop] | None] = (None, None)
        self.came_out = False
        """Whether it was outside of the model since it entered the last one."""

    def last_two(self) -> tuple[Stop | None, Stop | None]:
        before, last = self._stops
        return None if before is None else before(), None if last is None else last()

    def enter(self, stop: Stop) -> None:
        self._stops, self.came_out = (self._stops[1], weakref.ref(stop)), False


class Prefetcher:
    """Sends the weights of the blocks that run next. Safe to use from several threads."""

    def __init__(self, sender: Sender) -> None:
        self._sender: Sender = weakref.proxy(sender)
        self._trail = Trail()
        self._after: dict[tuple[Stop | None, Stop], Step] = {}
        self._ahead: dict[Stop, Ahead] = {}
        self._dropped: list[Ahead] = []
        """Whose reads may not have ended yet."""
        self._lock = threading.RLock()

    def expect(self, stops: Sequence[Stop]) -> None:
        """That blocks run in this order, again and again, as long as nothing else was seen."""
        for stop, following in zip(stops, [*stops[1:], *stops[:1]], strict=True):
            self._after[None, stop] = Step(following, outside=following is stops[0])

    def enter(self, stop: Stop) -> Ahead | None:
        """The calling thread enters a block: what was sent ahead for it, from now on the caller's."""
        before, last = self._trail.last_two()
        with self._lock:
            if last is not None:
                self._after[None, last] = self._after[before, last] = Step(stop, self._trail.came_out)
            ahead = self._ahead.pop(stop, None)
        self._trail.enter(stop)
        return ahead

    def go_on(self) -> None:
        """Send what comes next for the calling thread, as far as there is room."""
        with self._lock:
            chain = dict(self._chain())
            self._drop_others(chain)
            for stop, outside in chain.items():
                if stop not in self._ahead:
                    ahead = self._sender.send_ahead(stop, must_keep=outside)
                    if ahead is None:
                        return
                    self._ahead[stop] = ahead

    def _drop_others(self, chain: Mapping[Stop, bool]) -> None:
        """Drop what the calling thread sent and will not need soon."""
        me = threading.get_ident()
        for stop in [s for s, ahead in self._ahead.items() if s not in chain and ahead.thread == me]:
            self._drop(stop)

    def come_out(self) -> None:
        """The calling thread leaves the model: some of what was sent may become outdated, and nobody could tell."""
        self._trail.came_out = True
        with self._lock:
            for stop in [stop for stop, ahead in self._ahead.items() if not ahead.keeps]:
                self._drop(stop)

    def make_room(self) -> bool:
        """Give back the slots of what would be needed last; False if nothing is sent ahead."""
        with self._lock:
            self._dropped = [ahead for ahead in self._dropped if not ahead.is_settled]
            if not self._dropped and self._ahead:
                self._drop(next(reversed(self._ahead)))
            going, self._dropped = self._dropped, []
        for ahead in going:
            ahead.settle()
        return bool(going)

    def forget(self) -> None:
        """Something went wrong: what was expected next will hardly come."""
        with self._lock:
            for stop in list(self._ahead):
                self._drop(stop)

    def close(self) -> None:
        """Drop all, and wait until nothing is under way."""
        while self.make_room():
            pass

    def after_fork(self) -> None:
        """In a child: only the thread that forked lives on, and it sent nothing here."""
        self._lock = threading.RLock()
        self.forget()

    def _chain(self) -> Iterator[tuple[Stop, bool]]:
        """The blocks that come next for the calling thread, and for each whether the model is left before it."""
        (before, at), outside = self._trail.last_two(), self._trail.came_out
        seen = {at}
        while at is not None and len(seen) <= WINDOW:
            step = self._after.get((before, at)) or self._after.get((None, at))
            if step is None or step.to in seen:
                return
            before, at, outside = at, step.to, outside or step.outside
            seen.add(at)
            yield at, outside

    def _drop(self, stop: Stop) -> None:
        ahead = self._ahead.pop(stop)
        ahead.drop()
        self._dropped = [*(each for each in self._dropped if not each.is_settled), ahead]
