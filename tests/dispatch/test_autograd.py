"""Training through streamed weights: the gradients of the plain model, bit for bit, or an error."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import hf_bigload
from hf_bigload.errors import OffloadedWeightError
from tests import simdev

from . import (
    Layer,
    Net,
    Tied,
    assert_model_at_rest,
    assert_same_gradients,
    executor_of,
    placed,
    same_bits,
    seeded,
    values,
)

SPLIT = {"first": 0, "layers.0": 0, "layers.1": "cpu", "layers.2": 1, "norm": "disk", "last": 1}


def everywhere(model: nn.Module) -> dict[str, Any]:
    """`SPLIT`, as far as the model has these modules; the others rest in RAM."""
    names = {name for name, _ in model.named_modules()}
    chosen = {name: device for name, device in SPLIT.items() if name in names}
    parents = {name.partition(".")[0] for name in chosen}
    return chosen | {name: "cpu" for name, _ in model.named_children() if name not in parents}


PLACEMENTS: dict[str, tuple[Any, Any]] = {
    "disk": ("disk", "cpu"),
    "disk to device": ("disk", 0),
    "RAM to device": ("cpu", 0),
    "everywhere": ("everywhere", 0),
}


@pytest.fixture(params=PLACEMENTS)
def place(request: pytest.FixtureRequest) -> Iterator[Callable[[nn.Module], Any]]:
    """Dispatches a copy of a model in one of the ways above; maps are cut to the modules it has."""
    device_map, main = PLACEMENTS[request.param]

    def dispatch(model: nn.Module) -> Any:
        return placed(model, everywhere(model) if device_map == "everywhere" else device_map, main_device=main)

    with simdev.devices([None, None]):
        yield dispatch


@pytest.fixture
def x() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 8, requires_grad=True)


def backward(model: nn.Module, x: torch.Tensor, steps: int = 1) -> torch.Tensor:
    """The inputs' gradient, after backward."""
    given = x.detach().clone().requires_grad_(x.is_floating_point())
    out = model(given)
    for step in range(steps):
        out.square().sum().backward(retain_graph=step + 1 < steps)
    return given.grad if given.grad is not None else torch.zeros(0)


def assert_trains_alike(plain: nn.Module, model: nn.Module, x: torch.Tensor, **kwargs: Any) -> None:
    expected, got = backward(plain, x, **kwargs), backward(model, x, **kwargs)
    assert same_bits(expected, got)
    assert_same_gradients(plain, model)
    assert all(p.grad is None or p.grad.device == p.device for p in model.parameters())
    assert_model_at_rest(model)


Place = Callable[[nn.Module], Any]


class TestGradients:
    def test_of_all_weights(self, place: Place, x: torch.Tensor) -> None:
        plain = seeded(Net)
        assert_trains_alike(plain, place(plain), x)

    def test_accumulate(self, place: Place, x: torch.Tensor) -> None:
        plain = seeded(Net)
        model = place(plain)
        for _ in range(3):
            assert_trains_alike(plain, model, x)

    def test_through_frozen_weights_to_the_inputs(self, place: Place, x: torch.Tensor) -> None:
        plain = seeded(Net).requires_grad_(False)
        assert_trains_alike(plain, place(plain), x)

    def test_of_some_weights(self, place: Place, x: torch.Tensor) -> None:
        plain = seeded(Net)
        for name, parameter in plain.named_parameters():
            parameter.requires_grad_("up" in name or "norm.bias" in name)
        assert_trains_alike(plain, place(plain), x)

    def test_of_a_tied_table(self, place: Place) -> None:
        plain = seeded(Tied)
        assert_trains_alike(plain, place(plain), torch.arange(6)[None])

    def test_of_a_block_that_runs_twice(self, place: Place, x: torch.Tensor) -> None:
        class Twice(Net):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                for layer in (*self.layers, *self.layers, self.layers[1]):
                    x = layer(x)
                return self.last(x)

        plain = seeded(Twice)
        assert_trains_alike(plain, place(plain), x)

    def test_of_weights_that_a_parent_reads(self, place: Place, x: torch.Tensor) -> None:
        class Reading(Net):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                x = F.linear(x, self.layers[1].up.weight, self.layers[1].up.bias)[:, :8]
                return super().forward(x + self.norm.weight)

        plain = seeded(Reading)
        assert_trains_alike(plain, place(plain), x)

    def test_twice_over_one_graph(self, place: Place, x: torch.Tensor) -> None:
        plain = seeded(Net)
        assert_trains_alike(plain, place(plain), x, steps=3)

    def test_of_gradients(self, place: Place, x: torch.Tensor) -> None:
        plain = seeded(Net)
        model = place(plain)
        for net in (plain, model):
            given = x.detach().clone().requires_grad_()
            (slope,) = torch.autograd.grad(net(given).square().sum(), given, create_graph=True)
            slope.square().sum().backward()
        assert_same_gradients(plain, model)

    def test_of_complex_weights(self, place: Place) -> None:
        class Complex(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.randn(8, 8, dtype=torch.complex64))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return (x + 0j) @ self.weight.conj() + torch.tanh(x @ self.weight.mH)

        class Waves(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layers = nn.ModuleList(nn.Sequential(Complex(), nn.Tanh()) for _ in range(3))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                for layer in self.layers:
                    x = layer(x + 0j)
                return x.abs()

        plain = seeded(Waves)
        x = torch.randn(2, 8, dtype=torch.complex64)
        model = place(plain)
        for net in (plain, model):
            net(x).sum().backward()
        assert_same_gradients(plain, model)

    def test_in_mixed_precision(self, place: Place, x: torch.Tensor) -> None:
        plain = seeded(Net)
        model = place(plain)
        plain.to(hf_bigload.inspect(model).plan.main_device)  # the two devices cast for different operators
        with torch.autocast("cpu", torch.bfloat16), torch.autocast("sim", torch.bfloat16):
            expected, got = backward(plain, x.to(next(plain.parameters()).device)), backward(model, x)
        assert same_bits(expected, got)
        assert_same_gradients(plain, model)


class TestCheckpointing:
    @pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
    @pytest.mark.parametrize("reentrant", [True, False])
    def test_of_blocks(self, place: Place, x: torch.Tensor, reentrant: bool, frozen: bool) -> None:
        class Checkpointed(Net):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                x = self.first(x)
                for layer in self.layers:
                    x = checkpoint(layer, x, use_reentrant=reentrant)
                return self.last(self.norm(x))

        plain = seeded(Checkpointed).requires_grad_(not frozen)
        assert_trains_alike(plain, place(plain), x)

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_of_a_part_of_a_block(self, place: Place, x: torch.Tensor, reentrant: bool) -> None:
        class Inner(Layer):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x + self.down(torch.tanh(checkpoint(self.up, self.norm(x), use_reentrant=reentrant)))

        plain = seeded(Net)
        plain.layers = seeded(nn.ModuleList, [Inner() for _ in range(3)])
        assert_trains_alike(plain, place(plain), x)

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_of_the_whole_model(self, place: Place, x: torch.Tensor, reentrant: bool) -> None:
        plain = seeded(Net)
        model = place(plain)
        for net in (plain, model):
            given = x.detach().clone().requires_grad_()
            checkpoint(net, given, use_reentrant=reentrant).square().sum().backward()
        assert_same_gradients(plain, model)

    def test_still_saves_memory(self) -> None:
        """Our own way of saving tensors must not stand between a checkpoint and what it drops."""
        kept = {}
        for how in ("plainly", "checkpointed"):
            with simdev.devices([None]) as sim:
                model = placed(seeded(Net, layers=4, width=64), "cpu", main_device=0)
                x = torch.randn(64, 64, device="sim:0", requires_grad=True)
                for layer in model.layers:
                    x = checkpoint(layer, x, use_reentrant=False) if how == "checkpointed" else layer(x)
                kept[how] = sim.memory_allocated(0) - executor_of(model).machine.ring(torch.device("sim:0")).held
                del x, model, layer
                gc.collect()
        assert kept["checkpointed"] < 0.6 * kept["plainly"]

    @pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
    def test_hooks_of_others_for_saved_tensors_stay_in_charge(
        self, place: Place, x: torch.Tensor, frozen: bool
    ) -> None:
        plain = seeded(Net).requires_grad_(not frozen)
        model, slopes = place(plain), []
        for net in (plain, model):
            given = x.detach().clone().requires_grad_()
            with torch.autograd.graph.save_on_cpu():
                out = net(given)
            out.square().sum().backward()
            slopes.append(given.grad)
        assert same_bits(*slopes)
        assert_same_gradients(plain, model)

    def test_function_transforms_which_allow_no_such_hooks(self, x: torch.Tensor) -> None:
        plain, x = seeded(Net), x.detach()
        with simdev.devices([None]):
            for home, target in (("disk", "cpu"), ("cpu", 0)):
                model = placed(plain, home, target)
                for transform in (torch.func.grad, torch.func.jacrev):
                    expected, got = (transform(lambda given, net=net: net(given).sum())(x) for net in (plain, model))
                    assert same_bits(expected, got)
                assert same_bits(torch.func.vmap(model)(x[None]), torch.func.vmap(plain)(x[None]))
                assert_model_at_rest(model)


class TestWritesBetweenForwardAndBackward:
    @pytest.mark.parametrize(
        "write",
        [
            lambda w: w.mul_(2),
            lambda w: torch.optim.SGD([w], lr=0.1).step() if w.grad is not None else w.add_(1),
            lambda w: w.copy_(torch.zeros_like(w)),
        ],
        ids=["in place", "a step", "copied over"],
    )
    def test_are_an_error_as_for_a_plain_model(self, place: Place, x: torch.Tensor, write: Any) -> None:
        plain = seeded(Net)
        for net in (plain, place(plain)):
            net(x).sum().backward()
            out = net(x)
            with torch.no_grad():
                write(net.layers[1].up.weight)
            with pytest.raises(RuntimeError, match=r"in place|inplace"):
                out.sum().backward()

    def test_to_activations_are_an_error_as_for_a_plain_model(self, place: Place, x: torch.Tensor) -> None:
        class Careless(Layer):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                hidden = self.up(x)
                out = self.down(hidden)
                hidden.add_(1)
                return x + out

        plain = seeded(Net)
        plain.layers = seeded(nn.ModuleList, [Careless() for _ in range(3)])
        for net in (plain, place(plain)):
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                net(x).sum().backward()

    def test_of_weights_inside_the_forward_count(self, place: Place, x: torch.Tensor) -> None:
        """What backward needs is the weight as it was used, not as it rests in its file."""

        class Clamping(Layer):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                with torch.no_grad():
                    self.up.weight.mul_(0.5)
                return super().forward(x)

        plain = seeded(Net)
        plain.layers = seeded(nn.ModuleList, [Clamping() for _ in range(3)])
        model = place(plain)
        for _ in range(2):
            assert_trains_alike(plain, model, x)
        assert all(same_bits(t, plain.state_dict()[name]) for name, t in model.state_dict().items())

    def test_of_weights_after_their_use_are_an_error(self, place: Place, x: torch.Tensor) -> None:
        class Late(Layer):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                out = super().forward(x)
                with torch.no_grad():
                    self.up.weight.mul_(0.5)
                return out

        plain = seeded(Net)
        plain.layers = seeded(nn.ModuleList, [Late() for _ in range(3)])
        for net in (plain, place(plain)):
            with pytest.raises(RuntimeError, match=r"in place|inplace"):
                net(x).sum().backward()

    def test_name_the_weight(self, x: torch.Tensor) -> None:
        model = placed(seeded(Net), "disk")
        out = model(x)
        with torch.no_grad():
            model.layers[1].up.weight.zero_()
        with pytest.raises(OffloadedWeightError, match=r"'layers\.1\.up\.weight' of shape \(16, 8\) was changed"):
            out.sum().backward()


class TestOptimisers:
    @pytest.mark.parametrize(
        "make",
        [
            lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
            lambda ps: torch.optim.AdamW(ps, lr=0.1),
            lambda ps: torch.optim.Adam(ps, lr=0.1, foreach=True),
        ],
        ids=["SGD", "AdamW", "foreach"],
    )
    def test_train_the_model_as_the_plain_one(self, place: Place, x: torch.Tensor, make: Any) -> None:
        plain = seeded(Net).train()
        model = place(plain)
        for net in (plain, model):
            optimiser = make(net.parameters())
            for _ in range(3):
                optimiser.zero_grad()
                net(x).square().sum().backward()
                optimiser.step()
        for name, tensor in model.state_dict().items():
            assert same_bits(tensor, plain.state_dict()[name]), name
        with torch.no_grad():
            assert same_bits(model(x), plain(x))

    def test_leave_the_checkpoint_alone(self, x: torch.Tensor, tmp_path: Any) -> None:
        from . import from_disk

        model = from_disk(seeded(Net), tmp_path)
        before = (tmp_path / "model.safetensors").read_bytes()
        model(x).sum().backward()
        torch.optim.SGD(model.parameters(), lr=1.0).step()
        assert (tmp_path / "model.safetensors").read_bytes() == before


class TestModes:
    def test_gradients_enabled_inside_a_forward_without(self, place: Place, x: torch.Tensor) -> None:
        class Guided(Layer):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                with torch.enable_grad():
                    given = x.detach().requires_grad_()
                    (slope,) = torch.autograd.grad(super().forward(given).square().sum(), given)
                return slope

        plain = seeded(Net)
        plain.layers = seeded(nn.ModuleList, [Guided() for _ in range(3)])
        model = place(plain)
        with torch.no_grad():
            assert same_bits(model(x), plain(x))

    def test_a_graph_that_outlives_its_block_unguarded_is_right_or_an_error(
        self, place: Place, x: torch.Tensor
    ) -> None:
        """The block began without gradients, so nothing was prepared for what it keeps."""

        class Escaping(Layer):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                with torch.enable_grad():
                    self.given = x.detach().requires_grad_()
                    self.kept = super().forward(self.given)
                return self.kept.detach()

        plain = seeded(Net)
        plain.layers = seeded(nn.ModuleList, [Escaping() for _ in range(3)])
        model = place(plain.requires_grad_(False))
        with torch.no_grad():
            assert same_bits(model(x), plain(x))
        for one, other in zip(plain.layers, model.layers, strict=True):
            (expected,) = torch.autograd.grad(one.kept.sum(), one.given)
            try:
                (slope,) = torch.autograd.grad(other.kept.sum(), other.given)
            except RuntimeError as error:
                assert "same device" in str(error)
            else:
                assert same_bits(slope, expected)

    def test_inference_between_forward_and_backward(self, place: Place, x: torch.Tensor) -> None:
        plain = seeded(Net)
        model = place(plain)
        for net in (plain, model):
            out = net(x)
            with torch.no_grad():
                net(2 * x)
            with torch.inference_mode():
                net(3 * x)
            out.square().sum().backward()
        assert_same_gradients(plain, model)

    def test_a_custom_function_that_keeps_a_weight_in_its_own_way(self, place: Place, x: torch.Tensor) -> None:
        class Times(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
                ctx.weight = weight.detach()
                ctx.save_for_backward(x, weight)
                return x @ weight

            @staticmethod
            def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
                x, weight = ctx.saved_tensors
                assert torch.equal(weight, ctx.weight)
                return gradient @ ctx.weight.t(), x.t() @ gradient

        class Custom(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.lin = nn.Linear(8, 8)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return Times.apply(x, self.lin.weight) + self.lin.bias

        plain = seeded(Net)
        plain.layers = seeded(nn.ModuleList, [Custom() for _ in range(3)])
        assert_trains_alike(plain, place(plain), x)

    def test_hooks_on_weights_and_modules_fire(self, place: Place, x: torch.Tensor) -> None:
        plain = seeded(Net)
        seen: list[dict[str, torch.Tensor]] = []
        for net in (plain, place(plain)):
            calls: dict[str, torch.Tensor] = {}
            net.layers[1].up.weight.register_hook(lambda g, to=calls: to.update(weight=g.cpu().clone()))
            net.layers[2].down.weight.register_post_accumulate_grad_hook(
                lambda p, to=calls: to.update(accumulated=p.grad.cpu().clone())
            )
            net.layers[0].register_full_backward_hook(lambda m, i, o, to=calls: to.update(module=o[0].cpu().clone()))
            net(x).square().sum().backward()
            seen.append(calls)
        assert len(seen[0]) == 3 and all(same_bits(seen[0][name], seen[1][name]) for name in seen[0])


class TestMemory:
    def test_weights_do_not_stay_on_the_device_for_backward(self) -> None:
        plain = seeded(Net, layers=8, width=64)
        with simdev.devices([None]) as sim:
            model = placed(plain, "cpu", main_device=0)
            x = torch.randn(2, 64, device="sim:0")
            out = model(x)
            block = sum(p.numel() * 4 for p in model.layers[0].parameters())
            assert sim.memory_allocated(0) < 3 * block  # a ring of two
            sim.reset_peak_memory_stats(0)
            out.sum().backward()
            assert sim.max_memory_allocated(0) < 4 * block

    def test_a_graph_that_is_dropped_frees_everything(self, x: torch.Tensor) -> None:
        with simdev.devices([None]) as sim:
            model = placed(seeded(Net), "cpu", main_device=0)
            model(x)
            held = sim.memory_allocated(0)
            for _ in range(3):
                model(x)
            assert sim.memory_allocated(0) == held

    def test_mixed_precision_keeps_no_casts_of_weights_that_left(self) -> None:
        """Autocast remembers what it cast until its context ends: that would be the whole model."""
        with simdev.devices([None]) as sim, torch.no_grad():
            model = placed(seeded(Net, layers=8, width=64), "cpu", main_device=0)
            x = torch.randn(2, 64, device="sim:0")
            model(x)
            held = sim.memory_allocated(0)
            with torch.autocast("sim", torch.bfloat16):
                model(x)
                assert sim.memory_allocated(0) < held + 4096


class TestThreads:
    def test_training_beside_inference_is_right_or_refused(self) -> None:
        plain = seeded(Net)
        x = torch.randn(2, 8)
        reference = copy.deepcopy(plain)
        with simdev.devices([None]):
            model = placed(plain, "cpu", main_device=0)
            expected, stop, errors = plain(x).detach(), threading.Event(), []

            def infer() -> None:
                while not stop.is_set():
                    with torch.no_grad():
                        if not same_bits(model(x), expected):
                            errors.append("wrong")

            thread = threading.Thread(target=infer, daemon=True)
            thread.start()
            trained = 0
            for _ in range(20):
                try:
                    model.zero_grad()
                    model(x).square().sum().backward()
                    trained += 1
                except OffloadedWeightError:
                    continue
                reference.zero_grad()
                reference(x).square().sum().backward()
                assert_same_gradients(reference, model)
            stop.set()
            thread.join(20)
            assert not thread.is_alive() and not errors and trained
            assert_model_at_rest(model)


class Attending(nn.Module):
    """Layers that read their children's weights themselves, on fast paths of their own."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.layers = nn.ModuleList(self._layer() for _ in range(2))
        self.last = nn.Linear(8, 3)

    def _layer(self) -> nn.Module:
        if self.kind == "encoder":
            return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        if self.kind == "attention":
            return nn.MultiheadAttention(8, 2, batch_first=True)
        return nn.LSTM(8, 8, batch_first=True) if self.kind == "lstm" else nn.GRU(8, 8, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            out = layer(x, x, x) if self.kind == "attention" else layer(x)
            x = out[0] if isinstance(out, tuple) else out
        return self.last(x)


@pytest.mark.parametrize("kind", ["encoder", "attention", "lstm", "gru"])
@pytest.mark.parametrize("cut", [False, True], ids=["in blocks", "in leaves"])
def test_layers_with_fast_paths(kind: str, cut: bool, place: Place, request: pytest.FixtureRequest) -> None:
    if kind in ("lstm", "gru") and request.node.callspec.params["place"] != "disk":
        pytest.skip("the simulated accelerator has no recurrent layers")
    plain = seeded(Attending, kind)
    plain._no_split_modules = ["Nothing"] if cut else None
    model = place(plain)
    x = torch.randn(2, 3, 8)
    for train in (True, False):
        plain.train(train), model.train(train)
        assert_trains_alike(plain, model, x)
        with torch.no_grad():
            assert same_bits(model(x), plain(x))
    assert values(plain.state_dict()).keys() == model.state_dict().keys()
