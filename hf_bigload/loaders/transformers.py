"""The Transformers loader: `from_pretrained` keeps the library's config, dtype, quantiser and generation code, and
gets its plan, its weights and its dispatch from here.

Every hook is a pass-through unless the call in progress is ours. Which call that is, a context variable says: a fresh
one for each `from_pretrained`, so that a call inside another one never inherits the claim.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import modeling_utils
from transformers.generation import utils as generation_utils

from .. import flow, settings
from ..checkpoint.index import SAFETENSORS_SUFFIX, build_index, check_stays_inside
from ..checkpoint.spill import SpillFolder
from ..dispatch.attach import AlignDevicesHook, attachment_of, map_hidden
from ..dispatch.hooks import ModelHook, add_hook_to_module
from ..errors import QuantizedOffloadError
from ..materialize import Materializer
from ..placed import Placed
from ..registry import Described
from ..seams import AnySeam, PropertySeam, Provided, Seam
from ..skeleton import dtype_name
from ..specs import DISK, LoadRequest, Plan, TensorSpec, Workload
from ..trace import Request
from .calls import default_device_map, device, is_only_meta, normal_tensors, turn
from .transformers_caches import remember
from .transformers_requests import request
from .transformers_skeleton import describe, loaded_as, ties
from .transformers_weights import Source, load_weights, reverted_in_groups

_MODELING = "transformers.modeling_utils"
_GENERATION = "transformers.generation.utils"
_INTEGRATION = "transformers.integrations.accelerate"

_PARALLEL_ARGUMENTS = ("tp_plan", "tp_size", "device_mesh", "distributed_config")


@dataclass
class Call:
    """One `from_pretrained` in progress."""

    parallel: bool
    options: Mapping[str, Any]
    claimed: bool = False
    dtype: torch.dtype | None = None
    by_map: bool = True
    """A strategy or a map is followed, not a single device."""
    plan: Plan | None = None
    request: LoadRequest | None = None
    materializer: Materializer | None = None
    files: Sequence[str] = ()
    loaded: bool = False
    dispatched: bool = False
    held: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    """Given back when the call ends."""


_call: contextvars.ContextVar[Call | None] = contextvars.ContextVar("hf_bigload_transformers_call", default=None)


def _ours() -> Call | None:
    call = _call.get()
    return call if call is not None and call.claimed else None


class TransformersLoader:
    """Serves every class with Transformers' `from_pretrained`."""

    name = "transformers"
    library = "transformers"
    trigger = _MODELING

    def seams(self) -> Sequence[AnySeam]:
        model = "PreTrainedModel"
        return [
            Seam(_MODELING, f"{model}.from_pretrained", ("pretrained_model_name_or_path",), from_pretrained),
            Seam(_MODELING, "check_and_set_device_map", ("device_map",), check_and_set_device_map),
            Seam(_INTEGRATION, "is_accelerate_available", (), is_accelerate_available),
            Seam(_MODELING, f"{model}.get_init_context", ("dtype",), get_init_context),
            Seam(_MODELING, "_get_resolved_checkpoint_files", (), resolved_checkpoint_files),
            Seam(_MODELING, "_get_device_map", ("model", "device_map", "max_memory", "hf_quantizer"), get_device_map),
            Seam(
                _MODELING,
                f"{model}._load_pretrained_model",
                ("model", "state_dict", "checkpoint_files", "load_config"),
                load_pretrained_model,
            ),
            Seam(_MODELING, "accelerate_dispatch", ("model", "hf_quantizer", "device_map"), accelerate_dispatch),
            Seam(_MODELING, "revert_weight_conversion", ("model", "state_dict"), revert_weight_conversion),
            PropertySeam(_MODELING, "ModuleUtilsMixin.device", device),
            *_hook_names(),
        ]

    def describe(self, folder: str, stored: Mapping[str, TensorSpec] | None, dtype: str | None) -> Described | None:
        """The model of the config in `folder`; see `registry.Describes`."""
        return describe(folder, stored, dtype)

    def request(self, model: Any, workload: Workload) -> Request | None:
        """What `generate` calls; see `registry.Traces`."""
        return request(model, workload)


def _hook_names() -> Iterator[AnySeam]:
    """Names of Accelerate's that these modules have only where it is installed, and use for any `hf_device_map`."""
    for module, name in ((modeling_utils, "add_hook_to_module"), (generation_utils, "add_hook_to_module")):
        if hasattr(module, name):
            yield Seam(module.__name__, name, ("module", "hook"), add_hook)
        else:
            yield Provided(module.__name__, name, add_hook_to_module)
    yield Provided(_GENERATION, "AlignDevicesHook", AlignDevicesHook)


# ---------------------------------------------------------------- the call


def from_pretrained(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    default = default_device_map()
    if kwargs.get("device_map") is None and default is not None and not _is_parallel(kwargs):
        kwargs = {**kwargs, "device_map": default}
    call = Call(parallel=_is_parallel(kwargs), options=kwargs)
    token = _call.set(call)
    try:
        with call.held, normal_tensors():
            result = wrapped(*args, **kwargs)
            if call.claimed and call.plan is not None:
                _finish(call, result[0] if isinstance(result, tuple) else result)
        return result
    finally:
        _call.reset(token)


def _is_parallel(kwargs: Mapping[str, Any]) -> bool:
    return any(kwargs.get(name) is not None for name in _PARALLEL_ARGUMENTS)


def check_and_set_device_map(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The library settles here which device map the call has; a map means that the call is ours."""
    call = _call.get()
    if call is None or call.parallel or _sharded_training():
        return wrapped(*args, **kwargs)
    call.claimed = True  # before the library asks whether accelerate is there
    try:
        device_map = wrapped(*args, **kwargs)
    except BaseException:
        call.claimed = False
        raise
    call.claimed = device_map is not None and not is_only_meta(device_map)
    return device_map


def _sharded_training() -> bool:
    return bool(modeling_utils.is_deepspeed_zero3_enabled() or modeling_utils.is_fsdp_enabled())


def is_accelerate_available(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return True if _ours() is not None else wrapped(*args, **kwargs)


def get_init_context(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The library builds on meta already, and allocates nothing; what the plan needs from here is the dtype.

    From here on our calls take turns: the library keeps all threads from tying weights while it builds a model, and
    a plan has to see the memory that the one before took.
    """
    call = _ours()
    if call is not None:
        call.held.enter_context(turn)
        call.dtype = kwargs.get("dtype", args[0] if args else None)
    return wrapped(*args, **kwargs)


def resolved_checkpoint_files(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the call loads from: the plan looks into the headers."""
    resolved = wrapped(*args, **kwargs)
    call = _ours()
    if call is not None:
        call.files = resolved[0] or ()
    return resolved


# ---------------------------------------------------------------- the plan


def get_device_map(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    call = _ours()
    if call is None:
        return wrapped(*args, **kwargs)
    return _plan(call, *args, **kwargs)


def _plan(call: Call, model: Any, device_map: Any, max_memory: Any, hf_quantizer: Any) -> dict[str, Any]:
    if hf_quantizer is not None and max_memory is not None:
        max_memory = hf_quantizer.adjust_max_memory(dict(max_memory))
    request = LoadRequest(
        device_map=device_map,
        max_memory=max_memory,
        offload_folder=call.options.get("offload_folder") or settings.current().offload_folder,
        offload_buffers=bool(call.options.get("offload_buffers")),
        skip_keys=_skip_keys(model),
    )
    call.request = request
    ties = _ties(model, call.files)
    call.by_map = isinstance(device_map, str) or isinstance(call.options.get("device_map"), Mapping)
    call.plan = flow.plan_model(model, request, ties, _loaded_as(model, call, hf_quantizer))
    if hf_quantizer is not None:
        return _quantized_map(call.plan, hf_quantizer)
    call.materializer = Materializer(call.plan, offload_folder=request.offload_folder)
    return {name: call.materializer.home_of(name) for name in _tensor_names(model)}


def _ties(model: Any, files: Sequence[str]) -> dict[str, str]:
    if not getattr(model, "all_tied_weights_keys", None):
        return {}  # no header needs to be read
    return ties(model, build_index([path for path in files if path.endswith(SAFETENSORS_SUFFIX)]))


def _tensor_names(model: nn.Module) -> list[str]:
    return [name for name, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())]


def _skip_keys(model: Any) -> tuple[str, ...]:
    keys = getattr(model, "_skip_keys_device_placement", None) or ()
    return (keys,) if isinstance(keys, str) else tuple(keys)


def _loaded_as(model: Any, call: Call, hf_quantizer: Any) -> Any:
    if hf_quantizer is not None:
        return lambda name, tensor: (
            dtype_name(tensor.dtype),
            int(tensor.numel() * hf_quantizer.param_element_size(model, name, tensor)),
        )
    return loaded_as(model, call.dtype)


def _quantized_map(plan: Plan, hf_quantizer: Any) -> dict[str, Any]:
    if plan.streams:
        method = getattr(hf_quantizer.quantization_config, "quant_method", "quantised")
        raise QuantizedOffloadError(
            f"The plan for this {getattr(method, 'value', method)} checkpoint would stream weights to "
            f"{plan.main_device} (device map {dict(plan.device_map)}), and quantised weights cannot be streamed yet. "
            "Give it more max_memory, choose a smaller model, or load it unquantised."
        )
    device_map = dict(plan.device_map)
    hf_quantizer.validate_environment(device_map=device_map)
    return device_map


# ---------------------------------------------------------------- the weights


def load_pretrained_model(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _load(wrapped, *args, **kwargs)


def _load(
    wrapped: Any,
    model: Any,
    state_dict: Any,
    checkpoint_files: list[str] | None,
    load_config: Any,
    expected_keys: Any = None,
) -> Any:
    call = _ours()
    if call is None or call.materializer is None or call.loaded:  # loaded already: what comes now is an adapter
        return wrapped(model, state_dict, checkpoint_files, load_config, expected_keys)
    call.loaded = True
    index = f"The index in {load_config.pretrained_model_name_or_path}"
    check_stays_inside(index, (load_config.sharded_metadata or {}).get("weight_map", {}))
    source = Source.open(state_dict, checkpoint_files, call.materializer)
    call.materializer.stamp(source.index.stamps)
    return load_weights(model, source, load_config, call.materializer), None


# ---------------------------------------------------------------- the dispatch


def accelerate_dispatch(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    call = _ours()
    if call is None or call.plan is None:
        return wrapped(*args, **kwargs)
    _dispatch(call, kwargs.get("model", args[0] if args else None))
    return None


def _finish(call: Call, model: Any) -> None:
    """The library dispatches only what is on several devices; a plan on one is finished here."""
    if not call.dispatched:
        _dispatch(call, model)


def _dispatch(call: Call, model: Any) -> None:
    assert call.plan is not None
    call.dispatched = True
    assert call.request is not None
    placed = Placed(call.request, call.materializer, _skip_keys(model), settle_in=_settle_in, remember=remember)
    flow.dispatch(model, call.plan, placed)
    if attachment_of(model) is None and not call.by_map:
        del model.hf_device_map  # whole on the one device that was asked for: a plain model, as the library has it
    else:
        _settle_in(model)


# ---------------------------------------------------------------- a dispatched model in the library's hands


def add_hook(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Hooks of ours are attached by us. One that would only send outputs back where inputs came from has nothing to do
    on a module that moves none."""
    module, hook = [*args, *(kwargs[k] for k in ("module", "hook") if k in kwargs)][:2]
    if isinstance(hook, ModelHook):
        return add_hook_to_module(module, hook, append=bool(kwargs.get("append", False)))
    if not any("_hf_hook" in each.__dict__ for each in module.modules()):
        return module
    return wrapped(*args, **kwargs)


def revert_weight_conversion(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """For a model larger than RAM, the converted weights go through a file on their way to the saved shards."""
    model, state_dict = [*args, *(kwargs[k] for k in ("model", "state_dict") if k in kwargs)]
    attachment = attachment_of(model)
    if attachment is None or DISK not in attachment.plan.devices:
        return wrapped(*args, **kwargs)
    shelf = Materializer(_everything_on_disk(attachment.plan))
    reverted = reverted_in_groups(wrapped, model, state_dict, shelf.place)
    return KeptWith(reverted, shelf.keep_alive)


class KeptWith(dict[str, torch.Tensor]):
    """A state dict that keeps alive the file its tensors are mapped from."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], keep_alive: tuple[SpillFolder, ...]) -> None:
        super().__init__(tensors)
        self.keep_alive = keep_alive


def _everything_on_disk(plan: Plan) -> Plan:
    return Plan((), {}, DISK, plan.budget, {}, {})


# ---------------------------------------------------------------- what a device map would lead astray


def _settle_in(model: Any) -> None:
    """Have `model` go on working with a device map that the library takes for Accelerate's, also after `disable`."""
    for name, context in (
        ("save_pretrained", map_hidden),  # else it converts shard by shard: wrong for weights that several shards make
        ("load_adapter", map_hidden),  # else it offloads the adapter
        ("resize_token_embeddings", _hooks_attached_here),
    ):
        model.__dict__[name] = functools.partial(_call_within, context, model, name)
    if model.config.is_encoder_decoder and model.can_generate():
        encoder = model.get_encoder()  # `generate` gives it a hook of Accelerate's, unless it has one
        if "_hf_hook" not in encoder.__dict__:
            add_hook_to_module(encoder, AlignDevicesHook())


def _call_within(context: Any, model: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    with context(model):
        return getattr(type(model), name).__get__(model)(*args, **kwargs)


_attaching = threading.RLock()


@contextlib.contextmanager
def _hooks_attached_here(model: nn.Module) -> Iterator[None]:
    """Hooks of ours that the library carries over to a new module are attached by us.

    The files of the library and of a model have `add_hook_to_module` from Accelerate, or not at all.
    """
    modules = {sys.modules[cls.__module__] for cls in type(model).__mro__ if cls.__module__ in sys.modules}
    with _attaching:
        theirs = {m: vars(m).get("add_hook_to_module") for m in modules if hasattr(m, "is_accelerate_available")}
        for module, original in theirs.items():
            vars(module)["add_hook_to_module"] = functools.partial(_attach, original)
        try:
            yield
        finally:
            for module, original in theirs.items():
                del vars(module)["add_hook_to_module"]
                if original is not None:
                    vars(module)["add_hook_to_module"] = original


def _attach(theirs: Any, module: nn.Module, hook: Any, append: bool = False) -> nn.Module:
    if isinstance(hook, ModelHook):
        return add_hook_to_module(module, hook, append)
    return theirs(module, hook, append)
