"""Another plan for a model that lives: weights go from where they rest to where the new plan says.

The parameters stay the objects that they are. What is unchanged since it was read from a file goes back to the file by
being forgotten in memory; what was written or replaced is the truth, and is written to disk where it has to leave
memory. Blocks move one at a time, those first that free more than they take, so that no device ever holds more than the
larger of its two budgets and one block.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .accounts import held_by
from .dispatch.attach import attachment_of
from .dispatch.executor import Executor
from .dispatch.rescue import gate_of
from .errors import OffloadedWeightError
from .hardware import device_name
from .materialize import Materializer
from .module_tensors import give_back_unused_memory
from .placed import tensors_of
from .specs import CPU, DISK, Placement, Plan, TensorEntry

# ---------------------------------------------------------------- who is inside


@contextmanager
def alone(model: nn.Module, forwards: int = 0) -> Iterator[None]:
    """Within the context, no thread but the calling one, which may be in so many `forwards`, uses `model`'s weights.

    A thread that calls a model with a wrapper (`dispatch.rescue`) meanwhile waits until the context ends. Who calls one
    without, or one of a model's blocks directly, is not held back: it must not do so.

    Raises:
        OffloadedWeightError: a thread is in a forward of `model` already, or uses its weights, or moves them.
    """
    me, gate = threading.get_ident(), gate_of(model)
    with gate.closed(forwards) as counted:
        inside = set(counted) or {t for t in _threads_inside(model, gate.held_back) if t != me or not forwards}
        attachment = attachment_of(model)
        if inside or (attachment is not None and attachment.executor.is_in_use):
            raise OffloadedWeightError(
                f"The blocks of {type(model).__name__} cannot be moved while "
                f"{'this' if me in inside else 'another'} thread is inside of one of its forwards. Replan between two "
                "forwards."
            )
        yield


def _threads_inside(model: nn.Module, held_back: Callable[[], Collection[int]]) -> Iterator[int]:
    """By what the threads execute: a plain model carries nothing that could tell."""
    modules = {id(module) for module in model.modules()}
    frames = sys._current_frames()
    held = held_back()  # after the frames: whoever has come to the gate since is not inside
    for thread, frame in frames.items():
        called = {id(each.f_locals.get("self")) for each in _stack(frame) if each.f_code in _CALLS}
        if called & modules - ({id(model)} if thread in held else set()):
            yield thread


_CALLS = {nn.Module._call_impl.__code__, nn.Module._wrapped_call_impl.__code__}


def _stack(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


# ---------------------------------------------------------------- moving


@dataclass
class _Move:
    """One weight that has to go elsewhere."""

    name: str
    tensor: torch.Tensor
    source: str
    """Where it rests: a device, or DISK for what is the file's own mapping."""
    entry: TensorEntry | None
    """Where in a file, for DISK."""
    target: str

    @property
    def nbytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()


@dataclass
class Relocation:
    """The way of a model's weights from one plan to another; `executor` is the one that was suspended, if any."""

    model: nn.Module
    before: Plan
    plan: Plan
    materializer: Materializer
    executor: Executor | None
    limits: Mapping[str, int]
    """Bytes that a device's weights may take on the way; a device that is not named may hold any."""
    _held: dict[str, int] = field(default_factory=dict)

    def check(self) -> None:
        """Follow the new plan, or refuse what cannot be done, before anything moves.

        Raises:
            OffloadedWeightError: a weight of a kind that cannot be moved would have to go elsewhere.
        """
        self.materializer.follow(self.plan)
        try:
            self._check()
        except BaseException:
            self.materializer.follow(self.before)
            raise

    def _check(self) -> None:
        for moves in self._blocks():
            for move in moves:
                if is_traceable_wrapper_subclass(move.tensor) and move.source != move.target:
                    raise OffloadedWeightError(
                        f"weight {move.name!r} is a {type(move.tensor).__name__} on {move.source}, which cannot be "
                        f"moved to {move.target}. Nothing was moved. Give a plan that leaves it where it is."
                    )

    def run(self) -> None:
        """Move every weight whose place is another one now.

        Raises:
            CheckpointError, SpillError, torch.OutOfMemoryError: what had not moved by then is where it was, and every
                weight has its values.
        """
        waiting = [moves for moves in self._blocks() if moves]
        self._held = held_by(self.model)
        left = {move.source for moves in waiting for move in moves}
        try:
            while waiting:
                self._move(waiting.pop(self._next(waiting)))
        except BaseException:
            self.materializer.abandon()
            raise
        finally:
            for place in left - {CPU, DISK}:
                give_back_unused_memory(torch.device(place))

    def places(self) -> dict[str, str]:
        """Where each weight rests now, by name."""
        return {name: self._place(tensor)[0] for name, tensor in tensors_of(self.model).items()}

    def settle(self, plan: Plan) -> None:
        """Let the materializer know what rests in files under `plan`, for it to be registered."""
        self.materializer.follow(plan)
        for name, tensor in tensors_of(self.model).items():
            place, entry = self._place(tensor)
            if place == DISK and entry is not None and self.materializer.home_of(name) == DISK:
                self.materializer.rest_in(entry, tensor.data)

    def _place(self, tensor: torch.Tensor) -> tuple[str, TensorEntry | None]:
        record = None if self.executor is None else self.executor.on_disk.get(tensor)
        if record is not None and record.is_current(tensor):
            return DISK, record.entry
        if self.materializer.rests_on_disk(tensor):
            return DISK, None  # since a moment ago
        if self.materializer.is_mapped(tensor):
            entry = self.materializer.origins[tensor].entry
            if self.materializer.can_read(entry):
                return DISK, entry
        return device_name(tensor.device), None

    def _blocks(self) -> list[list[_Move]]:
        named = tensors_of(self.model)
        return [self._moves_of(placement, named) for placement in self.plan.placements]

    def _moves_of(self, placement: Placement, named: Mapping[str, torch.Tensor]) -> list[_Move]:
        moves = []
        for spec in placement.block.tensors:
            tensor = named[spec.name]
            if tensor.device.type == "meta" or not tensor.numel():
                continue
            source, entry = self._place(tensor)
            move = _Move(spec.name, tensor, source, entry, self.materializer.home_of(spec.name))
            if self._has_to_go(move):
                moves.append(move)
        return moves

    def _has_to_go(self, move: _Move) -> bool:
        if move.source == DISK and move.target == CPU:
            return self.plan.streams  # else its mapping is as good: nothing competes for the pages
        if move.source == move.target == CPU:
            return not self.materializer.lies_as_wanted(move.name, move.tensor.data)
        return move.source != move.target

    def _next(self, waiting: Sequence[Sequence[_Move]]) -> int:
        """The block to move now: one for which there is room, else one out of the fullest device."""
        for at, moves in enumerate(waiting):
            after = dict(self._held)
            for move in moves:
                _take(after, move)
            if all(
                after[place] <= max(self._held.get(place, 0), self.limits.get(place, size))
                for place, size in after.items()
            ):
                return at
        over = {place: held - self.limits.get(place, held) for place, held in self._held.items()}

        def relief(at: int) -> tuple[int, int]:
            return max(over.get(m.source, 0) for m in waiting[at]), -sum(m.nbytes for m in waiting[at])

        return max(range(len(waiting)), key=relief)

    def _move(self, moves: Sequence[_Move]) -> None:
        """Bring one block to where it goes. Its weights change places together, when all are there."""
        with torch.inference_mode(False), torch.no_grad():
            arrived = [self._data(move) for move in moves]
            self.materializer.finish()
            for move, data in zip(moves, arrived, strict=True):
                _put(move.tensor, data)
                _take(self._held, move)

    def _data(self, move: _Move) -> torch.Tensor:
        origin = self.materializer.origins.get(move.tensor)
        if move.target == DISK:
            return self.materializer.sent_back(move.name, move.tensor.data, origin)
        if move.entry is not None and self.materializer.can_read(move.entry):
            return self.materializer.load(move.name, move.entry, move.tensor.dtype)
        return self.materializer.moved(move.name, move.tensor.data, origin)


def _take(held: dict[str, int], move: _Move) -> None:
    for place, nbytes in ((move.target, move.nbytes), (move.source, -move.nbytes)):
        if place != DISK:
            held[place] = held.get(place, 0) + nbytes


def _put(tensor: torch.Tensor, data: torch.Tensor) -> None:
    """Give a weight its data in another place, and its gradient with it."""
    gradient = tensor.grad
    if gradient is None:
        tensor.data = data
        return
    tensor.grad = None
    tensor.data = data
    tensor.grad = gradient.to(data.device)
