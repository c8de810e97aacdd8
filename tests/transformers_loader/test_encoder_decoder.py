"""An encoder runs once and a decoder once per token: an accelerator that holds one of them holds the decoder."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

import hf_bigload
from tests import simdev

from .models import Saved, new_model, prompt, same, save

TOKEN_IDS = 1 << 10
"""Bytes that a step may copy to the device besides weights: token ids, masks, positions."""


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return save("t5", tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def budget() -> dict[Any, int]:
    """What the decoder and the head take, and a ring for two of the encoder's blocks."""
    model = new_model("t5")

    def size(module: torch.nn.Module) -> int:
        return sum(p.numel() * p.element_size() for p in module.parameters())

    blocks = sum(map(size, model.decoder.block)) + size(model.decoder.final_layer_norm) + size(model.lm_head)
    return {0: blocks + 2 * max(map(size, model.encoder.block)), "cpu": 1 << 30}


def copied_for_each_token(model: Any, sim: Any, new_tokens: int = 6) -> tuple[torch.Tensor, list[int]]:
    """What was generated, and the bytes that went to the device for each token."""
    moments = [sim.copied_bytes(0).host_to_device]

    def look(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        moments.append(sim.copied_bytes(0).host_to_device)
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    exactly: dict[str, Any] = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    found = model.generate(prompt("sim:0"), **exactly, stopping_criteria=[look]).cpu()
    return found, [later - since for since, later in pairwise(moments)]


def ours(saved: Saved, budget: dict[Any, int]) -> Any:
    with hf_bigload.enable():
        return saved.auto.from_pretrained(saved.folder, device_map="auto", max_memory=budget)


def stock(saved: Saved, budget: dict[Any, int]) -> Any:
    accelerate = pytest.importorskip("accelerate")
    model = new_model("t5")
    with pytest.MonkeyPatch.context() as patch:  # it would ask for a CUDA device 0
        patch.setattr("accelerate.utils.modeling.get_max_memory", lambda max_memory: max_memory)
        planned = accelerate.infer_auto_device_map(model, budget, no_split_module_classes=model._no_split_modules)
    return saved.auto.from_pretrained(
        saved.folder, device_map={n: "sim:0" if d == 0 else d for n, d in planned.items()}
    )


@pytest.mark.parametrize("load", [ours, stock])
def test_we_copy_no_weights_for_a_token_and_stock_copies_decoder_blocks_for_each(
    t5: Saved, budget: dict[Any, int], load: Callable[[Saved, dict[Any, int]], Any]
) -> None:
    with simdev.devices([None], hide_others=True) as sim:
        generated, (_, *others) = copied_for_each_token(load(t5, budget), sim)
    if load is ours:
        assert max(others) <= TOKEN_IDS
    else:
        assert min(others) > budget[0] // 20
    exactly: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    assert same(generated, t5.plain().generate(prompt(), **exactly))
