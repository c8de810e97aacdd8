"""A weight that rests on disk converted is converted once: later loads find it, and only ever the right one."""

from __future__ import annotations

import gc
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_bigload import materialize
from hf_bigload.checkpoint import spill, spill_cache

from .models import BUDGETED, ON_DISK, Saved, all_tensors, assert_same_model, save
from .test_checkpoints import _mixed_bin, _one_legacy_bin, checkpoint

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_BIGLOAD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def nothing_new(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on, a cast of a tensor, a write to disk, or a file in torch's old format that is read fails."""

    def start() -> None:
        monkeypatch.setattr(materialize, "_cast", lambda name, *_: pytest.fail(f"cast {name}"))
        monkeypatch.setattr(materialize, "load_bin", lambda path: pytest.fail(f"read {path}"))
        monkeypatch.setattr(spill.os, "pwrite", lambda *_: pytest.fail("wrote to disk"))

    return start


def weights(cache: Path) -> list[Path]:
    return sorted((cache / "casts").rglob("*.weights"))


def load_and_forget(load: Callable[[], Any]) -> None:
    """The model is not handed on: a caller may keep what it gave away, while the compiler's frames are in use."""
    load()
    gc.collect()
    until = time.monotonic() + 5  # what is being read for it ends in its own time
    while any(entry.in_use for entry in spill_cache.entries()) and time.monotonic() < until:
        time.sleep(0.05)
        gc.collect()


# ------------------------------------------------------------------------------------------------------------- reuse


def test_a_second_load_converts_and_writes_nothing(
    llama: Saved, plain: Any, cache: Path, nothing_new: Callable[[], None]
) -> None:
    assert_same_model(llama.load(ON_DISK, dtype=BF16), plain("llama", BF16))
    assert len(weights(cache)) == 1 and not (cache / "spill").exists()
    nothing_new()
    assert_same_model(llama.load(ON_DISK, dtype=BF16), plain("llama", BF16))


def test_of_a_second_load_the_source_is_not_read(llama: Saved, plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    load_and_forget(lambda: llama.load(ON_DISK, dtype=BF16))
    source = materialize.Materializer.source
    monkeypatch.setattr(materialize.Materializer, "source", lambda self, entry: _Unread(source(self, entry)))
    assert_same_model(llama.load(ON_DISK, dtype=BF16), plain("llama", BF16))


class _Unread:
    """A tensor of which only the dtype is looked at."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.dtype = tensor.dtype


@pytest.mark.parametrize("write", [_one_legacy_bin, _mixed_bin])
@pytest.mark.parametrize("dtype", [None, BF16])
def test_files_in_torchs_old_format_are_read_once(
    write: Any, dtype: torch.dtype | None, cache: Path, tmp_path: Path, nothing_new: Callable[[], None]
) -> None:
    source = checkpoint("llama", tmp_path / "checkpoint", write)
    expected = source.plain(dtype=dtype)
    assert_same_model(source.load(ON_DISK, dtype=dtype), expected)
    written = weights(cache)
    nothing_new()
    assert_same_model(source.load(ON_DISK, dtype=dtype), expected)
    assert weights(cache) == written and not (cache / "spill").exists()


def test_another_budget_converts_the_rest_only(
    llama: Saved, plain: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = llama.load(BUDGETED, dtype=BF16, max_memory={"cpu": int(0.35 * llama.nbytes)})
    some = {name for name, tensor in all_tensors(first) if _is_mapped_from(cache, tensor)}
    (segment,) = weights(cache)
    before = segment.stat()
    cast, wanted = materialize._cast, []
    monkeypatch.setattr(materialize, "_cast", lambda name, *args: wanted.append(name) or cast(name, *args))
    second = llama.load(ON_DISK, dtype=BF16)
    everything = {name for name, tensor in all_tensors(second) if _is_mapped_from(cache, tensor)}
    assert some and some < everything
    assert set(wanted) == everything - some
    assert len(weights(cache)) == 2 and segment.stat().st_mtime_ns == before.st_mtime_ns
    for model in (first, second):
        assert_same_model(model, plain("llama", BF16))
    monkeypatch.setattr(materialize, "_cast", lambda *_: pytest.fail("both segments are there"))
    assert_same_model(llama.load(ON_DISK, dtype=BF16), plain("llama", BF16))


def _is_mapped_from(cache: Path, tensor: torch.Tensor) -> bool:
    with open("/proc/self/maps") as maps:
        for line in maps:
            first, last = (int(end, 16) for end in line.split(maxsplit=1)[0].split("-"))
            if first <= tensor.data_ptr() < last:
                return str(cache) in line
    return False


def test_two_dtypes_of_one_checkpoint(llama: Saved, plain: Any, cache: Path) -> None:
    models = [llama.load(ON_DISK, dtype=dtype) for dtype in (BF16, torch.float16)]
    for model, dtype in zip(models, (BF16, torch.float16), strict=True):
        assert_same_model(model, plain("llama", dtype))
    assert len(spill_cache.entries()) == 2


def test_models_that_share_their_copies_share_no_writes(llama: Saved, plain: Any) -> None:
    one, other = (llama.load(ON_DISK, dtype=BF16) for _ in range(2))
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.zero_()
    for model in (other, llama.load(ON_DISK, dtype=BF16)):
        assert_same_model(model, plain("llama", BF16))


@pytest.mark.parametrize("name", ["mixtral", "hrm_text"])
def test_what_the_library_converts_by_code_of_its_own_is_converted_each_time(
    name: str, saved: Any, plain: Any, cache: Path
) -> None:
    for _ in range(2):
        model = saved(name).load(ON_DISK, dtype=BF16)
        assert_same_model(model, plain(name, BF16))
        assert list((cache / "spill").rglob("weights.spill"))
        del model
        gc.collect()
    assert not list((cache / "spill").iterdir())


# ------------------------------------------------------------------------------------------------- the right copies


def test_a_checkpoint_that_changed_under_its_name_is_converted_anew(tmp_path: Path) -> None:
    source = save("llama", tmp_path / "checkpoint")
    load_and_forget(lambda: source.load(ON_DISK, dtype=BF16))
    for shard in sorted(source.folder.glob("*.safetensors")):
        status, tensors = shard.stat(), load_file(shard)
        save_file({name: tensor + 1 for name, tensor in tensors.items()}, shard, {"format": "pt"})
        assert shard.stat().st_size == status.st_size
    assert_same_model(source.load(ON_DISK, dtype=BF16), source.plain(dtype=BF16))


def test_a_damaged_cache_is_written_anew(llama: Saved, plain: Any, cache: Path) -> None:
    load_and_forget(lambda: llama.load(ON_DISK, dtype=BF16))
    (manifest,) = (cache / "casts").rglob("*.json")
    os.truncate(manifest, 100)
    for _ in range(2):
        model = llama.load(ON_DISK, dtype=BF16)
        assert_same_model(model, plain("llama", BF16))
        del model
        gc.collect()
    until = time.monotonic() + 10  # what is damaged goes when a load finds that nobody uses the entry
    while len(weights(cache)) > 1 and time.monotonic() < until:
        load_and_forget(lambda: llama.load(ON_DISK, dtype=BF16))
    assert len(weights(cache)) == 1 and weights(cache)[0].stem != manifest.stem


def test_a_cache_that_is_removed_under_a_model_goes_on_streaming(llama: Saved, plain: Any, cache: Path) -> None:
    """By a person: `rm` refuses."""
    model = llama.load(ON_DISK, dtype=BF16)
    shutil.rmtree(cache)
    assert_same_model(model, plain("llama", BF16))


def test_a_model_holds_its_entry_as_long_as_it_lives(llama: Saved, plain: Any) -> None:
    model = llama.load(ON_DISK, dtype=BF16)
    (entry,) = spill_cache.entries()
    assert entry.in_use and not spill_cache.remove(entry.name)
    assert_same_model(model, plain("llama", BF16))
    del model
    gc.collect()
    assert spill_cache.remove(entry.name)


# ------------------------------------------------------------------------------------------------------- without it


def test_a_folder_that_the_user_names_is_used_as_it_always_was(
    llama: Saved, plain: Any, cache: Path, tmp_path: Path
) -> None:
    model = llama.load(ON_DISK, dtype=BF16, offload_folder=tmp_path / "offload")
    assert_same_model(model, plain("llama", BF16))
    assert not cache.exists() and list((tmp_path / "offload").rglob("weights.spill"))


@pytest.mark.parametrize("size", ["0", "60KB"], ids=["no room", "too little room"])
def test_what_the_cache_has_no_room_for_is_written_privately(
    size: str, llama: Saved, plain: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_BIGLOAD_CACHE_SIZE", size)
    for _ in range(2):
        model = llama.load(ON_DISK, dtype=BF16)
        assert_same_model(model, plain("llama", BF16))
        assert list((cache / "spill").rglob("weights.spill"))
        assert sum(entry.nbytes for entry in spill_cache.entries()) <= 60_000
        assert len(weights(cache)) == (size != "0")
    del model
    gc.collect()
    assert not list((cache / "spill").iterdir())


def test_a_cache_that_cannot_be_written_to_is_done_without(llama: Saved, plain: Any, cache: Path) -> None:
    cache.mkdir()
    (cache / "casts").write_text("somebody's")
    assert_same_model(llama.load(ON_DISK, dtype=BF16), plain("llama", BF16))
    assert (cache / "casts").read_text() == "somebody's"
