from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="package", autouse=True)
def quick_garbage_collection() -> Iterator[None]:
    """Every test here collects garbage, once or twice: spare it all that the libraries made when they were imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
