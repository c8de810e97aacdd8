"""What a user is told before a model is loaded, and the workload it is told for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import hf_bigload
from hf_bigload import settings
from hf_bigload.errors import DeviceMapError, DtypeError
from hf_bigload.settings import parse_workload
from hf_bigload.specs import Workload

transformers = pytest.importorskip("transformers")

LAYERS, HEADS, HEAD_DIM = 4, 2, 16
SMALL = Workload(2, 64, 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in bfloat16 whose head is tied to its embedding."""
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=HEADS,
        vocab_size=256,
        tie_word_embeddings=True,
    )
    path = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


def load(folder: Path, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=dtype)


def cache_bytes(workload: Workload, item: int) -> int:
    tokens = workload.context_length + workload.new_tokens - 1
    return 2 * LAYERS * workload.batch_size * tokens * HEADS * HEAD_DIM * item


@pytest.mark.parametrize(("dtype", "item"), [(None, 2), (torch.float32, 4)])
def test_a_folder_is_estimated_as_the_model_that_is_loaded_from_it(
    folder: Path, dtype: torch.dtype | None, item: int
) -> None:
    told = hf_bigload.estimate(folder, SMALL, dtype=dtype)
    model = load(folder, dtype or torch.bfloat16)
    assert told.weights[""] == sum(p.numel() * p.element_size() for p in model.parameters())
    assert told.weights["model"] == told.weights[""] and told.cache == cache_bytes(SMALL, item)
    loaded = hf_bigload.estimate(model, SMALL)
    assert (loaded.weights, loaded.needs, loaded.total) == (told.weights, told.needs, told.total)
    assert told.total == told.weights[""] + told.buffers + told.cache + told.activations


def test_an_estimate_is_readable(folder: Path) -> None:
    said = str(hf_bigload.estimate(folder, SMALL))
    assert "model.layers.*" in said and "cache at the end of 2 x (64 + 8) tokens" in said
    assert "activations at their peak (traced, within 5%)" in said


def test_an_estimate_of_an_unknown_module_says_that_it_does_not_know() -> None:
    told = hf_bigload.estimate(nn.Linear(4, 4, bias=False), dtype="bfloat16")
    assert (told.weights[""], told.total, told.method) == (32, 32, "none")
    assert "not known how this model is called" in str(told)


def test_a_dtype_that_weights_cannot_be_loaded_in_is_refused(folder: Path) -> None:
    for model in (folder, nn.Linear(4, 4)):
        with pytest.raises(DtypeError, match="int8"):
            hf_bigload.estimate(model, dtype=torch.int8)


def test_a_folder_is_planned_without_its_weights(folder: Path) -> None:
    whole = hf_bigload.plan(folder, max_memory={"cpu": "1GiB"})
    assert whole.device_map == {"": "cpu"} and not whole.streams
    assert hf_bigload.plan(folder, device_map={"": "disk"}).used["disk"] == hf_bigload.estimate(folder).weights[""]


def test_a_plan_of_a_folder_leaves_room_for_the_workload(folder: Path) -> None:
    told = hf_bigload.estimate(folder, SMALL)
    with hf_bigload.workload(SMALL.batch_size, SMALL.context_length, SMALL.new_tokens):
        total = told.total + told.activations  # on the CPU a heap keeps as much again of what was freed
        whole = hf_bigload.plan(folder, max_memory={"cpu": total})
        less = hf_bigload.plan(folder, max_memory={"cpu": total - 1})
    assert whole.cache == {"cpu": told.cache} and whole.activations == {"cpu": 2 * told.activations}
    assert not whole.streams and less.streams


def test_a_streaming_model_is_traced_too(folder: Path) -> None:
    plain = hf_bigload.estimate(load(folder), SMALL).needs
    model = hf_bigload.disk_offload(load(folder))
    reads = hf_bigload.inspect(model).stats.bytes_read
    assert hf_bigload.estimate(model, SMALL).needs == plain
    assert hf_bigload.inspect(model).stats.bytes_read == reads


# ---------------------------------------------------------------- the workload


def test_a_workload_is_named_for_the_process_or_for_a_block() -> None:
    assert settings.current().workload is None
    with hf_bigload.workload(batch_size=4) as outer:
        assert outer == settings.current().workload == Workload(4, 2048, 128)
        with hf_bigload.enable(), hf_bigload.workload(context_length=10, new_tokens=1):
            assert settings.current().workload == Workload(1, 10, 1)
        hf_bigload.disable()
        assert settings.current().workload == outer
    assert settings.current().workload is None


def test_the_workload_in_force_is_the_one_estimated(folder: Path) -> None:
    with hf_bigload.workload(batch_size=3, context_length=32, new_tokens=1):
        assert hf_bigload.estimate(folder).cache == cache_bytes(Workload(3, 32, 1), 2)


@pytest.mark.parametrize(
    "fields", [{"batch_size": 0}, {"context_length": -1}, {"new_tokens": 1.5}, {"batch_size": True}]
)
def test_a_workload_that_makes_no_sense_changes_nothing(fields: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        hf_bigload.workload(**fields)
    assert settings.current().workload is None


def test_the_environment_names_a_workload(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_BIGLOAD_WORKLOAD", "batch=4, context=8192,new=256")
    assert settings.current().workload == Workload(4, 8192, 256)
    with hf_bigload.workload(new_tokens=7):
        assert settings.current().workload == Workload(new_tokens=7)
    monkeypatch.setenv("HF_BIGLOAD_WORKLOAD", "batch=many")
    with pytest.raises(DeviceMapError, match="HF_BIGLOAD_WORKLOAD: workload 'batch=many'"):
        settings.current()


@pytest.mark.parametrize("text", ["batch", "batch=0", "size=4", "batch=1,batch=2", "new=-1", ","])
def test_a_text_that_is_no_workload_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="workload"):
        parse_workload(text)
