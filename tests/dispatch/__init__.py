"""What the tests of the dispatch share: small models, ways to place them, and what must hold once nobody is inside."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

import hf_bigload
from hf_bigload.dispatch.attach import attachment_of
from hf_bigload.dispatch.executor import Executor, Scope

CPU = torch.device("cpu")


class Layer(nn.Module):
    """A block: its class repeats in a list, so that it is kept whole."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    """Linear, layers, norm, linear."""

    def __init__(self, layers: int = 3, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.last = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return self.last(self.norm(x))


class Tied(nn.Module):
    """A language model: the head's weight is the table's."""

    def __init__(self, layers: int = 2, width: int = 8, vocabulary: int = 20) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def seeded(make: Any, *args: Any, seed: int = 0, **kwargs: Any) -> Any:
    torch.manual_seed(seed)
    return make(*args, **kwargs).eval()


def placed(model: nn.Module, device_map: Any, main_device: Any = None, **options: Any) -> Any:
    """A dispatched copy of `model`."""
    return hf_bigload.dispatch_model(copy.deepcopy(model), as_map(device_map), main_device=main_device, **options)


def as_map(device_map: Any) -> Any:
    return {"": device_map} if isinstance(device_map, str | int) else device_map


def save(model: nn.Module, folder: Path) -> Path:
    """A checkpoint of `model`, tied weights once."""
    folder.mkdir(parents=True, exist_ok=True)
    own = {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}
    persistent = model.state_dict()
    own |= {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    save_file(own, folder / "model.safetensors")
    return folder


def from_disk(model: nn.Module, folder: Path, **options: Any) -> Any:
    """A copy of `model` that streams from a checkpoint of it."""
    copied = copy.deepcopy(model)
    options = {"device_map": {"": "disk"}} | options
    return hf_bigload.load_checkpoint_and_dispatch(copied, save(model, folder), **options).eval()


def executor_of(model: nn.Module) -> Executor:
    attachment = attachment_of(model)
    assert attachment is not None
    return attachment.executor


@contextmanager
def leased(executor: Executor, tensors: list[torch.Tensor], device: torch.device | str = CPU) -> Iterator[Scope]:
    """What a block does with its weights."""
    scope = Scope(executor, torch.device(device))
    try:
        scope.enter(tensors)
        yield scope
    finally:
        scope.leave()


def assert_at_rest(executor: Executor, *tensors: torch.Tensor) -> None:
    """Nothing is leased, no slot is lent but for what was sent ahead, and no tensor looks into the rings."""
    assert not executor._placed and not executor._thread.scopes
    prefetcher = executor.prefetcher
    for dropped in prefetcher._dropped:
        dropped.settle()
    ahead = [transfer for sent in prefetcher._ahead.values() for transfer in sent.transfers]
    for transfer in ahead:
        transfer.wait()
    for ring in executor.machine.rings.values():
        until = time.monotonic() + 10  # for what a reader still writes to although nobody wants it
        while not set(ring._lent) <= {transfer.slot for transfer in ahead} and time.monotonic() < until:
            time.sleep(0.001)
        assert set(ring._lent) <= {transfer.slot for transfer in ahead}
        for memory in ring._alive:
            addresses = [tensor.data_ptr() for tensor in tensors if tensor.device.type == ring.device.type]
            assert not any(memory.address <= address < memory.address + memory.nbytes for address in addresses)


def assert_model_at_rest(model: nn.Module) -> None:
    assert_at_rest(executor_of(model), *model.parameters(), *model.buffers())


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal in shape, dtype and every bit."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(_bits(one), _bits(other))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def gradients(model: nn.Module) -> dict[str, torch.Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same_gradients(plain: nn.Module, other: nn.Module) -> None:
    expected, got = gradients(plain), gradients(other)
    assert expected.keys() == got.keys()
    for name, gradient in expected.items():
        theirs = got[name]
        assert (gradient is None) == (theirs is None), name
        assert gradient is None or same_bits(gradient, theirs), name  # type: ignore[arg-type]


def values(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors as they are now."""
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}


PATIENCE = 20
"""Seconds after which threads that wait for each other are taken for dead."""


def together(*actions: Callable[[], Any]) -> list[Any]:
    """Run each action in a thread of its own, and return their results; raises what one of them raised."""
    results: list[Any] = [None] * len(actions)
    errors: list[BaseException] = []

    def run(i: int) -> None:
        try:
            results[i] = actions[i]()
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(actions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive(), "a deadlock"
    if errors:
        raise errors[0]
    return results
