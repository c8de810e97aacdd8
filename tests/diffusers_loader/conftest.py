"""Tiny pipelines, each saved once for all of these tests and run plainly once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers

import hf_bigload

from .pipelines import TINY, run

Saved = Callable[[str], Path]
Plain = Callable[..., torch.Tensor]


@pytest.fixture(autouse=True, scope="session")
def quiet() -> None:
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def disabled() -> Iterator[None]:
    """Every test starts without the plugin."""
    yield
    hf_bigload.disable()


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """`saved("flux")`: that pipeline's folder. Not to be written to."""
    folders: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            TINY[name].make().save_pretrained(folders[name])
        return folders[name]

    return get


@pytest.fixture(scope="session")
def plain(saved: Saved) -> Plain:
    """`plain("flux", device, torch_dtype=...)`: what that pipeline makes, loaded by the library alone."""
    results: dict[tuple[Any, ...], torch.Tensor] = {}

    def get(name: str, device: str = "cpu", **options: Any) -> torch.Tensor:
        key = (name, device, *options.items())
        if key not in results:
            results[key] = run(load(saved(name), name, **options).to(device), name)
        return results[key]

    return get


def load(folder: Path, name: str, **options: Any) -> Any:
    """The pipeline in `folder`, by the class that the pipeline `name` has."""
    return TINY[name].cls.from_pretrained(folder, **options)
