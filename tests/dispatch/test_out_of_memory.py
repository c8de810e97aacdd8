"""An accelerator that runs out of memory in a forward: weights make room, and nothing is computed wrongly."""

from __future__ import annotations

import copy
import io
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import hf_bigload
from hf_bigload import flow
from hf_bigload.demotion import shortage
from hf_bigload.dispatch import attach
from hf_bigload.dispatch.attach import attachment_of
from hf_bigload.dispatch.rescue import Gate, gate_of, untouched
from hf_bigload.loaders.transformers_caches import remember
from tests import simdev

from . import Net, from_disk, same_bits, seeded

WIDTH = 64
SMALL: dict[str, Any] = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def plain() -> nn.Module:
    return seeded(Net, layers=6, width=WIDTH)


def nbytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def resident(plain: nn.Module, folder: Path, **options: Any) -> Any:
    """All on sim:0, by "auto"."""
    memory = {0: 2 * nbytes(plain), "cpu": 2 * nbytes(plain)}
    return from_disk(plain, folder, **({"device_map": "auto", "max_memory": memory} | options))


def notes(error: BaseException) -> str:
    return "\n".join([str(error), *getattr(error, "__notes__", ())])


class TestTheWrapper:
    def test_is_all_that_a_resident_model_on_an_accelerator_carries(self, plain: nn.Module, tmp_path: Path) -> None:
        with simdev.devices([None]):
            model = resident(plain, tmp_path)
            assert attachment_of(model) is None and "forward" in vars(model)
            assert not any("_hf_hook" in vars(module) for module in model.modules())

    def test_is_not_there_on_the_cpu_nor_by_a_map_nor_where_it_is_switched_off(
        self, plain: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with simdev.devices([None]):
            on_cpu = from_disk(plain, tmp_path, device_map="auto", max_memory={"cpu": 2 * nbytes(plain)})
            by_map = from_disk(plain, tmp_path, device_map={"": 0})
            with hf_bigload.enable(demote_on_oom=False):
                off = resident(plain, tmp_path)
            monkeypatch.setenv("HF_BIGLOAD_DEMOTE_ON_OOM", "0")
            off_by_variable = resident(plain, tmp_path)
        assert not any("forward" in vars(model) for model in (on_cpu, by_map, off, off_by_variable))

    def test_goes_with_the_plan(self, plain: nn.Module, tmp_path: Path) -> None:
        with simdev.devices([None]):
            model = resident(plain, tmp_path)
            hf_bigload.inspect(model).close()
            assert "forward" not in vars(model)

    def test_of_a_copied_or_pickled_model_is_nobodys(self, plain: nn.Module, tmp_path: Path) -> None:
        x = torch.randn(2, WIDTH)
        with simdev.devices([None]) as sim:
            model = resident(plain, tmp_path)
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
                assert same_bits(other(x.to("sim:0")), plain(x))
                with torch.no_grad():
                    other.last.weight.zero_()
                assert not same_bits(other(x.to("sim:0")), plain(x)) and same_bits(model(x.to("sim:0")), plain(x))
                sim.set_capacity(0, sim.memory_allocated(0))
                with pytest.raises(torch.OutOfMemoryError):
                    other(x.repeat(1000, 1).to("sim:0", copy=True))
                sim.set_capacity(0, None)

    def test_is_transparent_to_the_compiler(self, plain: nn.Module, tmp_path: Path) -> None:
        x = torch.randn(2, WIDTH)
        with simdev.devices([None]):
            model = resident(plain, tmp_path)
            graphs: list[Any] = []
            torch.compiler.reset()
            compiled = torch.compile(
                model, backend=lambda graph, _inputs: graphs.append(graph) or graph.forward, fullgraph=True
            )
            assert same_bits(compiled(x.to("sim:0")), plain(x)) and len(graphs) == 1


class TestAForward:
    @pytest.mark.parametrize("ram", [2.0, 0.5, None], ids=["RAM", "RAM and disk", "disk"])
    def test_goes_on_over_demoted_weights(
        self, ram: float | None, plain: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        x = torch.randn(300, WIDTH)
        need = 300 * WIDTH * 4 * 5
        memory = {0: 2 * nbytes(plain)} | ({} if ram is None else {"cpu": int(ram * nbytes(plain))})
        with simdev.devices([None]) as sim, caplog.at_level(logging.WARNING):
            model = resident(plain, tmp_path, max_memory=memory)
            given = x.to("sim:0")
            before = dict(model.named_parameters())
            sim.set_capacity(0, sim.memory_allocated(0) + need // 3)
            assert same_bits(model(given), plain(x))
            assert same_bits(model(given), plain(x))
            plan = hf_bigload.inspect(model).plan
            assert plan.streams and all(p.device == "sim:0" or p.at_home for p in plan.placements)
            assert model.hf_device_map == plan.device_map
            assert plan.used.get("cpu", 0) <= memory.get("cpu", plan.ring.get("cpu", 0))
            assert all(parameter is before[name] for name, parameter in model.named_parameters())
        assert "ran out of memory" in caplog.text and "demoted" in caplog.text

    def test_of_a_model_that_streams_already_demotes_more(self, plain: nn.Module, tmp_path: Path) -> None:
        x = torch.randn(100, WIDTH)
        with simdev.devices([None]) as sim:
            model = resident(plain, tmp_path, max_memory={0: int(0.8 * nbytes(plain)), "cpu": 2 * nbytes(plain)})
            assert same_bits(model(x[:2]), plain(x[:2]))
            used = hf_bigload.inspect(model).plan.used["sim:0"]
            given = x.to("sim:0")
            sim.set_capacity(0, sim.memory_allocated(0) + 100 * WIDTH * 4)
            assert same_bits(model(given), plain(x))
            assert hf_bigload.inspect(model).plan.used["sim:0"] < used

    def test_draws_the_same_random_numbers(self, tmp_path: Path) -> None:
        class Noisy(Net):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                x = self.first(x)
                for layer in self.layers:
                    x = layer(x + torch.rand(1).to(x.device))
                return self.last(self.norm(x))

        plain = seeded(Noisy, layers=6, width=WIDTH)
        x = torch.randn(300, WIDTH)
        with simdev.devices([None]) as sim:
            model = resident(plain, tmp_path)
            given = x.to("sim:0")
            sim.set_capacity(0, sim.memory_allocated(0) + 300 * WIDTH * 4 * 2)
            torch.manual_seed(3)
            expected = plain(x), torch.rand(1)
            torch.manual_seed(3)
            assert same_bits(model(given), expected[0]) and same_bits(torch.rand(1), expected[1])
            assert hf_bigload.inspect(model).plan.streams

    @pytest.mark.parametrize("why", ["in training mode", "gradients were recorded", "cannot be set back"])
    def test_that_may_have_left_traces_is_not_repeated(self, why: str, plain: nn.Module, tmp_path: Path) -> None:
        x = torch.randn(300, WIDTH)
        calls = []
        with simdev.devices([None]) as sim:
            model = resident(plain, tmp_path)
            given = x.to("sim:0")
            model.first.register_forward_pre_hook(lambda *_: calls.append(1))
            if why == "in training mode":
                model.train()
            if why == "cannot be set back":
                handle = model.first.register_forward_pre_hook(lambda _m, args: args[0].add_(0))
            sim.set_capacity(0, sim.memory_allocated(0) + 300 * WIDTH * 4 * 2)
            with torch.set_grad_enabled(why == "gradients were recorded"):
                with pytest.raises(torch.OutOfMemoryError) as raised:
                    model(given)
                assert len(calls) == 1
                assert why in notes(raised.value) and "were demoted from sim:0 to cpu" in notes(raised.value)
            if why == "cannot be set back":
                handle.remove()
            model.eval()
            with torch.no_grad():
                assert same_bits(model(given), plain(x))  # "call it again: there is more room now"

    @pytest.mark.parametrize("made_inside", [False, True])
    def test_in_inference_mode_is_repeated_if_its_inputs_were_made_outside(
        self, made_inside: bool, plain: nn.Module, tmp_path: Path
    ) -> None:
        x = torch.randn(300, WIDTH)
        with simdev.devices([None]) as sim:
            model = resident(plain, tmp_path)
            with torch.inference_mode(made_inside):
                given = x.to("sim:0")
            sim.set_capacity(0, sim.memory_allocated(0) + 300 * WIDTH * 4 * 2)
            with torch.inference_mode():
                if made_inside:
                    with pytest.raises(torch.OutOfMemoryError) as raised:
                        model(given)
                    assert "cannot be set back" in notes(raised.value)
                    sim.set_capacity(0, None)
                assert same_bits(model(given), plain(x))

    def test_that_could_never_fit_says_so(self, plain: nn.Module, tmp_path: Path) -> None:
        x = torch.randn(3000, WIDTH)
        with simdev.devices([None]) as sim:
            model = resident(plain, tmp_path)
            given = x.to("sim:0")
            sim.set_capacity(0, sim.memory_allocated(0) + 3000 * WIDTH)
            with pytest.raises(torch.OutOfMemoryError) as raised:
                model(given)
            assert "No weights were demoted" in notes(raised.value)
            sim.set_capacity(0, None)
            assert same_bits(model(given), plain(x))

    def test_on_two_devices_keeps_computing_where_it_did(self, plain: nn.Module, tmp_path: Path) -> None:
        x = torch.randn(100, WIDTH)
        with simdev.devices([None, None]) as sim:
            memory = {0: int(0.6 * nbytes(plain)), 1: int(0.6 * nbytes(plain)), "cpu": 2 * nbytes(plain)}
            model = resident(plain, tmp_path, max_memory=memory)
            devices = {p.block.name: p.device for p in hf_bigload.inspect(model).plan.placements}
            assert set(devices.values()) == {"sim:0", "sim:1"}
            given = x.to("sim:0")
            sim.set_capacity(1, sim.memory_allocated(1) + 100 * WIDTH * 4 * 2)
            assert same_bits(model(given), plain(x))
            plan = hf_bigload.inspect(model).plan
            assert {p.block.name: p.device for p in plan.placements} == devices
            assert {p.home for p in plan.placements if p.device == "sim:0"} == {"sim:0"}

    def test_goes_on_where_the_settings_have_changed_since_the_load(
        self, plain: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        x = torch.randn(300, WIDTH)
        monkeypatch.setenv("HF_BIGLOAD_DEMOTE_ON_OOM", "0")
        with simdev.devices([None]) as sim:
            with hf_bigload.enable(demote_on_oom=True):
                model = resident(plain, tmp_path)
            given = x.to("sim:0")
            sim.set_capacity(0, sim.memory_allocated(0) + 300 * WIDTH * 4 * 2)
            assert same_bits(model(given), plain(x))
            assert hf_bigload.inspect(model).plan.streams and "forward" in vars(model)


class TestOtherThreads:
    @pytest.mark.parametrize("device_map", ["auto", {"": "cpu", "first": 0}])
    def test_wait_outside_while_weights_move(
        self, device_map: Any, plain: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Also where the plan that comes has no wrapper."""
        x = torch.randn(3, WIDTH)
        results: list[torch.Tensor] = []
        with simdev.devices([None]), ThreadPoolExecutor(1) as pool:
            model = resident(plain, tmp_path)
            given = x.to("sim:0")
            others: list[Future[None]] = []

            def suspend(model: nn.Module) -> Any:
                others.append(pool.submit(lambda: results.append(model(given))))
                wait_until(lambda: bool(gate_of(model).held_back()))
                assert not results
                return attach.suspend(model)

            monkeypatch.setattr(flow, "suspend", suspend)
            memory = {0: int(0.6 * nbytes(plain)), "cpu": 2 * nbytes(plain)}
            hf_bigload.inspect(model).replan(max_memory=memory, device_map=device_map)
            others[0].result()
            assert same_bits(results[0], plain(x)) and not gate_of(model).held_back()

    def test_inside_keep_the_weights_where_they_are(self, plain: nn.Module, tmp_path: Path) -> None:
        inside, go_on = threading.Event(), threading.Event()
        small, large = torch.randn(3, WIDTH), torch.randn(300, WIDTH)
        with simdev.devices([None]) as sim, ThreadPoolExecutor(1) as pool:
            model = resident(plain, tmp_path)

            def stay(_: nn.Module, args: Any) -> None:
                if len(args[0]) == 3:
                    inside.set()
                    go_on.wait(30)

            model.layers[2].register_forward_pre_hook(stay)
            given = small.to("sim:0"), large.to("sim:0")
            other = pool.submit(model, given[0])
            try:
                assert inside.wait(30)
                sim.set_capacity(0, sim.memory_allocated(0) + 300 * WIDTH * 4 * 2)
                with pytest.raises(torch.OutOfMemoryError) as raised:
                    model(given[1])
                assert "another thread is inside" in notes(raised.value)
            finally:
                sim.set_capacity(0, None)
                go_on.set()
            assert same_bits(other.result(), plain(small)) and same_bits(model(given[1]), plain(large))
            assert not hf_bigload.inspect(model).plan.streams


def test_a_forward_around_the_one_that_runs_out_of_memory_keeps_its_weights(tmp_path: Path) -> None:
    calls: list[str] = []

    class Twice(Net):
        def forward(self, x: torch.Tensor, again: bool = True) -> torch.Tensor:
            calls.append("outer" if again else "inner")
            if again:
                self(x, again=False)
            return super().forward(x)

    plain, x = seeded(Twice, layers=6, width=WIDTH), torch.randn(300, WIDTH)
    with simdev.devices([None]) as sim:
        model = resident(plain, tmp_path)
        given = x.to("sim:0")
        sim.set_capacity(0, sim.memory_allocated(0) + 300 * WIDTH * 4 * 2)
        assert same_bits(model(given), plain(x)) and hf_bigload.inspect(model).plan.streams
    assert calls[:3] == ["outer", "inner", "outer"]  # not the inner one again, over weights that left the outer one


def test_a_child_process_does_not_wait_for_its_parents_threads() -> None:
    gate, moving, go_on = Gate(), threading.Event(), threading.Event()

    def move() -> None:
        with gate.closed():
            moving.set()
            go_on.wait(30)

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(move)
        assert moving.wait(30)
        with gate.closed() as inside:
            assert len(inside) == 1
        gate.after_fork()
        with gate.closed() as inside:
            assert not inside
        go_on.set()
        other.result()


def wait_until(happened: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not happened() and time.monotonic() < until:
        time.sleep(0.001)
    assert happened()


def test_what_an_allocator_asked_for_is_read_from_its_error() -> None:
    from hf_bigload.specs import Plan

    plan = Plan((), {}, "cuda:0", {}, {"cuda:0": 0, "cuda:1": 0}, {})
    told = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 1 has a total capacity of 15.77 GiB of which"
    assert shortage(plan, told) == ("cuda:1", 2 * 20 * 2**20)
    assert shortage(plan, "out of memory") == ("cuda:0", 0)


# ---------------------------------------------------------------- caches


def language_model(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "window":
        config = MistralConfig(**SMALL, num_hidden_layers=6, num_key_value_heads=4, sliding_window=24)
        return MistralForCausalLM(config).eval()
    return LlamaForCausalLM(LlamaConfig(**SMALL, num_hidden_layers=6, num_key_value_heads=4)).eval()


def loaded(plain: Any, folder: Path) -> Any:
    plain.save_pretrained(folder)
    with hf_bigload.enable():
        return type(plain).from_pretrained(
            folder, device_map="auto", max_memory={0: 2 * nbytes(plain), "cpu": 2 * nbytes(plain)}
        )


class TestGenerate:
    @pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 3}], ids=["greedy", "sampled", "beams"])
    def test_goes_on_when_its_cache_has_filled_the_device(
        self, options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        plain = language_model("full")
        prompt = torch.arange(40)[None] % 64
        options = {"max_new_tokens": 150, "min_new_tokens": 150, "pad_token_id": 0, **options}
        torch.manual_seed(5)
        expected = plain.generate(prompt, **options)
        with simdev.devices([None], hide_others=True) as sim:
            model = loaded(plain, tmp_path)
            sim.set_capacity(0, sim.memory_allocated(0) + 6 * 2 * 64 * 4 * 130 * options.get("num_beams", 1))
            torch.manual_seed(5)
            with caplog.at_level(logging.WARNING):
                assert torch.equal(model.generate(prompt.to("sim:0"), **options).cpu(), expected)
            assert hf_bigload.inspect(model).plan.streams
        assert "ran out of memory" in caplog.text

    def test_over_a_cache_that_cannot_be_set_back_is_raised_and_then_works(self, tmp_path: Path) -> None:
        plain = language_model("full")
        prompt = torch.arange(40)[None] % 64
        options = {"max_new_tokens": 60, "min_new_tokens": 60, "pad_token_id": 0, "cache_implementation": "static"}
        expected = plain.generate(prompt, **options)
        with simdev.devices([None], hide_others=True) as sim:
            model = loaded(plain, tmp_path)
            full = sim.memory_allocated(0)
            sim.set_capacity(0, full + 6 * 2 * 64 * 4 * 100 + 10_000)
            with pytest.raises(torch.OutOfMemoryError) as raised:
                model.generate(prompt.to("sim:0"), **options)
            assert "generate(), again" in notes(raised.value)
            del raised
            assert torch.equal(model.generate(prompt.to("sim:0"), **options).cpu(), expected)


class TestCaches:
    """A cache that a forward has half filled, set back: then the forward gives the same as over the untouched one."""

    @pytest.mark.parametrize(("kind", "prompt"), [("full", 10), ("full", 0), ("window", 10), ("window", 0)])
    @pytest.mark.parametrize("fails_at", [0, 3, 5])
    def test_is_set_back_exactly(self, kind: str, prompt: int, fails_at: int) -> None:
        model = language_model(kind)
        cache, reference = DynamicCache(config=model.config), DynamicCache(config=model.config)
        tokens = torch.arange(30)[None]
        for each in (cache, reference) if prompt else ():
            model(tokens[:, :prompt], past_key_values=each)
        restore = remember(cache)
        assert restore is not None
        interrupted(model, fails_at, tokens[:, prompt : prompt + 4], cache)
        assert restore()
        assert cache.get_seq_length() == prompt
        got = model(tokens[:, prompt : prompt + 4], past_key_values=cache).logits
        assert same_bits(got, model(tokens[:, prompt : prompt + 4], past_key_values=reference).logits)

    def test_whose_window_moved_on_is_not(self) -> None:
        model = language_model("window")
        cache = DynamicCache(config=model.config)
        model(torch.arange(30)[None], past_key_values=cache)
        restore = remember(cache)
        assert restore is not None
        interrupted(model, 3, torch.arange(4)[None], cache)
        assert not restore()

    def test_keeps_no_tensor_alive(self) -> None:
        import weakref

        model = language_model("full")
        cache = DynamicCache(config=model.config)
        model(torch.arange(10)[None], past_key_values=cache)
        keys = weakref.ref(cache.layers[0].keys)
        restore, same = remember(cache), untouched(cache)
        model(torch.arange(4)[None], past_key_values=cache)
        assert keys() is None
        assert restore is not None and restore() and not same()

    def test_that_nobody_knows_is_known_to_be_untouched_or_not(self) -> None:
        class Cache:
            def __init__(self) -> None:
                self.states, self.lengths = [torch.zeros(3)], {"a": 1}

        for touch in (
            lambda cache: cache.states[0].add_(1),
            lambda cache: cache.states.append(torch.zeros(1)),
            lambda cache: cache.states.__setitem__(0, torch.zeros(3)),
            lambda cache: cache.lengths.update(a=2),
            lambda cache: setattr(cache, "lengths", {"a": 1}),
        ):
            cache = Cache()
            same = untouched(cache)
            assert same()
            touch(cache)
            assert not same()


def test_a_generator_that_a_forward_draws_from_is_set_back() -> None:
    generator = torch.Generator().manual_seed(3)
    restore = untouched({"generator": generator, "how": torch.relu})
    first = torch.rand(2, generator=generator)
    assert restore() and same_bits(torch.rand(2, generator=generator), first)


def interrupted(model: Any, layer: int, tokens: torch.Tensor, cache: Any) -> None:
    """A forward that ends after `layer` has updated the cache."""

    def stop(*_: Any) -> None:
        raise torch.OutOfMemoryError("stop")

    handle = model.model.layers[layer].mlp.register_forward_pre_hook(stop)
    with pytest.raises(torch.OutOfMemoryError):
        model(tokens, past_key_values=cache)
    handle.remove()
