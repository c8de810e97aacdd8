"""The frozen values that one stage hands to the next. No behaviour beyond looking things up, and no torch.

Dtypes are names (`"bfloat16"`), devices are names (`"cuda:0"`, `"cpu"`, `"disk"`), sizes are bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

DISK = "disk"
CPU = "cpu"

DTYPE_BYTES: Mapping[str, int] = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "int16": 2,
    "uint16": 2,
    "float16": 2,
    "bfloat16": 2,
    "int32": 4,
    "uint32": 4,
    "float32": 4,
    "int64": 8,
    "uint64": 8,
    "float64": 8,
    "complex64": 8,
    "complex128": 16,
}
"""Bytes of one element, by torch's name of the dtype."""


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor's bytes lie: `nbytes` bytes of `file`, from byte `offset` on.

    `stride` is None for a contiguous tensor, else the strides in elements (a `.bin` may hold views).
    """

    name: str
    file: str
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None = None

    @property
    def end(self) -> int:
        return self.offset + self.nbytes


@dataclass(frozen=True)
class FileStamp:
    """What identifies a file's content without reading it: a shard that no longer matches is never read."""

    path: str
    size: int
    mtime_ns: int
    inode: int


@dataclass(frozen=True)
class CheckpointIndex:
    """Every tensor of a checkpoint by its name in the files, and the files they lie in."""

    entries: Mapping[str, TensorEntry]
    stamps: Mapping[str, FileStamp]
    metadata: Mapping[str, str] = field(default_factory=dict)
    legacy_files: tuple[str, ...] = ()
    """Files in the old (not zip) `.bin` format: their tensors have no offset, and must be loaded whole."""

    def __getitem__(self, name: str) -> TensorEntry:
        return self.entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


@dataclass(frozen=True)
class TensorSpec:
    """A parameter or buffer of the skeleton, as it will be once loaded."""

    name: str
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    is_buffer: bool = False


@dataclass(frozen=True)
class BlockSpec:
    """A unit of planning and prefetch: a no-split module, or the tensors that one other module owns itself.

    `whole` says that the block owns everything below it; otherwise only the tensors directly in the module.
    `streamable` is False where moving bytes about would not move the tensor (wrapper subclasses).
    """

    name: str
    tensors: tuple[TensorSpec, ...]
    whole: bool
    parts: tuple[BlockSpec, ...] = ()
    """The same tensors cut at the leaves: what to fall back to where the block does not fit a ring slot."""

    @property
    def weight_bytes(self) -> int:
        return sum(t.nbytes for t in self.tensors if not t.is_buffer)

    @property
    def buffer_bytes(self) -> int:
        return sum(t.nbytes for t in self.tensors if t.is_buffer)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)


@dataclass(frozen=True)
class ModelSpec:
    """The skeleton as the planner sees it: blocks in module order, each tensor in exactly one of them.

    `ties` maps the name of a tied tensor to the name that owns its bytes.
    """

    blocks: tuple[BlockSpec, ...]
    ties: Mapping[str, str] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(b.nbytes for b in self.blocks)


@dataclass(frozen=True)
class Workload:
    """What a plan should leave room for: sequences at once, tokens of context, tokens to generate."""

    batch_size: int = 1
    context_length: int = 2048
    new_tokens: int = 128


@dataclass(frozen=True)
class Hardware:
    """The memory a plan may use, in bytes: accelerators in order of preference, then RAM."""

    devices: Mapping[str, int]
    ram: int
    max_is_explicit: bool = False
    """Whether the figures are the user's `max_memory` (followed to the byte) or measured (headroom is kept)."""


@dataclass(frozen=True)
class Placement:
    """Where one block rests (`home`: a device, "cpu" or "disk") and where it is computed (`device`)."""

    block: BlockSpec
    home: str
    device: str

    @property
    def streams(self) -> bool:
        return self.home != self.device


@dataclass(frozen=True)
class Plan:
    """A placement for every block. Frozen: execution makes no placement decisions of its own.

    `used` and `budget` are bytes by device; `ring` is the bytes of the buffers that streamed blocks land in, by
    execution device, already counted in `used`.
    """

    placements: tuple[Placement, ...]
    device_map: Mapping[str, int | str]
    main_device: str
    budget: Mapping[str, int]
    used: Mapping[str, int]
    ring: Mapping[str, int]
    ties: Mapping[str, str] = field(default_factory=dict)

    @property
    def streams(self) -> bool:
        return any(p.streams for p in self.placements)
