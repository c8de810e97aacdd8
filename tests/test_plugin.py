"""Turning the plugin on and off, its settings, and the names of the package."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import hf_bigload
from hf_bigload import plugin, registry, settings
from hf_bigload.errors import DeviceMapError
from hf_bigload.registry import Registry
from hf_bigload.seams import Provided, Seam
from hf_bigload.settings import Settings, parse_device_map, parse_max_memory, parse_size

GIB = 1024**3


class FakeLoader:
    name, library, trigger = "fake", "fakelib", "fakelib"

    def seams(self) -> list[Any]:
        return [
            Seam("fakelib", "load", ("name",), lambda wrapped, instance, args, kwargs: ("hooked", *args)),
            Seam("fakelib", "Model.build", (), lambda wrapped, instance, args, kwargs: ("hooked", instance)),
            Provided("fakelib", "absent", 1),
        ]


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plugin that is off, knows one loader, and is told nothing by the environment."""
    for field in ("DEVICE_MAP", "MAX_MEMORY", "OFFLOAD_FOLDER", "EXPLAIN"):
        monkeypatch.delenv(f"HF_BIGLOAD_{field}", raising=False)
    plugin.disable()
    monkeypatch.setattr(registry, "_registry", Registry(builtin=(FakeLoader(),)))
    yield
    plugin.disable()


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("fakelib")
    source = "def load(name): return name\nclass Model:\n    @classmethod\n    def build(cls): return cls\n"
    exec(source, vars(module))
    monkeypatch.setitem(sys.modules, "fakelib", module)
    return module


def is_hooked(library: ModuleType) -> bool:
    return library.load("big") == ("hooked", "big")


def attributes(library: ModuleType) -> list[list[tuple[str, int]]]:
    return [[(name, id(value)) for name, value in vars(owner).items()] for owner in (library, library.Model)]


# On and off


def test_enable_hooks_until_disable_restores(library: ModuleType) -> None:
    before = attributes(library)
    hf_bigload.enable()
    assert is_hooked(library)
    assert library.Model.build() == ("hooked", library.Model)
    hf_bigload.disable()
    assert attributes(library) == before


def test_a_with_block_restores_when_left_even_by_an_error(library: ModuleType) -> None:
    before = attributes(library)
    with pytest.raises(ZeroDivisionError), hf_bigload.enable():
        assert is_hooked(library)
        raise ZeroDivisionError
    assert attributes(library) == before


def test_an_inner_block_leaves_the_outer_one_on(library: ModuleType) -> None:
    with hf_bigload.enable():
        with hf_bigload.enable():
            pass
        assert is_hooked(library)
    assert not is_hooked(library)


def test_a_block_leaves_a_plain_enable_on(library: ModuleType) -> None:
    hf_bigload.enable()
    with hf_bigload.enable(explain=True):
        pass
    assert is_hooked(library)


def test_overlapping_blocks_may_end_in_any_order(library: ModuleType) -> None:
    first, second = hf_bigload.enable(explain=True), hf_bigload.enable()
    first.__exit__(None, None, None)
    assert is_hooked(library)
    second.__exit__(None, None, None)
    assert not is_hooked(library)


def test_enabling_twice_takes_one_disable(library: ModuleType) -> None:
    hf_bigload.enable()
    hf_bigload.enable(explain=True)
    hf_bigload.disable()
    assert not is_hooked(library)
    assert not plugin.is_enabled()


def test_disable_inside_a_block_is_final_and_its_end_disturbs_no_later_enable(library: ModuleType) -> None:
    with hf_bigload.enable():
        hf_bigload.disable()
        assert not is_hooked(library)
        hf_bigload.enable()
    assert is_hooked(library)


def test_ending_a_block_twice_ends_no_other(library: ModuleType) -> None:
    activation = hf_bigload.enable()
    hf_bigload.enable()
    activation.__exit__(None, None, None)
    activation.__exit__(None, None, None)
    assert is_hooked(library)


def test_the_same_enable_over_and_over_does_not_pile_up() -> None:
    for _ in range(100):
        hf_bigload.enable(max_memory={"cpu": "1GiB"})
    assert len(plugin._layers) == 1


def test_the_notebook_extension_enables_and_disables(library: ModuleType) -> None:
    hf_bigload.load_ipython_extension(object())
    assert is_hooked(library)
    hf_bigload.unload_ipython_extension(object())
    assert not is_hooked(library)


def run_in_threads(work: Callable[[int], None], count: int = 8) -> None:
    """Run `work(0)`, `work(1)`, ... at once, switching between them as often as can be."""
    barrier = threading.Barrier(count)

    def start(number: int) -> None:
        barrier.wait(10)
        work(number)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(count) as pool:
            list(pool.map(start, range(count), timeout=60))
    finally:
        sys.setswitchinterval(interval)


def test_threads_enabling_and_disabling_leave_everything_restored(library: ModuleType) -> None:
    before = attributes(library)

    def work(number: int) -> None:
        for _ in range(50):
            with hf_bigload.enable(explain=bool(number % 2)):
                assert is_hooked(library)

    run_in_threads(work)
    assert attributes(library) == before


def test_threads_that_disable_everything_leave_everything_restored(library: ModuleType) -> None:
    before = attributes(library)

    def work(number: int) -> None:
        for _ in range(50):
            hf_bigload.enable()
            hf_bigload.disable()

    run_in_threads(work)
    assert attributes(library) == before
    assert not plugin.is_enabled()


def test_enabling_imports_neither_torch_nor_a_library() -> None:
    program = (
        "import sys, hf_bigload; hf_bigload.enable(max_memory={'cpu': '1GiB'}); hf_bigload.disable()\n"
        "print(*{'torch', 'transformers', 'diffusers', 'accelerate', 'numpy'} & set(sys.modules))"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=root)
    assert (done.stderr, done.stdout.strip()) == ("", "")


# Settings


def test_arguments_are_the_defaults_while_enabled() -> None:
    with hf_bigload.enable("auto", {0: "1GiB", "cpu": 5}, Path("spilled"), explain=True):
        assert settings.current() == Settings("auto", {0: GIB, "cpu": 5}, "spilled", True)
    assert settings.current() == Settings()


def test_an_inner_enable_changes_only_what_it_names() -> None:
    with hf_bigload.enable(device_map="auto", explain=True):
        with hf_bigload.enable(device_map="balanced"):
            assert settings.current() == Settings("balanced", explain=True)
            with hf_bigload.enable(explain=False):
                assert settings.current() == Settings("balanced", explain=False)
        assert settings.current() == Settings("auto", explain=True)


def test_the_end_of_an_outer_enable_takes_only_its_own_arguments_away() -> None:
    outer = hf_bigload.enable(device_map="auto")
    hf_bigload.enable(explain=True)
    outer.__exit__(None, None, None)
    assert settings.current() == Settings(explain=True)


def test_the_environment_gives_defaults_and_arguments_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_BIGLOAD_DEVICE_MAP", "auto")
    monkeypatch.setenv("HF_BIGLOAD_MAX_MEMORY", "0=10GiB, cpu=30GiB")
    monkeypatch.setenv("HF_BIGLOAD_OFFLOAD_FOLDER", "spilled")
    monkeypatch.setenv("HF_BIGLOAD_EXPLAIN", "1")
    assert settings.current() == Settings("auto", {0: 10 * GIB, "cpu": 30 * GIB}, "spilled", True)
    with hf_bigload.enable(max_memory={"cpu": "1GiB"}, explain=False):
        assert settings.current() == Settings("auto", {"cpu": GIB}, "spilled", False)


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("HF_BIGLOAD_MAX_MEMORY", "0:10GiB"),
        ("HF_BIGLOAD_DEVICE_MAP", '{"encoder": [0]}'),
        ("HF_BIGLOAD_EXPLAIN", "maybe"),
    ],
)
def test_a_bad_variable_is_named_and_nothing_is_hooked(
    library: ModuleType, monkeypatch: pytest.MonkeyPatch, variable: str, text: str
) -> None:
    monkeypatch.setenv(variable, text)
    with pytest.raises(DeviceMapError, match=variable):
        hf_bigload.enable()
    assert not is_hooked(library)
    assert not plugin.is_enabled()


def test_a_bad_budget_changes_nothing(library: ModuleType) -> None:
    with hf_bigload.enable(explain=True):
        with pytest.raises(DeviceMapError, match="'cuda:0'"):
            hf_bigload.enable(max_memory={"cuda:0": "1GiB"})
        assert settings.current() == Settings(explain=True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (0, 0),
        (1024, 1024),
        (2.5e9, 2_500_000_000),
        ("1024", 1024),
        ("10GiB", 10 * GIB),
        ("10GB", 10_000_000_000),
        ("10gb", 10_000_000_000),
        ("200KB", 200_000),
        ("200 kib", 204_800),
        ("1.5GiB", 3 * GIB // 2),
        (".5 MiB", 524_288),
        ("3TiB", 3 * 1024**4),
        ("7B", 7),
    ],
)
def test_sizes_are_read_as_bytes(text: Any, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize(
    "size", ["", "GiB", "ten GiB", "10 Gi", "10XB", "-1GiB", "1e3MB", "1.2.3GB", -1, 1e400, None, True]
)
def test_what_is_not_a_size_is_refused_by_name(size: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(size))):
        parse_size(size)


@pytest.mark.parametrize("key", [0, "cpu", "disk", "mps"])
def test_budgets_name_an_accelerator_or_a_memory(key: int | str) -> None:
    assert parse_max_memory(f"{key}=1KiB") == {key: 1024}


@pytest.mark.parametrize(
    ("text", "piece"),
    [
        ("0=1GiB,cpu", "'cpu'"),
        ("0=1GiB,", "''"),
        ("gpu=1GiB", "'gpu'"),
        ("-1=1GiB", "'-1'"),
        ("cpu=lots", "'lots'"),
        ("0=1GiB,0=2GiB", "0 twice"),
    ],
)
def test_a_bad_budget_is_named(text: str, piece: str) -> None:
    with pytest.raises(DeviceMapError, match=piece):
        parse_max_memory(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("auto", "auto"), (" cuda:1 ", "cuda:1"), ("0", 0), ('{"": "cpu", "lm_head": 0}', {"": "cpu", "lm_head": 0})],
)
def test_device_maps_are_read_from_text(text: str, expected: Any) -> None:
    assert parse_device_map(text) == expected


@pytest.mark.parametrize("text", ["", "{", '{"a": null}', '{"a": true}'])
def test_what_is_not_a_device_map_is_refused(text: str) -> None:
    with pytest.raises(DeviceMapError):
        parse_device_map(text)


# The package's names


def test_every_public_name_resolves() -> None:
    for name in hf_bigload.__all__:
        assert callable(getattr(hf_bigload, name)), name
        assert name in dir(hf_bigload)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'lode'"):
        _ = hf_bigload.lode


@pytest.mark.parametrize("name", ["enable", "register_loader"])
def test_a_function_is_not_hidden_by_a_submodule_of_its_name(name: str) -> None:
    function = getattr(hf_bigload, name)
    setattr(hf_bigload, name, ModuleType(f"hf_bigload.{name}"))  # as the import system does, once, on first import
    assert getattr(hf_bigload, name) is function


def test_the_version_is_the_one_that_is_packaged() -> None:
    project = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    packaged = re.search(r'^version = "(.+)"', project, re.MULTILINE)
    assert packaged is None or packaged[1] == hf_bigload.__version__
