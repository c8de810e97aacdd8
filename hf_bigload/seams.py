"""Hooks in a library's functions: checked before anything is patched, and put back exactly as they were.

A loader says which functions it takes over (`Seam`) and which names it provides (`Provided`). Installing them is all or
nothing: where a library version has moved one, a `SeamMovedWarning` says which, and the library keeps its stock
behaviour.

Looking the seams up imports modules, patching does not: `prepare` does the first, `Installation.apply` the second, so
that a caller may hold a lock around `apply` without ever waiting for an import in it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import pkgutil
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import wrapt

from hf_bigload.errors import LoaderError, SeamMovedWarning

Wrapper = Callable[[Callable[..., Any], Any, tuple[Any, ...], dict[str, Any]], Any]
"""`wrapper(wrapped, instance, args, kwargs)`: `wrapped` is bound already, `instance` is what it is bound to (the class
for a classmethod, None for a plain function or a staticmethod)."""

_patching = threading.RLock()


@dataclass(frozen=True)
class Seam:
    """A function to take over.

    `path` is what follows the module: a function ("check_and_set_device_map") or an attribute of a class
    ("PreTrainedModel.from_pretrained", whichever kind of method it is). `parameters` are the names that the wrapper
    relies on; each must be in the function's signature.
    """

    module: str
    path: str
    parameters: tuple[str, ...]
    wrapper: Wrapper

    def __str__(self) -> str:
        return f"{self.module}:{self.path}"

    def locate(self) -> _Site:
        """Where to patch. Raises ImportError, AttributeError, TypeError or ValueError if it is not as described."""
        owner, name = _owner_of(self.module, self.path)
        function = getattr(owner, name)
        if not callable(function):
            raise TypeError(f"{self.path} is not callable any more")
        signature = inspect.signature(function)
        missing = [parameter for parameter in self.parameters if parameter not in signature.parameters]
        if missing:
            raise TypeError(f"no parameter {', '.join(map(repr, missing))} in {name}{signature}")
        return _HookSite(owner, name, self)


@dataclass(frozen=True)
class Provided:
    """A name to give a module that lacks it (some exist only where an optional dependency is installed).

    A module that has the name already keeps its own value.
    """

    module: str
    name: str
    value: Any

    def __str__(self) -> str:
        return f"{self.module}:{self.name}"

    def locate(self) -> _Site:
        """Where to set the name. Raises ImportError where there is no such module."""
        return _NameSite(importlib.import_module(self.module), self.name, self.value)


@dataclass(frozen=True)
class PropertySeam:
    """A read-only property of a class to take over; `wrapper` is called as a `Seam`'s is, with no arguments."""

    module: str
    path: str
    wrapper: Wrapper

    def __str__(self) -> str:
        return f"{self.module}:{self.path}"

    def locate(self) -> _Site:
        """Where to patch. Raises ImportError, AttributeError or TypeError if it is not as described."""
        owner, name = _owner_of(self.module, self.path)
        if not isinstance(inspect.getattr_static(owner, name), property):
            raise TypeError(f"{self.path} is not a property any more")
        return _PropertySite(owner, name, self.wrapper)


def _owner_of(module: str, path: str) -> tuple[Any, str]:
    """The module or class that has the attribute, and the attribute's name."""
    owner: Any = importlib.import_module(module)
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    return owner, name


class Installation:
    """Patches that belong together, in one library. Made by `prepare` or `install`, and used once."""

    def __init__(self, library: str, sites: Sequence[_Site] = ()) -> None:
        self.library = library
        self._sites = tuple(sites)
        self._active = False

    @property
    def active(self) -> bool:
        """Whether the patches are in place. Hooks are pass-through where not, even if someone kept a reference."""
        return self._active

    def apply(self) -> None:
        """Patch every site, or none: an error on the way undoes what was done. Imports nothing."""
        with _patching:
            self._active = True
            try:
                for site in self._sites:
                    site.patch(self)
            except BaseException:
                self.restore()
                raise

    def restore(self) -> None:
        """Put back the very attributes that were there; a patch that somebody put over ours is left alone."""
        with _patching:
            self._active = False
            for site in reversed(self._sites):
                site.restore()


AnySeam = Seam | PropertySeam | Provided


def install(library: str, seams: Sequence[AnySeam]) -> Installation:
    """Check all of `seams`, then patch them: all or, with a `SeamMovedWarning`, none (an inactive installation).

    Raises LoaderError if one of them is installed already.
    """
    installation = prepare(library, seams)
    if installation is None:
        return Installation(library)
    installation.apply()
    return installation


def prepare(library: str, seams: Sequence[AnySeam]) -> Installation | None:
    """What `install` would do, not yet done. None, after a `SeamMovedWarning`, if a seam is not where it should be."""
    sites, moved = [], []
    for seam in seams:
        try:
            sites.append(seam.locate())
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            moved.append(f"{seam} ({error})")
    if not moved:
        return Installation(library, sites)
    warnings.warn(
        f"{library} {_version(library)} has moved {', '.join(moved)}. Nothing is patched and {library} keeps its "
        f"stock behaviour: update hf_bigload, or use a version of {library} that it supports.",
        SeamMovedWarning,
        stacklevel=2,
    )
    return None


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(sys.modules.get(library), "__version__", "(of unknown version)"))


class _Site(Protocol):
    def patch(self, installation: Installation) -> None: ...

    def restore(self) -> None: ...


class _BoundHook(wrapt.BoundFunctionWrapper):
    """A hooked function as looked up on a class or an instance. Pickles and copies as the function itself would."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _by_name(self)

    def __copy__(self) -> _BoundHook:
        return self

    def __deepcopy__(self, memo: object) -> _BoundHook:
        return self


class _Hook(wrapt.FunctionWrapper):
    """The attribute that stands where the library's function was."""

    __bound_function_wrapper__ = _BoundHook
    _self_inherited = False  # whether the owner had no such attribute of its own, and found it in a base class

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _by_name(self)

    def __copy__(self) -> _Hook:
        return self

    def __deepcopy__(self, memo: object) -> _Hook:
        return self


def _by_name(function: Any) -> tuple[Any, ...]:
    """How pickle finds a function again, hooked there or not: on what it is bound to, or by module and name."""
    owner = getattr(function, "__self__", None)
    if owner is not None:
        return getattr, (owner, function.__name__)
    return pkgutil.resolve_name, (f"{function.__module__}:{function.__qualname__}",)


class _HookSite:
    """One attribute of a module or class, and the hook to put in its place."""

    def __init__(self, owner: Any, name: str, seam: Seam) -> None:
        self.owner = owner
        self.name = name
        self.seam = seam
        self.hook: _Hook | None = None

    def patch(self, installation: Installation) -> None:
        raw = inspect.getattr_static(self.owner, self.name)
        if any(hook._self_wrapper == self.seam.wrapper for hook in _chain(raw)):
            raise LoaderError(f"{self.seam} is hooked by this very wrapper already: restore that installation first")
        hook = _Hook(raw, self.seam.wrapper, enabled=lambda: installation.active)
        hook._self_inherited = self.name not in vars(self.owner)
        setattr(self.owner, self.name, hook)
        self.hook = hook

    def restore(self) -> None:
        hook, self.hook = self.hook, None
        if hook is None:
            return
        current = vars(self.owner).get(self.name)
        if current is hook:
            if hook._self_inherited:
                delattr(self.owner, self.name)
            else:
                setattr(self.owner, self.name, hook.__wrapped__)
            return
        for outer in _chain(current):  # another loader hooked the same function later: take ours out from under it
            if outer.__wrapped__ is hook:
                outer.__wrapped__ = hook.__wrapped__
                outer._self_inherited = hook._self_inherited


def _chain(attribute: Any) -> Iterator[_Hook]:
    """The hooks that lie over each other in one attribute, outermost first."""
    while isinstance(attribute, _Hook):
        yield attribute
        attribute = attribute.__wrapped__


_ABSENT = object()


class _NameSite:
    """One name that a module may lack."""

    def __init__(self, module: ModuleType, name: str, value: Any) -> None:
        self.module = module
        self.name = name
        self.value = value
        self.provided = False

    def patch(self, installation: Installation) -> None:
        if not hasattr(self.module, self.name):
            setattr(self.module, self.name, self.value)
            self.provided = True

    def restore(self) -> None:
        # A module that was still being imported may have bound the name itself since.
        if self.provided and vars(self.module).get(self.name, _ABSENT) is self.value:
            delattr(self.module, self.name)
        self.provided = False


class _PropertySite:
    """One property, and the one to put in its place."""

    def __init__(self, owner: Any, name: str, wrapper: Wrapper) -> None:
        self.owner = owner
        self.name = name
        self.wrapper = wrapper
        self.original: property | None = None
        self.ours: property | None = None

    def patch(self, installation: Installation) -> None:
        original = self.original = inspect.getattr_static(self.owner, self.name)
        wrapper = self.wrapper

        def get(instance: Any) -> Any:
            def wrapped() -> Any:
                return original.__get__(instance, type(instance))

            return wrapper(wrapped, instance, (), {}) if installation.active else wrapped()

        self.ours = property(get, doc=original.__doc__)
        setattr(self.owner, self.name, self.ours)

    def restore(self) -> None:
        if self.ours is not None and vars(self.owner).get(self.name) is self.ours:
            setattr(self.owner, self.name, self.original)
        self.ours = None
