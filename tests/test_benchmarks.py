"""The benchmarks at tiny sizes: what they write loads, what they limit is limited, what they measure was done."""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import hf_bigload
from benchmarks import (
    cases,
    forward,
    gpu,
    memory_cgroup,
    pipelines,
    raw_disk,
    report,
    resident_forward,
    streaming,
    t0_forward,
    write_checkpoint,
)
from benchmarks.cases import CASES, assert_same_bits
from benchmarks.measure import parse_max_memory, warm
from benchmarks.memory_cgroup import MemoryGroup, find_parent, parse_bytes, run_limited
from benchmarks.processes import NotRunError, ResultsDifferError, Runner, Steady, WorkerError, guarded, sample
from benchmarks.report import Row, Target
from benchmarks.write_checkpoint import (
    ARCHITECTURES,
    RandomBlock,
    Tensor,
    ensure_checkpoint,
    list_tensors,
    split_into_shards,
)
from tests import simdev

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
    ("name", "nbytes"),
    [
        ("t0_3b", 5_699_514_368),
        ("t0pp", 22_270_664_704),
        ("llama_1b", 4_400_193_536),
        ("llama_8b", 16_060_522_496),
    ],
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


def test_cached_pages_are_kept_only_when_they_are_what_is_measured(files: list[Path]) -> None:
    chunks = list(raw_disk.list_chunks(files))
    warm(files)
    assert raw_disk.measure(raw_disk.Mode(direct=False, threads=2, cached=True), chunks).disk_bytes == 0
    assert raw_disk.Mode(direct=False, threads=2, cached=True).name == "cached, 2 threads"


# --- forward, as a T0 is run ---


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    write_checkpoint.write_checkpoint("t0_3b_tiny", tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def threads() -> Iterator[None]:
    """Workers set how many there are."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def run_t0(tiny: Path, threads: None, capsys: Any) -> Iterator[Callable[..., dict[str, Any]]]:
    def run(engine: str, *more: str) -> dict[str, Any]:
        t0_forward.main(["--engine", engine, "--checkpoint", str(tiny), *more])
        return json.loads(capsys.readouterr().out)

    yield run
    hf_bigload.disable()


def test_stock_from_disk_gives_the_logits_of_a_plain_load(run_t0: Callable[..., dict[str, Any]], tiny: Path) -> None:
    pytest.importorskip("accelerate")
    plain = run_t0("plain", "--new-tokens", "3", "--forwards", "1")
    stock = run_t0("stock", "--new-tokens", "3", "--max-memory", "cpu=200KB")
    assert len(plain["forwards"]) == 1 and len(stock["forwards"]) == 2
    assert {run["logits_sha256"] for run in plain["forwards"] + stock["forwards"]} == {
        plain["forwards"][0]["logits_sha256"]
    }
    assert plain["forwards"][0]["finite"]
    assert plain["generate"]["tokens_sha256"] == stock["generate"]["tokens_sha256"]
    assert set(stock["device_map"]) == {"cpu", "disk"}
    assert sum(device["bytes"] for device in stock["device_map"].values()) == 477184
    assert [path.name for path in tiny.parent.iterdir()] == ["tiny"], "the offload folder is removed"


def test_ours_says_what_it_streamed_and_what_it_had_planned(run_t0: Callable[..., dict[str, Any]]) -> None:
    ours = run_t0("hf_bigload", "--max-memory", "cpu=300KB", "--warm-up", "1")
    assert len(ours["warm_up"]) == 1 and len(ours["forwards"]) == 2
    assert all(0 < run["streamed_bytes"] < 477184 for run in ours["forwards"])
    assert ours["plan"]["used"]["cpu"] <= 300_000


def test_peaks_are_bytes_and_contain_one_another(run_t0: Callable[..., dict[str, Any]]) -> None:
    report = run_t0("plain")
    peaks = [report[f"{name}_bytes"] for name in ("peak_rss", "peak_anon", "runtime_anon")]
    # The kernel adds its counters up late, and Python gives memory back now and then
    assert all(larger >= 0.95 * smaller > 0 for larger, smaller in itertools.pairwise(peaks)), peaks


def test_max_memory_is_given_as_the_libraries_take_it() -> None:
    assert parse_max_memory("cpu=8GB,0=1000") == {"cpu": "8GB", 0: 1000}
    with pytest.raises(ValueError, match="write it like"):
        parse_max_memory("8GB")


# --- whole runs ---


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch, threads: None) -> Iterator[None]:
    """Workers run here: the same logic, without the seconds that every new process needs for its imports."""

    def run(self: Runner, module: str, *arguments: object, limit: int | None = None) -> dict[str, Any]:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            importlib.import_module(f"benchmarks.{module}").main([str(argument) for argument in arguments])
        hf_bigload.disable()
        return json.loads(printed.getvalue().splitlines()[-1])

    monkeypatch.setattr(Runner, "run", run)
    for worker in (forward, resident_forward):
        monkeypatch.setattr(worker, "THREADS", 1)  # of models this small, more only wait for each other
    simdev.load()
    with simdev.devices([None], hide_others=True):
        simdev.load().set_visible_count(0)  # only for workers that open them
        yield
    hf_bigload.disable()


@pytest.fixture
def streaming_run(in_this_process: None, tmp_path: Path) -> Callable[..., int]:
    folders = ["--checkpoint", str(tmp_path / "llama"), "--t0-checkpoint", str(tmp_path / "t0")]
    return lambda *more: streaming.main(["--model", "llama_1b_tiny", "--small-forwards", "2", *folders, *more])


def test_every_case_of_the_issue_is_measured_and_recorded(streaming_run: Callable[..., int], tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    record = tmp_path / "RESULTS.md"
    record.write_text("# Mine")
    assert streaming_run("--forwards", "1", "--record", str(record)) == 0
    text = record.read_text()
    assert text.startswith("# Mine\n\n## Streaming")
    rows = [line for line in text.splitlines() if any(line.startswith(f"| {case.title} |") for case in CASES)]
    assert len(rows) == len(CASES) == 10
    assert not [row for row in rows if "FAILED" in row or "DIFFER" in row]
    assert streaming.WITHOUT_ISOLATION in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["RESULTS.md", "llama", "t0"], "no scratch is left"


def test_a_run_whose_bits_differ_fails_and_says_where(
    streaming_run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    pytest.importorskip("accelerate")
    original = forward.run_forward

    def altered(model: Any, tokens: int, engine: str, *more: Any) -> dict[str, Any]:
        return original(model, tokens, engine, *more) | ({"logits_sha256": "0" * 64} if engine == "hf_bigload" else {})

    monkeypatch.setattr(forward, "run_forward", altered)
    assert streaming_run("--case", "t0_streaming") == 1
    printed = capsys.readouterr()
    assert "RESULTS DIFFER" in printed.out
    assert "16 tokens: hf_bigload 000000000000" in printed.err


def test_the_whole_logic_for_accelerators_runs_on_the_simulated_one(
    in_this_process: None, tmp_path: Path, capsys: Any
) -> None:
    pytest.importorskip("accelerate")
    assert gpu.main(["--device", "sim", "--tiny", "--steps", "2", "--folder", str(tmp_path / "bench")]) == 0
    printed = capsys.readouterr().out
    assert "same bits as resident" in printed
    assert "pinned memory to device" in printed
    assert "failed" not in printed and "FAILED" not in printed and "DIFFER" not in printed


def test_an_accelerator_that_gives_other_bits_fails_the_run(
    in_this_process: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(gpu, "SOME_TINY_MODELS", ("llama",))
    monkeypatch.setattr("benchmarks.placements.same", lambda wanted, found: wanted.is_floating_point())
    folder = str(tmp_path / "bench")
    assert gpu.main(["--device", "sim", "--tiny", "--part", "correctness", "--folder", folder]) == 1
    assert "RESULTS DIFFER" in capsys.readouterr().out


# --- pipelines ---


@pytest.fixture
def pipelines_run(in_this_process: None, tmp_path: Path) -> Callable[..., int]:
    pytest.importorskip("diffusers")
    options = ["--device", "sim", "--steps", "2", "--folder", str(tmp_path / "bench")]
    return lambda *more: pipelines.main([*options, *more])


def test_a_pipeline_moves_each_encoder_block_once_and_its_denoiser_never(
    pipelines_run: Callable[..., int], tmp_path: Path
) -> None:
    pytest.importorskip("accelerate")
    record = tmp_path / "RESULTS.md"
    assert pipelines_run("--record", str(record)) == 0
    rows = [line for line in record.read_text().splitlines() if line.startswith("| pipeline")]
    met = [row for row in rows if "| met |" in row]
    assert [row.split(",")[0] for row in met[1:]] == [
        f"| pipeline: {name}" for name in ("transformer", "text_encoder", "text_encoder_2")
    ]
    assert "0.00 kB" in met[1]
    assert len(rows) == 5 + 3 * len(pipelines.PEERS)
    assert not [row for row in rows if "failed" in row or "NOT MET" in row]


def without_engines(monkeypatch: pytest.MonkeyPatch, change: Callable[[str, dict[str, Any]], dict[str, Any]]) -> None:
    """Each engine's report is made up: bytes, seconds and pixels that are the same, then changed."""

    def run(self: Runner, module: str, *arguments: object, limit: int | None = None) -> dict[str, Any]:
        engine = str(arguments[arguments.index("--engine") + 1])
        call = {"seconds": 1.0, "peak_bytes": 2, "copied_bytes": 3, "pixels_sha256": "a"}
        components = ("transformer", "vae", *pipelines.ENCODERS)
        empty: dict[str, dict[str, int]] = {name: {} for name in components}
        return change(engine, {"engine": engine, "calls": [call], "budget": 1, "moved": empty, "streamed": empty})

    monkeypatch.setattr(Runner, "run", run)


def test_a_peer_that_fails_or_makes_another_image_fails_its_rows_alone(
    pipelines_run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def change(engine: str, report: dict[str, Any]) -> dict[str, Any]:
        if engine == "model_cpu_offload":
            raise WorkerError("ended with 1:\nValueError: no such stream")
        return report | ({"calls": [{"pixels_sha256": "b"}]} if engine == "group_offload_blocks" else {})

    without_engines(monkeypatch, change)
    assert pipelines_run() == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "model_cpu_offload failed" in printed and "ValueError: no such stream" in printed
    assert "group_offload_blocks failed" in printed and "group_offload_leaves: a call" in printed


def test_another_image_of_ours_fails_the_run(
    pipelines_run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def change(engine: str, report: dict[str, Any]) -> dict[str, Any]:
        return report | ({"calls": [{"pixels_sha256": "b"}]} if engine == "hf_bigload" else {})

    without_engines(monkeypatch, change)
    assert pipelines_run() == 1
    assert "hf_bigload: pixels b, resident a" in capsys.readouterr().err


# --- what the runs are made of ---


def test_a_worker_is_a_process_of_its_own_and_its_reads_are_counted(tmp_path: Path) -> None:
    runner = Runner({"WORD": "hello"}, isolated=False, read_limit=0)
    with pytest.raises(WorkerError, match="nowhere"):
        runner.run("forward", "--engine", "plain", "--checkpoint", tmp_path / "nowhere")
    assert runner.read_bytes == 0


def test_no_process_outlives_the_deadline_of_its_run(tmp_path: Path) -> None:
    runner = Runner({}, isolated=False, read_limit=0, deadline=time.monotonic() + 0.1)
    with pytest.raises(NotRunError, match="stopped"):
        runner.run("forward", "--engine", "plain", "--checkpoint", tmp_path)
    with pytest.raises(NotRunError, match="not run"):
        runner.run("forward", "--engine", "plain", "--checkpoint", tmp_path)


def test_what_was_not_run_is_named_and_wrong_results_fail(capsys: Any) -> None:
    def rows(error: Exception) -> Iterator[Row]:
        yield Row("first")
        raise error

    found = list(guarded(Row("case"), lambda: rows(NotRunError("not run: no peer"))))
    assert found == [(Row("first"), True), (Row("case", verdict="not run: no peer"), True)]
    assert [right for _, right in guarded(Row("case"), lambda: rows(ResultsDifferError("a; b")))] == [True, False]
    assert "RESULTS DIFFER: case: a; b" in capsys.readouterr().err


def reports(**hashes: str) -> dict[str, Any]:
    return {name: {"forwards": [{"tokens": 1, "logits_sha256": value}]} for name, value in hashes.items()}


def test_bits_are_compared_by_the_number_of_tokens() -> None:
    assert_same_bits(**reports(ours="a", stock="a", plain="a"))
    assert_same_bits(a=reports(a="1")["a"], b={"forwards": [{"tokens": 64, "logits_sha256": "2"}]})
    with pytest.raises(ResultsDifferError, match="1 tokens: ours, plain a; stock b"):
        assert_same_bits(**reports(ours="a", stock="b", plain="a"))


def test_a_case_during_which_the_disk_changed_is_repeated_and_else_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    speeds = iter([1.0, 0.5, 1.0, 0.9])
    monkeypatch.setattr(Runner, "raw", lambda self, files, phase=0: next(speeds))
    work = iter(["first", "second"])
    runner = Runner({}, isolated=False, read_limit=1)
    assert runner.steady([], lambda: next(work)) == Steady("second", (1.0, 0.9))

    speeds = iter([1.0, 0.5] * 3)
    unsettled = runner.steady([], lambda: "last")
    assert next(speeds, None) is None, "two repetitions, and no more"
    assert cases.judged(Row("case", ratio=2.0, target=Target(1, True)), unsettled).met == "unsettled"


def test_no_repetition_reads_more_than_the_run_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Runner, "raw", lambda self, files, phase=0: 1.0 + phase)
    runner = Runner({}, isolated=False, read_limit=100)

    def read() -> None:
        runner.read_bytes += 60

    runner.steady([], read)
    assert runner.read_bytes == 60


def test_samples_of_one_run_are_different_parts_of_the_files(files: list[Path]) -> None:
    limit = raw_disk.CHUNK
    parts = [list(sample(files, limit, phase)) for phase in (0, 1)]
    assert all(part and sum(chunk.nbytes for chunk in part) <= limit for part in parts)
    assert not set(parts[0]) & set(parts[1])


def test_a_checkpoint_is_written_once_and_never_taken_for_another(tmp_path: Path) -> None:
    folder = ensure_checkpoint("llama_1b_tiny", tmp_path / "llama")
    before = [(path.name, path.stat().st_mtime_ns) for path in sorted(folder.iterdir())]
    assert ensure_checkpoint("llama_1b_tiny", folder) == folder
    assert [(path.name, path.stat().st_mtime_ns) for path in sorted(folder.iterdir())] == before
    with pytest.raises(ValueError, match="another model than t0_3b_tiny"):
        ensure_checkpoint("t0_3b_tiny", folder)


# --- report ---


@pytest.mark.parametrize(
    ("target", "ratio", "met"),
    [(Target(0.9, True), 0.9, "met"), (Target(0.9, True), 0.89, "NOT MET"), (Target(1.1, False), 1.2, "NOT MET")],
)
def test_a_target_is_met_or_not(target: Target, ratio: float, met: str) -> None:
    assert Row("case", ratio=ratio, target=target).met == met


def test_a_verdict_comes_before_the_target() -> None:
    assert Row("case", ratio=1.0, target=Target(0.9, True), verdict="unsettled").met == "unsettled"


def test_a_table_in_markdown_keeps_its_columns() -> None:
    text = report.markdown([Row("a | b", note="two\nlines")], "Title", ["about"])
    header, _, row = [line for line in text.splitlines() if line.startswith("|")]
    assert row.replace("\\|", "").count("|") == header.count("|")
    assert "two lines" in row


@pytest.mark.parametrize(
    ("value", "text"), [(4_400_000_000, "4.40 GB"), (350_000, "350.00 kB"), (12, "0.01 kB"), (-2_000_000, "-2.00 MB")]
)
def test_sizes_are_told_in_units_that_fit(value: int, text: str) -> None:
    assert report.size(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(2.5, "2.5 s"), (0.0123, "12.3 ms"), (0.000045, "45 µs")])
def test_times_are_told_in_units_that_fit(seconds: float, text: str) -> None:
    assert report.duration(seconds) == text
