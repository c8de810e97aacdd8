"""The model on meta, cut into blocks: what the planner gets to see of it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping

import torch
from torch import nn

from .specs import BlockSpec, ModelSpec, TensorSpec

LoadedAs = Callable[[str, torch.Tensor], tuple[str, int]]
"""(name, tensor of the skeleton) -> (dtype name, bytes) of that tensor once it is loaded."""


def model_spec(
    model: nn.Module,
    no_split: Collection[str] | None = None,
    ties: Mapping[str, str] | None = None,
    loaded_as: LoadedAs | None = None,
) -> ModelSpec:
    """Cut `model` into blocks, in module order, each tensor in exactly one of them.

    Args:
        no_split: class names of modules to keep whole. None: the model's own `_no_split_modules`, or where it names
            none, what its lists repeat.
        ties: tied names that are not one object yet: name -> the name that owns the bytes.
        loaded_as: dtype and bytes of a tensor once loaded, where the skeleton does not know (casts, quantisers).
    """
    return _Cut(model, no_split, dict(ties or {}), loaded_as or as_it_is).spec()


def as_it_is(_name: str, tensor: torch.Tensor) -> tuple[str, int]:
    """A tensor that is loaded with the dtype that the skeleton gives it."""
    return dtype_name(tensor.dtype), tensor.numel() * tensor.element_size()


def dtype_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def blocks_of(model: nn.Module, no_split: Collection[str] | None = None) -> Iterator[tuple[str, nn.Module, bool]]:
    """(name, module, whole) of every block in module order: no-split modules, and owners of what is left over."""
    names = no_split_classes(model) if no_split is None else set(no_split)
    covered: str | None = None
    for name, module in model.named_modules():
        if covered is not None and name.startswith(covered):
            continue
        if name and type(module).__name__ in names and _has_forward(module) and _has_tensors(module, recurse=True):
            covered = f"{name}."
            yield name, module, True
        elif _has_tensors(module, recurse=False):
            yield name, module, False


def no_split_classes(model: nn.Module) -> set[str]:
    """The classes a model asks to keep whole; where it names none, those that its lists repeat."""
    declared = getattr(model, "_no_split_modules", None)
    if declared:
        return set(declared)
    found: set[str] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList | nn.Sequential):
            counts = Counter(type(child) for child in module if any(True for _ in child.children()))
            found |= {kind.__name__ for kind, count in counts.items() if count > 1}
    return found


def _has_forward(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


def _has_tensors(module: nn.Module, recurse: bool) -> bool:
    if any(t is not None for t in (*module._parameters.values(), *module._buffers.values())):
        return True
    return recurse and any(_has_tensors(child, recurse=True) for child in module.children())


def gathers(module: nn.Module) -> bool:
    """Whether this is a table of which a forward reads only some rows, and writes none (`max_norm` rescales rows)."""
    return isinstance(module, nn.Embedding) and module.max_norm is None and not module.sparse


_TOWER = re.compile(r"(^|_)(vision|visual|image|video|audio|speech|qformer|projector|connector)(_|$)")
"""Attribute names of parts that turn a prompt's pictures or sounds into what a language model reads."""


def encoders(model: nn.Module) -> Iterator[str]:
    """Names of the modules that run once per request, while what is beside them runs once per token.

    By structure: an attribute `encoder` beside a `decoder` (a lone encoder is the model itself), and towers and
    projectors beside something that is none.
    """
    for name, module in model.named_modules():
        children = {attribute for attribute, child in module.named_children() if _has_tensors(child, recurse=True)}
        towers = {attribute for attribute in children if _TOWER.search(attribute)}
        if "decoder" in children:
            towers |= children & {"encoder"}
        if towers < children:
            yield from (_join(name, attribute) for attribute in sorted(towers))


class _Cut:
    """One pass over a model; remembers which tensors already belong to a block."""

    def __init__(
        self, model: nn.Module, no_split: Collection[str] | None, ties: dict[str, str], loaded_as: LoadedAs
    ) -> None:
        self.model, self.no_split, self.ties, self.loaded_as = model, no_split, ties, loaded_as
        self.owner: dict[int, str] = {}
        self.once = tuple(f"{name}." for name in encoders(model))
        self.prompt = not any({"encoder", "decoder"} <= set(module._modules) for module in model.modules())

    def spec(self) -> ModelSpec:
        units = list(blocks_of(self.model, self.no_split))
        blocks = tuple(self._block(name, module, whole) for name, module, whole in units)
        return ModelSpec(blocks, self.ties)

    def _block(self, name: str, module: nn.Module, whole: bool) -> BlockSpec:
        if not whole:
            return self._own(name, module)
        parts = tuple(
            self._own(_join(name, below), owner, part_of=name)
            for below, owner in module.named_modules()
            if _has_tensors(owner, recurse=False)
        )
        tensors = tuple(t for part in parts for t in part.tensors)
        borrows = tuple(n for part in parts for n in part.borrows if n not in {t.name for t in tensors})
        return BlockSpec(
            name, tensors, whole=True, parts=parts, borrows=borrows, calls=self._calls(name), prompt=self.prompt
        )

    def _calls(self, name: str) -> int | None:
        return 1 if f"{name}.".startswith(self.once) else None

    def _own(self, name: str, module: nn.Module, part_of: str | None = None) -> BlockSpec:
        tensors, borrows = [], []
        for leaf, tensor, is_buffer in _direct_tensors(module):
            full = _join(name, leaf)
            owner = self.ties.get(full) or self.owner.setdefault(id(tensor), full)
            if owner == full:
                tensors.append(self._tensor(full, tensor, is_buffer))
            else:
                self.ties[full] = owner
                borrows.append(owner)
        return BlockSpec(
            name,
            tuple(tensors),
            whole=False,
            borrows=tuple(borrows),
            gathers=gathers(module),
            part_of=part_of,
            calls=self._calls(part_of or name),
            prompt=self.prompt,
        )

    def _tensor(self, name: str, tensor: torch.Tensor, is_buffer: bool) -> TensorSpec:
        dtype, nbytes = self.loaded_as(name, tensor)
        return TensorSpec(name, nbytes, dtype, tuple(tensor.shape), is_buffer)


def _direct_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor, bool]]:
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield name, parameter, False
    for name, buffer in module._buffers.items():
        if buffer is not None:
            yield name, buffer, True


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix and name else prefix or name
