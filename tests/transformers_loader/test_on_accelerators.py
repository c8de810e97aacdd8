"""With accelerators, here simulated ones with the CPU's arithmetic: the same model, whatever rests where."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, Trainer, TrainingArguments, pipeline

import hf_bigload
from hf_bigload.dispatch.attach import attachment_of
from hf_bigload.errors import DoesNotFitError
from tests import simdev

from .models import (
    CONFIGS,
    Saved,
    all_tensors,
    assert_same_weights,
    forward,
    generate,
    prompt,
    same,
    save_tokenizer,
)

QUICK = ("llama", "t5")
NAMES = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS if name not in QUICK)]
ROOM = 1 << 20
"""Bytes beside the weights, for activations and caches."""


@pytest.fixture(autouse=True, scope="module")
def sim() -> Any:
    return simdev.load()


@pytest.fixture(autouse=True)
def enabled() -> None:
    """For the whole test; `disable` comes by itself."""
    hf_bigload.enable()


@pytest.fixture
def one() -> Iterator[None]:
    with simdev.devices([None], hide_others=True), simdev.asynchronous():
        yield


@pytest.fixture
def two() -> Iterator[None]:
    with simdev.devices([None, None], hide_others=True), simdev.asynchronous():
        yield


def assert_same_on(device: Any, model: Any, expected: Any) -> None:
    assert same(forward(model, device), forward(expected))
    if attachment_of(model) is not None:  # else a plain model, which expects its inputs where it is
        assert same(forward(model), forward(expected))
    assert_same_weights_anywhere(model, expected)


def assert_same_weights_anywhere(model: Any, expected: Any) -> None:
    found = model.state_dict()
    assert [name for name, tensor in expected.state_dict().items() if not same(found[name].cpu(), tensor)] == []
    assert not any(tensor.is_meta for _, tensor in all_tensors(model))


EAGER: dict[str, dict[str, Any]] = {"mixtral": {"experts_implementation": "eager"}}
"""The library's fused experts are of a dtype on accelerators for which the CPU's arithmetic has no kernel."""


def budgets(saved: Saved, *fractions: float, cpu: float = 10.0) -> dict[int | str, int]:
    return {**{i: int(f * saved.nbytes) for i, f in enumerate(fractions)}, "cpu": int(cpu * saved.nbytes)}


# ---------------------------------------------------------------- where things go

PLACED: dict[str, tuple[tuple[float, ...], float]] = {
    "all on one": ((2.0,), 10.0),
    "one and RAM": ((0.5,), 10.0),
    "one, RAM and disk": ((0.5,), 0.45),
    "two": ((0.7, 0.7), 10.0),
    "two and RAM": ((0.4, 0.3), 10.0),
    "two, RAM and disk": ((0.4, 0.2), 0.45),
}


@pytest.mark.parametrize(("fractions", "cpu"), PLACED.values(), ids=PLACED)
@pytest.mark.parametrize("name", NAMES)
def test_auto(name: str, fractions: tuple[float, ...], cpu: float, saved: Any, plain: Any) -> None:
    allowed, expected = budgets(saved(name), *fractions, cpu=cpu), plain(name, **EAGER.get(name, {}))
    capacities = [allowed[i] + ROOM for i in range(len(fractions))]
    with simdev.devices(capacities, hide_others=True), simdev.asynchronous():
        model = saved(name).load(device_map="auto", max_memory=allowed, **EAGER.get(name, {}))
        for i in range(len(fractions)):
            assert torch.sim.memory_allocated(i) <= allowed[i]
        homes = set(model.hf_device_map.values())
        assert homes >= {*range(len(fractions))}
        assert bool(homes & {"cpu", "disk"}) == (sum(fractions) < 1)
        assert ("disk" in homes) == (cpu < 1)
        assert model.device == torch.device("sim:0")
        assert_same_on("sim:0", model, expected)
        assert same(generate(model, "sim:0"), generate(expected))


STRATEGIES = ["auto", "balanced", "balanced_low_0", "sequential"]


@pytest.mark.parametrize("device_map", STRATEGIES)
def test_strategies(device_map: str, llama: Saved, plain: Any, two: None) -> None:
    model = llama.load(device_map=device_map, max_memory=budgets(llama, 0.8, 0.8))
    shares = [torch.sim.memory_allocated(i) / llama.nbytes for i in range(2)]
    if device_map in ("auto", "balanced"):
        assert abs(shares[0] - shares[1]) < 0.25
    elif device_map == "balanced_low_0":
        assert shares[0] < shares[1]
    else:
        assert shares[0] > 0.6
    assert_same_on("sim:0", model, plain("llama"))
    assert same(generate(model, "sim:0", cache_implementation="static"), generate(plain("llama")))


@pytest.mark.parametrize("device_map", [1, "sim:1", "a torch.device", {"": 1}, {"": "sim:1"}], ids=str)
def test_a_device(device_map: Any, llama: Saved, plain: Any, two: None) -> None:
    if device_map == "a torch.device":
        device_map = torch.device("sim", 1)
    model = llama.load(device_map=device_map)
    assert model.device == torch.device("sim:1")
    assert {tensor.device for _, tensor in all_tensors(model)} == {torch.device("sim:1")}
    assert attachment_of(model) is None
    assert getattr(model, "hf_device_map", None) == ({"": 1} if isinstance(device_map, dict) else None)
    assert same(forward(model, "sim:1"), forward(plain("llama")))
    assert_same_weights_anywhere(model, plain("llama"))


MAPS: dict[str, dict[str, Any]] = {
    "two devices": {"model": 0, "lm_head": 1},
    "device, RAM and disk": {"": 0, "model.layers.1": "cpu", "model.layers.3": "disk", "lm_head.weight": "cpu"},
    "only the head": {"": "cpu", "lm_head": 0},
    "only the embedding": {"": "disk", "model.embed_tokens": 1},
    "back and forth": {"": 0, "model.layers.1": 1, "model.layers.3.mlp": 1, "model.layers.4.mlp.up_proj.weight": 1},
}


@pytest.mark.parametrize("device_map", MAPS.values(), ids=MAPS)
def test_a_map(device_map: dict[str, Any], llama: Saved, plain: Any, two: None) -> None:
    model = llama.load(device_map=device_map)
    assert model.device.type == "sim"
    assert torch.device("sim", next(iter(model.hf_device_map.values()))) == model.device
    assert_same_on(model.device, model, plain("llama"))
    assert same(generate(model, model.device), generate(plain("llama")))


@pytest.mark.parametrize("name", NAMES)
def test_16_bit(name: str, saved: Any, plain: Any, one: None) -> None:
    options = {"dtype": torch.float16, **EAGER.get(name, {})}
    model = saved(name).load(device_map="auto", max_memory=budgets(saved(name), 0.2, cpu=0.2), **options)
    assert {0, "disk"} <= set(model.hf_device_map.values())
    assert_same_on("sim:0", model, plain(name, **options))


# ---------------------------------------------------------------- a default device


def test_a_default_device_is_a_device_map(llama: Saved, plain: Any, two: None) -> None:
    with torch.device("sim:1"):
        model = llama.load()
    assert model.device == torch.device("sim:1")
    assert not hasattr(model, "hf_device_map")
    assert same(forward(model, "sim:1"), forward(plain("llama")))


def test_a_default_device_for_the_process(llama: Saved, plain: Any, two: None) -> None:
    torch.set_default_device("sim:1")
    try:
        model = llama.load()
    finally:
        torch.set_default_device(None)
    assert model.device == torch.device("sim:1")
    assert same(forward(model, "sim:1"), forward(plain("llama")))


# ---------------------------------------------------------------- generating

GENERATED: dict[str, dict[str, Any]] = {
    "sampled": {"do_sample": True, "top_k": 10},
    "beams": {"num_beams": 3},
    "static cache": {"cache_implementation": "static"},
}


@pytest.mark.parametrize("options", GENERATED.values(), ids=GENERATED)
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_generate(name: str, options: dict[str, Any], saved: Any, plain: Any, two: None) -> None:
    model = saved(name).load(device_map="auto", max_memory=budgets(saved(name), 0.4, 0.3))
    assert same(generate(model, "sim:0", **options), generate(plain(name), **options))


def test_the_pipeline(llama: Saved, tmp_path: Path, one: None) -> None:
    save_tokenizer(tmp_path)
    model, expected = llama.load(device_map="auto", max_memory=budgets(llama, 0.5)), llama.plain()
    options = {"max_new_tokens": 5, "do_sample": False}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    said = [
        pipeline("text-generation", model=each, tokenizer=tokenizer, **device)("w5 w6", **options)
        for each, device in ((model, {}), (expected, {"device": "cpu"}))
    ]
    assert said[0] == said[1]


# ---------------------------------------------------------------- moves


@pytest.fixture
def offloaded(llama: Saved, two: None) -> Any:
    return llama.load(device_map="auto", max_memory=budgets(llama, 0.4, 0.2, cpu=0.4))


@pytest.mark.parametrize("target", ["cpu", "sim:0", "sim:1"])
def test_a_model_moves_whole(target: str, offloaded: Any, plain: Any) -> None:
    forward(offloaded, "sim:0")
    assert offloaded.to(target) is offloaded
    assert {tensor.device for _, tensor in all_tensors(offloaded)} == {torch.device(target)}
    assert offloaded.device == torch.device(target)
    assert attachment_of(offloaded) is None
    assert same(forward(offloaded, target), forward(plain("llama")))
    assert same(generate(offloaded, target), generate(plain("llama")))


def test_a_move_that_does_not_fit_moves_nothing(llama: Saved, plain: Any) -> None:
    allowed = budgets(llama, 0.5)
    with simdev.devices([allowed[0] + 100_000], hide_others=True):
        model = llama.load(device_map="auto", max_memory=allowed)
        before = [(name, tensor.device, tensor.data_ptr()) for name, tensor in all_tensors(model)]
        with pytest.raises(DoesNotFitError, match="cannot move to sim:0"):
            model.to("sim:0")
        assert [(name, tensor.device, tensor.data_ptr()) for name, tensor in all_tensors(model)] == before
        assert same(forward(model, "sim:0"), forward(plain("llama")))


def test_a_cast_keeps_every_weight_where_it_rests(offloaded: Any, llama: Saved) -> None:
    homes = [tensor.device for tensor in offloaded.parameters()]
    offloaded.half()
    assert [tensor.device for tensor in offloaded.parameters()] == homes
    assert same(forward(offloaded, "sim:0"), forward(llama.plain().half()))


def test_a_deep_copy_is_independent(offloaded: Any, plain: Any) -> None:
    copied = copy.deepcopy(offloaded)
    with torch.no_grad():
        for parameter in offloaded.parameters():
            parameter.zero_()
    del offloaded
    assert_same_on("sim:0", copied, plain("llama"))


def test_a_pickled_model_comes_back(offloaded: Any, plain: Any) -> None:
    buffer = io.BytesIO()
    torch.save(offloaded, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False).to("cpu")
    assert_same_weights(again, plain("llama"))
    assert same(forward(again), forward(plain("llama")))


# ---------------------------------------------------------------- writing and training


@pytest.mark.parametrize("run_before", [True, False])
def test_writes_are_kept(run_before: bool, offloaded: Any, llama: Saved) -> None:
    expected = llama.plain()
    if run_before:
        forward(offloaded, "sim:0")
    for each in (offloaded, expected):
        with torch.no_grad():
            for number, parameter in enumerate(each.parameters()):
                if number % 3 == 0:
                    parameter.mul_(2)
                elif number % 3 == 1:
                    parameter.data.mul_(2)
                else:
                    parameter.data = parameter.data * 2
    assert_same_on("sim:0", offloaded, expected)


def test_training_steps(offloaded: Any, llama: Saved) -> None:
    expected = llama.plain()
    for each, device in ((offloaded, "sim:0"), (expected, "cpu")):
        optimiser = torch.optim.SGD(each.parameters(), lr=0.1)
        for _ in range(2):
            optimiser.zero_grad()
            each(prompt(device), labels=prompt(device)).loss.backward()
            optimiser.step()
    assert_same_on("sim:0", offloaded, expected)


def test_the_trainer_leaves_the_weights_where_they_are(offloaded: Any, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    homes = [tensor.device for tensor in offloaded.parameters()]
    trainer = Trainer(offloaded, TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))
    assert trainer.is_model_parallel
    assert [tensor.device for tensor in offloaded.parameters()] == homes


# ---------------------------------------------------------------- the library's methods


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_resizing_and_saving(name: str, enabled: bool, saved: Any, tmp_path: Path, two: None) -> None:
    checkpoint = saved(name)
    expected = checkpoint.plain(**EAGER.get(name, {}))
    model = checkpoint.load(device_map="auto", max_memory=budgets(checkpoint, 0.4, 0.2), **EAGER.get(name, {}))
    if not enabled:
        hf_bigload.disable()
    for each in (model, expected):
        torch.manual_seed(1)
        each.resize_token_embeddings(150, mean_resizing=False)
    for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
        nn.init.constant_(embedding.weight.data[120:], 0.25)
    for embedding in (expected.get_input_embeddings(), expected.get_output_embeddings()):
        nn.init.constant_(embedding.weight.data[120:], 0.25)
    assert same(forward(model, "sim:0"), forward(expected))
    model.save_pretrained(tmp_path, max_shard_size=20_000)
    assert_same_weights(Saved(tmp_path, checkpoint.auto, 0).plain(), expected)


def test_the_device_is_where_the_model_runs(llama: Saved, one: None) -> None:
    """While the plugin is on. After `disable` the library answers again, with where the first weight rests."""
    model = llama.load(device_map={"": 0, "model.embed_tokens": "cpu"})
    assert model.device == torch.device("sim:0")
    hf_bigload.disable()
    assert model.device == torch.device("cpu")
