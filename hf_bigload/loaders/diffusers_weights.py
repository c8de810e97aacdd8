"""A Diffusers checkpoint into a Diffusers skeleton: the library's dtypes and names, our reads."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import WeightsMismatchError
from ..materialize import Materializer
from ..skeleton import LoadedAs, dtype_name
from ..specs import TensorEntry

State = Mapping[str, "TensorEntry | torch.Tensor"]
"""A checkpoint by the names of the model's weights: where each lies in a file, or, where it has no offset, itself."""

_SHOWN = 8
"""Names in an error, at most."""


@dataclass(frozen=True)
class DtypeRule:
    """In which dtype a weight is loaded: as `ModelMixin.from_pretrained` has it without a device map."""

    dtype: torch.dtype | None
    """None: as the skeleton has it."""
    kept_in_fp32: Collection[str] = ()
    """Parts of dotted names; what is below a module of such a name stays in fp32 whatever the dtype."""

    def __call__(self, name: str, stored: torch.dtype, skeleton: torch.dtype) -> torch.dtype:
        if self.dtype is None:
            return skeleton
        if not stored.is_floating_point:
            return stored
        return torch.float32 if any(part in self.kept_in_fp32 for part in name.split(".")) else self.dtype


def loaded_as(model: nn.Module, rule: DtypeRule) -> LoadedAs:
    """Dtype and bytes of each weight of a skeleton once loaded. What no checkpoint holds stays as it was made."""
    stored = model.state_dict().keys()

    def loaded(name: str, tensor: torch.Tensor) -> tuple[str, int]:
        dtype = rule(name, tensor.dtype, tensor.dtype) if name in stored else tensor.dtype
        return dtype_name(dtype), tensor.numel() * dtype.itemsize

    return loaded


@dataclass
class Loaded:
    """What a load found: names as the library's `output_loading_info` gives them."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)


def load_weights(model: nn.Module, state: State, rule: DtypeRule, materializer: Materializer, source: str) -> Loaded:
    """Fill the skeleton `model` from `state`; each weight rests where the plan says. `source` is for errors.

    A buffer that the checkpoint lacks keeps the value that its module gave it.

    Raises:
        WeightsMismatchError: the checkpoint lacks parameters, or has some in other shapes. Nothing was loaded.
        CheckpointError, SpillError, DtypeError: see `Materializer.load`.
    """
    skeleton = model.state_dict(keep_vars=True)
    found = Loaded([name for name in skeleton if name not in state], [name for name in state if name not in skeleton])
    _check_complete(model, skeleton, found.missing, source)
    _check_shapes(model, skeleton, state, source)
    try:
        for name, sharing in _each_once(skeleton, state):
            value = _brought(name, state[name], skeleton[name], rule, materializer)
            _set(model, [name, *sharing], skeleton[name], value)
        materializer.finish()
    except BaseException:
        materializer.abandon()
        raise
    return found


def _each_once(skeleton: Mapping[str, torch.Tensor], state: State) -> Iterator[tuple[str, list[str]]]:
    """(name in the checkpoint, other names of the same weight) of every weight that the checkpoint has."""
    names: dict[int, list[str]] = {}
    for name, tensor in skeleton.items():
        names.setdefault(id(tensor), []).append(name)
    for group in names.values():
        stored = [name for name in group if name in state]
        if stored:  # the last one read is the one that stays, as when a state dict is loaded
            yield stored[-1], [name for name in group if name != stored[-1]]


def _brought(
    name: str,
    stored: TensorEntry | torch.Tensor,
    skeleton: torch.Tensor,
    rule: DtypeRule,
    materializer: Materializer,
) -> torch.Tensor:
    if isinstance(stored, torch.Tensor):
        return materializer.place(name, stored, rule(name, stored.dtype, skeleton.dtype))
    return materializer.load(name, stored, rule(name, getattr(torch, stored.dtype), skeleton.dtype))


def _set(model: nn.Module, names: list[str], old: torch.Tensor, value: torch.Tensor) -> None:
    new: Any = nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value
    for name in names:
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        tensors = owner._parameters if isinstance(old, nn.Parameter) else owner._buffers
        tensors[leaf] = new


def _check_complete(model: nn.Module, skeleton: Mapping[str, Any], missing: list[str], source: str) -> None:
    loaded = {id(tensor) for name, tensor in skeleton.items() if name not in missing}
    never = [name for name in missing if isinstance(skeleton[name], nn.Parameter) and id(skeleton[name]) not in loaded]
    if never:
        raise WeightsMismatchError(
            f"{source} lacks {len(never)} of the {len(skeleton)} weights of {type(model).__name__}: {_some(never)}. "
            "Nothing would ever give them values. Load the checkpoint that this config belongs to (another variant or "
            "revision?), or without a device_map and with low_cpu_mem_usage=False, which initialises them anew."
        )


def _check_shapes(model: nn.Module, skeleton: Mapping[str, torch.Tensor], state: State, source: str) -> None:
    wrong = [
        f"{name} is {tuple(state[name].shape)}, and {tuple(tensor.shape)} in the model"
        for name, tensor in skeleton.items()
        if name in state and tuple(state[name].shape) != tuple(tensor.shape)
    ]
    if wrong:
        raise WeightsMismatchError(
            f"{source} has {len(wrong)} weights in other shapes than {type(model).__name__}: {_some(wrong)}. Load it "
            "with the config it belongs to, or without a device_map and with low_cpu_mem_usage=False and "
            "ignore_mismatched_sizes=True, which initialises them anew."
        )


def _some(items: list[str]) -> str:
    return f"{', '.join(items[:_SHOWN])}{', ...' if len(items) > _SHOWN else ''}"
