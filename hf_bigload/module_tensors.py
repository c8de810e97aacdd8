"""The tensors of an `nn.Module`: naming, replacing and tying them, and reading those that are offloaded.

For any module, hooked or not, on any device or on meta. A hook counts as offloading when it has a truthy attribute
`offload`, whichever library it is from.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .checkpoint.offload_folder import PathLike, load_offloaded_weight, weight_file
from .errors import DeviceMapError
from .hardware import accelerator_names, device_name

logger = logging.getLogger(__name__)

Device = int | str | torch.device
TiedParamsMap = dict[int, dict[Any, torch.Tensor]]
META = torch.device("meta")


# ------------------------------------------------------------------------------------------------- devices and dtypes


def as_device(device: Device) -> torch.device:
    """`device` as torch's. An index means the accelerator of that index, a bare accelerator type the current one.

    Raises `DeviceMapError` where this machine has no such thing.
    """
    if isinstance(device, torch.device) and (device.index is not None or device.type in ("cpu", "meta")):
        return device
    if isinstance(device, int) and device_name(device) not in accelerator_names():
        raise DeviceMapError(
            f"device {device} names an accelerator, and this machine has "
            f"{', '.join(accelerator_names()) or 'none'}: use one of these, or 'cpu'."
        )
    if device == "disk":
        raise DeviceMapError("no tensor can be computed with on 'disk': move it to 'cpu', or dispatch the model.")
    return torch.device(device_name(device))


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """`dtype` as torch's; "float16" and "torch.float16" are the same. Raises ValueError for no dtype of torch."""
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{dtype!r} is no dtype of torch: use one such as 'float16' or torch.bfloat16.")
    return found


def give_back_unused_memory(device: torch.device) -> None:
    """Let the allocator of an accelerator return what it caches to the driver; nothing on other devices."""
    if device.type not in ("cpu", "meta"):
        torch.get_device_module(device).empty_cache()


PHASE = 64
"""Bytes: the modulus of the addresses that CPU kernels look at."""


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


# ----------------------------------------------------------------------------------------------------- names and ties


def named_module_tensors(
    module: nn.Module, include_buffers: bool = True, recurse: bool = False, remove_non_persistent: bool = False
) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters of `module` by name, then its buffers; with `recurse`, of every module below it too.

    Each tensor comes once. `remove_non_persistent` leaves out the buffers that a state dict leaves out.
    """
    yield from module.named_parameters(recurse=recurse)
    if include_buffers:
        skipped = get_non_persistent_buffers(module, recurse, fqns=True) if remove_non_persistent else set()
        for name, buffer in module.named_buffers(recurse=recurse):
            if name not in skipped:
                yield name, buffer


def get_non_persistent_buffers(module: nn.Module, recurse: bool = False, fqns: bool = False) -> set[str]:
    """The names of the buffers that a state dict leaves out; with `fqns`, dotted from `module` on."""
    owners = module.named_modules() if recurse else [("", module)]
    return {
        f"{owner}.{name}" if fqns and owner else name
        for owner, each in owners
        for name in each._non_persistent_buffers_set
    }


def find_tied_parameters(model: nn.Module, **kwargs: Any) -> list[list[str]]:
    """Groups of names that are one and the same parameter, each sorted; the groups in module order.

    Keyword arguments are accepted, and mean nothing.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [sorted(group) for group in names.values() if len(group) > 1]


def retie_parameters(model: nn.Module, tied_params: list[list[str]]) -> None:
    """Make the names of each group one parameter again: the first of them that is not on meta."""
    for group in tied_params:
        owners = [_owner(model, name) for name in group]
        values = [getattr(module, name) for module, name in owners]
        kept = next((value for value in values if value.device != META), None)
        if kept is not None:
            for module, name in owners:
                setattr(module, name, kept)


def id_tensor_storage(tensor: torch.Tensor) -> tuple[torch.device, int, int]:
    """What tells a tensor's storage from all others alive: (device, address, bytes).

    Tensors on meta have no address, so those of equal size look alike. A tensor made of others is known by its first.
    """
    inner = tensor
    while is_traceable_wrapper_subclass(inner):
        inner = getattr(inner, inner.__tensor_flatten__()[0][0])
    storage = inner.untyped_storage()
    return tensor.device, storage.data_ptr(), storage.nbytes()


def extract_submodules_state_dict(
    state_dict: Mapping[str, torch.Tensor], submodule_names: Iterable[str]
) -> dict[str, torch.Tensor]:
    """The part of `state_dict` that belongs to these modules, under the same names."""
    return {
        key: tensor
        for name in submodule_names
        for key, tensor in state_dict.items()
        if key == name or key.startswith(f"{name}.")
    }


def _owner(module: nn.Module, tensor_name: str) -> tuple[nn.Module, str]:
    """The module that itself holds the tensor of a dotted name, and the name there. Raises ValueError without one."""
    path, _, name = tensor_name.rpartition(".")
    for part in path.split(".") if path else ():
        child = getattr(module, part, None)
        if not isinstance(child, nn.Module):
            raise ValueError(f"{type(module).__name__} has no module {part!r}, looked for in {tensor_name!r}.")
        module = child
    if name not in module._parameters and name not in module._buffers:
        raise ValueError(f"{type(module).__name__} has no parameter or buffer {name!r}, looked for in {tensor_name!r}.")
    return module, name


# --------------------------------------------------------------------------------------------------- replacing one


def set_module_tensor_to_device(
    module: nn.Module,
    tensor_name: str,
    device: Device,
    value: torch.Tensor | None = None,
    dtype: str | torch.dtype | None = None,
    fp16_statistics: torch.Tensor | None = None,
    tied_params_map: TiedParamsMap | None = None,
    non_blocking: bool = False,
    clear_cache: bool = True,
) -> None:
    """Put the parameter or buffer of that dotted name on `device`, with `value` as its new value where one is given.

    A parameter that need not change stays the object it is; otherwise the module gets a new one, of the same class,
    attributes and `requires_grad`. Floating values are cast to `dtype`, or to the dtype of what they replace.

    Args:
        fp16_statistics: set as `SCB` on the new parameter: the scales of an 8-bit weight.
        tied_params_map: data pointer -> device -> the tensor already there. A tied weight that is found in it is
            shared instead of copied, and one that was copied is entered.
        clear_cache: whether an accelerator's allocator gives its unused memory back afterwards.

    Raises:
        ValueError: no such tensor, a value of another shape, or a tensor on meta and no value for it.
        DeviceMapError: no such device.
    """
    owner, name = _owner(module, tensor_name)
    old = getattr(owner, name)
    if value is not None:
        value = torch.as_tensor(value)
    _check_replacement(old, value, device, tensor_name)
    pointers = [t.data_ptr() for t in (value, old) if t is not None] if tied_params_map else []
    shared = _find_shared(tied_params_map, pointers, device)
    new = shared if shared is not None else _replacement(old, value, as_device(device), dtype, non_blocking)
    held: dict[str, Any] = owner._buffers if name in owner._buffers else owner._parameters
    held[name] = new
    if shared is not None:
        return
    if fp16_statistics is not None:
        new.SCB = fp16_statistics.to(new.device, non_blocking=non_blocking)  # type: ignore[attr-defined]
    if clear_cache:
        give_back_unused_memory(new.device)
    _enter_shared(tied_params_map, pointers, device, new)


def _check_replacement(old: torch.Tensor | None, value: torch.Tensor | None, device: Device, name: str) -> None:
    if old is None:
        raise ValueError(f"{name!r} is registered as None, so there is no tensor to move or replace.")
    if value is None and old.is_meta and device not in ("meta", META):
        raise ValueError(f"{name!r} is on meta, where it has no data: give the `value` to put on {device}.")
    # a parameter class of its own may pack its value into another shape
    if value is not None and value.shape != old.shape and type(old) in (nn.Parameter, torch.Tensor):
        raise ValueError(f"{name!r} has shape {tuple(old.shape)}, and the value for it {tuple(value.shape)}.")


def _replacement(
    old: torch.Tensor, value: torch.Tensor | None, device: torch.device, dtype: Any, non_blocking: bool
) -> torch.Tensor:
    """What takes the place of `old`: `old` itself where nothing changes."""
    with torch.no_grad():
        source = _cast(old if value is None else value, value is not None, old.dtype, dtype, non_blocking)
        if source is old and old.device == device:
            return old
        if isinstance(old, nn.Parameter):
            return _like_parameter(old, source, device, non_blocking)
        return source.to(device, non_blocking=non_blocking)


def _cast(source: torch.Tensor, replaces: bool, old_dtype: torch.dtype, dtype: Any, non_blocking: bool) -> torch.Tensor:
    if dtype is None:
        return source.to(old_dtype, non_blocking=non_blocking) if replaces else source
    return source.to(as_dtype(dtype), non_blocking=non_blocking) if source.is_floating_point() else source


def _like_parameter(old: nn.Parameter, source: torch.Tensor, device: torch.device, non_blocking: bool) -> torch.Tensor:
    """`source` on `device` as a parameter of the class, attributes and `requires_grad` of `old`.

    A parameter class with a `to` of its own (a quantised one that packs itself on the way) is asked to move itself.
    """
    requires_grad = old.requires_grad and (source.is_floating_point() or source.is_complex())
    if type(old) is nn.Parameter or is_traceable_wrapper_subclass(source):
        new: torch.Tensor = nn.Parameter(source.detach().to(device, non_blocking=non_blocking), requires_grad)
    else:
        new = _subclassed(old, source, requires_grad)
        moved = new.to(device, non_blocking=non_blocking)
        new = moved if isinstance(moved, type(old)) else _subclassed(old, moved, requires_grad)
    for attribute, held in vars(old).items():
        new.__dict__.setdefault(attribute, held)
    return new


def _subclassed(old: nn.Parameter, source: torch.Tensor, requires_grad: bool) -> torch.Tensor:
    new = torch.Tensor._make_subclass(type(old), source.detach(), requires_grad)
    new.__dict__.update(vars(old))
    return new


def _find_shared(tied: TiedParamsMap | None, pointers: list[int], device: Device) -> torch.Tensor | None:
    return next((tied[p][device] for p in pointers if p in tied and device in tied[p]), None) if tied else None


def _enter_shared(tied: TiedParamsMap | None, pointers: list[int], device: Device, new: torch.Tensor) -> None:
    for pointer in pointers if tied else ():
        if pointer in tied:  # type: ignore[operator]
            tied[pointer].setdefault(device, new)  # type: ignore[index]


# ------------------------------------------------------------------------------------------------ offloaded modules


def iter_hooks(module: nn.Module) -> Iterator[Any]:
    """The hooks of `module`, those inside a sequence of hooks one by one; none where it has no hook."""
    pending = [module.__dict__.get("_hf_hook")]
    while pending:
        hook = pending.pop(0)
        inner = getattr(hook, "hooks", None)
        if inner is not None:
            pending[:0] = inner
        elif hook is not None:
            yield hook


def has_offloaded_params(module: nn.Module) -> bool:
    """Whether a hook of `module` keeps its parameters elsewhere than where they are computed with."""
    return _offloading_hook(module) is not None


def _offloading_hook(module: nn.Module) -> Any:
    return next((hook for hook in iter_hooks(module) if getattr(hook, "offload", False)), None)


@contextlib.contextmanager
def align_module_device(module: nn.Module, execution_device: Device | None = None) -> Iterator[None]:
    """Within the context, the parameters of `module` itself are on `execution_device`, with their values.

    Offloaded parameters are brought there by the module's hook, to the hook's own execution device where none is
    given. Other parameters are moved, and moved back with what was written into them. Without an
    `execution_device`, a module that is not offloaded is left alone.
    """
    hook = _offloading_hook(module)
    if hook is not None and hasattr(hook, "align"):
        context = hook.align(module, execution_device)
    elif hook is not None:
        context = _aligned_by_steps(module, hook, execution_device)
    elif execution_device is not None:
        context = _moved_there_and_back(module, as_device(execution_device))
    else:
        context = contextlib.nullcontext()
    with context:
        yield


@contextlib.contextmanager
def _aligned_by_steps(module: nn.Module, hook: Any, execution_device: Device | None) -> Iterator[None]:
    """The parameters as a forward would see them, for a hook that only knows forwards."""
    usual = hook.execution_device
    hook.execution_device = usual if execution_device is None else execution_device
    try:
        hook.pre_forward(module)
        yield
    finally:
        hook.post_forward(module, None)
        hook.execution_device = usual


@contextlib.contextmanager
def _moved_there_and_back(module: nn.Module, device: torch.device) -> Iterator[None]:
    originals = dict(module.named_parameters(recurse=False))
    try:
        for name in originals:
            set_module_tensor_to_device(module, name, device, clear_cache=False)
        yield
    finally:
        for name, original in originals.items():
            _bring_back(module, name, original)


def _bring_back(module: nn.Module, name: str, original: nn.Parameter) -> None:
    """Let `original` be the parameter again, with the values of what stood in for it."""
    current = module._parameters.get(name)
    if current is None or current is original:
        return
    if (current.shape, current.dtype) != (original.shape, original.dtype):
        set_module_tensor_to_device(module, name, original.device, clear_cache=False)
        return
    if not current.is_meta:
        original.detach().copy_(current.detach())
    module._parameters[name] = original


def get_state_dict_offloaded_model(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of `model` with real tensors on the CPU, those of offloaded modules fetched module by module.

    What can be found nowhere stays out, and is named in a warning.
    """
    state_dict = dict(model.state_dict())
    for name, module in model.named_modules():
        state_dict.update(_fetched(module, name, state_dict, "cpu"))
    missing = [key for key, value in state_dict.items() if isinstance(value, torch.Tensor) and value.is_meta]
    if missing:
        logger.warning("Not in the state dict, because they are on meta and no hook has their data: %s", missing)
    return {
        key: value.to("cpu") if isinstance(value, torch.Tensor) else value
        for key, value in state_dict.items()
        if key not in set(missing)
    }


def get_state_dict_from_offload(
    module: nn.Module, module_name: str, state_dict: dict[str, Any], device_to_put_offload: Device = "cpu"
) -> dict[str, Any]:
    """Fill the entries of `state_dict` that belong to `module` with its tensors, and return it.

    `module_name` is the full name of one of the module's tensors ("encoder.fc.weight"). Offloaded tensors are brought
    to `device_to_put_offload`; others come as they lie.
    """
    prefix = module_name.rpartition(".")[0]
    held = module.state_dict(prefix=f"{prefix}." if prefix else "")
    state_dict.update({key: value for key, value in held.items() if key in state_dict})
    state_dict.update(_fetched(module, prefix, state_dict, device_to_put_offload))
    return state_dict


def _fetched(module: nn.Module, name: str, wanted: Mapping[str, Any], device: Device) -> dict[str, torch.Tensor]:
    """The tensors on meta that the hook of `module` can bring to `device`, under their full names, if `wanted`.

    Tensors that are real at rest are not touched: what a hook brings may not outlive its context.
    """
    if not has_offloaded_params(module):
        return {}
    prefix = f"{name}." if name else ""
    on_meta = {n for n, t in named_module_tensors(module, recurse=True) if t.is_meta and prefix + n in wanted}
    if not on_meta:
        return {}
    with align_module_device(module, device):
        aligned = dict(named_module_tensors(module, recurse=True))
        return {prefix + n: aligned[n].detach() for n in on_meta if not aligned[n].is_meta}


def load_offloaded_weights(model: nn.Module, index: Mapping[str, Any] | None, offload_folder: PathLike) -> None:
    """Put the weights of an offload folder into `model`, on the CPU.

    `index` is the folder's, or a part of it. The scales of an 8-bit weight (`SCB`) go onto the weight.
    """
    for name, info in (index or {}).items():
        if "SCB" in name:
            continue
        statistics = None
        scales = name.replace("weight", "SCB")
        if scales != name and scales in (index or {}):
            statistics = load_offloaded_weight(weight_file(offload_folder, scales), (index or {})[scales])
        value = load_offloaded_weight(weight_file(offload_folder, name), info)
        set_module_tensor_to_device(model, name, "cpu", value=value, fp16_statistics=statistics)
