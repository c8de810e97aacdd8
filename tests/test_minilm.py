"""Real weights, all-MiniLM-L6-v2: wherever they sleep, a sentence gets the same vector, to the bit."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModel, AutoTokenizer

import hf_bigload
from examples.embedded_hub import EmbeddedHub, minilm_folder
from tests import simdev
from tests.architectures.compare import same_bits

REPO_ID = "sentence-transformers/all-MiniLM-L6-v2"
FOLDER = minilm_folder()
ROOT = Path(__file__).parents[1]
MIB = 1 << 20

SENTENCES = [
    "The ferry was late because of the storm.",
    "Bad weather delayed the boat.",
    "She sold her old bicycle to a neighbour last week, and walks to work now.",
    "Bread needs time to rise.",
]

WEIGHT_BYTES = 90_852_864
FORTY_PERCENT = {"cpu": int(0.4 * WEIGHT_BYTES)}
SPLIT = {"embeddings": "cpu", "encoder": "cpu", "encoder.layer.0": "disk", "encoder.layer.5": "disk", "pooler": "disk"}


class Embedded(NamedTuple):
    """What the model says of `SENTENCES`: a unit vector for each (4, 384), and their cosine similarities (4, 4)."""

    vectors: torch.Tensor
    similarities: torch.Tensor


def embed(model: Any) -> Embedded:
    """The mean over the tokens of each sentence, as the model's card takes it, on the device where `model` runs."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    inputs = tokenizer(SENTENCES, padding=True, truncation=True, return_tensors="pt").to(model.device)
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        vectors = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
        return Embedded(vectors.cpu(), (vectors @ vectors.T).cpu())


def plainly(dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Embedded:
    """What Transformers alone computes."""
    return embed(AutoModel.from_pretrained(FOLDER, dtype=dtype).to(device))


def assert_same_bits(got: Embedded, expected: Embedded) -> None:
    assert same_bits(got.vectors, expected.vectors)
    assert same_bits(got.similarities, expected.similarities)


def test_the_weights_are_real_ones() -> None:
    similarities = plainly().similarities
    assert similarities[0, 1] > 0.6, "the same news, told twice"
    assert similarities[0, 2:].max() < 0.2, "another subject"


PLACEMENTS: Mapping[str, tuple[dict[str, Any], set[str | int]]] = {
    "auto, all of it fits": ({"device_map": "auto", "max_memory": {"cpu": "1GiB"}}, {"cpu"}),
    "40% of its bytes": ({"device_map": "auto", "max_memory": FORTY_PERCENT}, {"cpu", "disk"}),
    "everything on disk": ({"device_map": {"": "disk"}}, {"disk"}),
    "a map that splits it": ({"device_map": SPLIT}, {"cpu", "disk"}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("arguments", "homes"), PLACEMENTS.values(), ids=PLACEMENTS.keys())
def test_every_placement_computes_what_plain_transformers_does(
    arguments: dict[str, Any], homes: set[str | int], dtype: torch.dtype
) -> None:
    if dtype.itemsize == 2 and arguments.get("max_memory") is FORTY_PERCENT:
        arguments = {**arguments, "max_memory": {"cpu": FORTY_PERCENT["cpu"] // 2}}
    with hf_bigload.enable():
        model = AutoModel.from_pretrained(FOLDER, dtype=dtype, **arguments)
    assert homes <= set(model.hf_device_map.values())
    assert model.dtype == dtype
    assert_same_bits(embed(model), plainly(dtype))


def test_auto_without_a_budget_computes_what_plain_transformers_does_on_that_device() -> None:
    with hf_bigload.enable():
        model = AutoModel.from_pretrained(FOLDER, device_map="auto")
    assert_same_bits(embed(model), plainly(device=model.device))


ACCELERATORS: Mapping[str, tuple[list[int], set[str | int]]] = {
    "one, too small": ([30 * MIB], {0, "cpu"}),
    "two": ([70 * MIB, 70 * MIB], {0, 1}),
}


@pytest.mark.parametrize(("capacities", "homes"), ACCELERATORS.values(), ids=ACCELERATORS.keys())
def test_accelerators_with_the_cpu_s_arithmetic_compute_what_the_cpu_does(
    capacities: list[int], homes: set[str | int]
) -> None:
    with simdev.devices(capacities, hide_others=True), simdev.asynchronous(), hf_bigload.enable():
        model = AutoModel.from_pretrained(FOLDER, device_map="auto")
        assert homes <= set(model.hf_device_map.values())
        got = embed(model)
        del model
    assert_same_bits(got, plainly())


@pytest.mark.parametrize(("arguments", "homes"), PLACEMENTS.values(), ids=PLACEMENTS.keys())
def test_load_checkpoint_and_dispatch_computes_what_plain_transformers_does(
    arguments: dict[str, Any], homes: set[str | int]
) -> None:
    with hf_bigload.init_empty_weights():
        model = AutoModel.from_config(AutoConfig.from_pretrained(FOLDER))
    model = hf_bigload.load_checkpoint_and_dispatch(model.eval(), FOLDER, **arguments)
    assert homes <= set(model.hf_device_map.values())
    assert_same_bits(embed(model), plainly())


def test_load_checkpoint_and_dispatch_fills_an_accelerator_that_is_too_small() -> None:
    with simdev.devices([30 * MIB], hide_others=True), simdev.asynchronous():
        with hf_bigload.init_empty_weights():
            model = AutoModel.from_config(AutoConfig.from_pretrained(FOLDER))
        model = hf_bigload.load_checkpoint_and_dispatch(model.eval(), FOLDER, device_map="auto")
        assert {0, "cpu"} <= set(model.hf_device_map.values())
        got = embed(model)
        del model
    assert_same_bits(got, plainly())


class TestItsModelCard:
    """The card's snippet names no device_map, and was written for plain Transformers."""

    @pytest.fixture
    def script(self, tmp_path: Path) -> Path:
        blocks = re.findall(r"^```python\n(.*?)^```", (FOLDER / "README.md").read_text(), re.DOTALL | re.MULTILINE)
        (snippet,) = (block for block in blocks if "import AutoTokenizer, AutoModel" in block)
        path = tmp_path / "card.py"
        path.write_text(snippet)
        return path

    def test_it_runs_on_a_budget_and_prints_the_same(self, script: Path, tmp_path: Path) -> None:
        options = ["--device-map", "auto", "--max-memory", f"cpu={FORTY_PERCENT['cpu']}", "--explain"]
        with EmbeddedHub({REPO_ID: FOLDER}) as hub:
            environment = hub.environment(tmp_path / "home") | {"PYTHONPATH": str(ROOT)}
            plain = _run([sys.executable, str(script)], environment)
            budgeted = _run([sys.executable, "-m", "hf_bigload", *options, str(script)], environment)
        assert "Sentence embeddings:\ntensor([[" in plain.stdout
        assert budgeted.stdout == plain.stdout
        assert "hf_bigload plan for BertModel" in budgeted.stderr and "disk" in budgeted.stderr


def _run(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done
