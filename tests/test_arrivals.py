"""Loaded tensors: the bits of a plain load where the plan wants them, however they came, and errors that name them."""

from __future__ import annotations

import errno
import gc
import math
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_bigload import arrivals, materialize
from hf_bigload.checkpoint import reader
from hf_bigload.checkpoint.index import build_index
from hf_bigload.checkpoint.mapping import MappedFiles
from hf_bigload.checkpoint.reader import Reader
from hf_bigload.errors import CheckpointError, DtypeError
from hf_bigload.materialize import Materializer
from hf_bigload.pinned import memory_around
from hf_bigload.skeleton import dtype_name
from hf_bigload.specs import BlockSpec, Placement, Plan, TensorSpec
from tests import simdev

SHAPES = {"layer.a": (300, 1000), "layer.b": (77,), "layer.c": (1000, 500), "layer.scalar": (), "layer.none": (0, 3)}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even these tensors are of several tasks and pieces."""
    monkeypatch.setattr(materialize, "ASIDE_FROM", 1000)
    monkeypatch.setattr(arrivals, "TASK", 256 * 1024)
    monkeypatch.setattr(arrivals, "PIECE", 48 * 1024)
    monkeypatch.setattr(arrivals._Stage, "NBYTES", 3 * (48 * 1024 + reader.PAGE))


@pytest.fixture(params=["cached", "from disk"])
def cached(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(reader._File, "is_cached", lambda _file, _offset: request.param == "cached")
    return bool(request.param == "cached")


@pytest.fixture
def saved(tmp_path: Path) -> str:
    torch.manual_seed(0)
    tensors = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    tensors["layer.a"][5, :4] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-40])
    path = str(tmp_path / "model.safetensors")
    save_file(tensors, path)
    return path


def plan_of(home: str, device: str, dtype: torch.dtype = torch.float32, streams: bool = False) -> Plan:
    """One block at `home`, computed on `device`; with `streams`, another one is on disk."""
    specs = [
        TensorSpec(name, math.prod(shape) * dtype.itemsize, dtype_name(dtype), shape) for name, shape in SHAPES.items()
    ]
    placements = [Placement(BlockSpec("layer", tuple(specs), whole=True), home, device)]
    if streams:
        other = BlockSpec("other", (TensorSpec("other.w", 4, "float32", (1,)),), whole=True)
        placements.append(Placement(other, "disk", device))
    return Plan(tuple(placements), {}, device, {}, {}, {"cpu": 1 << 20} if streams else {})


def loaded(plan: Plan, path: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    index = build_index([path])
    materializer = Materializer(plan, index.stamps)
    tensors = {name: materializer.load(name, index[name], dtype) for name in index}
    materializer.finish()
    assert materializer.collect() == 0
    return tensors


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.cpu().contiguous().view(-1).view(torch.uint8).tolist()


def check(tensors: dict[str, torch.Tensor], path: str, dtype: torch.dtype) -> None:
    for name, plain in load_file(path).items():
        expected = plain.to(dtype)
        assert tensors[name].dtype == dtype
        assert tensors[name].shape == expected.shape
        assert bits(tensors[name]) == bits(expected), name


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("streams", [False, True], ids=["all rests", "another streams"])
def test_in_ram_a_tensor_has_the_bits_and_the_residue_of_a_plain_load(
    saved: str, cached: bool, dtype: torch.dtype, streams: bool
) -> None:
    tensors = loaded(plan_of("cpu", "cpu", dtype, streams), saved, dtype)
    check(tensors, saved, dtype)
    for name, plain in load_file(saved).items():
        if plain.numel() > 1:
            assert tensors[name].data_ptr() % 64 == plain.to(dtype).data_ptr() % 64
            assert tensors[name].untyped_storage().data_ptr() == tensors[name].data_ptr()
            assert tensors[name]._version == 0 or plain.nbytes < materialize.ASIDE_FROM


def test_without_a_cast_and_with_room_for_all_nothing_is_read(saved: str) -> None:
    index = build_index([saved])
    materializer = Materializer(plan_of("cpu", "cpu"), index.stamps)
    tensor = materializer.load("layer.a", index["layer.a"], torch.float32)
    assert materializer.reader._pool.threads == []
    assert tensor.data_ptr() == materializer.source(index["layer.a"]).data_ptr()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_an_accelerator_every_copy_is_ordered_and_the_bits_are_the_plain_load_s(
    saved: str, cached: bool, dtype: torch.dtype
) -> None:
    with simdev.devices([None, None]), simdev.asynchronous():
        for device in ("sim:0", "sim:1"):
            tensors = loaded(plan_of(device, device, dtype), saved, dtype)
            assert {str(tensor.device) for tensor in tensors.values()} == {device}
            check(tensors, saved, dtype)


def test_what_is_under_way_in_memory_that_was_just_freed_is_over_before_a_load_writes_there(saved: str) -> None:
    with simdev.devices([None]), simdev.asynchronous():
        pinned = torch.ones(SHAPES["layer.a"], pin_memory=True)
        for _ in range(5):
            torch.empty(SHAPES["layer.a"], device="sim:0").copy_(pinned, non_blocking=True)
            check(loaded(plan_of("sim:0", "sim:0"), saved, torch.float32), saved, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_streams_to_an_accelerator_lies_packed_and_pinned_in_its_block_s_order(
    saved: str, cached: bool, dtype: torch.dtype
) -> None:
    with simdev.devices([None]):
        tensors = loaded(plan_of("cpu", "sim:0", dtype), saved, dtype)
        check(tensors, saved, dtype)
        at = tensors["layer.a"].data_ptr()
        for name in [name for name in SHAPES if tensors[name].numel()]:
            assert tensors[name].data_ptr() == at
            assert at % 512 == 0
            assert tensors[name].is_pinned()
            assert tensors[name].untyped_storage().nbytes() == tensors[name].nbytes
            at += -(-tensors[name].nbytes // 512) * 512
        whole = memory_around(tensors["layer.c"])
        assert whole is not None
        assert whole.data_ptr() == tensors["layer.a"].data_ptr()
        assert whole.data_ptr() + whole.numel() >= at
        assert memory_around(torch.ones(3)) is None


def test_a_value_made_in_memory_joins_its_block_only_if_nobody_else_looks_at_it() -> None:
    with simdev.devices([None]):
        materializer, value = Materializer(plan_of("cpu", "sim:0")), torch.randn(300, 1000)
        assert materializer.place("layer.a", value).data_ptr() == value.data_ptr()
        moved = materializer.place("layer.a", value, packed=True)
        assert moved.is_pinned()
        assert moved.equal(value)
        other_size = torch.randn(3)
        assert materializer.place("layer.a", other_size, packed=True).data_ptr() == other_size.data_ptr()


def test_a_load_inside_inference_mode_makes_normal_tensors(saved: str) -> None:
    with torch.inference_mode():
        tensors = loaded(plan_of("cpu", "cpu", torch.bfloat16), saved, torch.bfloat16)
    check(tensors, saved, torch.bfloat16)
    assert not tensors["layer.a"].is_inference()


# -------------------------------------------------------------------------------------------------------- under way


class Gate:
    """Holds back every task until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, call = threading.Event(), arrivals._Copying.__call__

        def wait(task: arrivals._Copying) -> int:
            assert self.opened.wait(30)
            return call(task)

        monkeypatch.setattr(arrivals._Copying, "__call__", wait)


def test_a_load_returns_before_the_bytes_are_there_and_tells_how_many_are_missing(
    saved: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, index = Gate(monkeypatch), build_index([saved])
    materializer = Materializer(plan_of("cpu", "cpu"), index.stamps)
    tensors = {name: materializer.load(name, index[name], torch.bfloat16) for name in index}
    assert materializer.collect() == 2
    gate.opened.set()
    assert materializer.collect(wait=True) < 2
    materializer.finish()
    check(tensors, saved, torch.bfloat16)


def test_what_was_abandoned_is_not_written_to_any_more(saved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, index = Gate(monkeypatch), build_index([saved])
    materializer = Materializer(plan_of("cpu", "cpu"), index.stamps)
    tensor = materializer.load("layer.a", index["layer.a"], torch.bfloat16)
    threading.Timer(0.05, gate.opened.set).start()
    materializer.abandon()
    assert tensor.count_nonzero() == 0
    assert materializer.collect() == 0


def test_bytes_outside_their_tensors_are_bounded(saved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    take = arrivals.pinned_buffer
    monkeypatch.setattr(arrivals, "pinned_buffer", lambda n, device: made.append(n) or take(n, device))
    monkeypatch.setattr(reader._File, "is_cached", lambda _file, _offset: False)
    with simdev.devices([None]):
        index = build_index([saved])
        coming = arrivals.Arrivals(Reader(stamps=index.stamps), 2 * arrivals._Stage.NBYTES, keeps_cache=True)
        for name in ("layer.a", "layer.c"):
            target = torch.empty(SHAPES[name], dtype=torch.float16, device="sim:0")
            coming.bring(name, index[name], MappedFiles().tensor(index[name]), target)
        coming.finish()
    assert sum(made) <= 2 * arrivals._Stage.NBYTES


# --------------------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize("home", ["cpu", "sim:0"])
def test_a_file_that_shrinks_meanwhile_is_named_with_the_tensor(
    saved: str, home: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, index = Gate(monkeypatch), build_index([saved])
    monkeypatch.setattr(reader._File, "is_cached", lambda _file, _offset: False)
    with simdev.devices([None]):
        materializer = Materializer(plan_of(home, home), index.stamps)
        materializer.load("layer.a", index["layer.a"], torch.bfloat16)
        with open(saved, "r+b") as file:
            file.truncate(index["layer.a"].offset + 1000)
        gate.opened.set()
        with pytest.raises(CheckpointError, match=r"Tensor 'layer.a': .*model.safetensors") as raised:
            materializer.finish()
        assert "bytes" in str(raised.value)


def test_a_disk_that_fails_is_told_with_tensor_file_and_bytes(saved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(reader._File, "is_cached", lambda _file, _offset: False)
    monkeypatch.setattr(reader._File, "read", fail)
    index = build_index([saved])
    materializer = Materializer(plan_of("cpu", "cpu"), index.stamps)
    materializer.load("layer.a", index["layer.a"], torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"'layer.a': 1200000 bytes .* of .*model.safetensors could not be read"):
        materializer.finish()


def test_a_device_without_room_is_told_with_tensor_and_bytes(saved: str) -> None:
    index = build_index([saved])
    with simdev.devices([1 << 20]), pytest.raises(torch.OutOfMemoryError, match=r"'layer.a' needs 1.14 MiB on sim:0"):
        Materializer(plan_of("sim:0", "sim:0"), index.stamps).load("layer.a", index["layer.a"], torch.float32)


def test_a_load_that_is_dropped_half_way_frees_no_memory_that_a_device_reads(
    saved: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, synchronized = build_index([saved]), []
    with simdev.devices([None]), simdev.asynchronous():
        materializer = Materializer(plan_of("sim:0", "sim:0"), index.stamps)
        tensor = materializer.load("layer.a", index["layer.a"], torch.float32)
        wait = arrivals._Half.wait
        monkeypatch.setattr(arrivals._Half, "wait", lambda half: synchronized.append(wait(half)))
        while materializer.collect(wait=True):
            pass
        synchronized.clear()
        del materializer
        until = time.monotonic() + 10  # a reader lets go of its last task in its own time
        while len(synchronized) < 2 and time.monotonic() < until:
            gc.collect()
        assert len(synchronized) >= 2
        tensor.cpu()


def test_a_cast_that_cannot_be_done_is_refused_before_it_is_begun(tmp_path: Path) -> None:
    path = str(tmp_path / "model.safetensors")
    save_file({"w": torch.randn(9000, dtype=torch.complex64)}, path)
    index = build_index([path])
    with pytest.raises(DtypeError, match=r"'w' is torch.complex64 and cannot be cast to torch.float32"):
        Materializer(plan_of("cpu", "cpu"), index.stamps).load("w", index["w"], torch.float32)


def test_a_process_may_end_right_after_a_load(saved: str) -> None:
    script = f"""if True:
        import torch
        from hf_bigload.checkpoint.index import build_index
        from hf_bigload.materialize import Materializer
        from hf_bigload.specs import Plan
        index = build_index([{saved!r}])
        materializer = Materializer(Plan((), {{}}, "cpu", {{}}, {{}}, {{}}), index.stamps)
        tensors = [materializer.load(name, index[name], torch.bfloat16) for name in index]
        materializer.finish()
        del materializer, tensors
    """
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", script], check=False, timeout=60).returncode == 0
