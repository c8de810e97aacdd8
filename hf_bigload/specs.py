"""The frozen values that one stage hands to the next. No behaviour beyond looking things up, and no torch.

Dtypes are names (`"bfloat16"`), devices are names (`"cuda:0"`, `"cpu"`, `"disk"`), sizes are bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

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


class Pictured:
    """What a person can look at: the one door from values up to `pictures`, imported when somebody goes through it."""

    def explain(self) -> str:
        """It as text for a terminal."""
        from . import pictures

        return pictures.as_text(self)

    def plot(self) -> Any:
        """It as a `matplotlib.figure.Figure`; `.savefig(path)` writes that to a file.

        Raises:
            MissingExtraError: matplotlib is not installed; `pip install 'hf_bigload[plot]'` does that.
        """
        from . import pictures

        return pictures.as_figure(self)

    def _repr_html_(self) -> str:
        """It for a notebook: HTML that needs nothing else."""
        from . import pictures

        return pictures.as_html(self)


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

    A tensor belongs to the first block that holds it; `borrows` names the ones that this block uses and another owns.
    """

    name: str
    tensors: tuple[TensorSpec, ...]
    whole: bool
    """The block is everything below its module; otherwise only the tensors directly in it."""
    parts: tuple[BlockSpec, ...] = ()
    """The same tensors cut at the leaves: what to fall back to where the block does not fit."""
    borrows: tuple[str, ...] = ()
    gathers: bool = False
    """An embedding table: its forward reads a few rows, never the whole."""
    part_of: str | None = None
    """For a leaf of a block that was cut, that block: it goes on computing with its leaves' outputs, on one device."""
    calls: int | None = None
    """Forwards per request, where the model's structure says it: 1 for an encoder or a tower. None: once per token."""
    prompt: bool = True
    """Whether the first forward takes the whole prompt; beside an encoder, which does that, it takes one token."""

    @cached_property
    def buffer_bytes(self) -> int:
        return sum(t.nbytes for t in self.tensors if t.is_buffer)

    @cached_property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    @cached_property
    def elements(self) -> int:
        return sum(prod(t.shape) for t in self.tensors)

    @cached_property
    def dtype(self) -> str:
        """Of its largest tensor, or "" if it has none."""
        return max(self.tensors, key=lambda t: t.nbytes).dtype if self.tensors else ""


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
class Work:
    """What is computed in one call."""

    operations: float = 0.0
    """Of matrix multiplications: two for a multiplication and its addition."""
    values: float = 0.0
    """Elements that all other operators put out, one after another."""

    def __add__(self, other: Work) -> Work:
        return Work(self.operations + other.operations, self.values + other.values)

    def __sub__(self, other: Work) -> Work:
        return Work(self.operations - other.operations, self.values - other.values)


@dataclass(frozen=True)
class Needs:
    """What a request of a workload takes beside the weights. By block name; what is not named takes nothing."""

    workload: Workload
    activations: int = 0
    """Bytes that one forward has at once at its peak, on each device that computes."""
    cache: Mapping[str, int] = field(default_factory=dict)
    """Bytes that a block remembers at the end of the request (keys and values, states), where it is computed."""
    work: Mapping[str, tuple[Work, Work]] = field(default_factory=dict)
    """What a block computes: in the first call, in one for a new token."""
    method: str = "none"
    """How the figures were found: "trace", or "bound" where the model could not be traced."""
    error: float = 0.0
    """How far measurements were from such figures, as a share of them."""


@dataclass(frozen=True)
class Arithmetic:
    """How fast a device multiplies matrices: what one element of a weight takes, when it meets so many tokens.

    By dtype ("" for any other): (tokens, seconds) in ascending order. A table, for there is no formula: kernels for
    one token and for many are different ones.
    """

    curves: Mapping[str, tuple[tuple[float, float], ...]]
    per_weight: float = 0.0
    """Seconds that a module with one weight takes however small that is: Python, and starting some operators."""
    per_value: float = 0.0
    """Seconds for each element that an operator puts out which is no multiplication of matrices."""

    def seconds(self, dtype: str, elements: float, tokens: float) -> float:
        """Of a multiplication by a weight of `elements` elements; between the table's rows, in proportion."""
        curve = self.curves.get(dtype) or self.curves[""]
        (first, fewest), (last, most) = curve[0], curve[-1]
        if tokens <= first:  # of a mixture of experts: only some of the weights are met
            return elements * fewest * tokens / first
        if tokens >= last:
            return elements * most * tokens / last
        row = next(i for i, (known, _) in enumerate(curve) if known > tokens)
        (low, before), (high, after) = curve[row - 1], curve[row]
        return elements * (before + (after - before) * (tokens - low) / (high - low))


def roofline(bytes_per_second: float, operations_per_second: float, element_bytes: int = 2) -> Arithmetic:
    """As fast as memory brings weights, and no faster than arithmetic: the model of S. Williams et al. (CACM 2009)."""
    knee = max(1.0, element_bytes / bytes_per_second * operations_per_second / 2)
    rows = (1.0, element_bytes / bytes_per_second), (knee, 2 * knee / operations_per_second)
    return Arithmetic({"": rows})


@dataclass(frozen=True)
class Speeds:
    """What predictions divide by, bytes per second.

    The defaults are round figures of a common machine, for where nothing was measured.
    """

    disk: float = 2e9
    """One NVMe drive, read past the page cache."""
    bus: float = 20e9
    """Pinned memory to an accelerator: PCIe 4.0 with 16 lanes."""
    host: float = 10e9
    """Memory to memory."""
    cpu: Arithmetic = field(default_factory=lambda: roofline(20e9, 5e11))
    device: Arithmetic = field(default_factory=lambda: roofline(1e12, 1e14))
    measured: bool = False
    """Whether on this machine; else predictions may be off by a large factor."""


@dataclass(frozen=True)
class Hardware:
    """The memory a plan may use, in bytes: accelerators in order of preference, then RAM."""

    devices: Mapping[str, int]
    ram: int
    passage: int = 0
    """Bytes of RAM that weights on their way from disk to an accelerator may take where `ram` allows for none."""
    speeds: Speeds = field(default_factory=Speeds)


@dataclass(frozen=True)
class Placement:
    """Where one block rests (`home`: a device, "cpu" or "disk") and where it is computed (`device`).

    `exceptions` are single tensors of the block that a device map sends elsewhere. With `at_home` the activations
    travel instead of the weights: inputs go to where the block rests, outputs return to `device`.
    """

    block: BlockSpec
    home: str
    device: str
    at_home: bool = False
    exceptions: Mapping[str, str] = field(default_factory=dict)

    def home_of(self, tensor: str) -> str:
        return self.exceptions.get(tensor, self.home)

    @property
    def is_on_disk(self) -> bool:
        """Whether any tensor of the block rests there."""
        return DISK in (self.home, *self.exceptions.values())

    @property
    def streamed_bytes(self) -> int:
        """Bytes that have to come to `device` each time the block runs."""
        if self.at_home:
            return 0
        return sum(t.nbytes for t in self.block.tensors if not t.is_buffer and self.home_of(t.name) != self.device)


@dataclass(frozen=True)
class PhaseTime:
    """The predicted seconds of one phase of a request, all of its `calls` together."""

    name: str
    calls: int
    seconds: float

    @property
    def seconds_per_call(self) -> float:
        return self.seconds / self.calls


@dataclass(frozen=True)
class Plan(Pictured):
    """A placement for every block. Frozen: execution makes no placement decisions of its own.

    `used` and `budget` are bytes by device name. `ring` is the bytes of the buffers that streamed blocks land in, by
    execution device, already counted in `used`.
    """

    placements: tuple[Placement, ...]
    device_map: Mapping[str, Any]
    main_device: str
    budget: Mapping[str, int]
    used: Mapping[str, int]
    ring: Mapping[str, int]
    ties: Mapping[str, str] = field(default_factory=dict)
    offload_buffers: bool = False
    cache: Mapping[str, int] = field(default_factory=dict)
    """Bytes kept on each device for what blocks remember (keys and values), counted in `used`."""
    activations: Mapping[str, int] = field(default_factory=dict)
    """Bytes kept on each device for what a forward computes with, counted in `used`."""
    predicted: tuple[PhaseTime, ...] = ()
    """What one request of the workload takes, phase by phase."""

    workload: Workload = field(default_factory=Workload)
    """The request that was planned for."""
    measured: bool = False
    """Whether the prediction divides by what this machine was measured to do; else by round figures."""
    bound: float = 0.0
    """Seconds that no other placement on this hardware could beat; 0 where that was not worked out."""

    @property
    def seconds(self) -> float:
        """Predicted seconds of one request."""
        return sum(phase.seconds for phase in self.predicted)

    @property
    def streams(self) -> bool:
        """Whether any weight has to travel when the model runs."""
        return any(p.streamed_bytes for p in self.placements) or DISK in self.devices

    @property
    def keeps_budget(self) -> bool:
        """Whether no device holds more than it may. A device without a budget may hold anything."""
        return all(size <= self.budget.get(device, size) for device, size in self.used.items())

    @property
    def devices(self) -> frozenset[str]:
        """Every place that the plan uses, as home or to compute."""
        homes = {home for p in self.placements for home in (p.home, *p.exceptions.values())}
        return frozenset(homes | {p.device for p in self.placements})


@dataclass(frozen=True)
class LoadRequest:
    """What a caller of a loader wants, in no framework's terms."""

    device_map: Any
    max_memory: Mapping[Any, int | str] | None = None
    offload_folder: str | None = None
    offload_buffers: bool = False
    main_device: str | None = None
    no_split: tuple[str, ...] | None = None
    """Class names of modules that stay on one device; None: found from the model's structure."""
    skip_keys: tuple[str, ...] = ()
    """Keyword arguments and outputs that are never moved between devices (caches)."""
