"""A door: every name of the three modules below it, under the names of the guide's `utils`."""

from __future__ import annotations

from typing import Any

from . import modeling, offload, operations

__all__ = sorted({*modeling.__all__, *offload.__all__, *operations.__all__})


def __getattr__(name: str) -> Any:
    for door in (modeling, offload, operations):
        if name in door.__all__:
            return getattr(door, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
