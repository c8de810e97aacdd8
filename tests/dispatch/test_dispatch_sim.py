"""Dispatched models on simulated accelerators: right bits, within every device's budget, in order."""

from __future__ import annotations

import random
from collections import namedtuple
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hf_bigload
from tests import simdev

from . import CPU, Layer, Net, Tied, assert_model_at_rest, from_disk, placed, same_bits, save, seeded, values

HEADROOM = 24 << 10
"""Bytes on each device beside a plan's budget: what these models compute (a few KiB), and the alignment of slots."""


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def nbytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def load(plain: nn.Module, folder: Path, budgets: Sequence[int], ram: int | None = None, **options: Any) -> Any:
    """`plain` from its checkpoint, planned for accelerators with these budgets, and RAM with another."""
    memory = {**dict(enumerate(budgets)), "cpu": 1 << 30 if ram is None else ram}
    return from_disk(plain, folder, **({"device_map": "auto", "max_memory": memory} | options))


def assert_within(sim: ModuleType, budgets: Sequence[int]) -> None:
    for device, budget in enumerate(budgets):
        assert sim.max_memory_allocated(device) <= budget + HEADROOM, f"sim:{device}"


class TestBudgets:
    """Capacities are the budgets and the headroom: a byte more, and the device is out of memory."""

    @pytest.mark.parametrize("count", [1, 2, 4])
    @pytest.mark.parametrize("share", [2.0, 0.8, 0.4, 0.15])
    @pytest.mark.parametrize("ram", [None, 0.4], ids=["RAM", "disk"])
    def test_are_kept_on_every_device(self, count: int, share: float, ram: float | None, tmp_path: Path) -> None:
        plain = seeded(Net, layers=8, width=64)
        x = torch.randn(4, 64)
        budgets = [int(nbytes(plain) * share / count)] * count
        if budgets[0] < nbytes(plain.layers[0]):
            budgets[0] = nbytes(plain.layers[0])
        with simdev.devices([budget + HEADROOM for budget in budgets]) as sim:
            model = load(plain, tmp_path, budgets, None if ram is None else int(nbytes(plain) * ram))
            given = x.to(model.first.weight.device) if set(model.hf_device_map) == {""} else x  # whole on one: plain
            for _ in range(3):
                assert same_bits(model(given), plain(x))
            assert_within(sim, budgets)

    @pytest.mark.parametrize("ram", [1.0, 0.2], ids=["RAM", "disk"])
    def test_of_the_largest_layer_alone_are_enough(self, ram: float, tmp_path: Path) -> None:
        plain = seeded(Net, layers=8, width=64)
        budget = nbytes(plain.layers[0])
        x = torch.randn(4, 64)
        with simdev.devices([budget + HEADROOM]) as sim:
            model = load(plain, tmp_path, [budget], int(nbytes(plain) * ram))
            assert same_bits(model(x), plain(x)) and same_bits(model(x), plain(x))
            assert_within(sim, [budget])

    def test_a_block_that_does_not_fit_runs_leaf_by_leaf(self, tmp_path: Path) -> None:
        plain = seeded(Net, layers=4, width=64)
        budget = nbytes(plain.layers[0].up) + 4096
        assert budget < nbytes(plain.layers[0])
        x = torch.randn(4, 64)
        with simdev.devices([budget + HEADROOM]) as sim:
            model = load(plain, tmp_path, [budget])
            assert same_bits(model(x), plain(x))
            assert_within(sim, [budget])
            assert sim.copied_bytes(0).host_to_device > nbytes(plain.layers)

    def test_a_layer_larger_than_the_device_runs_where_it_lies(self, tmp_path: Path) -> None:
        plain = seeded(Net, layers=4, width=32)
        plain.last = seeded(nn.Linear, 32, 5000)
        budget = nbytes(plain.layers[0]) + 4096
        ran_on = []
        with simdev.devices([budget + HEADROOM + 4 * 5000 * 4]) as sim:
            model = load(plain, tmp_path, [budget])
            model.last.register_forward_hook(lambda m, args, out: ran_on.append(m.weight.device))
            x = torch.randn(4, 32, device="sim:0")
            out = model(x)
            assert str(out.device) == "sim:0" and same_bits(out, plain(x.cpu()))
            assert sim.copied_bytes(0).host_to_device < nbytes(plain.last)
            assert [str(device) for device in ran_on] == ["cpu"]

    def test_a_table_is_gathered_in_ram_and_its_rows_travel(self, tmp_path: Path) -> None:
        plain = seeded(Tied, layers=3, width=32, vocabulary=2000)
        plain.head.weight = nn.Parameter(plain.head.weight[:7].clone())
        budget = nbytes(plain.layers) + nbytes(plain.head) + 8192
        with simdev.devices([budget + HEADROOM]) as sim:
            model = load(plain, tmp_path, [budget])
            assert model.embed.weight.device == CPU
            tokens = torch.arange(9)[None]
            assert same_bits(model(tokens), plain(tokens))
            assert sim.copied_bytes(0).host_to_device < nbytes(plain.embed)

    def test_a_run_reports_what_it_moved(self, tmp_path: Path) -> None:
        plain = seeded(Net, layers=4, width=64)
        with simdev.devices([None]) as sim:
            model = from_disk(plain, tmp_path, device_map={"": "disk", "norm": 0})
            model(torch.randn(4, 64, device="sim:0"))
            stats = hf_bigload.inspect(model).stats
            streamed = nbytes(plain) - nbytes(plain.norm)
            assert (stats.bytes_read, stats.bytes_copied, stats.fetches) == (streamed, streamed, 6)
            assert sim.copied_bytes(0).host_to_device >= streamed

    @pytest.mark.parametrize("seed", range(10))
    def test_random_models_on_random_machines(self, seed: int, tmp_path: Path) -> None:
        rng = random.Random(seed)
        plain = seeded(rng.choice((Net, Reading, Tied)), layers=rng.randint(1, 5), width=rng.choice((8, 32)))
        x = torch.randn(3, plain.layers[0].up.in_features) if not isinstance(plain, Tied) else torch.arange(6)[None]
        largest = max(nbytes(module) for module in (*plain.layers, *plain.children()) if module is not plain.layers)
        count = rng.choice((1, 2, 4))
        budgets = [rng.randint(2 * largest, 2 * largest + nbytes(plain)) for _ in range(count)]
        ram = rng.choice((1 << 30, 2 * largest))
        with simdev.devices([budget + HEADROOM for budget in budgets]) as sim:
            model = load(plain, tmp_path, budgets, ram, offload_buffers=rng.random() < 0.5)
            for _ in range(2):
                assert same_bits(model(x), plain(x))
            assert_within(sim, budgets)
            for name, tensor in model.state_dict().items():
                assert same_bits(tensor, plain.state_dict()[name])


class Reading(Net):
    """Reads weights and buffers that others own, in every way that models do."""

    def __init__(self, layers: int = 3, width: int = 8) -> None:
        super().__init__(layers, width)
        self.layers[0].register_buffer("shift", torch.randn(width))
        self.own = nn.Parameter(torch.randn(width))
        self.listed = nn.ParameterList([torch.randn(width) for _ in range(2)])
        self.named = nn.ParameterDict({"a": torch.randn(width)})
        self.never_called = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.linear(x * self.own, self.never_called.weight, self.never_called.bias)
        x = x + sum(p for p in self.listed) + self.named["a"] + self.layers[0].shift
        fused = torch.cat([self.layers[0].up.weight, self.layers[-1].up.weight])
        return super().forward(x + F.linear(x, fused).sum())


PLANS: dict[str, tuple[dict[str, Any], Any]] = {
    "RAM": ({"": "cpu"}, 0),
    "disk": ({"": "disk"}, 0),
    "disk on the CPU": ({"": "disk"}, "cpu"),
    "two devices": ({"": 0, "layers.1": 1, "layers.2": 1, "never_called": 1, "listed": 1}, 0),
    "everywhere": ({"": "cpu", "first": 0, "layers.0": "disk", "layers.1": 1, "named": 1, "listed": "disk"}, 0),
}


@pytest.mark.parametrize("plan", PLANS)
class TestWeightsReadByOthers:
    def test_are_right(self, plan: str) -> None:
        plain, x = seeded(Reading), torch.randn(2, 8)
        with simdev.devices([None, None]):
            model = placed(plain, *PLANS[plan])
            assert same_bits(model(x), plain(x)) and same_bits(model(x), plain(x))
            assert_model_at_rest(model)

    def test_of_which_only_the_dtype_is_read(self, plan: str) -> None:
        class Casting(Net):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return super().forward(x.to(self.last.weight.dtype).to(self.first.weight.device))

        plain, x = seeded(Casting), torch.randn(2, 8)
        with simdev.devices([None, None]):
            model = placed(plain, *PLANS[plan])
            assert same_bits(model(x), plain(x))

    def test_as_an_output_projection(self, plan: str) -> None:
        class Projecting(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embed = nn.Embedding(20, 8)
                self.layers = nn.ModuleList(Layer() for _ in range(3))

            def forward(self, tokens: torch.Tensor) -> torch.Tensor:
                x = self.embed(tokens)
                for layer in self.layers:
                    x = layer(x)
                return F.linear(x.to(self.embed.weight.device), self.embed.weight)

        plain, tokens = seeded(Projecting), torch.arange(6)[None]
        with simdev.devices([None, None]):
            model = placed(plain, *PLANS[plan])
            assert same_bits(model(tokens), plain(tokens))

    def test_outside_of_any_forward_rest_where_they_rest(self, plan: str) -> None:
        plain = seeded(Net)
        with simdev.devices([None, None]):
            model = placed(plain, *PLANS[plan])
            for name, parameter in plain.named_parameters():
                owner, _, leaf = name.rpartition(".")
                read = getattr(model.get_submodule(owner), leaf)
                assert isinstance(read, nn.Parameter) and same_bits(read, parameter)

    def test_and_written_by_others_are_kept(self, plan: str) -> None:
        class Writing(Net):
            def __init__(self) -> None:
                super().__init__()
                self.layers[1].register_buffer("count", torch.zeros(8))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                self.last.weight.add_(1)
                self.layers[1].count.add_(1)
                return super().forward(x)

        plain, x = seeded(Writing), torch.randn(2, 8)
        with simdev.devices([None, None]):
            model = placed(plain, *PLANS[plan])
            for _ in range(2):
                assert same_bits(model(x), plain(x))
            for name, tensor in model.state_dict().items():
                assert same_bits(tensor, plain.state_dict()[name]), name


class TestTies:
    @pytest.mark.parametrize(
        ("device_map", "main"),
        [
            ({"": 0, "layers.1": 1}, None),
            ({"": 1, "embed": 0}, None),
            ({"": 0, "embed": "cpu", "head": "cpu"}, None),
            ({"": 0, "embed": "disk", "head": "disk"}, None),
            ({"": "disk"}, 0),
            ({"": "disk"}, "cpu"),
            ({"": "cpu", "layers.1": 1}, 0),
            ({"embed": 0, "layers.0": "cpu", "layers.1": 1, "head": "disk"}, None),
        ],
    )
    def test_across_devices_are_right_and_stay_tied(self, device_map: dict[str, Any], main: Any) -> None:
        plain, tokens = seeded(Tied), torch.arange(6)[None]
        with simdev.devices([None, None]):
            model = placed(plain, device_map, main)
            for _ in range(2):
                assert same_bits(model(tokens), plain(tokens))
            assert model.head.weight is model.embed.weight
            model.embed.weight.mul_(2)
            plain.embed.weight.mul_(2)
            assert same_bits(model(tokens), plain(tokens))
            assert_model_at_rest(model)

    def test_rest_once(self, tmp_path: Path) -> None:
        plain = seeded(Tied, vocabulary=3000)
        with simdev.devices([None]) as sim:
            load(plain, tmp_path, [nbytes(plain) + HEADROOM])
            assert sim.memory_allocated(0) < 1.2 * nbytes(plain)


Point = namedtuple("Point", "a b")


class Nested(nn.Module):
    """Blocks that pass nested data on, and note where it was."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(8, 8)
            self.seen: list[str] = []

        def forward(self, data: Any, *, mask: Any = None, cache: Any = None, note: str = "") -> Any:
            point, more = data
            self.seen = [str(t.device) for t in (point.a, more["x"][0], mask, cache["k"])]
            moved = cache["k"].to(point.a.device)
            return Point(self.lin(point.a) * mask + moved, point.b), {"x": [more["x"][0] + 1], "note": note}

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.Block() for _ in range(3))

    def forward(self, data: Any, mask: torch.Tensor, cache: Any) -> Any:
        for layer in self.layers:
            data = layer(data, mask=mask, cache=cache, note="text")
        return data


BY_LAYER = {"layers.0": 0, "layers.1": 1, "layers.2": "cpu"}


class TestInputsAndOutputs:
    def inputs(self, device: Any = CPU) -> tuple[Any, ...]:
        torch.manual_seed(2)
        x = torch.randn(2, 8, device=device)
        return (Point(x, 3), {"x": [x + 1]}), torch.ones(8, device=device), {"k": torch.ones(8, device=device)}

    def test_nested_ones_come_to_each_block_and_go_back(self) -> None:
        plain = seeded(Nested)
        with simdev.devices([None, None]):
            model = placed(plain, BY_LAYER)
            (point, more), expected = model(*self.inputs()), plain(*self.inputs())
            assert [layer.seen for layer in model.layers] == [["sim:0"] * 4, ["sim:1"] * 4, ["sim:0"] * 4]
            assert type(point) is Point and point.b == 3 and more["note"] == "text"
            assert point.a.device == more["x"][0].device == CPU
            assert same_bits(point.a, expected[0].a) and same_bits(more["x"][0], expected[1]["x"][0])

    @pytest.mark.parametrize("device", ["sim:0", "sim:1"])
    def test_outputs_go_to_where_the_inputs_were(self, device: str) -> None:
        plain = seeded(Nested)
        with simdev.devices([None, None]):
            model = placed(plain, BY_LAYER)
            point, more = model(*self.inputs(device))
            assert point.a.device == more["x"][0].device == torch.device(device)
            assert same_bits(point.a, plain(*self.inputs())[0].a)

    def test_skipped_keys_stay_where_they_are(self) -> None:
        plain = seeded(Nested)
        with simdev.devices([None, None]):
            model = placed(plain, BY_LAYER, skip_keys="cache")
            out = model(*(self.inputs()[:2]), cache=self.inputs()[2])
            assert [layer.seen[3] for layer in model.layers] == ["cpu"] * 3
            assert same_bits(out[0].a, plain(*self.inputs())[0].a)

    def test_a_cache_that_blocks_write_to_stays_their_cache(self) -> None:
        class Caching(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.lin = nn.Linear(8, 8)

            def forward(self, x: torch.Tensor, cache: dict[str, torch.Tensor]) -> torch.Tensor:
                key = str(id(self))
                cache[key] = cache[key].to(x.device) + x if key in cache else x.clone()
                return self.lin(x) + cache[key]

        class Decoder(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layers = nn.ModuleList(Caching() for _ in range(3))

            def forward(self, x: torch.Tensor, cache: dict[str, torch.Tensor]) -> torch.Tensor:
                for layer in self.layers:
                    x = layer(x, cache=cache)
                return x

        plain, x = seeded(Decoder), torch.randn(2, 8)
        with simdev.devices([None, None]):
            model = placed(plain, BY_LAYER, skip_keys=["cache"])
            mine: dict[str, torch.Tensor] = {}
            theirs: dict[str, torch.Tensor] = {}
            for _ in range(3):
                assert same_bits(model(x, cache=mine), plain(x, cache=theirs))
            assert [str(t.device) for t in mine.values()] == ["sim:0", "sim:1", "sim:0"]

    def test_what_lies_right_is_passed_as_the_same_object(self) -> None:
        got = []
        with simdev.devices([None]):
            model = placed(seeded(Net), "cpu", 0)
            model.layers[0].register_forward_hook(lambda m, args, out: got.append((args[0], out)))
            model.layers[1].register_forward_pre_hook(lambda m, args: got.append(args[0]))
            model(torch.randn(2, 8, device="sim:0"))
        assert got[0][1] is got[1]


class TestBuffers:
    class Rotary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("frequencies", torch.randn(8), persistent=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.frequencies.cos()

    class Model(Net):
        def __init__(self) -> None:
            super().__init__()
            self.rotary = TestBuffers.Rotary()
            self.register_buffer("scale", torch.randn(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(self.rotary(x) * self.scale)

    @pytest.mark.parametrize("offload", [False, True])
    @pytest.mark.parametrize("plan", PLANS)
    def test_are_with_those_who_compute(self, plan: str, offload: bool) -> None:
        plain, x = seeded(self.Model), torch.randn(2, 8)
        with simdev.devices([None, None]):
            model = placed(plain, *PLANS[plan], offload_buffers=offload)
            for _ in range(2):
                assert same_bits(model(x), plain(x))
            if not offload:
                on = torch.device("cpu" if plan == "disk on the CPU" else "sim:0")
                assert model.rotary.frequencies.device == model.scale.device == on

    def test_that_a_forward_replaces_are_kept(self) -> None:
        class Growing(Net):
            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("seen", torch.zeros(1, 8))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                self.seen = torch.cat([self.seen, x[:1]])
                return super().forward(x + self.seen.sum(0))

        plain, x = seeded(Growing), torch.randn(2, 8)
        with simdev.devices([None]):
            model = placed(plain, "cpu", 0)
            for _ in range(3):
                assert same_bits(model(x), plain(x))
            assert same_bits(model.seen, plain.seen)


class TestOrder:
    """Copies and kernels in asynchronous mode: whatever no event or stream has ordered is an error."""

    @pytest.mark.parametrize("plan", PLANS)
    def test_nothing_is_used_before_it_arrived(self, plan: str) -> None:
        plain, x = seeded(Net), torch.randn(2, 8)
        with simdev.devices([None, None]):
            model = placed(plain, *PLANS[plan])
            with simdev.asynchronous():
                for _ in range(3):
                    assert same_bits(model(x), plain(x))

    def test_with_streams_that_change_between_forwards(self) -> None:
        plain, x = seeded(Net), torch.randn(2, 8)
        with simdev.devices([None]):
            model = placed(plain, "cpu", 0)
            with simdev.asynchronous():
                for _ in range(4):
                    with torch.Stream(device="sim:0"):
                        assert same_bits(model(x.to("sim:0")).cpu(), plain(x))

    def test_gradients(self) -> None:
        plain, x = seeded(Net), torch.randn(2, 8)
        with simdev.devices([None, None]), torch.enable_grad():
            model = placed(plain, *PLANS["everywhere"])
            with simdev.asynchronous():
                for net in (plain, model):
                    net(x).square().sum().backward()
        for one, other in zip(plain.parameters(), model.parameters(), strict=True):
            assert same_bits(one.grad, other.grad)


class TestMixedDevices:
    def test_a_module_may_combine_what_blocks_on_two_devices_return(self) -> None:
        class Residual(Net):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                skip = x = self.first(x)
                for layer in self.layers:
                    x = x + layer(x)
                return torch.cat([x, skip])

        plain, x = seeded(Residual), torch.randn(2, 8)
        with simdev.devices([None, None]):
            model = placed(seeded(Residual), {"": 0, "layers.1": 1})
            assert same_bits(model(x), plain(x))

    def test_what_no_hook_can_know_of_raises_and_is_never_computed_on_the_wrong_data(self) -> None:
        class Mixing(Net):
            def __init__(self) -> None:
                super().__init__()
                self.constant = torch.ones(8)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.first(x) + self.constant  # a tensor that is no buffer

        with simdev.devices([None, None]):
            model = placed(seeded(Mixing), {"": 0, "layers.1": 1})
            with pytest.raises(RuntimeError, match="same device"):
                model(torch.randn(2, 8))
            assert_model_at_rest(model)


class TestMovingTheWholeModel:
    def test_to_a_device_that_has_room_makes_it_a_plain_model_there(self, tmp_path: Path) -> None:
        plain, x = seeded(Net), torch.randn(2, 8)
        with simdev.devices([None, None]):
            model = load(plain, tmp_path, [nbytes(plain) // 2], nbytes(plain) // 3)
            assert model.to("sim:1") is model
            assert {str(p.device) for p in model.parameters()} == {"sim:1"} and not hasattr(model, "hf_device_map")
            assert not any("_hf_hook" in vars(module) for module in model.modules())
            assert all(type(module._parameters) is dict for module in model.modules())
            assert same_bits(model(x.to("sim:1")), plain(x))
            assert same_bits(model.cpu()(x), plain(x))

    def test_to_one_that_has_not_moves_nothing(self, tmp_path: Path) -> None:
        plain, x = seeded(Net, width=64), torch.randn(2, 64)
        with simdev.devices([None, 10_000]):
            model = load(plain, tmp_path, [nbytes(plain) // 2])
            before = [p.device for p in model.parameters()]
            with pytest.raises(hf_bigload.errors.DoesNotFitError, match=r"sim:1: .* free there\. Nothing was moved"):
                model.to("sim:1")
            assert [p.device for p in model.parameters()] == before
            assert same_bits(model(x), plain(x))

    def test_a_dtype_alone_leaves_it_offloaded(self, tmp_path: Path) -> None:
        plain, x = seeded(Net), torch.randn(2, 8)
        with simdev.devices([None]):
            model = load(plain, tmp_path, [nbytes(plain) // 2])
            model.to(torch.float64), plain.to(torch.float64)
            assert hf_bigload.inspect(model).plan.streams
            assert same_bits(model(x.double()), plain(x.double()))


def test_a_checkpoint_saved_from_a_dispatched_model_is_the_same(tmp_path: Path) -> None:
    plain = seeded(Tied)
    with simdev.devices([None]):
        model = load(plain, tmp_path / "one", [nbytes(plain) // 2], nbytes(plain) // 2)
        model(torch.arange(4)[None])
        save(model, tmp_path / "two")
    names = ("one", "two")
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in names)
    assert one == two
    assert values(model.state_dict()).keys() == values(plain.state_dict()).keys()


def test_a_table_that_makes_its_own_numbers_on_the_callers_device_is_looked_up_at_home() -> None:
    class Positions(nn.Embedding):
        def forward(self, length: int, device: torch.device) -> torch.Tensor:
            return super().forward(torch.arange(length, device=device))

    class Positioned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions, self.out = Positions(64, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(x + self.positions(len(x), x.device))

    plain, x = seeded(Positioned), torch.randn(5, 8)
    with simdev.devices([None]):
        model = placed(seeded(Positioned), {"": 0, "positions": "cpu"})
        assert same_bits(model(x), plain(x))
