"""What autograd keeps of weights that will be elsewhere when backward comes: where each rests, and how it looked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..errors import OffloadedWeightError
from .residency import MemoryResident, Residency, version_of
from .ring import address_of

if TYPE_CHECKING:
    from .executor import Executor
    from .fetch import Item


class Onload(torch.autograd.Function):
    """What arrived elsewhere, as the weight that rests: its gradient goes home."""

    generate_vmap_rule = True

    @staticmethod
    def forward(leaf: torch.Tensor, arrived: torch.Tensor) -> torch.Tensor:
        return arrived.data

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        ctx.home = inputs[0].device

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient.to(ctx.home), None


@dataclass(frozen=True, eq=False)
class Kept:
    """A tensor that autograd keeps. Torch leaves it to whoever packs tensors to notice that one was written to."""

    tensor: torch.Tensor
    version: int

    def again(self) -> torch.Tensor:
        if version_of(self.tensor) != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: a "
                f"tensor of {self.tensor.dtype} and shape {tuple(self.tensor.shape)} is at version "
                f"{version_of(self.tensor)}; expected version {self.version} instead."
            )
        return self.tensor


@dataclass(frozen=True, eq=False)
class Resting:
    """A view of a weight that autograd wanted to keep: how to make it again from where the weight rests."""

    executor: Executor
    weight: torch.Tensor
    residency: Residency
    version: int
    device: torch.device
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    """Elements from the weight's first."""
    dtype: torch.dtype

    @classmethod
    def of(cls, executor: Executor, view: torch.Tensor, item: Item) -> Resting:
        offset = (address_of(view) - address_of(item.arrived)) // view.element_size()  # type: ignore[arg-type]
        look = (view.device, view.size(), view.stride(), offset, view.dtype)
        return cls(executor, item.tensor, item.residency, version_of(item.tensor), *look)

    def again(self) -> torch.Tensor:
        if version_of(self.weight) != self.version:
            raise OffloadedWeightError(
                f"{self.executor._told(self.weight)} was changed in place between forward and backward; the gradients "
                "that need its old value cannot be computed. Run backward before the optimiser's step."
            )
        with outside_autograd():
            there = self._there()
            there = there if there.dtype == self.dtype else there.view(self.dtype)
            return there.as_strided(self.size, self.stride, there.storage_offset() + self.offset)

    def _there(self) -> torch.Tensor:
        home = self.residency.home
        if home.device == self.device and isinstance(self.residency, MemoryResident):
            return home
        if self.executor.machine.reader.closed:  # the model was settled or detached since: homes can still be read
            return home.to(self.device)
        machine = self.executor.machine.aside
        transfer = machine.send(type(self.residency).load([self.residency], self.device), self.device)
        transfer.wait()
        machine.wait_for_homes()  # whoever called backward may write to weights right after it
        self.executor._count("", [transfer])
        transfer.ring.lose(transfer.slot)  # lives as long as what is returned
        return transfer.tensors[0]


def may_hook_saved_tensors() -> bool:
    autograd: Any = torch._C._autograd
    return autograd._top_saved_tensors_default_hooks(True) is None and autograd._saved_tensors_hooks_is_enabled()


@contextmanager
def uncached_casts() -> Iterator[None]:
    """Autocast keeps what it cast until its context ends: of a model that streams, that would be all of it."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def unpack(saved: Kept | Resting) -> torch.Tensor:
    return saved.again()


def outside_autograd() -> AbstractContextManager[None]:
    """Weights must never become inference tensors, nor their moves part of a graph."""
    graph = torch.is_grad_enabled() or torch.is_inference_mode_enabled() or _may_transform()
    return _out_of_autograd() if graph else _NOTHING


_NOTHING: AbstractContextManager[None] = nullcontext()


def _may_transform() -> bool:
    """Whether the calling thread is inside of a function transform (`torch.func`)."""
    return torch._C._functorch.maybe_current_level() is not None


@contextmanager
def _out_of_autograd() -> Iterator[None]:
    with torch._C._DisableFuncTorch(), torch.inference_mode(False), torch.no_grad():
        yield
