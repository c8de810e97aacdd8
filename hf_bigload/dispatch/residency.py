"""Where weights rest, one class per tier, and how each comes to the device that computes.

A parameter's `.data` at rest is its home: a device tensor, a host tensor, or a mapped view of the file. The home is the
truth. What is remembered beside it (where in a file the bytes lie) only counts as long as the home is untouched.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from ..checkpoint.mapping import dirty_pages
from ..checkpoint.reader import Reader, layout
from ..specs import TensorEntry
from .ring import DEVICE_ALIGNMENT, Ring, Slot, span_bytes

CPU_DEVICE = torch.device("cpu")


@dataclass
class Stats:
    """What a dispatched model has moved so far, in bytes, and how often a block's weights had to come."""

    bytes_read: int = 0
    """From disk."""
    bytes_copied: int = 0
    """Between host and devices."""
    fetches: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(self, bytes_read: int = 0, bytes_copied: int = 0, fetches: int = 0) -> None:
        with self._lock:
            self.bytes_read += bytes_read
            self.bytes_copied += bytes_copied
            self.fetches += fetches


class Machine:
    """What residencies move bytes with: a reader for the files, a ring for each device, and the counters.

    `ring_bytes` are the limits of the rings; a device that is not among them has one that keeps a single slot.
    """

    def __init__(self, reader: Reader, ring_bytes: Mapping[torch.device, int]) -> None:
        self.reader = reader
        self.stats = Stats()
        self.rings: dict[torch.device, Ring] = {}
        self._ring_bytes = dict(ring_bytes)

    def ring(self, device: torch.device) -> Ring:
        return self.rings.get(device) or self.rings.setdefault(device, Ring(device, self._ring_bytes.get(device, 0)))

    @cached_property
    def aside(self) -> Machine:
        """The same with slots of their own, for what comes while blocks use the rings: saved weights, in backward."""
        aside = Machine(self.reader, {})
        aside.stats = self.stats
        return aside

    def close(self) -> None:
        for ring in (*self.rings.values(), *self.aside.rings.values()):
            ring.close()
        self.reader.close()

    def after_fork(self) -> None:
        for ring in (*self.rings.values(), *self.aside.rings.values()):
            ring.after_fork()

    def __deepcopy__(self, memo: dict[int, object]) -> Machine:
        copied = memo[id(self)] = Machine(Reader(), self._ring_bytes)
        return copied


class Residency(ABC):
    """One weight at rest."""

    home: torch.Tensor

    streams: bool
    """Whether the weight has to be brought even to the device that its home is on."""

    @abstractmethod
    def is_current(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` still is what this remembers: not replaced, not written."""

    @classmethod
    @abstractmethod
    def bring(
        cls, group: Sequence[Residency], device: torch.device, machine: Machine, lasting: bool = False
    ) -> tuple[list[torch.Tensor], list[Slot]]:
        """Copies of `group` on `device`, in order, and the slots that hold them (to be given back by the caller).

        Each copy has the dtype, shape and strides of its home. For `lasting`, see `Ring.take`.
        """


class MemoryResident(Residency):
    """In the memory of some device or the host: `home` itself is what is copied."""

    streams = False

    def __init__(self, home: torch.Tensor) -> None:
        self.home = home

    def is_current(self, tensor: torch.Tensor) -> bool:
        return True  # the tensor's own data is the home, whatever was written to it

    @classmethod
    def bring(
        cls, group: Sequence[Residency], device: torch.device, machine: Machine, lasting: bool = False
    ) -> tuple[list[torch.Tensor], list[Slot]]:
        homes = [residency.home for residency in group]
        positions, total = _packed(homes)
        with machine.ring(device).taken(total, lasting) as slot:
            arrived = [_copy_into(slot, at, home) for at, home in zip(positions, homes, strict=True)]
        machine.stats.add(bytes_copied=sum(map(span_bytes, homes)))
        return arrived, [slot]


class HostResident(MemoryResident):
    """In RAM."""


class DeviceResident(MemoryResident):
    """On a device; comes to another one only for weights that blocks on two devices share."""


class DiskResident(Residency):
    """In a file: `entry` says where. `home` is a private mapping of the same bytes, for whoever reads it directly."""

    streams = True

    def __init__(self, entry: TensorEntry, home: torch.Tensor, tensor: torch.Tensor) -> None:
        self.entry, self.home = entry, home
        self._looks, self._version = _looks(home), version_of(tensor)

    def is_current(self, tensor: torch.Tensor) -> bool:
        untouched = _looks(tensor) == self._looks and version_of(tensor) == self._version
        return untouched and dirty_pages(self.home) is False  # None: nobody can tell, so the mapping is the truth

    @classmethod
    def bring(
        cls, group: Sequence[Residency], device: torch.device, machine: Machine, lasting: bool = False
    ) -> tuple[list[torch.Tensor], list[Slot]]:
        entries = [r.entry for r in group if isinstance(r, DiskResident)]
        if device.type == "cpu":
            arrived, slot = _read(entries, machine, lasting)
            return arrived, [slot]
        staged, slot = _read(entries, machine)
        try:
            return HostResident.bring([HostResident(t) for t in staged], device, machine, lasting)
        finally:  # the copies out of the slot are complete: its pages are not pinned
            del staged
            machine.ring(CPU_DEVICE).give(slot)


def resting(tensor: torch.Tensor) -> MemoryResident:
    """The residency of a tensor about which nothing more is known than that it is in memory."""
    return HostResident(tensor.data) if tensor.device.type == "cpu" else DeviceResident(tensor.data)


def version_of(tensor: torch.Tensor) -> int:
    """How often a tensor was written to in place; 0 for one made in inference mode, which does not count."""
    try:
        return tensor._version
    except RuntimeError:
        return 0


def _looks(tensor: torch.Tensor) -> tuple[int, torch.dtype, torch.Size, tuple[int, ...]]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _read(entries: Sequence[TensorEntry], machine: Machine, lasting: bool = False) -> tuple[list[torch.Tensor], Slot]:
    plan = layout(entries)
    ring = machine.ring(CPU_DEVICE)
    with ring.taken(plan.nbytes, lasting) as slot:
        reading = machine.reader.read(plan.extents, slot.buffer)  # type: ignore[attr-defined]
        try:
            machine.stats.add(bytes_read=reading.result())
        finally:
            if not reading.done():  # interrupted: what is under way goes on writing into these bytes
                ring.lose(slot)
        return [_staged(slot, at, entry) for at, entry in zip(plan.positions, entries, strict=True)], slot


def _staged(slot: Slot, position: int, entry: TensorEntry) -> torch.Tensor:
    dtype = getattr(torch, entry.dtype)
    if entry.stride is None:
        return slot.view(position, dtype, entry.shape, entry.nbytes)
    flat = slot.view(position, dtype, (entry.nbytes // dtype.itemsize,), entry.nbytes)
    return flat.as_strided(entry.shape, entry.stride)


def _packed(tensors: Sequence[torch.Tensor]) -> tuple[list[int], int]:
    """Where each tensor starts in one slot, as an allocator would align it, and the bytes of all."""
    positions, at = [], 0
    for tensor in tensors:
        positions.append(at)
        at += -(-span_bytes(tensor) // DEVICE_ALIGNMENT) * DEVICE_ALIGNMENT
    return positions, at


def _copy_into(slot: Slot, position: int, home: torch.Tensor) -> torch.Tensor:
    """A copy with the strides of `home`, whatever they are: kernels may round differently for others."""
    count = span_bytes(home) // home.element_size()
    flat = slot.view(position, home.dtype, (count,), count * home.element_size())
    flat.copy_(home.as_strided((count,), (1,)))
    return flat.as_strided(home.shape, home.stride())
