"""Hooks around a module's `forward`: attached, found and removed under the attribute names other libraries look for.

A hooked module has two more attributes, `_hf_hook` (the hook) and `_old_forward` (what `forward` was), and a `forward`
of its own that hands the call to the hook. All three follow the module through `copy.deepcopy` and `pickle`.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import fx, nn

from ..hardware import main_accelerator
from ..module_tensors import as_device, give_back_unused_memory
from .compiling import skipped, untraced
from .moving import send_to_device

Forward = Callable[..., Any]
ForwardInputs = tuple[tuple[Any, ...], Mapping[str, Any]]
ModuleT = TypeVar("ModuleT", bound=nn.Module)

CASTABLE_LAYERS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
"""Layers whose weights are a matrix product's operand only, and so may rest in another dtype than they compute in."""

GUARDED_METHODS = (
    *("to", "cpu", "cuda", "npu", "xpu", "mps", "mlu", "sdaa", "musa"),
    *("half", "float", "double", "bfloat16"),
)
"""Methods that a dispatch may replace on the instance, and that removing its hook gives back."""


class ModelHook:
    """What happens around a module's forward. Override the steps, or `run` for the whole call.

    Class attribute `no_grad`: whether the module's forward runs under `torch.no_grad()`.
    """

    no_grad: bool = False

    def init_hook(self, module: nn.Module) -> nn.Module:
        """Called when the hook is attached; returns the module, changed or not."""
        return module

    def pre_forward(self, module: nn.Module, /, *args: Any, **kwargs: Any) -> ForwardInputs:
        """Called before the forward; returns the `args` and `kwargs` to call it with."""
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Called after a forward that returned; returns the output to give to the caller."""
        return output

    def detach_hook(self, module: nn.Module) -> nn.Module:
        """Called when the hook is removed or replaced: what `init_hook` did is to be undone here."""
        return module

    def run(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The whole call: `pre_forward`, `forward`, `post_forward`.

        Override it where something must be released however the forward ends: `post_forward` is not called after an
        exception.
        """
        args, kwargs = self.pre_forward(module, *args, **kwargs)
        with torch.no_grad() if self.no_grad else nullcontext():
            output = forward(*args, **kwargs)
        return self.post_forward(module, output)


class SequentialHook(ModelHook):
    """Several hooks as one, nested like context managers: the first enters first and leaves last."""

    def __init__(self, *hooks: ModelHook) -> None:
        self.hooks = hooks

    @property
    def no_grad(self) -> bool:  # type: ignore[override]
        return any(hook.no_grad for hook in self.hooks)

    def init_hook(self, module: nn.Module) -> nn.Module:
        for hook in self.hooks:
            module = hook.init_hook(module)
        return module

    def pre_forward(self, module: nn.Module, /, *args: Any, **kwargs: Any) -> ForwardInputs:
        for hook in self.hooks:
            args, kwargs = hook.pre_forward(module, *args, **kwargs)  # type: ignore[assignment]
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        for hook in reversed(self.hooks):
            output = hook.post_forward(module, output)
        return output

    def detach_hook(self, module: nn.Module) -> nn.Module:
        for hook in reversed(self.hooks):
            module = hook.detach_hook(module)
        return module

    def run(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        for hook in reversed(self.hooks):
            forward = functools.partial(_call_through, hook, module, forward)
        return forward(*args, **kwargs)


def add_hook_to_module(module: ModuleT, hook: ModelHook, append: bool = False) -> ModuleT:
    """Attach `hook` to `module`, whose `forward` then goes through it, and return the module.

    A hook that the module already has is detached and replaced, or with `append=True` kept: the two then form a
    `SequentialHook` with the new one inside, and only the new one is initialised. If `hook.init_hook` raises, the
    module is left without the hook, and works.
    """
    previous = getattr(module, "_hf_hook", None) if append else None
    if previous is None:
        remove_hook_from_module(module)
    hooked: Any = hook.init_hook(module)
    hooked._hf_hook = hook if previous is None else SequentialHook(previous, hook)
    if "_old_forward" not in vars(hooked):
        hooked._old_forward = _current_forward(hooked)
        hooked.forward = functools.update_wrapper(functools.partial(_hooked_forward, hooked), hooked._old_forward)
    return hooked


def remove_hook_from_module(module: ModuleT, recurse: bool = False) -> ModuleT:
    """Detach the hook of `module` and give its own `forward` back; with `recurse`, of every module below it too.

    A module without a hook is left as it is. Returns the module.
    """
    for each in list(module.modules()) if recurse else [module]:
        _remove_hook(each)
    return module


def remove_hook_from_submodules(module: nn.Module) -> None:
    """Detach the hooks of `module` and of every module below it."""
    remove_hook_from_module(module, recurse=True)


remove_hook_from_modules = remove_hook_from_submodules


class CpuOffload(ModelHook):
    """Keeps a model in RAM until it is called, then on `execution_device` until `init_hook` is called again.

    `execution_device` defaults to this machine's current accelerator, or the CPU where there is none.
    `prev_module_hook` is the `UserCpuOffloadHook` of the model that ran before in a pipeline: that model goes back to
    RAM just before this one takes its place.
    """

    def __init__(
        self,
        execution_device: str | int | torch.device | None = None,
        prev_module_hook: UserCpuOffloadHook | None = None,
    ) -> None:
        if execution_device is None:
            execution_device = main_accelerator() or "cpu"
        self.execution_device = as_device(execution_device)
        self.prev_module_hook = prev_module_hook

    def init_hook(self, module: nn.Module) -> nn.Module:
        return module.to("cpu")

    @untraced
    def pre_forward(self, module: nn.Module, /, *args: Any, **kwargs: Any) -> ForwardInputs:
        if self.prev_module_hook is not None:
            self._make_room(self.prev_module_hook)
        if _first_device(module) != self.execution_device:
            module.to(self.execution_device)
        return send_to_device(args, self.execution_device), send_to_device(kwargs, self.execution_device)

    @staticmethod
    def _make_room(previous: UserCpuOffloadHook) -> None:
        device = _first_device(previous.model)
        if device is not None and device.type != "cpu":
            previous.offload()
            give_back_unused_memory(device)


class UserCpuOffloadHook:
    """A model and its `CpuOffload` hook, for whoever runs the pipeline: `offload()` the model, `remove()` the hook."""

    def __init__(self, model: nn.Module, hook: ModelHook) -> None:
        self.model = model
        self.hook = hook

    def offload(self) -> None:
        """Put the model back into RAM now."""
        self.hook.init_hook(self.model)

    def remove(self) -> None:
        """Take the hook off the model, which stays where it is."""
        remove_hook_from_module(self.model)


class LayerwiseCastingHook(ModelHook):
    """Keeps a module's weights in `storage_dtype`, and in `compute_dtype` while its forward runs.

    The weights lose what `storage_dtype` cannot hold. They go back to it also after a forward that raised.
    """

    def __init__(self, storage_dtype: torch.dtype, compute_dtype: torch.dtype, non_blocking: bool) -> None:
        self.storage_dtype = storage_dtype
        self.compute_dtype = compute_dtype
        self.non_blocking = non_blocking

    def init_hook(self, module: nn.Module) -> nn.Module:
        return module.to(dtype=self.storage_dtype, non_blocking=self.non_blocking)

    @untraced
    def pre_forward(self, module: nn.Module, /, *args: Any, **kwargs: Any) -> ForwardInputs:
        module.to(dtype=self.compute_dtype, non_blocking=self.non_blocking)
        return args, kwargs

    @untraced
    def post_forward(self, module: nn.Module, output: Any) -> Any:
        module.to(dtype=self.storage_dtype, non_blocking=self.non_blocking)
        return output

    def run(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        try:
            return super().run(module, forward, args, kwargs)
        except BaseException:
            self.post_forward(module, None)
            raise


def attach_layerwise_casting_hooks(
    module: nn.Module,
    storage_dtype: torch.dtype,
    compute_dtype: torch.dtype,
    skip_modules_pattern: str | tuple[str, ...] | None = None,
    skip_modules_classes: tuple[type[nn.Module], ...] | None = None,
    non_blocking: bool = False,
) -> None:
    """Let every linear and convolution layer of `module` rest in `storage_dtype` and compute in `compute_dtype`.

    A module is skipped, with all below it, where its dotted name matches a regular expression of
    `skip_modules_pattern` or it is an instance of `skip_modules_classes`.
    """
    patterns = (skip_modules_pattern,) if isinstance(skip_modules_pattern, str) else tuple(skip_modules_pattern or ())
    layers = dict.fromkeys(_castable_layers(module, "", patterns, tuple(skip_modules_classes or ())))
    for layer in layers:
        add_hook_to_module(layer, LayerwiseCastingHook(storage_dtype, compute_dtype, non_blocking), append=True)


@skipped
def _hooked_forward(module: Any, /, *args: Any, **kwargs: Any) -> Any:
    return _call_through(module._hf_hook, module, module._old_forward, *args, **kwargs)


@skipped
def _call_through(hook: ModelHook, module: nn.Module, forward: Forward, /, *args: Any, **kwargs: Any) -> Any:
    """`forward` inside `hook`, which may be another library's: those have the steps, and no `run`."""
    if hasattr(hook, "run"):
        return hook.run(module, forward, args, kwargs)
    return ModelHook.run(hook, module, forward, args, kwargs)


def _current_forward(module: nn.Module) -> Forward:
    """`module.forward`; of a graph module, one that follows its class when the graph is recompiled."""
    if isinstance(module, fx.GraphModule) and "forward" not in vars(module):
        return functools.update_wrapper(functools.partial(_class_forward, module), module.forward)
    return module.forward


def _class_forward(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
    return type(module).forward(module, *args, **kwargs)


def _remove_hook(module: Any) -> None:
    if "_hf_hook" in vars(module):
        module._hf_hook.detach_hook(module)  # first: if it raises, the module is still hooked, and works
        del module._hf_hook
    if "_old_forward" in vars(module):
        module.forward = vars(module).pop("_old_forward")
        _drop_needless_forward(module)
    for name in GUARDED_METHODS:
        vars(module).pop(name, None)


def _drop_needless_forward(module: nn.Module) -> None:
    """Let the class speak for itself again where the instance's `forward` is no more than the class's."""
    forward = module.forward
    of_class = getattr(forward, "__func__", None) is type(module).forward
    if of_class or getattr(forward, "func", None) is _class_forward:
        del vars(module)["forward"]


def _first_device(module: nn.Module) -> torch.device | None:
    tensor = next(itertools.chain(module.parameters(), module.buffers()), None)
    return None if tensor is None else tensor.device


def _castable_layers(
    module: nn.Module, name: str, patterns: tuple[str, ...], classes: tuple[type[nn.Module], ...]
) -> Iterator[nn.Module]:
    if isinstance(module, classes) or any(re.search(pattern, name) for pattern in patterns):
        return
    if isinstance(module, CASTABLE_LAYERS):
        yield module
        return
    for child_name, child in module.named_children():
        yield from _castable_layers(child, f"{name}.{child_name}" if name else child_name, patterns, classes)
