"""Random programs over dispatched models on simulated accelerators: the plain model's bits, and nothing out of order.

A program is a model, a placement, a size for the rings, and forwards that take the blocks in some order, with what may
happen between and inside them. Kernels and copies run in asynchronous mode, where whatever no event orders is counted.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import itertools
import os
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_bigload.checkpoint.reader import Reader
from hf_bigload.dispatch import residency, ring
from hf_bigload.dispatch.attach import detach
from hf_bigload.dispatch.executor import Executor, Fetch, Item
from hf_bigload.dispatch.machine import Machine
from hf_bigload.dispatch.prefetch import Prefetcher
from hf_bigload.dispatch.residency import Residency
from hf_bigload.dispatch.ring import DeviceMemory, DeviceSlot, HostSlot, Slot
from tests import simdev

from . import (
    CPU,
    PATIENCE,
    Layer,
    Net,
    assert_model_at_rest,
    executor_of,
    from_disk,
    leased,
    placed,
    same_bits,
    seeded,
    together,
)

WIDTH = 8

QUICK, SLOW = range(100), range(100, 2000)


# ---------------------------------------------------------------- models


class Stopped(BaseException):
    """Ends a forward in its middle, as an interrupt does."""


@dataclass(frozen=True)
class Step:
    """One block of a forward, and what happens on the way to it."""

    block: int
    event: str = ""
    """What: "raise" and "stop" end a forward inside the block, "return" before it. "read": its weight is read by name.
    "write": it writes to its own weight. "keep": its weight is used after it. "guest": another model's forward runs
    inside this one. "again": the block's backward runs its forward again.
    """


class Block(nn.Module):
    """Weights of some size, a buffer, perhaps blocks inside: what repeats in a list, so it is kept whole."""

    def __init__(self, dice: random.Random, depth: int) -> None:
        super().__init__()
        hidden = dice.choice([1, 4, 16, 40])
        self.up, self.down = nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH)
        self.norm = nn.LayerNorm(WIDTH) if dice.random() < 0.5 else None
        self.gain = nn.Parameter(torch.rand(WIDTH))
        self.register_buffer("shift", torch.rand(WIDTH), persistent=dice.random() < 0.8)
        inner = dice.choice([0, 0, 1, 2]) if depth else 0
        self.inner = nn.ModuleList(Block(dice, depth - 1) for _ in range(inner))
        self.writes = self.keeps = False
        self.outlives: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor, ends: type[BaseException] | None = None) -> torch.Tensor:
        if self.writes and not torch.is_grad_enabled():
            self.gain.mul_(1.25)
        self.outlives = [self.gain.view(-1)] if self.keeps else []
        self.writes = self.keeps = False
        y = self.up(x if self.norm is None else self.norm(x))
        if ends is not None:
            raise ends("on purpose")
        for inner in self.inner:
            x = inner(x)
        return torch.tanh(x * self.gain + self.shift + self.down(torch.tanh(y)))


class Group(nn.Module):
    """Blocks below a parent with a weight of its own."""

    def __init__(self, dice: random.Random) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(WIDTH))
        self.blocks = nn.ModuleList(Block(dice, 0) for _ in range(2))

    def forward(self, x: torch.Tensor, ends: type[BaseException] | None = None) -> torch.Tensor:
        for block in self.blocks:
            x = block(x * self.scale, ends)
        return x


class Table(nn.Module):
    """Rows chosen by what comes."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(12, WIDTH)

    def forward(self, x: torch.Tensor, ends: type[BaseException] | None = None) -> torch.Tensor:
        chosen = torch.arange(x.shape[0], device=x.device)
        if ends is not None:
            raise ends("on purpose")
        return torch.tanh(x + self.rows(chosen))


class Maze(nn.Module):
    """Takes its blocks in whatever order it is told to."""

    guest: list[Any]
    """Another model, if any; in a list, so that it is none of this one's modules."""

    def __init__(self, dice: random.Random) -> None:
        super().__init__()
        self.guest = []
        self.scale = nn.Parameter(torch.rand(WIDTH))
        blocks: list[nn.Module] = [Block(dice, depth=1) for _ in range(dice.randint(2, 6))]
        blocks += [Table()] if dice.random() < 0.4 else []
        blocks += [Group(dice)] if dice.random() < 0.4 else []
        dice.shuffle(blocks)
        whole = [block for block in blocks if isinstance(block, Block)]
        for block in dice.choice([[], whole[:1], whole]):
            block.gain = whole[-1].gain  # tied
        if dice.random() < 0.4:
            whole[0].up = copy.deepcopy(whole[-1].up)
            whole[0].down = copy.deepcopy(whole[-1].down)
            whole[0].down.weight = whole[-1].down.weight
        if dice.random() < 0.3:
            blocks.append(blocks[0])  # one module at two places
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor, route: Sequence[Step]) -> torch.Tensor:
        x = x * self.scale
        for step in route:
            block: Any = self.blocks[step.block]
            if step.event == "return":
                return x
            if step.event == "read":
                x = x * (block.gain if isinstance(block, Block) else self.scale).sin()
            if step.event == "guest" and self.guest:
                x = x + self.guest[0](x, [Step(0), Step(1)])
            if step.event == "write" and isinstance(block, Block):
                block.writes = True
            kept = block if step.event == "keep" and isinstance(block, Block) else None
            if kept is not None:
                kept.keeps = True
            ends = {"raise": RuntimeError, "stop": Stopped}.get(step.event)
            if step.event == "again" and torch.is_grad_enabled():
                x = checkpoint(block, x, ends, use_reentrant=False)
            else:
                x = block(x, ends)
            if kept is not None:
                outlives = kept.outlives.pop()
                x = self.blocks[0](x * outlives.to(x.device)) * outlives.to(x.device)
                del outlives
        return x


# ---------------------------------------------------------------- programs


@dataclass
class Program:
    """Everything that is random, drawn from one seed."""

    seed: int
    dice: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.dice = random.Random(self.seed)
        torch.manual_seed(self.seed)
        self.plain = Maze(self.dice).eval()
        self.homes: list[Any] = self.dice.choice(
            [["cpu"], ["disk"], [0, "cpu"], ["cpu", "disk"], [0, 1, "cpu", "disk"]]
        )
        self.main: Any = self.dice.choice([0, 0, 0, 1, "cpu"])
        self.rings = self.dice.choice([None, 0.0, 1.0, 1.3, 2.0])
        self.poison = self.dice.random() < 0.5
        self.grad = self.dice.random() < 0.3

    def device_map(self) -> dict[str, Any]:
        """A home for everything; for some blocks, or single weights of theirs, another."""
        chosen = {"": self.dice.choice(self.homes)}
        for index in range(len(self.plain.blocks)):
            if self.dice.random() < 0.6:
                chosen[f"blocks.{index}"] = self.dice.choice(self.homes)
        names = [name for name, _ in self.plain.named_parameters()]
        return chosen | {
            name: self.dice.choice(self.homes) for name in self.dice.sample(names, self.dice.choice([0, 0, 2]))
        }

    def dispatched(self, folder: Path) -> Any:
        """The model, as loaded from a checkpoint (packed in pinned memory) or as given (in memory of its own)."""
        device_map, buffers = self.device_map(), self.dice.random() < 0.3
        if self.dice.random() < 0.6 and self.main == 0:
            model = from_disk(self.plain, folder, device_map=device_map, offload_buffers=buffers)
        else:
            model = placed(self.plain, device_map, self.main, offload_buffers=buffers)
        self._resize_rings(model)
        return model

    def _resize_rings(self, model: Any) -> None:
        """Rings of no block, of the largest, of two, or what the plan says."""
        if self.rings is None or not hasattr(model, "_hf_bigload"):
            return
        machine = executor_of(model).machine
        largest = max(_slot_bytes(block) for block in model.blocks)
        machine.ring_bytes = {device: int(largest * self.rings) for device in machine.ring_bytes}

    def route(self, alone: bool = True) -> list[Step]:
        """The blocks of one forward: all or some, in some order, some of them twice; it writes if it runs `alone`."""
        every = list(range(len(self.plain.blocks)))
        kind = self.dice.choice(["in order", "in order", "reversed", "some", "any", "one between the others"])
        if kind == "reversed":
            every.reverse()
        elif kind == "some":
            every = [block for block in every if self.dice.random() < 0.6]
        elif kind == "any":
            every = [self.dice.choice(every) for _ in range(self.dice.randint(1, 9))]
        elif kind == "one between the others":
            shared = self.dice.choice(every)
            every = list(itertools.chain.from_iterable((block, shared) for block in every))
        return [Step(block, self._event(alone)) for block in every]

    def _event(self, alone: bool) -> str:
        events = ["read", "guest", "again", "raise", "stop", "return"] + (
            ["write", "write", "keep", "keep"] if alone else []
        )
        return self.dice.choice(events) if self.dice.random() < 0.2 else ""


def _slot_bytes(module: nn.Module) -> int:
    tensors = [*module.parameters(), *module.buffers()]
    return sum(-(-t.numel() * t.element_size() // 512) * 512 for t in tensors) + 4096


def _write(dice: random.Random) -> Callable[[nn.Module], None]:
    """A change of weights, as somebody may make between two forwards; the same for the plain model and the other."""
    kind = dice.choice(["in place", "data in place", "new data", "new parameter", "state dict", "assigned state dict"])
    chosen, factor = dice.random(), 1 + dice.random()

    def write(model: nn.Module) -> None:
        names = [name for name, _ in model.named_parameters()]
        name = names[int(chosen * len(names))]
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        parameter = dict(module.named_parameters(recurse=False))[leaf]
        if kind == "in place":
            parameter.mul_(factor)
        elif kind == "data in place":
            parameter.data.mul_(factor)
        elif kind == "new data":
            parameter.data = parameter.data * factor
        elif kind == "new parameter":
            setattr(module, leaf, nn.Parameter(parameter.detach() * factor))
        else:
            state = {key: value * factor for key, value in model.state_dict().items()}
            model.load_state_dict(state, assign=kind == "assigned state dict")

    return write


def _ran(model: Any, x: torch.Tensor, route: Sequence[Step]) -> torch.Tensor | str:
    """The output, or how the forward ended instead."""
    try:
        return model(x, route)
    except (RuntimeError, Stopped) as error:
        if "on purpose" not in str(error):
            raise
        return type(error).__name__


def _assert_same(got: Any, expected: Any) -> None:
    if isinstance(expected, str) or isinstance(got, str):
        assert got == expected
    else:
        assert same_bits(got, expected)


@pytest.fixture(autouse=True)
def sim() -> Iterator[ModuleType]:
    with simdev.devices([None, None]) as module:
        module.clear_violations()
        yield module


@contextlib.contextmanager
def running(program: Program, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In order to the end. Half of the programs run without poison: it waits for whatever used a slot before."""
    monkeypatch.setattr(ring, "POISON", program.poison)
    with simdev.asynchronous(), torch.set_grad_enabled(program.grad):
        yield


@contextlib.contextmanager
def on_some_stream(program: Program) -> Iterator[None]:
    """Perhaps with other current streams inside, which come after the ones outside, and before what follows."""
    outside = [torch.accelerator.current_stream(device) for device in ("sim:0", "sim:1")]
    if program.grad or program.dice.random() < 0.6:  # in what order autograd frees what it kept is not ours to say
        yield
        return
    streams = [torch.Stream(device=stream.device) for stream in outside]
    for stream, before in zip(streams, outside, strict=True):
        stream.wait_stream(before)
    with streams[0], streams[1]:
        torch.accelerator.set_device_index(0)
        yield
    for stream, after in zip(streams, outside, strict=True):
        after.wait_stream(stream)


def _input_device(model: Any) -> torch.device:
    """On the device, where nothing makes the host wait; a plain model takes what lies with it."""
    hook = getattr(model, "_hf_hook", None)
    return CPU if hook is None else hook.execution_device


def one_thread(program: Program, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain, dice = program.dispatched(folder / "one"), program.plain, program.dice
    if dice.random() < 0.25:
        guest = Program(program.seed + 1)
        model.guest, plain.guest = [_invited(guest.dispatched(folder / "two"))], [copy.deepcopy(guest.plain)]
    if not hasattr(model, "_hf_bigload"):
        return  # whole on one device: a plain model
    x = torch.randn(3, WIDTH)
    results, expected = [], []
    with running(program, monkeypatch):
        device = _input_device(model)
        theirs = x.to(device).requires_grad_(program.grad)
        mine = x.clone().requires_grad_(program.grad)
        for _ in range(dice.randint(2, 5)):
            route = program.route()
            with on_some_stream(program):
                results.append(_ran(model, theirs, route))
            expected.append(_ran(plain, mine, route))
            if program.grad and dice.random() < 0.7:
                for outcome in (results[-1], expected[-1]):
                    if isinstance(outcome, torch.Tensor):
                        outcome.sum().backward()
            if dice.random() < 0.5:
                write = _write(dice)
                with torch.no_grad():
                    for each in (model, plain):
                        write(each)
                results[-1:], expected[-1:] = [_settled(results[-1])], [_settled(expected[-1])]
    for got, right in zip(results, expected, strict=True):
        _assert_same(got, right)
    assert_model_at_rest(model)
    _assert_same_weights(model, plain)


def _assert_same_weights(model: nn.Module, plain: nn.Module) -> None:
    weights = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        assert same_bits(weights[name], parameter), name
        grad = weights[name].grad
        assert (grad is None) == (parameter.grad is None), name
        if grad is not None:  # of a weight used in several places it is a sum, in whatever order autograd adds it up
            torch.testing.assert_close(grad.cpu(), parameter.grad, msg=name)


def _invited(model: Any) -> Callable[[torch.Tensor, Sequence[Step]], torch.Tensor]:
    """A model that is called wherever its caller computes; one that is on the CPU alone moves no inputs."""
    own = next(model.parameters()).device if not hasattr(model, "_hf_hook") else _input_device(model)
    return lambda x, route: model(x.to(own), route).to(x.device)


def _settled(outcome: Any) -> Any:
    return outcome.detach() if isinstance(outcome, torch.Tensor) else outcome


def several_threads(program: Program, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program.grad = False
    model, plain = program.dispatched(folder), program.plain
    if not hasattr(model, "_hf_bigload"):
        return
    x = torch.randn(3, WIDTH)
    with running(program, monkeypatch):
        device = _input_device(model)
        theirs = x.to(device)
        torch.accelerator.synchronize("sim:0")
        torch.accelerator.synchronize("sim:1")

        def thread(routes: list[list[Step]], streams: tuple[torch.Stream, ...]) -> None:
            with torch.no_grad(), contextlib.ExitStack() as stack:
                for stream in streams:
                    stack.enter_context(stream)
                results = [_ran(model, theirs, route) for route in routes]
                for route, result in zip(routes, results, strict=True):
                    _assert_same(result, _ran(plain, x, route))

        every = [
            [program.route(alone=False) for _ in range(program.dice.randint(2, 4))]
            for _ in range(program.dice.choice([2, 3]))
        ]
        own = [tuple(torch.Stream(device=name) for name in ("sim:0", "sim:1")) for _ in every]
        chosen = [streams if program.dice.random() < 0.7 else () for streams in own]
        together(*(lambda r=routes, s=streams: thread(r, s) for routes, streams in zip(every, chosen, strict=True)))
        assert_model_at_rest(model)
    for name, parameter in plain.named_parameters():
        assert same_bits(dict(model.named_parameters())[name], parameter), name


@pytest.mark.parametrize("seed", [*QUICK, *(pytest.param(seed, marks=pytest.mark.slow) for seed in SLOW)])
def test_a_program(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one_thread(Program(seed), tmp_path, monkeypatch)


@pytest.mark.parametrize("seed", [*QUICK, *(pytest.param(seed, marks=pytest.mark.slow) for seed in SLOW)])
def test_a_program_of_several_threads(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    several_threads(Program(seed), tmp_path, monkeypatch)


@torch.no_grad()
@pytest.mark.parametrize("seed", range(20))
def test_rings_stay_within_the_plan_in_whatever_order_blocks_run(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = Program(seed)
    program.rings, program.homes = None, [["cpu"], ["disk"], ["cpu", "disk"]][seed % 3]
    model = program.dispatched(tmp_path)
    if not hasattr(model, "_hf_bigload"):
        return
    for _ in range(3):
        model(torch.randn(3, WIDTH, device=_input_device(model)), [Step(step.block) for step in program.route()])
    for each in executor_of(model).machine.rings.values():
        parents = 4 * 4096  # their own weights stay while the blocks below come and go
        assert each.peak <= each.limit + parents


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks")
@pytest.mark.parametrize("seed", [*range(12), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(12, 200))])
def test_a_program_forked_between_and_inside_forwards(seed: int, tmp_path: Path) -> None:
    """On the CPU alone: an accelerator does not survive a fork."""
    program = Program(seed)
    program.homes, program.main = ["disk"], "cpu"
    model, x = placed(program.plain, {"": "disk"}, "cpu"), torch.randn(3, WIDTH)
    routes = [[Step(step.block) for step in program.route()] for _ in range(3)]
    inside = program.dice.randrange(len(model.blocks))

    def forked(*_: Any) -> None:
        removed.remove()
        children.append(os.fork())

    children: list[int] = []
    removed = model.blocks[inside].register_forward_hook(forked)
    with torch.no_grad():
        right = all(same_bits(model(x, route), program.plain(x, route)) for route in routes)
        if children == [0]:  # the child, which went on with the forward that it was born in
            os._exit(0 if right else 1)
        assert right
        removed.remove()
    for child in children:
        assert os.waitpid(child, 0)[1] == 0
    assert_model_at_rest(model)


# ---------------------------------------------------------------- one by one


@pytest.fixture
def net() -> Any:
    return seeded(Net, layers=4)


class TestWhatIsAtRest:
    @torch.no_grad()
    def test_may_be_written_as_soon_as_a_forward_has_returned(self, net: Any, tmp_path: Path) -> None:
        """Though the device may not have copied it yet: nobody who writes to a tensor in RAM thinks of streams."""
        x = torch.randn(2, 8)
        model = from_disk(net, tmp_path, device_map={"": "cpu", "norm": 0})
        assert all(p.is_pinned() for p in model.layers.parameters())
        expected, there = net(x), x.to("sim:0")
        with simdev.asynchronous():
            out = model(there)
            for parameter in model.parameters():
                parameter.data.mul_(2)
        assert same_bits(out, expected)

    @torch.no_grad()
    @pytest.mark.parametrize("pinned", [False, True])
    def test_may_be_written_between_blocks_that_are_called_one_by_one(
        self, net: Any, pinned: bool, tmp_path: Path
    ) -> None:
        x = torch.randn(2, 8)
        model = from_disk(net, tmp_path, device_map={"": "cpu", "norm": 0}) if pinned else placed(net, "cpu", 0)
        for layer, plain in zip(model.layers, net.layers, strict=True):
            for each in (layer, plain):
                each.up.weight.data.mul_(3)
            got, x = layer(x.to("sim:0")), plain(x)
            assert same_bits(got, x)

    @torch.no_grad()
    def test_stays_there_also_for_a_buffer_that_streams_from_a_file(self, net: Any, tmp_path: Path) -> None:
        net.layers[1].register_buffer("shift", torch.ones(8))
        model = from_disk(net, tmp_path, device_map={"": "disk", "norm": 0}, offload_buffers=True)
        home = model.layers[1].shift.data_ptr()
        model(torch.randn(2, 8, device="sim:0"))
        assert model.layers[1].shift.data_ptr() == home and model.layers[1].shift.device == CPU
        assert_model_at_rest(model)


class TestStreams:
    @torch.no_grad()
    def test_that_used_a_ring_are_waited_for_before_it_is_freed(self, net: Any) -> None:
        model, x = placed(net, "cpu", 0), torch.randn(2, 8, device="sim:0")
        with simdev.asynchronous():
            torch.accelerator.synchronize("sim:0")
            with torch.Stream(device="sim:0") as first:
                model(x)
            torch.accelerator.current_stream("sim:0").wait_stream(first)
            model(x)
            detach(model)
            gc.collect()

    @torch.no_grad()
    def test_of_whoever_leaves_last_come_after_what_another_thread_wrote(self) -> None:
        executor = Executor(Machine(Reader(), {torch.device("sim:0"): 1 << 16}))
        weight = nn.Parameter(torch.ones(8).pin_memory())
        inside, written = threading.Event(), threading.Event()

        def write() -> None:
            with torch.no_grad(), torch.Stream(device="sim:0"), leased(executor, [weight], "sim:0"):
                assert inside.wait(PATIENCE)
                weight.mul_(5)
            written.set()

        def stay() -> None:
            with torch.no_grad(), torch.Stream(device="sim:0"), leased(executor, [weight], "sim:0"):
                inside.set()
                assert written.wait(PATIENCE)

        with simdev.asynchronous():
            together(write, stay)
        assert (weight == 5).all() and weight.device == CPU

    @torch.no_grad()
    def test_copy_from_staging_before_what_comes_from_a_device_takes_its_place(self) -> None:
        sim0 = torch.device("sim:0")
        machine = Machine(Reader(), {sim0: 1 << 16, CPU: 4096})
        staging, copies = machine.ring(CPU), torch.Stream(device=sim0)
        resting = nn.Parameter(torch.ones(8, device=sim0))
        into = torch.zeros(8, device=sim0)
        copies.wait_stream(torch.accelerator.current_stream(sim0))
        with simdev.asynchronous():
            stage = staging.take(4096)
            staged = stage.view(0, torch.float32, (8,), (1,), 32).fill_(3)
            with copies:
                into.copy_(staged, non_blocking=True)
                stage.used(copies.record_event())
            del staged
            staging.give(stage)
            with leased(Executor(machine), [resting], CPU):
                assert (resting == 1).all() and resting.device == CPU
            copies.synchronize()
        assert (into == 3).all()


# ---------------------------------------------------------------- without each step, something is found


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _forget_events(slot: Any, *_: Any) -> None:
    slot.events = []


def unused_slot(_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slot is taken while somebody still computes with it, given back as it was, and taken again."""
    machine = Machine(Reader(), {torch.device("sim:0"): 4096})
    ours, copies = machine.ring(torch.device("sim:0")), torch.Stream(device="sim:0")
    monkeypatch.setattr(ring, "POISON", False)
    with simdev.asynchronous():
        for use in (True, False, True):
            slot = ours.take(4096)
            assert isinstance(slot, DeviceSlot)
            if use:
                with copies:
                    slot.wait_on(copies)
                    slot.bytes.zero_()
                    slot.filled(copies)
                slot.joined()
                slot.bytes.add_(1)
                slot.left()
            ours.give(slot)


def sending_at_once(_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`with stream:` remembers in the stream which one was current: two threads in one would swap theirs."""
    executor = Executor(Machine(Reader(), {torch.device("sim:0"): 1 << 16}))
    both, one_left, original = threading.Barrier(2), threading.Event(), DeviceSlot.filled

    def filled(slot: DeviceSlot, stream: torch.Stream) -> None:
        if both.wait(PATIENCE) == 1:  # who came in last leaves last: the other way round, each might find its own
            one_left.wait(PATIENCE)
        original(slot, stream)

    monkeypatch.setattr(DeviceSlot, "filled", filled)

    def send() -> None:
        weight, own = nn.Parameter(torch.ones(8).pin_memory()), torch.Stream(device="sim:0")
        with torch.no_grad(), own:
            with leased(executor, [weight], "sim:0"):
                one_left.set()
                assert torch.accelerator.current_stream("sim:0") == own
            assert torch.accelerator.current_stream("sim:0") == own

    together(send, send)


class _Sharing(nn.Module):
    """Layers of which the last two share a weight; the second may write to it."""

    class Writer(Layer):
        writes = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.writes:
                self.up.weight.mul_(2)
            return super().forward(x)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.Writer() for _ in range(3))
        self.layers[2].up.weight = self.layers[1].up.weight

    def forward(self, x: torch.Tensor, upto: int = 3) -> torch.Tensor:
        for layer in self.layers[:upto]:  # type: ignore[attr-defined]
            x = layer(x)
        return x


def _sharing() -> tuple[Any, Any, torch.Tensor]:
    plain = seeded(_Sharing)
    model = placed(plain, "cpu", 0)
    executor_of(model).machine.ring_bytes = {torch.device("sim:0"): 1 << 16}
    return plain, model, torch.randn(2, 8)


@torch.no_grad()
def written_by_the_block_before(_folder: Path, _monkeypatch: pytest.MonkeyPatch) -> None:
    """Both blocks are on their way when the first of them writes to what they share."""
    plain, model, x = _sharing()
    assert same_bits(model(x), plain(x))
    for each in (plain, model):
        each.layers[1].writes = True
    assert same_bits(model(x), plain(x))
    assert same_bits(model(x), plain(x))


@torch.no_grad()
def written_after_an_early_end(_folder: Path, _monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward ends before a block that is on its way, whose weight is then written to."""
    plain, model, x = _sharing()
    assert same_bits(model(x), plain(x))
    for upto in (1, 2, 1, 3):
        assert same_bits(model(x, upto), plain(x, upto))
        for each in (plain, model):
            each.layers[2].down.weight.data.mul_(2)
            each.layers[1].norm.weight.data.mul_(2)


SCENARIOS = (unused_slot, sending_at_once, written_by_the_block_before, written_after_an_early_end)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_scenario(scenario: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scenario(tmp_path, monkeypatch)


Patch = tuple[Any, str, Any]

STEPS: dict[str, Patch] = {
    "whoever computes waits for the copies": (DeviceSlot, "joined", _nothing),
    "copies wait for whoever used the slot": (DeviceSlot, "wait_on", _forget_events),
    "whoever computed says when it ends": (DeviceSlot, "left", _nothing),
    "a slot given back unused passes on what it did not wait for": (Slot, "unused", _nothing),
    "staging says when it is copied": (HostSlot, "used", _nothing),
    "reads wait until staging is copied": (HostSlot, "wait_for_copies", _forget_events),
    "the allocator knows the streams": (DeviceMemory, "shared_with", _nothing),
    "what was sent ahead is dropped when the model is left": (Prefetcher, "come_out", _nothing),
    "the host waits until homes are copied": (Machine, "wait_for_homes", _nothing),
    "a thread's stream is its own": (residency, "_own", lambda stream: stream),
    "a written weight is sent again": (
        Residency,
        "is_current",
        lambda rests, tensor: rests.state[0] == tensor.data_ptr(),
    ),
    "a written mapping is the truth": (residency, "dirty_pages", lambda _tensor: False),
    "what is looked at is not lent again": (DeviceSlot, "is_viewed", lambda _slot: False),
    "what was written in a slot goes home": (Item, "is_written", lambda _item: False),
    "fetches of others are joined": (Fetch, "arrived", lambda fetch: fetch.ready.wait()),
}

LONGEST = 60
"""Programs after which a step counts as not needed."""


@pytest.mark.parametrize("step", STEPS)
def test_without_a_step_a_program_fails(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The programs above would notice: each step of the order is one that they need."""
    monkeypatch.setattr(*STEPS[step])
    programs = [(runs, Program(seed)) for seed in range(LONGEST) for runs in (one_thread, several_threads)]
    tries = [*SCENARIOS, *(functools.partial(runs, program) for runs, program in programs)]
    for number, attempt in enumerate(tries):
        try:
            with monkeypatch.context() as patch:
                attempt(tmp_path / str(number), patch)
        except (AssertionError, RuntimeError):
            return
    pytest.fail(f"{len(tries)} programs ran right without this: {step}")
