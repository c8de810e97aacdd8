"""What a request takes beside the weights: a run of the model on tensors that have shapes and no memory.

The model is not touched: a twin of its modules, with fake tensors in place of parameters and buffers, runs the calls of
a request (`Request`), while a meter counts the bytes that are made and not freed yet, and the operations. Of blocks
that are alike (`kind_of`) and are given the same shapes only the first one runs in each call; for the others the meter
is told what that one took, and their outputs are made in its outputs' shapes.

A request is run twice. The first time goes to its end, and tells what every block remembers then. The second time its
calls are measured: what is in memory beside that.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from . import registry, settings
from .estimate import bound, fields_of
from .specs import ModelSpec, Needs, Work, Workload

logger = logging.getLogger(__name__)

ERROR = 0.05
"""Of measured peaks of tiny models, traces were no farther than this (tests/test_trace.py)."""
EXTRAPOLATION_ERROR = 0.25
"""The same, of models whose layers loop over tokens in Python, traced with little text."""
LONGEST = 6_000
"""Operators in a call where one block of each kind runs: some tenths of a second. A loop over tokens takes more."""
LONGEST_WHOLE = 40_000
"""Where every block runs."""
_SHORT = (16, 32)
"""Tokens that stand for more of them."""

ModelT = TypeVar("ModelT", bound=nn.Module)


class TraceError(RuntimeError):
    """The model cannot be traced."""


class TooLong(TraceError):
    """A call takes more operators than a trace should."""


@dataclass(frozen=True)
class Request:
    """The calls of one request. Each is given the model, and runs it on inputs that it makes."""

    first: Callable[[Any, int], Any]
    """(model, tokens more than the context) -> what is kept for the next call."""
    step: Callable[[Any, Any], Any] | None = None
    """(model, what was kept) -> what is kept. One new token for each sequence; None: there is one call only."""


def needs_of(model: nn.Module, spec: ModelSpec, workload: Workload | None = None) -> Needs:
    """What a request to `model` takes beside its weights: traced, else bounded (`estimate.bound`). Never fails.

    `model` may be on meta, and is not changed. A model that no loader knows has no known requests: nothing is counted
    then. Results are kept for as long as the process lives.

    Args:
        spec: of `model`; figures are by its blocks, and in the dtypes that it gives.
        workload: None: the one in force (`hf_bigload.workload`), else the default one.
    """
    workload = workload or settings.current().workload or Workload()

    def request(asked: Workload) -> Any:
        return registry.request(model, asked)

    try:
        if request(workload) is None:
            return Needs(workload)
        key = _identity(model, spec, workload)
    except Exception as error:  # noqa: BLE001 - a loader's, or a config's
        logger.warning("no trace of %s: %s: %s", type(model).__name__, type(error).__name__, error)
        return bound(spec, workload, fields_of(getattr(model, "config", None)))
    found = _known.get(key)
    if found is None:
        found = _traced(model, spec, request, workload)
        _keep(key, found)
    return found


def _keep(key: Any, found: Needs) -> None:
    """Several threads may: what another one drops in the meantime is traced again."""
    for oldest in list(_known)[: len(_known) - _KEPT + 1]:
        _known.pop(oldest, None)
    _known[key] = found


_KEPT = 64
_known: dict[Any, Needs] = {}


def _identity(model: nn.Module, spec: ModelSpec, workload: Workload) -> Any:
    """Equal for models that take the same. What a config holds beside its fields (how attention is computed) counts."""
    config = getattr(model, "config", None)
    tensors = tuple((t.name, t.dtype, t.shape) for block in spec.blocks for t in block.tensors)
    return type(model), workload, repr(getattr(config, "__dict__", config)), tensors


def _traced(model: nn.Module, spec: ModelSpec, request: _Requests, workload: Workload) -> Needs:
    """One block of each kind; every block, where the model wants all of them; little text, where all takes too long."""
    short = False
    for attempt in (_alike, _every_block, _extrapolated):
        if short and attempt is not _extrapolated:
            continue
        try:
            return attempt(model, spec, request, workload)
        except Exception as error:  # noqa: BLE001 - whatever a model raises without values
            logger.info("no trace of %s (%s): %s", type(model).__name__, type(error).__name__, error)
            short = isinstance(error, TooLong)
    return bound(spec, workload, fields_of(getattr(model, "config", None)))


_Requests = Callable[[Workload], Request]


def _alike(model: nn.Module, spec: ModelSpec, request: _Requests, workload: Workload) -> Needs:
    return trace(model, spec, request(workload), workload)


def _every_block(model: nn.Module, spec: ModelSpec, request: _Requests, workload: Workload) -> Needs:
    return trace(model, spec, request(workload), workload, alike=False)


def _extrapolated(model: nn.Module, spec: ModelSpec, request: _Requests, workload: Workload) -> Needs:
    """From two short texts, along a line: what is computed token by token grows so."""
    short, longer = (replace(workload, context_length=length, new_tokens=2) for length in _SHORT)
    a, b = (trace(model, spec, request(each), each) for each in (short, longer))

    def at(length: int, first: float, second: float) -> float:
        return max(second, first + (second - first) * (length - _SHORT[0]) / (_SHORT[1] - _SHORT[0]))

    context, end = workload.context_length, workload.context_length + workload.new_tokens - 2
    none = (Work(), Work())

    def work(first: Work, second: Work) -> Work:
        return Work(at(context, first.operations, second.operations), at(context, first.values, second.values))

    return Needs(
        workload,
        round(at(context, a.activations, b.activations)),
        {name: round(at(end, a.cache.get(name, 0), size)) for name, size in b.cache.items()},
        {name: (work(a.work.get(name, none)[0], first), step) for name, (first, step) in b.work.items()},
        "trace",
        EXTRAPOLATION_ERROR,
    )


def trace(model: nn.Module, spec: ModelSpec, request: Request, workload: Workload, alike: bool = True) -> Needs:
    """What `request` takes of a model that may be on meta. Allocates nothing of the size of weights or activations.

    With `alike`, blocks that are alike run once.

    Raises:
        Exception: whatever the model raises that cannot run without values, or takes too long (`TraceError`).
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with _by_itself(), mode:
        twin = fake_twin(model, spec)
        ahead = max(0, workload.new_tokens - 2)
        at_end = _Run(twin, spec, {}, alike)
        at_end.calls(request, ahead, steps=workload.new_tokens > 1)
        measured = _Run(twin, spec, at_end.remembered, alike)
        first, step = measured.calls(request, 0, steps=True)
    names = dict.fromkeys((*first, *step))
    work = {name: (first[name], step[name]) for name in names if first[name] != Work() or step[name] != Work()}
    return Needs(workload, measured.meter.peak, at_end.remembered, work, "trace", ERROR)


# ---------------------------------------------------------------- a model without memory


def fake_twin(model: ModelT, spec: ModelSpec) -> ModelT:
    """The modules of `model` with fake tensors, under a FakeTensorMode, in evaluation mode and the dtypes of `spec`.

    What is no tensor is shared with `model`. Hooks are left out, and so is a `forward` that was put over the class's.
    """
    dtypes = {t.name: getattr(torch, t.dtype) for block in spec.blocks for t in block.tensors}
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    tensors: dict[int, torch.Tensor] = {}
    for name, tensor in named:
        if id(tensor) not in tensors:
            tensors[id(tensor)] = _fake(tensor, dtypes.get(name, tensor.dtype))
    return _twin(model, {}, tensors)


def _twin(module: Any, modules: dict[int, Any], tensors: Mapping[int, torch.Tensor]) -> Any:
    if id(module) in modules:
        return modules[id(module)]
    twin = modules[id(module)] = object.__new__(type(module))
    for name, value in vars(module).items():
        twin.__dict__[name] = type(value)() if name.endswith(("_hooks", "_hooks_with_kwargs")) else value
    for name in ("forward", "_hf_hook", "_old_forward"):
        twin.__dict__.pop(name, None)
    twin.__dict__["training"] = False
    for group in ("_parameters", "_buffers"):
        twin.__dict__[group] = {name: tensors.get(id(value)) for name, value in vars(module)[group].items()}
    children = vars(module)["_modules"].items()
    twin.__dict__["_modules"] = {n: None if child is None else _twin(child, modules, tensors) for n, child in children}
    return twin


def _fake(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A tensor like this one on the CPU: kernels are chosen by device, and meta has none."""
    if type(tensor) not in (torch.Tensor, nn.Parameter):
        raise TraceError(f"a weight is a {type(tensor).__name__}, whose operators are not known")
    if tensor.layout != torch.strided:
        raise TraceError(f"a weight is {tensor.layout}")
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device="cpu")


@contextlib.contextmanager
def _by_itself() -> Iterator[None]:
    """Whatever modes the caller is in; and operators that cannot run on fake tensors are no errors to be logged."""
    said = logging.getLogger("torch._subclasses.fake_tensor")
    said.addFilter(_nothing)
    try:
        with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False), torch.device("cpu"):
            yield
    finally:
        said.removeFilter(_nothing)


def _nothing(_: logging.LogRecord) -> bool:
    return False


# ---------------------------------------------------------------- what is counted


@dataclass(eq=False)
class _Storage:
    """Memory of a tensor that was made in the run, and the block it was made in."""

    nbytes: int
    owner: str
    kept: bool = False
    watch: Any = field(default=None, repr=False)


class Meter(TorchDispatchMode):
    """Counts, while operators run, the bytes made and not freed yet, and the work of each block.

    `peak` leaves out what blocks keep beyond their own call, up to `remembered` bytes of each (what is planned for).
    """

    def __init__(
        self,
        weights: Iterable[torch.Tensor] = (),
        remembered: Mapping[str, int] | None = None,
        longest: int = LONGEST_WHOLE,
    ) -> None:
        super().__init__()
        self._longest = longest
        self.peak = 0
        self.kept: Counter[str] = Counter()
        self.work: defaultdict[str, Work] = defaultdict(Work)
        self.owner = ""
        self._live = self._excess = self.operators = 0
        self._remembered = remembered or {}
        self._storages: dict[int, _Storage | None] = {t.untyped_storage()._cdata: None for t in weights}
        self._made: list[_Storage] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kernel = _KERNELS.get(func)
        out = func(*args, **(kwargs or {})) if kernel is None else kernel(func, *args, **(kwargs or {}))
        self.operators += 1
        if self.operators > self._longest:
            raise TooLong(f"a call takes more than {self._longest} operators")
        tensors = (
            each for each in (out if isinstance(out, tuple | list) else (out,)) if isinstance(each, torch.Tensor)
        )
        made = sum(tensor.numel() for tensor in tensors if self._see(tensor))
        formula = _OPERATIONS.get(func._overloadpacket) or flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.work[self.owner] += Work(operations=float(formula(*args, **(kwargs or {}), out_val=out)))
        elif made and func._overloadpacket not in _EMPTY:
            self.work[self.owner] += Work(values=float(made))
        return out

    def _see(self, tensor: torch.Tensor) -> bool:
        """Whether its memory is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return False
        made = _Storage(storage.nbytes(), self.owner)
        made.watch = weakref.ref(storage, functools.partial(self._freed, key))
        self._storages[key] = made
        self._made.append(made)
        self.rise(made.nbytes)
        return True

    def _freed(self, key: int, _: Any) -> None:
        storage = self._storages.pop(key)
        assert storage is not None
        if storage.kept:
            self.keep(storage.owner, -storage.nbytes)
        else:
            self._live -= storage.nbytes
        storage.nbytes = 0

    @property
    def level(self) -> int:
        """Bytes beside what is planned for, now."""
        return self._live + self._excess

    def rise(self, nbytes: int) -> None:
        """So many bytes more are in use."""
        self._live += nbytes
        self.peak = max(self.peak, self.level)

    def keep(self, owner: str, nbytes: int) -> None:
        """A block remembers so many bytes more; beyond what was to be expected, they are in the way."""
        planned = self._remembered.get(owner, 0)
        self._excess -= max(0, self.kept[owner] - planned)
        self.kept[owner] += nbytes
        self._excess += max(0, self.kept[owner] - planned)
        self.peak = max(self.peak, self.level)

    def settle(self, since: int, outputs: Iterable[torch.Tensor] = ()) -> None:
        """What was made after the first `since` storages, lives on and is no output: its block remembers it."""
        returned = {tensor.untyped_storage()._cdata for tensor in outputs}
        leaving = {id(self._storages.get(key)) for key in returned}
        for storage in self._made[since:]:
            if storage.nbytes and not storage.kept and id(storage) not in leaving:
                storage.kept = True
                self._live -= storage.nbytes
                self.keep(storage.owner, storage.nbytes)

    @property
    def made(self) -> int:
        """How many storages were made so far: a mark for `settle`."""
        return len(self._made)


def _attention(query: Any, key: Any, value: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _grouped(a: Any, b: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    """Rows of `a`, each with the matrix of its group."""
    return 2 * a.shape[-2] * a.shape[-1] * b.shape[-1]


def _grouped_kernel(func: Any, a: Any, b: Any, *args: Any, **kwargs: Any) -> Any:
    """As it is on the CPU for every dtype; torch's meta kernel refuses all but bfloat16."""
    if not isinstance(a, FakeTensor) or a.dim() != 2 or b.dim() != 3:
        return func(a, b, *args, **kwargs)
    return a.new_empty(a.shape[0], b.shape[-1])


_KERNELS: Mapping[Any, Callable[..., Any]] = (
    {torch.ops.aten._grouped_mm.default: _grouped_kernel} if hasattr(torch.ops.aten, "_grouped_mm") else {}
)
"""What stands in for operators that fake tensors do not have."""
_OPERATIONS: Mapping[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    **({torch.ops.aten._grouped_mm: _grouped} if hasattr(torch.ops.aten, "_grouped_mm") else {}),
}
"""Formulas that torch's flop counter has not."""
_aten = torch.ops.aten
_EMPTY = (_aten.empty, _aten.empty_strided, _aten.empty_like, _aten.new_empty, _aten.new_empty_strided)
"""Operators that compute nothing."""


# ---------------------------------------------------------------- the run


@dataclass(frozen=True)
class _Taken:
    """What a block took in a call, for those that are alike: bytes over those at its begin, remembered, and work."""

    rise: int
    kept: int
    work: Work
    outputs: _Recipe


class _Run:
    """A request in progress: the twin's blocks with a meter around each of them."""

    def __init__(self, twin: nn.Module, spec: ModelSpec, remembered: Mapping[str, int], alike: bool) -> None:
        self.twin = twin
        self.meter = Meter((*twin.parameters(), *twin.buffers()), remembered, LONGEST if alike else LONGEST_WHOLE)
        self.remembered: dict[str, int] = {}
        self._taken: dict[Any, _Taken] = {}
        self._depth = 0
        for block in spec.blocks:
            module = twin.get_submodule(block.name)
            kind = kind_of(module) if block.whole and alike else None
            forward = type(module).forward.__get__(module)
            module.__dict__["forward"] = functools.partial(self._block, block.name, kind, forward)

    def calls(self, request: Request, ahead: int, steps: bool) -> tuple[Mapping[str, Work], Mapping[str, Work]]:
        """Work by block in the first call, and in one for a new token. Then `remembered` is what is kept."""
        held = self._call(request.first, ahead)
        first, step = self.meter.work, defaultdict[str, Work](Work)
        self.meter.work = step
        if request.step is not None and steps:
            held = self._call(request.step, held)
        self.remembered = dict(+self.meter.kept)
        del held
        return first, step

    def _call(self, call: Callable[[Any, Any], Any], given: Any) -> Any:
        since = self.meter.made
        self.meter.operators = 0
        with self.meter:
            held = call(self.twin, given)
        self._taken.clear()
        self.meter.settle(since)
        return held

    def _block(self, name: str, kind: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        like = (kind, _shapes(args), _shapes(kwargs))
        taken = None if kind is None else self._taken.get(like)
        if taken is not None:
            return self._again(name, taken, args, kwargs)
        meter = self.meter
        outside, meter.owner = meter.owner, name
        self._depth += 1
        peak, level, since = meter.peak, meter.level, meter.made
        kept, work = meter.kept[name], meter.work[name]
        meter.peak = level
        try:
            out = forward(*args, **kwargs)
        finally:
            self._depth -= 1
        meter.settle(since, _tensors(out))
        if kind is not None:
            self._taken[like] = _Taken(
                meter.peak - level,
                meter.kept[name] - kept,
                meter.work[name] - work,
                _recipe(out, list(_leaves((args, kwargs)))),
            )
        meter.peak = max(peak, meter.peak)
        if self._depth:
            meter.owner = outside
        return out

    def _again(self, name: str, taken: _Taken, args: Any, kwargs: Any) -> Any:
        meter = self.meter
        meter.owner = name
        meter.peak = max(meter.peak, meter.level + taken.rise)
        meter.keep(name, taken.kept)
        meter.work[name] += taken.work
        return taken.outputs(list(_leaves((args, kwargs))))


# ---------------------------------------------------------------- what is alike

_INDEX = re.compile(r"(^|_)(idx|index|id|number)$|^layer_?(id|num)")
"""Attributes that tell which of its kind a module is, and nothing else."""
_PLAIN = (bool, int, float, str, type(None), torch.dtype)


def kind_of(module: nn.Module) -> Any:
    """Equal for modules that do the same with different weights: classes, shapes, dtypes, plain attributes."""
    return tuple((name, type(each), *_traits(each)) for name, each in module.named_modules())


def _traits(module: nn.Module) -> Iterator[Any]:
    for name, value in vars(module).items():
        if name in ("_parameters", "_buffers"):
            yield from ((leaf, t if t is None else (t.shape, t.dtype)) for leaf, t in value.items())
        elif isinstance(value, _PLAIN) and not _INDEX.search(name):
            yield name, value
        elif name == "config":
            yield id(value)


def _leaves(tree: Any) -> Iterator[Any]:
    """What is in nested containers. A cache is none: what it holds is no input and no output."""
    if isinstance(tree, Mapping):
        tree = tree.values()
    elif not isinstance(tree, tuple | list):
        yield tree
        return
    for branch in tree:
        yield from _leaves(branch)


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in _leaves(tree) if isinstance(leaf, torch.Tensor))


def _shapes(tree: Any) -> Any:
    """Equal for arguments that a block cannot tell apart without values."""
    if isinstance(tree, Mapping):
        return tuple((name, _shapes(value)) for name, value in tree.items())
    if isinstance(tree, tuple | list):
        return tuple(_shapes(value) for value in tree)
    if isinstance(tree, torch.Tensor):
        return tree.shape, tree.stride(), tree.dtype
    return tree if isinstance(tree, _PLAIN) else type(tree)


_Recipe = Callable[[Sequence[Any]], Any]
"""Outputs from the leaves of other arguments."""


def _recipe(out: Any, leaves: Sequence[Any]) -> _Recipe:
    """How to make outputs like `out`, which a block made of arguments with `leaves`: what is an input stays one."""
    kind = type(out)  # `out` itself must not live on in a recipe
    if isinstance(out, Mapping):
        parts = {name: _recipe(value, leaves) for name, value in out.items()}
        return lambda given: kind(**{name: part(given) for name, part in parts.items()})
    if isinstance(out, tuple | list):
        items = [_recipe(value, leaves) for value in out]
        return lambda given: kind(item(given) for item in items)
    index = next((i for i, leaf in enumerate(leaves) if leaf is out), None)
    if index is not None:
        return lambda given: given[index]
    return _tensor_recipe(out, leaves) if isinstance(out, torch.Tensor) else lambda _: out


def _tensor_recipe(out: torch.Tensor, leaves: Sequence[Any]) -> _Recipe:
    size, stride, offset, dtype = out.shape, out.stride(), out.storage_offset(), out.dtype
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata == out.untyped_storage()._cdata:
            return lambda given: given[i].as_strided(size, stride, offset)
    return lambda _: torch.empty_strided(size, stride, dtype=dtype, device="cpu")
