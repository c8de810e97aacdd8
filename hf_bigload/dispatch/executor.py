"""The streaming executor: weights are on their device while a thread is inside the block that uses them.

A thread enters a module's forward by a `Scope`, which leases weights and gives them back when it is left, however it is
left. Weights that came together are a `Fetch`. Leases count: while any thread is inside, the weights stay and their
slot is not reused.

A weight's data is in one place for all threads. Whoever needs it on another device meanwhile gets a *stand-in*: a copy
that is handed out where the weight is read by name (`WatchedParameters`). So no thread ever waits for another's lease,
with one exception, which cannot go round in a circle: see `Executor._wait_for_leaves`.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from typing import Any, TypeVar

import torch
from torch import nn
from torch.autograd.graph import increment_version, saved_tensors_hooks
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import OffloadedWeightError
from .autograd import Kept, Resting, may_hook_saved_tensors, outside_autograd, uncached_casts, unpack
from .fetch import Fetch, Item
from .machine import CPU_DEVICE, Machine
from .moving import map_tensors
from .prefetch import Ahead, Prefetcher, Recipe, Sent, Stop
from .residency import Residency, resting, state_of, version_of
from .ring import address_of
from .stats import Stats
from .transfer import Transfer
from .watched import unwatch, watch

logger = logging.getLogger(__name__)

__all__ = ["CPU_DEVICE", "Executor", "Machine", "Scope", "Stats", "unwatch", "watch"]


class Executor:
    """Leases weights to the blocks of one model."""

    def __init__(self, machine: Machine, offload_buffers: bool = False, watching: bool = False) -> None:
        self.machine = machine
        self.offload_buffers = offload_buffers
        self.watching = watching
        """Whether weights read outside their own module have to be noticed: they may be on another device."""
        self.on_disk: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.name_of: Callable[[torch.Tensor], str] = lambda _tensor: "a weight"
        """For errors."""
        self._placed: dict[int, Fetch] = {}
        """By tensor id: the fetch that says where a weight's data is."""
        self._changed = threading.Condition(threading.RLock())
        self._thread = _Thread()
        self.prefetcher = Prefetcher(self)
        make_room = weakref.WeakMethod(self.prefetcher.make_room)  # reads under way hold the machine, and end later
        machine.make_room = lambda: (method := make_room()) is not None and method()
        _EXECUTORS.add(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Executor:
        """A copied model has copies of the weights, in memory: it starts with nothing remembered and nothing leased."""
        copied = memo[id(self)] = Executor(deepcopy(self.machine, memo), self.offload_buffers, self.watching)
        return copied

    def tensors(self, module: nn.Module, whole: bool, device: torch.device) -> list[torch.Tensor]:
        """The weights of a block as they are now: adapters, resized and re-tied weights included."""
        found: dict[int, torch.Tensor] = {}
        values = dict.values  # past what watches them
        for owner in _modules(module) if whole else (module,):
            parameters, buffers = owner._parameters, owner._buffers
            if self.watching and ((parameters and type(parameters) is dict) or (buffers and type(buffers) is dict)):
                watch(owner, self, device)
            if parameters:
                for tensor in values(parameters):
                    if tensor is not None:
                        found[id(tensor)] = tensor
            if self.offload_buffers:
                found.update((id(tensor), tensor) for tensor in values(buffers) if tensor is not None)
        return list(found.values())

    # ------------------------------------------------------------ leases

    def lease(
        self, scope: Scope, tensors: Iterable[torch.Tensor], at_home: bool = False, ahead: Ahead | None = None
    ) -> None:
        """Have `tensors` on the scope's device until it is left; `at_home` only keeps them where they rest.

        What was sent `ahead` is used where it still is right, and dropped otherwise.

        Raises:
            OffloadedWeightError: a weight cannot travel.
            CheckpointError: the file it rests in changed or is damaged.
            torch.OutOfMemoryError: the device has no room for them.
        """
        wanted, ahead = self._thread.lacks(tensors, scope.device), ahead or Ahead()
        while wanted:
            try:
                mine, joined = self._claim(scope, wanted, at_home, ahead)
            finally:
                ahead.drop()
            try:
                self._bring(mine, scope)
                if all([fetch.arrived() for fetch in joined]):
                    scope.held.update(zip(map(id, wanted), wanted, strict=True))
                    scope.held.update((id(item.tensor), item.handed_out()) for item in mine.items if not item.swaps)
                    return
            except BaseException:
                self._give_back(scope, [mine, *joined])
                raise
            self._give_back(scope, [mine, *joined])  # another thread could not bring its part: try for ourselves

    def release(self, scope: Scope) -> None:
        """Give back all that `scope` leased. Repeating it does no harm."""
        self._give_back(scope, list(scope.fetches))

    def _claim(
        self, scope: Scope, tensors: list[torch.Tensor], at_home: bool, ahead: Ahead
    ) -> tuple[Fetch, list[Fetch]]:
        """A new fetch of what nobody has on the scope's device, and the fetches of others that bring the rest."""
        mine, joined = Fetch(scope.device, scope), dict[int, Fetch]()
        with self._changed:
            self._wait_for_leaves(scope, tensors)
            graph = scope.is_entered and torch.is_grad_enabled()
            for tensor in tensors:
                live = self._placed.get(id(tensor))
                sent = ahead.use(tensor) if live is None else None
                if live is not None and live.device == scope.device:
                    joined[id(live)] = live
                elif sent is not None and not graph and self._may_swap(tensor):
                    arrived = mine.take_over(sent, ahead)
                    mine.items.append(Item(tensor, sent.residency, swaps=True, arrived=arrived, state=sent.state))
                else:
                    self._add(mine, tensor, live, scope, at_home, ahead, sent)
            for fetch in (*joined.values(), mine) if mine.items or mine.pinned else joined.values():
                scope.fetches.append(fetch)  # first: what a scope does not know of, it cannot give back
                fetch.shared |= bool(fetch.users)
                fetch.users.add(scope)
            for tensor in (*mine.pinned, *(item.tensor for item in mine.items if item.swaps)):
                self._placed[id(tensor)] = mine
        return mine, list(joined.values())

    def _wait_for_leaves(self, scope: Scope, tensors: list[torch.Tensor]) -> None:
        """A weight that gets a gradient is a leaf of the graph where it rests: wait for those who have it elsewhere.

        Whoever waits here has no weight elsewhere that another thread could be waiting for, so all waiting ends.
        """
        if not (scope.is_entered and torch.is_grad_enabled()):
            return
        leaves = [tensor for tensor in tensors if tensor.requires_grad]
        while any(self._is_away(tensor) for tensor in leaves):
            if any(self._is_away(item.tensor) for s in self._thread.scopes for f in s.fetches for item in f.items):
                raise OffloadedWeightError(
                    f"{self._among(leaves)} needs a gradient while another thread, or the block around this one, uses "
                    "it without gradients on another device. Train and infer with separate copies of the model."
                )
            self._changed.wait()

    def _is_away(self, tensor: torch.Tensor) -> bool:
        live = self._placed.get(id(tensor))
        item = None if live is None else live.item_of(tensor)
        return item is not None and live is not None and item.residency.home.device != live.device

    def _add(
        self,
        mine: Fetch,
        tensor: torch.Tensor,
        live: Fetch | None,
        scope: Scope,
        at_home: bool,
        ahead: Ahead,
        sent: Sent | None,
    ) -> None:
        residency = self._residency(tensor, live) if sent is None else sent.residency
        rests_here = residency.home.device == mine.device
        if live is None and rests_here and (at_home or not residency.streams):
            if at_home or self.watching:
                mine.pinned.append(tensor)
            return
        item = Item(tensor, residency, swaps=live is None and self._may_swap(tensor))
        if scope.is_entered and not rests_here and torch.is_grad_enabled():
            item.swaps = False  # a graph may keep the very tensor that it computed with
            item.leaf = tensor.view_as(tensor) if tensor.requires_grad else None
        if rests_here and not item.swaps:
            item.arrived = residency.home
        elif sent is not None:
            item.arrived = mine.take_over(sent, ahead)
        else:
            self._check_can_travel(tensor)
        if not (item.swaps or scope.is_entered):
            raise OffloadedWeightError(
                f"{self._told(tensor)} is in use on {tensor.device}: wait until its forward ends."
            )
        mine.items.append(item)

    def _may_swap(self, tensor: torch.Tensor) -> bool:
        """Buffers are read without a lease where they rest, so none may be swapped away, unless all are leased."""
        return isinstance(tensor, nn.Parameter) or self.offload_buffers

    def _residency(self, tensor: torch.Tensor, live: Fetch | None) -> Residency:
        item = None if live is None else live.item_of(tensor)
        if item is not None:
            return item.residency
        record = self.on_disk.get(tensor)
        if record is not None and record.is_current(tensor):
            return record
        if record is not None:  # replaced or written: what is in memory now is the truth
            del self.on_disk[tensor]
        return resting(tensor)

    def _bring(self, fetch: Fetch, scope: Scope) -> None:
        with outside_autograd():
            missing = [item for item in fetch.items if item.arrived is None]
            if missing:
                self._send(fetch, missing, scope.lasting)
            recorder = self.machine.recorder
            begun = None if recorder is None else recorder.now(fetch.device)
            stalled = sum([transfer.wait() for transfer in fetch.transfers])
            if recorder is not None and begun is not None:
                recorder.waited(scope.name, fetch.device, begun, stalled > 0)
            for transfer in fetch.transfers:
                transfer.tensors = []  # what a slot is looked at by shows when it is given back
            for item in fetch.items:
                item.appear()
        if fetch.transfers:
            self._count(scope.name, fetch.transfers, stalled, int(not missing), int(bool(missing)))
        fetch.ready.set()

    def _send(self, fetch: Fetch, items: list[Item], lasting: bool) -> None:
        for kind, group in _by_kind(items, lambda item: item.residency).items():
            load = kind.load([item.residency for item in group], fetch.device)
            transfer = self.machine.send(load, fetch.device, lasting)
            fetch.transfers.append(transfer)
            for item, data in zip(group, transfer.tensors, strict=True):
                item.arrived = data

    def send_ahead(self, stop: Stop, must_keep: bool) -> Ahead | None:
        if stop.recipe is not None and not self.machine.has_room(stop.recipe.largest, stop.runs_on):
            return None
        weights = stop.weights()
        with self._changed:
            recipe = self._recipe(stop, weights)
        if must_keep and not recipe.keeps:
            return None
        ahead = Ahead(recipe)
        with outside_autograd():
            for load, _ in recipe.loads:
                transfer = self.machine.send_ahead(load, stop.runs_on)
                if transfer is None:
                    ahead.drop()
                    return None
                ahead.transfers.append(transfer)
                if transfer.journey is not None:
                    transfer.journey.block = stop.name
        return ahead

    def _recipe(self, stop: Stop, weights: Sequence[torch.Tensor]) -> Recipe:
        """How to bring weights that nobody has elsewhere. The caller holds the lock."""
        free = [tensor for tensor in weights if id(tensor) not in self._placed]
        if stop.recipe is not None and stop.recipe.fits(free):
            return stop.recipe
        device = stop.runs_on
        wanted = [(t, residency) for t in free if (residency := self._sendable(t, device)) is not None]
        with outside_autograd():
            groups = _by_kind(wanted, lambda pair: pair[1]).items()
            loads = [(kind.load([r for _, r in group], device), group) for kind, group in groups]
        stop.recipe = Recipe(free, [state_of(t) for t in free], loads)
        return stop.recipe

    def _sendable(self, tensor: torch.Tensor, device: torch.device) -> Residency | None:
        """Where a weight rests that has to come to `device`, and can."""
        if tensor.device.type == "meta" or is_traceable_wrapper_subclass(tensor):
            return None
        record = self.on_disk.get(tensor)
        residency: Residency = record if record is not None and record.state == state_of(tensor) else resting(tensor)
        return None if residency.home.device == device and not residency.streams else residency

    def _count(
        self, block: str, transfers: list[Transfer], stalled: float = 0.0, hits: int = 0, misses: int = 0
    ) -> None:
        read, copied = sum([t.bytes_read for t in transfers]), sum([t.bytes_copied for t in transfers])
        self.machine.stats.add(block, read, copied, stalled, hits, misses)
        if self.machine.recorder is not None:
            for journey in [transfer.journey for transfer in transfers if transfer.journey is not None]:
                journey.block, journey.used = block, True

    def _give_back(self, scope: Scope, fetches: list[Fetch]) -> None:
        with self._changed:
            for fetch in fetches:
                for slot in fetch.slots:
                    slot.left()
                fetch.users.discard(scope)
                if not fetch.users or (fetch.brought_by is scope and not fetch.ready.is_set()):
                    self._retire(fetch)
                if fetch in scope.fetches:
                    scope.fetches.remove(fetch)

    def _retire(self, fetch: Fetch) -> None:
        """End a fetch. Can be begun again where an interrupt stopped it."""
        if not fetch.ready.is_set():
            fetch.failed = True
        with outside_autograd():
            for slot in fetch.slots if fetch.shared else ():
                slot.follow()  # what others wrote there goes home, too
            while fetch.items:
                self._send_home(fetch.items[-1], fetch)
                self._unplace(fetch.items[-1].tensor, fetch)
                fetch.items.pop()
        for tensor in fetch.pinned:
            self._unplace(tensor, fetch)
        while fetch.transfers:
            fetch.transfers[-1].release()
            fetch.transfers.pop()
        fetch.ready.set()
        self._changed.notify_all()

    def _unplace(self, tensor: torch.Tensor, fetch: Fetch) -> None:
        if self._placed.get(id(tensor)) is fetch:
            del self._placed[id(tensor)]

    def _send_home(self, item: Item, fetch: Fetch) -> None:
        tensor, home, arrived = item.tensor, item.residency.home, item.arrived
        if arrived is None:
            return
        if item.is_untouched():
            tensor.data = home
        elif not item.swaps:
            used = arrived if item.stand_in is None else item.stand_in.detach()
            if item.is_written() or not _is_same_view(used, arrived):
                _overwrite(home, used)
                self._count_write(tensor)
        elif _is_same_view(tensor, arrived):
            if item.is_written():
                _overwrite(home, arrived)
            tensor.data = home
        elif any(slot.covers(tensor) for slot in fetch.slots):  # another view of the slot took its place
            tensor.data = tensor.data.to(home.device, copy=True)
        # else it was never here, or something new took its place, which is the home
        item.arrived = item.stand_in = item.before = None

    def _count_write(self, tensor: torch.Tensor) -> None:
        """A stand-in was written to: the weight was, but not where another thread may have it."""
        increment_version(tensor)
        elsewhere = self._placed.get(id(tensor))
        item = None if elsewhere is None else elsewhere.item_of(tensor)
        if item is not None:
            item.version += 1

    def home(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor`'s data at rest, also while some thread has it on a device."""
        with self._changed:
            live = self._placed.get(id(tensor))
            item = None if live is None else live.item_of(tensor)
            return tensor.data if item is None else item.residency.home

    @property
    def is_in_use(self) -> bool:
        """Whether any weight is leased, or the calling thread is inside of a block."""
        return bool(self._placed or self._thread.scopes)

    def forget(self) -> None:
        """Stop streaming: what rests in a file is from now on read through its mapping."""
        self.on_disk.clear()

    def close(self) -> None:
        """End what is under way, and give the rings and files back."""
        self.prefetcher.close()
        self.machine.close()

    def after_fork(self) -> None:
        """In a child only the thread that forked lives on: the leases of all others end."""
        self._changed = threading.Condition(threading.RLock())
        self.machine.after_fork()
        self.prefetcher.after_fork()
        me = threading.get_ident()
        for fetch in list(self._placed.values()):
            fetch.users = {scope for scope in fetch.users if scope.thread == me}
            if not fetch.users:
                with self._changed:
                    self._retire(fetch)

    # ------------------------------------------------------------ what the calling thread is inside of

    def scope_device(self) -> torch.device | None:
        """The device of the innermost dispatched module that the calling thread is inside of; None outside of all."""
        return self._thread.scopes[-1].device if self._thread.scopes else None

    def see(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """What a module's attribute gives when it is read: the weight, on the device of whoever reads it.

        `device` is the one that the weight's own module runs on.
        """
        if not self._thread.scopes:
            # backward runs parts of a block again, without its scope, for checkpoints inside it
            again = tensor.device != device and torch._C._current_graph_task_id() != -1
            return tensor.to(device) if again else tensor
        scope = self._thread.scopes[-1]
        held = self._thread.find(tensor, scope.device)
        if held is None and not self._may_swap(tensor) and tensor.device == scope.device:
            return tensor
        if held is None:
            self._borrow(scope, tensor)
            held = self._thread.find(tensor, scope.device)
        return tensor if held is None else held

    def _borrow(self, scope: Scope, tensor: torch.Tensor) -> None:
        """Bring a weight that the scope's module reads although another one owns it.

        Where it does not fit, it stays at home: many a module only wants to know its dtype.
        """
        try:
            self.lease(scope, [tensor])
        except torch.OutOfMemoryError as error:
            logger.warning(
                "%s is read outside its module, and stays on %s: %s", self._told(tensor), tensor.device, error
            )

    def pack(self, tensor: torch.Tensor) -> Any:
        """What autograd keeps instead of a tensor that it wants to save: for a weight in a slot, where it rests."""
        for scope in self._thread.scopes:
            for fetch in scope.fetches:
                item = fetch.find(tensor)
                if item is not None and (item.is_written() or tensor.is_conj() or tensor.is_neg()):
                    return Kept(tensor.detach().clone(), 0)  # the home has other values
                if item is not None:
                    return Resting.of(self, tensor, item)
        return Kept(tensor.detach(), version_of(tensor))  # detached: an output would keep itself alive by its graph

    # ------------------------------------------------------------ errors

    def _check_can_travel(self, tensor: torch.Tensor) -> None:
        if tensor.device.type == "meta":
            raise OffloadedWeightError(
                f"{self._told(tensor)} is on the meta device: it was never loaded. Load a checkpoint that has it, or "
                "initialise it, before running the model."
            )
        if is_traceable_wrapper_subclass(tensor):
            raise OffloadedWeightError(
                f"{self._told(tensor)} is a {type(tensor).__name__}, whose bytes cannot be streamed. Give the model a "
                "plan without offload (a larger max_memory)."
            )

    def _told(self, tensor: torch.Tensor) -> str:
        return f"{self.name_of(tensor)} of shape {tuple(tensor.shape)}"

    def _among(self, tensors: list[torch.Tensor]) -> str:
        return self._told(next(filter(self._is_away, tensors)))


_EXECUTORS: weakref.WeakSet[Executor] = weakref.WeakSet()


def _after_fork() -> None:
    for executor in list(_EXECUTORS):
        executor.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class _Thread(threading.local):
    """What one thread is inside of, the innermost last."""

    def __init__(self) -> None:
        self.scopes: list[Scope] = []

    def lacks(self, tensors: Iterable[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
        """Those of `tensors` that this thread does not have on `device`, each once."""
        if not any(scope.held for scope in self.scopes):
            return list({id(tensor): tensor for tensor in tensors}.values())
        return list({id(tensor): tensor for tensor in tensors if self.find(tensor, device) is None}.values())

    def find(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor | None:
        """What this thread already has as `tensor` on `device`."""
        for scope in reversed(self.scopes):
            found = scope.held.get(id(tensor))
            if found is not None and found.device == device:
                return found
        return None


class Scope:
    """A thread's stay in one place, on one device: the leases it holds, and what it hands out as weights.

    Always: `try: scope.enter(...) ... finally: scope.leave()`.
    """

    def __init__(self, executor: Executor, device: torch.device, lasting: bool = False, name: str = "") -> None:
        self.executor, self.device, self.name = executor, device, name
        self.lasting = lasting
        """Other blocks come and go meanwhile."""
        self.thread = threading.get_ident()
        self.is_entered = False
        self.fetches: list[Fetch] = []
        self.held: dict[int, torch.Tensor] = {}

    def enter(self, tensors: list[torch.Tensor], at_home: bool = False, ahead: Ahead | None = None) -> None:
        """Begin a module's forward: modules called, and weights read by name, from now on are on this device."""
        self.is_entered = True
        self.executor._thread.scopes.append(self)
        self.executor.lease(self, tensors, at_home, ahead)

    def leave(self) -> None:
        """End the stay. Repeating it does no harm."""
        if self in self.executor._thread.scopes:
            self.executor._thread.scopes.remove(self)
        self.held.clear()
        self.executor.release(self)
        if self.is_entered and not self.executor._thread.scopes:
            self.executor.prefetcher.come_out()
            self.executor.machine.wait_for_homes()

    def keep(self, output: Any) -> Any:
        """`output` with every tensor that looks into a slot cloned: the slot will hold other weights soon."""
        slots = [slot for fetch in self.fetches for slot in fetch.slots]
        if not slots:
            return output
        return map_tensors(lambda t: t.clone() if any(slot.covers(t) for slot in slots) else t, output)

    @contextmanager
    def guard(self) -> Iterator[None]:
        """A context in which nothing of a slot is kept for later: not by autocast, and not by autograd.

        Autograd saves where a weight rests instead, and reads it again. Where somebody else already decides what it
        saves (a checkpoint, `save_on_cpu`, `torch.func`), they go on deciding; what they keep of a slot costs the ring
        that slot.
        """
        travelled = any(fetch.slots for fetch in self.fetches)
        forgetful = travelled and torch.is_autocast_enabled(self.device.type)
        saves = torch.is_grad_enabled() and (travelled or self.executor.watching) and may_hook_saved_tensors()
        hooks = saved_tensors_hooks(self.executor.pack, unpack) if saves else nullcontext()
        with uncached_casts() if forgetful else nullcontext(), hooks:
            yield


T = TypeVar("T")


def _by_kind(things: Iterable[T], residency: Callable[[T], Residency]) -> dict[type[Residency], list[T]]:
    """What travels together: weights that rest alike."""
    groups: dict[type[Residency], list[T]] = {}
    for thing in things:
        groups.setdefault(type(residency(thing)), []).append(thing)
    return groups


def _modules(module: nn.Module) -> list[nn.Module]:
    """`module.modules()`, at a fifth of the price."""
    found, seen = [module], {module}
    for owner in found:
        if owner._modules:
            for child in owner._modules.values():
                if child is not None and child not in seen:
                    seen.add(child)
                    found.append(child)
    return found


def _overwrite(home: torch.Tensor, arrived: torch.Tensor) -> None:
    if home is not arrived:
        home.copy_(arrived)


def _is_same_view(one: torch.Tensor, other: torch.Tensor) -> bool:
    return address_of(one) == address_of(other) and one.shape == other.shape and one.stride() == other.stride()
