"""Where weights rest, one class per tier, and how each comes to the device that computes.

A parameter's `.data` at rest is its home: a device tensor, a host tensor, or a mapped view of the file. The home is the
truth. What is remembered beside it (where in a file the bytes lie) only counts as long as the home is untouched.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial

import torch

from ..checkpoint.mapping import dirty_pages
from ..checkpoint.reader import layout
from ..pinned import memory_around
from ..specs import TensorEntry
from .machine import CPU_DEVICE, Load, Machine
from .recorder import Journey
from .ring import DeviceSlot, HostSlot, Look, Ring, Slot, address_of, span_bytes
from .transfer import Packing, Transfer, then

COPIED_AT_ONCE = 256 * 1024
"""Bytes that are copied out of pageable memory sooner than another thread can be asked to."""


State = tuple[int, int, torch.dtype, torch.Size, tuple[int, ...]]
"""What shows that a tensor was replaced, moved or written to: its address, version, dtype, shape and strides."""


def state_of(tensor: torch.Tensor) -> State:
    try:
        return tensor.data_ptr(), tensor._version, tensor.dtype, tensor.shape, tensor.stride()
    except (RuntimeError, NotImplementedError):
        return address_of(tensor), version_of(tensor), tensor.dtype, tensor.shape, tensor.stride()


def version_of(tensor: torch.Tensor) -> int:
    """How often a tensor was written to in place; 0 for one made in inference mode, which does not count."""
    try:
        return tensor._version
    except RuntimeError:
        return 0


class Residency(ABC):
    """One weight at rest."""

    home: torch.Tensor
    state: State
    """The weight's, when this was made."""

    streams: bool
    """Whether the weight has to be brought even to the device that its home is on."""

    keeps: bool
    """Whether every change of what rests there can be noticed later."""

    def is_current(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` still is what this remembers: not replaced, not written."""
        return self.state == state_of(tensor)

    @classmethod
    @abstractmethod
    def load(cls, group: Sequence[Residency], device: torch.device) -> Load:
        """`group`, packed to come to `device`: copies with the dtypes, shapes and strides of their homes."""


class MemoryResident(Residency):
    """In the memory of some device or the host: `home` itself is what is copied."""

    streams = False
    keeps = False  # a write through `.data` leaves no trace

    def __init__(self, home: torch.Tensor, state: State) -> None:
        self.home, self.state = home, state

    @classmethod
    def load(cls, group: Sequence[Residency], device: torch.device) -> Load:
        return _FromMemory([residency.home for residency in group], device)


class HostResident(MemoryResident):
    """In RAM."""


class DeviceResident(MemoryResident):
    """On a device; comes to another one only for weights that blocks on two devices share."""


class DiskResident(Residency):
    """In a file: `entry` says where. `home` is a private mapping of the same bytes, for whoever reads it directly."""

    streams = True
    keeps = True  # pages of the mapping that were written can be told

    def __init__(self, entry: TensorEntry, home: torch.Tensor, tensor: torch.Tensor) -> None:
        self.entry, self.home = entry, home.data  # not the very tensor: that is elsewhere at times
        address, _version, *look = state_of(home)
        self.state = (address, version_of(tensor), *look)  # type: ignore[assignment]

    def is_current(self, tensor: torch.Tensor) -> bool:
        # None: nobody can tell, so the mapping is the truth
        return super().is_current(tensor) and dirty_pages(self.home) is False

    @classmethod
    def load(cls, group: Sequence[Residency], device: torch.device) -> Load:
        entries = [residency.entry for residency in group if isinstance(residency, DiskResident)]
        return _FromFiles(entries) if device.type == "cpu" else _ThroughTheHost(entries)


def resting(tensor: torch.Tensor) -> MemoryResident:
    """The residency of a tensor about which nothing more is known than that it is in memory."""
    kind = HostResident if tensor.device.type == "cpu" else DeviceResident
    return kind(tensor.data, state_of(tensor))


# ---------------------------------------------------------------- loads


class _FromMemory:
    """Copies of tensors in memory, packed in one slot."""

    staged = 0

    def __init__(self, homes: Sequence[torch.Tensor], device: torch.device) -> None:
        spans = [span_bytes(home) for home in homes]
        memories = [_memory_of(home) for home in homes]
        packing = Packing.of(list(zip(map(address_of, memories), map(address_of, homes), spans, strict=True)))
        self.device, self.nbytes, self.copied = device, packing.nbytes, sum(spans)
        self.looks = [
            Look(at, home.dtype, home.shape, home.stride(), span)
            for at, home, span in zip(packing.positions, homes, spans, strict=True)
        ]
        sources = [(memories[run.first], run) for run in packing.runs]
        self.pieces = [memory.narrow(0, run.address - address_of(memory), run.nbytes) for memory, run in sources]
        self.places = [(run.position, run.nbytes) for run in packing.runs]
        pageable = any(piece.device.type == "cpu" and not piece.is_pinned() for piece in self.pieces)
        self.waits = pageable and self.nbytes > COPIED_AT_ONCE
        """The driver copies through memory of its own, and whoever asks it has to wait for that."""

    def start(self, machine: Machine, ring: Ring, slot: Slot, stage: Slot | None) -> Transfer:
        journey = machine.journey(self.copied)
        transfer = Transfer(ring, slot, slot.views(self, self.looks), bytes_copied=self.copied, journey=journey)
        if isinstance(slot, DeviceSlot):
            stream = machine.copy_stream(self.device)
            issue = partial(_issue, slot, self.places, self.pieces, stream, journey)
            if self.waits:
                transfer.begin(partial(machine.reader.submit, [issue]))
            else:
                transfer.do(issue)
                machine.copies_homes(stream)
            return transfer
        assert isinstance(slot, HostSlot)
        slot.wait_for_copies()
        begun = None if journey is None else journey.now(self.device)
        for piece, (position, nbytes) in zip(self.pieces, self.places, strict=True):
            slot.view(position, torch.uint8, (nbytes,), (1,), nbytes).copy_(piece)
        if journey is not None and begun is not None:
            journey.was_copied(self.device, begun)
        return transfer


class _FromFiles:
    """Ranges of files, read into one slot of the host's ring, to be computed from there."""

    staged = 0

    def __init__(self, entries: Sequence[TensorEntry]) -> None:
        self.layout = layout(entries)
        self.nbytes = self.layout.nbytes
        self.read = sum(extent.nbytes for extent in self.layout.extents)
        self.looks = _looks(self.layout.positions, entries)

    def start(self, machine: Machine, ring: Ring, slot: Slot, stage: Slot | None) -> Transfer:
        assert isinstance(slot, HostSlot)
        journey = machine.journey()
        transfer = Transfer(ring, slot, slot.views(self, self.looks), bytes_read=self.read, journey=journey)
        before = slot.wait_for_copies if slot.events else None
        transfer.begin(partial((journey or machine.reader).read, self.layout.extents, slot.buffer, before))
        return transfer


class _ThroughTheHost:
    """Ranges of files, read into a slot of the host's ring, and copied from there to one on a device."""

    def __init__(self, entries: Sequence[TensorEntry]) -> None:
        self.layout = layout(entries)
        self.staged = self.layout.nbytes
        sizes = [entry.nbytes for entry in entries]
        packing = Packing.of([(0, at, size) for at, size in zip(self.layout.positions, sizes, strict=True)])
        self.nbytes, self.copied = packing.nbytes, sum(sizes)
        self.read = sum(extent.nbytes for extent in self.layout.extents)
        self.looks = _looks(packing.positions, entries)
        self.places = [(run.position, run.nbytes) for run in packing.runs]
        self.staged_at = [self.layout.positions[run.first] for run in packing.runs]

    def start(self, machine: Machine, ring: Ring, slot: Slot, stage: Slot | None) -> Transfer:
        assert isinstance(slot, DeviceSlot) and isinstance(stage, HostSlot)
        staging, stream = machine.ring(CPU_DEVICE), machine.copy_stream(slot.device)
        tensors = slot.views(self, self.looks)
        journey = machine.journey(self.copied)
        transfer = Transfer(ring, slot, tensors, bytes_read=self.read, bytes_copied=self.copied, journey=journey)
        runs = zip(self.staged_at, self.places, strict=True)
        pieces = [stage.view(at, torch.uint8, (nbytes,), (1,), nbytes) for at, (_, nbytes) in runs]
        stage.is_written = True

        def copy() -> None:
            _issue(slot, self.places, pieces, stream, journey)
            stage.used(slot.filled_by)

        def give_back() -> None:
            pieces.clear()
            stage.is_written = False
            staging.give(stage)

        before = stage.wait_for_copies if stage.events else None
        read = partial((journey or machine.reader).read, self.layout.extents, stage.buffer, before)
        transfer.begin(lambda: then(read(), copy, give_back))
        return transfer


def _looks(positions: Sequence[int], entries: Sequence[TensorEntry]) -> list[Look]:
    return [
        Look(at, getattr(torch, e.dtype), e.shape, e.stride or _contiguous_stride(e.shape), e.nbytes)
        for at, e in zip(positions, entries, strict=True)
    ]


def _contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


def _memory_of(home: torch.Tensor) -> torch.Tensor:
    """The bytes that a tensor lies among: its pack's, or its storage's."""
    pack = memory_around(home)
    if pack is not None:
        return pack
    storage = home.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=home.device).set_(storage, 0, (storage.nbytes(),), (1,))


def _own(stream: torch.Stream) -> torch.Stream:
    """The same stream, to be made current: the object remembers which one was, and so is one thread's at a time."""
    kind = stream.device_type
    return torch.Stream(stream_id=stream.stream_id, device_index=stream.device_index, device_type=kind)


def _issue(
    slot: DeviceSlot,
    places: Sequence[tuple[int, int]],
    pieces: Sequence[torch.Tensor],
    stream: torch.Stream,
    journey: Journey | None,
) -> int:
    """Copy pieces of memory to their places (position, bytes) in a slot, on `stream`, after whatever used it before."""
    with _own(stream):
        slot.wait_on(stream)
        begun = None if journey is None else journey.now(slot.device, stream)
        if len(places) == 1:
            slot.bytes.narrow(0, *places[0]).copy_(pieces[0], non_blocking=True)
        else:
            into = [slot.bytes.narrow(0, position, nbytes) for position, nbytes in places]
            torch._foreach_copy_(into, list(pieces), non_blocking=True)
        if journey is not None and begun is not None:
            journey.was_copied(slot.device, begun, stream)  # before anybody who waits for the copies goes on
        slot.filled(stream)
    return 0  # bytes read
