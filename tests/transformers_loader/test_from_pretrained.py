"""`from_pretrained(device_map=...)` gives the model that a plain load gives, wherever its weights rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_bigload

from .models import (
    BUDGETED,
    CONFIGS,
    LAYERS,
    OFFLOADED,
    ON_DISK,
    PLACEMENTS,
    RESIDENT,
    Saved,
    assert_same_model,
    new_model,
)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_placement_is_the_plain_model(name: str, placement: str, saved: Any, plain: Any) -> None:
    model = saved(name).load(placement)
    assert_same_model(model, plain(name))
    assert not model.training


def test_the_placements_are_what_they_are_called(llama: Saved) -> None:
    homes = {placement: set(llama.load(placement).hf_device_map.values()) for placement in PLACEMENTS}
    assert homes == {RESIDENT: {"cpu"}, BUDGETED: {"cpu", "disk"}, ON_DISK: {"cpu", "disk"}}


# ---------------------------------------------------------------- device maps


@pytest.mark.parametrize("device_map", ["auto", "balanced", "balanced_low_0", "sequential"])
@pytest.mark.parametrize("fraction", [0.4, 2.0])
def test_a_strategy(device_map: str, fraction: float, llama: Saved, plain: Any) -> None:
    model = llama.load(device_map=device_map, max_memory={"cpu": int(fraction * llama.nbytes)})
    assert ("disk" in model.hf_device_map.values()) == (fraction < 1)
    assert_same_model(model, plain("llama"))


@pytest.mark.parametrize("device_map", ["cpu", torch.device("cpu"), {"": "cpu"}, {"": torch.device("cpu")}])
def test_a_device(device_map: Any, llama: Saved, plain: Any) -> None:
    assert_same_model(llama.load(device_map=device_map), plain("llama"))


MAPS: dict[str, dict[str, str]] = {
    "two modules": {"model": "cpu", "lm_head": "disk"},
    "a rest": {"": "disk", "model.embed_tokens": "cpu"},
    "a leaf parameter": {"": "cpu", "lm_head.weight": "disk"},
    "parameters of one layer": {"": "cpu", "model.layers.3.mlp.up_proj.weight": "disk", "model.layers.4.mlp": "disk"},
    "a layer whose name begins like another's": {"": "cpu", "model.layers.1": "disk"},
    "every layer": {
        "model.embed_tokens": "cpu",
        **{f"model.layers.{i}": ("cpu", "disk")[i % 2] for i in range(LAYERS)},
        "model.norm": "disk",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    },
}


@pytest.mark.parametrize("device_map", MAPS.values(), ids=MAPS)
def test_a_map(device_map: dict[str, str], deep: Saved, plain: Any) -> None:
    assert_same_model(deep.load(device_map=device_map), plain("deep"))


def test_a_map_is_followed_on_dots(deep: Saved) -> None:
    model = deep.load(device_map=MAPS["a layer whose name begins like another's"])
    on_disk = {p.block.name for p in hf_bigload.inspect(model).plan.placements if p.home == "disk"}
    assert on_disk == {"model.layers.1"}


def test_the_map_on_the_model_says_where_everything_rests(deep: Saved) -> None:
    device_map = MAPS["every layer"]
    given = deep.load(device_map=device_map).hf_device_map
    for name, home in device_map.items():
        if name != "model.rotary_emb":  # only a buffer, which is where it is computed with
            found = [given[prefix] for prefix in _prefixes(name) if prefix in given]
            assert found[-1:] == [home], name


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts) + 1)]


@pytest.mark.parametrize("placement", OFFLOADED)
def test_the_first_device_of_the_map_is_one_to_send_inputs_to(placement: str, llama: Saved) -> None:
    model = llama.load(placement)
    assert torch.device(next(iter(model.hf_device_map.values()))) == model.device


@pytest.mark.parametrize("budget", [200_000, "200KB", "0.2MB", "180KiB"])
def test_budgets_in_every_notation(budget: int | str, deep: Saved, plain: Any) -> None:
    model = deep.load(device_map="auto", max_memory={"cpu": budget})
    plan = hf_bigload.inspect(model).plan
    assert plan.used["cpu"] <= plan.budget["cpu"] <= 200_000
    assert "disk" in plan.devices
    assert_same_model(model, plain("deep"))


def test_a_budget_that_holds_everything_offloads_nothing(llama: Saved, plain: Any) -> None:
    model = llama.load(device_map="auto", max_memory={"cpu": "10GiB"})
    assert set(model.hf_device_map.values()) == {"cpu"}
    assert_same_model(model, plain("llama"))


# ---------------------------------------------------------------- dtypes


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize(("name", "dtype"), [*((name, torch.bfloat16) for name in CONFIGS), ("t5", torch.float16)])
def test_a_dtype_is_cast_to_on_every_tier(
    name: str, dtype: torch.dtype, placement: str, saved: Any, plain: Any
) -> None:
    assert_same_model(saved(name).load(placement, dtype=dtype), plain(name, dtype))


@pytest.mark.parametrize("spelling", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", [torch.bfloat16, "bfloat16"])
def test_spellings_of_a_dtype(spelling: str, value: Any, llama: Saved, plain: Any) -> None:
    model = llama.load(BUDGETED, **{spelling: value})
    assert model.dtype == torch.bfloat16
    assert_same_model(model, plain("llama", torch.bfloat16))


@pytest.mark.parametrize("asked", ["auto", None])
def test_the_dtype_of_the_checkpoint(asked: str | None, tmp_path: Path) -> None:
    new_model("gpt2").to(torch.float16).save_pretrained(tmp_path)
    checkpoint = Saved(tmp_path, AutoModelForCausalLM, 200_000)
    model = checkpoint.load(ON_DISK, dtype=asked)
    assert model.dtype == torch.float16
    assert_same_model(model, checkpoint.plain(dtype=asked))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_weights_kept_in_fp32_are_so_on_every_tier(placement: str, saved: Any) -> None:
    model = saved("t5").load(placement, dtype=torch.float16)
    kinds = {name.split(".")[-2]: p.dtype for name, p in model.named_parameters()}
    assert kinds["wo"] == torch.float32
    assert kinds["wi_0"] == torch.float16
