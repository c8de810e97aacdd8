"""A model that lives gets another plan: its weights move, and it stays the same model."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hf_bigload
from hf_bigload import flow, replan
from hf_bigload.demotion import demoted
from hf_bigload.dispatch.attach import attachment_of
from hf_bigload.errors import BudgetError, OffloadedWeightError
from hf_bigload.pinned import memory_around
from hf_bigload.placed import placed_of
from tests import simdev

from . import CPU, Net, Tied, assert_model_at_rest, executor_of, from_disk, placed, same_bits, save, seeded, values

WIDTH = 64
HEADROOM = 24 << 10
"""Bytes on each device beside a plan's budget: what these models compute, and the alignment of slots."""


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def plain() -> nn.Module:
    return seeded(Net, layers=6, width=WIDTH)


@pytest.fixture
def x() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(3, WIDTH)


def nbytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def budgets(plain: nn.Module, *device: float, cpu: float | None = None) -> dict[int | str, int]:
    """Shares of the model, as `max_memory`."""
    allowed: dict[int | str, int] = {i: int(share * nbytes(plain)) for i, share in enumerate(device)}
    return allowed if cpu is None else {**allowed, "cpu": int(cpu * nbytes(plain))}


def load(plain: nn.Module, folder: Path, memory: dict[int | str, int], **options: Any) -> Any:
    return from_disk(plain, folder, **({"device_map": "auto", "max_memory": memory} | options))


def assert_same(model: nn.Module, plain: nn.Module, x: torch.Tensor) -> None:
    given = x if attachment_of(model) is not None else x.to(next(model.parameters()).device)
    assert same_bits(model(given), plain(x)) and same_bits(model(given), plain(x))
    expected = plain.state_dict()
    assert all(same_bits(tensor, expected[name]) for name, tensor in model.state_dict().items())
    if attachment_of(model) is not None:
        assert_model_at_rest(model)


PLANS: dict[str, tuple[tuple[float, ...], float]] = {
    "RAM": ((), 2.0),
    "RAM and disk": ((), 0.5),
    "all on one": ((2.0,), 2.0),
    "one and RAM": ((0.5,), 2.0),
    "one, RAM and disk": ((0.5,), 0.55),
    "two": ((0.7, 0.7), 2.0),
    "two, RAM and disk": ((0.4, 0.3), 0.5),
}


class TestEveryPlan:
    @pytest.mark.parametrize("to", PLANS)
    @pytest.mark.parametrize("origin", PLANS)
    def test_can_follow_every_other(
        self, origin: str, to: str, plain: nn.Module, x: torch.Tensor, tmp_path: Path
    ) -> None:
        with simdev.devices([None, None]), simdev.asynchronous():
            (first, ram), (second, other_ram) = PLANS[origin], PLANS[to]
            model = load(plain, tmp_path, budgets(plain, *first, cpu=ram))
            before = dict(model.named_parameters())
            assert_same(model, plain, x)
            told = hf_bigload.inspect(model).replan(max_memory=budgets(plain, *second, cpu=other_ram))
            fresh = load(plain, tmp_path / "fresh", budgets(plain, *second, cpu=other_ram))
            assert model.hf_device_map == fresh.hf_device_map == told.plan.device_map
            assert all(parameter is before[name] for name, parameter in model.named_parameters())
            assert_same(model, plain, x)

    def test_comes_back_to_where_it_was(self, plain: nn.Module, x: torch.Tensor, tmp_path: Path) -> None:
        with simdev.devices([None, None]):
            model = load(plain, tmp_path, budgets(plain, 0.5, cpu=0.55))
            for name in (*PLANS, "one, RAM and disk", *reversed(PLANS)):
                device, ram = PLANS[name]
                hf_bigload.inspect(model).replan(max_memory=budgets(plain, *device, cpu=ram))
                assert_same(model, plain, x)


def test_a_map_moves_what_it_names(plain: nn.Module, x: torch.Tensor, tmp_path: Path) -> None:
    with simdev.devices([None]):
        model = load(plain, tmp_path, budgets(plain, 2.0, cpu=2.0))
        told = hf_bigload.inspect(model).replan(device_map={"": 0, "layers.2": "disk", "layers.3": "cpu"})
        assert {p.block.name: p.home for p in told.plan.placements}["layers.2"] == "disk"
        assert model.layers[2].up.weight in executor_of(model).on_disk
        assert str(model.layers[1].up.weight.device) == "sim:0" and model.layers[3].up.weight.device == CPU
        assert_same(model, plain, x)


def test_a_resident_model_on_the_cpu_carries_nothing_before_and_after(plain: nn.Module, x: torch.Tensor) -> None:
    model = placed(plain, "cpu")
    hf_bigload.inspect(model).replan(max_memory=budgets(plain, cpu=0.5))
    assert_same(model, plain, x)
    hf_bigload.inspect(model).replan(max_memory=budgets(plain, cpu=2.0))
    assert attachment_of(model) is None and "forward" not in vars(model)
    assert not any("_hf_hook" in vars(module) for module in model.modules())
    assert_same(model, plain, x)


class TestDisk:
    def test_what_is_unchanged_goes_back_to_the_checkpoint(
        self, plain: nn.Module, x: torch.Tensor, tmp_path: Path
    ) -> None:
        with simdev.devices([None]):
            model = load(plain, tmp_path, budgets(plain, 2.0, cpu=2.0))
            hf_bigload.inspect(model).replan(device_map={"": "disk"})
            on_disk = executor_of(model).on_disk
            files = {on_disk[parameter].entry.file for parameter in model.parameters()}
            assert files == {str(tmp_path / "model.safetensors")}
            assert_same(model, plain, x)

    @pytest.mark.parametrize("origin", ["RAM", "RAM and disk", "all on one", "one and RAM"])
    @pytest.mark.parametrize("through_data", [False, True])
    def test_what_was_written_stays_as_it_is(
        self, origin: str, through_data: bool, plain: nn.Module, x: torch.Tensor, tmp_path: Path
    ) -> None:
        with simdev.devices([None, None]):
            device, ram = PLANS[origin]
            model = load(plain, tmp_path, budgets(plain, *device, cpu=ram))
            for each in (model, plain):
                for weight in (each.layers[1].up.weight, each.layers[5].down.weight, each.first.bias):
                    (weight.data if through_data else weight).mul_(2)
            for to in ({"": "disk"}, {"": "cpu"}, {"": 0}, {"": "disk"}):
                hf_bigload.inspect(model).replan(device_map=to)
                assert_same(model, plain, x)
        assert_untouched(tmp_path, seeded(Net, layers=6, width=WIDTH))

    def test_what_was_replaced_is_kept(self, plain: nn.Module, x: torch.Tensor, tmp_path: Path) -> None:
        model = load(plain, tmp_path, budgets(plain, cpu=0.5))
        for each in (model, plain):
            each.last.weight = nn.Parameter(torch.full_like(each.last.weight, 0.5))
        hf_bigload.inspect(model).replan(device_map={"": "disk"})
        assert_same(model, plain, x)

    def test_that_another_file_took_the_place_of_the_checkpoint_loses_nothing(
        self, plain: nn.Module, x: torch.Tensor, tmp_path: Path
    ) -> None:
        for share in (0.5, 2.0):
            model = load(plain, tmp_path / str(share), budgets(plain, cpu=share))
            (tmp_path / str(share) / "model.safetensors").unlink()
            save(seeded(Net, layers=6, width=WIDTH, seed=9), tmp_path / str(share))
            for to in ({"": "cpu"}, {"": "disk"}, {"": "cpu"}):
                hf_bigload.inspect(model).replan(device_map=to)
                assert_same(model, plain, x)

    def test_casts_are_read_from_where_they_were_kept(self, plain: nn.Module, x: torch.Tensor, tmp_path: Path) -> None:
        model = load(plain, tmp_path, budgets(plain, cpu=0.25), dtype=torch.bfloat16)
        plain.to(torch.bfloat16)
        for share in (2.0, 0.2, 0.3):
            hf_bigload.inspect(model).replan(max_memory=budgets(plain, cpu=share))
            assert_same(model, plain, x.bfloat16())


def assert_untouched(folder: Path, plain: nn.Module) -> None:
    from safetensors.torch import load_file

    stored = load_file(folder / "model.safetensors")
    assert all(same_bits(tensor, plain.state_dict()[name]) for name, tensor in stored.items())


def test_ties_stay_tied(tmp_path: Path) -> None:
    plain = seeded(Tied, layers=4, width=WIDTH, vocabulary=300)
    tokens = torch.arange(12)[None]
    with simdev.devices([None]):
        model = load(plain, tmp_path, budgets(plain, 2.0, cpu=2.0))
        for device, ram in (((0.5,), 2.0), ((), 0.7), ((2.0,), 2.0), ((0.6,), 0.7)):
            hf_bigload.inspect(model).replan(max_memory=budgets(plain, *device, cpu=ram))
            assert model.head.weight is model.embed.weight
            assert same_bits(model(tokens.to(model.embed.weight.device)), plain(tokens))


def test_buffers_move_along(tmp_path: Path) -> None:
    plain = seeded(lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)))
    plain[1].running_mean.uniform_()
    x = torch.randn(4, 8)
    with simdev.devices([None]):
        model = placed(plain, {"": "cpu"}, main_device=0)
        for to in ({"": 0}, {"": "disk"}, {"": "cpu"}, {"0": 0, "1": "cpu", "2": 0}):
            hf_bigload.inspect(model).replan(device_map=to)
            given = x if attachment_of(model) is not None else x.to(model[0].weight.device)
            assert same_bits(model(given), plain(x))
            assert values(model.state_dict()).keys() == plain.state_dict().keys()


def test_weights_in_ram_lie_as_a_load_would_lay_them(plain: nn.Module, x: torch.Tensor, tmp_path: Path) -> None:
    """Packed for an accelerator; for the CPU at the address modulo 64 of a plain load."""
    with simdev.devices([None]):
        model = load(plain, tmp_path, budgets(plain, cpu=0.5))
        fresh = load(plain, tmp_path / "fresh", budgets(plain, cpu=0.5))
        residues = {name: parameter.data_ptr() % 64 for name, parameter in fresh.named_parameters()}
        hf_bigload.inspect(model).replan(max_memory=budgets(plain, 0.5, cpu=2.0))
        in_ram = [parameter for parameter in model.parameters() if parameter.device == CPU]
        assert in_ram and all(memory_around(parameter) is not None for parameter in in_ram)
        hf_bigload.inspect(model).replan(max_memory=budgets(plain, cpu=0.5))
        assert not any(memory_around(parameter) is not None for parameter in model.parameters())
        assert {name: parameter.data_ptr() % 64 for name, parameter in model.named_parameters()} == residues


class TestMemory:
    @pytest.mark.parametrize(("first", "second"), [(0.9, 0.4), (0.4, 0.9)], ids=["less", "more"])
    def test_never_holds_more_than_the_larger_budget_and_a_block(
        self, first: float, second: float, plain: nn.Module, x: torch.Tensor, tmp_path: Path
    ) -> None:
        with simdev.devices([None]) as sim:
            model = load(plain, tmp_path, budgets(plain, first, cpu=0.6))
            model(x)
            sim.reset_peak_memory_stats(0)
            hf_bigload.inspect(model).replan(max_memory=budgets(plain, second, cpu=0.6))
            block = nbytes(plain.layers[0])
            assert sim.max_memory_allocated(0) <= max(first, second) * nbytes(plain) + block + HEADROOM
            assert sim.memory_allocated(0) <= second * nbytes(plain)
            model(x)
            assert sim.memory_allocated(0) <= second * nbytes(plain) + HEADROOM

    def test_two_full_devices_exchange_their_blocks(self, plain: nn.Module, x: torch.Tensor, tmp_path: Path) -> None:
        parts = [*(f"layers.{i}" for i in range(6)), "first", "norm", "last"]
        half = {name: int(at < 3) for at, name in enumerate(parts)}
        most = nbytes(plain.layers[:3]) + nbytes(plain.layers[0]) + HEADROOM
        with simdev.devices([most, most]):
            model = load(plain, tmp_path, {}, device_map=half, max_memory=None)
            hf_bigload.inspect(model).replan(device_map={name: 1 - device for name, device in half.items()})
            assert str(model.layers[0].up.weight.device) == "sim:0"
            assert_same(model, plain, x)

    def test_what_is_free_counts_what_the_model_has(self, plain: nn.Module, x: torch.Tensor, tmp_path: Path) -> None:
        with simdev.devices([int(1.3 * nbytes(plain)) + HEADROOM], hide_others=True):
            model = from_disk(plain, tmp_path, device_map="auto")
            assert hf_bigload.inspect(model).plan.device_map == {"": 0}
            assert hf_bigload.inspect(model).replan().plan.device_map == {"": 0}
            assert_same(model, plain, x)


class TestRefusals:
    def test_from_inside_a_forward(self, plain: nn.Module, x: torch.Tensor, tmp_path: Path) -> None:
        for share in (0.5, 2.0):
            model = load(plain, tmp_path / str(share), budgets(plain, cpu=share))
            told: list[BaseException] = []

            def replan(module: nn.Module, _args: Any, model: Any = model, told: list[BaseException] = told) -> None:
                with pytest.raises(OffloadedWeightError, match="this thread is inside") as refusal:
                    hf_bigload.inspect(model).replan(max_memory={"cpu": "1GiB"})
                told.append(refusal.value)

            model.layers[2].register_forward_pre_hook(replan)
            assert same_bits(model(x), plain(x)) and len(told) == 1

    def test_while_another_thread_is_inside(self, plain: nn.Module, x: torch.Tensor, tmp_path: Path) -> None:
        for share in (0.5, 2.0):
            model = load(plain, tmp_path / str(share), budgets(plain, cpu=share))
            inside, go_on = threading.Event(), threading.Event()

            def stay(*_: Any, inside: threading.Event = inside, go_on: threading.Event = go_on) -> None:
                inside.set()
                go_on.wait(30)

            model.layers[2].register_forward_pre_hook(stay)
            thread = threading.Thread(target=model, args=(x,))
            thread.start()
            try:
                assert inside.wait(30)
                with pytest.raises(OffloadedWeightError, match="another thread is inside"):
                    hf_bigload.inspect(model).replan(max_memory={"cpu": "1GiB"})
            finally:
                go_on.set()
                thread.join()
            hf_bigload.inspect(model).replan(max_memory={"cpu": "1GiB"})
            assert_same(model, plain, x)

    def test_of_a_budget_that_nothing_fits_leave_all_as_it_was(
        self, plain: nn.Module, x: torch.Tensor, tmp_path: Path
    ) -> None:
        model = load(plain, tmp_path, budgets(plain, cpu=0.5))
        device_map = dict(model.hf_device_map)
        with pytest.raises(BudgetError):
            hf_bigload.inspect(model).replan(max_memory={"cpu": 100})
        assert model.hf_device_map == device_map
        assert_same(model, plain, x)

    def test_a_move_that_fails_half_way_leaves_a_model_that_runs(
        self, plain: nn.Module, x: torch.Tensor, tmp_path: Path
    ) -> None:
        with simdev.devices([nbytes(plain) // 2 + HEADROOM]) as sim:
            model = load(plain, tmp_path, budgets(plain, cpu=0.6))
            with pytest.raises(torch.OutOfMemoryError):
                hf_bigload.inspect(model).replan(device_map={"": 0})
            assert 0 < sim.memory_allocated(0) <= nbytes(plain) // 2 + HEADROOM
            sim.set_capacity(0, None)
            assert_same(model, plain, x)
            hf_bigload.inspect(model).replan(device_map={"": 0})
            assert_same(model, plain, x)

    @pytest.mark.parametrize("devices", [(0.5,), (0.3, 0.3)])
    def test_a_move_that_fails_leaves_what_streams_where_it_was_computed(
        self, devices: tuple[float, ...], plain: nn.Module, x: torch.Tensor, tmp_path: Path
    ) -> None:
        with simdev.devices([None] * len(devices)) as sim:
            model = load(plain, tmp_path, budgets(plain, *devices, cpu=2.0))
            before = hf_bigload.inspect(model).plan
            for index in range(len(devices)):
                before = demoted(before, f"sim:{index}", nbytes(plain), ram=nbytes(plain)) or before
            flow.relocate(model, before, placed_of(model))
            assert {p.home for p in before.placements} == {"cpu"}
            for index in range(len(devices)):
                sim.set_capacity(index, sim.memory_allocated(index))
            with pytest.raises(torch.OutOfMemoryError):
                hf_bigload.inspect(model).replan(device_map={"": 0})
            for index in range(len(devices)):
                sim.set_capacity(index, None)
            after = hf_bigload.inspect(model).plan
            assert after.main_device == before.main_device == "sim:0"
            assert {p.block.name: p.device for p in after.placements} == {
                p.block.name: p.device for p in before.placements
            }
            assert_same(model, plain, x)

    def test_a_move_that_is_refused_leaves_the_old_plan_in_force(
        self, plain: nn.Module, x: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with simdev.devices([None]):
            model = load(plain, tmp_path, budgets(plain, cpu=0.5))
            before = hf_bigload.inspect(model).plan
            monkeypatch.setattr(replan, "is_traceable_wrapper_subclass", lambda _tensor: True)
            with pytest.raises(OffloadedWeightError, match="Nothing was moved"):
                hf_bigload.inspect(model).replan(device_map={"": 0})
            materializer = placed_of(model).materializer
            assert materializer is not None and materializer.plan is before is hf_bigload.inspect(model).plan
            assert_same(model, plain, x)


def test_counters_go_on(plain: nn.Module, x: torch.Tensor, tmp_path: Path) -> None:
    model = load(plain, tmp_path, budgets(plain, cpu=0.5))
    told = hf_bigload.inspect(model)
    model(x)
    read = told.stats.bytes_read
    assert read > 0
    told = told.replan(max_memory=budgets(plain, cpu=0.4))
    assert told.stats.bytes_read == read
    model(x)
    assert told.stats.bytes_read > read


def test_hooks_of_others_stay(plain: nn.Module, x: torch.Tensor, tmp_path: Path) -> None:
    from hf_bigload.hooks import ModelHook, add_hook_to_module

    class Counting(ModelHook):
        calls = 0

        def pre_forward(self, module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
            Counting.calls += 1
            return args, kwargs

    model = load(plain, tmp_path, budgets(plain, cpu=0.5))
    add_hook_to_module(model.layers[0], Counting(), append=True)
    for share in (2.0, 0.5):
        hf_bigload.inspect(model).replan(max_memory=budgets(plain, cpu=share))
        model(x)
    assert Counting.calls == 2
    assert_same(model, plain, x)


def test_a_copy_gets_plans_of_its_own(plain: nn.Module, x: torch.Tensor, tmp_path: Path) -> None:
    model = load(plain, tmp_path, budgets(plain, cpu=0.5))
    copied = copy.deepcopy(model)
    hf_bigload.inspect(copied).replan(max_memory=budgets(plain, cpu=2.0))
    assert attachment_of(copied) is None and attachment_of(model) is not None
    assert_same(copied, plain, x)
    assert_same(model, plain, x)
    hf_bigload.inspect(copied).replan(max_memory=budgets(plain, cpu=0.5))
    assert_same(copied, plain, x)


def test_training_goes_on(plain: nn.Module, x: torch.Tensor, tmp_path: Path) -> None:
    model = load(plain, tmp_path, budgets(plain, cpu=0.5))
    with simdev.devices([None]), torch.enable_grad():
        for each in (plain, model):
            each(x).square().sum().backward()
        hf_bigload.inspect(model).replan(max_memory=budgets(plain, 0.5, cpu=2.0))
        for each in (plain, model):
            each(x).square().sum().backward()
        for name, parameter in plain.named_parameters():
            ours = model.get_parameter(name)
            assert ours.grad is not None and ours.grad.device == ours.device
            assert same_bits(ours.grad, parameter.grad)
