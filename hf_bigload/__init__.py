"""Run any Hugging Face model, of any size, on the machine you have, with the line the model card already shows.

    import hf_bigload
    hf_bigload.enable()

    model = AutoModelForCausalLM.from_pretrained("org/model", device_map="auto")

Importing this package imports neither torch nor a library it serves: each name is looked up when it is first used.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_bigload.big_modeling import (
        cpu_offload,
        cpu_offload_with_hook,
        disk_offload,
        dispatch_model,
        get_balanced_memory,
        infer_auto_device_map,
        init_empty_weights,
        init_on_device,
        load_checkpoint_and_dispatch,
        load_checkpoint_in_model,
    )
    from hf_bigload.flow import estimate, inspect, plan
    from hf_bigload.plugin import disable, enable
    from hf_bigload.registry import Loader, register_loader
    from hf_bigload.settings import workload

__version__ = "0.1.0"

__all__ = [
    "Loader",
    "cpu_offload",
    "cpu_offload_with_hook",
    "disable",
    "disk_offload",
    "dispatch_model",
    "enable",
    "estimate",
    "get_balanced_memory",
    "infer_auto_device_map",
    "init_empty_weights",
    "init_on_device",
    "inspect",
    "load_checkpoint_and_dispatch",
    "load_checkpoint_in_model",
    "plan",
    "register_loader",
    "workload",
]

_NAMES = {
    "plugin": ("disable", "enable", "load_ipython_extension", "unload_ipython_extension"),
    "registry": ("Loader", "register_loader"),
    "settings": ("workload",),
    "flow": ("estimate", "inspect", "plan"),
    "big_modeling": (
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
    ),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in ("hooks", "utils"):  # doors: `import hf_bigload` is enough to reach them, as with Accelerate
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})


class _Package(ModuleType):
    """Keeps a public function what it is where a submodule has the same name (`hf_bigload.estimate`).

    Python binds a submodule to its package when it is first imported, which may be long after the function was handed
    out. The submodule is there for `from hf_bigload.estimate import ...`.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
