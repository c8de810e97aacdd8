"""Loaders and the seams they hook, tried on a library made for the purpose."""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from hf_bigload import registry
from hf_bigload.errors import LoaderError, SeamMovedWarning
from hf_bigload.registry import BUILTIN_LOADERS, Registry
from hf_bigload.seams import Provided, Seam, install

LIBRARY = """
import functools

__version__ = "9.1"
present = "the library's own"

def load(name, device=None):
    return ("load", name, device)

load_tiny = functools.partial(load, "tiny")

class Base:
    def save(self, path):
        return ("save", path)

class Model(Base):
    @classmethod
    def build(cls, size):
        return ("build", cls.__name__, size)

    @staticmethod
    def check(size):
        return ("check", size)

    def run(self, steps):
        return ("run", steps)

    run_once = functools.partialmethod(run, 1)

class SmallModel(Model):
    pass
"""


@pytest.fixture
def name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a library that can be imported, and has not been."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "fakelib.py").write_text(LIBRARY)
    yield "fakelib"
    sys.modules.pop("fakelib", None)


@pytest.fixture
def library(name: str) -> ModuleType:
    return importlib.import_module(name)


@pytest.fixture
def loaders() -> Registry:
    known = Registry(builtin=())
    yield known
    known.disable()


def attributes(module: ModuleType) -> dict[str, list[tuple[str, int]]]:
    """Every attribute of the module and its classes, by identity and in order."""
    owners = [module, *(value for value in vars(module).values() if isinstance(value, type))]
    return {owner.__name__: [(key, id(value)) for key, value in vars(owner).items()] for owner in owners}


def recorder(label: str = "hooked") -> Any:
    def wrapper(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        wrapper.calls.append((instance, args, kwargs))
        return (label, wrapped(*args, **kwargs))

    wrapper.calls = []
    return wrapper


@dataclass(frozen=True)
class FakeLoader:
    """Hooks `load`, unless told otherwise."""

    name: str = "fake"
    library: str = "fakelib"
    trigger: str = "fakelib"
    label: str = "hooked"
    hooks: tuple[Any, ...] | None = None

    def seams(self) -> Any:
        return (Seam("fakelib", "load", ("device",), recorder(self.label)),) if self.hooks is None else self.hooks


# Seams


@pytest.mark.parametrize(
    ("path", "call", "bound_to", "result"),
    [
        ("load", lambda lib, model: lib.load("big", device=0), None, ("load", "big", 0)),
        ("load_tiny", lambda lib, model: lib.load_tiny(device=0), None, ("load", "tiny", 0)),
        ("Model.run", lambda lib, model: model.run(3), "model", ("run", 3)),
        ("Model.run", lambda lib, model: lib.Model.run(model, 3), "model", ("run", 3)),
        ("Model.run_once", lambda lib, model: model.run_once(), "model", ("run", 1)),
        ("Model.save", lambda lib, model: model.save("here"), "model", ("save", "here")),
        ("Model.build", lambda lib, model: lib.SmallModel.build(7), "class", ("build", "SmallModel", 7)),
        ("Model.check", lambda lib, model: lib.Model.check(7), None, ("check", 7)),
        ("Model.check", lambda lib, model: model.check(7), None, ("check", 7)),
    ],
)
def test_wrapper_gets_the_bound_function_and_what_it_is_bound_to(
    library: ModuleType, path: str, call: Any, bound_to: str | None, result: Any
) -> None:
    wrapper, model = recorder(), library.SmallModel()
    install("fakelib", [Seam("fakelib", path, (), wrapper)])

    assert call(library, model) == ("hooked", result)
    assert wrapper.calls[0][0] is {None: None, "model": model, "class": library.SmallModel}[bound_to]


def test_restore_puts_back_the_very_same_attributes(library: ModuleType) -> None:
    before = attributes(library)
    paths = ("load", "load_tiny", "Model.run", "Model.run_once", "Model.save", "Model.build", "Model.check")
    installation = install(
        "fakelib", [*(Seam("fakelib", path, (), recorder()) for path in paths), Provided("fakelib", "absent", 1)]
    )
    assert installation.active
    assert attributes(library) != before

    installation.restore()

    assert attributes(library) == before
    assert not installation.active


@pytest.mark.parametrize(
    ("moved", "problem"),
    [
        (Seam("fakelib", "fetch", (), recorder()), "fakelib:fetch"),
        (Seam("fakelib", "Pipeline.load", (), recorder()), "Pipeline"),
        (Seam("fakelib.core", "load", (), recorder()), "fakelib.core"),
        (Seam("fakelib", "present", (), recorder()), "not callable"),
        (Seam("fakelib", "load", ("name", "budget"), recorder()), "no parameter 'budget' in load(name, device=None)"),
        (Seam("fakelib", "Model.build", ("width",), recorder()), "no parameter 'width' in build(size)"),
        (Provided("fakelib.core", "absent", 1), "fakelib.core"),
    ],
)
def test_a_moved_seam_is_named_and_nothing_is_patched(library: ModuleType, moved: Any, problem: str) -> None:
    before = attributes(library)

    with pytest.warns(SeamMovedWarning) as caught:
        installation = install("fakelib", [Seam("fakelib", "Model.run", ("steps",), recorder()), moved])

    message = str(caught[0].message)
    assert "fakelib 9.1" in message
    assert str(moved) in message
    assert problem in message
    assert attributes(library) == before
    assert not installation.active


def test_the_signature_stays_visible(library: ModuleType) -> None:
    plain = inspect.signature(library.load), inspect.signature(library.Model.build)
    install("fakelib", [Seam("fakelib", path, (), recorder()) for path in ("load", "Model.build")])
    assert (inspect.signature(library.load), inspect.signature(library.Model.build)) == plain


def test_an_exception_of_the_wrapper_arrives_untouched(library: ModuleType) -> None:
    error = KeyError("mine")

    def wrapper(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        raise error

    install("fakelib", [Seam("fakelib", "Model.build", ("size",), wrapper)])
    with pytest.raises(KeyError) as caught:
        library.Model.build(1)
    assert caught.value is error
    assert error.__cause__ is error.__context__ is None


def test_a_reference_that_outlives_the_restoration_is_the_plain_function(library: ModuleType) -> None:
    installation = install("fakelib", [Seam("fakelib", path, (), recorder()) for path in ("load", "Model.build")])
    load, build = library.load, library.Model.build
    installation.restore()
    assert load("big") == ("load", "big", None)
    assert build(1) == ("build", "Model", 1)


@pytest.mark.parametrize("path", ["load", "Model.run", "Model.save"])
@pytest.mark.parametrize("first_out", [0, 1])
def test_two_installations_on_one_function_are_restored_in_either_order(
    library: ModuleType, path: str, first_out: int
) -> None:
    before = attributes(library)
    call = {
        "load": lambda: library.load("big"),
        "Model.run": lambda: library.Model().run(1),
        "Model.save": lambda: library.Model().save("here"),
    }[path]
    plain = call()
    both = [install("fakelib", [Seam("fakelib", path, (), recorder(label))]) for label in ("inner", "outer")]
    assert call() == ("outer", ("inner", plain))

    both.pop(first_out).restore()
    assert call() == (("outer", "inner")[first_out], plain)

    both.pop().restore()
    assert attributes(library) == before


def test_a_patch_that_somebody_put_over_ours_is_left_alone(library: ModuleType) -> None:
    installation = install("fakelib", [Seam("fakelib", "load", (), recorder())])
    ours = library.load
    library.load = theirs = lambda *args: ("theirs", ours(*args))

    installation.restore()

    assert library.load is theirs
    assert library.load("big") == ("theirs", ("load", "big", None))


def test_installing_the_same_wrapper_twice_is_refused(library: ModuleType) -> None:
    seam = Seam("fakelib", "load", (), recorder())
    first = install("fakelib", [seam])
    with pytest.raises(LoaderError, match="fakelib:load"):
        install("fakelib", [seam])
    assert first.active
    assert library.load("big") == ("hooked", ("load", "big", None))


def test_a_patch_that_fails_half_way_is_undone(library: ModuleType) -> None:
    before = attributes(library)
    unpatchable = Seam("builtins", "int.bit_length", (), recorder())
    with pytest.raises(TypeError, match="immutable"):
        install("fakelib", [Seam("fakelib", "load", (), recorder()), Provided("fakelib", "absent", 1), unpatchable])
    assert attributes(library) == before


def test_a_provided_name_is_set_only_where_it_is_absent(library: ModuleType) -> None:
    install("fakelib", [Provided("fakelib", "absent", "ours"), Provided("fakelib", "present", "ours")])
    assert library.absent == "ours"
    assert library.present == "the library's own"


def test_a_provided_name_that_the_library_bound_since_is_not_removed(library: ModuleType) -> None:
    installation = install("fakelib", [Provided("fakelib", "absent", "ours")])
    library.absent = "the library's own"
    installation.restore()
    assert library.absent == "the library's own"


def test_hooked_functions_pickle_and_copy_as_the_functions_do(library: ModuleType) -> None:
    install("fakelib", [Seam("fakelib", path, (), recorder()) for path in ("load", "Model.build", "Model.run")])
    model = library.SmallModel()
    calls = [(library.load, (5,)), (library.SmallModel.build, (5,)), (model.run, (5,)), (library.Model.run, (model, 5))]
    for function, arguments in calls:
        again = pickle.loads(pickle.dumps(function))
        assert again(*arguments) == function(*arguments)
        assert copy.copy(function) is copy.deepcopy(function) is function


# What a loader must be


@pytest.mark.parametrize(
    ("broken", "attribute"),
    [
        (FakeLoader(name=""), "name"),
        (FakeLoader(library=None), "library"),
        (FakeLoader(trigger=3), "trigger"),
        (FakeLoader(trigger="fakelib:load"), "trigger"),
        (type("NoSeams", (), {"name": "bare", "library": "x", "trigger": "x"})(), "seams"),
        (type("Needy", (), {**vars(FakeLoader()), "seams": lambda self, model: ()})(), "seams"),
    ],
)
def test_a_loader_that_breaks_the_protocol_is_refused_at_once(loaders: Registry, broken: Any, attribute: str) -> None:
    with pytest.raises(LoaderError, match=rf"loader '\w+': attribute '{attribute}' should be"):
        loaders.register(broken)
    assert broken not in loaders.loaders()


def test_a_class_is_not_a_loader(loaders: Registry) -> None:
    with pytest.raises(LoaderError, match="instance"):
        loaders.register(FakeLoader)


def test_a_name_is_taken_once_unless_replaced(loaders: Registry, library: ModuleType) -> None:
    before = attributes(library)
    loaders.enable()
    loaders.register(FakeLoader(label="first"))
    with pytest.raises(LoaderError, match=r"'fake'.*replace=True"):
        loaders.register(FakeLoader(label="second"))
    assert library.load("big")[0] == "first"

    loaders.register(FakeLoader(label="second"), replace=True)
    assert library.load("big") == ("second", ("load", "big", None))

    loaders.unregister("fake")
    assert attributes(library) == before


def test_unregistering_an_unknown_name_says_which_there_are(loaders: Registry) -> None:
    loaders.register(FakeLoader())
    with pytest.raises(LoaderError, match=r"'fale'.*fake"):
        loaders.unregister("fale")


# When hooks go in


def test_a_library_imported_before_is_hooked_at_once(loaders: Registry, library: ModuleType) -> None:
    loaders.register(FakeLoader())
    assert library.load("big")[0] == "load"
    loaders.enable()
    loaders.install_all()
    assert library.load("big")[0] == "hooked"


def test_a_library_imported_later_is_hooked_then_and_not_imported_before(loaders: Registry, name: str) -> None:
    loaders.register(FakeLoader())
    loaders.enable()
    loaders.install_all()
    assert name not in sys.modules
    assert importlib.import_module(name).load("big")[0] == "hooked"


def test_a_loader_registered_while_enabled_is_installed_at_once(loaders: Registry, library: ModuleType) -> None:
    loaders.enable()
    loaders.register(FakeLoader())
    assert library.load("big")[0] == "hooked"


def test_a_library_imported_after_disabling_is_left_alone_until_enabled_again(loaders: Registry, name: str) -> None:
    loaders.register(FakeLoader())
    loaders.enable()
    loaders.install_all()
    loaders.disable()
    library = importlib.import_module(name)
    assert library.load("big")[0] == "load"

    loaders.enable()
    loaders.install_all()
    assert library.load("big")[0] == "hooked"


class ImpatientLoader(FakeLoader):
    """Relies on its library being there in full when it is asked for seams."""

    def seams(self) -> Any:
        assert hasattr(sys.modules["fakelib"], "load"), "asked before the import was over"
        return super().seams()


def test_enabling_in_one_thread_waits_for_the_import_in_another(
    loaders: Registry, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = ModuleType("gate")
    gate.reached, gate.passed = threading.Event(), threading.Event()
    monkeypatch.setitem(sys.modules, "gate", gate)
    (tmp_path / "fakelib.py").write_text("import gate\ngate.reached.set()\ngate.passed.wait(10)\n" + LIBRARY)
    loaders.register(ImpatientLoader())
    loaders.enable()

    with warnings.catch_warnings(record=True) as caught, ThreadPoolExecutor(2) as pool:
        importing = pool.submit(importlib.import_module, name)
        assert gate.reached.wait(10)
        installing = pool.submit(loaders.install_all)
        wait([installing], timeout=0.1)
        gate.passed.set()
        installing.result(10)
        assert importing.result(10).load("big") == ("hooked", ("load", "big", None))
    assert not caught


class BrokenLoader(FakeLoader):
    def seams(self) -> Any:
        raise RuntimeError("no idea where")


@pytest.mark.parametrize(
    ("faulty", "message"),
    [
        (BrokenLoader(name="faulty"), "loader 'faulty'.*fakelib keeps its stock.*RuntimeError: no idea where"),
        (FakeLoader(name="faulty", hooks=("load",)), "loader 'faulty'.*should return Seam.*Provided values.*'load'"),
    ],
)
def test_a_faulty_loader_breaks_neither_the_import_nor_the_others(
    loaders: Registry, name: str, faulty: FakeLoader, message: str
) -> None:
    loaders.register(faulty)
    loaders.register(FakeLoader())
    loaders.enable()
    loaders.install_all()
    with pytest.warns(UserWarning, match=message):
        library = importlib.import_module(name)
    assert library.load("big") == ("hooked", ("load", "big", None))


def test_a_moved_seam_is_said_once_while_enabled(loaders: Registry, library: ModuleType) -> None:
    loaders.register(FakeLoader(hooks=(Seam("fakelib", "fetch", (), recorder()),)))
    loaders.enable()
    with pytest.warns(SeamMovedWarning):
        loaders.install_all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaders.install_all()


# Entry points


def declare(folder: Path, distribution: str, **loaders: str) -> None:
    """A distribution in `folder` that declares loaders, as an installer would leave it."""
    info = folder / f"{distribution}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    lines = [f"{name} = {target}" for name, target in loaders.items()]
    (info / "entry_points.txt").write_text("\n".join(["[hf_bigload.loaders]", *lines, ""]))


PLUGIN = """
class PluginLoader:
    name, library, trigger = "plugin", "fakelib", "fakelib"
    def seams(self):
        return ()

class NamelessLoader(PluginLoader):
    name = ""

ready = PluginLoader()
ready.name = "ready"
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "fakeplugin.py").write_text(PLUGIN)
    yield tmp_path
    sys.modules.pop("fakeplugin", None)


def names(known: Registry) -> set[str]:
    return {loader.name for loader in known.loaders()}


def test_loaders_of_installed_packages_are_found_when_enabled(loaders: Registry, site: Path) -> None:
    declare(site, "good", plugin="fakeplugin:PluginLoader", ready="fakeplugin:ready")
    loaders.enable()
    assert "fakeplugin" not in sys.modules
    loaders.install_all()
    assert {"plugin", "ready"} <= names(loaders)


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        ("nowhere:Loader", "No module named 'nowhere'"),
        ("fakeplugin:Missing", "Missing"),
        ("fakeplugin:NamelessLoader", "attribute 'name'"),
    ],
)
def test_a_broken_entry_point_is_named_and_does_not_stop_the_others(
    loaders: Registry, site: Path, target: str, problem: str
) -> None:
    declare(site, "bad-dist", broken=target)
    declare(site, "good", plugin="fakeplugin:PluginLoader")
    with pytest.warns(UserWarning, match=f"'bad-dist'.*'broken'.*{problem}"):
        assert "plugin" in names(loaders)


def test_an_entry_point_does_not_displace_a_loader_of_the_same_name(loaders: Registry, site: Path) -> None:
    mine = FakeLoader(name="plugin")
    loaders.register(mine)
    declare(site, "late", plugin="fakeplugin:PluginLoader")
    with pytest.warns(UserWarning, match="'late'.*registered already"):
        assert mine in loaders.loaders()


# Built-in loaders


def test_built_in_loaders_are_known_without_metadata_and_registered_once(site: Path) -> None:
    declare(site, "hf_bigload", transformers=BUILTIN_LOADERS[0].target)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        known = Registry().loaders()
    assert [loader.name for loader in known].count("transformers") == 1
    assert BUILTIN_LOADERS[0] in known


@pytest.mark.parametrize("stand_in", BUILTIN_LOADERS, ids=lambda loader: loader.name)
def test_a_built_in_loader_is_what_its_stand_in_says(stand_in: registry.BuiltinLoader) -> None:
    real = stand_in.load()
    Registry(builtin=()).register(real)
    assert (real.name, real.library, real.trigger) == (stand_in.name, stand_in.library, stand_in.trigger)


def test_the_module_functions_work_on_the_registry_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registry", Registry(builtin=()))
    mine = FakeLoader()
    registry.register_loader(mine)
    assert mine in registry.loaders()
    registry.unregister_loader("fake")
    assert mine not in registry.loaders()
