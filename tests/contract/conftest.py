"""The two engines under one roof: each finds the documented names wherever its package keeps them."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

MODULES = {
    "hf_bigload": ("hooks", "utils"),
    "accelerate": ("hooks", "big_modeling", "utils", "utils.modeling", "utils.offload", "utils.operations"),
}


class Engine:
    def __init__(self, package: str) -> None:
        self.name = package
        pytest.importorskip(package)
        self._modules = [importlib.import_module(f"{package}.{name}") for name in MODULES[package]]

    def __getattr__(self, name: str) -> Any:
        for module in self._modules:
            if hasattr(module, name):
                return getattr(module, name)
        raise AttributeError(f"{self.name} has no {name}")


@pytest.fixture(params=MODULES)
def engine(request: pytest.FixtureRequest) -> Engine:
    return Engine(request.param)


@pytest.fixture
def ours() -> Engine:
    return Engine("hf_bigload")


@pytest.fixture
def theirs() -> Engine:
    return Engine("accelerate")
