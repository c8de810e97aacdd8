"""Bad input gets an error of a kind that can be caught, with words that help, and costs the user nothing."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_bigload.checkpoint import spill
from hf_bigload.errors import (
    BigloadError,
    BudgetError,
    CheckpointChangedError,
    CheckpointError,
    CorruptShardError,
    DeviceMapError,
    DtypeError,
    SpillError,
)

from .models import BUDGETED, LAYERS, OFFLOADED, ON_DISK, Saved, assert_same_model, forward

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(deep: Saved, tmp_path: Path) -> Path:
    return Path(shutil.copytree(deep.folder, tmp_path / "checkpoint"))


@pytest.fixture
def checkpoint(folder: Path, deep: Saved) -> Iterator[Saved]:
    """A sharded checkpoint for a test to damage; what the test leaves there, loading it must not change."""
    yield Saved(folder, deep.auto, deep.nbytes)


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def refused(checkpoint: Saved, kind: type[Exception], words: str, **kwargs: Any) -> str:
    """The message of the error that loading raises: of `kind`, with `words`, and with the folder left as it was."""
    before = contents(checkpoint.folder)
    with pytest.raises(kind, match=words) as caught:
        checkpoint.load(**kwargs)
    assert contents(checkpoint.folder) == before
    return str(caught.value)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


# ---------------------------------------------------------------- damaged files


@pytest.mark.parametrize("placement", OFFLOADED)
def test_a_missing_shard(placement: str, checkpoint: Saved) -> None:
    lost = shards(checkpoint.folder)[2]
    lost.unlink()
    refused(checkpoint, OSError, lost.name, placement=placement)  # the library notices it first


@pytest.mark.parametrize("placement", OFFLOADED)
@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_shard(keep: int, placement: str, checkpoint: Saved) -> None:
    shard = shards(checkpoint.folder)[1]
    shard.write_bytes(shard.read_bytes()[:keep])
    refused(checkpoint, CorruptShardError, shard.name, placement=placement)


def rewrite_header(shard: Path, change: Any) -> None:
    data = shard.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    shard.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def _beyond_the_file(header: dict[str, Any]) -> None:
    _first(header)["data_offsets"][1] += 1 << 40


def _onto_another(header: dict[str, Any]) -> None:
    first, second = [entry for name, entry in header.items() if name != "__metadata__"][:2]
    second["data_offsets"] = first["data_offsets"]


def _another_shape(header: dict[str, Any]) -> None:
    _first(header)["shape"] = [1, 1]


def _backwards(header: dict[str, Any]) -> None:
    _first(header)["data_offsets"].reverse()


def _unknown_dtype(header: dict[str, Any]) -> None:
    _first(header)["dtype"] = "F33"


def _first(header: dict[str, Any]) -> dict[str, Any]:
    return next(entry for name, entry in header.items() if name != "__metadata__")


@pytest.mark.parametrize("lie", [_beyond_the_file, _onto_another, _another_shape, _backwards, _unknown_dtype])
def test_a_header_that_lies(lie: Any, checkpoint: Saved) -> None:
    shard = shards(checkpoint.folder)[1]
    rewrite_header(shard, lie)
    refused(checkpoint, BigloadError, shard.name, placement=ON_DISK)


def test_a_header_longer_than_the_file(checkpoint: Saved) -> None:
    shard = shards(checkpoint.folder)[1]
    shard.write_bytes(struct.pack("<Q", 1 << 60) + shard.read_bytes()[8:])
    refused(checkpoint, CorruptShardError, shard.name, placement=ON_DISK)


@pytest.mark.parametrize("content", [b"", b"no zip and no pickle", b"PK\x03\x04" + bytes(100)])
def test_a_bin_that_is_none(content: bytes, checkpoint: Saved) -> None:
    for shard in (*shards(checkpoint.folder), checkpoint.folder / INDEX):
        shard.unlink()
    (checkpoint.folder / "pytorch_model.bin").write_bytes(content)
    refused(checkpoint, Exception, "pytorch_model.bin", placement=ON_DISK)


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("hf_bigload_was_tricked",)


@pytest.mark.parametrize("legacy", [True, False])
def test_a_bin_with_code_in_it(
    legacy: bool, checkpoint: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for shard in (*shards(checkpoint.folder), checkpoint.folder / INDEX):
        shard.unlink()
    file = checkpoint.folder / "pytorch_model.bin"
    torch.save({"lm_head.weight": Malicious()}, file, _use_new_zipfile_serialization=not legacy)
    refused(checkpoint, CheckpointError, "pytorch_model.bin", placement=ON_DISK)
    assert not (tmp_path / "hf_bigload_was_tricked").exists()


# ---------------------------------------------------------------- an index that lies


def rewrite_index(folder: Path, name: str, shard: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][name] = shard
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("absolute", [True, False])
def test_an_index_that_names_a_file_outside(absolute: bool, checkpoint: Saved, tmp_path: Path) -> None:
    outside = tmp_path / "outside.safetensors"
    save_file({"lm_head.weight": torch.ones(128, 32)}, outside, {"format": "pt"})
    rewrite_index(checkpoint.folder, "lm_head.weight", str(outside) if absolute else "../outside.safetensors")
    refused(checkpoint, CheckpointError, "outside.safetensors", placement=ON_DISK)


def test_a_shard_that_changes_after_the_load_is_never_read(checkpoint: Saved, plain: Any) -> None:
    model = checkpoint.load(ON_DISK)
    for shard in shards(checkpoint.folder):
        with open(shard, "r+b") as file:  # the same inode, other bytes
            file.seek(-8, os.SEEK_END)
            file.write(b"\xff" * 8)
    with pytest.raises(CheckpointChangedError, match="changed after it was indexed"):
        forward(model)


def test_a_checkpoint_that_is_removed_after_the_load_goes_on_streaming(checkpoint: Saved, plain: Any) -> None:
    model = checkpoint.load(ON_DISK)
    shutil.rmtree(checkpoint.folder)
    assert_same_model(model, plain("deep"))


# ---------------------------------------------------------------- maps and budgets


def _layers(*but: int) -> dict[str, str]:
    return {f"model.layers.{i}": "cpu" for i in range(LAYERS) if i not in but}


@pytest.mark.parametrize(
    ("device_map", "words"),
    [
        ({"": "nowhere"}, "no such device: .*nowhere"),
        ({"model": "cpu"}, r"no device for 1 of \d+ tensors: lm_head.weight"),
        ({"lm_head": "cpu"}, "model.embed_tokens.weight"),
        ({**_layers(10, 11), "model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}, "layers.10.mlp"),
        ({"": 1.5}, "1.5"),
        ({"": None}, "None"),
    ],
)
def test_a_map_that_cannot_be_followed(device_map: dict[str, Any], words: str, checkpoint: Saved) -> None:
    refused(checkpoint, DeviceMapError, words, device_map=device_map)


@pytest.mark.parametrize("device_map", [{"": 0}, {"": "cuda:0"}, "cuda", 0, {"": "cpu", "lm_head": 3}])
def test_an_accelerator_that_is_not_there(device_map: Any, checkpoint: Saved) -> None:
    refused(checkpoint, DeviceMapError, "no such device: .*This machine has cpu, disk", device_map=device_map)


@pytest.mark.parametrize("device_map", ["automatic", "blanced"])
def test_a_strategy_that_is_none(device_map: str, checkpoint: Saved) -> None:
    refused(checkpoint, ValueError, "'auto', 'balanced', 'balanced_low_0', 'sequential'", device_map=device_map)


@pytest.mark.parametrize("device_map", [["cpu"], ("cpu",), {"cpu"}, 1.5])
def test_a_map_that_is_none(device_map: Any, checkpoint: Saved) -> None:
    refused(checkpoint, DeviceMapError, "no such device", device_map=device_map)


def test_a_budget_below_the_largest_block(checkpoint: Saved) -> None:
    message = refused(checkpoint, BudgetError, "No placement fits", device_map="auto", max_memory={"cpu": 5_000})
    assert "max_memory" in message and "5000" in message.replace("4.88 KiB", "5000")


@pytest.mark.parametrize("budget", ["lots", -1, "10 apples", None, 1.5j])
def test_a_budget_that_is_none(budget: Any, checkpoint: Saved) -> None:
    refused(checkpoint, ValueError, "max_memory", device_map="auto", max_memory={"cpu": budget})


@pytest.mark.parametrize("key", ["cup", 7, "cuda:9"])
def test_a_budget_for_a_device_that_is_not_there(key: Any, checkpoint: Saved) -> None:
    refused(checkpoint, DeviceMapError, str(key), device_map="auto", max_memory={key: "1GB", "cpu": "1GB"})


# ---------------------------------------------------------------- dtypes and disks


def test_a_dtype_that_cannot_be_cast(checkpoint: Saved) -> None:
    shard = shards(checkpoint.folder)[0]
    tensors = load_file(shard)
    name = next(iter(tensors))
    tensors[name] = tensors[name].to(torch.complex64)
    save_file(tensors, shard, {"format": "pt"})
    message = refused(checkpoint, DtypeError, "complex64", placement=ON_DISK, dtype=torch.bfloat16)
    assert name in message


@pytest.mark.parametrize("value", ["no_such_dtype", 16])
def test_a_dtype_that_is_none_is_the_librarys_error(value: Any, checkpoint: Saved) -> None:
    with pytest.raises(Exception) as expected:
        checkpoint.plain(dtype=value)
    with pytest.raises(type(expected.value)):
        checkpoint.load(ON_DISK, dtype=value)


def test_a_full_disk(checkpoint: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = os.pwrite
    calls = []

    def pwrite(fd: int, data: Any, offset: int) -> int:
        calls.append(offset)
        if len(calls) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return written(fd, data, offset)

    monkeypatch.setattr(spill.os, "pwrite", pwrite)
    folder = tmp_path / "offload"
    message = refused(
        checkpoint, SpillError, "No space left", placement=ON_DISK, dtype=torch.bfloat16, offload_folder=folder
    )
    assert "offload_folder" in message and str(folder) in message


def test_a_disk_that_is_too_small_from_the_start(
    checkpoint: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spill.SpillFolder, "_free_bytes", lambda self: 1000)
    offload = {"dtype": torch.bfloat16, "offload_folder": tmp_path / "offload"}
    refused(checkpoint, SpillError, "too little room", placement=ON_DISK, **offload)


@pytest.mark.parametrize("made", ["file", "read-only folder"])
def test_an_offload_folder_that_cannot_be_used(made: str, checkpoint: Saved, tmp_path: Path) -> None:
    folder = tmp_path / "offload"
    if made == "file":
        folder.write_text("somebody's")
    elif os.geteuid() == 0:
        pytest.skip("a superuser may write everywhere")
    else:
        folder.mkdir(mode=0o500)
    refused(checkpoint, SpillError, "offload", placement=ON_DISK, dtype=torch.bfloat16, offload_folder=folder)
    if made == "file":
        assert folder.read_text() == "somebody's"


def test_what_is_in_the_offload_folder_stays(checkpoint: Saved, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for name in ("index.json", "lm_head.weight.dat", "mine/weights.spill"):
        (tmp_path / name).write_text("mine")
    before = contents(tmp_path / "mine")
    checkpoint.load(ON_DISK, dtype=torch.bfloat16, offload_folder=tmp_path)
    assert contents(tmp_path / "mine") == before
    assert (tmp_path / "index.json").read_text() == (tmp_path / "lm_head.weight.dat").read_text() == "mine"


# ---------------------------------------------------------------- after an error


def test_a_load_after_one_that_failed(checkpoint: Saved, plain: Any) -> None:
    refused(checkpoint, BudgetError, "No placement", device_map="auto", max_memory={"cpu": 10})
    assert_same_model(checkpoint.load(BUDGETED), plain("deep"))
    assert_same_model(checkpoint.plain(), plain("deep"))
