"""Tiny models, each saved once for all of these tests and loaded plainly once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.utils import logging

import hf_bigload

from .models import Saved, save

Library = Callable[[str], Saved]


@pytest.fixture(autouse=True, scope="session")
def quiet() -> None:
    logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def disabled() -> Iterator[None]:
    """Every test starts without the plugin."""
    yield
    hf_bigload.disable()


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """`saved("llama")`: that model's folder. Not to be written to."""
    models: dict[str, Saved] = {}

    def get(name: str) -> Saved:
        if name not in models:
            models[name] = save(name, tmp_path_factory.mktemp(name))
        return models[name]

    return get


@pytest.fixture(scope="session")
def plain(saved: Library) -> Callable[..., PreTrainedModel]:
    """`plain("llama", torch.bfloat16)`: that model as the library loads it by itself. Not to be written to."""
    models: dict[tuple[Any, ...], PreTrainedModel] = {}

    def get(name: str, dtype: torch.dtype | None = None, **kwargs: Any) -> PreTrainedModel:
        key = (name, dtype, *kwargs.items())
        if key not in models:
            models[key] = saved(name).plain(dtype=dtype, **kwargs)
        return models[key]

    return get


@pytest.fixture
def llama(saved: Library) -> Saved:
    return saved("llama")


@pytest.fixture
def deep(saved: Library) -> Saved:
    return saved("deep")
