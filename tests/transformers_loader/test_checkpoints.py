"""Every kind of checkpoint that the library loads, on every tier; ties in every combination."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, PreTrainedModel

import hf_bigload

from .models import OFFLOADED, PLACEMENTS, Saved, assert_same_model, bytes_of, new_model

Tensors = dict[str, torch.Tensor]
Writer = Callable[[Tensors, Path], None]

# ---------------------------------------------------------------- formats


def _one_safetensors(tensors: Tensors, folder: Path) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _one_bin(tensors: Tensors, folder: Path) -> None:
    torch.save(tensors, folder / "pytorch_model.bin")


def _one_legacy_bin(tensors: Tensors, folder: Path) -> None:
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def _sharded(tensors: Tensors, folder: Path, stem: str, suffix: str, write: Callable[[Tensors, Path], None]) -> None:
    weight_map = {}
    for number in range(3):
        part = {name: tensor for i, (name, tensor) in enumerate(sorted(tensors.items())) if i % 3 == number}
        file = f"{stem}-{number + 1:05d}-of-00003.{suffix}"
        write(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def _sharded_safetensors(tensors: Tensors, folder: Path) -> None:
    _sharded(tensors, folder, "model", "safetensors", lambda part, file: save_file(part, file, {"format": "pt"}))


def _sharded_bin(tensors: Tensors, folder: Path) -> None:
    _sharded(tensors, folder, "pytorch_model", "bin", torch.save)


def _mixed_bin(tensors: Tensors, folder: Path) -> None:
    """One of three shards is in the old format."""

    def write(part: Tensors, file: Path) -> None:
        torch.save(part, file, _use_new_zipfile_serialization="00002" not in file.name)

    _sharded(tensors, folder, "pytorch_model", "bin", write)


FORMATS: dict[str, Writer] = {
    "one safetensors": _one_safetensors,
    "sharded safetensors": _sharded_safetensors,
    "one bin": _one_bin,
    "sharded bin": _sharded_bin,
    "one legacy bin": _one_legacy_bin,
    "a legacy bin among shards": _mixed_bin,
}


def checkpoint(name: str, folder: Path, write: Writer, change: Callable[[Tensors], None] | None = None) -> Saved:
    """A model's tensors as `write` puts them down, after `change`."""
    model = new_model(name)
    model.config.save_pretrained(folder)
    tensors = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    if change is not None:
        change(tensors)
    write(tensors, folder)
    return Saved(folder, AutoModelForCausalLM, bytes_of(model))


@pytest.mark.parametrize("write", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_formats(name: str, write: Writer, tmp_path: Path) -> None:
    source = checkpoint(name, tmp_path, write)
    for dtype in (None, torch.bfloat16):
        expected = source.plain(dtype=dtype)
        for placement in PLACEMENTS:
            assert_same_model(source.load(placement, dtype=dtype), expected)


@pytest.mark.parametrize("write", [_one_bin, _sharded_bin])
def test_a_bin_streams_from_where_it_lies(write: Writer, tmp_path: Path) -> None:
    source = checkpoint("llama", tmp_path / "checkpoint", write)
    model = source.load("on disk", offload_folder=tmp_path / "offload")
    assert_same_model(model, source.plain())
    assert hf_bigload.inspect(model).stats.bytes_read > source.nbytes
    assert not (tmp_path / "offload").exists()


def test_views_of_one_tensor_in_a_bin(tmp_path: Path) -> None:
    """Transposed, strided and overlapping tensors of one storage."""
    model = new_model("gpt2")
    model.config.save_pretrained(tmp_path)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    name = "transformer.h.0.mlp.c_fc.weight"
    tensors[name] = tensors[name].T.contiguous().T
    both = torch.randn(2, 32)
    tensors["transformer.h.1.ln_1.weight"], tensors["transformer.h.1.ln_1.bias"] = both
    tensors["transformer.h.2.ln_1.weight"] = torch.randn(64)[::2]
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    source = Saved(tmp_path, AutoModelForCausalLM, bytes_of(model))
    expected = source.plain()
    for placement in PLACEMENTS:
        assert_same_model(source.load(placement), expected)


# ---------------------------------------------------------------- fused layouts


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("name", ["mixtral", "hrm_text"])
def test_tensors_that_the_library_fuses_or_splits(name: str, dtype: torch.dtype | None, saved: Any, plain: Any) -> None:
    for placement in PLACEMENTS:
        assert_same_model(saved(name).load(placement, dtype=dtype), plain(name, dtype))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_checkpoint_that_is_fused_already(dtype: torch.dtype | None, plain: Any, tmp_path: Path) -> None:
    plain("mixtral").save_pretrained(tmp_path, save_original_format=False, max_shard_size=40_000)
    source = Saved(tmp_path, AutoModelForCausalLM, bytes_of(plain("mixtral")))
    for placement in PLACEMENTS:
        assert_same_model(source.load(placement, dtype=dtype), source.plain(dtype=dtype))


# ---------------------------------------------------------------- ties

EMBEDDING, HEAD = "transformer.wte.weight", "lm_head.weight"


def _both_equal(tensors: Tensors) -> None:
    assert torch.equal(tensors[EMBEDDING], tensors[HEAD])


def _both_different(tensors: Tensors) -> None:
    tensors[HEAD] = tensors[HEAD] + 1


def _head_only(tensors: Tensors) -> None:
    del tensors[EMBEDDING]


def _embedding_only(tensors: Tensors) -> None:
    del tensors[HEAD]


def _neither(tensors: Tensors) -> None:
    del tensors[EMBEDDING], tensors[HEAD]


def _one_storage(tensors: Tensors) -> None:
    tensors[HEAD] = tensors[EMBEDDING]


ON_FILE = {f.__name__.strip("_"): f for f in (_both_equal, _both_different, _head_only, _embedding_only, _neither)}


@pytest.mark.parametrize("tied", [True, False], ids=["tied by the config", "not tied by the config"])
@pytest.mark.parametrize("change", ON_FILE.values(), ids=ON_FILE)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_ties(placement: str, change: Callable[[Tensors], None], tied: bool, tmp_path: Path) -> None:
    _assert_ties_alike(checkpoint("gpt2", tmp_path, _one_safetensors, change), placement, tied)


@pytest.mark.parametrize("tied", [True, False], ids=["tied by the config", "not tied by the config"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_bin_in_which_two_names_share_their_bytes(placement: str, tied: bool, tmp_path: Path) -> None:
    """A plain load gives them one storage even where nothing ties them; what is written to one of them then is not
    promised to reach the other."""
    _assert_ties_alike(checkpoint("gpt2", tmp_path, _one_bin, _one_storage), placement, tied, write=tied)


def _assert_ties_alike(source: Saved, placement: str, tied: bool, write: bool = True) -> None:
    torch.manual_seed(7)
    expected, wanted = source.plain(tie_word_embeddings=tied, output_loading_info=True)
    torch.manual_seed(7)
    model, info = source.load(placement, tie_word_embeddings=tied, output_loading_info=True)
    assert info == wanted
    assert _is_tied(model) == _is_tied(expected)
    assert_same_model(model, expected)
    if not write:
        return
    for each in (model, expected):  # whoever shares a weight sees what is written to it
        with torch.no_grad():
            each.transformer.wte.weight.mul_(2)
    assert_same_model(model, expected)


def _is_tied(model: GPT2LMHeadModel | PreTrainedModel) -> bool:
    return model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize("device_map", [{"": "cpu", "lm_head": "disk"}, {"": "disk", "lm_head": "cpu"}])
def test_a_map_that_sends_tied_weights_to_two_places(device_map: dict[str, str], saved: Any, plain: Any) -> None:
    assert_same_model(saved("gpt2").load(device_map=device_map), plain("gpt2"))


# ---------------------------------------------------------------- buffers


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("offload_buffers", [False, True])
def test_buffers_that_no_checkpoint_has(placement: str, offload_buffers: bool, saved: Any, plain: Any) -> None:
    model = saved("llama").load(placement, dtype=torch.bfloat16, offload_buffers=offload_buffers)
    rotary = model.model.rotary_emb
    assert rotary.inv_freq.dtype == torch.float32
    assert torch.equal(rotary.inv_freq, plain("llama").model.rotary_emb.inv_freq)
    assert_same_model(model, plain("llama", torch.bfloat16))


@pytest.mark.parametrize("placement", OFFLOADED)
def test_two_models_of_one_checkpoint_share_nothing(placement: str, llama: Saved, plain: Any) -> None:
    one, other = llama.load(placement), llama.load(placement)
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.zero_()
    assert_same_model(other, plain("llama"))
