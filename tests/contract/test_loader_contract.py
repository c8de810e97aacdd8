"""What every loader promises, those of this package and a third party's alike."""

from __future__ import annotations

import importlib
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

from hf_bigload.errors import LoaderError, SeamMovedWarning
from hf_bigload.registry import BUILTIN_LOADERS, Registry
from hf_bigload.seams import PropertySeam, Provided, Seam, install


def load(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return wrapped(*args, **kwargs)


class ToyLoader:
    """A third party's, for a library of one function."""

    name, library, trigger = "toy", "toylib", "toylib.core"

    def seams(self) -> list[Seam]:
        return [Seam("toylib.core", "load", ("path",), load)]


@pytest.fixture(params=[*BUILTIN_LOADERS, ToyLoader()], ids=lambda loader: loader.name)
def loader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    core = types.ModuleType("toylib.core")
    core.load = lambda path: path  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "toylib", types.ModuleType("toylib"))
    monkeypatch.setitem(sys.modules, "toylib.core", core)
    pytest.importorskip(request.param.library)
    importlib.import_module(request.param.trigger)
    yield request.param


def attributes(seam: Seam | PropertySeam | Provided) -> dict[str, Any]:
    """The namespace that a seam lies in, as it is now."""
    owner: Any = importlib.import_module(seam.module)
    for part in getattr(seam, "path", "").split(".")[:-1]:
        owner = getattr(owner, part)
    return dict(vars(owner))


def test_keeps_the_protocol(loader: Any) -> None:
    registry = Registry(builtin=())
    registry.register(loader)
    with pytest.raises(LoaderError, match=loader.name):
        registry.register(loader)


def test_finds_every_seam_in_the_installed_library(loader: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", SeamMovedWarning)
        installation = install(loader.library, loader.seams())
    assert installation.active
    installation.restore()


def test_restores_the_library_to_what_it_was(loader: Any) -> None:
    seams = list(loader.seams())
    before = [attributes(seam) for seam in seams]
    installation = install(loader.library, seams)
    during = [attributes(seam) for seam in seams]
    assert any(now[name] is not was[name] for now, was in zip(during, before, strict=True) for name in was)
    installation.restore()
    for seam, was in zip(seams, before, strict=True):
        now = attributes(seam)
        assert now.keys() == was.keys() and all(now[name] is was[name] for name in was), str(seam)


def test_is_not_installed_twice(loader: Any) -> None:
    installation = install(loader.library, loader.seams())
    try:
        with pytest.raises(LoaderError, match="already"):
            install(loader.library, [seam for seam in loader.seams() if isinstance(seam, Seam)])
    finally:
        installation.restore()


def test_a_seam_that_moved_leaves_the_library_alone(loader: Any) -> None:
    seams = [s for s in loader.seams() if isinstance(s, Seam)]
    moved = Seam(seams[0].module, "gone_in_another_version", (), seams[0].wrapper)
    before = [attributes(seam) for seam in seams]
    with pytest.warns(SeamMovedWarning, match="gone_in_another_version"):
        assert not install(loader.library, [*seams, moved]).active
    assert [attributes(seam) for seam in seams] == before
