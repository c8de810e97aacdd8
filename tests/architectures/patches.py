"""What the general table of `tiny` cannot know of single architectures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

PATCHES: Mapping[str, Mapping[str, Any]] = {}
"""Fields by the `model_type` of the configuration, or part of one, that has them."""

WHOLE: Mapping[str, Callable[[], Any]] = {}
"""Configurations that have to be put together by hand, by architecture."""

INPUTS: Mapping[str, Callable[..., dict[str, Any]]] = {}
"""More than token ids, by architecture."""
