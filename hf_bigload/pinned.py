"""Host memory that a device copies from and to by itself: page-aligned, and page-locked where there is an accelerator.

A caching host allocator rounds a request up to a power of two, which for weights wastes up to half of it. So for CUDA
pages of our own are registered, exactly as many as are wanted.
"""

from __future__ import annotations

import ctypes
import logging
import math
import mmap
import os
import weakref
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .checkpoint.reader import PAGE, page_buffer
from .errors import human_bytes

if TYPE_CHECKING:
    from typing_extensions import Buffer

logger = logging.getLogger(__name__)

ALIGNMENT = 512
"""Bytes: where an accelerator's allocator would start a tensor, and so where kernels expect it."""

_PORTABLE = 1
"""cudaHostRegisterPortable: page-locked for every device, not only for the one that is current."""


@dataclass(frozen=True, eq=False)
class HostBuffer:
    """Bytes of host memory, twice: as a tensor, and as what a `Reader` writes to. Either keeps the memory alive."""

    tensor: torch.Tensor
    """uint8, one-dimensional, beginning at a multiple of PAGE."""
    buffer: Buffer
    """The same bytes."""
    pinned: bool
    """Whether they are page-locked, so that copies from and to a device need not wait."""

    @property
    def nbytes(self) -> int:
        return self.tensor.numel()


def pinned_buffer(nbytes: int, device: torch.device) -> HostBuffer:
    """At least `nbytes` bytes (whole pages, one at least) that `device` copies from and to; plain ones for the CPU.

    Where the system refuses to lock them, they are plain memory, which is slower and computes the same.
    """
    size = -(-max(nbytes, 1) // PAGE) * PAGE
    if device.type == "cpu":
        return _of_pages(page_buffer(size), pinned=False)
    try:
        return _registered(size, device) if device.type == "cuda" else _allocated(size)
    except (RuntimeError, OSError) as error:
        _tell(device.type, size, error)
        return _of_pages(page_buffer(size), pinned=False)


_told: set[str] = set()


def _tell(device: str, nbytes: int, error: Exception) -> None:
    """Once for a kind of device, not once for each buffer."""
    if device in _told:
        return
    _told.add(device)
    logger.warning(
        "%s of host memory could not be page-locked for %s (%s). Copies will be slower. The limit on locked memory "
        "(ulimit -l) or on the container's memory may be too low.",
        human_bytes(nbytes),
        device,
        error,
    )


def _of_pages(pages: mmap.mmap, pinned: bool) -> HostBuffer:
    return HostBuffer(torch.frombuffer(pages, dtype=torch.uint8), pages, pinned)


class _Registered(mmap.mmap):
    """Pages that CUDA has locked, until they go."""

    runtime: Any = None
    owner = 0

    def register(self) -> None:
        runtime = torch.cuda.cudart()
        error = int(runtime.cudaHostRegister(self._address(), len(self), _PORTABLE))
        if error:
            raise RuntimeError(f"cudaHostRegister failed with error {error}")
        self.runtime, self.owner = runtime, os.getpid()

    def __del__(self) -> None:  # before the pages are unmapped; a finalizer would come after
        if self.owner == os.getpid():
            self.runtime.cudaHostUnregister(self._address())

    def _address(self) -> int:
        return ctypes.addressof(ctypes.c_char.from_buffer(self))


def _registered(nbytes: int, device: torch.device) -> HostBuffer:
    pages = page_buffer(nbytes, _Registered)
    assert isinstance(pages, _Registered)
    with torch.cuda.device(device):  # a device that the model does not use would be given a context for this
        pages.register()
    return _of_pages(pages, pinned=True)


def _allocated(nbytes: int) -> HostBuffer:
    """From torch's own allocator: the only way for accelerators without a call to lock given pages."""
    whole = torch.empty(nbytes + PAGE, dtype=torch.uint8, pin_memory=True)
    skipped = -whole.data_ptr() % PAGE
    tensor = whole[skipped : skipped + nbytes]
    return HostBuffer(tensor, tensor.numpy().data, pinned=True)


# ---------------------------------------------------------------- packed


class Pack:
    """Tensors side by side in one pinned buffer, so that one copy brings all of them.

    Each begins at a multiple of ALIGNMENT, in the order of `sizes` (name -> bytes), and has a storage of its own, as
    tensors of a plain load have. The memory is taken at the first tensor, and lives as long as any.
    """

    def __init__(self, sizes: Mapping[str, int], device: torch.device) -> None:
        self.device = device
        self._sizes = dict(sizes)
        self._positions: dict[str, int] = {}
        self.nbytes = 0
        for name, nbytes in sizes.items():
            self._positions[name] = self.nbytes
            self.nbytes += -(-nbytes // ALIGNMENT) * ALIGNMENT
        self._memory: HostBuffer | None = None

    def tensor(self, name: str, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor | None:
        """The place of `name`, with what bytes there are; None if the pack has none of this name and size."""
        nbytes = math.prod(shape) * dtype.itemsize
        if not nbytes or self._sizes.get(name) != nbytes:
            return None
        if self._memory is None:
            self._memory = pinned_buffer(self.nbytes, self.device)
            _remember(self._memory)
        at = self._positions[name]
        return torch.frombuffer(self._memory.buffer, dtype=dtype, count=math.prod(shape), offset=at).view(tuple(shape))


_packs: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
"""Address -> the buffer of a pack, as long as any of its tensors lives."""

_starts: tuple[int, ...] = ()
"""Their addresses in order, those of some that are gone among them."""


def _remember(memory: HostBuffer) -> None:
    global _starts
    _packs[memory.tensor.data_ptr()] = memory.buffer
    _starts = tuple(sorted(_packs))


def memory_around(tensor: torch.Tensor) -> torch.Tensor | None:
    """The bytes of the whole pack that a tensor lies in, as a uint8 tensor; None if it lies in none.

    So that tensors of one pack, whose storages are their own, can be copied at once. Takes about a microsecond.
    """
    if tensor.device.type != "cpu":
        return None
    address, starts = tensor.data_ptr(), _starts
    at = bisect_right(starts, address) - 1
    buffer = _packs.get(starts[at]) if at >= 0 else None
    if buffer is None or address >= starts[at] + memoryview(buffer).nbytes:
        return None
    return torch.frombuffer(buffer, dtype=torch.uint8)
