"""The command `hf-bigload`: what it prints, what it exits with, and that it answers without torch."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import hf_bigload
from hf_bigload import bandwidth, cli, doctor, hardware
from hf_bigload.bandwidth import Bandwidths
from hf_bigload.checkpoint import spill_cache
from hf_bigload.checkpoint.index import stamp
from hf_bigload.checkpoint.spill_cache import SpillCache
from hf_bigload.report import MemoryBar
from hf_bigload.specs import Hardware

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_BIGLOAD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "casts"


@pytest.fixture(autouse=True)
def workload(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request as small as the models here."""
    monkeypatch.setenv("HF_BIGLOAD_WORKLOAD", "context=4,new=2")


def entry(path: Path, dtype: str = "bfloat16") -> tuple[str, SpillCache]:
    """The name of a new entry for a new checkpoint, and a load that uses it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(os.urandom(100))
    load = SpillCache({str(path): stamp(str(path))}, "torch 2")
    slot = load.slot(dtype, str(path), "w")
    assert slot is not None
    written = slot.write(torch.zeros(10_000), (10_000,), None)
    assert written is not None
    load.seal()
    return Path(written.file).parent.name, load


def run(*arguments: str) -> Any:
    """What typer's runner gives: `exit_code`, `stdout`, `stderr`."""
    return CliRunner().invoke(cli.app, arguments)


def listed() -> list[dict[str, Any]]:
    return json.loads(run("cache", "ls", "--json").stdout)["entries"]


# -------------------------------------------------------------------------------------------------------- the command


def test_the_version() -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"hf_bigload {hf_bigload.__version__}\n")


def test_without_a_command_it_says_which_there_are() -> None:
    for arguments in ((), ("cache",)):
        assert "Usage" in run(*arguments).output
    assert "cache" in run().output


def test_the_console_script_is_this_command() -> None:
    assert 'hf-bigload = "hf_bigload.cli:main"\n' in (ROOT / "pyproject.toml").read_text()
    assert callable(cli.main)


def process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The console script in a process of its own, which says on stderr which of the heavy libraries it has loaded."""
    code = (
        "import sys, atexit; heavy = {'torch', 'transformers', 'accelerate', 'diffusers'};"
        "atexit.register(lambda: print(sorted(heavy & set(sys.modules)), file=sys.stderr));"
        "from hf_bigload.cli import main; main()"
    )
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=60)


def test_entries_are_listed_and_removed_without_torch(tmp_path: Path) -> None:
    name, load = entry(tmp_path / "model.safetensors")
    del load
    for arguments in (("cache", "ls"), ("cache", "rm", name)):
        done = process(*arguments)
        assert done.returncode == 0 and name[:8] in done.stdout
        assert done.stderr == "[]\n"


def test_an_error_is_a_line_and_no_traceback() -> None:
    done = process("cache", "ls", HF_BIGLOAD_CACHE_SIZE="lots")
    assert done.returncode == 1
    first, _heavy = done.stderr.splitlines()
    assert first.startswith("hf-bigload: environment variable HF_BIGLOAD_CACHE_SIZE: 'lots' is not a size")


# ----------------------------------------------------------------------------------------------------- estimate, plan


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Llama of 4 layers in float32, the size of a few hundred KiB."""
    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, vocab_size=256
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def planned(model: str, *arguments: str) -> dict[str, Any]:
    return json.loads(run("plan", model, "--json", *arguments).stdout)


def test_an_estimate_names_the_blocks_and_their_bytes(model: str) -> None:
    said = run("estimate", model).stdout
    assert "of weights in float32" in said
    assert re.search(r"model\.layers\.\*\W+4\W", said)
    content = json.loads(run("estimate", model, "--json").stdout)
    assert content["nbytes"] == sum(block["nbytes"] for block in content["blocks"])
    assert content["architectures"] == ["LlamaForCausalLM"] and content["download_bytes"] == 0


def test_an_estimate_counts_what_a_request_takes(model: str) -> None:
    workload = ("--batch", "2", "--context", "64", "--new-tokens", "8")
    assert "cache at the end of 2 x (64 + 8) tokens" in run("estimate", model, *workload).stdout
    content = json.loads(run("estimate", model, "--json", *workload).stdout)
    assert content["workload"] == {"batch_size": 2, "context_length": 64, "new_tokens": 8}
    assert content["cache"] == 2 * 4 * 2 * 71 * 64 * 4 == sum(content["cache_by_block"].values())
    assert content["method"] == "trace" and content["activations"] > 0
    parts = ("buffers", "cache", "activations")
    assert content["total"] == content["weights"][""] + sum(content[name] for name in parts)


def test_a_dtype_changes_the_estimate(model: str) -> None:
    full, half = (
        json.loads(run("estimate", model, "--json", "--dtype", dtype).stdout) for dtype in ("float32", "bfloat16")
    )
    buffers = sum(block["buffer_bytes"] for block in full["blocks"])
    assert half["dtype"] == "bfloat16" and full["nbytes"] - buffers == 2 * (half["nbytes"] - buffers)


def test_a_plan_is_that_of_a_load_with_the_same_budget(model: str) -> None:
    with hf_bigload.enable(max_memory={"cpu": "400KiB"}):
        loaded = hf_bigload.inspect(LlamaForCausalLM.from_pretrained(model, device_map="auto")).plan
    content = planned(model, "--device", "none", "--ram", "400KiB")
    assert content["machine"] == {"devices": {}, "ram": 400 << 10}
    assert content["device_map"] == dict(loaded.device_map)
    assert content["used"] == dict(loaded.used) and content["streams"] is loaded.streams is True
    assert content["streamed_bytes"] == sum(placement.streamed_bytes for placement in loaded.placements)


def test_a_machine_that_is_not_this_one_is_planned_for(model: str) -> None:
    content = planned(model, "--device", "500KiB", "--device", "500KiB", "--ram", "1GiB")
    assert content["machine"] == {"devices": {"cuda:0": 500 << 10, "cuda:1": 500 << 10}, "ram": 1 << 30}
    assert 0 < content["used"]["cuda:0"] <= 500 << 10 and 0 < content["used"]["cuda:1"] <= 500 << 10
    assert content["fits"] and content["streams"] is False and content["next_steps"] == []


def test_without_flags_the_plan_is_for_this_machine(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "probe", lambda: Hardware({"xpu:0": 1 << 20}, 2 << 20))
    assert planned(model)["machine"] == {"devices": {"xpu:0": 1 << 20}, "ram": 2 << 20}
    assert planned(model, "--ram", "5MiB")["machine"] == {"devices": {"xpu:0": 1 << 20}, "ram": 5 << 20}
    assert planned(model, "--device", "3MiB")["machine"] == {"devices": {"cuda:0": 3 << 20}, "ram": 2 << 20}


def test_a_plan_shows_bars_blocks_and_the_next_step(model: str) -> None:
    result = run("plan", model, "--device", "300KiB", "--ram", "1GiB")
    assert result.exit_code == 0
    (bar,) = (line for line in result.stdout.splitlines() if line.startswith("cuda:0"))
    assert "█" in bar and "▓" in bar and "300.00 KiB" in bar
    assert "hf_bigload plan for" in result.stdout and "Each pass through the model streams" in result.stdout
    assert re.search(r"KiB more on cuda:0, and nothing streams: \d+\.\d times as fast\.$", result.stdout.strip())


def test_where_nothing_fits_it_says_what_would_and_exits_with_1(model: str) -> None:
    result = run("plan", model, "--device", "none", "--ram", "10KiB")
    assert result.exit_code == 1
    assert "No placement fits" in result.stderr and "more RAM, and it runs." in result.stdout
    content = planned(model, "--device", "none", "--ram", "10KiB")
    assert content["fits"] is False and [step["buys"] for step in content["next_steps"]] == [
        "it runs",
        "nothing streams",
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(("--ram", "lots"), "--ram"), (("--device", "0x10"), "--device"), (("--dtype", "int4"), "--dtype")],
)
def test_a_flag_that_makes_no_sense_is_named(arguments: tuple[str, ...], said: str, model: str) -> None:
    result = run("plan", model, *arguments)
    assert result.exit_code == 2 and said in result.stderr


@pytest.mark.parametrize(
    ("weights", "ring", "cells"), [(0, 0, (0, 0, 40)), (50, 25, (20, 10, 10)), (100, 0, (40, 0, 0))]
)
def test_a_bar_is_in_proportion(weights: int, ring: int, cells: tuple[int, int, int]) -> None:
    assert MemoryBar((("weights", weights), ("ring", ring)), 100).cells() == cells


def test_a_bar_shows_the_smallest_share_and_never_grows() -> None:
    assert MemoryBar((("weights", 1), ("ring", 0)), 10**9).cells() == (1, 0, 39)
    assert sum(MemoryBar((("weights", 10**9), ("ring", 10), ("cache", 10)), 10**9).cells()) == 40
    assert MemoryBar((("weights", 300), ("ring", 0)), 100).cells() == (40, 0, 0)


# ------------------------------------------------------------------------------------------------------------ doctor


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> Bandwidths:
    found = Bandwidths(disk=2e9, direct=True, host_copy=8e9, to_device={}, not_pinned=())
    monkeypatch.setattr(bandwidth, "measure", lambda folder: os.makedirs(folder, exist_ok=True) or found)
    return found


def test_the_doctor_shows_the_machine(figures: Bandwidths) -> None:
    result = run("doctor")
    assert result.exit_code == 0
    for word in (
        "RAM, as far as it may be used",
        "1.86 GiB",
        "past the page cache",
        "transformers",
        "is where it should be",
    ):
        assert word in result.stdout


def test_the_doctor_measures_once(figures: Bandwidths, monkeypatch: pytest.MonkeyPatch) -> None:
    first = json.loads(run("doctor", "--json").stdout)
    assert first["measurement"]["bandwidths"] == dataclasses.asdict(figures) | {"not_pinned": []}
    monkeypatch.setattr(bandwidth, "measure", lambda folder: dataclasses.replace(figures, disk=3e9))
    assert json.loads(run("doctor", "--json").stdout)["measurement"] == first["measurement"]
    assert json.loads(run("doctor", "--json", "--fresh").stdout)["measurement"]["bandwidths"]["disk"] == 3e9


def test_the_doctor_says_what_is_wrong(figures: Bandwidths, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bad = dataclasses.replace(figures, disk=1e8, direct=False, not_pinned=("cuda:0",))
    monkeypatch.setattr(bandwidth, "measure", lambda folder: os.makedirs(folder, exist_ok=True) or bad)
    monkeypatch.setattr(hardware, "free_disk", lambda folder: 1 << 20)
    monkeypatch.setattr(hardware, "free_ram", lambda: 1 << 20)
    monkeypatch.setattr(hardware, "container_limits", lambda: [(1 << 60, 0), (1 << 30, 1 << 20)])
    monkeypatch.setattr(doctor, "_PAGEMAP", str(tmp_path / "absent"))
    problems = json.loads(run("doctor", "--json").stdout)["problems"]
    for said in (
        "page-locked for cuda:0",
        "O_DIRECT",
        "95.37 MiB/s",
        "1.00 MiB are free",
        "limit of 1.00 GiB",
        "absent",
    ):
        assert [problem for problem in problems if said in problem], said


def test_a_loader_whose_seams_have_moved_is_reported(figures: Bandwidths, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import modeling_utils

    monkeypatch.delattr(modeling_utils, "accelerate_dispatch")
    (problem,) = json.loads(run("doctor", "--json").stdout)["problems"]
    assert "The loader for transformers" in problem and "accelerate_dispatch" in problem


def test_a_cache_folder_that_cannot_be_written_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("HF_BIGLOAD_CACHE", str(tmp_path / "file" / "cache"))
    content = json.loads(run("doctor", "--json").stdout)
    assert content["measurement"] is None and "could not be measured" in content["problems"][0]


# ----------------------------------------------------------------------------------------------------------- cache ls


def test_an_empty_cache(cache: Path) -> None:
    result = run("cache", "ls")
    assert result.exit_code == 0 and "0 entries, 0 B of at most" in result.stdout and str(cache) in result.stdout
    assert not cache.exists()


def test_entries_are_listed(tmp_path: Path) -> None:
    name, load = entry(tmp_path / "mine" / "model.safetensors")
    said = run("cache", "ls").stdout
    shown = (name[:8], str(tmp_path / "mine"), "bfloat16", "39.06 KiB", "just now", "in use", "1 entry, 39.06 KiB")
    assert [word for word in shown if word not in said] == []
    del load
    assert "in use" not in run("cache", "ls").stdout


def test_a_checkpoint_of_the_hub_is_listed_by_its_name(tmp_path: Path) -> None:
    _, load = entry(tmp_path / "hub" / "models--org--big-model" / "snapshots" / "1f" / "model.safetensors")
    assert "org/big-model" in run("cache", "ls").stdout
    assert load is not None


def test_json_has_every_field_in_bytes_and_seconds(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_BIGLOAD_CACHE_SIZE", "3GiB")  # the default is a share of what is free, which changes
    name, load = entry(tmp_path / "mine" / "model.safetensors")
    content = json.loads(run("cache", "ls", "--json").stdout)
    assert content["folder"] == str(cache) and content["limit"] == 3 << 30
    (found,) = content["entries"]
    assert found.pop("last_used") == pytest.approx((cache / name / "lock").stat().st_mtime)
    assert found == {
        "name": name,
        "checkpoint": str(tmp_path / "mine"),
        "dtype": "bfloat16",
        "made_by": "torch 2",
        "nbytes": 40_000,
        "in_use": True,
        "stale": False,
    }
    assert load is not None


def test_the_one_used_last_comes_first(tmp_path: Path, cache: Path) -> None:
    names = [entry(tmp_path / f"{i}.safetensors")[0] for i in range(3)]
    for name, used in zip(names, (2, 3, 1), strict=True):
        os.utime(cache / name / "lock", (used, used))
    assert [found["name"] for found in listed()] == [names[1], names[0], names[2]]


# ----------------------------------------------------------------------------------------------------------- cache rm


def test_entries_are_removed_by_name_or_by_its_beginning(tmp_path: Path) -> None:
    names = [entry(tmp_path / f"{i}.safetensors")[0] for i in range(3)]
    result = run("cache", "rm", names[0], names[1][:8])
    assert result.exit_code == 0
    assert all(f"Removed {name}" in result.stdout for name in names[:2])
    assert [found["name"] for found in listed()] == [names[2]]


def test_one_in_use_stays_and_is_named(tmp_path: Path) -> None:
    name, load = entry(tmp_path / "used.safetensors")
    other, _ = entry(tmp_path / "other.safetensors")
    del _
    result = run("cache", "rm", "--all")
    assert result.exit_code == 1
    assert f"Kept {name}" in result.stderr and "a loaded model uses it" in result.stderr
    assert f"Removed {other}" in result.stdout
    assert [found["name"] for found in listed()] == [name]
    del load
    assert run("cache", "rm", "--all").exit_code == 0
    assert listed() == []


def test_stale_ones_are_those_whose_checkpoint_is_gone_or_was_changed(tmp_path: Path) -> None:
    names = [entry(tmp_path / f"{i}.safetensors")[0] for i in range(3)]
    (tmp_path / "0.safetensors").unlink()
    (tmp_path / "1.safetensors").write_bytes(b"changed")
    assert {found["name"] for found in listed() if found["stale"]} == set(names[:2])
    assert run("cache", "rm", "--stale").exit_code == 0
    assert [found["name"] for found in listed()] == [names[2]]
    assert "Nothing to remove" in run("cache", "rm", "--stale").stdout


@pytest.mark.parametrize("arguments", [(), ("--all", "--stale"), ("0", "--all"), ("no-such-entry",), ("",), ("..",)])
def test_what_is_unclear_removes_nothing(arguments: tuple[str, ...], tmp_path: Path) -> None:
    name, _ = entry(tmp_path / "model.safetensors")
    assert run("cache", "rm", *arguments).exit_code == 2
    assert [found["name"] for found in listed()] == [name]


def test_a_beginning_that_two_names_have_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    twins = [spill_cache.EntryInfo(f"abc{i}", "", "", "", 0, 0.0, False, False) for i in range(2)]
    monkeypatch.setattr(spill_cache, "entries", lambda: twins)
    monkeypatch.setattr(spill_cache, "remove", lambda name: pytest.fail("removed one of them"))
    result = run("cache", "rm", "abc")
    assert result.exit_code == 2 and "several entries begin" in result.stderr
