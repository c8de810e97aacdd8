"""The Diffusers loader for pipelines: one plan and one budget over all components, and what a placed pipeline can do.

The components are described from their configs before anything is loaded, and planned together. Then the library loads
them one by one, each through its own loader, which gets its part of that plan.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import os
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .. import flow, hardware, settings
from ..checkpoint.reader import Reader
from ..composition import joined, part_of
from ..dispatch.attach import attachment_of, check_room, incoming, resident_plan, settle
from ..dispatch.machine import Machine
from ..errors import DeviceMapError, human_bytes
from ..hardware import torch_device
from ..module_tensors import iter_hooks
from ..placed import Placed
from ..registry import Described
from ..seams import AnySeam, PropertySeam, Seam
from ..specs import CPU, LoadRequest, ModelSpec, Plan, TensorSpec
from .calls import default_device_map_for, no_default_device_map, normal_tensors, turn
from .diffusers import open_entries, skip_keys_of
from .diffusers_skeleton import (
    BY_BYTES,
    component_class,
    describe_components,
    describe_pipeline,
    folder_of,
    no_split_of,
    stored_dtype,
)

logger = logging.getLogger(__name__)

_PIPELINES = "diffusers.pipelines.pipeline_utils"
_SINGLE_FILE = "diffusers.loaders.single_file"
_STRATEGY = "balanced"
"""The one strategy that the library lets a pipeline have; it stands for whatever the caller asked for."""

_SHARED = "_hf_bigload_shared"
"""Where a pipeline that was loaded by a plan keeps what it shares, for its copies."""

_NOT_OURS = ("use_flashpack", "quantization_config")
"""Arguments of calls that place the weights in a way of their own."""


@dataclass
class Call:
    """One `DiffusionPipeline.from_pretrained` in progress."""

    device_map: Any
    max_memory: Any
    dtypes: dict[str, Any] | None = None
    """Filled in once the folder is known, where dtypes are to be those of the files."""
    plan: Plan | None = None
    parts: dict[str, Plan] = field(default_factory=dict)
    machine: Machine = field(default_factory=lambda: Machine(Reader(), {}))
    passed: dict[str, nn.Module] = field(default_factory=dict)
    """Components that the caller made."""
    is_default: bool = False
    """The caller gave no device map."""
    held: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    """Given back when the call ends."""
    variant: str | None = None
    use_safetensors: bool | None = None
    unplanned: dict[str, int] = field(default_factory=dict)
    """Bytes of the files of each component that no plan can place."""


_call: contextvars.ContextVar[Call | None] = contextvars.ContextVar("hf_bigload_pipeline_call", default=None)


class PipelinesLoader:
    """Serves `DiffusionPipeline.from_pretrained`, and with it every class of pipelines."""

    name = "diffusers_pipelines"
    library = "diffusers"
    trigger = _PIPELINES

    def seams(self) -> Sequence[AnySeam]:
        pipeline = "DiffusionPipeline"
        return [
            Seam(_PIPELINES, f"{pipeline}.from_pretrained", ("pretrained_model_name_or_path",), from_pretrained),
            Seam(_PIPELINES, "is_accelerate_available", (), is_accelerate_available),
            Seam(_PIPELINES, "_get_pipeline_class", (), get_pipeline_class),
            Seam(_PIPELINES, "_get_final_device_map", ("device_map", "pipeline_class"), get_final_device_map),
            Seam(_PIPELINES, "load_sub_model", ("name", "device_map", "max_memory"), load_sub_model),
            PropertySeam(_PIPELINES, f"{pipeline}._execution_device", execution_device),
            Seam(_PIPELINES, f"{pipeline}.to", (), to),
            Seam(_PIPELINES, f"{pipeline}.reset_device_map", (), reset_device_map),
            Seam(_PIPELINES, f"{pipeline}.remove_all_hooks", (), remove_all_hooks),
            Seam(_PIPELINES, f"{pipeline}.from_pipe", ("pipeline",), from_pipe),
            Seam(_SINGLE_FILE, "FromSingleFileMixin.from_single_file", (), refuse_single_file),
            Seam(_PIPELINES, f"{pipeline}.enable_model_cpu_offload", (), keep_offloading),
            Seam(_PIPELINES, f"{pipeline}.enable_sequential_cpu_offload", (), keep_offloading),
            Seam(_PIPELINES, f"{pipeline}.enable_group_offload", (), enable_group_offload),
        ]

    def describe(self, folder: str, stored: Mapping[str, TensorSpec] | None, dtype: str | None) -> Described | None:
        """The pipeline in `folder`; see `registry.Describes`."""
        return describe_pipeline(folder, dtype)


# ---------------------------------------------------------------- the call


class _Unsupported(Exception):
    """The library lets this pipeline have no device map."""


def from_pretrained(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    given = kwargs.get("device_map")
    device_map = default_device_map_for(kwargs) if given is None else given
    if device_map is None or any(kwargs.get(name) for name in _NOT_OURS):
        return _unplanned(wrapped, args, kwargs)
    call = Call(device_map, kwargs.get("max_memory"), is_default=given is None)
    call.variant, call.use_safetensors = kwargs.get("variant"), kwargs.get("use_safetensors")
    options = {**kwargs, "device_map": _STRATEGY}
    for name in ("dtype", "torch_dtype"):
        if options.get(name) == "auto":
            options[name] = call.dtypes = {"default": None}
    try:
        with call.held, normal_tensors():
            pipeline = _within(call, wrapped, args, options)
            _adopt_passed(call)
    except _Unsupported:
        return _unplanned(wrapped, args, kwargs)
    _remember(pipeline, call)
    return pipeline


def _unplanned(wrapped: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with no_default_device_map():
        return _within(None, wrapped, args, kwargs)


def get_pipeline_class(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A pipeline that loads others has no map of its own, and gets no default one: nothing is loaded by now."""
    call, cls = _call.get(), wrapped(*args, **kwargs)
    if call is not None and call.is_default and getattr(cls, "_load_connected_pipes", False):
        raise _Unsupported
    return cls


def _within(call: Call | None, wrapped: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    token = _call.set(call)
    try:
        return wrapped(*args, **kwargs)
    finally:
        _call.reset(token)


def _remember(pipeline: Any, call: Call) -> None:
    if call.plan is None:
        return
    placed = any(attachment_of(model) is not None for model in models_of(pipeline))
    if not placed and not (isinstance(call.device_map, Mapping) or flow.is_strategy(call.device_map)):
        pipeline.hf_device_map = str(call.device_map)  # whole on the one device that was asked for, as the library says
        return
    pipeline.hf_device_map = {
        name: next(iter(part.device_map.values()), call.plan.main_device) for name, part in call.parts.items()
    }
    models = [model for name, model in pipeline.components.items() if name in {**call.parts, **call.passed}]
    pipeline.__dict__[_SHARED] = shared = Shared(call.plan)
    shared.include(pipeline, models)


def is_accelerate_available(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return True if _call.get() is not None else wrapped(*args, **kwargs)


# ---------------------------------------------------------------- the plan


def get_final_device_map(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The library asks here where each component goes, with all of them known and none of them loaded."""
    call = _call.get()
    if call is None:
        return wrapped(*args, **kwargs)
    call.held.enter_context(turn)  # not before: a download takes its time, and holds no memory
    folder = kwargs["cached_folder"]
    components = _components(call, folder, kwargs["init_dict"], kwargs["passed_class_obj"], kwargs["dtype"])
    specs = describe_components(components, folder, kwargs["pipeline_class"])
    call.passed = {n: model for n, model in kwargs["passed_class_obj"].items() if isinstance(model, nn.Module)}
    others = [name for name in kwargs["init_dict"] if name not in specs and name not in kwargs["passed_class_obj"]]
    sizes = {name: _weight_bytes(os.path.join(folder, name), call.variant) for name in others}
    call.unplanned = {name: size for name, size in sizes.items() if size}
    call.plan = _plan(call, specs, kwargs["pipeline_class"].__name__)
    _warn_unplanned(call.unplanned, call.plan.main_device)
    call.parts = {name: part_of(call.plan, name, hardware.map_value) for name in specs}
    return "auto"


def _warn_unplanned(unplanned: Mapping[str, int], device: str) -> None:
    for name, size in unplanned.items():
        logger.warning(
            "The plan does not reach %s (quantised, or of code unknown here): its %s are loaded whole on %s, and were "
            "taken off the budget of that device.",
            name,
            human_bytes(size),
            device,
        )


def _components(
    call: Call, folder: str, declared: Mapping[str, Any], passed: Mapping[str, Any], dtype: Any
) -> dict[str, tuple[Any, torch.dtype | None]]:
    """Class and dtype of each component that is to be loaded."""
    found = {}
    for name, (library, class_name) in declared.items():
        cls = None if name in passed else component_class(folder, name, library, class_name)
        if cls is None:
            continue
        if call.dtypes is not None:
            stored = stored_dtype(folder_of(folder, name), call.variant, call.use_safetensors)
            call.dtypes[name] = stored or torch.float32
            dtype = call.dtypes
        found[name] = (cls, dtype.get(name, dtype.get("default", torch.float32)) if isinstance(dtype, dict) else dtype)
    return found


def _plan(call: Call, specs: Mapping[str, ModelSpec], title: str) -> Plan:
    request = LoadRequest(device_map=call.device_map, max_memory=_budget(call))
    spec = joined(specs)
    if isinstance(call.device_map, Mapping):
        _warn_unknown(spec, call.device_map)
    return flow.plan_spec(spec, request, BY_BYTES, title)


def _budget(call: Call) -> dict[Any, Any] | None:
    """What may be planned with: without what is held already where that was given, and without what no plan reaches.

    What is free does not count what models that were made before hold.
    """
    given: Mapping[Any, Any] | None = call.max_memory
    if given is None:
        given = settings.current().max_memory
    held = {} if given is None else _held_by(call.passed.values())
    if call.unplanned:
        free = hardware.probe(given)
        main = next((name for name, size in free.devices.items() if size), CPU)
        held[main] = held.get(main, 0) + sum(call.unplanned.values())
        given = {**free.devices, CPU: free.ram} if given is None else given
    return None if given is None else _less(given, held)


def _warn_unknown(spec: ModelSpec, device_map: Mapping[str, Any]) -> None:
    paths = [name for block in spec.blocks for name in (block.name, *(t.name for t in block.tensors))] + [*spec.ties]
    known = {".".join(path.split(".")[:depth]) for path in paths for depth in range(path.count(".") + 2)}
    unknown = [name for name in device_map if name not in known]
    if unknown:
        logger.warning(
            "The device_map names what has no weights that the pipeline's plan could place: %s", ", ".join(unknown)
        )


def _held_by(models: Iterable[nn.Module]) -> dict[str, int]:
    """What models that the caller made hold of each device's memory already."""
    held: dict[str, int] = {}
    for model in models:
        attachment = attachment_of(model)
        used = _held(model) if attachment is None else attachment.plan.used
        for name, size in used.items():
            held[name] = held.get(name, 0) + size
    return held


def _less(max_memory: Mapping[Any, Any], held: Mapping[str, int]) -> dict[Any, Any]:
    """A budget without what is taken of it already."""
    sizes = {key: settings.parse_size(value) for key, value in max_memory.items()}
    return {key: max(0, size - held.get(hardware.memory_key(key), 0)) for key, size in sizes.items()}


def _weight_bytes(folder: str, variant: str | None) -> int:
    """Of a component's own files that are loaded; 0 for one without weights."""
    files = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    found = [file for file in files if file.endswith(".safetensors")] or [f for f in files if f.endswith(".bin")]
    wanted = [file for file in found if variant is not None and f".{variant}" in file]
    chosen = wanted or [file for file in found if file.count(".") == 1] or found
    return sum(os.path.getsize(os.path.join(folder, file)) for file in chosen)


def _held(model: nn.Module) -> dict[str, int]:
    held: dict[str, int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        name = hardware.device_name(tensor.device)
        held[name] = held.get(name, 0) + tensor.numel() * tensor.element_size()
    return held


def load_sub_model(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Each component is loaded by its own loader, by its part of the plan."""
    call = _call.get()
    if call is None or call.plan is None:
        return wrapped(*args, **kwargs)
    part = call.parts.get(kwargs["name"])
    if part is None:  # no model, or one that cannot be planned: whole where the others run
        main = None if call.plan.main_device == CPU else call.plan.main_device
        with no_default_device_map():
            return wrapped(*args, **{**kwargs, "device_map": main, "max_memory": None})
    with flow.sharing(part, call.machine):
        return wrapped(*args, **{**kwargs, "device_map": "auto", "max_memory": None})


def _adopt_passed(call: Call) -> None:
    """What the caller passed resting in RAM stays there, and runs where the others do, from whom its inputs come."""
    if call.plan is None or call.plan.main_device == CPU:
        return
    for model in filter(_rests_in_ram, call.passed.values()):
        keys = skip_keys_of(model)
        request = LoadRequest(
            device_map={"": CPU}, main_device=call.plan.main_device, no_split=no_split_of(model), skip_keys=keys
        )
        plan = flow.plan_model(model, request)
        with flow.sharing(plan, call.machine):
            flow.dispatch(model, plan, Placed(request, None, keys, force_hooks=True, settle_in=open_entries))
        open_entries(model)


def _rests_in_ram(model: nn.Module) -> bool:
    """And is moved by nobody."""
    hooked = any(next(iter(iter_hooks(module)), None) is not None for module in model.modules())
    return set(_held(model)) == {CPU} and not hooked and not getattr(model, "is_quantized", False)


def refuse_single_file(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The library drops the device map of a pipeline in one file, whose components are known once it is read."""
    if kwargs.get("device_map") is not None:
        raise DeviceMapError(
            f"{getattr(instance, '__name__', 'A pipeline')}.from_single_file follows no device_map. Load its models by "
            "their own from_single_file(..., device_map=...), and give them to from_pretrained of a repository with "
            "the other components, together with a device_map for these."
        )
    with no_default_device_map():
        return wrapped(*args, **kwargs)


# ---------------------------------------------------------------- a placed pipeline


def models_of(pipeline: Any) -> list[nn.Module]:
    """The pipeline's components that have weights, each once."""
    return list({id(c): c for c in pipeline.components.values() if isinstance(c, nn.Module)}.values())


def plan_of(pipeline: Any) -> Plan | None:
    """The plan over the components of a pipeline, whoever made it of them; None where none of them is placed by one."""
    return next((shared.plan for shared in _shared_by(pipeline)), None)


@dataclass(eq=False)
class Shared:
    """One plan over several components, which any number of pipelines may be made of."""

    plan: Plan
    models: weakref.WeakSet[nn.Module] = field(default_factory=weakref.WeakSet)
    pipelines: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)
    """Those that were given an `hf_device_map`."""

    def include(self, pipeline: Any, models: Iterable[nn.Module] = ()) -> None:
        self.pipelines.add(pipeline)
        for model in models:
            self.models.add(model)
            _shared.setdefault(model, self)  # one that was passed stays a part of what it was made with, too

    def __deepcopy__(self, memo: dict[int, Any]) -> Shared:
        """For the copies of models and pipelines that are being made; the pipeline is copied before what it keeps."""
        copied = memo[id(self)] = Shared(self.plan)
        models = [memo[id(model)] for model in self.models if id(model) in memo]
        for pipeline in [memo[id(each)] for each in self.pipelines if id(each) in memo]:
            copied.include(pipeline, models)
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing, ()  # a pickled pipeline is unpickled as a plain one


def _nothing() -> None:
    return None


_shared: weakref.WeakKeyDictionary[nn.Module, Shared] = weakref.WeakKeyDictionary()
"""By component: the models themselves carry nothing."""


def _shared_by(pipeline: Any) -> list[Shared]:
    """What the components are part of that are placed still; what the pipeline was loaded by comes first."""
    models = [model for model in models_of(pipeline) if model in _shared]
    placed = [m for m in models if attachment_of(m) is not None or resident_plan(m) is not None]
    own = pipeline.__dict__.get(_SHARED)
    return sorted(dict.fromkeys(_shared[model] for model in placed), key=lambda shared: shared is not own)


def execution_device(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    """Where the pipeline makes latents and embeddings: never where a weight happens to rest."""
    plan = plan_of(instance)
    return wrapped() if plan is None else torch_device(plan.main_device)


def to(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """To a device: all of it, a plain pipeline from then on. To a dtype only: placed as it was."""
    if plan_of(instance) is None:
        return wrapped(*args, **kwargs)
    device = kwargs.get("device") or next((a for a in args if isinstance(a, str | int | torch.device)), None)
    if device is not None:
        _settle(instance, torch.device(device))
        return wrapped(*args, **kwargs)
    device_map, instance.hf_device_map = instance.hf_device_map, None  # the library refuses to cast what has one
    try:
        return wrapped(*args, **kwargs)
    finally:
        instance.hf_device_map = device_map


def reset_device_map(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if plan_of(instance) is None:
        return wrapped(*args, **kwargs)
    return _settle(instance, torch.device(CPU))


def _settle(pipeline: Any, device: torch.device) -> None:
    """All components whole on `device`, or, where they do not fit together, nothing moved.

    Those of other pipelines go with them: half of a plan is none.
    """
    device = torch_device(hardware.device_name(device))
    sets = _shared_by(pipeline)
    pipelines = [pipeline, *(each for shared in sets for each in shared.pipelines)]
    models = {m: None for each in pipelines for m in models_of(each)}
    models |= {model: None for shared in sets for model in shared.models}
    check_room(list({id(tensor): tensor for model in models for tensor in _coming(model, device)}.values()), device)
    for model in models:
        if attachment_of(model) is not None:
            settle(model, device)
        model.to(device)
        _shared.pop(model, None)
    for each in pipelines:
        each.hf_device_map = None


def _coming(model: nn.Module, device: torch.device) -> list[torch.Tensor]:
    if attachment_of(model) is not None:
        return incoming(model, device)
    return [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.device != device]


def remove_all_hooks(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The hooks that move weights stay: without them the pipeline could not run, and its weights stay readable."""
    if plan_of(instance) is None:
        return wrapped(*args, **kwargs)
    logger.warning("The pipeline keeps its hooks, which follow its device_map; reset_device_map() takes them off.")
    return None


def keep_offloading(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What these methods are called for is what the plan does already."""
    plan = plan_of(instance)
    if plan is None:
        return wrapped(*args, **kwargs)
    logger.warning(
        "%s() changes nothing: the components are offloaded already, as the plan of the device_map says, and run on "
        "%s. For the library's own offloading, call reset_device_map() first.",
        getattr(wrapped, "__name__", "This method"),
        plan.main_device,
    )
    return None


def enable_group_offload(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Refused before any component has got a hook of it."""
    if plan_of(instance) is None:
        return wrapped(*args, **kwargs)
    raise DeviceMapError(
        "Group offloading cannot be applied to this pipeline: hf_bigload moves its weights already, as the plan of its "
        "device_map says. Call reset_device_map() first, or load it without a device_map."
    )


def from_pipe(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The new pipeline has the same components, and so the same plan.

    The library casts them, to float32 where no dtype is given: a cast of what is in that dtype already moves nothing.
    """
    pipeline: Any = kwargs["pipeline"] if "pipeline" in kwargs else args[0]
    new = wrapped(*args, **kwargs)
    shared = _shared_by(new)
    if shared and pipeline.hf_device_map is not None:
        new.hf_device_map = dict(pipeline.hf_device_map)
        shared[0].include(new)
    return new
