"""Leases: who has weights where, for how long, and that all of it ends however a forward ends."""

from __future__ import annotations

import copy
import ctypes
import gc
import os
import pickle
import random
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hf_bigload
from hf_bigload.checkpoint.reader import Reader
from hf_bigload.dispatch import executor
from hf_bigload.dispatch import ring as ring_module
from hf_bigload.dispatch.attach import detach
from hf_bigload.dispatch.executor import Executor, Machine, watch
from hf_bigload.dispatch.ring import HostSlot, Look, Ring
from hf_bigload.errors import CheckpointError, OffloadedWeightError
from tests import simdev

from . import (
    CPU,
    PATIENCE,
    Layer,
    Net,
    Tied,
    assert_at_rest,
    assert_model_at_rest,
    executor_of,
    from_disk,
    leased,
    placed,
    same_bits,
    seeded,
    together,
    values,
)

WHOLE_PAGES = 2 * 4096
"""Bytes that reading whole pages may add to a range of a file."""

DISPATCH_FILES = tuple(
    f"dispatch/{name}.py" for name in ("attach", "executor", "prefetch", "residency", "transfer", "ring")
)


class Gate(nn.Module):
    """Lets a test stop a forward half-way: it says that it is inside, and waits to be let out."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.open = threading.Event(), threading.Event()
        self.open.set()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.inside.set()
        assert self.open.wait(PATIENCE)
        return x

    def __deepcopy__(self, memo: dict[int, Any]) -> Gate:
        return Gate()


class GatedLayer(Layer):
    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.gate = Gate()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.gate(x))


class GatedNet(Net):
    def __init__(self, layers: int = 3, width: int = 8) -> None:
        super().__init__(layers, width)
        self.layers = nn.ModuleList(GatedLayer(width) for _ in range(layers))


@pytest.fixture
def x() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 8)


class TestSlots:
    def test_a_released_slot_is_poisoned(self) -> None:
        """Without this, no test here could notice a use after release."""
        assert ring_module.POISON
        ring = Ring(CPU, 4096)
        slot = ring.take(4096)
        slot.view(0, torch.float32, (4,), (1,), 16).zero_()
        ring.give(slot)
        assert slot.view(0, torch.float32, (4,), (1,), 16).isnan().all()

    def test_a_slot_that_is_still_looked_at_is_not_lent_again(self) -> None:
        ring = Ring(CPU, 4096)
        slot = ring.take(4096)
        seen = slot.view(0, torch.float32, (4,), (1,), 16).fill_(7)[1:].view(3, 1)
        ring.give(slot)
        assert ring.take(4096) is not slot
        assert (seen == 7).all()

    def test_a_slot_on_a_device_that_is_still_looked_at_is_not_lent_again(self) -> None:
        with simdev.devices([None]):
            ring = Ring(torch.device("sim:0"), 4096)
            slot = ring.take(4096)
            seen = slot.views(ring, [Look(512, torch.float32, (4,), (1,), 16)])[0].fill_(7)[1:]
            ring.give(slot)
            assert ring.take(4096) is not slot
            assert (seen.cpu() == 7).all()

    def test_the_first_slot_is_the_whole_ring_and_is_used_again(self) -> None:
        ring = Ring(CPU, 1 << 20)
        for nbytes in (4096, 1 << 20, 100_000, 8192):
            ring.give(ring.take(nbytes))
        assert ring.peak == ring.held == 1 << 20

    def test_a_lasting_slot_leaves_the_ring_to_the_others(self) -> None:
        ring = Ring(CPU, 1 << 20)
        for _ in range(3):
            outer = ring.take(4096, lasting=True)
            ring.give(ring.take((1 << 20) - 4096))
            ring.give(outer)
        assert ring.peak == (1 << 20) + 4096 and ring.held == 1 << 20

    def test_giving_twice_does_not_lend_twice(self) -> None:
        ring = Ring(CPU, 0)
        slot = ring.take(4096)
        ring.give(slot)
        ring.give(slot)
        assert ring.take(4096) is not ring.take(4096)

    def test_slots_of_a_second_thread_are_given_back_to_the_system(self) -> None:
        ring = Ring(CPU, 8192)
        slots = [ring.take(8192) for _ in range(4)]
        for slot in slots:
            ring.give(slot)
        assert ring.peak == 4 * 8192 and ring.held == 8192

    def test_too_little_room_on_the_device_is_told_with_its_figures(self) -> None:
        with (
            simdev.devices([10_000]),
            pytest.raises(torch.OutOfMemoryError, match=r"sim:0 .* need 20\.00 KiB, and 9\.\d+ KiB of 9\.\d+ KiB"),
        ):
            Ring(torch.device("sim:0"), 0).take(20_000)

    def test_a_slot_covers_its_bytes_only(self) -> None:
        ring = Ring(CPU, 8192)
        slot, other = ring.take(4096), ring.take(4096)
        assert slot.covers(slot.view(64, torch.float32, (2,), (1,), 8)[1:])
        assert not slot.covers(other.view(0, torch.float32, (2,), (1,), 8))
        assert slot.covers(slot.view(64, torch.float32, (2,), (1,), 8)[1:])
        assert (
            not slot.covers(torch.ones(2))
            and not slot.covers(torch.empty(0))
            and not slot.covers(torch.ones(2).to_sparse())
        )


class TestALeaseEnds:
    """However a forward ends, weights go home, slots go back, and the next forward is right."""

    @pytest.fixture(params=[Exception, KeyboardInterrupt, SystemExit])
    def error(self, request: pytest.FixtureRequest) -> type[BaseException]:
        return request.param

    def assert_recovers(self, model: Any, plain: nn.Module, x: torch.Tensor) -> None:
        assert_model_at_rest(model)
        assert same_bits(model(x), plain(x))
        assert_model_at_rest(model)

    @torch.no_grad()
    def test_when_the_forward_raises(self, x: torch.Tensor, error: type[BaseException]) -> None:
        plain = seeded(Net)
        model = placed(plain, "disk")
        removed = model.layers[1].up.register_forward_hook(_raising(error))
        with pytest.raises(error):
            model(x)
        removed.remove()
        self.assert_recovers(model, plain, x)

    @torch.no_grad()
    @pytest.mark.parametrize(
        ("owner", "step"),
        [(Reader, "read"), (Ring, "_place"), (HostSlot, "view"), (executor, "Fetch"), (executor.Item, "appear")],
        ids=lambda each: getattr(each, "__name__", each),
    )
    def test_when_the_weights_cannot_come(
        self, x: torch.Tensor, error: type[BaseException], owner: Any, step: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plain = seeded(Net)
        model = placed(plain, "disk")
        for block in range(6):
            with monkeypatch.context() as patch, pytest.raises(error):
                _raise_after(patch, owner, step, block, error)
                model(x)
            self.assert_recovers(model, plain, x)

    @torch.no_grad()
    @pytest.mark.parametrize(
        ("owner", "step"),
        [(Executor, "_send_home"), (Executor, "_unplace"), (Ring, "give"), (HostSlot, "left")],
        ids=lambda each: getattr(each, "__name__", each),
    )
    def test_when_an_interrupt_hits_the_release_itself(
        self, x: torch.Tensor, owner: Any, step: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plain = seeded(Net)
        model = placed(plain, "disk")
        for block in range(6):
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                _raise_after(patch, owner, step, block, KeyboardInterrupt)
                model(x)
            self.assert_recovers(model, plain, x)

    @pytest.mark.parametrize(("home", "target", "grad"), [("disk", "cpu", False), ("cpu", 0, False), ("cpu", 0, True)])
    def test_when_it_is_interrupted_anywhere(self, x: torch.Tensor, home: str, target: Any, grad: bool) -> None:
        plain = seeded(Net, layers=1)
        with simdev.devices([None]), torch.set_grad_enabled(grad):
            model = placed(plain, home, main_device=target)
            moment = 0
            while _interrupted(lambda: model(x), moment):
                self.assert_recovers(model, plain, x)
                moment += 29
            assert moment > 500

    @torch.no_grad()
    def test_when_one_weight_of_a_block_was_never_loaded(self, x: torch.Tensor) -> None:
        plain = seeded(Net)
        model = placed(plain, "disk")
        real = model.layers[1].down.weight
        model.layers[1].down.weight = nn.Parameter(torch.empty(8, 16, device="meta"))
        for _ in range(2):
            with pytest.raises(
                OffloadedWeightError, match=r"'layers\.1\.down\.weight' of shape \(8, 16\) is on the meta"
            ):
                model(x)
        model.layers[1].down.weight = real
        self.assert_recovers(model, plain, x)

    @torch.no_grad()
    def test_when_the_device_is_full(self, x: torch.Tensor) -> None:
        plain = seeded(Net, width=64)
        with simdev.devices([20_000]) as sim:
            model = placed(plain, "cpu", main_device=0)
            x = torch.randn(2, 64)
            with pytest.raises(torch.OutOfMemoryError, match="sim:0 has no room"):
                model(x)
            assert_model_at_rest(model)
            sim.set_capacity(0, None)
            self.assert_recovers(model, plain, x)

    @torch.no_grad()
    def test_a_slot_that_an_interrupted_read_still_writes_into_is_nobody_elses(
        self, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Interrupted(Future[int]):
            def result(self, timeout: float | None = None) -> int:
                raise KeyboardInterrupt

        plain = seeded(Net)
        model = placed(plain, "disk")
        buffers = []
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(
                Reader, "read", lambda _reader, _extents, buffer, _before: buffers.append(buffer) or Interrupted()
            )
            model(x)
        ring = executor_of(model).machine.ring(CPU)
        address = ctypes.addressof(ctypes.c_char.from_buffer(buffers[0]))
        taken = [(m.address + start, m.address + end) for m in ring._alive for start, end in m.taken.items()]
        assert len(buffers) == 1 and any(start <= address < end for start, end in taken)
        self.assert_recovers(model, plain, x)


def _raising(error: type[BaseException]) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        raise error("on purpose")

    return hook


def _interrupted(action: Callable[[], Any], moment: int) -> bool:
    """Run `action`, interrupted at one of the moments where Python lets signals in while the dispatch is at work.

    False if it ended before that moment came.
    """
    left = [moment]

    def watch(frame: Any, event: str, _argument: Any) -> None:
        if event in ("call", "c_return") and frame.f_code.co_filename.endswith(DISPATCH_FILES):
            left[0] -= 1
            if left[0] == -1:
                raise KeyboardInterrupt

    try:
        sys.setprofile(watch)
        action()
    except KeyboardInterrupt:
        return True
    finally:
        sys.setprofile(None)
    return left[0] < 0


def _raise_after(patch: pytest.MonkeyPatch, owner: Any, name: str, calls: int, error: type[BaseException]) -> None:
    """Let a function work so many times, then raise once."""
    original, left = getattr(owner, name), [calls]

    def maybe(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] == -1:
            raise error("on purpose")
        return original(*args, **kwargs)

    patch.setattr(owner, name, maybe)


class TestThreads:
    @torch.no_grad()
    @pytest.mark.parametrize("home", ["disk", "cpu"])
    def test_whoever_leaves_first_takes_nothing_from_the_other(self, home: str, x: torch.Tensor) -> None:
        plain = seeded(GatedNet)
        with simdev.devices([None]):
            model = placed(plain, home, main_device="cpu" if home == "disk" else 0)
            gate = model.layers[1].gate
            gate.open.clear()

            def second() -> torch.Tensor:
                assert gate.inside.wait(PATIENCE)
                gate.inside.clear()
                threading.Timer(0.05, gate.open.set).start()  # both are inside by then, or the second comes later
                return model(2 * x)

            one, other = together(lambda: model(x), second)
            assert same_bits(one, plain(x)) and same_bits(other, plain(2 * x))
            assert_model_at_rest(model)

    @torch.no_grad()
    def test_weights_stay_while_anybody_is_inside(self, x: torch.Tensor) -> None:
        executor, weight = _streaming(torch.ones(4))
        with simdev.devices([None]):
            with leased(executor, [weight], "sim:0"):
                together(lambda: _enter_and_leave(executor, [weight], "sim:0"))
                assert weight.device == torch.device("sim:0") and (weight.cpu() == 1).all()
            assert_at_rest(executor, weight)

    @torch.no_grad()
    @pytest.mark.parametrize("home", ["disk", "cpu"])
    def test_many_threads_run_one_model(self, home: str, x: torch.Tensor) -> None:
        plain = seeded(Net, layers=4)
        inputs = [torch.randn(2, 8) for _ in range(4)]
        with simdev.devices([None]):
            model = placed(plain, home, main_device="cpu" if home == "disk" else 0)
            runs = [lambda i=i: [model(i) for _ in range(10)] for i in inputs]  # type: ignore[misc]
            for given, results in zip(inputs, together(*runs), strict=True):
                assert all(same_bits(result, plain(given)) for result in results)
            assert_model_at_rest(model)

    def test_a_thread_whose_read_fails_does_not_fail_the_one_that_waits_for_it(
        self, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        executor, weight = _streaming(torch.ones(4))
        started, fail = threading.Event(), threading.Event()
        original, calls = Executor._bring, []

        def fill(self: Executor, *args: Any) -> None:
            calls.append(threading.get_ident())
            if len(calls) == 1:
                started.set()
                assert fail.wait(PATIENCE)
                raise KeyboardInterrupt
            original(self, *args)

        def first() -> None:
            with pytest.raises(KeyboardInterrupt):
                _enter_and_leave(executor, [weight], "sim:0")

        def second() -> torch.Tensor:
            assert started.wait(PATIENCE)
            threading.Timer(0.05, fail.set).start()
            with torch.no_grad(), leased(executor, [weight], "sim:0"):
                assert weight.device.type == "sim"
                return weight.cpu()

        monkeypatch.setattr(Executor, "_bring", fill)
        with simdev.devices([None]):
            _, seen = together(first, second)
        assert (seen == 1).all() and len(set(calls)) == 2
        assert_at_rest(executor, weight)

    def test_a_thread_interrupted_while_it_waits_for_another_lets_go(self, monkeypatch: pytest.MonkeyPatch) -> None:
        executor, weight = _streaming(torch.ones(4))
        waiting = threading.Event()

        def interrupted(self: Any) -> bool:
            waiting.set()
            raise KeyboardInterrupt

        with simdev.devices([None]):
            with torch.no_grad(), leased(executor, [weight], "sim:0"):
                monkeypatch.setattr("hf_bigload.dispatch.executor.Fetch.arrived", interrupted)
                with pytest.raises(KeyboardInterrupt):
                    together(lambda: _enter_and_leave(executor, [weight], "sim:0"))
                assert weight.device.type == "sim"
            assert_at_rest(executor, weight)

    @torch.no_grad()
    def test_a_weight_on_two_devices_at_once_is_right_on_both(self) -> None:
        """Neither waits for the other: the one that comes later has a copy of its own."""
        executor, weight = _streaming(torch.arange(4.0))
        owner = _owner_of(executor, weight)
        with simdev.devices([None, None]):
            with leased(executor, [weight], "sim:0"):

                def elsewhere() -> torch.Tensor:
                    with leased(executor, [weight], "sim:1"):
                        assert owner.weight.device == torch.device("sim:1")
                        return owner.weight.cpu()

                def at_home() -> torch.Tensor:
                    with leased(executor, [weight], "cpu"):
                        assert owner.weight.device == CPU
                        return owner.weight.clone()

                for seen in together(elsewhere, at_home):
                    assert torch.equal(seen, torch.arange(4.0))
                assert owner.weight.device == torch.device("sim:0")
            assert_at_rest(executor, weight)

    @torch.no_grad()
    def test_what_is_written_to_such_a_copy_is_kept(self) -> None:
        executor, weight = _streaming(torch.zeros(4))
        owner = _owner_of(executor, weight)
        with simdev.devices([None, None]), leased(executor, [weight], "sim:0"):

            def elsewhere() -> None:
                with torch.no_grad(), leased(executor, [weight], "sim:1"):
                    owner.weight.add_(1)

            together(elsewhere)
        assert (weight == 1).all()

    def test_two_threads_that_each_have_what_the_other_wants_both_go_on(self) -> None:
        executor, one = _streaming(torch.zeros(4))
        _, other = _streaming(torch.ones(4))
        owners = [_owner_of(executor, one), _owner_of(executor, other)]
        both = threading.Barrier(2)

        def run(first: int, device: str) -> list[torch.Tensor]:
            with torch.no_grad(), leased(executor, [(one, other)[first]], device):
                both.wait(PATIENCE)
                with leased(executor, [one, other], device):
                    both.wait(PATIENCE)
                    return [owner.weight.cpu() for owner in owners]

        with simdev.devices([None, None]):
            for seen in together(lambda: run(0, "sim:0"), lambda: run(1, "sim:1")):
                assert (seen[0] == 0).all() and (seen[1] == 1).all()
            assert_at_rest(executor, one, other)

    def test_a_weight_that_gets_a_gradient_waits_until_it_is_home(self) -> None:
        """Its gradient belongs where it rests, so it has to be there when the graph is made."""
        executor, weight = _streaming(torch.ones(4), trainable=True)
        owner = _owner_of(executor, weight)
        inside, leave, trained = (threading.Event() for _ in range(3))

        def infer() -> bool:
            with torch.no_grad(), leased(executor, [weight], "sim:0"):
                inside.set()
                assert leave.wait(PATIENCE)
                return trained.is_set()

        def train() -> None:
            assert inside.wait(PATIENCE)
            threading.Timer(0.05, leave.set).start()
            with leased(executor, [weight], "sim:1"):
                (3 * owner.weight).sum().backward()
            trained.set()

        with simdev.devices([None, None]):
            trained_before_it_was_home, _ = together(infer, train)
            assert not trained_before_it_was_home
            assert weight.grad is not None and weight.grad.device == CPU and (weight.grad == 3).all()

    def test_nobody_waits_who_could_be_waited_for(self) -> None:
        """Two threads that infer and, inside of that, train on what the other has: one of them is refused."""
        weights = [_streaming(torch.ones(4), trainable=True)[1] for _ in range(2)]
        executor = Executor(Machine(Reader(), {}), watching=True)
        both = threading.Barrier(2)

        def run(mine: int, device: str) -> bool:
            with torch.no_grad(), leased(executor, [weights[mine]], device):
                both.wait(PATIENCE)
                try:
                    with torch.enable_grad(), leased(executor, [weights[1 - mine]], device):
                        return True
                except OffloadedWeightError as error:
                    assert "separate copies" in str(error)
                    return False

        with simdev.devices([None, None]):
            assert not all(together(lambda: run(0, "sim:0"), lambda: run(1, "sim:1")))
            assert_at_rest(executor, *weights)

    @pytest.mark.parametrize("home", ["cpu", "sim:1"])
    def test_streams_of_different_threads_wait_for_each_other(self, home: str) -> None:
        both, left = threading.Barrier(2), threading.Event()
        with simdev.devices([None, None]):
            executor, weight = _streaming(torch.ones(1000).to(home))

            def bring() -> float:
                with torch.no_grad(), torch.Stream(device="sim:0"), leased(executor, [weight], "sim:0"):
                    both.wait(PATIENCE)
                    assert left.wait(PATIENCE)
                    return weight.sum().item()

            def join() -> float:
                both.wait(PATIENCE)
                with torch.no_grad(), torch.Stream(device="sim:0"):
                    with leased(executor, [weight], "sim:0"):
                        total = weight.sum()
                    left.set()
                    return total.item()

            with simdev.asynchronous():
                for _ in range(3):
                    left.clear()
                    assert together(bring, join) == [1000.0] * 2


def _streaming(value: torch.Tensor, trainable: bool = False) -> tuple[Executor, nn.Parameter]:
    """A weight in RAM, and an executor that brings it where it is wanted."""
    return Executor(Machine(Reader(), {}), watching=True), nn.Parameter(value, requires_grad=trainable)


def _owner_of(executor: Executor, weight: nn.Parameter) -> nn.Module:
    owner = nn.Module()
    owner.weight = weight
    watch(owner, executor, CPU)
    return owner


def _enter_and_leave(executor: Executor, weights: list[torch.Tensor], device: str) -> None:
    with torch.no_grad(), leased(executor, weights, device):
        pass


@dataclass
class Program:
    """What one thread does: random leases inside each other, over random devices, some of which fail."""

    executor: Executor
    owners: Sequence[nn.Module]
    rng: random.Random
    refused: int = 0

    def run(self) -> None:
        for _ in range(25):
            try:
                with torch.set_grad_enabled(self.rng.random() < 0.4):
                    self._inside(depth=self.rng.randint(1, 3))
            except ZeroDivisionError:
                pass
            except OffloadedWeightError:
                self.refused += 1

    def _inside(self, depth: int) -> None:
        chosen = self.rng.sample(range(len(self.owners)), self.rng.randint(1, 4))
        weights = [dict.__getitem__(self.owners[i]._parameters, "weight") for i in chosen]
        with leased(self.executor, weights, self.rng.choice(("cpu", "sim:0", "sim:1"))) as scope:
            for i in chosen:
                self._check(i, scope.device)
            if self.rng.random() < 0.1:
                raise ZeroDivisionError
            if depth > 1:
                self._inside(depth - 1)
            self._check(self.rng.randrange(len(self.owners)), scope.device)  # perhaps nobody's here: it is borrowed

    def _check(self, i: int, device: torch.device) -> None:
        seen = self.owners[i].weight
        assert seen.device == device
        assert torch.equal(seen.detach().cpu(), torch.full((17,), float(i)))


@pytest.mark.parametrize("seed", range(12))
def test_random_programs_on_many_threads_end_and_see_right_weights(seed: int) -> None:
    rng = random.Random(seed)
    executor = Executor(Machine(Reader(), {}), watching=True)
    with simdev.devices([None, None]):
        homes = ("cpu", "cpu", "sim:0", "sim:1")
        weights = [
            nn.Parameter(torch.full((17,), float(i), device=homes[i % 4]), requires_grad=i % 3 == 0) for i in range(8)
        ]
        owners = [_owner_of(executor, weight) for weight in weights]
        programs = [Program(executor, owners, random.Random(rng.random())) for _ in range(4)]
        together(*(program.run for program in programs))
        assert_at_rest(executor, *weights)
        assert [w.device for w in weights] == [torch.device(homes[i % 4]) for i in range(8)]


class Aliasing(nn.Module):
    """A block that gives out its own weights, in every shape."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 8)
        self.kind = kind
        self.seen: Any = None

    def forward(self, x: torch.Tensor) -> Any:
        weight = self.lin.weight
        if self.kind == "stashed":
            self.seen = weight[2:].detach()
            return self.lin(x)
        given = {"itself": weight, "a view": weight[1:, ::2], "expanded": self.lin.bias.expand(3, 8)}
        if self.kind in given:
            return given[self.kind]
        nested = {"in a tuple": (x, weight), "in a dict": {"a": [weight.t()]}, "in an object": _Box(weight[0])}
        return nested[self.kind]


class _Box:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


class Pair(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Aliasing(kind) for _ in range(3))

    def forward(self, x: torch.Tensor) -> list[Any]:
        return [layer(x) for layer in self.layers]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["itself", "a view", "expanded", "in a tuple", "in a dict", "in an object", "stashed"])
@pytest.mark.parametrize("target", ["cpu", 0])
def test_what_outlives_a_block_keeps_its_values(kind: str, target: Any, x: torch.Tensor) -> None:
    """The slots of earlier blocks are poisoned and hold later ones by the time this is looked at."""
    plain = seeded(Pair, kind)
    with simdev.devices([None]):
        model = placed(plain, "disk", main_device=target)
        for _ in range(2):
            expected, got = plain(x), model(x)
            assert list(_tensors_in(expected)) and all(
                same_bits(one, other) for one, other in zip(_tensors_in(expected), _tensors_in(got), strict=True)
            )
            if kind == "stashed":
                assert all(same_bits(p.seen, m.seen) for p, m in zip(plain.layers, model.layers, strict=True))
        assert_model_at_rest(model)


def _tensors_in(data: Any) -> Iterator[torch.Tensor]:
    if isinstance(data, torch.Tensor):
        yield data
    elif isinstance(data, _Box):
        yield data.tensor
    elif isinstance(data, list | tuple | dict):
        for value in data.values() if isinstance(data, dict) else data:
            yield from _tensors_in(value)


class TestTheRing:
    @torch.no_grad()
    def test_stays_within_the_plan(self, tmp_path: Path) -> None:
        plain = seeded(Net, layers=6, width=64)
        x = torch.randn(2, 64)
        model = from_disk(plain, tmp_path)
        for _ in range(3):
            assert same_bits(model(x), plain(x))
        ring = executor_of(model).machine.ring(CPU)
        assert ring.held == ring.peak <= hf_bigload.inspect(model).plan.ring["cpu"] + (2 * 6 + 1) * WHOLE_PAGES

    @torch.no_grad()
    def test_on_a_device_stays_within_the_plan(self) -> None:
        plain = seeded(Net, layers=6, width=64)
        x = torch.randn(2, 64)
        with simdev.devices([None]):
            model = placed(plain, "cpu", main_device=0)
            for _ in range(3):
                assert same_bits(model(x), plain(x))
            ring = executor_of(model).machine.ring(torch.device("sim:0"))
            assert ring.peak <= hf_bigload.inspect(model).plan.ring["sim:0"] + 2 * 6 * 512

    @torch.no_grad()
    def test_a_parent_with_a_weight_of_its_own_costs_that_weight_more(self, tmp_path: Path) -> None:
        class Scaled(Net):
            def __init__(self) -> None:
                super().__init__(layers=3, width=64)
                self.scale = nn.Parameter(torch.randn(64))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return super().forward(x * self.scale) * self.scale.sum()

        plain, x = seeded(Scaled), torch.randn(2, 64)
        model = from_disk(plain, tmp_path)
        for _ in range(3):
            assert same_bits(model(x), plain(x))
        ring = executor_of(model).machine.ring(CPU)
        assert ring.peak <= hf_bigload.inspect(model).plan.ring["cpu"] + (2 * 6 + 1) * WHOLE_PAGES

    @torch.no_grad()
    def test_is_given_back_when_the_model_is_detached(self, x: torch.Tensor) -> None:
        model = placed(seeded(Net), "disk")
        model(x)
        executor = executor_of(model)
        detach(model)
        assert all(ring.held == 0 for ring in executor.machine.rings.values())


class TestBlocksInBlocks:
    @torch.no_grad()
    def test_a_block_that_calls_itself(self, x: torch.Tensor) -> None:
        class Recursive(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.lin = nn.Linear(8, 8)

            def forward(self, x: torch.Tensor, depth: int = 3) -> torch.Tensor:
                return self.lin(self(x, depth - 1) if depth else x)

        class Holder(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layers = nn.ModuleList(Recursive() for _ in range(2))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.layers[1](self.layers[0](x))

        plain = seeded(Holder)
        model = placed(plain, "disk")
        assert same_bits(model(x), plain(x))
        assert_model_at_rest(model)

    @torch.no_grad()
    @pytest.mark.parametrize("home", ["disk", "cpu"])
    def test_one_module_at_two_places(self, home: str, x: torch.Tensor) -> None:
        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layers = nn.ModuleList([Layer(), Layer()])
                self.again = self.layers[0]

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                for layer in (*self.layers, self.again):
                    x = layer(x)
                return x

        plain = seeded(Twice)
        with simdev.devices([None]):
            model = placed(plain, home, main_device="cpu" if home == "disk" else 0)
            assert same_bits(model(x), plain(x))
            assert executor_of(model).machine.stats.fetches == 3  # hooked once, not once for each name
            assert_model_at_rest(model)

    @torch.no_grad()
    def test_a_forward_that_was_replaced_after_the_dispatch_computes_with_what_rests(self, x: torch.Tensor) -> None:
        plain = seeded(Net)
        model = placed(plain, "disk")
        for net in (plain, model):
            net.layers[1].forward = lambda x, layer=net.layers[1]: layer.down(torch.relu(layer.up(x)))
        assert same_bits(model(x), plain(x))

    @torch.no_grad()
    def test_blocks_and_their_parts_can_be_called_on_their_own(self, x: torch.Tensor) -> None:
        plain = seeded(Net)
        model = placed(plain, "disk")
        assert same_bits(model.layers[2](x), plain.layers[2](x))
        assert same_bits(model.layers[2].up(x), plain.layers[2].up(x))


class TestStateDicts:
    @pytest.mark.parametrize(
        "which", [lambda m: m, lambda m: m.layers, lambda m: m.layers[1]], ids=["model", "list", "block"]
    )
    @pytest.mark.parametrize("home", ["disk", "cpu"])
    def test_from_another_thread_gives_what_rests(self, which: Any, home: str, x: torch.Tensor) -> None:
        plain = seeded(GatedNet)
        with simdev.devices([None]):
            model = placed(plain, home, main_device="cpu" if home == "disk" else 0)
            gate = model.layers[1].gate
            gate.open.clear()

            def look() -> dict[str, torch.Tensor]:
                assert gate.inside.wait(PATIENCE)
                try:
                    return which(model).state_dict()
                finally:
                    gate.open.set()

            with torch.no_grad():
                _, seen = together(lambda: model(x), look)
                model(x)  # the slot holds other weights by now
            expected = which(plain).state_dict()
            assert seen.keys() == expected.keys()
            assert all(tensor.device == CPU and same_bits(tensor, expected[name]) for name, tensor in seen.items())

    def test_of_a_model_with_offloaded_buffers(self, x: torch.Tensor) -> None:
        class Buffered(GatedLayer):
            def __init__(self, width: int = 8) -> None:
                super().__init__(width)
                self.register_buffer("shift", torch.randn(width))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return super().forward(x) + self.shift

        plain = seeded(GatedNet)
        plain.layers = seeded(nn.ModuleList, [Buffered() for _ in range(3)])
        with simdev.devices([None]):
            model = placed(plain, "cpu", main_device=0, offload_buffers=True)
            assert model.layers[1].shift.device == CPU
            gate = model.layers[1].gate
            gate.open.clear()

            def look() -> dict[str, torch.Tensor]:
                assert gate.inside.wait(PATIENCE)
                try:
                    return model.state_dict()
                finally:
                    gate.open.set()

            with torch.no_grad():
                out, seen = together(lambda: model(x), look)
                assert same_bits(out, plain(x))
            assert all(same_bits(tensor, plain.state_dict()[name]) for name, tensor in seen.items())
            assert all(tensor.device == CPU for tensor in seen.values())

    def test_has_the_very_weights_and_no_leftover_after_detach(self, x: torch.Tensor) -> None:
        model = placed(seeded(Net), "disk")
        homes = {name: p.data_ptr() for name, p in model.named_parameters()}
        with torch.no_grad():
            model(x)
        assert {name: t.data_ptr() for name, t in model.state_dict().items()} == homes
        detach(model)
        assert all(not module._state_dict_hooks for module in model.modules())

    @torch.no_grad()
    def test_loading_one_is_seen_by_the_next_forward(self, x: torch.Tensor) -> None:
        plain, other = seeded(Net), seeded(Net, seed=5)
        model = placed(plain, "disk")
        model(x)
        model.load_state_dict(other.state_dict())
        assert same_bits(model(x), other(x))
        model.load_state_dict(values(plain.state_dict()), assign=True)
        assert same_bits(model(x), plain(x))


class TestWritesInsideAForward:
    class Counting(nn.Module):
        """A block that writes to its own weights, under `no_grad`."""

        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                self.lin.weight.add_(1)
            return self.lin(x)

    @torch.no_grad()
    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    @pytest.mark.parametrize(("home", "target"), [("disk", "cpu"), ("disk", 0), ("cpu", 0)])
    def test_are_kept(self, mode: Any, home: str, target: Any, x: torch.Tensor) -> None:
        plain = seeded(nn.Sequential, self.Counting(), self.Counting())
        with simdev.devices([None]):
            model = placed(plain, home, main_device=target)
            for _ in range(3):
                with mode():
                    assert same_bits(model(x), plain(x))
            for name, tensor in model.state_dict().items():
                assert same_bits(tensor, plain.state_dict()[name])

    def test_of_running_statistics_are_kept(self) -> None:
        plain = seeded(nn.Sequential, *(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)) for _ in range(2)))
        with simdev.devices([None]):
            model = placed(plain, "cpu", main_device=0, offload_buffers=True)
            for net in (plain, model):
                net.train()
                with torch.no_grad():
                    torch.manual_seed(3)
                    for _ in range(3):
                        net(torch.randn(4, 8))
            assert values(plain.state_dict()).keys() == values(model.state_dict()).keys()
            for name, tensor in model.state_dict().items():
                assert same_bits(tensor, plain.state_dict()[name]), name


class TestCopies:
    @torch.no_grad()
    @pytest.mark.parametrize(("home", "target"), [("disk", "cpu"), ("cpu", 0)])
    def test_a_deep_copy_runs_and_shares_nothing(self, home: str, target: Any, x: torch.Tensor) -> None:
        plain = seeded(Tied)
        tokens = torch.arange(6)[None]
        with simdev.devices([None]):
            model = placed(plain, home, main_device=target)
            model(tokens)
            other = copy.deepcopy(model)
            assert executor_of(other) is not executor_of(model)
            other.layers[0].up.weight.zero_()
            assert same_bits(model(tokens), plain(tokens))
            assert not same_bits(other(tokens), plain(tokens))
            assert other.head.weight is other.embed.weight
            detach(model)
            assert torch.isfinite(other(tokens)).all()

    @torch.no_grad()
    def test_a_deep_copy_too_hands_out_weights_that_others_read(self) -> None:
        class Reading(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layers = nn.ModuleList(Layer() for _ in range(2))
                self.never = nn.ParameterList([torch.randn(8, 8)])

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.layers[1](self.layers[0](x) @ self.never[0])

        plain, x = seeded(Reading), torch.randn(2, 8)
        with simdev.devices([None]):
            model = placed(plain, "cpu", main_device=0)
            for net in (model, copy.deepcopy(model)):
                assert same_bits(net(x), plain(x))

    @torch.no_grad()
    @pytest.mark.parametrize(("home", "target"), [("disk", "cpu"), ("cpu", 0)])
    def test_a_pickled_model_comes_back_as_a_plain_one(self, home: str, target: Any, x: torch.Tensor) -> None:
        plain = seeded(Net)
        with simdev.devices([None]):
            model = placed(plain, home, main_device=target)
            model(x)
            again = pickle.loads(pickle.dumps(model))
            assert same_bits(again(x), plain(x))
            assert all(type(module._parameters) is dict for module in again.modules())
            assert same_bits(again.to("sim:0")(x.to("sim:0")), plain(x))

    @torch.no_grad()
    def test_a_shallow_copy_is_the_same_model(self, x: torch.Tensor) -> None:
        plain = seeded(Net)
        model = placed(plain, "disk")
        other = copy.copy(model)
        assert same_bits(other(x), plain(x)) and other.first.weight is model.first.weight


class TestAModelThatIsGone:
    @pytest.mark.parametrize("target", ["cpu", 0])
    @pytest.mark.parametrize("how", ["after a forward", "after an error", "after backward"])
    def test_frees_its_memory_threads_and_files(self, target: Any, how: str, x: torch.Tensor, tmp_path: Path) -> None:
        threads: list[threading.Thread] = []

        def use() -> list[weakref.ref[Any]]:
            model = from_disk(seeded(Net), tmp_path, device_map={"": "disk", "last": target})
            if how == "after an error":
                with pytest.raises(RuntimeError):
                    model(torch.randn(2, 5))
            out = model(x)
            if how == "after backward":
                out.sum().backward()
            machine = executor_of(model).machine
            threads.extend(machine.reader._pool.threads)
            executor_of(model).prefetcher.close()  # a read under way ends in its own time
            memories = [memory for ring in machine.rings.values() for memory in ring._alive]
            return [weakref.ref(thing) for thing in (model, executor_of(model), *memories, *model.parameters())]

        with simdev.devices([None]) as sim:
            before = sim.memory_allocated(0)
            gone = use()
            gc.collect()
            assert [ref() for ref in gone] == [None] * len(gone)
            for thread in threads:
                thread.join(PATIENCE)
            assert threads and not any(thread.is_alive() for thread in threads)
            assert sim.memory_allocated(0) == before
            assert not _open_or_mapped(tmp_path)

    def test_keeps_no_converted_copies(self, x: torch.Tensor, tmp_path: Path) -> None:
        model = from_disk(seeded(Net), tmp_path / "checkpoint", dtype=torch.bfloat16, offload_folder=tmp_path / "spill")
        model(x.bfloat16())
        assert _open_or_mapped(tmp_path / "spill")
        del model
        gc.collect()
        until = time.monotonic() + PATIENCE
        while _open_or_mapped(tmp_path / "spill") and time.monotonic() < until:
            time.sleep(0.01)  # the reader's threads end, and let go of the file, on their own
        assert not _open_or_mapped(tmp_path / "spill") and not list((tmp_path / "spill").iterdir())


def _open_or_mapped(folder: Path) -> list[str]:
    """The files below `folder` that this process has open or in its memory."""
    handles = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    names = [os.readlink(handle) for handle in handles if os.path.islink(handle)]
    return [name for name in (*names, *Path("/proc/self/maps").read_text().splitlines()) if str(folder) in name]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
class TestForks:
    @torch.no_grad()
    def test_a_child_computes_the_same(self, x: torch.Tensor) -> None:
        plain = seeded(Net)
        model = placed(plain, "disk")
        expected = model(x)
        assert _in_child(lambda: same_bits(model(x), expected))
        assert same_bits(model(x), expected)

    @torch.no_grad()
    def test_a_child_that_is_forked_while_another_thread_is_inside(self, x: torch.Tensor) -> None:
        plain = seeded(GatedNet)
        model = placed(plain, "disk")
        gate = model.layers[1].gate
        gate.open.clear()

        def fork() -> bool:
            assert gate.inside.wait(PATIENCE)
            try:
                return _in_child(lambda: gate.open.set() or same_bits(model(x), plain(x)))
            finally:
                gate.open.set()

        out, right = together(lambda: model(x), fork)
        assert right and same_bits(out, plain(x))

    @torch.no_grad()
    def test_a_child_that_is_forked_while_another_thread_fetches(
        self, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plain = seeded(Net)
        model = placed(plain, "disk")
        fetching, go_on = threading.Event(), threading.Event()
        fill = Executor._bring

        def slow(self: Executor, *args: Any) -> None:
            fetching.set()
            assert go_on.wait(PATIENCE)
            fill(self, *args)

        def fork() -> bool:
            assert fetching.wait(PATIENCE)
            try:
                return _in_child(lambda: go_on.set() or same_bits(model(x), plain(x)))
            finally:
                go_on.set()

        monkeypatch.setattr(Executor, "_bring", slow)
        out, right = together(lambda: model(x), fork)
        assert right and same_bits(out, plain(x))

    @torch.no_grad()
    def test_a_child_forked_inside_a_forward_goes_on_with_it(self, x: torch.Tensor) -> None:
        plain = seeded(Net)
        model = placed(plain, "disk")
        answers = []

        def fork(*_: Any) -> None:
            hook.remove()  # or the child forks, too
            answers.append(_in_child(lambda: same_bits(model.layers[1].up(x), plain.layers[1].up(x))))

        hook = model.layers[1].up.register_forward_pre_hook(fork)
        assert same_bits(model(x), plain(x)) and answers == [True]


def _in_child(question: Callable[[], bool]) -> bool:
    """The answer of a forked child; False also for one that does not answer in time."""
    pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(PATIENCE)  # nothing handles it, so it ends a child that hangs
            os._exit(0 if question() else 1)
        finally:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


class TestWhatIsDoneToAWholeModel:
    @torch.no_grad()
    @pytest.mark.parametrize(
        "change",
        [
            lambda m: m.half().float(),
            lambda m: m.double(),
            lambda m: m.apply(lambda each: each.bias.fill_(3) if isinstance(each, nn.Linear) else None),
            lambda m: m.requires_grad_(False),
            lambda m: m.share_memory(),
            lambda m: m.zero_grad(),
            lambda m: m.train(),
        ],
        ids=["half", "double", "apply", "requires_grad_", "share_memory", "zero_grad", "train"],
    )
    def test_is_seen_by_the_next_forward(self, change: Callable[[Any], Any], x: torch.Tensor) -> None:
        plain = seeded(Net)
        model = placed(plain, "disk")
        model(x)
        change(plain), change(model)
        x = x.to(next(plain.parameters()).dtype)
        assert same_bits(model(x), plain(x))

    @torch.no_grad()
    def test_moving_it_off_inside_a_forward_of_another_thread_moves_what_rests(self, x: torch.Tensor) -> None:
        plain = seeded(GatedNet)
        with simdev.devices([None]):
            model = placed(plain, "disk")
            gate = model.layers[1].gate
            gate.open.clear()

            def move() -> None:
                assert gate.inside.wait(PATIENCE)
                try:
                    model.to("cpu")
                finally:
                    gate.open.set()

            together(lambda: model(x), move)
            assert same_bits(model(x), plain(x))
            for name, tensor in model.state_dict().items():
                assert same_bits(tensor, plain.state_dict()[name]), name


@torch.no_grad()
def test_a_changed_file_is_an_error_that_leaves_the_model_whole(tmp_path: Path, x: torch.Tensor) -> None:
    model = from_disk(seeded(Net), tmp_path)
    file = tmp_path / "model.safetensors"
    os.utime(file, ns=(1, 1))
    with pytest.raises(CheckpointError, match="safetensors"):
        model(x)
    assert_model_at_rest(model)
