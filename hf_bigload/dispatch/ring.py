"""The buffers that streamed weights land in: page-aligned host memory, or bytes on a device."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from abc import ABC, abstractmethod

import torch

from ..checkpoint.reader import page_buffer

DEVICE_ALIGNMENT = 512
"""Bytes: where an accelerator's allocator would start a tensor, and so where kernels expect it."""

POISON = os.environ.get("HF_BIGLOAD_POISON") == "1"
"""Tests overwrite released slots with NaN, so that a use after release shows."""


class Slot(ABC):
    """One buffer. `view` makes tensors of its bytes; each has a storage that begins at the tensor."""

    capacity: int

    @abstractmethod
    def view(self, position: int, dtype: torch.dtype, shape: torch.Size | tuple[int, ...], nbytes: int) -> torch.Tensor:
        """`nbytes` bytes from `position` on, as a contiguous tensor."""

    @abstractmethod
    def covers(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` looks at this slot's bytes."""

    @abstractmethod
    def poison(self) -> None:
        """Make every float in the slot NaN."""

    def reusable(self) -> None:
        """Called when the last user has left."""
        return

    def claimed(self) -> None:
        """Called before the first byte is written for the next user."""
        return


class HostSlot(Slot):
    """Anonymous pages: what O_DIRECT reads into, and what a CPU computes from."""

    def __init__(self, nbytes: int) -> None:
        self.buffer: mmap.mmap = page_buffer(nbytes)
        self.capacity = len(self.buffer)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.buffer))

    def view(self, position: int, dtype: torch.dtype, shape: torch.Size | tuple[int, ...], nbytes: int) -> torch.Tensor:
        if nbytes == 0:
            return torch.empty(shape, dtype=dtype)
        flat = torch.frombuffer(self.buffer, dtype=dtype, count=nbytes // dtype.itemsize, offset=position)
        return flat.view(shape)

    def covers(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == "cpu" and self.address <= tensor.data_ptr() < self.address + self.capacity

    def poison(self) -> None:
        torch.frombuffer(self.buffer, dtype=torch.uint8).fill_(0xFF)


class DeviceSlot(Slot):
    """Bytes on an accelerator. A stream that takes the slot over waits for what its last user had under way."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.bytes = torch.empty(max(nbytes, 1), dtype=torch.uint8, device=device)
        self.capacity = self.bytes.numel()
        self.device = self.bytes.device
        self.address = self.bytes.data_ptr()
        self._last_use: torch.Event | None = None

    def view(self, position: int, dtype: torch.dtype, shape: torch.Size | tuple[int, ...], nbytes: int) -> torch.Tensor:
        return self.bytes[position : position + nbytes].view(dtype).view(shape)

    def covers(self, tensor: torch.Tensor) -> bool:
        return tensor.device == self.device and self.address <= tensor.data_ptr() < self.address + self.capacity

    def poison(self) -> None:
        self.bytes.fill_(0xFF)

    def reusable(self) -> None:
        self._last_use = torch.accelerator.current_stream(self.device).record_event()

    def claimed(self) -> None:
        if self._last_use is not None:
            torch.accelerator.current_stream(self.device).wait_event(self._last_use)


class Ring:
    """The slots of one device. Free ones are kept up to `limit` bytes, so that what streams reuses them.

    A slot is made when it is first needed: with the ring's whole size, so that every later block fits it, or, while
    that one is in use (a block inside a block, a second thread), with the size that is asked for.
    """

    def __init__(self, device: torch.device, limit: int) -> None:
        self.device, self.limit = device, limit
        self._free: list[Slot] = []
        self._lock = threading.Lock()
        self.held = 0
        self.peak = 0

    def take(self, nbytes: int) -> Slot:
        """A slot of at least `nbytes` bytes that nobody else has."""
        with self._lock:
            fitting = [slot for slot in self._free if slot.capacity >= nbytes]
            if fitting:
                slot = min(fitting, key=lambda s: s.capacity)
                self._free.remove(slot)
            else:
                self._drop_free()
                slot = self._make(max(nbytes, self.limit if self.held == 0 else 0))
        slot.claimed()
        return slot

    def give(self, slot: Slot) -> None:
        """Return a slot that nothing reads any more."""
        if POISON:
            slot.poison()
        slot.reusable()
        with self._lock:
            if self.held <= max(self.limit, slot.capacity):
                self._free.append(slot)
            else:
                self.held -= slot.capacity

    def close(self) -> None:
        """Give the memory of free slots back."""
        with self._lock:
            self._drop_free()

    def _make(self, nbytes: int) -> Slot:
        slot: Slot = HostSlot(nbytes) if self.device.type == "cpu" else DeviceSlot(nbytes, self.device)
        self.held += slot.capacity
        self.peak = max(self.peak, self.held)
        return slot

    def _drop_free(self) -> None:
        self.held -= sum(slot.capacity for slot in self._free)
        self._free.clear()
