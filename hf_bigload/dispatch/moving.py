"""Moving the inputs and outputs of a module: nested data to a device, and the device that nested data lies on.

A forward under hooks passes here twice per block, mostly with nothing to move. So nothing is rebuilt without need:
data that already lies where it should comes back as the very same object.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn

from ..module_tensors import as_device


def send_to_device(
    tensor: Any, device: int | str | torch.device, non_blocking: bool = False, skip_keys: str | list[str] | None = None
) -> Any:
    """`tensor`, or nested lists, tuples and dicts of tensors, on `device`.

    Containers keep their type (named tuples, dict subclasses such as a model's output). Objects with a `to` of their
    own are asked to move themselves. Everything else, modules and caches included, passes untouched, and so does
    whatever lies on `device` already.

    `device` as an index means this machine's accelerator of that index. Values of dicts under a key of `skip_keys`
    stay where they are. `non_blocking` is ignored towards the CPU, where a reader would be faster than the copy.
    """
    target = as_device(device)
    if _lies_on(tensor, target):
        return tensor
    skipped = (skip_keys,) if isinstance(skip_keys, str) else tuple(skip_keys or ())
    return _send(tensor, target, non_blocking and target.type != "cpu", skipped)


def _lies_on(data: Any, device: torch.device) -> bool:
    """Whether that is plain at once: most of what passes here is a tensor or a tuple of them, with nothing to move."""
    if type(data) is tuple:
        return all([type(each) is torch.Tensor and each.device == device for each in data])
    return not data if type(data) is dict else type(data) is torch.Tensor and data.device == device


def find_device(data: Any) -> torch.device | None:
    """The device of the first tensor in nested lists, tuples and dicts, or None where there is no tensor."""
    if isinstance(data, torch.Tensor):
        return data.device
    if isinstance(data, Mapping):
        data = data.values()
    elif not isinstance(data, (list, tuple)):
        return None
    return next((device for device in map(find_device, data) if device is not None), None)


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], data: Any) -> Any:
    """`data` with `function` applied to every tensor in it; the same object if none changed."""
    if isinstance(data, torch.Tensor):
        return function(data)
    return _rebuilt(data, lambda _key, value: map_tensors(function, value))


def _send(data: Any, device: torch.device, non_blocking: bool, skipped: Collection[str]) -> Any:
    if isinstance(data, torch.Tensor):
        return data.to(device, non_blocking=non_blocking)
    if _moves_itself(data):
        return _ask_to_move(data, device, non_blocking)
    return _rebuilt(data, lambda key, value: value if key in skipped else _send(value, device, non_blocking, skipped))


def _moves_itself(data: Any) -> bool:
    """Whether `data` is something like a tokenizer's output. A module is not: its hooks say where its weights go."""
    return callable(getattr(data, "to", None)) and not isinstance(data, (type, nn.Module))


def _ask_to_move(data: Any, device: torch.device, non_blocking: bool) -> Any:
    try:
        return data.to(device, non_blocking=non_blocking)
    except TypeError:  # a `to` that knows no such option
        return data.to(device)


def _rebuilt(data: Any, convert: Callable[[Any, Any], Any]) -> Any:
    """A container of the type of `data` with `convert(key or None, value)` for each of its values.

    The same object where no value changed, or where `data` is no list, tuple or dict.
    """
    if isinstance(data, Mapping):
        items = {key: convert(key, value) for key, value in data.items()}
        return data if all(items[key] is value for key, value in data.items()) else _like_mapping(data, items)
    if isinstance(data, (list, tuple)):
        values = [convert(None, value) for value in data]
        return data if all(new is old for new, old in zip(values, data, strict=True)) else _like_sequence(data, values)
    return data


def _like_mapping(original: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    """A mapping of `original`'s type; a dict subclass keeps what else it carries, such as its default factory."""
    if type(original) is dict:
        return items
    if not isinstance(original, dict):
        return type(original)(items)  # type: ignore[call-arg]
    clone = copy.copy(original)
    for key, value in items.items():
        if value is not original[key]:
            clone[key] = value
    return clone


def _like_sequence(original: list[Any] | tuple[Any, ...], items: list[Any]) -> Any:
    if isinstance(original, tuple) and hasattr(original, "_fields"):
        return type(original)(*items)
    return type(original)(items)
