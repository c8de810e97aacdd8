"""Weights on their way to a device: what is under way, what it lands in, and how bytes are packed to travel."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from ..pinned import ALIGNMENT
from .ring import Ring, Slot

if TYPE_CHECKING:
    from .recorder import Journey

MERGE_GAP = ALIGNMENT
"""Bytes between two weights in one piece of memory below which one copy takes both: no more than alignment costs."""


@dataclass(eq=False)
class Transfer:
    """Weights that were sent to a device. They may be used after `wait`, until `release`."""

    ring: Ring
    slot: Slot
    tensors: list[torch.Tensor]
    """Views of the slot, in the order of the weights."""
    coming: Future[int] | None = None
    """Done when all that this machine's threads have to do for it is done; a device may still be copying."""
    bytes_read: int = 0
    bytes_copied: int = 0
    journey: Journey | None = None
    """Notes about it, while the model is recorded."""

    def begin(self, start: Callable[[], Future[int]]) -> None:
        """Have the slot written by other threads, as `start` starts them."""
        self.slot.is_written = True  # first: an interrupt may keep us from seeing the future
        self.coming = start()
        if self.journey is not None:
            self.journey.coming = self.coming

    def do(self, write: Callable[[], object]) -> None:
        """Have the slot written here and now."""
        self.slot.is_written = True  # by an interrupted write, too
        write()
        self.slot.is_written = False

    @property
    def is_done(self) -> bool:
        return self.coming is None or self.coming.done()

    def wait(self) -> float:
        """Have the bytes there for whatever the calling thread does next on the device; the seconds it had to wait.

        Raises:
            CheckpointError: they could not be read.
        """
        started = time.perf_counter()
        stalls = not self.is_done
        if self.coming is not None:
            self.coming.result()
        self.slot.joined()
        return time.perf_counter() - started if stalls else 0.0

    def release(self) -> None:
        """Give the slot back, as soon as nobody writes to it any more. Repeating it does no harm."""
        self.tensors = []
        if self.coming is None:
            self.ring.give(self.slot)
        else:
            self.coming.add_done_callback(partial(_give, self.ring, self.slot))

    def settle(self) -> None:
        """Wait until `release`, which was called, has given the slot back."""
        if self.coming is not None:
            _give(self.ring, self.slot, self.coming)


def _give(ring: Ring, slot: Slot, coming: Future[int]) -> None:
    coming.exception()
    slot.is_written = False
    ring.give(slot)


def then(first: Future[int], step: Callable[[], None], anyway: Callable[[], None]) -> Future[int]:
    """A future of what `first` gives, done after `step`, and failed if that or `first` fails; `anyway` comes last."""
    second: Future[int] = Future()
    second.set_running_or_notify_cancel()

    def go_on(done: Future[int]) -> None:
        try:
            try:
                nbytes = done.result()
                step()
            finally:
                anyway()
        except BaseException as error:  # noqa: BLE001 - it belongs to whoever waits for the future
            second.set_exception(error)
        else:
            second.set_result(nbytes)

    first.add_done_callback(go_on)
    return second


@dataclass(frozen=True)
class Run:
    """Bytes that are copied at once: `nbytes` from where piece number `first` begins, to `position` of a slot."""

    first: int
    address: int
    nbytes: int
    position: int

    def reaches(self, address: int) -> bool:
        """Whether what begins at `address` may join: it begins soon after, and would be aligned in the slot."""
        distance = address - self.address
        return 0 <= distance - self.nbytes < MERGE_GAP and distance % ALIGNMENT == 0


@dataclass
class Packing:
    """How pieces of memory lie packed in one slot, each where an allocator would start a tensor."""

    nbytes: int = 0
    positions: list[int] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)

    @classmethod
    def of(cls, pieces: Sequence[tuple[int, int, int]]) -> Packing:
        """Pack pieces (the memory that each is in, its address, its bytes); neighbours that may travel together do."""
        packing, memory_before = cls(), 0
        for memory, address, nbytes in pieces:
            last = packing.runs[-1] if packing.runs else None
            if last is not None and memory == memory_before and last.reaches(address):
                packing._extend(last, address, nbytes)
            else:
                packing._append(address, nbytes)
            memory_before = memory
        return packing

    def _append(self, address: int, nbytes: int) -> None:
        self.runs.append(Run(len(self.positions), address, nbytes, self.nbytes))
        self.positions.append(self.nbytes)
        self.nbytes += _aligned(nbytes)

    def _extend(self, last: Run, address: int, nbytes: int) -> None:
        self.positions.append(last.position + address - last.address)
        self.runs[-1] = longer = replace(last, nbytes=address + nbytes - last.address)
        self.nbytes = last.position + _aligned(longer.nbytes)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
