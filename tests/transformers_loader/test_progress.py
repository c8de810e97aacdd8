"""While weights are on their way: the progress bar counts arrivals, and an interrupt leaves nothing under way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hf_bigload
from hf_bigload import materialize
from hf_bigload.loaders.transformers_weights import _Arrived, _Loading
from hf_bigload.materialize import Materializer


class Coming:
    """A materializer of which tensors arrive as `under_way` says."""

    def __init__(self, *under_way: int) -> None:
        self.under_way = iter(under_way)

    def collect(self, wait: bool = False) -> int:
        return next(self.under_way)

    def finish(self) -> None:
        return


class Bar:
    shown = 0

    def update(self, more: int) -> None:
        assert more > 0
        self.shown += more


def test_the_bar_counts_what_arrived_not_what_was_asked_for() -> None:
    bar = Bar()
    arrived, shown = _Arrived(Coming(1, 2, 1, 1, 0), bar), []  # type: ignore[arg-type]
    for _ in range(3):
        arrived.one_more()
        shown.append(bar.shown)
    arrived.wait_for_all()
    assert shown == [0, 0, 2]
    assert bar.shown == 3


def test_an_interrupt_ends_the_load_and_waits_for_its_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=99,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    monkeypatch.setattr(materialize, "ASIDE_FROM", 1000)
    used: list[Materializer] = []

    def interrupted(loading: _Loading, name: str, value: object) -> None:
        used.append(loading.materializer)
        if len(used) == 5:
            assert loading.materializer._arrivals is not None
            raise KeyboardInterrupt

    monkeypatch.setattr(_Loading, "_set", interrupted)
    with hf_bigload.enable(), pytest.raises(KeyboardInterrupt):
        LlamaForCausalLM.from_pretrained(tmp_path, device_map="cpu", dtype=torch.bfloat16)
    assert used[0]._arrivals is None
    used[0].reader.close()
    assert used[0].reader._pool.jobs == set()
