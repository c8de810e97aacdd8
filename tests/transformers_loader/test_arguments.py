"""The other arguments of `from_pretrained` mean what they mean in a plain load."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartModel,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlamaModel,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

import hf_bigload

from .models import (
    OFFLOADED,
    ON_DISK,
    PLACEMENTS,
    Saved,
    assert_same_model,
    assert_same_weights,
    bytes_of,
    same,
    save,
)

# ---------------------------------------------------------------- where converted copies go


def test_no_offload_folder_is_needed_and_none_is_made_in_the_checkpoint(llama: Saved) -> None:
    before = sorted(os.listdir(llama.folder))
    llama.load(ON_DISK, dtype=torch.bfloat16)
    assert sorted(os.listdir(llama.folder)) == before


def test_converted_copies_go_to_the_offload_folder_and_leave_with_the_model(
    llama: Saved, plain: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "offload"
    model = llama.load(ON_DISK, dtype=torch.bfloat16, offload_folder=folder)
    assert _bytes_in(folder) >= 0.9 * llama.nbytes / 2
    assert_same_model(model, plain("llama", torch.bfloat16))
    del model
    gc.collect()  # as with Accelerate, hooked modules refer to themselves
    assert _bytes_in(folder) == 0


def test_what_needs_no_conversion_is_not_copied(llama: Saved, tmp_path: Path) -> None:
    model = llama.load(ON_DISK, offload_folder=tmp_path)
    assert model.hf_device_map
    assert _bytes_in(tmp_path) == 0


def test_the_offload_folder_of_enable_counts_where_a_call_names_none(llama: Saved, tmp_path: Path) -> None:
    with hf_bigload.enable(offload_folder=tmp_path):
        model = llama.auto.from_pretrained(llama.folder, dtype=torch.bfloat16, **llama.placed(ON_DISK))
    assert model.hf_device_map
    assert _bytes_in(tmp_path) > 0


def _bytes_in(folder: Path) -> int:
    """On the disk: a file of converted copies has holes."""
    return sum(512 * path.stat().st_blocks for path in folder.rglob("*") if path.is_file())


# ---------------------------------------------------------------- small ones


@pytest.mark.parametrize(
    "argument",
    [
        {"low_cpu_mem_usage": True},
        {"offload_state_dict": True},
        {"offload_buffers": True},
        {"attn_implementation": "eager"},
        {"use_safetensors": True},
        {"local_files_only": True},
        {"use_cache": False},
    ],
    ids=lambda argument: next(iter(argument)),
)
@pytest.mark.parametrize("placement", OFFLOADED)
def test_an_argument(argument: dict[str, Any], placement: str, llama: Saved) -> None:
    model = llama.load(placement, **argument)
    given = {name: value for name, value in argument.items() if not name.startswith("offload")}
    expected = llama.plain(**given)
    assert model.config.to_dict() == expected.config.to_dict()
    assert_same_model(model, expected)


def test_a_config_of_ones_own(llama: Saved) -> None:
    config = AutoConfig.from_pretrained(llama.folder, num_hidden_layers=5)
    assert_same_model(llama.load(ON_DISK, config=config), llama.plain(config=config))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_state_dict_instead_of_files(placement: str, plain: Any, llama: Saved) -> None:
    given = {name: tensor.clone() for name, tensor in plain("llama").state_dict().items()}
    with hf_bigload.enable():
        model = LlamaForCausalLM.from_pretrained(
            None, config=plain("llama").config, state_dict=given, **llama.placed(placement)
        )
    assert_same_model(model, plain("llama"))


def test_key_mapping(llama: Saved, plain: Any, tmp_path: Path) -> None:
    renamed = {name.replace("model.layers", "old.blocks"): t for name, t in plain("llama").state_dict().items()}
    save_file(renamed, tmp_path / "model.safetensors")
    plain("llama").config.save_pretrained(tmp_path)
    checkpoint = Saved(tmp_path, LlamaForCausalLM, llama.nbytes)
    for placement in PLACEMENTS:
        model = checkpoint.load(placement, key_mapping={r"^old\.blocks": "model.layers"})
        assert_same_model(model, plain("llama"))


def test_variant(tmp_path: Path) -> None:
    checkpoint = save("gpt2", tmp_path, variant="fp16")
    assert not (tmp_path / "model.safetensors").exists()
    assert_same_model(checkpoint.load(ON_DISK, variant="fp16"), checkpoint.plain(variant="fp16"))


def test_subfolder(tmp_path: Path) -> None:
    save("gpt2", tmp_path / "inner")
    outer = Saved(tmp_path, GPT2LMHeadModel, 200_000)
    assert_same_model(outer.load(ON_DISK, subfolder="inner"), outer.plain(subfolder="inner"))


CUSTOM_CODE = """
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

class CustomConfig(PreTrainedConfig):
    model_type = "custom-of-a-test"
    def __init__(self, width=32, depth=4, **kwargs):
        self.width, self.depth = width, depth
        super().__init__(**kwargs)

class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.one, self.two = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
    def forward(self, x):
        return x + self.two(torch.relu(self.one(x)))

class CustomModel(PreTrainedModel):
    config_class = CustomConfig
    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(128, config.width)
        self.layers = nn.ModuleList(Layer(config.width) for _ in range(config.depth))
        self.register_buffer("scale", torch.arange(config.width) / config.width)
        self.post_init()
    def forward(self, input_ids):
        x = self.embedding(input_ids) * self.scale
        for layer in self.layers:
            x = layer(x)
        return (x,)
"""


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_code_from_the_repository(placement: str, tmp_path: Path) -> None:
    checkpoint = _custom_repository(tmp_path)
    model = checkpoint.load(placement, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules")
    assert ("disk" in model.hf_device_map.values()) == (placement in OFFLOADED)
    assert_same_model(model, checkpoint.plain(trust_remote_code=True))


def _custom_repository(folder: Path) -> Saved:
    namespace: dict[str, Any] = {"__name__": "modeling_custom"}
    exec(CUSTOM_CODE, namespace)
    config = namespace["CustomConfig"]()
    model = namespace["CustomModel"](config)
    config.auto_map = {"AutoConfig": "modeling_custom.CustomConfig", "AutoModel": "modeling_custom.CustomModel"}
    config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "modeling_custom.py").write_text(CUSTOM_CODE)
    return Saved(folder, AutoModel, bytes_of(model))


# ---------------------------------------------------------------- classes


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("llama", LlamaForCausalLM),
        ("llama", LlamaModel),
        ("llama", AutoModel),
        ("gpt2", AutoModelForCausalLM),
        ("gpt2", AutoModel),
        ("t5", T5ForConditionalGeneration),
        ("t5", AutoModel),
        ("bart", AutoModelForSeq2SeqLM),
        ("bart", BartModel),
        ("mixtral", AutoModel),
    ],
)
@pytest.mark.parametrize("placement", OFFLOADED)
def test_a_class_auto_or_not_with_its_head_or_without(name: str, cls: Any, placement: str, saved: Any) -> None:
    checkpoint = Saved(saved(name).folder, cls, saved(name).nbytes)
    model, expected = checkpoint.load(placement), checkpoint.plain()
    assert type(model) is type(expected)
    assert_same_model(model, expected)


def test_an_encoder_alone(saved: Any) -> None:
    checkpoint = Saved(saved("t5").folder, T5EncoderModel, saved("t5").nbytes)
    model, expected = checkpoint.load(ON_DISK), checkpoint.plain()
    assert_same_weights(model, expected)
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        assert same(model(ids)[0], expected(ids)[0])
