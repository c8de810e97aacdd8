"""Tensors that are the checkpoint's own bytes: private mappings of the shards, read by the kernel on first touch.

A write lands in private pages of this process: neither the file nor another load sees it.
"""

from __future__ import annotations

import mmap
import os
import sys
import threading
from collections.abc import Mapping

import numpy as np
import torch

from hf_bigload.checkpoint.formats import missing_shard
from hf_bigload.checkpoint.index import check_stamp
from hf_bigload.errors import CheckpointError
from hf_bigload.specs import DTYPE_BYTES, FileStamp, TensorEntry

# Not every Python names this flag. Without it, a writable private mapping counts as memory in use, all of it.
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else None)

_PAGEMAP = "/proc/self/pagemap"
_PAGEMAP_ENTRY_BYTES = 8
# Bits of a pagemap entry, see the kernel's admin-guide/mm/pagemap
_FILE_BACKED, _SWAPPED, _PRESENT = (np.uint64(1 << bit) for bit in (61, 62, 63))


class MappedFiles:
    """One private mapping for each file, made at its first tensor and kept as long as any of its tensors lives.

    Every load needs an instance of its own: tensors of one instance that overlap in a file share what is written to
    them, as tied parameters must and parameters of two models must not.

    `stamps` are the files as they were indexed (`CheckpointIndex.stamps`); a file without a stamp is mapped as it is.
    """

    def __init__(self, stamps: Mapping[str, FileStamp] | None = None) -> None:
        self._stamps = dict(stamps or {})
        self._maps: dict[str, mmap.mmap] = {}
        self._lock = threading.Lock()

    def tensor(self, entry: TensorEntry) -> torch.Tensor:
        """The tensor at `entry`: a view of the mapping with a storage of its own that begins at the tensor's bytes.

        Its address modulo 64 is the file offset's, as after a plain load. Nothing is read until it is touched.

        Raises:
            CheckpointChangedError: the file is no longer the one that was indexed.
            CheckpointError: the file cannot be mapped, or ends before the tensor does.
        """
        dtype = getattr(torch, entry.dtype)
        if entry.nbytes == 0:
            return torch.empty(entry.shape, dtype=dtype)
        mapped = self._map(entry.file, entry.end)
        if entry.end > len(mapped):
            raise CheckpointError(
                f"{entry.file} has {len(mapped)} bytes; tensor {entry.name!r} needs those up to {entry.end}."
            )
        count = entry.nbytes // DTYPE_BYTES[entry.dtype]
        # frombuffer holds a reference to the mapping, but no export of it: close() would pull it from under the tensor
        flat = torch.frombuffer(mapped, dtype=dtype, count=count, offset=entry.offset)
        return flat.view(entry.shape) if entry.stride is None else flat.as_strided(entry.shape, entry.stride)

    def _map(self, path: str, end: int) -> mmap.mmap:
        """The file's mapping; a new one if `end` lies beyond it and the file has grown since (a spill file does)."""
        with self._lock:
            if path not in self._maps or (end > len(self._maps[path]) and path not in self._stamps):
                self._maps[path] = _map_privately(path, self._stamps.get(path))
            return self._maps[path]


def _map_privately(path: str, expected: FileStamp | None) -> mmap.mmap:
    try:
        with open(path, "rb") as file:
            if expected is not None:
                check_stamp(expected, os.fstat(file.fileno()))
            if _NORESERVE is None:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            flags, protection = mmap.MAP_PRIVATE | _NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
            return mmap.mmap(file.fileno(), 0, flags=flags, prot=protection)
    except CheckpointError:
        raise
    except FileNotFoundError:
        if expected is not None:
            check_stamp(expected)
        raise missing_shard(path) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be mapped into memory: {error}.") from error


def dirty_pages(tensor: torch.Tensor) -> bool | None:
    """Whether a page under the storage of a mapped tensor was written since it was mapped.

    Pages are shared at the edges: a write to the neighbour in the file may count. None where the system does not
    tell (no `/proc/self/pagemap`). Takes about 2 ms for 256 MiB.
    """
    storage = tensor.untyped_storage()
    if storage.nbytes() == 0:
        return False
    first = storage.data_ptr() // mmap.PAGESIZE
    last = (storage.data_ptr() + storage.nbytes() - 1) // mmap.PAGESIZE
    try:
        with open(_PAGEMAP, "rb", buffering=0) as pagemap:
            pagemap.seek(first * _PAGEMAP_ENTRY_BYTES)
            pages = np.frombuffer(pagemap.read((last - first + 1) * _PAGEMAP_ENTRY_BYTES), dtype=np.uint64)
    except OSError:
        return None
    if len(pages) != last - first + 1:
        return None
    written = ((pages & (_PRESENT | _SWAPPED)) != 0) & ((pages & _FILE_BACKED) == 0)
    return bool(written.any())
