"""The one wrapper around a model as a whole: where an accelerator runs out of memory in a forward, weights make room.

What failed is tried again only if nothing can tell that it was begun before: the random generators are set back, what
the forward was given is as it was (a cache that grew is made shorter again, one that was written to in place cannot
be), the model is not in training and no gradients are recorded. A forward repeated over a cache that it had half filled
computes wrong numbers; then the error is raised, with a note.
"""

from __future__ import annotations

import functools
import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import add_note

CPU_DEVICE = torch.device("cpu")

Restore = Callable[[], bool]
"""Makes an object what it was when this was made; False if that cannot be."""

Rememberer = Callable[[Any], "Restore | None"]
"""Knows how to set some kind of object back: its `Restore`, or None for objects of other kinds."""


class Demoted(NamedTuple):
    """What became of an attempt to free memory."""

    happened: bool
    told: str
    """What was demoted, or why nothing was, as a sentence."""


@dataclass(frozen=True, eq=False)
class Rescue:
    """What a wrapper calls."""

    demote: Callable[[nn.Module, torch.OutOfMemoryError], Demoted]
    remember: Rememberer
    """Knows the caches of the model's library."""
    devices: tuple[torch.device, ...]
    """Where the model computes."""


_rescues: weakref.WeakKeyDictionary[nn.Module, Rescue] = weakref.WeakKeyDictionary()
"""By model; a copy of a model is not among them, so its wrapper does nothing."""


class Gate:
    """Counts the threads inside of a model's wrapper, and holds those back that come while its weights move.

    No thread waits here for one that is inside: only for the one that moves weights, which waits for nobody.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside: Counter[int] = Counter()
        self._held: Counter[int] = Counter()
        self._mover: int | None = None

    @contextmanager
    def entered(self) -> Iterator[None]:
        """A forward of the calling thread, which waits while another one moves weights."""
        me = threading.get_ident()
        with self._changed:
            if self._mover not in (None, me):
                self._wait(me)
            self._inside[me] += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= Counter((me,))

    def _wait(self, me: int) -> None:
        self._held[me] += 1
        try:
            self._changed.wait_for(lambda: self._mover is None)
        finally:
            self._held -= Counter((me,))

    @contextmanager
    def closed(self, forwards: int = 0) -> Iterator[Collection[int]]:
        """Nobody else enters within the context; gives the threads inside for which it cannot be closed, if any.

        The calling thread itself may be inside of so many `forwards`. A thread that moves weights counts as inside.
        """
        me = threading.get_ident()
        with self._changed:
            inside = {thread for thread, count in self._inside.items() if thread != me or count > forwards}
            if self._mover is not None:
                inside.add(self._mover)
            if not inside:
                self._mover = me
        try:
            yield inside
        finally:
            if not inside:
                with self._changed:
                    self._mover = None
                    self._changed.notify_all()

    def held_back(self) -> Collection[int]:
        """The threads that wait for the gate to open."""
        with self._changed:
            return set(self._held)

    def after_fork(self) -> None:
        """In a child, only the thread that forked lives on."""
        me = threading.get_ident()
        self._changed = threading.Condition()
        self._inside, self._held = (Counter({me: count[me]}) for count in (self._inside, self._held))
        self._mover = me if self._mover == me else None


_gates: weakref.WeakKeyDictionary[nn.Module, Gate] = weakref.WeakKeyDictionary()
"""By model, from its first wrapper or move on: a new plan changes neither who is inside nor who waits."""


def gate_of(model: nn.Module) -> Gate:
    """The gate of `model`. Without a wrapper nobody is counted, and only those who move weights meet there."""
    return _gates.get(model) or _gates.setdefault(model, Gate())  # one, whichever thread comes first


def _after_fork() -> None:
    for gate in list(_gates.values()):
        gate.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class _Wrapped(functools.partial):
    """The forward of a wrapped model. It has no state of its own, so that it can be copied and pickled."""


def install(model: nn.Module, rescue: Rescue) -> None:
    """Wrap the forward of `model`."""
    uninstall(model)
    _rescues[model] = rescue
    inner = model.forward
    model.forward = functools.update_wrapper(_Wrapped(_forward, model, inner), inner)


def uninstall(model: nn.Module) -> None:
    """Give `model` the forward back that it had. Harmless where nothing was installed."""
    _rescues.pop(model, None)
    for name in ("forward", "_old_forward"):  # the latter under a hook that was added since
        wrapped = vars(model).get(name)
        if isinstance(wrapped, _Wrapped):
            vars(model)[name] = wrapped.args[1]
    forward = vars(model).get("forward")
    if getattr(forward, "__func__", None) is type(model).forward:
        del vars(model)["forward"]


def _forward(model: nn.Module, inner: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_compiling():
        return inner(*args, **kwargs)
    if (rescue := _rescues.get(model)) is None or _is_recorded(rescue.devices):
        return inner(*args, **kwargs)
    with gate_of(model).entered():
        rescue, inner = _rescues.get(model), _inner(model, inner)  # another plan may be in force by now
        return inner(*args, **kwargs) if rescue is None else _rescued(rescue, model, inner, args, kwargs)


def _rescued(
    rescue: Rescue, model: nn.Module, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The forward, and again where it ran out of memory, as long as that can be helped and be done again."""
    before = Before(model, rescue, (args, kwargs))
    while True:
        try:
            return inner(*args, **kwargs)
        except torch.OutOfMemoryError as error:
            demoted = rescue.demote(model, error)
            missing = before.restore() if demoted.happened else ""
            if not demoted.happened or missing:
                add_note(error, _note(demoted, missing))
                raise
        inner = _inner(model, inner)


def _inner(model: nn.Module, before: Callable[..., Any]) -> Callable[..., Any]:
    """The forward that the model has now, under the wrapper: a new plan may have hooked it anew.

    That is the one `before` where somebody's own forward is around the wrapper.
    """
    present = map(vars(model).get, ("forward", "_old_forward"))
    wrapped = next((forward for forward in present if isinstance(forward, _Wrapped)), None)
    if wrapped is not None:
        return wrapped.args[1]
    return before if model in _rescues else model.forward


def _note(demoted: Demoted, missing: str) -> str:
    if not demoted.happened:
        return demoted.told
    return (
        f"{demoted.told} This forward was not repeated, because {missing}. Call it, or generate(), again: there is "
        "more room now."
    )


def _is_recorded(devices: Sequence[torch.device]) -> bool:
    """Whether this is the recording of a CUDA graph, in which nothing may be moved or asked."""
    return any(d.type == "cuda" for d in devices) and torch.cuda.is_current_stream_capturing()


class Before:
    """What a forward can change besides what it returns, as it is now."""

    def __init__(self, model: nn.Module, rescue: Rescue, given: Any) -> None:
        self._reason = ""
        if model.training:
            self._reason = "the model is in training mode, and may have updated its statistics"
        elif torch.is_grad_enabled():
            self._reason = "gradients were recorded"
        if self._reason:
            return
        self._generators = [(device, _generator_state(device)) for device in (CPU_DEVICE, *rescue.devices)]
        self._restores = list(_remember(given, rescue.remember, set()))

    def restore(self) -> str:
        """Make everything what it was; the reason why that cannot be, "" if it is done.

        What can be set back is set back in any case.
        """
        if self._reason:
            return self._reason
        for device, state in self._generators:
            _set_generator_state(device, state)
        if not all([restore() for restore in self._restores]):
            return "what it was given (a cache, say) was written to and cannot be set back"
        return ""


def _generator_state(device: torch.device) -> torch.Tensor:
    if device.type == "cpu":
        return torch.get_rng_state()
    module = torch.get_device_module(device)
    return module.get_rng_state() if device.type == "mps" else module.get_rng_state(device)


def _set_generator_state(device: torch.device, state: torch.Tensor) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
    elif device.type == "mps":
        torch.get_device_module(device).set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)


# ---------------------------------------------------------------- what a forward is given

_VALUES = (
    *(type(None), bool, int, float, complex, str, bytes, slice, range, Enum),
    *(torch.dtype, torch.device, torch.layout, torch.Size, type, FunctionType, BuiltinFunctionType),
)


def _remember(given: Any, remember: Rememberer, seen: set[int]) -> Iterator[Restore]:
    """A `Restore` for each thing in nested data that a forward could change."""
    if isinstance(given, _VALUES) or id(given) in seen:
        return
    seen.add(id(given))
    known = _generator(given) if isinstance(given, torch.Generator) else remember(given)
    if known is not None:
        yield known
        return
    yield _unchanged(given)
    if isinstance(given, Mapping):
        for value in given.values():
            yield from _remember(value, remember, seen)
    elif isinstance(given, (list, tuple)):
        for value in given:
            yield from _remember(value, remember, seen)
    elif not isinstance(given, torch.Tensor):
        for value in getattr(given, "__dict__", {}).values():
            yield from _remember(value, remember, seen)


def _generator(generator: torch.Generator) -> Restore:
    state = generator.get_state()
    return lambda: generator.set_state(state) is not None


def untouched(thing: Any) -> Restore:
    """A `Restore` that sets nothing back: whether `thing`, and all that it refers to, is as it was."""
    restores = list(_remember(thing, lambda _part: None, set()))
    return lambda: all([restore() for restore in restores])


def _unchanged(thing: Any) -> Restore:
    """A `Restore` that sets nothing back: whether `thing` itself (not what it refers to) is as it was.

    It keeps no tensor alive: a cache would need twice its room.
    """
    before = _print(thing)
    if isinstance(thing, torch.Tensor):
        reference = weakref.ref(thing)
        return lambda: before is not None and (now := reference()) is not None and _print(now) == before
    return lambda: before is not None and before == _print(thing)


def _print(thing: Any) -> Any:
    """What shows a change of `thing`; None if nothing would."""
    if isinstance(thing, torch.Tensor):
        return None if thing.is_inference() else thing._version
    if isinstance(thing, Mapping):
        return [(key, _Same(value)) for key, value in thing.items()]
    if isinstance(thing, (list, tuple)):
        return [_Same(value) for value in thing]
    if not hasattr(thing, "__dict__") or isinstance(thing, nn.Module) or callable(thing):
        return None
    return [(key, _Same(value)) for key, value in vars(thing).items()]


class _Same:
    """Equal to that of the very same object, or of an equal number, text or the like."""

    def __init__(self, value: Any) -> None:
        self._value = value if isinstance(value, _VALUES) else None
        self._object: Callable[[], Any] = weakref.ref(value) if isinstance(value, torch.Tensor) else lambda: value

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, _Same)
        if self._value is not None or other._value is not None:
            return type(self._value) is type(other._value) and self._value == other._value
        return self._object() is other._object()
