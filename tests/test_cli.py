"""The command `hf-bigload`: what it prints, what it exits with, and that it answers without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import hf_bigload
from hf_bigload import cli
from hf_bigload.checkpoint import spill_cache
from hf_bigload.checkpoint.index import stamp
from hf_bigload.checkpoint.spill_cache import SpillCache

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_BIGLOAD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "casts"


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


def test_json_has_every_field_in_bytes_and_seconds(tmp_path: Path, cache: Path) -> None:
    name, load = entry(tmp_path / "mine" / "model.safetensors")
    content = json.loads(run("cache", "ls", "--json").stdout)
    assert content["folder"] == str(cache) and content["limit"] == spill_cache.size_limit()
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
