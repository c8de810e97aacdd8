"""`save_pretrained` of an offloaded model writes the checkpoint that the plain model would write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

import hf_bigload

from .models import CONFIGS, OFFLOADED, PLACEMENTS, Saved, assert_same_model, same, save

SHARDS = [None, 20_000]  # bytes


def written(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor in the files of `folder`; those of an index are the ones it says."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    for index in folder.glob("*.index.json"):
        content = json.loads(index.read_text())
        assert set(content["weight_map"]) == set(tensors)
        for name, file in content["weight_map"].items():
            assert name in load_file(folder / file)
    return tensors


def save_both(model: Any, expected: PreTrainedModel, folder: Path, **options: Any) -> tuple[Path, Path]:
    ours, theirs = folder / "ours", folder / "theirs"
    model.save_pretrained(ours, **options)
    expected.save_pretrained(theirs, **options)
    return ours, theirs


def assert_same_files(ours: Path, theirs: Path) -> None:
    """The same texts and the same tensors, though perhaps in other shards."""
    found, expected = written(ours), written(theirs)
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not same(found[name], tensor)] == []
    for text in ("config.json", "generation_config.json"):
        assert (ours / text).read_text() == (theirs / text).read_text()
    indices = [*ours.glob("*.index.json"), *theirs.glob("*.index.json")]
    metadata = [json.loads(index.read_text())["metadata"] for index in indices]
    assert metadata in ([], metadata[:1] * 2)


@pytest.mark.parametrize("shard", SHARDS)
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_files_are_written(
    name: str, placement: str, shard: int | None, saved: Any, plain: Any, tmp_path: Path
) -> None:
    model, expected = saved(name).load(placement), plain(name)
    options = {} if shard is None else {"max_shard_size": shard}
    assert_same_files(*save_both(model, expected, tmp_path / "disabled", **options))
    with hf_bigload.enable():
        ours, theirs = save_both(model, expected, tmp_path / "enabled", **options)
    assert_same_files(ours, theirs)
    assert_same_model(Saved(ours, saved(name).auto, 0).plain(), expected)


@pytest.mark.parametrize("placement", OFFLOADED)
def test_in_another_dtype_than_the_checkpoints(placement: str, saved: Any, plain: Any, tmp_path: Path) -> None:
    model = saved("mixtral").load(placement, dtype=torch.bfloat16)
    ours, theirs = save_both(model, plain("mixtral", torch.bfloat16), tmp_path, max_shard_size=20_000)
    assert_same_files(ours, theirs)


@pytest.mark.parametrize("placement", OFFLOADED)
def test_in_the_layout_of_the_model(placement: str, saved: Any, plain: Any, tmp_path: Path) -> None:
    model = saved("mixtral").load(placement)
    ours, theirs = save_both(model, plain("mixtral"), tmp_path, save_original_format=False)
    assert any("gate_up_proj" in name for name in written(ours))
    assert_same_files(ours, theirs)


@pytest.mark.parametrize("placement", OFFLOADED)
def test_a_state_dict_of_ones_own(placement: str, saved: Any, tmp_path: Path) -> None:
    model, expected = saved("gpt2").load(placement), saved("gpt2").plain()
    for each, folder in ((model, "ours"), (expected, "theirs")):
        halved = {name: tensor / 2 for name, tensor in each.state_dict().items()}
        each.save_pretrained(tmp_path / folder, state_dict=halved)
    assert_same_files(tmp_path / "ours", tmp_path / "theirs")


@pytest.mark.parametrize("placement", OFFLOADED)
def test_the_device_map_is_back_and_the_model_still_streams(
    placement: str, saved: Any, plain: Any, tmp_path: Path
) -> None:
    model = saved("mixtral").load(placement)
    device_map = dict(model.hf_device_map)
    with hf_bigload.enable():
        model.save_pretrained(tmp_path)
    assert model.hf_device_map == device_map
    assert_same_model(model, plain("mixtral"))
    assert hf_bigload.inspect(model).stats.bytes_read > 0


def test_the_device_map_is_back_after_a_save_that_failed(llama: Saved, tmp_path: Path) -> None:
    model = llama.load(OFFLOADED[0])
    (tmp_path / "model.safetensors").mkdir()
    with hf_bigload.enable(), pytest.raises(Exception, match="directory"):
        model.save_pretrained(tmp_path)
    assert "disk" in model.hf_device_map.values()


@pytest.mark.parametrize("placement", OFFLOADED)
def test_saving_over_the_very_checkpoint_that_streams(placement: str, plain: Any, tmp_path: Path) -> None:
    """The folder gets the new weights, or the save is refused; what the model computes is never mixed."""
    checkpoint = save("llama", tmp_path)
    model = checkpoint.load(placement)
    model.save_pretrained(tmp_path, max_shard_size=60_000)
    assert_same_model(checkpoint.plain(), plain("llama"))
    assert_same_model(model, plain("llama"))


@pytest.mark.parametrize("placement", OFFLOADED)
def test_a_trained_model_is_saved_as_trained(placement: str, saved: Any, tmp_path: Path) -> None:
    model = saved("mixtral").load(placement)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    model.save_pretrained(tmp_path, max_shard_size=20_000)
    assert_same_model(Saved(tmp_path, saved("mixtral").auto, 0).plain(), model)
