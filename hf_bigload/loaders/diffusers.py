"""The Diffusers loader for models: `from_pretrained` and `from_single_file` keep the library's config, dtypes and
names, and get their plan, their weights and their dispatch from here. Pipelines: see `diffusers_pipelines`.

Every hook is a pass-through unless the call in progress is ours, which a context variable says: a fresh one for each
call, so that one inside another never inherits the claim.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from .. import flow, settings
from ..checkpoint.index import build_index
from ..dispatch.attach import AlignDevicesHook, attachment_of
from ..dispatch.moving import find_device
from ..errors import DeviceMapError
from ..materialize import Materializer
from ..meta_init import init_empty_weights
from ..module_tensors import iter_hooks
from ..placed import Placed
from ..seams import AnySeam, PropertySeam, Provided, Seam
from ..specs import FileStamp, LoadRequest, Plan
from .calls import default_device_map_for, device, is_only_meta, normal_tensors, turn
from .diffusers_skeleton import no_split_of
from .diffusers_weights import DtypeRule, Loaded, State, load_weights, loaded_as

_MODELING = "diffusers.models.modeling_utils"
_SINGLE_FILE = "diffusers.loaders.single_file_model"
_GROUP_OFFLOADING = "diffusers.hooks.group_offloading"

_NOT_OURS = ("parallel_config", "use_flashpack", "quantization_config")
"""Arguments of calls that place the weights in a way of their own."""

_ENTRIES = ("encode", "decode", "_encode", "get_text_features", "get_image_features")
"""What pipelines call of a component beside its forward."""


@dataclass
class Call:
    """One `from_pretrained` or `from_single_file` in progress."""

    options: Mapping[str, Any]
    claimed: bool = False
    device_map: Any = None
    """As the caller wrote it."""
    rule: DtypeRule | None = None
    plan: Plan | None = None
    request: LoadRequest | None = None
    materializer: Materializer | None = None
    stamps: Mapping[str, FileStamp] = field(default_factory=dict)
    held: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    """Given back when the call ends."""


_call: contextvars.ContextVar[Call | None] = contextvars.ContextVar("hf_bigload_diffusers_call", default=None)


def _ours() -> Call | None:
    call = _call.get()
    return call if call is not None and call.claimed else None


class DiffusersLoader:
    """Serves every class with Diffusers' `ModelMixin.from_pretrained`."""

    name = "diffusers"
    library = "diffusers"
    trigger = _MODELING

    def seams(self) -> Sequence[AnySeam]:
        return [
            Seam(_MODELING, "ModelMixin.from_pretrained", ("pretrained_model_name_or_path",), from_pretrained),
            Seam(_MODELING, "is_accelerate_available", (), is_accelerate_available),
            Seam(_MODELING, "DiffusersAutoQuantizer.from_config", (), quantizer_from_config),
            Seam(_MODELING, "no_init_weights", (), no_init_weights),
            Seam(_MODELING, "load_state_dict", ("checkpoint_file",), load_state_dict),
            Seam(_MODELING, "_determine_device_map", _PLANNED_WITH, determine_device_map),
            Seam(
                _MODELING,
                "ModelMixin._load_pretrained_model",
                ("model", "state_dict", "resolved_model_file", "pretrained_model_name_or_path"),
                load_pretrained_model,
            ),
            *_dispatch_of(_MODELING, sys.modules[_MODELING]),
            Provided(_MODELING, "accelerate", SimpleNamespace(init_empty_weights=init_empty_weights)),
            PropertySeam(_MODELING, "ModelMixin.device", device),
        ]


_PLANNED_WITH = ("model", "device_map", "max_memory", "torch_dtype", "keep_in_fp32_modules", "hf_quantizer")


def _dispatch_of(name: str, module: Any) -> Iterator[AnySeam]:
    """A name of Accelerate's, which the module has only where that is installed."""
    if hasattr(module, "dispatch_model"):
        yield Seam(name, "dispatch_model", ("model",), dispatch_model)
    else:
        yield Provided(name, "dispatch_model", _dispatch)


class SingleFileLoader:
    """Serves `from_single_file` of models, which by itself takes a device map and does not follow it."""

    name = "diffusers_single_file"
    library = "diffusers"
    trigger = _SINGLE_FILE

    def seams(self) -> Sequence[AnySeam]:
        from diffusers.loaders import single_file_model

        mixin = "FromOriginalModelMixin"
        return [
            Seam(_SINGLE_FILE, f"{mixin}.from_single_file", (), from_single_file),
            Seam(_SINGLE_FILE, "_determine_device_map", _PLANNED_WITH, determine_device_map),
            Seam(_SINGLE_FILE, "_expand_device_map", ("device_map",), expand_device_map),
            Seam(_SINGLE_FILE, "_caching_allocator_warmup", ("model",), caching_allocator_warmup),
            Seam(_SINGLE_FILE, "load_model_dict_into_meta", ("model", "state_dict"), load_model_dict_into_meta),
            *_dispatch_of(_SINGLE_FILE, single_file_model),
            Provided(_SINGLE_FILE, "init_empty_weights", init_empty_weights),
        ]


class GroupOffloadingLoader:
    """Keeps group offloading from moving weights that another dispatcher already moves."""

    name = "diffusers_group_offloading"
    library = "diffusers"
    trigger = _GROUP_OFFLOADING

    def seams(self) -> Sequence[AnySeam]:
        check = "_raise_error_if_accelerate_model_or_sequential_hook_present"
        return [Seam(_GROUP_OFFLOADING, check, ("module",), refuse_group_offloading)]


# ---------------------------------------------------------------- the call


def from_pretrained(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    device_map = kwargs.get("device_map")
    if device_map is None:
        device_map = default_device_map_for(kwargs)
        kwargs = kwargs if device_map is None else {**kwargs, "device_map": device_map}
    if device_map is None or is_only_meta(device_map) or any(kwargs.get(name) for name in _NOT_OURS):
        return _unclaimed(wrapped, args, kwargs)
    with _claimed(kwargs, device_map):
        return wrapped(*args, **kwargs)


def _unclaimed(wrapped: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    token = _call.set(None)
    try:
        return wrapped(*args, **kwargs)
    finally:
        _call.reset(token)


@contextlib.contextmanager
def _claimed(options: Mapping[str, Any], device_map: Any) -> Iterator[Call]:
    call = Call(options, claimed=True, device_map=device_map)
    token = _call.set(call)
    try:
        with call.held, normal_tensors():
            yield call
    finally:
        _call.reset(token)


def is_accelerate_available(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return True if _ours() is not None else wrapped(*args, **kwargs)


def no_init_weights(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The library makes its model without weights in here, with functions replaced that all threads share."""
    return wrapped(*args, **kwargs) if _ours() is None else _one_at_a_time(wrapped(*args, **kwargs))


@contextlib.contextmanager
def _one_at_a_time(context: contextlib.AbstractContextManager[Any]) -> Iterator[None]:
    with turn, context:
        yield


def quantizer_from_config(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A quantised checkpoint is placed by the library: its weights cannot be streamed."""
    call = _ours()
    if call is not None:
        call.claimed = False
    return wrapped(*args, **kwargs)


def load_state_dict(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A checkpoint in one file, as where its tensors lie: the library looks at the names, and renames some."""
    call = _ours()
    file = args[0] if args else kwargs["checkpoint_file"]
    if call is None or isinstance(file, Mapping):
        return wrapped(*args, **kwargs)
    index = build_index([file])
    if index.legacy_files:
        return wrapped(*args, **kwargs)
    call.stamps = index.stamps
    return dict(index.entries)


# ---------------------------------------------------------------- the plan


def determine_device_map(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    call = _ours()
    return wrapped(*args, **kwargs) if call is None else _plan(call, *args, **kwargs)


def _plan(
    call: Call,
    model: Any,
    device_map: Any,
    max_memory: Any,
    torch_dtype: torch.dtype | None,
    keep_in_fp32_modules: Sequence[str] = (),
    hf_quantizer: Any = None,
) -> Any:
    call.held.enter_context(turn)
    call.rule = DtypeRule(torch_dtype, tuple(keep_in_fp32_modules or ()))
    request = LoadRequest(
        device_map=device_map,
        max_memory=call.options.get("max_memory"),
        offload_folder=call.options.get("offload_folder") or settings.current().offload_folder,
        no_split=no_split_of(model),
        skip_keys=skip_keys_of(model),
    )
    call.request = request
    call.plan = flow.plan_model(model, request, None, loaded_as(model, call.rule))
    call.materializer = Materializer(call.plan, call.stamps, request.offload_folder)
    return dict(call.plan.device_map)


def skip_keys_of(model: Any) -> tuple[str, ...]:
    keys = getattr(model, "_skip_keys", None) or ()
    return (keys,) if isinstance(keys, str) else tuple(keys)


# ---------------------------------------------------------------- the weights


def load_pretrained_model(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    call = _ours()
    return wrapped(*args, **kwargs) if call is None else _load(call, *args, **kwargs)


def _load(
    call: Call,
    model: Any,
    state_dict: State | None,
    resolved_model_file: Sequence[str],
    pretrained_model_name_or_path: Any,
    loaded_keys: Sequence[str],
    **_: Any,
) -> Any:
    assert call.materializer is not None and call.rule is not None
    source = f"The checkpoint of {pretrained_model_name_or_path}"
    state = _of_shards(call, resolved_model_file) if state_dict is None else state_dict
    found = load_weights(model, state, call.rule, call.materializer, source)
    _warn_of_unexpected(model, found, source)
    return model, found.missing, found.unexpected, [], None, []


def _of_shards(call: Call, files: Sequence[str]) -> State:
    assert call.materializer is not None
    index, in_memory = call.materializer.with_legacy_files(build_index(files))
    call.materializer.stamp(index.stamps)
    return {**index.entries, **in_memory}


def _warn_of_unexpected(model: Any, found: Loaded, source: str) -> None:
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    unknown = [name for name in found.unexpected if not any(re.search(p, name) for p in ignored)]
    found.unexpected[:] = unknown
    if unknown:
        logging.getLogger(_MODELING).warning(
            "%s has weights that %s does not have, which were not used: %s",
            source,
            type(model).__name__,
            ", ".join(unknown),
        )


# ---------------------------------------------------------------- the dispatch


def dispatch_model(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return wrapped(*args, **kwargs) if _ours() is None else _dispatch(*args, **kwargs)


def _dispatch(model: Any, **_: Any) -> Any:
    call = _ours()
    if call is None or call.plan is None:
        raise DeviceMapError("A device_map is followed while hf_bigload is enabled, or with accelerate installed.")
    assert call.request is not None
    flow.dispatch(
        model, call.plan, Placed(call.request, call.materializer, skip_keys_of(model), settle_in=open_entries)
    )
    if attachment_of(model) is not None:
        open_entries(model)
    elif not (isinstance(call.device_map, Mapping) or flow.is_strategy(call.device_map)):
        del model.hf_device_map  # whole on the one device that was asked for: a plain model, as the library has it
    return model


def open_entries(model: nn.Module) -> None:
    """Have what pipelines call of a component beside its forward go through the hook of the whole, as that does.

    The library fires `pre_forward` of a hook there, and nothing when the call ends.
    """
    if not any(isinstance(hook, AlignDevicesHook) for hook in iter_hooks(model)):
        return
    for name in _ENTRIES:
        if hasattr(type(model), name):
            model.__dict__[name] = functools.partial(_enter, model, name)


def _enter(model: nn.Module, name: str, *args: Any, **kwargs: Any) -> Any:
    method = getattr(type(model), name).__get__(model)
    for hook in iter_hooks(model):
        if isinstance(hook, AlignDevicesHook):
            method = functools.partial(_within, hook, model, method)
    output, device = method(*args, **kwargs), find_device([args, kwargs])
    if device is not None:
        for each in output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else ():
            _send_distribution(each, device)
    return output


def _send_distribution(value: Any, device: torch.device) -> None:
    """What an encoder answers with is no tensor and has no `to`: its tensors go back to where the inputs came from."""
    if type(value).__name__.endswith("Distribution"):
        for name, tensor in vars(value).items():
            if isinstance(tensor, torch.Tensor):
                setattr(value, name, tensor.to(device))


def _within(hook: AlignDevicesHook, model: nn.Module, method: Any, *args: Any, **kwargs: Any) -> Any:
    return hook.run(model, method, args, kwargs)


# ---------------------------------------------------------------- single files


def from_single_file(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    given = kwargs.get("device_map")
    device_map = default_device_map_for(kwargs) if given is None else given
    if device_map is None or is_only_meta(device_map) or any(kwargs.get(name) for name in _NOT_OURS):
        return _unclaimed(wrapped, args, kwargs)
    with _claimed(kwargs, device_map):
        planned = flow.is_strategy(device_map)
        normal = device_map if planned else flow.as_map(device_map)
        options = {name: value for name, value in kwargs.items() if name not in ("max_memory", "offload_folder")}
        return wrapped(*args, **{**options, "device_map": normal})


def expand_device_map(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return wrapped(*args, **kwargs) if _ours() is None else {}


def caching_allocator_warmup(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Takes as much of a device as the model has, at once: what streams needs no such room."""
    return wrapped(*args, **kwargs) if _ours() is None else None


def load_model_dict_into_meta(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    call = _ours()
    if call is None or call.materializer is None or call.rule is None:
        return wrapped(*args, **kwargs)
    model, state = [*args, *(kwargs[name] for name in ("model", "state_dict") if name in kwargs)][:2]
    load_weights(model, state, call.rule, call.materializer, "The single file")
    return None, None


# ---------------------------------------------------------------- group offloading


def refuse_group_offloading(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    module = args[0] if args else kwargs["module"]
    for name, each in module.named_modules():
        if attachment_of(each) is not None or any(isinstance(hook, AlignDevicesHook) for hook in iter_hooks(each)):
            raise DeviceMapError(
                f"Group offloading cannot be applied to {type(module).__name__}: hf_bigload moves the weights of "
                f"{name or 'the whole model'!r} already, as the plan of its device_map says. Bring it to one device "
                'first (`.to("cpu")`, or `reset_device_map()` of the pipeline), or load it without a device_map.'
            )
    return wrapped(*args, **kwargs)
