"""The streaming executor: weights are on their device while a thread is inside the block that uses them.

A lease is taken when a block is entered and given back when it is left, however it is left. Leases count: while any
thread is inside, the weights stay and their slot is not reused.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.weak import WeakIdKeyDictionary

from ..checkpoint.reader import Reader
from ..errors import OffloadedWeightError
from .moving import map_tensors
from .residency import DiskResident, Residency, resting
from .ring import Ring, Slot

CPU_DEVICE = torch.device("cpu")


@dataclass
class Stats:
    """What a dispatched model has moved so far, in bytes, and how often a block's weights had to come."""

    bytes_read: int = 0
    """From disk."""
    bytes_copied: int = 0
    """Between host and devices."""
    fetches: int = 0


class Machine:
    """What residencies move bytes with: a reader for the files, a ring for each device, and the counters."""

    def __init__(self, reader: Reader, ring_bytes: Mapping[torch.device, int]) -> None:
        self.reader = reader
        self.stats = Stats()
        self._ring_bytes = dict(ring_bytes)
        self._rings: dict[torch.device, Ring] = {}
        self._lock = threading.Lock()

    def ring(self, device: torch.device) -> Ring:
        with self._lock:
            if device not in self._rings:
                self._rings[device] = Ring(device, self._ring_bytes.get(device, 0))
            return self._rings[device]

    @property
    def rings(self) -> Mapping[torch.device, Ring]:
        return self._rings

    def close(self) -> None:
        for ring in self._rings.values():
            ring.close()
        self.reader.close()


@dataclass(eq=False)
class _Item:
    """One weight of a fetch: the tensor object, its data at rest, and the data it has while the fetch lasts."""

    tensor: torch.Tensor
    residency: Residency
    rest: torch.Tensor
    version: int
    arrived: torch.Tensor | None = None


@dataclass(eq=False)
class Fetch:
    """Weights that came to a device together. Ends when the last thread that uses them leaves."""

    device: torch.device
    items: list[_Item] = field(default_factory=list)
    pinned: list[torch.Tensor] = field(default_factory=list)
    """Weights that are used where they rest, and must not be taken elsewhere meanwhile."""
    slots: list[Slot] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)
    """One entry per lease: the thread that holds it."""
    ready: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None
    shadowed: dict[int, Fetch] = field(default_factory=dict)
    """Leases of the same thread on another device that this fetch suspends, by tensor id."""

    def wait(self) -> None:
        self.ready.wait()
        if self.error is not None:
            raise self.error

    def find(self, data: torch.Tensor) -> _Item | None:
        """The weight that `data`, somewhere in this fetch's slots, is a view of."""
        if not any(slot.covers(data) for slot in self.slots):
            return None
        address = data.data_ptr()
        for item in self.items:
            if item.arrived is not None and 0 <= address - item.arrived.data_ptr() < span_bytes(item.arrived):
                return item
        return None


class Executor:
    """Leases weights to the blocks of one model."""

    def __init__(self, machine: Machine, offload_buffers: bool = False, watching: bool = False) -> None:
        self.machine = machine
        self.offload_buffers = offload_buffers
        self.watching = watching
        """Whether weights read outside their own module have to be noticed: they may be on another device."""
        self.on_disk: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._live: dict[int, Fetch] = {}
        self._changed = threading.Condition(threading.RLock())
        self._local = _ThreadState()

    def __deepcopy__(self, memo: dict[int, Any]) -> Executor:
        """A copied model has copies of the weights, in memory: it starts with nothing remembered and nothing leased."""
        machine = Machine(Reader(), {d: ring.limit for d, ring in self.machine.rings.items()})
        copied = memo[id(self)] = Executor(machine, self.offload_buffers, self.watching)
        return copied

    # ------------------------------------------------------------ what a block uses

    def tensors(self, module: nn.Module, whole: bool) -> list[torch.Tensor]:
        """The weights of a block as they are now: adapters, resized and re-tied weights included."""
        found: dict[int, torch.Tensor] = {}
        for owner in module.modules() if whole else (module,):
            if self.watching:
                watch(owner, self)
            for parameter in dict.values(owner._parameters):
                if parameter is not None:
                    found.setdefault(id(parameter), parameter)
            if self.offload_buffers:
                found.update((id(b), b) for b in owner._buffers.values() if b is not None and id(b) not in found)
        return list(found.values())

    # ------------------------------------------------------------ leases

    def lease(self, tensors: Iterable[torch.Tensor], device: torch.device, at_home: bool = False) -> list[Fetch]:
        """Have `tensors` on `device` until `release`; `at_home` only keeps them where they rest, which is `device`.

        Raises:
            OffloadedWeightError: a tensor cannot travel.
            CheckpointError: the file it rests in changed or is damaged.
            torch.OutOfMemoryError: the device has no room for them.
        """
        me = threading.get_ident()
        mine = Fetch(device, threads=[me])
        with self._changed:
            joined = self._join(tensors, mine, at_home)
            for fetch in joined:
                fetch.threads.append(me)
        leased = [*joined, mine] if mine.items or mine.pinned else joined
        try:
            if mine.items:
                self._bring(mine)
            mine.ready.set()
            for fetch in joined:
                fetch.wait()
        except BaseException:
            self.release(leased)
            raise
        return leased

    def _join(self, tensors: Iterable[torch.Tensor], mine: Fetch, at_home: bool) -> list[Fetch]:
        """Fetches of others that already bring some of `tensors`; the rest is added to `mine`."""
        joined: dict[int, Fetch] = {}
        for tensor in tensors:
            live = self._wait_while_elsewhere(tensor, mine.device)
            if live is not None and live.device == mine.device:
                if live is not mine:
                    joined[id(live)] = live
                continue
            residency = self._residency(tensor)
            travels = isinstance(residency, DiskResident) if not at_home else False
            if travels or tensor.device != mine.device:
                _check_can_travel(tensor)
                mine.items.append(_Item(tensor, residency, tensor.data, tensor._version))
            elif at_home:
                mine.pinned.append(tensor)
            else:
                continue
            if live is not None:
                mine.shadowed[id(tensor)] = live
            self._live[id(tensor)] = mine
        return list(joined.values())

    def _wait_while_elsewhere(self, tensor: torch.Tensor, device: torch.device) -> Fetch | None:
        """The fetch `tensor` is in, once no *other* thread uses it on another device."""
        me = threading.get_ident()
        while True:
            live = self._live.get(id(tensor))
            if live is None or live.device == device or set(live.threads) == {me}:
                return live
            self._changed.wait()

    def _residency(self, tensor: torch.Tensor) -> Residency:
        record = self.on_disk.get(tensor)
        if record is not None and record.is_current(tensor):
            return record
        if record is not None:  # replaced or written: what is in memory now is the truth
            del self.on_disk[tensor]
        return resting(tensor)

    def _bring(self, fetch: Fetch) -> None:
        try:
            with _outside_autograd():
                for kind in dict.fromkeys(type(item.residency) for item in fetch.items):
                    group = [item for item in fetch.items if type(item.residency) is kind]
                    arrived, slots = kind.bring([item.residency for item in group], fetch.device, self.machine)
                    fetch.slots += slots
                    for item, data in zip(group, arrived, strict=True):
                        item.arrived = data
                for item in fetch.items:
                    item.tensor.data = item.arrived  # type: ignore[assignment]
            self.machine.stats.fetches += 1
        except BaseException as error:
            fetch.error = error
            raise
        finally:
            fetch.ready.set()

    def release(self, fetches: Sequence[Fetch]) -> None:
        """Give back what `lease` returned."""
        me = threading.get_ident()
        with self._changed:
            for fetch in fetches:
                fetch.threads.remove(me)
                if not fetch.threads:
                    self._retire(fetch)
            self._changed.notify_all()

    def _retire(self, fetch: Fetch) -> None:
        with _outside_autograd():
            for item in fetch.items:
                self._send_home(item, fetch)
        for tensor in (*fetch.pinned, *(item.tensor for item in fetch.items)):
            before = fetch.shadowed.get(id(tensor))
            if before is not None:
                self._live[id(tensor)] = before
            else:
                self._live.pop(id(tensor), None)
        for slot in fetch.slots:
            self.machine.ring(fetch.device).give(slot)

    def _send_home(self, item: _Item, fetch: Fetch) -> None:
        tensor = item.tensor
        if item.arrived is None or tensor.data_ptr() != item.arrived.data_ptr():
            return  # never came, or replaced while it was here: the new data is the home
        if tensor._version == item.version:
            tensor.data = item.rest
            return
        if not isinstance(item.residency, DiskResident):  # written to: the write belongs to the home
            item.rest.copy_(tensor.data)
            tensor.data = item.rest
            return
        self.on_disk.pop(tensor, None)
        tensor.data = tensor.data.to(CPU_DEVICE, copy=True)

    def home(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor`'s data at rest, also while some thread has it on a device."""
        with self._changed:
            live, data = self._live.get(id(tensor)), tensor.data
            while live is not None:
                data = next((item.rest for item in live.items if item.tensor is tensor), data)
                live = live.shadowed.get(id(tensor))
            return data

    def forget(self) -> None:
        """Stop streaming: what rests in a file is from now on read through its mapping."""
        self.on_disk.clear()

    # ------------------------------------------------------------ scopes: one per module that a thread is inside

    def scope_device(self) -> torch.device | None:
        """The device of the innermost dispatched module that the calling thread is inside of; None outside of all."""
        return self._local.scopes[-1].device if self._local.scopes else None

    def enter(self, tensors: list[torch.Tensor], device: torch.device, at_home: bool = False) -> Scope:
        """Begin a module's forward on `device`. Every scope must be left, by `Scope.leave`."""
        scope = Scope(self, device)
        self._local.scopes.append(scope)
        try:
            travelling, on_graph = self._split_for_grad(tensors, device, at_home)
            if travelling:
                scope.hold(self.lease(travelling, device, at_home), travelling)
            for tensor in on_graph:
                scope.hold_on_graph(tensor)
        except BaseException:
            scope.leave()
            raise
        return scope

    def _split_for_grad(
        self, tensors: list[torch.Tensor], device: torch.device, at_home: bool
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Those that swap their data, and those that need a differentiable copy: their gradient lives elsewhere."""
        if at_home or device.type == "cpu" or not torch.is_grad_enabled():
            return tensors, []
        on_graph = [t for t in tensors if t.requires_grad and t.device != device]
        chosen = set(map(id, on_graph))
        return [t for t in tensors if id(t) not in chosen], on_graph

    def see(self, tensor: torch.Tensor) -> torch.Tensor:
        """What a module's attribute gives when it is read: the weight, on the device of whoever reads it."""
        scopes = self._local.scopes
        if not scopes or self._local.busy:
            return tensor
        held = self._local.find(tensor)
        if held is not None:
            return held
        scope = scopes[-1]
        if tensor.device == scope.device:
            return tensor
        self._local.busy = True
        try:
            scope.borrow(tensor)
        finally:
            self._local.busy = False
        held = self._local.find(tensor)
        return tensor if held is None else held


class _ThreadState(threading.local):
    """What the calling thread is inside of."""

    def __init__(self) -> None:
        self.scopes: list[Scope] = []
        self.busy = False

    def find(self, tensor: torch.Tensor) -> torch.Tensor | None:
        for scope in reversed(self.scopes):
            found = scope.held.get(id(tensor))
            if found is not None:
                return found
        return None


class Scope:
    """A thread's stay inside one module: the leases it holds, and what stands in for weights on the graph."""

    def __init__(self, executor: Executor, device: torch.device) -> None:
        self.executor, self.device = executor, device
        self.fetches: list[Fetch] = []
        self.held: dict[int, torch.Tensor] = {}
        self.on_graph: list[tuple[torch.Tensor, torch.Tensor]] = []

    def hold(self, fetches: list[Fetch], tensors: Sequence[torch.Tensor]) -> None:
        self.fetches += fetches
        self.held.update((id(t), t) for t in tensors)

    def hold_on_graph(self, tensor: torch.Tensor) -> None:
        _check_can_travel(tensor)
        stand_in = tensor.to(self.device)
        self.held[id(tensor)] = stand_in
        self.on_graph.append((tensor, stand_in))

    def borrow(self, tensor: torch.Tensor) -> None:
        """Bring a weight that this module reads although another one owns it."""
        if torch.is_grad_enabled() and tensor.requires_grad:
            self.hold_on_graph(tensor)
            return
        self.hold(self.executor.lease([tensor], self.device), [tensor])

    def leave(self) -> None:
        """End the stay. Only the innermost scope of a thread may be left."""
        scopes = self.executor._local.scopes
        scopes.remove(self)
        fetches, self.fetches = self.fetches, []
        self.held.clear()
        self.executor.release(fetches)

    def keep(self, output: Any) -> Any:
        """`output` with every tensor that looks into a slot cloned: the slot will hold other weights soon."""
        slots = [slot for fetch in self.fetches for slot in fetch.slots]
        if not slots:
            return output
        return map_tensors(lambda t: t.clone() if any(slot.covers(t) for slot in slots) else t, output)

    def guard(self) -> Any:
        """A context in which autograd never saves a slot: it saves where the weight rests, and reads it again."""
        if not torch.is_grad_enabled() or not (self.fetches or self.on_graph or self.executor.watching):
            return nullcontext()
        return saved_tensors_hooks(self._pack, _unpack)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | _Saved:
        for fetch in self.fetches:
            item = fetch.find(tensor)
            if item is not None and item.arrived is not None:
                return _Saved.of(tensor, item.arrived, item.tensor, item.rest)
        for weight, stand_in in self.on_graph:
            if tensor.untyped_storage().data_ptr() == stand_in.untyped_storage().data_ptr():
                return _Saved.of(tensor, stand_in, weight, weight.data)
        return tensor


@dataclass(frozen=True, eq=False)
class _Saved:
    """A tensor that autograd wanted to keep: how to make it again from the weight at rest."""

    weight: torch.Tensor
    rest: torch.Tensor
    version: int
    device: torch.device
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    """Elements from the weight's first."""

    @classmethod
    def of(cls, tensor: torch.Tensor, arrived: torch.Tensor, weight: torch.Tensor, rest: torch.Tensor) -> _Saved:
        offset = (tensor.data_ptr() - arrived.data_ptr()) // tensor.element_size()
        return cls(
            weight, rest, weight._version, tensor.device, tensor.dtype, tensor.size(), tensor.stride(), offset
        )

    def again(self) -> torch.Tensor:
        if self.weight._version != self.version:
            raise OffloadedWeightError(
                f"a weight of shape {tuple(self.weight.shape)} was changed in place between forward and backward; the "
                "gradients that need its old value cannot be computed. Run backward before the optimiser's step."
            )
        with _outside_autograd():
            at_rest = self.rest.view(self.dtype) if self.rest.dtype != self.dtype else self.rest
            there = at_rest.to(self.device)
            return there.as_strided(self.size, self.stride, there.storage_offset() + self.offset)


def span_bytes(tensor: torch.Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _unpack(saved: torch.Tensor | _Saved) -> torch.Tensor:
    return saved.again() if isinstance(saved, _Saved) else saved


def _check_can_travel(tensor: torch.Tensor) -> None:
    if tensor.device.type == "meta":
        raise OffloadedWeightError(
            f"a weight of shape {tuple(tensor.shape)} is on the meta device: it was never loaded. Load a checkpoint "
            "that has it, or initialise it, before running the model."
        )
    if is_traceable_wrapper_subclass(tensor):
        raise OffloadedWeightError(
            f"a weight of shape {tuple(tensor.shape)} is a {type(tensor).__name__}, whose bytes cannot be streamed. "
            "Give the model a plan without offload (a larger max_memory)."
        )


@contextmanager
def _outside_autograd() -> Iterator[None]:
    """Weights must never become inference tensors, nor their moves part of a graph."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class WatchedParameters(dict[str, Any]):
    """A module's parameters, which tells the executor when one is read by name.

    Whoever reads a weight outside its module's forward (a parent that multiplies with `child.weight`) gets it on its
    own device. Iterating, as `named_parameters` and `state_dict` do, gives what rests at home.
    """

    def __init__(self, parameters: Mapping[str, Any], executor: Executor) -> None:
        super().__init__(parameters)
        self.executor = executor

    def __getitem__(self, name: str) -> Any:
        tensor = super().__getitem__(name)
        return tensor if tensor is None else self.executor.see(tensor)

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        from copy import deepcopy

        return {name: deepcopy(tensor, memo) for name, tensor in self.items()}

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self.items()),)


def watch(module: nn.Module, executor: Executor) -> None:
    """Notice reads of `module`'s parameters from now on."""
    if type(module._parameters) is dict and module._parameters:
        module.__dict__["_parameters"] = WatchedParameters(module._parameters, executor)


def unwatch(module: nn.Module) -> None:
    """Give `module` its plain parameters back."""
    if isinstance(module._parameters, WatchedParameters):
        module.__dict__["_parameters"] = dict(module._parameters.items())
