"""A door: the hooks of `hf_bigload.dispatch` under the names of the guide's `hooks` module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .dispatch.hooks import (
    CpuOffload,
    LayerwiseCastingHook,
    ModelHook,
    SequentialHook,
    UserCpuOffloadHook,
    add_hook_to_module,
    attach_layerwise_casting_hooks,
    remove_hook_from_module,
    remove_hook_from_modules,
    remove_hook_from_submodules,
)

if TYPE_CHECKING:
    from .dispatch.attach import AlignDevicesHook

__all__ = [
    "AlignDevicesHook",
    "CpuOffload",
    "LayerwiseCastingHook",
    "ModelHook",
    "SequentialHook",
    "UserCpuOffloadHook",
    "add_hook_to_module",
    "attach_layerwise_casting_hooks",
    "remove_hook_from_module",
    "remove_hook_from_modules",
    "remove_hook_from_submodules",
]


def __getattr__(name: str) -> Any:
    if name != "AlignDevicesHook":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .dispatch.attach import AlignDevicesHook  # the whole executor, which nobody needs who hooks a module

    return AlignDevicesHook
