"""The functions of Hugging Face's guide *Loading big models into memory*, for any `nn.Module`, under their names.

Changing the import line is the whole migration. What differs: no offload folder is ever demanded, weights stay real
tensors after a dispatch, and tensors on disk are read from the checkpoint itself.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from . import flow
from .checkpoint.index import build_index, checkpoint_files, open_checkpoint
from .checkpoint.offload_folder import folder_index, offload_state_dict
from .device_map import get_balanced_memory, infer_auto_device_map
from .dispatch.attach import attachment_of, detach
from .dispatch.hooks import CpuOffload, UserCpuOffloadHook, add_hook_to_module
from .errors import CheckpointError, OffloadedWeightError
from .materialize import Materializer
from .meta_init import init_empty_weights, init_on_device
from .module_tensors import as_device, as_dtype
from .placed import Placed
from .skeleton import no_split_classes
from .specs import CPU, DISK, CheckpointIndex, LoadRequest, Plan, TensorEntry

__all__ = [
    "cpu_offload",
    "cpu_offload_with_hook",
    "disk_offload",
    "dispatch_model",
    "get_balanced_memory",
    "infer_auto_device_map",
    "init_empty_weights",
    "init_on_device",
    "load_checkpoint_and_dispatch",
    "load_checkpoint_in_model",
    "load_state_dict",
]

logger = logging.getLogger(__name__)

PathLike = str | os.PathLike[str]
Classes = str | Sequence[str] | None
ModelT = TypeVar("ModelT", bound=nn.Module)

_loaded: weakref.WeakKeyDictionary[nn.Module, Materializer] = weakref.WeakKeyDictionary()
"""Models that `load_checkpoint_in_model` filled and `dispatch_model` has not seen yet: where their weights rest."""


# ---------------------------------------------------------------- loading


def load_checkpoint_and_dispatch(
    model: ModelT,
    checkpoint: PathLike,
    device_map: Any = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    no_split_module_classes: Classes = None,
    offload_folder: PathLike | None = None,
    offload_buffers: bool = False,
    dtype: str | torch.dtype | None = None,
    offload_state_dict: bool | None = None,
    skip_keys: Classes = None,
    preload_module_classes: Classes = None,
    force_hooks: bool = False,
    strict: bool = False,
    full_state_dict: bool = True,
    broadcast_from_rank0: bool = False,
) -> ModelT:
    """Load a checkpoint into `model` (on meta, usually) as a plan says, and make it run over that plan.

    Args:
        checkpoint: a weights file, an index (`.json`) of shards, or a folder with one of them.
        device_map: "auto", "balanced", "balanced_low_0", "sequential", a device, or a map from module names to
            devices, "cpu" or "disk". None: load only.
        max_memory: bytes (or "10GiB") by accelerator index or "cpu": what the plan may use, ring included.
        no_split_module_classes: names of classes to keep whole; by default the model's own, or what its lists repeat.
        offload_folder: where converted weights of the disk tier go; a managed cache if none is given.
        offload_buffers: buffers of offloaded blocks are offloaded, too.
        dtype: floating weights are cast to it; None: to the dtypes the model was built with.
        offload_state_dict: accepted for compatibility: nothing is ever held twice in RAM.
        skip_keys: keyword arguments and outputs that are not moved between devices.
        preload_module_classes: further classes whose weights come together.
        force_hooks: hook the model even if it rests whole on one device.
        strict: raise if the checkpoint lacks weights of the model, or has others.
        full_state_dict, broadcast_from_rank0: see `load_checkpoint_in_model`.

    Raises:
        CheckpointError: the checkpoint is damaged, or none of it fits the model.
        BudgetError, DeviceMapError: see `flow.plan_model`.
    """
    if device_map is None:
        load_checkpoint_in_model(
            model, checkpoint, dtype=dtype, strict=strict,
            full_state_dict=full_state_dict, broadcast_from_rank0=broadcast_from_rank0,
        )  # fmt: skip
        return model
    request = _request(
        model, device_map, offload_folder, offload_buffers, no_split_module_classes, preload_module_classes, max_memory
    )
    dtype_of = _dtype_rule(model, dtype)
    plan = flow.plan_model(model, request, loaded_as=_loaded_as(dtype_of))
    materializer = Materializer(plan, offload_folder=request.offload_folder)
    _fill(model, open_checkpoint(checkpoint), materializer, dtype_of, strict)
    return flow.dispatch(model, plan, Placed(request, materializer, _names(skip_keys), force_hooks))


def load_checkpoint_in_model(
    model: nn.Module,
    checkpoint: PathLike,
    device_map: Any = None,
    offload_folder: PathLike | None = None,
    dtype: str | torch.dtype | None = None,
    offload_state_dict: bool = False,
    offload_buffers: bool = False,
    keep_in_fp32_modules: Sequence[str] | None = None,
    offload_8bit_bnb: bool = False,
    strict: bool = False,
    full_state_dict: bool = True,
    broadcast_from_rank0: bool = False,
) -> None:
    """Load a checkpoint into `model`, each weight to where `device_map` says; `dispatch_model` then makes it run.

    Args:
        device_map: None loads into the parameters that the model has, and to the CPU where they are on meta.
        keep_in_fp32_modules: modules that stay in fp32 when `dtype` is fp16.
        offload_8bit_bnb: not supported: quantised weights are loaded by their library.
        broadcast_from_rank0: only the first process of a process group reads; the others receive (with
            `full_state_dict`, whole tensors).

    The other arguments are those of `load_checkpoint_and_dispatch`.
    """
    if offload_8bit_bnb:
        raise OffloadedWeightError(
            "offload_8bit_bnb: 8-bit weights are made by the quantiser's own loading, which this function replaces. "
            "Load the model with its library's from_pretrained and a quantization_config."
        )
    if broadcast_from_rank0:
        _load_from_first_rank(model, checkpoint, strict, full_state_dict)
        return
    folder = None if offload_folder is None else os.fspath(offload_folder)
    dtype_of = _dtype_rule(model, dtype, keep_in_fp32_modules or ())
    request = LoadRequest(device_map={"": CPU} if device_map is None else device_map, offload_buffers=offload_buffers)
    plan = flow.plan_model(model, request, loaded_as=_loaded_as(dtype_of))
    materializer = Materializer(plan, offload_folder=folder)
    _fill(model, open_checkpoint(checkpoint), materializer, dtype_of, strict, in_place=device_map is None)
    if device_map is not None:
        _loaded[model] = materializer


def load_state_dict(checkpoint_file: PathLike, device_map: Mapping[str, Any] | None = None) -> dict[str, torch.Tensor]:
    """The tensors of one weights file by name, on the devices of `device_map`, or on the CPU ("disk" included)."""
    index = build_index([os.fspath(checkpoint_file)])
    whole = Materializer(Plan((), {}, CPU, {}, {}, {}), index.stamps)
    index, in_memory = whole.with_legacy_files(index)
    tensors = {name: whole.source(entry) for name, entry in index.entries.items()} | in_memory
    if device_map is None:
        return tensors
    devices = {name: device for name, device in device_map.items() if device != DISK}
    return {name: tensor.to(_device_for(devices, name)) for name, tensor in tensors.items()}


def _device_for(device_map: Mapping[str, Any], name: str) -> torch.device:
    covered = name
    while covered and covered not in device_map:
        covered = covered.rpartition(".")[0]
    return as_device(device_map.get(covered, CPU))


def _load_from_first_rank(model: nn.Module, checkpoint: PathLike, strict: bool, full_state_dict: bool) -> None:
    from torch import distributed
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    tensors: dict[str, Any] = {}
    if distributed.get_rank() == 0:
        for path in checkpoint_files(checkpoint):
            tensors.update(load_state_dict(path))
    options = StateDictOptions(full_state_dict=full_state_dict, strict=strict, broadcast_from_rank0=True)
    set_model_state_dict(model, tensors, options=options)


def _request(
    model: nn.Module,
    device_map: Any,
    offload_folder: PathLike | None = None,
    offload_buffers: bool = False,
    no_split: Classes = None,
    preload: Classes = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    main_device: Any = None,
) -> LoadRequest:
    classes = None if no_split is None and not preload else (*(_names(no_split) or no_split_classes(model)),)
    return LoadRequest(
        device_map=device_map,
        max_memory=max_memory,
        offload_folder=None if offload_folder is None else os.fspath(offload_folder),
        offload_buffers=offload_buffers,
        no_split=None if classes is None else (*classes, *_names(preload)),
        main_device=main_device,
    )


def _names(names: Classes) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names or ())


DtypeOf = Callable[[str, torch.Tensor], torch.dtype]


def _dtype_rule(model: nn.Module, dtype: str | torch.dtype | None, keep_in_fp32: Sequence[str] = ()) -> DtypeOf:
    """What dtype each of the model's tensors is loaded in."""
    target = None if dtype is None else as_dtype(dtype)

    def rule(name: str, tensor: torch.Tensor) -> torch.dtype:
        if target is None or not tensor.is_floating_point():
            return tensor.dtype
        kept = target == torch.float16 and any(f".{part}." in f".{name}." for part in keep_in_fp32)
        return torch.float32 if kept else target

    return rule


def _loaded_as(dtype_of: DtypeOf) -> Callable[[str, torch.Tensor], tuple[str, int]]:
    def loaded_as(name: str, tensor: torch.Tensor) -> tuple[str, int]:
        dtype = dtype_of(name, tensor)
        return str(dtype).removeprefix("torch."), tensor.numel() * dtype.itemsize

    return loaded_as


# ---------------------------------------------------------------- filling a model


def _fill(
    model: nn.Module,
    index: CheckpointIndex,
    materializer: Materializer,
    dtype_of: DtypeOf,
    strict: bool,
    in_place: bool = False,
) -> None:
    """Give every tensor of `model` that the checkpoint has its value; everything is checked before the first is set."""
    _warn_of_extra_state(model)
    groups = _tensors_by_object(model)
    index, in_memory = materializer.with_legacy_files(index)
    found = {*index.entries, *in_memory}
    _check_keys(model, groups, found, strict)
    chosen = [(names, next((n for n in names if n in found), None)) for names in groups]
    for names, key in chosen:
        if key is not None:
            shape = in_memory[key].shape if key in in_memory else index[key].shape
            _check_shape(key, tuple(shape), _tensor(model, names[0]))
    materializer.stamp(index.stamps)
    for names, key in chosen:
        if key is None:
            continue
        old = _tensor(model, names[0])
        dtype = dtype_of(names[0], old)
        value = in_memory.get(key)
        if in_place and old.device.type != "meta":
            with torch.no_grad():
                old.copy_(materializer.source(index[key]) if value is None else value)
        elif value is None:
            _replace(model, names, old, materializer.load(names[0], index[key], dtype))
        else:
            _replace(model, names, old, materializer.place(names[0], value, dtype))
    materializer.finish()


def _tensors_by_object(model: nn.Module, persistent_only: bool = True) -> list[list[str]]:
    """Names of parameters and (persistent) buffers; tied ones, which are one object, in one group."""
    wanted = set(model.state_dict()) if persistent_only else None
    groups: dict[int, list[str]] = {}
    everything = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    for name, tensor in everything:
        if wanted is None or name in wanted:
            groups.setdefault(id(tensor), []).append(name)
    return list(groups.values())


def _tensor(model: nn.Module, name: str) -> torch.Tensor:
    owner, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(owner), leaf)


def _warn_of_extra_state(model: nn.Module) -> None:
    """Extra state is no tensor with a place in a file, so it is not read here."""
    keeps = [n for n, m in model.named_modules() if type(m).get_extra_state is not nn.Module.get_extra_state]
    if keeps:
        logger.warning("Extra state is not loaded; set it with set_extra_state on: %s", _some(keeps))


def _check_keys(model: nn.Module, groups: list[list[str]], found: set[str], strict: bool) -> None:
    known = {name for names in groups for name in names}
    unexpected = sorted(found - known)
    missing = sorted(names[0] for names in groups if not found.intersection(names))
    if groups and len(missing) == len(groups):
        raise CheckpointError(
            f"None of the checkpoint's {len(found)} tensors belongs to {type(model).__name__}: it has "
            f"{_some(sorted(found))}, the model wants {_some(missing)}. Is it a checkpoint of another architecture?"
        )
    if strict and (missing or unexpected):
        raise CheckpointError(
            f"The checkpoint does not match {type(model).__name__} (strict=True). Missing: {_some(missing)}. "
            f"Unexpected: {_some(unexpected)}."
        )
    if unexpected:
        logger.warning("Not used by %s: %s", type(model).__name__, _some(unexpected))
    if missing:
        logger.warning("Not in the checkpoint, so left as they are: %s", _some(missing))


def _some(names: Sequence[str], most: int = 10) -> str:
    if not names:
        return "none"
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")


def _check_shape(key: str, shape: tuple[int, ...], wanted: torch.Tensor) -> None:
    if shape != tuple(wanted.shape):
        raise CheckpointError(
            f"Tensor {key!r} has shape {shape} in the checkpoint and {tuple(wanted.shape)} in the model. Nothing was "
            "loaded. Is it a checkpoint of another size of this architecture?"
        )


def _replace(model: nn.Module, names: Sequence[str], old: torch.Tensor, value: torch.Tensor) -> None:
    """Set `value` under all of a tensor's names, as one object."""
    new = value
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(value, requires_grad=old.requires_grad and value.is_floating_point())
        new.__dict__.update(old.__dict__)
    for name in names:
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        (module._parameters if leaf in module._parameters else module._buffers)[leaf] = new  # type: ignore[assignment]


# ---------------------------------------------------------------- dispatching


def dispatch_model(
    model: ModelT,
    device_map: Any,
    main_device: Any = None,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    offload_dir: PathLike | None = None,
    offload_index: Mapping[str, Any] | None = None,
    offload_buffers: bool = False,
    skip_keys: Classes = None,
    preload_module_classes: Classes = None,
    force_hooks: bool = False,
) -> ModelT:
    """Put the weights of `model` where `device_map` says, and make it run over that.

    Args:
        main_device: where offloaded blocks run; the map's first device that is no "cpu" or "disk" by default.
        state_dict: values for weights of the model that are on meta.
        offload_dir: a folder with weights that are offloaded already (with its `index.json`), or where those of the
            disk tier are written to be used again. None: a managed cache.
        offload_index: where weights that are on meta lie, as Accelerate's `offload_index` says it.
    """
    if attachment_of(model) is not None:
        detach(model)
    request = _request(
        model, device_map, None, offload_buffers, preload=preload_module_classes, main_device=main_device
    )
    plan = flow.plan_model(model, request)
    materializer = _loaded.pop(model, None) or Materializer(plan)
    materializer.follow(plan)
    _settle(model, materializer, _Values(model, plan, state_dict, offload_dir, offload_index))
    return flow.dispatch(model, plan, Placed(request, materializer, _names(skip_keys), force_hooks))


def cpu_offload(
    model: ModelT,
    execution_device: Any = None,
    offload_buffers: bool = False,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    preload_module_classes: Classes = None,
) -> ModelT:
    """Keep all weights of `model` in RAM; each block comes to `execution_device` while it runs.

    `execution_device` defaults to where the model is now. `state_dict` gives values for weights on meta.
    """
    device = _first_device(model) if execution_device is None else as_device(execution_device)
    return dispatch_model(
        model,
        {"": CPU},
        main_device=device,
        state_dict=state_dict,
        offload_buffers=offload_buffers,
        preload_module_classes=preload_module_classes,
    )


def disk_offload(
    model: ModelT,
    offload_dir: PathLike | None = None,
    execution_device: Any = None,
    offload_buffers: bool = False,
    preload_module_classes: Classes = None,
) -> ModelT:
    """Keep all weights of `model` on disk; each block is read when it runs, on `execution_device`.

    `offload_dir` holds them already (with its `index.json`), or is where they are written to; a managed cache if None.
    """
    device = _first_device(model) if execution_device is None else as_device(execution_device)
    return dispatch_model(
        model,
        {"": DISK},
        main_device=device,
        offload_dir=offload_dir,
        offload_buffers=offload_buffers,
        preload_module_classes=preload_module_classes,
    )


def cpu_offload_with_hook(
    model: ModelT, execution_device: Any = None, prev_module_hook: UserCpuOffloadHook | None = None
) -> tuple[ModelT, UserCpuOffloadHook]:
    """Keep `model` in RAM until it is called, then on `execution_device` until its hook's `offload()`.

    With the hook of the model that runs before it in a loop as `prev_module_hook`, that model goes back to RAM first.
    """
    hook = CpuOffload(execution_device=execution_device, prev_module_hook=prev_module_hook)
    add_hook_to_module(model, hook, append=True)
    return model, UserCpuOffloadHook(model, hook)


def _first_device(model: nn.Module) -> torch.device:
    first = next(model.parameters(), None)
    return torch.device(CPU) if first is None or first.device.type == "meta" else first.device


class _Values:
    """Where the values of a model's tensors come from when it is dispatched: itself, a state dict, or a folder."""

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        state_dict: Mapping[str, torch.Tensor] | None,
        offload_dir: PathLike | None,
        offload_index: Mapping[str, Any] | None,
    ) -> None:
        self.state_dict = state_dict or {}
        self.on_disk: dict[str, TensorEntry] = {}
        if offload_index is not None:
            self.on_disk.update(folder_index(offload_dir or ".", offload_index))
        elif offload_dir is not None and DISK in plan.devices:
            if not os.path.isfile(os.path.join(offload_dir, "index.json")):
                offload_state_dict(offload_dir, dict(self._to_write(model, plan)))
            self.on_disk.update(folder_index(offload_dir))

    def _to_write(self, model: nn.Module, plan: Plan) -> Iterator[tuple[str, torch.Tensor]]:
        for placement in plan.placements:
            for spec in placement.block.tensors:
                if placement.home_of(spec.name) == DISK:
                    tensor = _tensor(model, spec.name)
                    yield spec.name, self.state_dict.get(spec.name, tensor).detach()

    def entry(self, names: Sequence[str], tensor: torch.Tensor) -> TensorEntry | None:
        found = next((self.on_disk[name] for name in names if name in self.on_disk), None)
        if found is not None and found.shape != tuple(tensor.shape):
            raise CheckpointError(
                f"{found.file}: {found.name!r} has shape {found.shape}, and the model wants {tuple(tensor.shape)}: the "
                "offload folder is another model's. Name an empty folder, or none."
            )
        return found


def _settle(model: nn.Module, materializer: Materializer, values: _Values) -> None:
    """Bring every tensor of a model to its home, tied ones as the one object that they are."""
    for names in _tensors_by_object(model, persistent_only=False):
        tensor = _tensor(model, names[0])
        home = materializer.home_of(names[0])
        if home == DISK and materializer.rests_on_disk(tensor):
            continue
        entry = values.entry(names, tensor) if home == DISK or tensor.device.type == "meta" else None
        if entry is not None:
            settled = materializer.load(names[0], entry, tensor.dtype)
        elif tensor.device.type != "meta":
            settled = materializer.place(names[0], tensor.detach(), packed=True)
        else:
            given = next((values.state_dict[n] for n in names if n in values.state_dict), None)
            if given is None:
                continue  # nobody knows it: the first forward that needs it says so
            settled = materializer.place(names[0], given, tensor.dtype)
        if tensor.device.type == "meta":
            _replace(model, names, tensor, settled)
        elif settled.data_ptr() != tensor.data_ptr():
            with torch.inference_mode(False), torch.no_grad():
                tensor.data = settled
    materializer.finish()
