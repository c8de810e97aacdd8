"""A door: moving nested data, under the names of the guide's `utils.operations`."""

from __future__ import annotations

from ..dispatch.moving import find_device, send_to_device

__all__ = ["find_device", "send_to_device"]
