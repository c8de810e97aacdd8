"""Build a model without building its weights.

Parameters go to the meta device, buffers keep their real values. A large tensor is never allocated just to be thrown
away: it starts on meta with a log of what was done to it, and only when it turns out to be a buffer (or a plain
attribute) is that log replayed on real memory.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

META = torch.device("meta")

DEFER_FROM = 1 << 20
"""Bytes from which a freshly made tensor is deferred. Smaller ones are made for real: they cost nothing to drop."""

_FACTORIES = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.zeros.default,
    torch.ops.aten.ones.default,
    torch.ops.aten.full.default,
    torch.ops.aten.rand.default,
    torch.ops.aten.randn.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_zeros.default,
    torch.ops.aten.new_ones.default,
    torch.ops.aten.new_full.default,
}


@contextmanager
def init_empty_weights(include_buffers: bool | None = None) -> Iterator[None]:
    """Models built inside have all their parameters on the meta device, and no memory is used for them.

    Args:
        include_buffers: put buffers on meta, too. Defaults to the environment's `ACCELERATE_INIT_INCLUDE_BUFFERS`, else
            False: buffers are then real, with the values their module gives them.
    """
    with init_on_device(META, include_buffers=include_buffers):
        yield


@contextmanager
def init_on_device(device: torch.device | str | int, include_buffers: bool | None = None) -> Iterator[None]:
    """Models built inside have all their parameters on `device`; with `include_buffers`, everything else as well."""
    device = torch.device(device)
    if include_buffers is None:
        include_buffers = os.environ.get("ACCELERATE_INIT_INCLUDE_BUFFERS", "").lower() in ("1", "true", "yes", "on")
    if include_buffers:
        with device:
            yield
    elif device == META:
        with _registrations(META), _DeferredInit():
            yield
    else:
        with _registrations(device):
            yield


_building = threading.local()


@contextmanager
def _registrations(device: torch.device) -> Iterator[None]:
    """Send parameters to `device` as modules register them, and make deferred tensors real where they are kept.

    torch's registration hooks are process-wide: a thread outside the context must not be touched by ours.
    """
    previous = getattr(_building, "device", None)
    _building.device = device
    hooks = [
        register_module_parameter_registration_hook(_register_parameter),  # type: ignore[arg-type]
        register_module_buffer_registration_hook(_register_buffer),  # type: ignore[arg-type]
    ]
    plain_setattr = nn.Module.__setattr__

    def keep_real(module: nn.Module, name: str, value: Any) -> None:
        if type(value) is torch.Tensor and getattr(_building, "device", None) is not None:
            value = _real(value)
        plain_setattr(module, name, value)

    nn.Module.__setattr__ = keep_real  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.__setattr__ = plain_setattr  # type: ignore[method-assign]
        _building.device = previous
        for hook in hooks:
            hook.remove()


def _register_parameter(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
    device = getattr(_building, "device", None)
    if device is None or parameter is None or parameter.device == device:
        return None
    moved = parameter.detach().to(device)
    made = type(parameter)(moved, requires_grad=parameter.requires_grad)
    made.__dict__.update(parameter.__dict__)
    return made


def _register_buffer(_module: nn.Module, _name: str, buffer: torch.Tensor | None) -> torch.Tensor | None:
    return None if buffer is None or getattr(_building, "device", None) is None else _real(buffer)


@dataclass(frozen=True, eq=False)
class _Step:
    """One operation on deferred tensors, as it would have been run."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[torch.Tensor]


class _DeferredInit(TorchDispatchMode):
    """Runs what touches large fresh tensors on meta, and remembers how."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch wraps the dispatch, and the wrapper imports the compiler: a second, for nothing

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        deferred = [t for t in inputs if _log_of(t) is not None]
        if deferred:
            written = _written(func, args, kwargs)
            if all(t.device == META for t in written):
                try:
                    return _run_deferred(func, args, kwargs, deferred, written)
                except (RuntimeError, NotImplementedError):
                    if written:
                        raise  # done on a copy, the write would be lost
            return func(*tree_map(_real, args), **tree_map(_real, kwargs))  # its result depends on values
        if func in _FACTORIES and _wants_cpu(kwargs, inputs):
            made = func(*args, **{**kwargs, "device": META})
            if made.numel() * made.element_size() >= DEFER_FROM:
                made._bigload_log = [_Step(func, args, {**kwargs, "device": torch.device("cpu")}, [made])]
                return made
        return func(*args, **kwargs)


def _log_of(tensor: torch.Tensor) -> list[_Step] | None:
    return getattr(tensor, "_bigload_log", None)


def _wants_cpu(kwargs: dict[str, Any], inputs: list[torch.Tensor]) -> bool:
    device = kwargs.get("device")
    if device is None:
        return all(t.device.type == "cpu" for t in inputs)
    return torch.device(device).type == "cpu"


def _written(func: Any, args: tuple, kwargs: dict) -> list[torch.Tensor]:
    """The tensors that `func` changes in place."""
    given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    changed = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [t for name in changed for t in tree_leaves(given.get(name)) if isinstance(t, torch.Tensor)]


def _run_deferred(
    func: Any, args: tuple, kwargs: dict, deferred: list[torch.Tensor], written: list[torch.Tensor]
) -> Any:
    on_meta = tree_map(_to_meta, kwargs)
    result = func(*tree_map(_to_meta, args), **({**on_meta, "device": META} if "device" in kwargs else on_meta))
    outputs = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
    step = _Step(func, tree_map(_kept, args), tree_map(_kept, kwargs), outputs)
    if written or any(r.alias_info is not None for r in func._schema.returns):
        log = _log_of((written or deferred)[0])  # a view or an in-place change: both sides share one history
        if log is None:  # a parameter already on meta: nothing of it will ever be replayed
            return result
        log.extend(s for t in deferred for s in _log_of(t) or [] if s not in log)
        log.append(step)
    else:
        log = [*dict.fromkeys(s for t in deferred for s in _log_of(t) or []), step]
    for output in outputs:
        output._bigload_log = log  # type: ignore[attr-defined]
    return result


def _to_meta(value: Any) -> Any:
    return value.to(META) if isinstance(value, torch.Tensor) and _log_of(value) is None else value


def _kept(value: Any) -> Any:
    """A real operand as it is now: whoever owns it may change it before the replay."""
    return value.clone() if isinstance(value, torch.Tensor) and value.device != META else value


def _real(value: Any) -> Any:
    """`value` itself, or for a deferred tensor what its log gives when run on real memory."""
    log = _log_of(value) if isinstance(value, torch.Tensor) else None
    if log is None:
        return value
    made: dict[int, torch.Tensor] = {}

    def look_up(leaf: Any) -> Any:
        return made.get(id(leaf), leaf)

    with torch.utils._python_dispatch._disable_current_modes(), torch.no_grad():
        for step in log:
            result = step.func(*tree_map(look_up, step.args), **tree_map(look_up, step.kwargs))
            fresh = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
            made.update(zip(map(id, step.outputs), fresh, strict=True))
    return made[id(value)]
