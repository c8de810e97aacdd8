"""Packages as if they had never been installed: for programs that call `hide` before anything else."""

from __future__ import annotations

import importlib.abc
import importlib.metadata
import importlib.util
import sys
from typing import Any


class _Refusal(importlib.abc.MetaPathFinder):
    def __init__(self, absent: tuple[str, ...]) -> None:
        self.absent = absent

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] in self.absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def hide(*absent: str) -> None:
    """Make these packages look as if they had never been installed."""
    sys.meta_path.insert(0, _Refusal(absent))
    find_spec, version = importlib.util.find_spec, importlib.metadata.version

    def without_spec(name: str, package: str | None = None) -> Any:
        return None if name.partition(".")[0] in absent else find_spec(name, package)

    def without_version(name: str) -> str:
        if name in absent:
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    importlib.util.find_spec = without_spec  # type: ignore[assignment]
    importlib.metadata.version = without_version
