"""Missing, unexpected and mismatched keys are reported, and filled, as in a plain load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaForCausalLM,
    LlamaModel,
    MixtralForCausalLM,
    T5ForConditionalGeneration,
)

from .models import OFFLOADED, PLACEMENTS, Saved, assert_same_model, assert_same_weights, bytes_of, save

Info = dict[str, Any]


def loaded(checkpoint: Saved, placement: str | None, **kwargs: Any) -> tuple[Any, Info]:
    """A model and its loading info; new weights are drawn from the same seed every time."""
    torch.manual_seed(1)
    load = checkpoint.plain if placement is None else checkpoint.load
    arguments = kwargs if placement is None else {"placement": placement, **kwargs}
    model, info = load(output_loading_info=True, **arguments)
    return model, info


def assert_reported_alike(checkpoint: Saved, placement: str, **kwargs: Any) -> Info:
    expected, expected_info = loaded(checkpoint, None, **kwargs)
    model, info = loaded(checkpoint, placement, **kwargs)
    assert info == expected_info
    assert_same_weights(model, expected)
    return info


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    folder = tmp_path_factory.mktemp("bert")
    config = BertConfig(
        vocab_size=128,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    model = BertForMaskedLM(config)
    model.save_pretrained(folder, max_shard_size=40_000)
    return Saved(folder, BertForMaskedLM, bytes_of(model))


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("cls", [BertForMaskedLM, BertModel, AutoModel, AutoModelForSequenceClassification])
def test_a_head_that_the_checkpoint_lacks_or_has_too_much(cls: Any, placement: str, bert: Saved) -> None:
    assert_reported_alike(Saved(bert.folder, cls, bert.nbytes), placement)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "t5", "bart"])
def test_a_complete_checkpoint(name: str, placement: str, saved: Any) -> None:
    info = assert_reported_alike(saved(name), placement)
    assert not any(info.values())


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize(("base", "head"), [(LlamaModel, LlamaForCausalLM), (GPT2Model, GPT2LMHeadModel)])
def test_a_head_over_the_checkpoint_of_a_base_model(
    base: Any, head: Any, placement: str, tmp_path: Path, saved: Any
) -> None:
    source = saved("llama" if base is LlamaModel else "gpt2")
    base.from_pretrained(source.folder).save_pretrained(tmp_path, max_shard_size=60_000)
    info = assert_reported_alike(Saved(tmp_path, head, source.nbytes), placement)
    assert info["missing_keys"] == ({"lm_head.weight"} if head is LlamaForCausalLM else set())


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A GPT-2 whose file lacks a matrix, has one too many, and one of another shape."""
    folder = tmp_path_factory.mktemp("damaged")
    save("gpt2", folder, max_shard_size="1GB")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["transformer.h.1.mlp.c_fc.weight"]
    tensors["transformer.h.9.mlp.c_fc.weight"] = torch.ones(3)
    tensors["transformer.wpe.weight"] = torch.ones(64, 32)
    save_file(tensors, file, metadata={"format": "pt"})
    return Saved(folder, GPT2LMHeadModel, 200_000)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_missing_unexpected_and_mismatched_keys(placement: str, damaged: Saved) -> None:
    info = assert_reported_alike(damaged, placement, ignore_mismatched_sizes=True)
    assert info["missing_keys"] == {"transformer.h.1.mlp.c_fc.weight"}
    assert info["unexpected_keys"] == {"transformer.h.9.mlp.c_fc.weight"}
    assert info["mismatched_keys"] == {("transformer.wpe.weight", (64, 32), (128, 32))}


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_mismatch_that_nobody_asked_to_ignore_is_an_error(placement: str, damaged: Saved) -> None:
    with pytest.raises(RuntimeError, match="size") as expected:
        damaged.plain()
    with pytest.raises(RuntimeError, match="size") as found:
        damaged.load(placement)
    assert str(found.value) == str(expected.value)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_what_was_missing_is_trained_and_saved_like_any_weight(placement: str, damaged: Saved, tmp_path: Path) -> None:
    model, _ = loaded(damaged, placement, ignore_mismatched_sizes=True)
    model.save_pretrained(tmp_path)
    assert_same_model(Saved(tmp_path, GPT2LMHeadModel, 0).plain(), model)


@pytest.mark.parametrize("placement", OFFLOADED)
@pytest.mark.parametrize("cls", [T5ForConditionalGeneration, MixtralForCausalLM])
def test_the_checkpoint_of_another_architecture(cls: Any, placement: str, saved: Any) -> None:
    """The library loads it all the same, everything missing and everything unexpected."""
    own = saved("t5" if cls is T5ForConditionalGeneration else "mixtral")
    config = cls.from_pretrained(own.folder).config
    info = assert_reported_alike(Saved(saved("gpt2").folder, cls, own.nbytes), placement, config=config)
    assert info["missing_keys"] and info["unexpected_keys"]


@pytest.mark.parametrize("placement", OFFLOADED)
def test_an_expert_of_the_wrong_shape_is_the_librarys_conversion_error(
    placement: str, saved: Any, tmp_path: Path
) -> None:
    save("mixtral", tmp_path, max_shard_size="1GB")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "experts.2.w1" in name)
    tensors[name] = torch.ones(3, 3)
    save_file(tensors, file, metadata={"format": "pt"})
    checkpoint = Saved(tmp_path, AutoModelForCausalLM, saved("mixtral").nbytes)
    with pytest.raises(RuntimeError) as expected:
        checkpoint.plain()
    with pytest.raises(RuntimeError) as found:
        checkpoint.load(placement)
    assert type(found.value) is type(expected.value)
    assert str(found.value) == str(expected.value)
