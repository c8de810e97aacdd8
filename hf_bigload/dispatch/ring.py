"""The buffers that streamed weights land in: page-aligned host memory, or bytes on a device.

A slot is never written to while anything still looks at what it held. Leases say when that may end; a view that
outlives its lease (a module kept it, autograd did) keeps the slot's memory, and the ring goes on without that slot.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..checkpoint.reader import page_buffer
from ..errors import human_bytes

DEVICE_ALIGNMENT = 512
"""Bytes: where an accelerator's allocator would start a tensor, and so where kernels expect it."""

POISON = os.environ.get("HF_BIGLOAD_POISON") == "1"
"""Tests overwrite released slots with NaN, so that a use after release shows."""


class Slot(ABC):
    """One buffer, and tensors of its bytes: `view`."""

    capacity: int
    address: int

    @abstractmethod
    def view(self, position: int, dtype: torch.dtype, shape: torch.Size | tuple[int, ...], nbytes: int) -> torch.Tensor:
        """`nbytes` bytes from `position` on, as a contiguous tensor."""

    @abstractmethod
    def covers(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` looks at this slot's bytes."""

    @abstractmethod
    def is_viewed(self) -> bool:
        """Whether a tensor that `view` made, or a view of one, is still alive."""

    @abstractmethod
    def poison(self) -> None:
        """Make every float in the slot NaN."""

    def filled(self) -> None:
        """Called when the copies that fill the slot were issued."""
        return

    def joined(self) -> None:
        """Called by another thread, before it uses what the slot was filled with."""
        return

    def left(self) -> None:
        """Called by each thread when it leaves."""
        return

    def claimed(self) -> None:
        """Called before the first byte is written for the next user."""
        return


class HostSlot(Slot):
    """Anonymous pages: what O_DIRECT reads into, and what a CPU computes from. Each view has a storage of its own."""

    def __init__(self, nbytes: int) -> None:
        self.buffer: mmap.mmap = page_buffer(nbytes)
        self.capacity = len(self.buffer)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.buffer))
        self._storages: list[torch.UntypedStorage] = []

    def view(self, position: int, dtype: torch.dtype, shape: torch.Size | tuple[int, ...], nbytes: int) -> torch.Tensor:
        if nbytes == 0:
            return torch.empty(shape, dtype=dtype)
        flat = torch.frombuffer(self.buffer, dtype=dtype, count=nbytes // dtype.itemsize, offset=position)
        self._storages.append(flat.untyped_storage())
        return flat.view(shape)

    def covers(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == "cpu" and self.address <= address_of(tensor) < self.address + self.capacity

    def is_viewed(self) -> bool:
        return any(_holders(storage) > 1 for storage in self._storages)

    def claimed(self) -> None:
        self._storages.clear()

    def poison(self) -> None:
        torch.frombuffer(self.buffer, dtype=torch.uint8).fill_(0xFF)


class DeviceSlot(Slot):
    """Bytes on an accelerator. Whoever takes the slot over waits, on its stream, for all that its users had under way.

    Raises:
        torch.OutOfMemoryError: the device has no room; says how much was needed and how much is free.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.bytes = _device_bytes(max(nbytes, 1), device)
        self.capacity = self.bytes.numel()
        self.device = self.bytes.device
        self.address = self.bytes.data_ptr()
        self._storage = self.bytes.untyped_storage()
        self._unviewed = _holders(self._storage)
        self._filled: torch.Event | None = None
        self._last_uses: list[torch.Event] = []

    def view(self, position: int, dtype: torch.dtype, shape: torch.Size | tuple[int, ...], nbytes: int) -> torch.Tensor:
        return self.bytes[position : position + nbytes].view(dtype).view(shape)

    def covers(self, tensor: torch.Tensor) -> bool:
        return tensor.device == self.device and self.address <= address_of(tensor) < self.address + self.capacity

    def is_viewed(self) -> bool:
        return _holders(self._storage) > self._unviewed

    def poison(self) -> None:
        self.bytes.fill_(0xFF)

    def filled(self) -> None:
        self._filled = self._stream().record_event()

    def joined(self) -> None:
        if self._filled is not None:
            self._stream().wait_event(self._filled)

    def left(self) -> None:
        self._last_uses.append(self._stream().record_event())

    def claimed(self) -> None:
        for event in self._last_uses:
            self._stream().wait_event(event)
        self._last_uses.clear()

    def _stream(self) -> torch.Stream:
        return torch.accelerator.current_stream(self.device)


class Ring:
    """The slots of one device. Free ones are kept, up to `limit` bytes of them, so that what streams reuses them.

    The first slot is as large as the ring, so that every later block fits it. Another is made while that one is in
    use: for a block inside a block, or for a second thread.
    """

    def __init__(self, device: torch.device, limit: int) -> None:
        self.device, self.limit = device, limit
        self.peak = 0
        self._free: list[Slot] = []
        self._lent: weakref.WeakSet[Slot] = weakref.WeakSet()  # one that an interrupt lost on its way is gone
        self._lock = threading.Lock()

    @property
    def held(self) -> int:
        """Bytes of all slots, free and lent."""
        return sum(slot.capacity for slot in (*self._free, *self._lent))

    def take(self, nbytes: int, lasting: bool = False) -> Slot:
        """A slot of at least `nbytes` bytes that nobody else has, until `give`.

        `lasting`: it stays while other blocks come and go, and so takes no larger one away from them.
        """
        with self._lock:
            fitting = [s for s in self._free if nbytes <= s.capacity and not (lasting and s.capacity > 2 * nbytes)]
            if fitting:
                slot = min(fitting, key=lambda s: s.capacity)
                self._free.remove(slot)
            elif lasting:
                slot = self._make(nbytes)
            else:
                self._free.clear()
                slot = self._make(max(nbytes, self.limit - self.held))
            self._lent.add(slot)
            self.peak = max(self.peak, self.held)
        slot.claimed()
        return slot

    @contextmanager
    def taken(self, nbytes: int, lasting: bool = False) -> Iterator[Slot]:
        """`take`, and `give` if what happens to the slot inside fails."""
        slot = self.take(nbytes, lasting)
        try:
            yield slot
        except BaseException:
            self.give(slot)
            raise

    def give(self, slot: Slot) -> None:
        """Return a slot that the ring lent. Repeating it does no harm."""
        with self._lock:
            if slot not in self._lent:
                return
            free = sum(s.capacity for s in self._free)
            keep = not slot.is_viewed() and free + slot.capacity <= max(self.limit, slot.capacity)
            if keep and POISON:
                with torch._C._DisableFuncTorch():
                    slot.claimed()
                    slot.poison()
                    slot.left()
            if keep:
                self._free.append(slot)
            self._lent.discard(slot)

    def lose(self, slot: Slot) -> None:
        """Never lend `slot` again."""
        with self._lock:
            self._lent.discard(slot)

    def close(self) -> None:
        """Give the memory of free slots back."""
        with self._lock:
            self._free.clear()

    def after_fork(self) -> None:
        """In a child: whoever held the lock lives on in the parent only."""
        self._lock = threading.Lock()

    def _make(self, nbytes: int) -> Slot:
        return HostSlot(nbytes) if self.device.type == "cpu" else DeviceSlot(nbytes, self.device)


def address_of(tensor: torch.Tensor) -> int:
    """Where a tensor's first element lies; 0 for one without plain memory of its own (sparse, wrapped, empty)."""
    try:
        return tensor.data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0


def span_bytes(tensor: torch.Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _holders(storage: torch.UntypedStorage) -> int:
    """How many tensors and Python objects keep a storage alive, `storage` itself among them."""
    return torch._C._storage_Use_Count(storage._cdata)


def _device_bytes(nbytes: int, device: torch.device) -> torch.Tensor:
    try:
        return torch.empty(nbytes, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError as error:
        free, total = torch.accelerator.get_memory_info(device)
        raise torch.OutOfMemoryError(
            f"{device} has no room for the weights of the block that runs next: they need {human_bytes(nbytes)}, and "
            f"{human_bytes(free)} of {human_bytes(total)} are free beside what the model computes. Use a smaller batch "
            f"or context, or give the weights less of {device} with max_memory."
        ) from error
