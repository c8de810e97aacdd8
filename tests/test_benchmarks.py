"""The benchmarks at tiny sizes: what they write loads, what they limit is limited, what they measure was done."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from benchmarks import memory_cgroup, raw_disk, t0_forward, write_checkpoint
from benchmarks.memory_cgroup import MemoryGroup, find_parent, parse_bytes, run_limited
from benchmarks.write_checkpoint import ARCHITECTURES, RandomBlock, Tensor, list_tensors, split_into_shards

MIB = 1 << 20
TINY = [name for name in ARCHITECTURES if name.endswith("_tiny")]


def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for shard in shards_of(folder):
        with safe_open(shard, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


# --- write_checkpoint ---


@pytest.mark.parametrize(
    ("name", "nbytes"), [("t0_3b", 5_699_514_368), ("t0pp", 22_270_664_704), ("llama_1b", 4_400_193_536)]
)
def test_real_names_have_the_published_size(name: str, nbytes: int) -> None:
    architecture = ARCHITECTURES[name]
    assert sum(tensor.nbytes for tensor in list_tensors(architecture, architecture.dtype)) == nbytes


@pytest.mark.parametrize("name", TINY)
def test_a_written_checkpoint_loads_with_nothing_missing_or_left_over(name: str, tmp_path: Path) -> None:
    import transformers

    write_checkpoint.write_checkpoint(name, tmp_path)
    model_class = getattr(transformers, ARCHITECTURES[name].config["architectures"][0])
    _, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info


def test_shards_and_index_agree_and_data_begins_on_eight_bytes(tmp_path: Path) -> None:
    total = write_checkpoint.write_checkpoint("t0pp_tiny", tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == total
    assert len(shards_of(tmp_path)) == 5
    for shard in shards_of(tmp_path):
        assert int.from_bytes(shard.read_bytes()[:8], "little") % 8 == 0
        with safe_open(shard, framework="pt") as file:
            assert set(file.keys()) == {name for name, at in index["weight_map"].items() if at == shard.name}


def test_the_same_names_give_the_same_values_however_they_are_sharded(tmp_path: Path) -> None:
    write_checkpoint.write_checkpoint("t0_3b_tiny", tmp_path / "two")
    write_checkpoint.write_checkpoint("t0_3b_tiny", tmp_path / "three", shards=3)
    two, three = read_all(tmp_path / "two"), read_all(tmp_path / "three")
    assert two.keys() == three.keys()
    assert all(torch.equal(tensor, three[name]) for name, tensor in two.items())


def test_matrices_are_small_random_and_all_different_and_norms_are_one(tmp_path: Path) -> None:
    write_checkpoint.write_checkpoint("llama_1b_tiny", tmp_path, dtype=torch.bfloat16)
    tensors = read_all(tmp_path)
    matrices = [tensor for tensor in tensors.values() if tensor.dim() > 1]
    norms = [tensor for tensor in tensors.values() if tensor.dim() == 1]
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert all(0.015 < tensor.float().std() < 0.025 for tensor in matrices)
    assert len({tuple(tensor.flatten()[:8].tolist()) for tensor in matrices}) == len(matrices)
    assert norms and all((tensor == 1).all() for tensor in norms)


def test_a_tensor_larger_than_the_random_block_goes_round_it() -> None:
    block = RandomBlock(torch.float32, elements=101)
    data = b"".join(block.chunks(Tensor("a.weight", (25, 10), torch.float32, 0)))
    values = torch.frombuffer(bytearray(data), dtype=torch.float32)
    assert values.shape == (250,)
    assert torch.equal(values[:101], values[101:202])
    assert len(values.reshape(25, 10).unique(dim=0)) == 25


def test_a_folder_with_files_in_it_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        write_checkpoint.write_checkpoint("t0_3b_tiny", tmp_path)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("config.json", "mine")]


def test_too_little_room_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: Any) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(write_checkpoint.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(OSError, match=r"477184 bytes, the disk 1000 bytes free"):
        write_checkpoint.write_checkpoint("t0_3b_tiny", tmp_path / "new" / "folder")
    assert not list(tmp_path.iterdir())


def test_more_shards_than_the_tensors_can_fill_are_refused() -> None:
    tensors = [Tensor("big", (100,), torch.float32, 0), Tensor("small", (1,), torch.float32, 400)]
    with pytest.raises(ValueError, match="big alone has 400"):
        split_into_shards(tensors, 3)


# --- memory_cgroup ---


@pytest.mark.parametrize(
    ("text", "nbytes"), [("4096", 4096), ("8GB", 8 * 10**9), ("12GiB", 12 << 30), ("1.5 mib", 3 << 19), ("7B", 7)]
)
def test_sizes_are_read_as_people_write_them(text: str, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "GiB", "12 parsecs", "-1GB", "1e9"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a size"):
        parse_bytes(text)


def test_the_memory_controller_is_found_in_either_version(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no memory controller"):
        find_parent(tmp_path)
    (tmp_path / "cgroup.controllers").write_text("cpu memory pids\n")
    assert find_parent(tmp_path)[1] is memory_cgroup.V2
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("1\n")
    assert find_parent(tmp_path) == (tmp_path / "memory", memory_cgroup.V1)


def test_figures_are_read_alone_or_beside_their_key(tmp_path: Path) -> None:
    (tmp_path / "memory.events").write_text("low 0\nmax 7\noom_kill 1\n")
    (tmp_path / "memory.peak").write_text("12345\n")
    group = MemoryGroup(tmp_path, memory_cgroup.V2)
    assert group.read("memory.peak") == 12345
    assert group.read(*memory_cgroup.V2.limit_hits) == 7
    assert group.read("memory.events", "unknown") == 0
    assert group.read("memory.unknown") == 0


def _can_make_groups() -> bool:
    try:
        with memory_cgroup.memory_group(MIB):
            return True
    except OSError:
        return False


needs_cgroup = pytest.mark.skipif(not _can_make_groups(), reason="needs root and a memory cgroup controller")


def groups_left() -> list[Path]:
    return list(find_parent()[0].glob(f"benchmark-{os.getpid()}-*"))


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


@needs_cgroup
def test_a_command_within_its_limit_ends_as_it_would_without() -> None:
    code = "import os, sys; b = bytearray(32 << 20); print(os.environ['WORD']); sys.exit(3)"
    result = run_limited(python(code), 128 * MIB, env={"WORD": "hello"}, capture_output=True)
    assert (result.exit_code, result.output, result.oom_kills) == (3, "hello\n", 0)
    assert 32 * MIB < result.peak_bytes < 128 * MIB
    assert not groups_left()


@needs_cgroup
def test_a_command_over_its_limit_is_killed_and_the_group_removed() -> None:
    result = run_limited(python("b = bytearray(200 << 20)"), 64 * MIB)
    assert (result.exit_code, result.oom_kills) == (-9, 1)
    assert result.failcnt > 0
    assert result.peak_bytes <= 64 * MIB
    assert not groups_left()


@needs_cgroup
def test_page_cache_counts_against_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "file"
    code = f"f = open({str(path)!r}, 'wb'); [f.write(bytes(1 << 20)) for _ in range(96)]"
    result = run_limited(python(code), 160 * MIB)
    assert result.exit_code == 0
    assert result.peak_bytes > 96 * MIB
    assert result.peak_anon_bytes < 48 * MIB


@needs_cgroup
def test_a_command_that_takes_too_long_is_killed() -> None:
    assert run_limited(python("import time; time.sleep(60)"), 64 * MIB, timeout=0.2).exit_code == -9
    assert not groups_left()


@needs_cgroup
def test_the_command_line_passes_the_exit_code_on_and_prints_the_figures(capsys: Any) -> None:
    assert memory_cgroup.main(["--limit", "64MiB", "--", *python("raise SystemExit(5)")]) == 5
    figures = json.loads(capsys.readouterr().err)
    assert figures["exit_code"] == 5
    assert figures["limit_bytes"] == 64 * MIB


# --- raw_disk ---


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    sizes = {"a": 9 * MIB, "b": 12 * MIB + 123}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(bytes(size))
    return [tmp_path / name for name in sizes]


@pytest.mark.parametrize("limit", [0, 4096, 10 * MIB, 10**9])
def test_no_byte_is_asked_for_twice_and_never_more_than_the_limit(files: list[Path], limit: int) -> None:
    runs = raw_disk.share_out(raw_disk.list_chunks(files), limit, shares=3)
    chunks = [chunk for run in runs for chunk in run]
    assert len(runs) == 3
    assert sum(chunk.nbytes for chunk in chunks) <= limit
    assert len({(chunk.path, chunk.offset) for chunk in chunks}) == len(chunks)
    assert all(chunk.offset + chunk.nbytes <= chunk.path.stat().st_size for chunk in chunks)


def test_every_mode_reads_its_share(files: list[Path]) -> None:
    readings = raw_disk.measure_all(files, 12 * MIB)
    assert readings[-1].mode == "buffered, 1 thread"
    assert {reading.nbytes for reading in readings} == {4 * MIB}


def test_a_file_is_read_to_its_very_end(files: list[Path]) -> None:
    for direct in (True, False):
        reading = raw_disk.measure(raw_disk.Mode(direct, threads=2), list(raw_disk.list_chunks(files)))
        assert reading.nbytes == 21 * MIB + 123


# --- t0_forward ---


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    write_checkpoint.write_checkpoint("t0_3b_tiny", tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def forward(tiny: Path, capsys: Any) -> Iterator[Callable[..., dict[str, Any]]]:
    threads = torch.get_num_threads()

    def run(engine: str, *more: str) -> dict[str, Any]:
        t0_forward.main(["--engine", engine, "--checkpoint", str(tiny), *more])
        return json.loads(capsys.readouterr().out)

    yield run
    torch.set_num_threads(threads)


def test_stock_from_disk_gives_the_logits_of_a_plain_load(forward: Callable[..., dict[str, Any]], tiny: Path) -> None:
    pytest.importorskip("accelerate")
    plain = forward("plain", "--new-tokens", "3", "--forwards", "1")
    stock = forward("stock", "--new-tokens", "3", "--max-memory", "cpu=200KB")
    assert len(plain["forwards"]) == 1 and len(stock["forwards"]) == 2
    assert {run["logits_sha256"] for run in plain["forwards"] + stock["forwards"]} == {
        plain["forwards"][0]["logits_sha256"]
    }
    assert plain["forwards"][0]["finite"]
    assert plain["generate"]["tokens_sha256"] == stock["generate"]["tokens_sha256"]
    assert set(stock["device_map"]) == {"cpu", "disk"}
    assert sum(device["bytes"] for device in stock["device_map"].values()) == 477184
    assert [path.name for path in tiny.parent.iterdir()] == ["tiny"], "the offload folder is removed"


def test_peaks_are_bytes_and_contain_one_another(forward: Callable[..., dict[str, Any]]) -> None:
    report = forward("plain")
    assert report["peak_rss_bytes"] >= report["peak_anon_bytes"] >= report["runtime_anon_bytes"] > 0


def test_max_memory_is_given_as_the_libraries_take_it() -> None:
    assert t0_forward.parse_max_memory("cpu=8GB,0=10GiB") == {"cpu": "8GB", 0: "10GiB"}
    with pytest.raises(ValueError, match="write it like"):
        t0_forward.parse_max_memory("8GB")
