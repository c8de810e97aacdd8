"""Where weights rest, one class per tier, and how each comes to the device that computes.

A parameter's `.data` at rest is its home: a device tensor, a host tensor, or a mapped view of the file. The home is the
truth. What is remembered beside it (where in a file the bytes lie) only counts as long as the home is untouched.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..checkpoint.mapping import dirty_pages
from ..checkpoint.reader import layout
from ..specs import TensorEntry
from .ring import DEVICE_ALIGNMENT, Slot

if TYPE_CHECKING:
    from .executor import Machine


class Residency(ABC):
    """One weight at rest."""

    home: torch.Tensor

    @abstractmethod
    def is_current(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` still is what this remembers: not replaced, not written."""

    @classmethod
    @abstractmethod
    def bring(
        cls, group: Sequence[Residency], device: torch.device, machine: Machine
    ) -> tuple[list[torch.Tensor], list[Slot]]:
        """Copies of `group` on `device`, in order, and the slots that hold them (to be given back by the caller)."""


class MemoryResident(Residency):
    """In the memory of some device or the host: `home` itself is what is copied."""

    def __init__(self, home: torch.Tensor) -> None:
        self.home = home

    def is_current(self, tensor: torch.Tensor) -> bool:
        return True  # the tensor's own data is the home, whatever was written to it

    @classmethod
    def bring(
        cls, group: Sequence[Residency], device: torch.device, machine: Machine
    ) -> tuple[list[torch.Tensor], list[Slot]]:
        homes = [residency.home for residency in group]
        positions, total = _packed(homes)
        slot = machine.ring(device).take(total)
        arrived = [_copy_into(slot, at, home, device) for at, home in zip(positions, homes, strict=True)]
        machine.stats.bytes_copied += sum(h.numel() * h.element_size() for h in homes)
        return arrived, [slot]


class HostResident(MemoryResident):
    """In RAM."""


class DeviceResident(MemoryResident):
    """On a device; comes to another one only for weights that blocks on two devices share."""


class DiskResident(Residency):
    """In a file: `entry` says where. `home` is a private mapping of the same bytes, for whoever reads it directly."""

    def __init__(self, entry: TensorEntry, home: torch.Tensor, tensor: torch.Tensor) -> None:
        self.entry, self.home = entry, home
        self._address, self._version = home.data_ptr(), tensor._version

    def is_current(self, tensor: torch.Tensor) -> bool:
        untouched = tensor.data_ptr() == self._address and tensor._version == self._version
        return untouched and not dirty_pages(self.home)

    @classmethod
    def bring(
        cls, group: Sequence[Residency], device: torch.device, machine: Machine
    ) -> tuple[list[torch.Tensor], list[Slot]]:
        entries = [r.entry for r in group if isinstance(r, DiskResident)]
        plan = layout(entries)
        slot = machine.ring(torch.device("cpu")).take(plan.nbytes)
        try:
            machine.stats.bytes_read += machine.reader.read(plan.extents, slot.buffer).result()  # type: ignore[attr-defined]
            staged = [_staged(slot, at, entry) for at, entry in zip(plan.positions, entries, strict=True)]
            if device.type == "cpu":
                return staged, [slot]
            arrived = HostResident.bring([HostResident(t) for t in staged], device, machine)
        except BaseException:
            machine.ring(torch.device("cpu")).give(slot)
            raise
        machine.ring(torch.device("cpu")).give(slot)  # the copies above were complete when they returned
        return arrived


def resting(tensor: torch.Tensor) -> MemoryResident:
    """The residency of a tensor about which nothing more is known than that it is in memory."""
    return HostResident(tensor.data) if tensor.device.type == "cpu" else DeviceResident(tensor.data)


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
        if tensor.is_contiguous():
            nbytes = tensor.numel() * tensor.element_size()
            at += -(-nbytes // DEVICE_ALIGNMENT) * DEVICE_ALIGNMENT
    return positions, at


def _copy_into(slot: Slot, position: int, home: torch.Tensor, device: torch.device) -> torch.Tensor:
    if not home.is_contiguous():  # kernels may round differently for other strides: keep them
        return home.to(device, copy=True)
    view = slot.view(position, home.dtype, home.shape, home.numel() * home.element_size())
    return view.copy_(home)
