"""Execute a plan's reads: each tensor to where the plan says that it rests, with the dtype that it is loaded in.

A tensor is computed with the same bits wherever it slept. Some CPU kernels round by an operand's address modulo 64, and
a plain load maps the file, so what stays unconverted keeps its file offset's residue, and what is converted starts
where the conversion put it.
"""

from __future__ import annotations

import logging
import math
import mmap
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from .arrivals import Arrivals
from .checkpoint.formats import load_bin
from .checkpoint.mapping import MappedFiles, dirty_pages
from .checkpoint.reader import Reader, huge_pages_are_kept, page_buffer
from .checkpoint.spill import SpillFolder
from .checkpoint.spill_cache import Slot, SpillCache
from .dispatch.executor import Executor
from .dispatch.residency import DiskResident
from .dispatch.ring import address_of
from .errors import CheckpointError, DtypeError, human_bytes
from .hardware import torch_device
from .module_tensors import PHASE, copy_in_phase
from .pinned import Pack, memory_around
from .skeleton import dtype_name
from .specs import CPU, DISK, CheckpointIndex, FileStamp, Placement, Plan, TensorEntry

logger = logging.getLogger(__name__)

_AS_STORED = "as stored"
"""In place of a dtype: what is not cast, but cannot be read from where it lies."""

ASIDE_FROM = 128 * 1024
"""Bytes from which a tensor is brought by other threads; for a smaller one, asking them costs more than doing it."""

COMPARED_AT_ONCE = 16 * 1024 * 1024
"""Bytes of a weight that are compared with its file's at a time."""

STAGING = 256 * 1024 * 1024
"""Bytes that may be on their way outside their tensors, at most."""


@dataclass(frozen=True)
class Origin:
    """Where a tensor of a model came from, unconverted: it may go back there for as long as it has the same bytes."""

    entry: TensorEntry
    mapped_at: int | None
    """The address of the file's mapping, where that is what the tensor was loaded as."""


class Materializer:
    """Puts tensors where `plan` wants them; remembers where in a file those rest that stream from one.

    Holds what the loaded weights depend on: keep it as long as the model (see `keep_alive`). It can follow other plans
    later: `origins` says where each tensor came from.
    """

    def __init__(
        self,
        plan: Plan,
        stamps: Mapping[str, FileStamp] | None = None,
        offload_folder: str | None = None,
    ) -> None:
        self._offload_folder = offload_folder
        self._spill: SpillFolder | None = None
        self._caches: list[SpillCache] = []
        self._legacy: dict[TensorEntry, str] = {}
        """Where what was in files of torch's old format went, and the file that each tensor was in."""
        self._arrivals: Arrivals | None = None
        self._aside: mmap.mmap | None = None
        self.follow(plan)
        self.stamp(stamps)
        self._entries: dict[int, tuple[torch.Tensor, TensorEntry]] = {}
        self._came_from: dict[int, Origin] = {}
        """By the address that a tensor was loaded to, until the model is registered."""
        self.origins: WeakIdKeyDictionary = WeakIdKeyDictionary()
        """A registered tensor of the model -> its `Origin`."""

    def follow(self, plan: Plan) -> None:
        """Place what comes from now on by `plan`."""
        self.plan = plan
        self._streams = plan.streams  # looks at every tensor of the plan: not to be asked for each one
        self._homes = _homes(plan)
        self._packs = _packs(plan, self._homes)

    def rests_on_disk(self, tensor: torch.Tensor) -> bool:
        """Whether this tensor's data is a mapped view that this object made, so that it may stream from its file."""
        return address_of(tensor) in self._entries

    def stamp(self, stamps: Mapping[str, FileStamp] | None) -> None:
        """Read from the files that these stamps describe, and from no other that takes their place."""
        self.finish()
        self._stamps = dict(stamps or {})
        self.reader = Reader(stamps=stamps)
        self._mapped = MappedFiles(stamps)
        self._cache = self._cache_of(self._stamps)

    def close_files(self) -> None:
        """Nothing will be read for now: close the files, and open them again if something is, if they are the same."""
        self.reader.close()
        self.reader = Reader(stamps=self._stamps)
        if not any(origin.mapped_at for origin in self.origins.values()):
            self._mapped = MappedFiles(self._stamps)

    @property
    def keep_alive(self) -> tuple[Any, ...]:
        return (self._spill, *self._caches)

    def source(self, entry: TensorEntry) -> torch.Tensor:
        """The checkpoint's own bytes as a tensor, read when they are touched. Writes to it reach nobody else."""
        return self._mapped.tensor(entry)

    def home_of(self, name: str) -> str:
        """Where a tensor rests; what the plan does not know (a new buffer, an adapter) rests where the model runs."""
        return self._homes.get(self.plan.ties.get(name, name), self.plan.main_device)

    def load(self, name: str, entry: TensorEntry, dtype: torch.dtype) -> torch.Tensor:
        """The tensor `name` from a file, resting at its home. Its values may be used after `finish`.

        Raises:
            DtypeError: the file's dtype cannot be cast to `dtype`.
            SpillError: it has to be converted and rest on disk, and the disk refuses.
            CheckpointError: the file cannot be read, or is not the one that was indexed.
        """
        source = self.source(entry)
        loaded = self._load(name, entry, dtype, source)
        if source.dtype == dtype and entry.nbytes:
            mapped_at = loaded.data_ptr() if loaded.data_ptr() == source.data_ptr() else None
            self._came_from[loaded.data_ptr()] = Origin(entry, mapped_at)
        return loaded

    def _load(self, name: str, entry: TensorEntry, dtype: torch.dtype, source: torch.Tensor) -> torch.Tensor:
        home, casts = self.home_of(name), source.dtype != dtype
        if home == DISK and entry.nbytes:
            return self._cast_on_disk(name, entry, dtype) if casts else self.rest_in(entry, source)
        if not casts and home in (CPU, DISK) and not self._streams:
            return source
        if entry.nbytes < ASIDE_FROM or entry.stride is not None:
            return self._copied(name, _cast(name, source, dtype), source)
        if casts:
            _cast(name, torch.empty(1, dtype=source.dtype), dtype)  # fails here, with the name, if it cannot be done
        target = self._room(name, entry.shape, dtype, 0 if casts else source.data_ptr() % PHASE)
        self._coming().bring(name, entry, source, target)
        return target

    def place(
        self, name: str, value: torch.Tensor, dtype: torch.dtype | None = None, packed: bool = False
    ) -> torch.Tensor:
        """The tensor `name` from memory, resting at its home; `value` is used as it is where it may stay.

        `packed`: nobody else looks at `value`, so it moves to where its block lies packed, if that does.
        """
        if dtype is not None and value.dtype != dtype:
            value = _cast(name, value, dtype)
        home = self.home_of(name)
        if home == DISK and value.numel():
            return self._spilled(name, value)
        room = self._packed(name, value.shape, value.dtype) if packed and value.is_contiguous() else None
        return value.to(torch_device(home)) if room is None else room.copy_(value)

    def moved(self, name: str, value: torch.Tensor, origin: Origin | None) -> torch.Tensor:
        """`value`, at rest in memory, as it rests in memory at the home that the plan now gives it.

        On the CPU at the address modulo 64 of its plain load, packed where its block travels packed.
        """
        packed = self._packed(name, value.shape, value.dtype) if value.is_contiguous() else None
        if packed is not None:
            return packed.copy_(value)
        home = torch_device(self.home_of(name))
        if home.type != CPU or not (value.is_contiguous() and value.numel()):
            return value.to(home, copy=True)
        phase = _phase(value) if origin is None else origin.entry.offset % PHASE
        return self._room(name, tuple(value.shape), value.dtype, phase).copy_(value)

    def sent_back(self, name: str, value: torch.Tensor, origin: Origin | None) -> torch.Tensor:
        """`value` as it rests on disk: where it came from if it still has those bytes, else in a file of its own."""
        if origin is not None and self.can_read(origin.entry):
            mapped = self.source(origin.entry)
            if _same_bytes(mapped, value):
                return self.rest_in(origin.entry, mapped)
        return self._spilled(name, value)

    def can_read(self, entry: TensorEntry) -> bool:
        """Whether the file that a tensor came from is still there, and the same."""
        try:
            self.reader.open(entry.file)
            self._mapped.tensor(entry)
        except CheckpointError as error:
            logger.info("Tensor %r cannot be read again from where it came: %s", entry.name, error)
            return False
        return True

    def lies_as_wanted(self, name: str, value: torch.Tensor) -> bool:
        """Whether `value`, in RAM, lies packed or not as the plan has it."""
        return (self.plan.ties.get(name, name) in self._packs) == (memory_around(value) is not None)

    def is_mapped(self, tensor: torch.Tensor) -> bool:
        """Whether a registered tensor's data is the file's own mapping, not written to: it takes no memory."""
        origin = self.origins.get(tensor)
        return origin is not None and origin.mapped_at == address_of(tensor) and dirty_pages(tensor.data) is False

    def collect(self, wait: bool = False) -> int:
        """How many loaded tensors have not arrived yet; with `wait`, after the one that was asked for first has.

        Raises:
            CheckpointError: one could not be read.
        """
        return 0 if self._arrivals is None else self._arrivals.collect(wait)

    def finish(self) -> None:
        """Wait until every loaded tensor has its values.

        Raises:
            CheckpointError: one could not be read.
        """
        self._aside = None
        if self._arrivals is not None:
            self._arrivals.finish()
            self._arrivals = None

    def abandon(self) -> None:
        """Stop loading, after an error or an interrupt: what has not arrived has no values."""
        if self._arrivals is not None:
            self._arrivals.abandon()
            self._arrivals = None

    def with_legacy_files(self, index: CheckpointIndex) -> tuple[CheckpointIndex, dict[str, torch.Tensor]]:
        """`index` with the tensors of files in torch's old format, which have no offsets and are loaded whole.

        They are kept in memory (the second value); where weights stream, so that RAM is scarce, they go through a file
        into the index, and no more than one of the old files is in memory at a time.
        """
        entries, in_memory = dict(index.entries), dict[str, torch.Tensor]()
        for path in index.legacy_files:
            if self.plan.streams:
                entries.update(self._legacy_on_disk(path, index.stamps[path]))
            else:
                in_memory.update(load_bin(path))
        return replace(index, entries=entries), in_memory

    def register(self, executor: Executor, tensors: Iterable[torch.Tensor]) -> None:
        """Tell the executor which of the model's `tensors` rest in a file, as loaded and not replaced since."""
        self.finish()
        for cache in self._caches:
            cache.seal()
        for tensor in tensors:
            known = self._entries.get(address_of(tensor))
            if known is not None and known[0].shape == tensor.shape and known[0].dtype == tensor.dtype:
                executor.on_disk[tensor] = DiskResident(known[1], known[0], tensor)
                self.reader.open(known[1].file)  # so that the model outlives a save over its own checkpoint
                self.origins[tensor] = Origin(known[1], known[0].data_ptr())
            else:
                self._remember_origin(tensor)
        self._entries.clear()
        self._came_from.clear()
        self._packs = {}  # their tensors keep them

    def _remember_origin(self, tensor: torch.Tensor) -> None:
        origin = self._came_from.get(address_of(tensor))
        if origin is not None and (origin.entry.shape, origin.entry.dtype) == (
            tuple(tensor.shape),
            dtype_name(tensor.dtype),
        ):
            self.origins[tensor] = origin

    def _spilled(self, name: str, value: torch.Tensor) -> torch.Tensor:
        entry = self._write(name, value)
        return self.rest_in(entry, self._mapped.tensor(entry))

    def _cast_on_disk(self, name: str, entry: TensorEntry, dtype: torch.dtype) -> torch.Tensor:
        """A tensor whose cast copy rests on disk: what the cache has is not cast again, nor is its source read."""
        slot = self._cache.slot(dtype_name(dtype), self._legacy.get(entry, entry.file), entry.name)
        cast = slot.find() if slot else None
        if cast is None:
            cast = self._write(name, self._cast_aside(name, self.source(entry), dtype), slot)
        return self.rest_in(cast, self._mapped.tensor(cast))

    def _cast_aside(self, name: str, source: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A cast copy that is good until the next one: in memory that is used again, for from what is freed between
        others a heap gives little back."""
        _cast(name, torch.empty(1, dtype=source.dtype), dtype)  # fails here, with the name, if it cannot be done
        if not source.is_contiguous():
            return _cast(name, source, dtype)  # with the strides that a plain load gives it
        nbytes = source.numel() * dtype.itemsize
        if self._aside is None or len(self._aside) < nbytes:
            self._aside = page_buffer(nbytes)
        return torch.frombuffer(self._aside, dtype=dtype, count=source.numel()).view(source.shape).copy_(source)

    def _legacy_on_disk(self, path: str, stamp: FileStamp) -> dict[str, TensorEntry]:
        cache = self._cache_of({path: stamp})
        entries = cache.whole(_AS_STORED)
        if entries is None:
            tensors = load_bin(path)
            entries = {name: self._write(name, t, cache.slot(_AS_STORED, path, name)) for name, t in tensors.items()}
            cache.seal(whole=True)
        self._legacy |= dict.fromkeys(entries.values(), path)
        return entries

    def _cache_of(self, stamps: Mapping[str, FileStamp]) -> SpillCache:
        """The cache for what is made from these files; one that takes nothing where the user names a folder."""
        made_by = f"torch {torch.__version__} on {platform.machine()}"
        self._caches.append(SpillCache({} if self._offload_folder else stamps, made_by))
        return self._caches[-1]

    def _write(self, name: str, value: torch.Tensor, slot: Slot | None = None) -> TensorEntry:
        """Put a tensor on disk: into the cache's `slot` if there is one that takes it, else into this load's folder."""
        value = value.detach().to(CPU)
        flat, stride = (value, None) if value.is_contiguous() else _in_storage_order(value)
        kept = slot.write(flat, tuple(value.shape), stride) if slot else None
        if kept is not None:
            return kept
        if self._spill is None:
            self._spill = SpillFolder(self._offload_folder)
        return replace(self._spill.write(flat, name), shape=tuple(value.shape), stride=stride)

    def rest_in(self, entry: TensorEntry, mapped: torch.Tensor) -> torch.Tensor:
        """Remember that `mapped`, a mapping of `entry`, is a weight on disk, until it is registered; returns it."""
        self._entries[mapped.data_ptr()] = (mapped, entry)
        return mapped

    def _copied(self, name: str, value: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        """`value` at its home, in memory of its own: mapped pages, as `source` is, could be evicted by what streams."""
        room = self._packed(name, value.shape, value.dtype) if value.is_contiguous() else None
        if room is not None:
            return room.copy_(value)
        home = self.home_of(name)
        if value is source and home in (CPU, DISK):
            return copy_in_phase(source)
        return value.to(torch_device(home), copy=value is source)

    def _room(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, phase: int) -> torch.Tensor:
        """Memory at a tensor's home, yet to be filled; on the CPU at an address of this residue modulo PHASE."""
        with torch.inference_mode(False):  # no other thread could write to a tensor made in that mode
            home = self.home_of(name)
            if home not in (CPU, DISK):
                return _device_tensor(name, shape, dtype, torch_device(home))
            packed = self._packed(name, shape, dtype)
            if packed is not None:
                return packed
            count = math.prod(shape)
            pages = page_buffer(phase + count * dtype.itemsize, huge=huge_pages_are_kept())
            return torch.frombuffer(pages, dtype=dtype, count=count, offset=phase).view(shape)

    def _packed(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
        name = self.plan.ties.get(name, name)
        pack = self._packs.get(name)
        return None if pack is None else pack.tensor(name, dtype, shape)

    def _coming(self) -> Arrivals:
        if self._arrivals is None:
            # What the budget leaves in RAM; the ring is counted in the plan, and made only when the model runs
            plan = self.plan
            left = max(0, plan.budget.get(CPU, STAGING) - plan.used.get(CPU, 0)) + plan.ring.get(CPU, 0)
            staging = min(STAGING, left)
            self._arrivals = Arrivals(self.reader, staging, keeps_cache=not self._streams)
        return self._arrivals


def _device_tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    try:
        return torch.empty(shape, dtype=dtype, device=device)
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(
            f"Tensor {name!r} needs {human_bytes(math.prod(shape) * dtype.itemsize)} on {device}, which has no room "
            f"for it: {error} Give the plan a smaller budget there, with max_memory."
        ) from error


def _in_storage_order(value: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...] | None]:
    """A transposed or otherwise permuted tensor as its bytes lie, and the strides that make it again."""
    by_stride = sorted(range(value.dim()), key=lambda i: (value.stride(i), value.shape[i]), reverse=True)
    ordered = value.permute(by_stride)
    if ordered.is_contiguous():
        return ordered.reshape(-1), value.stride()
    return value.contiguous(), None  # has gaps or overlaps


def _phase(value: torch.Tensor) -> int:
    return value.data_ptr() % PHASE if value.device.type == CPU else 0


def _same_bytes(stored: torch.Tensor, value: torch.Tensor) -> bool:
    """Piece by piece: neither a device nor its tensor's copy on the CPU has to have room for the whole."""
    if (stored.shape, stored.dtype, stored.stride()) != (value.shape, value.dtype, value.stride()):
        return False
    if not value.is_contiguous():
        return torch.equal(stored, value.cpu())
    ours, theirs = value.detach().view(-1).view(torch.uint8), stored.view(-1).view(torch.uint8)
    pieces = zip(theirs.split(COMPARED_AT_ONCE), ours.split(COMPARED_AT_ONCE), strict=True)
    return all(torch.equal(stored_piece, piece.cpu()) for stored_piece, piece in pieces)


def _homes(plan: Plan) -> dict[str, str]:
    """Tensor name -> where it rests. Buffers rest where they are computed with, unless they are to be offloaded."""
    homes = {}
    for placement in plan.placements:
        for tensor in placement.block.tensors:
            stays = tensor.is_buffer and not plan.offload_buffers
            homes[tensor.name] = _computed_on(placement) if stays else placement.home_of(tensor.name)
    return homes


def _packs(plan: Plan, homes: Mapping[str, str]) -> dict[str, Pack]:
    """Tensor name -> the pack of its block, for what rests in RAM and streams to an accelerator."""
    packs: dict[str, Pack] = {}
    for placement in plan.placements:
        if placement.at_home or placement.device in (CPU, DISK):
            continue
        sizes = {t.name: t.nbytes for t in placement.block.tensors if homes[t.name] == CPU}
        packs |= dict.fromkeys(sizes, Pack(sizes, torch_device(placement.device)))
    return packs


def _computed_on(placement: Placement) -> str:
    return CPU if placement.at_home else placement.device


def _cast(name: str, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if value.is_complex() and not dtype.is_complex:
        raise DtypeError(f"Tensor {name!r} is {value.dtype} and cannot be cast to {dtype}: its imaginary part is lost.")
    try:
        return value.to(dtype)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise DtypeError(f"Tensor {name!r} is {value.dtype} and cannot be cast to {dtype}: {error}") from error
