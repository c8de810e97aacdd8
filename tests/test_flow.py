"""What a user may ask about a model: before it is loaded, and after."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import hf_bigload
from hf_bigload.errors import BudgetError

LAYER_BYTES = 8 * 8 * 4


@pytest.fixture
def net() -> nn.Module:
    return nn.Sequential(*[nn.Linear(8, 8, bias=False) for _ in range(4)])


def test_a_plan_needs_no_weights() -> None:
    with hf_bigload.init_empty_weights():
        net = nn.Sequential(*[nn.Linear(8, 8, bias=False) for _ in range(4)])
    plan = hf_bigload.plan(net, max_memory={"cpu": 3 * LAYER_BYTES})
    assert plan.used == {"cpu": 3 * LAYER_BYTES, "disk": 2 * LAYER_BYTES} and plan.ring == {"cpu": LAYER_BYTES}


def test_a_plan_that_cannot_be_is_refused(net: nn.Module) -> None:
    with pytest.raises(BudgetError, match=f"{LAYER_BYTES} bytes"):
        hf_bigload.plan(net, max_memory={"cpu": LAYER_BYTES - 1})


def test_an_estimate_gives_bytes_by_part_of_a_model_or_of_files(net: nn.Module, tmp_path: Path) -> None:
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    expected = {"": 4 * LAYER_BYTES, **{str(i): LAYER_BYTES for i in range(4)}}
    assert hf_bigload.estimate(net).weights == hf_bigload.estimate(tmp_path).weights == expected
    assert hf_bigload.estimate(tmp_path, dtype=torch.bfloat16).weights[""] == 2 * LAYER_BYTES


def test_a_streamed_model_tells_its_plan_and_what_it_read(net: nn.Module) -> None:
    model = hf_bigload.disk_offload(net)
    model(torch.ones(1, 8))
    told = hf_bigload.inspect(model)
    assert told.stats.bytes_read == 4 * LAYER_BYTES and told.plan.used["disk"] == 4 * LAYER_BYTES
    assert "disk" in told.explain()
    told.close()
    with pytest.raises(ValueError, match="no plan"):
        hf_bigload.inspect(model)


def test_a_resident_model_is_plain_and_tells_its_plan_as_long_as_it_stays(net: nn.Module) -> None:
    model = hf_bigload.dispatch_model(net, {"": "cpu"})
    assert hf_bigload.inspect(model).plan.device_map == {"": "cpu"}
    assert hf_bigload.inspect(model).stats.bytes_read == 0
    assert not any("_hf_hook" in vars(module) for module in model.modules())
    model.to("meta")
    with pytest.raises(ValueError, match="no plan"):
        hf_bigload.inspect(model)


def test_a_model_of_somebody_elses_has_no_plan() -> None:
    with pytest.raises(ValueError, match="Linear has no plan"):
        hf_bigload.inspect(nn.Linear(1, 1))
