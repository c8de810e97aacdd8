"""What is said of a model from its config and headers is what a load then makes of it, and no weight travels for it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants, snapshot_download
from safetensors.torch import save_file

import hf_bigload
from examples.embedded_hub import EmbeddedHub, write_tiny_t0pp
from hf_bigload.describe import describe, spec_from_headers
from hf_bigload.errors import DtypeError, RepositoryError
from hf_bigload.specs import ModelSpec, TensorSpec
from tests.architectures.tiny import architecture, tiny_model

HEADER_BYTES = 100_001
"""What huggingface_hub asks for of each safetensors file."""
WIDE: dict[str, Any] = {"num_layers": 2, "num_decoder_layers": 2, "d_ff": 8192}
T0PP, ONLY_BIN, GATED, ADAPTER, PIPELINE, EMPTY = (
    "bigscience/T0pp",
    "org/only-bin",
    "org/gated",
    "org/adapter",
    "org/pipeline",
    "org/no-weights",
)

REPRESENTATIVE = (
    "causal:deepseek_v3",  # experts fused from many tensors
    "causal:gemma4",  # vision, sound, embeddings per layer
    "causal:gpt2",
    "causal:mamba",
    "seq2seq:marian",
    "seq2seq:switch_transformers",
)


def sizes(spec: ModelSpec) -> dict[str, tuple[str, int]]:
    return {t.name: (t.dtype, t.nbytes) for block in spec.blocks for t in block.tensors}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_t0pp(tmp_path_factory.mktemp("T0pp"), shards=3, **WIDE)


@pytest.fixture(scope="module")
def bin_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_t0pp(tmp_path_factory.mktemp("T0pp-bin"), format="bin", dtype="bfloat16", shards=2, **WIDE)


def holding(folder: Path, *files: str) -> Path:
    folder.mkdir()
    for file in files:
        (folder / file).write_text('{"model_type": "t5"}')
    return folder


@pytest.fixture(scope="module")
def hub(folder: Path, bin_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedHub]:
    root = tmp_path_factory.mktemp("repos")
    served = {
        T0PP: folder,
        ONLY_BIN: bin_folder,
        GATED: folder,
        ADAPTER: holding(root / "adapter", "adapter_config.json"),
        PIPELINE: holding(root / "pipeline", "model_index.json"),
        EMPTY: holding(root / "empty", "config.json", "vocabulary.txt"),
    }
    with EmbeddedHub(served, gated={GATED: {"hf_granted"}}) as hub:
        yield hub


@pytest.fixture
def client(hub: EmbeddedHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EmbeddedHub:
    """The embedded Hub as the one that this process asks, with an empty cache and a log of its own."""
    hub.clear_log()
    reach(hub.url, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return hub


def reach(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `url` the Hub: what HF_ENDPOINT does before the library is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


def command(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """The console script in a process of its own."""
    code = "from hf_bigload.cli import main; main()"
    arguments = (sys.executable, "-c", code, *arguments)
    environment = environment | {"PYTHONPATH": os.getcwd()}
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=120)


# ---------------------------------------------------------------- what is said


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
def test_the_blocks_are_those_of_a_load(folder: Path, dtype: str | None) -> None:
    from transformers import AutoModelForSeq2SeqLM

    with hf_bigload.enable():
        options = {} if dtype is None else {"dtype": getattr(torch, dtype)}
        model = AutoModelForSeq2SeqLM.from_pretrained(folder, device_map="auto", max_memory={"cpu": "1GiB"}, **options)
    plan = hf_bigload.inspect(model).plan
    found = describe(folder, dtype)
    assert found.from_class
    assert sizes(found.spec) == sizes(ModelSpec(tuple(p.block for p in plan.placements)))
    assert dict(found.spec.ties) == dict(plan.ties)


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_of_every_kind_of_architecture_the_blocks_are_those_of_a_load(name: str, tmp_path: Path) -> None:
    model = tiny_model(architecture(name))
    model.save_pretrained(tmp_path)
    with hf_bigload.enable():
        loaded = type(model).from_pretrained(tmp_path, device_map="auto", max_memory={"cpu": "8GiB"})
    plan = hf_bigload.inspect(loaded).plan
    found = describe(tmp_path)
    assert found.from_class
    assert sizes(found.spec) == sizes(ModelSpec(tuple(p.block for p in plan.placements)))
    assert dict(found.spec.ties) == dict(plan.ties)


def test_a_bin_checkpoint_is_known_from_its_config(bin_folder: Path) -> None:
    found = describe(bin_folder)
    assert found.dtype == "bfloat16"
    weights = sum(path.stat().st_size for path in bin_folder.glob("*.bin"))
    assert found.repository.file_bytes == weights
    assert found.spec.nbytes == pytest.approx(weights, rel=0.05)


def test_a_quantised_checkpoint_is_what_its_headers_say(tmp_path: Path) -> None:
    content = {
        f"model.layers.{i}.proj.{name}": torch.zeros(64, 8, dtype=torch.uint8) for i in range(12) for name in "ab"
    }
    save_file(content | {"model.norm.weight": torch.zeros(8)}, tmp_path / "model.safetensors")
    config = {"model_type": "llama", "quantization_config": {"quant_method": "awq"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = describe(tmp_path)
    assert not found.from_class
    assert [block.name for block in found.spec.blocks] == [*(f"model.layers.{i}" for i in range(12)), "model.norm"]
    assert found.spec.nbytes == sum(t.nbytes for t in content.values()) + 32


def test_code_of_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text("raise SystemExit('it ran')")
    config = {"model_type": "unheard_of", "auto_map": {"AutoConfig": "code.Config"}, "architectures": ["Unheard"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"a.weight": torch.zeros(8)}, tmp_path / "model.safetensors")
    assert describe(tmp_path).spec.nbytes == 32


def test_headers_are_cast_where_they_float_and_no_tensor_is_lost() -> None:
    stored = {
        n: TensorSpec(n, 8, d, (2,)) for n, d in (("h.0.a.w", "float32"), ("h.0.b.w", "uint32"), ("w", "float32"))
    }
    spec = spec_from_headers(stored, "bfloat16")
    assert sizes(spec) == {"h.0.a.w": ("bfloat16", 4), "h.0.b.w": ("uint32", 8), "w": ("bfloat16", 4)}
    block = next(block for block in spec.blocks if block.whole)
    assert [t for part in block.parts for t in part.tensors] == list(block.tensors)


def test_a_dtype_that_weights_are_not_loaded_in_is_refused(folder: Path) -> None:
    with pytest.raises(DtypeError, match="'int4': choose one of float16, bfloat16"):
        describe(folder, "int4")


# ---------------------------------------------------------------- a folder that is no model


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["adapter_config.json"], "adapter: give the name of the model that it adapts"),
        (["model_index.json"], "pipeline of several models"),
        (["notes.txt"], r"it holds notes\.txt\. Give the repository of a model"),
        (["config.json"], "no weights that can be told apart"),
    ],
)
def test_a_folder_that_holds_no_model_is_refused(files: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(RepositoryError, match=said):
        describe(holding(tmp_path / "repo", *files))


def test_a_path_that_is_no_folder_is_not_asked_of_the_hub(tmp_path: Path) -> None:
    with pytest.raises(RepositoryError, match="is no folder"):
        describe(tmp_path / "nowhere")


def test_a_config_that_is_no_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("<html>")
    with pytest.raises(RepositoryError, match=re.escape(str(tmp_path / "config.json"))):
        describe(tmp_path)


# ---------------------------------------------------------------- the Hub


def test_of_a_repository_on_the_hub_only_config_and_headers_are_fetched(client: EmbeddedHub, folder: Path) -> None:
    found = describe(T0PP)
    shards = {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
    served = client.bytes_served(T0PP)
    assert max(shards.values()) > 4 * HEADER_BYTES
    assert all(served[name] <= HEADER_BYTES for name in shards)
    assert set(served) - set(shards) == {"config.json", "model.safetensors.index.json"}
    assert found.spec == describe(folder).spec
    assert found.repository.download_bytes == found.repository.file_bytes == sum(shards.values())


def test_where_the_hub_has_only_bin_files_the_class_tells(client: EmbeddedHub, bin_folder: Path) -> None:
    found = describe(ONLY_BIN)
    assert set(client.bytes_served(ONLY_BIN)) == {"config.json"}
    assert found.dtype == "bfloat16" and found.spec == describe(bin_folder).spec
    assert found.repository.file_bytes == sum(path.stat().st_size for path in bin_folder.glob("*.bin"))


def test_what_was_downloaded_before_is_known_without_a_network(
    client: EmbeddedHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot_download(T0PP)
    before = describe(T0PP)
    assert before.repository.download_bytes == 0
    reach("http://127.0.0.1:1", monkeypatch)
    assert describe(T0PP) == before


@pytest.mark.parametrize(
    ("repo", "said"),
    [
        (GATED, "is gated.*hf auth login"),
        ("org/nothing", "no model 'org/nothing' on the Hub that you may read. Check the name"),
        (ADAPTER, "it is an adapter"),
        (PIPELINE, "it is a pipeline"),
        (EMPTY, "It holds no weights at all"),
        ("not a name", "neither a folder nor a name on the Hub"),
    ],
)
def test_what_cannot_be_planned_is_refused_with_what_to_do(client: EmbeddedHub, repo: str, said: str) -> None:
    with pytest.raises(RepositoryError, match=said):
        describe(repo)


def test_a_gated_repository_opens_to_those_who_may_read_it(
    client: EmbeddedHub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_granted")
    assert describe(GATED).spec == describe(folder).spec


def test_a_revision_that_does_not_exist_is_named(client: EmbeddedHub) -> None:
    with pytest.raises(RepositoryError, match=f"{T0PP} has no revision 'v9'"):
        describe(T0PP, revision="v9")


def test_without_a_network_and_a_cache_it_says_what_to_check(
    client: EmbeddedHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    reach("http://127.0.0.1:1", monkeypatch)
    with pytest.raises(RepositoryError, match=r"http://127\.0\.0\.1:1 cannot be asked.*HF_HUB_OFFLINE"):
        describe(T0PP)


def test_the_command_asks_the_hub_of_the_environment(hub: EmbeddedHub, folder: Path) -> None:
    done = command(hub.environment(), "estimate", T0PP, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["nbytes"] == describe(folder).spec.nbytes


def test_a_refusal_is_one_line_and_no_traceback(hub: EmbeddedHub) -> None:
    done = command(hub.environment(), "plan", GATED)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"hf-bigload: {GATED} is gated")
