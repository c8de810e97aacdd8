"""What moves bytes: the reader of files, a ring and a copy stream for each device, and the counters."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Protocol

import torch

from ..checkpoint.reader import Reader
from .recorder import Journey, Recorder
from .ring import Look, Ring, Slot
from .stats import Stats
from .transfer import Transfer

CPU_DEVICE = torch.device("cpu")


class Load(Protocol):
    """Weights that travel together, and how they are packed. Can be sent again and again while they stay at rest."""

    nbytes: int
    """Of the slot that they arrive in."""
    staged: int
    """Bytes of a slot of the host's ring that they pass through; 0 for none."""

    @property
    def looks(self) -> Sequence[Look]:
        """What each of them looks like in the slot that they arrive in."""
        ...

    def start(self, machine: Machine, ring: Ring, slot: Slot, stage: Slot | None) -> Transfer:
        """Have the slot filled. It is the transfer's to give back; `stage` goes back when it is no longer needed."""
        ...


class Machine:
    """`ring_bytes` are the sizes of the rings; a device that is not among them has none, and slots of their own."""

    def __init__(self, reader: Reader, ring_bytes: Mapping[torch.device, int]) -> None:
        self.reader = reader
        self.stats = Stats()
        self.recorder: Recorder | None = None
        """While the model is recorded."""
        self.rings: dict[torch.device, Ring] = {}
        self.make_room: Callable[[], bool] = lambda: False
        """See `Ring.make_room`."""
        self.ring_bytes = dict(ring_bytes)
        self._copy_streams: dict[torch.device, torch.Stream] = {}
        self._copying_homes: set[torch.Stream] = set()
        self._users: weakref.WeakSet[Machine] = weakref.WeakSet([self])
        """Of these rings."""

    def beside(self, reader: Reader) -> Machine:
        """Another that shares the rings: for a model that is called when those with the other machines are not.

        A ring is as large as any of them says, as long as nothing has passed through it.
        """
        other = Machine(reader, {})
        other.rings, other.ring_bytes, other._users = self.rings, self.ring_bytes, self._users
        other._copy_streams, other._copying_homes = self._copy_streams, self._copying_homes
        other._users.add(other)
        return other

    def ring(self, device: torch.device) -> Ring:
        return self.rings.get(device) or self._new_ring(device)

    def copy_stream(self, device: torch.device) -> torch.Stream:
        return self._copy_streams.get(device) or self._copy_streams.setdefault(device, torch.Stream(device=device))

    def copies_homes(self, stream: torch.Stream) -> None:
        """Called when copies out of weights at rest were issued on `stream`, of which no thread sees the end."""
        self._copying_homes.add(stream)

    def wait_for_homes(self) -> None:
        """Block until nothing that was issued so far copies from weights at rest: now anybody may write to them."""
        for stream in tuple(self._copying_homes):
            stream.synchronize()

    def journey(self, copied: int = 0) -> Journey | None:
        """For notes about a transfer that begins, of which `copied` bytes are copied between host and device."""
        return None if self.recorder is None else self.recorder.journey(self.reader, copied)

    @cached_property
    def aside(self) -> Machine:
        """The same with slots of their own, for what comes while blocks use the rings: saved weights, in backward."""
        aside = Machine(self.reader, {})
        aside.stats = self.stats
        return aside

    def send(self, load: Load, device: torch.device, lasting: bool = False) -> Transfer:
        """Start bringing weights to `device`; for `lasting`, see `Ring.take`.

        Raises:
            torch.OutOfMemoryError: the device has no room for them.
        """
        ring = self.ring(device)
        transfer = self._start(load, ring, ring.take(load.nbytes, lasting), Ring.take)
        assert transfer is not None
        return transfer

    def send_ahead(self, load: Load, device: torch.device) -> Transfer | None:
        """As `send`, if the rings have room now."""
        ring = self.ring(device)
        slot = ring.take_ahead(load.nbytes)
        return None if slot is None else self._start(load, ring, slot, Ring.take_ahead)

    def _start(self, load: Load, ring: Ring, slot: Slot, take: Callable[[Ring, int], Slot | None]) -> Transfer | None:
        """Have `slot` filled; None, and the slot given back, where `take` finds no room to stage."""
        staging, stage = self.ring(CPU_DEVICE), None
        try:
            if load.staged:
                stage = take(staging, load.staged)
                if stage is None:
                    ring.give(slot)
                    return None
            return load.start(self, ring, slot, stage)
        except BaseException:
            ring.give(slot)
            if stage is not None:
                staging.give(stage)
            raise

    def has_room(self, load: Load | None, device: torch.device) -> bool:
        """Whether `send_ahead` would find slots now."""
        if load is None:
            return True
        return self.ring(device).fits(load.nbytes) and (not load.staged or self.ring(CPU_DEVICE).fits(load.staged))

    def close(self) -> None:
        self.close_rings()
        self.reader.close()

    def close_rings(self) -> None:
        """Give the rings' memory back; what is read can still be read."""
        for ring in (*self.rings.values(), *self.aside.rings.values()):
            ring.close()

    def after_fork(self) -> None:
        for ring in (*self.rings.values(), *self.aside.rings.values()):
            ring.after_fork()
        self.stats.after_fork()
        self.recorder = self.aside.recorder = None  # its notes are the parent's

    def _new_ring(self, device: torch.device) -> Ring:
        accelerators = [d for d in self.ring_bytes if d.type != "cpu"]
        serves = accelerators[0] if device.type == "cpu" and accelerators else None
        ring = Ring(device, self.ring_bytes.get(device, 0), serves)
        users = self._users
        ring.make_room = lambda: any([machine.make_room() for machine in users])
        if device.type != "cpu":
            ring.streams = (self.copy_stream(device),)
        return self.rings.setdefault(device, ring)

    def __deepcopy__(self, memo: dict[int, object]) -> Machine:
        copied = memo[id(self)] = Machine(Reader(), self.ring_bytes)
        return copied
