"""The loaders this package knows, and when their hooks go in.

A loader teaches hf_bigload one library. To write one, keep the `Loader` protocol and either call `register_loader`, or
name it in your package's metadata, where `hf_bigload.enable()` finds it:

    [project.entry-points."hf_bigload.loaders"]
    mylib = "mylib_bigload:MyLoader"

While the plugin is on, each loader's seams are installed as soon as its `trigger` module has been imported (at once, if
that was long ago), and restored when it goes off. Nothing here imports a loader's library.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import pkgutil
import sys
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

import wrapt

from hf_bigload.errors import LoaderError
from hf_bigload.seams import AnySeam, Installation, PropertySeam, Provided, Seam, prepare
from hf_bigload.specs import ModelSpec, Needs, TensorSpec, Workload

ENTRY_POINT_GROUP = "hf_bigload.loaders"


class Loader(Protocol):
    """What a loader is: four attributes, checked when it is registered.

    Keep the module it lives in light, and import the library inside `seams`: enabling the plugin imports loaders, and
    must not import torch.
    """

    @property
    def name(self) -> str:
        """What the loader is called; no two have the same."""

    @property
    def library(self) -> str:
        """The library it serves, as a person knows it ("transformers"): for messages, and to look up its version."""

    @property
    def trigger(self) -> str:
        """The module whose import makes the seams installable ("transformers.modeling_utils")."""

    def seams(self) -> Sequence[AnySeam]:
        """The functions to take over and the names to provide. Called once `trigger` is imported, never before."""


@dataclass(frozen=True)
class Described:
    """A model that is not loaded, as a loader knows it."""

    spec: ModelSpec
    needs: Callable[[Workload], Needs] = field(compare=False, repr=False)
    """What a request takes beside the weights."""


@runtime_checkable
class Describes(Protocol):
    """What a loader may also be: one that knows a model before its weights are there."""

    def describe(self, folder: str, stored: Mapping[str, TensorSpec] | None, dtype: str | None) -> Described | None:
        """The model whose config is in `folder`, with weights in `dtype` (None: as the library chooses it).

        `stored` are the tensors of its files, by their names there; None where they are not known. Returns None for a
        folder that is not the library's, or a model that it cannot make on meta.
        """


@runtime_checkable
class Traces(Protocol):
    """What a loader may also be: one that knows how its models are called."""

    def request(self, model: Any, workload: Workload) -> Any | None:
        """The calls of one request to `model`, as a `trace.Request`; None for a model that is not the library's."""


@dataclass(frozen=True)
class BuiltinLoader:
    """Stands for a loader of this package until its trigger is imported, so that nothing heavy comes before that.

    `target` is "module:Class". Known by this path, it is found without the package's metadata too.
    """

    name: str
    library: str
    trigger: str
    target: str

    def load(self) -> Loader:
        """The loader itself."""
        loader: Loader = pkgutil.resolve_name(self.target)()
        return loader

    def seams(self) -> Sequence[AnySeam]:
        return self.load().seams()

    def describe(self, folder: str, stored: Mapping[str, TensorSpec] | None, dtype: str | None) -> Described | None:
        if importlib.util.find_spec(self.library) is None:
            return None
        loader = self.load()
        return loader.describe(folder, stored, dtype) if isinstance(loader, Describes) else None

    def request(self, model: Any, workload: Workload) -> Any | None:
        if self.trigger not in sys.modules:
            return None  # so the model is of something else
        loader = self.load()
        return loader.request(model, workload) if isinstance(loader, Traces) else None


BUILTIN_LOADERS = (
    BuiltinLoader(
        "transformers",
        library="transformers",
        trigger="transformers.modeling_utils",
        target="hf_bigload.loaders.transformers:TransformersLoader",
    ),
    BuiltinLoader("peft", library="peft", trigger="peft.peft_model", target="hf_bigload.loaders.peft:PeftLoader"),
    BuiltinLoader(
        "diffusers",
        library="diffusers",
        trigger="diffusers.models.modeling_utils",
        target="hf_bigload.loaders.diffusers:DiffusersLoader",
    ),
    BuiltinLoader(
        "diffusers_single_file",
        library="diffusers",
        trigger="diffusers.loaders.single_file_model",
        target="hf_bigload.loaders.diffusers:SingleFileLoader",
    ),
    BuiltinLoader(
        "diffusers_group_offloading",
        library="diffusers",
        trigger="diffusers.hooks.group_offloading",
        target="hf_bigload.loaders.diffusers:GroupOffloadingLoader",
    ),
    BuiltinLoader(
        "diffusers_pipelines",
        library="diffusers",
        trigger="diffusers.pipelines.pipeline_utils",
        target="hf_bigload.loaders.diffusers_pipelines:PipelinesLoader",
    ),
)


def register_loader(loader: Loader, *, replace: bool = False) -> None:
    """Make `loader` known; its seams go in now if the plugin is on, else when it is enabled.

    Raises LoaderError, naming the loader, the attribute and the mismatch, if it does not keep the `Loader` protocol, or
    if its name is taken and not `replace`. A replaced loader's seams are restored first.
    """
    _registry.register(loader, replace=replace)


def unregister_loader(name: str) -> None:
    """Forget a loader and restore what it hooked. Raises LoaderError if there is none of that name."""
    _registry.unregister(name)


def loaders() -> tuple[Loader, ...]:
    """All loaders, those of installed packages included: built-in ones first, then in order of registration."""
    return _registry.loaders()


def describe(folder: str, stored: Mapping[str, TensorSpec] | None, dtype: str | None = None) -> Described | None:
    """What the first loader that knows the model in `folder` says of it, or None; see `Describes`."""
    asked = (loader.describe(folder, stored, dtype) for loader in loaders() if isinstance(loader, Describes))
    return next((described for described in asked if described is not None), None)


def request(model: Any, workload: Workload) -> Any | None:
    """The calls of a request to `model` as the first loader that knows it gives them, or None; see `Traces`."""
    asked = (loader.request(model, workload) for loader in loaders() if isinstance(loader, Traces))
    return next((found for found in asked if found is not None), None)


def enable() -> None:
    """From now on, seams may be installed. Follow with `install_loaders`."""
    _registry.enable()


def install_loaders() -> None:
    """Discover entry points, then install every loader whose library is imported, and watch for the others.

    Imports modules: hold no lock that an import could wait for.
    """
    _registry.install_all()


def disable() -> None:
    """Restore every hooked library. Imports nothing."""
    _registry.disable()


@dataclass(eq=False)
class _Entry:
    loader: Loader
    installation: Installation | None = None
    given_up: bool = False
    """Whether its library was found changed since the plugin was enabled: said once, not at every call."""


class Registry:
    """Loaders by name, and which of them are installed.

    The lock is held around the table and the patching only, never around an import: an import may be under way in
    another thread, and end in `_trigger_imported`, which takes the lock too.
    """

    def __init__(self, builtin: Sequence[Loader] = BUILTIN_LOADERS) -> None:
        self._lock = threading.RLock()
        self._entries = {loader.name: _Entry(loader) for loader in builtin}
        self._enabled = False
        self._discovered = False
        self._watched: set[str] = set()

    def loaders(self) -> tuple[Loader, ...]:
        self._discover()
        with self._lock:
            return tuple(entry.loader for entry in self._entries.values())

    def register(self, loader: Loader, *, replace: bool = False) -> None:
        _validate(loader)
        entry = _Entry(loader)
        with self._lock:
            if loader.name in self._entries:
                if not replace:
                    raise LoaderError(
                        f"loader {loader.name!r}: a loader of this name is registered already "
                        f"({self._entries[loader.name].loader!r}); pass replace=True to put this one in its place"
                    )
                self._remove(loader.name)
            self._entries[loader.name] = entry
            enabled = self._enabled
        if enabled:
            self._install_or_watch(entry)

    def unregister(self, name: str) -> None:
        with self._lock:
            if name not in self._entries:
                known = ", ".join(self._entries) or "none"
                raise LoaderError(f"no loader {name!r} is registered; there are: {known}")
            self._remove(name)

    def enable(self) -> None:
        with self._lock:
            if not self._enabled:
                self._enabled = True
                for entry in self._entries.values():
                    entry.given_up = False

    def disable(self) -> None:
        with self._lock:
            self._enabled = False
            for entry in self._entries.values():
                self._restore(entry)

    def install_all(self) -> None:
        self._discover()
        with self._lock:
            entries = list(self._entries.values()) if self._enabled else []
        for entry in entries:
            self._install_or_watch(entry)

    def _remove(self, name: str) -> None:
        self._restore(self._entries.pop(name))

    def _restore(self, entry: _Entry) -> None:
        if entry.installation is not None:
            entry.installation.restore()
            entry.installation = None

    def _install_or_watch(self, entry: _Entry) -> None:
        trigger = entry.loader.trigger
        if sys.modules.get(trigger) is not None:
            self._install(entry)
            return
        with self._lock:
            if trigger in self._watched:
                return
            self._watched.add(trigger)
        # wrapt has no way to take this back: after `disable`, it finds nothing to do.
        wrapt.register_post_import_hook(functools.partial(self._trigger_imported, trigger), trigger)

    def _trigger_imported(self, trigger: str, module: ModuleType) -> None:
        with self._lock:
            self._watched.discard(trigger)
            entries = [entry for entry in self._entries.values() if entry.loader.trigger == trigger]
        for entry in entries:
            self._install(entry)

    def _install(self, entry: _Entry) -> None:
        """Install one loader if there is need; whatever is wrong with it ends in a warning, not in a failed import."""
        loader = entry.loader
        if not self._wanted(entry):
            return
        try:
            importlib.import_module(loader.trigger)  # another thread may still be in the middle of it: wait
            installation = prepare(loader.library, _checked_seams(loader))
            with self._lock:
                if installation is None:
                    entry.given_up = True
                elif self._wanted(entry):
                    installation.apply()
                    entry.installation = installation
        except Exception as error:  # noqa: BLE001 - it would surface in the user's `import`, which is not at fault
            entry.given_up = True
            warnings.warn(
                f"loader {loader.name!r} could not be installed, so {loader.library} keeps its stock behaviour: "
                f"{type(error).__name__}: {error}",
                stacklevel=2,
            )

    def _wanted(self, entry: _Entry) -> bool:
        with self._lock:
            registered = self._entries.get(entry.loader.name) is entry
            return self._enabled and registered and entry.installation is None and not entry.given_up

    def _discover(self) -> None:
        """Register the loaders of installed packages: once, and none of them can keep the others from working."""
        with self._lock:
            if self._discovered:
                return
            self._discovered = True
        builtin = {loader.target for loader in BUILTIN_LOADERS}
        for entry_point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
            if entry_point.value in builtin:
                continue
            try:
                found: Any = entry_point.load()
                self.register(found() if isinstance(found, type) else found)
            except Exception as error:  # noqa: BLE001 - another package's fault, and we go on without it
                distribution = entry_point.dist.name if entry_point.dist else "(unknown)"
                warnings.warn(
                    f"the distribution {distribution!r} declares the loader {entry_point.name!r} "
                    f"({entry_point.value}), which cannot be used: {type(error).__name__}: {error}",
                    stacklevel=2,
                )


def _validate(loader: Any) -> None:
    """Raise LoaderError unless `loader` keeps the `Loader` protocol, as far as can be told without calling it."""
    if isinstance(loader, type):
        raise LoaderError(f"loader {loader!r}: is a class; register an instance of it")
    for attribute in ("name", "library", "trigger"):
        value = getattr(loader, attribute, None)
        if not isinstance(value, str) or not value:
            raise _mismatch(loader, attribute, f"should be a str that is not empty, but is {value!r}")
    if not all(part.isidentifier() for part in loader.trigger.split(".")):
        raise _mismatch(loader, "trigger", f"should be the dotted name of a module, but is {loader.trigger!r}")
    seams = getattr(loader, "seams", None)
    if not callable(seams):
        raise _mismatch(loader, "seams", f"should be a method without arguments, but is {seams!r}")
    try:
        inspect.signature(seams).bind()
    except TypeError as error:
        raise _mismatch(loader, "seams", f"should be callable without arguments: {error}") from error


def _checked_seams(loader: Loader) -> list[AnySeam]:
    seams = list(loader.seams())
    for seam in seams:
        if not isinstance(seam, (Seam, PropertySeam, Provided)):
            wanted = "Seam, PropertySeam and Provided values"
            raise _mismatch(loader, "seams", f"should return {wanted}, but {seam!r} is among them")
    return seams


def _mismatch(loader: Any, attribute: str, problem: str) -> LoaderError:
    name = getattr(loader, "name", None) or type(loader).__name__
    return LoaderError(f"loader {name!r}: attribute {attribute!r} {problem}")


_registry = Registry()
