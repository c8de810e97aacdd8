"""How the library's caches are made again what they were before a forward that failed.

Only those that grow by concatenation: of the longer tensor, the beginning is the old one, bit for bit. Tensors are not
kept, which would take a second cache's room. What else a cache may be is not touched here.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from transformers import cache_utils as library

from ..dispatch.rescue import Restore, untouched


def remember(given: Any) -> Restore | None:
    """The `Restore` of a cache that only grew since, or None for anything that may do otherwise."""
    if type(given) is library.EncoderDecoderCache:
        return _both(given)
    if type(given) is not library.DynamicCache or getattr(given, "offloading", False):
        return None
    layers = [_layer(layer) for layer in given.layers]
    begun = len(layers)

    def restore() -> bool:
        del given.layers[begun:]
        return len(given.layers) == begun and all([restore_layer() for restore_layer in layers])

    return restore


def _both(given: Any) -> Restore | None:
    parts = [remember(cache) for cache in (given.self_attention_cache, given.cross_attention_cache)]
    is_updated = dict(given.is_updated)

    def restore() -> bool:
        given.is_updated = dict(is_updated)
        return all([part is not None and part() for part in parts])

    return None if None in parts else restore


def _layer(layer: Any) -> Restore:
    if type(layer) not in (library.DynamicLayer, library.DynamicSlidingWindowLayer):
        return untouched(layer)
    if not layer.is_initialized:
        return _emptied(layer)
    seen = getattr(layer, "cumulative_length", None)
    tensors = [_tensor(layer, name, seen) for name in ("keys", "values")]

    def restore() -> bool:
        restored = all([restore_tensor() for restore_tensor in tensors])
        if seen is not None:
            layer.cumulative_length = seen
        return restored

    return restore


def _emptied(layer: Any) -> Restore:
    """A layer that holds nothing yet goes back to what it had: nothing."""
    attributes = dict(vars(layer))

    def restore() -> bool:
        vars(layer).clear()
        vars(layer).update(attributes)
        return True

    return restore


def _tensor(layer: Any, name: str, seen: int | None) -> Callable[[], bool]:
    """`seen`: the tokens that a layer with a window has had, of which it may have dropped the first."""
    before: torch.Tensor = getattr(layer, name)
    same, empty = weakref.ref(before), before if before.numel() == 0 else None
    length = 0 if empty is not None else before.shape[-2]

    def restore() -> bool:
        now = getattr(layer, name)
        if now is same():
            return True
        if seen is not None and now.shape[-2] - length != layer.cumulative_length - seen:
            return False  # the window moved on
        setattr(layer, name, now[..., :length, :] if empty is None else empty)
        return True

    return restore
