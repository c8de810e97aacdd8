"""What the files say of themselves is read right, and believed only where it is true."""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hf_bigload.checkpoint import formats, index
from hf_bigload.errors import (
    BigloadError,
    CheckpointChangedError,
    CheckpointError,
    CorruptShardError,
    DtypeError,
    MissingShardError,
)
from hf_bigload.specs import DTYPE_BYTES, TensorEntry


def bytes_at(entry: TensorEntry) -> bytes:
    return Path(entry.file).read_bytes()[entry.offset : entry.end]


def values_at(entry: TensorEntry) -> torch.Tensor:
    """The tensor an entry stands for, from nothing but the file's bytes."""
    dtype = getattr(torch, entry.dtype)
    flat = torch.frombuffer(bytearray(bytes_at(entry)), dtype=dtype) if entry.nbytes else torch.empty(0, dtype=dtype)
    return flat.reshape(entry.shape) if entry.stride is None else flat.as_strided(entry.shape, entry.stride)


def some_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "weight": torch.randn(5, 7),
        "half": torch.randn(3, 4).half(),
        "brain": torch.randn(9).bfloat16(),
        "steps": torch.arange(6).reshape(2, 3),
        "mask": torch.tensor([True, False, True]),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
    }


def write_safetensors(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def described(begin: int, end: int, dtype: str = "U8", shape: list[int] | None = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


# ---------------------------------------------------------------------------------------------------- safetensors


def test_safetensors_entries_are_the_bytes_the_library_wrote(tmp_path: Path) -> None:
    path, tensors = tmp_path / "model.safetensors", some_tensors()
    save_file(tensors, path, metadata={"format": "pt"})
    entries, metadata = formats.read_safetensors(str(path))
    assert metadata == {"format": "pt"}
    assert entries.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert values_at(entries[name]).equal(tensor), name
        assert entries[name].name == name


@pytest.mark.parametrize("code", formats.SAFETENSORS_DTYPES)
def test_every_dtype_code_is_a_torch_dtype_of_the_right_size(tmp_path: Path, code: str) -> None:
    name = formats.SAFETENSORS_DTYPES[code]
    assert getattr(torch, name).itemsize == DTYPE_BYTES[name]
    nbytes = 2 * DTYPE_BYTES[name]
    path = write_safetensors(tmp_path / "x.safetensors", {"t": described(0, nbytes, code, [2])}, bytes(nbytes))
    assert formats.read_safetensors(str(path))[0]["t"].dtype == name


def test_dtype_codes_agree_with_the_library(tmp_path: Path) -> None:
    tensors = {name: torch.zeros(2, dtype=getattr(torch, name)) for name in formats.SAFETENSORS_DTYPES.values()}
    save_file(tensors, tmp_path / "x.safetensors")
    entries, _ = formats.read_safetensors(str(tmp_path / "x.safetensors"))
    assert {name: entry.dtype for name, entry in entries.items()} == {name: name for name in tensors}


def test_a_file_without_tensors_is_read(tmp_path: Path) -> None:
    assert formats.read_safetensors(str(write_safetensors(tmp_path / "x.safetensors", {}))) == ({}, {})


def test_missing_safetensors_file_names_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(MissingShardError, match=rf"gone\.safetensors is not in {tmp_path}"):
        formats.read_safetensors(str(tmp_path / "gone.safetensors"))


def test_a_folder_is_no_weights_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        formats.read_safetensors(str(tmp_path))


A = described(0, 4)
LYING_HEADERS: dict[str, tuple[Any, bytes, str]] = {
    "not JSON": (b"{'a': 1}", b"", "unreadable header"),
    "not text": (b"\xff\xfe{}", b"", "unreadable header"),
    "nested without end": (b"[" * 100_000, b"", "unreadable header"),
    "no object": ([1, 2], b"", "no JSON object"),
    "one name twice": (
        b'{"a":' + json.dumps(A).encode() + b',"a":' + json.dumps(A).encode() + b"}",
        bytes(4),
        "'a' twice",
    ),
    "one field twice": (b'{"a":{"dtype":"U8","dtype":"I8","shape":[4],"data_offsets":[0,4]}}', bytes(4), "twice"),
    "metadata of numbers": ({"__metadata__": {"n": 1}}, b"", "__metadata__"),
    "tensor is text": ({"a": "U8"}, bytes(4), "'a'"),
    "no dtype": ({"a": {"shape": [4], "data_offsets": [0, 4]}}, bytes(4), "'a'.*without a dtype"),
    "no shape": ({"a": {"dtype": "U8", "data_offsets": [0, 4]}}, bytes(4), "'a' the shape None"),
    "negative shape": ({"a": described(0, 4, shape=[-2, -2])}, bytes(4), r"'a' the shape \[-2, -2\]"),
    "shape of floats": ({"a": described(0, 4, shape=[4.0])}, bytes(4), "'a' the shape"),  # type: ignore[list-item]
    "shape of booleans": ({"a": described(0, 1, shape=[True])}, bytes(1), "'a' the shape"),
    "three offsets": ({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 2, 4]}}, bytes(4), "of two"),
    "end before begin": ({"a": described(4, 0, shape=[4])}, bytes(4), "'a' the bytes 4 to 0"),
    "negative offset": ({"a": described(-4, 0, shape=[4])}, bytes(4), r"data_offsets \[-4, 0\]"),
    "shape too large": ({"a": described(0, 4, "F32", [2])}, bytes(4), r"'a'.* are 4; its shape \[2\] of F32 takes 8"),
    "shape too small": ({"a": described(0, 4, "F16", [1])}, bytes(4), "takes 2"),
    "overlap": ({"a": A, "b": described(3, 7)}, bytes(7), "'b' begins at byte .* overlaps 'a'"),
    "same bytes twice": ({"a": A, "b": A}, bytes(4), "'b' .*overlaps 'a'"),
    "hole": ({"a": A, "b": described(6, 8)}, bytes(8), "'b' begins at byte .* leaves 2 bytes unused after 'a'"),
    "hole at the start": ({"a": described(2, 4)}, bytes(4), "'a' .*leaves 2 bytes unused after 'the header'"),
    "bytes of no tensor": ({"a": A}, bytes(9), "5 bytes after tensor 'a' belong to none"),
    "far behind the end": ({"a": described(0, 10**15)}, bytes(4), "cut off.* from tensor 'a' on"),
}


@pytest.mark.parametrize(("header", "data", "says"), LYING_HEADERS.values(), ids=LYING_HEADERS)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: Any, data: bytes, says: str) -> None:
    path = write_safetensors(tmp_path / "x.safetensors", header, data)
    with pytest.raises(CorruptShardError, match=says) as caught:
        formats.read_safetensors(str(path))
    assert str(path) in str(caught.value)
    assert "Download the shard again" in str(caught.value)


@pytest.mark.parametrize("size", range(8))
def test_a_file_shorter_than_its_length_prefix_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(bytes(size))
    with pytest.raises(CorruptShardError, match=f"has {size} bytes"):
        formats.read_safetensors(str(path))


@pytest.mark.parametrize("length", [3, 101_000_000, 2**64 - 1])
def test_a_header_longer_than_the_file_or_the_format_allows_is_refused(tmp_path: Path, length: int) -> None:
    path = write_safetensors(tmp_path / "x.safetensors", b"{}", length=length)
    os.truncate(path, 10 if length < 1000 else 10**8 + 10**7)  # sparse: the second is large enough for the second
    with pytest.raises(CorruptShardError, match=f"claims a header of {length} bytes"):
        formats.read_safetensors(str(path))


def test_a_truncated_shard_tells_how_much_is_missing_and_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(1000), "b": torch.zeros(10, dtype=torch.float64)}, path)  # largest dtype comes first
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(
        CorruptShardError, match=r"100 bytes are missing, from tensor 'a' on\. Download the shard again"
    ):
        formats.read_safetensors(str(path))


def test_an_unsupported_dtype_is_no_corruption(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "x.safetensors", {"a": described(0, 4, "F4", [8])}, bytes(4))
    with pytest.raises(DtypeError, match=r"tensor 'a' in dtype 'F4'.*supported are .*BF16"):
        formats.read_safetensors(str(path))


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "Git LFS pointer"),
        (b"<!doctype html><html></html>", "web page"),
        (b"{\n \"error\": \"Access denied\" }", "Download the shard again"),
    ],
)  # fmt: skip
def test_a_file_that_is_something_else_is_named_for_what_it_is(
    tmp_path: Path, suffix: str, content: bytes, says: str
) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    with pytest.raises(CorruptShardError, match=says):
        index.build_index([str(path)])


def test_a_damaged_safetensors_header_is_either_refused_or_stays_within_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(some_tensors(), path, metadata={"format": "pt"})
    whole, rng, refused = path.read_bytes(), random.Random(0), 0
    header_end = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(header_end)] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            entries, _ = formats.read_safetensors(str(path))
        except BigloadError:
            refused += 1
        else:
            assert all(header_end <= entry.offset <= entry.end <= len(whole) for entry in entries.values())
    assert refused > 200


# -------------------------------------------------------------------------------------------------------- torch.save


def save_bin(path: Path, content: Any, **how: Any) -> str:
    torch.save(content, path, **how)
    return str(path)


def read(path: str) -> dict[str, TensorEntry]:
    entries = formats.read_bin(path)
    assert entries is not None
    return entries


def test_bin_entries_are_the_bytes_torch_wrote(tmp_path: Path) -> None:
    state = OrderedDict(
        some_tensors(), parameter=torch.nn.Parameter(torch.randn(4)), quantised=torch.arange(3).to(torch.uint16)
    )
    state._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]  # as Module.state_dict() has it
    entries = read(save_bin(tmp_path / "model.bin", state))
    assert entries.keys() == state.keys()
    for name, tensor in state.items():
        assert values_at(entries[name]).equal(tensor.detach()), name


def test_many_storages_of_odd_sizes_are_found(tmp_path: Path) -> None:
    rng = random.Random(0)
    state = {f"layers.{i}": torch.randint(256, (rng.randrange(200),), dtype=torch.uint8) for i in range(100)}
    entries = read(save_bin(tmp_path / "model.bin", state))
    assert all(values_at(entries[name]).equal(tensor) for name, tensor in state.items())


def test_views_keep_their_strides_and_offsets(tmp_path: Path) -> None:
    base = torch.arange(48.0).reshape(6, 8)
    views = {
        "transposed": base.t(),
        "window": base[1:4, 2:5],
        "row": base[3],
        "every other": base[::2, ::3],
        "expanded": base[2, :1].expand(5),
        "nothing": base[2:2],
    }
    entries = read(save_bin(tmp_path / "model.bin", views))
    assert all(values_at(entries[name]).equal(view) for name, view in views.items())
    assert entries["row"].stride is None
    assert entries["transposed"].stride == (1, 8)
    assert entries["window"].nbytes == 4 * (1 + 2 * 8 + 2)  # from the first element to the last


def test_tied_tensors_are_the_same_bytes(tmp_path: Path) -> None:
    weight = torch.randn(8, 4)
    entries = read(save_bin(tmp_path / "model.bin", {"embed": weight, "head": weight}))
    assert (entries["embed"].offset, entries["embed"].nbytes) == (entries["head"].offset, entries["head"].nbytes)


def test_values_that_are_no_tensors_are_left_out(tmp_path: Path) -> None:
    content = {"epoch": 3, "name": "x", "w": torch.ones(2), 7: torch.ones(2), "list": [torch.ones(2)]}
    assert list(read(save_bin(tmp_path / "model.bin", content))) == ["w"]


def test_a_nested_state_dict_is_not_unwrapped(tmp_path: Path) -> None:
    assert read(save_bin(tmp_path / "model.ckpt", {"state_dict": {"w": torch.ones(2)}})) == {}


def test_no_weights_are_read(tmp_path: Path) -> None:
    path = save_bin(tmp_path / "model.bin", {"w": torch.arange(1000)})
    entry = read(path)["w"]
    with open(path, "r+b") as file:
        file.seek(entry.offset)
        file.write(b"\xff" * entry.nbytes)  # its checksum is wrong now
    assert read(path)["w"] == entry


UNSTREAMABLE = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "conjugate": lambda: torch.tensor([1 + 2j]).conj(),
    "negated": lambda: torch._neg_view(torch.ones(2)),
    "on meta": lambda: torch.empty(2, device="meta"),
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", UNSTREAMABLE.values(), ids=UNSTREAMABLE)
def test_a_file_with_a_tensor_that_is_more_than_its_bytes_is_loaded_whole(tmp_path: Path, make: Any) -> None:
    assert formats.read_bin(save_bin(tmp_path / "model.bin", {"w": torch.ones(2), "odd": make()})) is None


def test_the_legacy_format_is_loaded_whole(tmp_path: Path) -> None:
    path = save_bin(tmp_path / "model.bin", {"w": torch.ones(2)}, _use_new_zipfile_serialization=False)
    assert formats.read_bin(path) is None


def repack(source: str, target: Path, changes: Mapping[str, bytes | None] | None = None, **how: Any) -> str:
    """The archive packed anew, members of a name (without its folder) replaced, or left out for None."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", **how) as new:
        for info in old.infolist():
            data = (changes or {}).get(info.filename.partition("/")[2], old.read(info))
            if data is not None:
                new.writestr(info.filename, data)
    return str(target)


WITHOUT_INFERENCE = {".format_version": None, ".storage_alignment": None}
"""Without these members torch looks offsets up, instead of inferring them from how its own writer packs."""


def test_compressed_members_are_loaded_whole(tmp_path: Path) -> None:
    source = save_bin(tmp_path / "model.bin", {"w": torch.ones(2000)})
    assert formats.read_bin(repack(source, tmp_path / "small.bin", compression=zipfile.ZIP_DEFLATED)) is None


def test_an_archive_packed_by_another_tool_is_never_read_at_inferred_offsets(tmp_path: Path) -> None:
    state = {f"w{i}": torch.full((100 + i,), float(i)) for i in range(5)}
    repacked = repack(save_bin(tmp_path / "model.bin", state), tmp_path / "again.bin")
    entries = formats.read_bin(repacked)
    assert entries is None or all(values_at(entries[name]).equal(tensor) for name, tensor in state.items())


def test_an_archive_of_another_tool_is_read_in_place_where_its_offsets_are_looked_up(tmp_path: Path) -> None:
    state = {f"w{i}": torch.full((100 + i,), float(i)) for i in range(5)}
    entries = read(repack(save_bin(tmp_path / "model.bin", state), tmp_path / "again.bin", WITHOUT_INFERENCE))
    assert all(values_at(entries[name]).equal(tensor) for name, tensor in state.items())


def test_the_other_byte_order_is_loaded_whole(tmp_path: Path) -> None:
    other = b"big" if sys.byteorder == "little" else b"little"
    source = save_bin(tmp_path / "model.bin", {"w": torch.ones(2000)})
    assert formats.read_bin(repack(source, tmp_path / "x.bin", {**WITHOUT_INFERENCE, "byteorder": other})) is None


def test_a_truncated_archive_is_corrupt(tmp_path: Path) -> None:
    path = Path(save_bin(tmp_path / "model.bin", {"w": torch.ones(2000)}))
    whole = path.read_bytes()
    for size in (4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CorruptShardError, match=r"cut off or damaged.*Download the shard again"):
            formats.read_bin(str(path))


def test_an_archive_that_is_no_torch_file_is_corrupt(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model.bin", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CorruptShardError, match="cannot be read by torch"):
        formats.read_bin(str(tmp_path / "model.bin"))


def test_a_tensor_larger_than_its_member_is_corrupt(tmp_path: Path) -> None:
    source = save_bin(tmp_path / "model.bin", {"w": torch.ones(2)})
    short = repack(source, tmp_path / "short.bin", {**WITHOUT_INFERENCE, "data/0": bytes(4)})
    with pytest.raises(CorruptShardError, match="tensor 'w' needs the bytes"):
        formats.read_bin(short)


class Sets:
    """Unpickling it creates a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def test_a_pickle_that_would_run_code_does_not_and_says_what_to_do(tmp_path: Path) -> None:
    trap = tmp_path / "ran"
    path = save_bin(tmp_path / "model.bin", {"w": torch.ones(2), "evil": Sets(str(trap))})
    with pytest.raises(CheckpointError, match=r"would run code.*mkdir.*safetensors\.torch\.save_file"):
        formats.read_bin(path)
    assert not trap.exists()


def test_a_class_that_weights_only_refuses_is_named(tmp_path: Path) -> None:
    path = save_bin(tmp_path / "model.bin", {"w": torch.ones(2), "args": argparse.Namespace(lr=1)})
    with pytest.raises(CheckpointError, match=r"argparse\.Namespace.*add_safe_globals"):
        formats.read_bin(path)


def test_a_file_that_holds_no_state_dict_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds a Tensor, not a state dict"):
        formats.read_bin(save_bin(tmp_path / "model.bin", torch.ones(2)))


def test_damage_to_an_archive_never_escapes_as_another_error(tmp_path: Path) -> None:
    path = Path(save_bin(tmp_path / "model.bin", some_tensors()))
    whole, rng, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(200):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 8)):
            damaged[rng.randrange(len(whole))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            entries = formats.read_bin(str(path)) or {}
        except BigloadError:
            refused += 1
        else:
            assert all(0 <= entry.offset <= entry.end <= len(whole) for entry in entries.values())
    assert refused > 50


# ------------------------------------------------------------------------------------------------------------- index


def shards(folder: Path, **tensors: torch.Tensor) -> dict[str, str]:
    """One shard for each tensor; the weight map."""
    for name, tensor in tensors.items():
        save_file({name: tensor}, folder / f"{name}.safetensors")
    return {name: f"{name}.safetensors" for name in tensors}


def write_index(folder: Path, weight_map: Any, name: str = "model.safetensors.index.json") -> Path:
    path = folder / name
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def test_an_index_holds_every_tensor_of_every_file(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "1.safetensors", metadata={"format": "pt"})
    save_bin(tmp_path / "2.bin", {"b": torch.ones(3)})
    old = save_bin(tmp_path / "3.pt", {"c": torch.ones(3)}, _use_new_zipfile_serialization=False)
    found = index.build_index([str(tmp_path / name) for name in ("1.safetensors", "2.bin", "3.pt")])
    assert {name: entry.shape for name, entry in found.entries.items()} == {"a": (2,), "b": (3,)}
    assert found.legacy_files == (old,)
    assert found.metadata == {"format": "pt"}
    assert found.stamps.keys() == {str(tmp_path / name) for name in ("1.safetensors", "2.bin", "3.pt")}


def test_paths_in_an_index_outlive_a_change_of_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards(tmp_path, a=torch.ones(2))
    monkeypatch.chdir(tmp_path)
    found = index.build_index(["a.safetensors"])
    assert found["a"].file == str(tmp_path / "a.safetensors")


def test_a_name_in_two_files_is_the_last_files_as_in_dict_update(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        save_file({"w": torch.full((2,), value)}, tmp_path / f"{value}.safetensors")
    found = index.build_index([str(tmp_path / "1.0.safetensors"), str(tmp_path / "2.0.safetensors")])
    assert values_at(found["w"]).tolist() == [2.0, 2.0]


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingShardError, match=rf"gone\.bin is not in {tmp_path}"):
        index.build_index([str(tmp_path / "gone.bin")])


def test_a_stamp_holds_until_the_file_changes(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    taken = index.stamp(str(path))
    index.check_stamp(taken)
    path.write_bytes(b"123")
    with pytest.raises(CheckpointChangedError, match="its size in bytes was 5 and is 3"):
        index.check_stamp(taken)


def test_a_replaced_file_of_the_same_size_and_time_is_another_file(tmp_path: Path) -> None:
    path, other = tmp_path / "x", tmp_path / "y"
    for file in (path, other):
        file.write_bytes(b"12345")
        os.utime(file, ns=(10**18, 10**18))
    taken = index.stamp(str(path))
    os.replace(other, path)
    with pytest.raises(CheckpointChangedError, match="its inode"):
        index.check_stamp(taken)


def test_a_removed_file_has_changed(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    taken = index.stamp(str(path))
    path.unlink()
    with pytest.raises(CheckpointChangedError, match="was removed"):
        index.check_stamp(taken)


# ---------------------------------------------------------------------------------------- what a checkpoint may be


def names(files: list[str]) -> list[str]:
    return [os.path.basename(file) for file in files]


def test_a_weights_file_is_a_checkpoint(tmp_path: Path) -> None:
    shards(tmp_path, a=torch.ones(1))
    assert index.checkpoint_files(tmp_path / "a.safetensors") == [str(tmp_path / "a.safetensors")]


@pytest.mark.parametrize("by_folder", [False, True])
def test_an_index_file_or_its_folder_is_a_checkpoint(tmp_path: Path, by_folder: bool) -> None:
    path = write_index(tmp_path, shards(tmp_path, a=torch.ones(1), b=torch.ones(2)))
    (tmp_path / "config.json").write_text("{}")
    files = index.checkpoint_files(tmp_path if by_folder else path)
    assert files == [str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]


@pytest.mark.parametrize(
    ("present", "chosen"),
    [
        (["model.safetensors", "pytorch_model.bin", "training_args.bin"], "model.safetensors"),
        (["pytorch_model.bin", "optimizer.bin", "other.safetensors"], "pytorch_model.bin"),
        (["diffusion_pytorch_model.safetensors", "config.json"], "diffusion_pytorch_model.safetensors"),
        (["weights.bin"], "weights.bin"),
    ],
)
def test_the_weights_file_of_a_folder_is_found(tmp_path: Path, present: list[str], chosen: str) -> None:
    for name in present:
        (tmp_path / name).touch()
    assert names(index.checkpoint_files(tmp_path)) == [chosen]


def test_a_folder_without_weights_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    with pytest.raises(CheckpointError, match=r"holds no weights.*It holds config\.json"):
        index.checkpoint_files(tmp_path)


@pytest.mark.parametrize(
    "present",
    [["a.safetensors", "b.safetensors"], ["a.bin", "b.bin"], ["a.index.json", "b.index.json"]],
)
def test_several_candidates_are_named_and_none_is_guessed(tmp_path: Path, present: list[str]) -> None:
    for name in present:
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=f"several candidates: {', '.join(present)}"):
        index.checkpoint_files(tmp_path)


def test_a_path_that_does_not_exist_is_named_with_its_folder(tmp_path: Path) -> None:
    with pytest.raises(MissingShardError, match=f"nowhere is not in {tmp_path}.*snapshot_download"):
        index.checkpoint_files(tmp_path / "nowhere")


def test_every_missing_shard_of_an_index_is_named(tmp_path: Path) -> None:
    shards(tmp_path, a=torch.ones(1))
    path = write_index(
        tmp_path, {"a": "a.safetensors", "b": "b.safetensors", "c": "c.safetensors", "d": "b.safetensors"}
    )
    with pytest.raises(MissingShardError, match=r"2 of the 3 shards.*: b\.safetensors, c\.safetensors"):
        index.checkpoint_files(path)


@pytest.mark.parametrize(
    "shard", ["/etc/passwd", "../x.bin", "sub/../../x.bin", "", ".", "C:\\x.bin", "..\\x.bin", 5, None]
)
def test_an_index_may_not_name_a_file_outside_its_folder(tmp_path: Path, shard: Any) -> None:
    path = write_index(tmp_path, {"w": shard})
    with pytest.raises(CheckpointError, match=r"tensor 'w'.*in the folder of its index"):
        index.checkpoint_files(path)


def test_shards_may_be_links_to_elsewhere_as_in_the_hubs_cache(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    save_file({"w": torch.ones(2)}, blobs / "0123")
    (snapshot / "model-1.safetensors").symlink_to("../../blobs/0123")
    write_index(snapshot, {"w": "model-1.safetensors"})
    assert values_at(index.open_checkpoint(snapshot)["w"]).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": {}}', b"\xff", b"[" * 99999]
)
def test_an_index_without_a_weight_map_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        index.checkpoint_files(path)


def test_an_opened_checkpoint_is_the_index_of_its_files(tmp_path: Path) -> None:
    write_index(tmp_path, shards(tmp_path, a=torch.ones(1), b=torch.ones(2)))
    assert index.open_checkpoint(tmp_path) == index.build_index(index.checkpoint_files(tmp_path))
    alone = tmp_path / "a.safetensors"
    assert index.open_checkpoint(alone) == index.build_index([str(alone)])


def test_a_tensor_that_its_shard_lacks_is_named_with_the_shard(tmp_path: Path) -> None:
    write_index(tmp_path, {**shards(tmp_path, a=torch.ones(1)), "b": "a.safetensors"})
    with pytest.raises(CheckpointError, match=r"tensor 'b' is in a\.safetensors, which does not hold it"):
        index.open_checkpoint(tmp_path)


def test_a_legacy_shard_is_believed_until_it_is_loaded(tmp_path: Path) -> None:
    save_bin(tmp_path / "x.bin", {"w": torch.ones(2)}, _use_new_zipfile_serialization=False)
    write_index(tmp_path, {"w": "x.bin"}, "pytorch_model.bin.index.json")
    assert index.open_checkpoint(tmp_path).legacy_files == (str(tmp_path / "x.bin"),)


def test_indexing_safetensors_does_not_import_torch(tmp_path: Path) -> None:
    write_index(tmp_path, shards(tmp_path, a=torch.ones(1)))
    code = f"""
import sys
from hf_bigload.checkpoint.index import open_checkpoint
assert list(open_checkpoint({str(tmp_path)!r})) == ["a"]
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
