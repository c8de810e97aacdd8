"""What the loaders have in common: whose turn it is, in which mode weights are loaded, and where a model runs."""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from .. import settings
from ..dispatch.attach import attachment_of
from ..hardware import torch_device

turn = threading.RLock()
"""Calls of ours take turns: a plan has to see the memory that the one before took."""


_without_default: contextvars.ContextVar[bool] = contextvars.ContextVar("hf_bigload_no_default_map", default=False)


def default_device_map() -> Any:
    """The device map of a call that gives none; None: it stays the library's own affair."""
    return None if _without_default.get() else settings.current().device_map


def default_device_map_for(options: Mapping[str, Any]) -> Any:
    """As `default_device_map`; None where Diffusers' `options` of the call leave no device map a place."""
    return None if options.get("low_cpu_mem_usage") is False else default_device_map()


@contextlib.contextmanager
def no_default_device_map() -> Iterator[None]:
    """Within the context, only calls that give a device map are ours: these are parts of something that is planned
    as a whole, or not at all, and each by itself would get the budget of all."""
    token = _without_default.set(True)
    try:
        yield
    finally:
        _without_default.reset(token)


def normal_tensors() -> contextlib.AbstractContextManager[Any]:
    """Weights loaded under `inference_mode` would be inference tensors for good."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext()


def is_only_meta(device_map: Any) -> bool:
    """A model without weights is asked for: nothing to plan."""
    return isinstance(device_map, Mapping) and {str(device) for device in device_map.values()} == {"meta"}


def device(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    """Where a model runs, not where its first weight happens to rest: for the `device` of a model's class."""
    attachment = attachment_of(instance)
    return wrapped() if attachment is None else torch_device(attachment.plan.main_device)
