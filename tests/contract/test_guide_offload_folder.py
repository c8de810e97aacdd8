"""The folder of offloaded weights: one format for both engines, written whole or not at all, checked when read."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hf_bigload.checkpoint.offload_folder import folder_index, read_tensor
from hf_bigload.errors import (
    CheckpointError,
    CorruptShardError,
    DtypeError,
    MissingShardError,
    OffloadedWeightError,
    SpillError,
)
from hf_bigload.specs import DTYPE_BYTES
from hf_bigload.utils import (
    OffloadedWeightsLoader,
    PrefixedDataset,
    load_offloaded_weight,
    load_offloaded_weights,
    offload_state_dict,
    offload_weight,
    save_offload_index,
)

DTYPES = ["float32", "float16", "bfloat16", "int64", "int8", "uint8", "bool", "complex64", "float8_e4m3fn"]


def sample(dtype: str, shape=(2, 3)) -> torch.Tensor:
    return torch.arange(6).reshape(2, 3).to(getattr(torch, dtype))[tuple(slice(n) for n in shape)]


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


# ------------------------------------------------------------------------------------------------------ both engines


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3), ()], ids=str)
def test_a_weight_comes_back_bit_by_bit(engine, tmp_path, dtype, shape):
    weight = sample(dtype) if shape else sample(dtype)[1, 2]
    index = engine.offload_weight(weight, "block.weight", tmp_path, index={})
    assert index == {"block.weight": {"dtype": dtype, "shape": list(shape)}}
    loaded = engine.load_offloaded_weight(str(tmp_path / "block.weight.dat"), index["block.weight"])
    assert (loaded.dtype, loaded.shape) == (weight.dtype, weight.shape)
    assert bits(loaded) == bits(weight)


@pytest.mark.parametrize("writes_first", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_engine_reads_what_the_other_wrote(ours, theirs, tmp_path, dtype, writes_first):
    writer, reader = (ours, theirs) if writes_first else (theirs, ours)
    state = {"a.weight": sample(dtype), "b": sample(dtype)[1, 1]}
    writer.offload_state_dict(tmp_path, state)
    loaded = reader.OffloadedWeightsLoader(save_folder=tmp_path)
    assert set(loaded) == set(state)
    assert all(bits(loaded[name]) == bits(tensor) for name, tensor in state.items())


def test_the_index_of_a_folder_grows(engine, tmp_path):
    engine.save_offload_index({"a": {"dtype": "int8", "shape": [1]}}, tmp_path)
    engine.save_offload_index({"b": {"dtype": "int8", "shape": [2]}}, tmp_path)
    engine.save_offload_index({}, tmp_path)
    engine.save_offload_index(None, tmp_path)
    assert json.loads((tmp_path / "index.json").read_text()) == {
        "a": {"dtype": "int8", "shape": [1]},
        "b": {"dtype": "int8", "shape": [2]},
    }


def test_weights_in_memory_come_before_those_on_disk(engine, tmp_path):
    engine.offload_state_dict(tmp_path, {"a": sample("int8"), "b": sample("int8")})
    own = torch.zeros(1)
    loader = engine.OffloadedWeightsLoader(state_dict={"a": own}, save_folder=tmp_path)
    assert len(loader) == 2
    assert loader["a"] is own
    assert torch.equal(loader["b"], sample("int8"))
    with pytest.raises(KeyError):
        loader["c"]


def test_a_loader_of_nothing_is_refused(engine):
    with pytest.raises(ValueError, match="state_dict"):
        engine.OffloadedWeightsLoader()


def test_an_entry_may_point_into_a_shard(engine, tmp_path):
    shard = str(tmp_path / "model.safetensors")
    save_file({"first": sample("float32"), "second": sample("float32") + 1}, shard)
    index = {"mine": {"safetensors_file": shard, "weight_name": "second", "dtype": "float16"}}
    loaded = engine.OffloadedWeightsLoader(index=index)["mine"]
    assert torch.equal(loaded, (sample("float32") + 1).half())


def test_names_are_read_behind_a_prefix(engine):
    dataset = engine.PrefixedDataset({"a.x": 1, "b.x": 2}, "b.")
    assert dataset["x"] == 2


def test_a_model_is_filled_from_a_folder(ours, theirs, tmp_path):
    source = nn.Linear(2, 2)
    theirs.offload_state_dict(tmp_path, source.state_dict())
    for engine in (ours, theirs):
        target = nn.Linear(2, 2, device="meta")
        engine_index = json.loads((tmp_path / "index.json").read_text())
        load = engine.load_offloaded_weights
        load(target, engine_index, str(tmp_path))
        assert torch.equal(target.weight, source.weight)


# -------------------------------------------------------------------------------------------------- ours alone, and why


@pytest.mark.parametrize("dtype", sorted(DTYPE_BYTES))
def test_every_dtype_is_written_and_read(tmp_path, dtype):
    """Accelerate goes through NumPy, which does not know them all."""
    weight = torch.zeros(3, dtype=torch.uint8).repeat(DTYPE_BYTES[dtype]).view(getattr(torch, dtype))
    index = offload_weight(weight, "w", tmp_path, {})
    assert bits(load_offloaded_weight(tmp_path / "w.dat", index["w"])) == bits(weight)


@pytest.mark.parametrize(
    "weight",
    [
        torch.empty(0, 3),
        torch.arange(6.0).reshape(2, 3).T,
        nn.Parameter(torch.ones(2)),
        torch.tensor([1 + 2j]).conj(),
    ],
    ids=["empty", "transposed", "with gradient", "conjugate view"],
)
def test_every_plain_tensor_is_written_and_read(tmp_path, weight):
    """Accelerate cannot map an empty file, nor hand a tensor that requires a gradient to NumPy."""
    index = offload_weight(weight, "w", tmp_path, {})
    assert torch.equal(load_offloaded_weight(tmp_path / "w.dat", index["w"]), weight)


@pytest.mark.parametrize("name", ["../outside", "/etc/outside", "a/b", "a%2Fb", "..", "\\x"])
def test_no_name_leaves_the_folder(tmp_path, name):
    """Accelerate joins the name to the folder as it is: a "/" in it makes another path."""
    folder = tmp_path / "inner" / "folder"
    offload_state_dict(folder, {name: torch.ones(2)})
    files = [entry for _, _, names in os.walk(tmp_path) for entry in names]
    assert sorted(files) == sorted(os.listdir(folder))
    assert torch.equal(OffloadedWeightsLoader(save_folder=folder)[name], torch.ones(2))


def test_different_names_are_different_files(tmp_path):
    offload_state_dict(tmp_path, {"a/b": torch.zeros(1), "a%2Fb": torch.ones(1)})
    loaded = OffloadedWeightsLoader(save_folder=tmp_path)
    assert (loaded["a/b"], loaded["a%2Fb"]) == (torch.zeros(1), torch.ones(1))


def test_a_weight_that_is_written_again_does_not_change_under_its_reader(tmp_path):
    """Accelerate writes into the file that another process may have mapped."""
    offload_weight(torch.zeros(4), "w", tmp_path)
    with open(tmp_path / "w.dat", "rb") as reader:
        offload_weight(torch.ones(4), "w", tmp_path)
        assert reader.read() == bytes(16)
    assert os.listdir(tmp_path) == ["w.dat"]


def test_a_failed_write_leaves_the_old_weight(tmp_path, monkeypatch):
    offload_weight(torch.zeros(4), "w", tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(SpillError, match=r"'w' \(16 B\).*No space left.*free there"):
        offload_weight(torch.ones(4), "w", tmp_path)
    assert os.listdir(tmp_path) == ["w.dat"]
    assert (tmp_path / "w.dat").read_bytes() == bytes(16)


def test_a_tensor_on_meta_has_nothing_to_offload(tmp_path):
    with pytest.raises(OffloadedWeightError, match=r"'w'.*meta"):
        offload_weight(torch.ones(2, device="meta"), "w", tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("size", [0, 7, 9])
def test_a_file_of_another_size_is_not_read(tmp_path, size):
    """Accelerate reads the first bytes of a longer file."""
    (tmp_path / "w.dat").write_bytes(bytes(size))
    with pytest.raises(CorruptShardError, match=f"w.dat has {size} bytes.*takes 8"):
        load_offloaded_weight(tmp_path / "w.dat", {"dtype": "float32", "shape": [2]})


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(MissingShardError, match=r"w\.dat"):
        load_offloaded_weight(tmp_path / "w.dat", {"dtype": "float32", "shape": [2]})
    with pytest.raises(MissingShardError, match=r"index\.json"):
        OffloadedWeightsLoader(save_folder=tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "null"])
def test_an_index_that_is_none_is_not_overwritten(tmp_path, text):
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(CorruptShardError, match=r"index\.json"):
        save_offload_index({"a": {"dtype": "int8", "shape": [1]}}, tmp_path)
    assert (tmp_path / "index.json").read_text() == text


@pytest.mark.parametrize(
    ("info", "error"),
    [
        ({"dtype": "int3", "shape": [1]}, DtypeError),
        ({"shape": [1]}, CorruptShardError),
        ({"dtype": "int8"}, CorruptShardError),
        ({"dtype": "int8", "shape": "1"}, CorruptShardError),
        ({"safetensors_file": "/nowhere.safetensors"}, CheckpointError),
        (None, CorruptShardError),
    ],
)
def test_an_entry_that_makes_no_sense_is_named(tmp_path, info, error):
    with pytest.raises(error, match=r"w|nowhere"):
        OffloadedWeightsLoader(index={"w": info}, save_folder=tmp_path)["w"]


def test_a_shard_without_the_tensor_is_named(tmp_path):
    shard = str(tmp_path / "model.safetensors")
    save_file({"other": torch.ones(1)}, shard)
    with pytest.raises(CorruptShardError, match=r"'w' is not in .*model\.safetensors"):
        OffloadedWeightsLoader(index={"w": {"safetensors_file": shard}})["w"]


def test_the_index_of_a_folder_tells_where_the_bytes_lie(tmp_path):
    shard = str(tmp_path / "model.safetensors")
    save_file({"x": torch.ones(3), "y": torch.zeros(5)}, shard)
    offload_state_dict(tmp_path, {"plain": sample("bfloat16"), "none": torch.empty(0)})
    save_offload_index({"renamed": {"safetensors_file": shard, "weight_name": "y"}}, tmp_path)
    entries = folder_index(tmp_path)
    assert {name: (entry.nbytes, entry.dtype, entry.shape) for name, entry in entries.items()} == {
        "plain": (12, "bfloat16", (2, 3)),
        "none": (0, "float32", (0,)),
        "renamed": (20, "float32", (5,)),
    }
    assert (entries["plain"].file, entries["plain"].offset) == (str(tmp_path / "plain.dat"), 0)
    assert torch.equal(read_tensor(entries["renamed"]), torch.zeros(5))


def test_a_prefixed_dataset_lists_what_it_can_give():
    """Accelerate lists full names, which it cannot look up, and counts the whole dataset."""
    dataset = PrefixedDataset({"a.x": 1, "b.x": 2, "b.y": 3}, "b.")
    assert dict(dataset) == {"x": 2, "y": 3}
    assert len(dataset) == 2


def test_scales_go_onto_their_weight(tmp_path):
    linear = nn.Linear(2, 2, bias=False)
    linear.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    offload_state_dict(tmp_path, {"weight": torch.ones(2, 2, dtype=torch.int8), "SCB": torch.full((2,), 3.0)})
    load_offloaded_weights(linear, json.loads((tmp_path / "index.json").read_text()), tmp_path)
    assert linear.weight.unique().tolist() == [1]
    assert linear.weight.SCB.tolist() == [3, 3]
