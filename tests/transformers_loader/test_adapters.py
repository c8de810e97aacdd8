"""Adapters of PEFT on an offloaded model: added, loaded, trained, merged and saved as on a resident one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_bigload
from hf_bigload.dispatch.attach import attachment_of

from .models import (
    OFFLOADED,
    PLACEMENTS,
    Saved,
    assert_same_model,
    forward,
    generate,
    prompt,
    same,
)

peft = pytest.importorskip("peft")

LORA = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": False}


@pytest.fixture(params=[True, False], ids=["enabled", "disabled"])
def plugin(request: pytest.FixtureRequest) -> Iterator[Callable[[], None]]:
    """Called between the load and what follows: the plugin stays on, or goes off."""
    yield hf_bigload.enable if request.param else hf_bigload.disable


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, saved: Any) -> Path:
    """A folder with a LoRA for the Llama, in PEFT's format."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(5)
    peft.get_peft_model(saved("llama").plain(), peft.LoraConfig(**LORA, task_type="CAUSAL_LM")).save_pretrained(folder)
    return folder


def with_adapter(model: Any) -> Any:
    torch.manual_seed(5)
    model.add_adapter(peft.LoraConfig(**LORA))
    return model


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_an_adapter_that_is_added(placement: str, plugin: Any, llama: Saved) -> None:
    model, expected = llama.load(placement), with_adapter(llama.plain())
    forward(model)
    plugin()
    assert_same_model(with_adapter(model), expected)
    assert same(generate(model), generate(expected))
    assert (attachment_of(model) is None) == (placement not in OFFLOADED)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_an_adapter_that_is_loaded(placement: str, plugin: Any, llama: Saved, adapter: Path) -> None:
    model, expected = llama.load(placement), llama.plain()
    device_map = dict(model.hf_device_map)
    plugin()
    for each in (model, expected):
        each.load_adapter(adapter)
    assert_same_model(model, expected)
    assert model.hf_device_map == device_map
    assert same(generate(model), generate(expected))
    for each in (model, expected):
        each.disable_adapters()
    assert_same_model(model, expected)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_name_of_an_adapter_instead_of_a_model(placement: str, llama: Saved, adapter: Path) -> None:
    """The library loads the model that the adapter names, and then the adapter, in one call."""
    checkpoint = Saved(adapter, AutoModelForCausalLM, llama.nbytes)
    assert_same_model(checkpoint.load(placement), checkpoint.plain())


@pytest.mark.parametrize("placement", OFFLOADED)
def test_training_an_adapter(placement: str, llama: Saved, tmp_path: Path) -> None:
    model, expected = with_adapter(llama.load(placement)), with_adapter(llama.plain())
    for each in (model, expected):
        trained = [parameter for parameter in each.parameters() if parameter.requires_grad]
        assert 0 < len(trained) < len(list(each.parameters()))
        optimiser = torch.optim.SGD(trained, lr=1.0)
        for _ in range(2):
            optimiser.zero_grad()
            each(prompt(), labels=prompt()).loss.backward()
            optimiser.step()
    assert_same_model(model, expected)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    again = llama.plain()
    again.load_adapter(tmp_path)
    assert same(forward(again), forward(expected))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_peft_model_around_it(placement: str, llama: Saved) -> None:
    model, expected = llama.load(placement), llama.plain()
    hf_bigload.enable()
    wrapped = []
    for each in (model, expected):
        torch.manual_seed(5)
        wrapped.append(peft.get_peft_model(each, peft.LoraConfig(**LORA, task_type="CAUSAL_LM")))
    assert same(forward(wrapped[0]), forward(wrapped[1]))
    merged = [each.merge_and_unload() for each in wrapped]
    assert_same_model(merged[0], merged[1])


@pytest.mark.parametrize("placement", OFFLOADED)
def test_merging(placement: str, llama: Saved) -> None:
    model, expected = with_adapter(llama.load(placement)), with_adapter(llama.plain())
    for each in (model, expected):
        for module in each.modules():
            if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
                module.merge()
    assert_same_model(model, expected)
    for each in (model, expected):
        for module in each.modules():
            if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
                module.unmerge()
    assert_same_model(model, expected)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_peft_model_from_a_folder(placement: str, llama: Saved, adapter: Path) -> None:
    """While the plugin is on. After `disable`, PEFT has Accelerate take over what has a device map."""
    pytest.importorskip("hf_bigload.loaders.peft")
    model, expected = llama.load(placement), llama.plain()
    device_map = dict(model.hf_device_map)
    hf_bigload.enable()
    wrapped, wanted = (peft.PeftModel.from_pretrained(each, adapter, "one") for each in (model, expected))
    assert same(forward(wrapped), forward(wanted))
    for each in (wrapped, wanted):
        each.load_adapter(adapter, "two")
        each.set_adapter("two")
    assert same(forward(wrapped), forward(wanted))
    assert model.hf_device_map == device_map
    if placement in OFFLOADED:
        stats = hf_bigload.inspect(model).stats
        before = stats.bytes_read
        assert same(generate(wrapped), generate(wanted))
        assert stats.bytes_read > before  # still streaming


@pytest.mark.parametrize("placement", OFFLOADED)
def test_a_deep_copy_with_its_adapter(placement: str, llama: Saved) -> None:
    model, expected = with_adapter(llama.load(placement)), with_adapter(llama.plain())
    assert_same_model(copy.deepcopy(model), expected)
