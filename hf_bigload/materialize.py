"""Execute a plan's reads: each tensor to where the plan says that it rests, with the dtype that it is loaded in.

A tensor is computed with the same bits wherever it slept. Some CPU kernels round by an operand's address modulo 64, and
a plain load maps the file, so what stays unconverted keeps its file offset's residue, and what is converted starts
where the conversion put it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch

from .checkpoint.formats import load_bin
from .checkpoint.mapping import MappedFiles
from .checkpoint.reader import Reader, layout, page_buffer
from .checkpoint.spill import SpillFolder
from .dispatch.executor import Executor
from .dispatch.residency import DiskResident
from .errors import DtypeError
from .hardware import torch_device
from .specs import CPU, DISK, CheckpointIndex, FileStamp, Placement, Plan, TensorEntry

PHASE = 64
"""Bytes: the modulus of the addresses that CPU kernels look at."""

DIRECT_FROM = 1 << 20
"""Bytes from which a resident copy is read past the page cache; smaller ones are copied out of the mapping."""


class Materializer:
    """Puts tensors where `plan` wants them; remembers where in a file those rest that stream from one.

    Holds what the loaded weights depend on: keep it as long as the model (see `keep_alive`).
    """

    def __init__(
        self,
        plan: Plan,
        stamps: Mapping[str, FileStamp] | None = None,
        offload_folder: str | None = None,
    ) -> None:
        self.follow(plan)
        self.stamp(stamps)
        self._offload_folder = offload_folder
        self._spill: SpillFolder | None = None
        self._entries: dict[int, tuple[torch.Tensor, TensorEntry]] = {}

    def follow(self, plan: Plan) -> None:
        """Place what comes from now on by `plan`."""
        self.plan = plan
        self._homes = _homes(plan)

    def rests_on_disk(self, tensor: torch.Tensor) -> bool:
        """Whether this tensor's data is a mapped view that this object made, so that it may stream from its file."""
        return tensor.data_ptr() in self._entries

    def stamp(self, stamps: Mapping[str, FileStamp] | None) -> None:
        """Read from the files that these stamps describe, and from no other that takes their place."""
        self.reader = Reader(stamps=stamps)
        self._mapped = MappedFiles(stamps)

    @property
    def keep_alive(self) -> tuple[SpillFolder, ...]:
        return () if self._spill is None else (self._spill,)

    def source(self, entry: TensorEntry) -> torch.Tensor:
        """The checkpoint's own bytes as a tensor, read when they are touched. Writes to it reach nobody else."""
        return self._mapped.tensor(entry)

    def home_of(self, name: str) -> str:
        """Where a tensor rests; what the plan does not know (a new buffer, an adapter) rests where the model runs."""
        return self._homes.get(self.plan.ties.get(name, name), self.plan.main_device)

    def load(self, name: str, entry: TensorEntry, dtype: torch.dtype) -> torch.Tensor:
        """The tensor `name` from a file, resting at its home.

        Raises:
            DtypeError: the file's dtype cannot be cast to `dtype`.
            SpillError: it has to be converted and rest on disk, and the disk refuses.
            CheckpointError: the file cannot be read, or is not the one that was indexed.
        """
        source = self.source(entry)
        home = self.home_of(name)
        if source.dtype != dtype:
            return self.place(name, _cast(name, source, dtype))
        if home == DISK and entry.nbytes:
            return self._at_rest_in(entry, source)
        if home in (CPU, DISK):
            return self._resident_copy(entry, source) if self.plan.streams else source
        return source.to(torch_device(home), copy=True)

    def place(self, name: str, value: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The tensor `name` from memory, resting at its home; `value` is used as it is where it may stay."""
        if dtype is not None and value.dtype != dtype:
            value = _cast(name, value, dtype)
        home = self.home_of(name)
        if home == DISK and value.numel():
            return self._spilled(name, value)
        return value.to(torch_device(home))

    def with_legacy_files(self, index: CheckpointIndex) -> tuple[CheckpointIndex, dict[str, torch.Tensor]]:
        """`index` with the tensors of files in torch's old format, which have no offsets and are loaded whole.

        They are kept in memory (the second value); where weights stream, so that RAM is scarce, they go through a file
        into the index, and no more than one of the old files is in memory at a time.
        """
        entries, in_memory = dict(index.entries), dict[str, torch.Tensor]()
        for path in index.legacy_files:
            for name, tensor in load_bin(path).items():
                if self.plan.streams:
                    entries[name] = self._write(name, tensor)
                else:
                    in_memory[name] = tensor
        return replace(index, entries=entries), in_memory

    def register(self, executor: Executor, tensors: Iterable[torch.Tensor]) -> None:
        """Tell the executor which of the model's `tensors` rest in a file, as loaded and not replaced since."""
        for tensor in tensors:
            known = self._entries.get(tensor.data_ptr())
            if known is not None and known[0].shape == tensor.shape and known[0].dtype == tensor.dtype:
                executor.on_disk[tensor] = DiskResident(known[1], known[0], tensor)
                self.reader.open(known[1].file)  # so that the model outlives a save over its own checkpoint
        self._entries.clear()

    def _spilled(self, name: str, value: torch.Tensor) -> torch.Tensor:
        entry = self._write(name, value)
        return self._at_rest_in(entry, self._mapped.tensor(entry))

    def _write(self, name: str, value: torch.Tensor) -> TensorEntry:
        if self._spill is None:
            self._spill = SpillFolder(self._offload_folder)
        value = value.detach().to(CPU)
        flat, stride = (value, None) if value.is_contiguous() else _in_storage_order(value)
        return replace(self._spill.write(flat, name), shape=tuple(value.shape), stride=stride)

    def _at_rest_in(self, entry: TensorEntry, mapped: torch.Tensor) -> torch.Tensor:
        self._entries[mapped.data_ptr()] = (mapped, entry)
        return mapped

    def _resident_copy(self, entry: TensorEntry, source: torch.Tensor) -> torch.Tensor:
        """Anonymous memory with the file's bytes: mapped pages could be evicted by what streams."""
        if entry.nbytes < DIRECT_FROM or entry.stride is not None:
            return copy_in_phase(source)
        plan = layout([entry])
        buffer = page_buffer(plan.nbytes)
        self.reader.read(plan.extents, buffer).result()
        count = entry.nbytes // source.element_size()
        return torch.frombuffer(buffer, dtype=source.dtype, count=count, offset=plan.positions[0]).view(entry.shape)


def copy_in_phase(source: torch.Tensor) -> torch.Tensor:
    """A copy of a CPU tensor whose address has the same residue modulo 64."""
    if not source.numel() or not source.is_contiguous():
        return source.clone()
    nbytes = source.numel() * source.element_size()
    raw = bytearray(nbytes + PHASE)
    start = torch.frombuffer(raw, dtype=torch.uint8).data_ptr()
    offset = (source.data_ptr() - start) % PHASE
    copied = torch.frombuffer(raw, dtype=source.dtype, count=source.numel(), offset=offset).view(source.shape)
    return copied.copy_(source)


def _in_storage_order(value: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...] | None]:
    """A transposed or otherwise permuted tensor as its bytes lie, and the strides that make it again."""
    by_stride = sorted(range(value.dim()), key=lambda i: (value.stride(i), value.shape[i]), reverse=True)
    ordered = value.permute(by_stride)
    if ordered.is_contiguous():
        return ordered.reshape(-1), value.stride()
    return value.contiguous(), None  # has gaps or overlaps


def _homes(plan: Plan) -> dict[str, str]:
    """Tensor name -> where it rests. Buffers rest where they are computed with, unless they are to be offloaded."""
    homes = {}
    for placement in plan.placements:
        for tensor in placement.block.tensors:
            stays = tensor.is_buffer and not plan.offload_buffers
            homes[tensor.name] = _computed_on(placement) if stays else placement.home_of(tensor.name)
    return homes


def _computed_on(placement: Placement) -> str:
    return CPU if placement.at_home else placement.device


def _cast(name: str, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if value.is_complex() and not dtype.is_complex:
        raise DtypeError(f"Tensor {name!r} is {value.dtype} and cannot be cast to {dtype}: its imaginary part is lost.")
    try:
        return value.to(dtype)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise DtypeError(f"Tensor {name!r} is {value.dtype} and cannot be cast to {dtype}: {error}") from error
