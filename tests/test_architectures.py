"""Every architecture computes the same bits wherever its weights rest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from tests.architectures import compare as module
from tests.architectures.compare import compare, same_bits
from tests.architectures.patches import NOT_BUILDABLE
from tests.architectures.tiny import Architecture, architecture, architectures

REPRESENTATIVE = (
    "causal:bloom",  # alibi, fused queries
    "causal:camembert",  # positions counted from the padding
    "causal:deepseek_v3",  # latent attention, experts fused from many tensors
    "causal:gemma3",  # a vision tower
    "causal:gemma4",  # vision, sound, keys shared between layers, embeddings per layer
    "causal:gpt2",  # transposed weights, tied
    "causal:jetmoe",  # weights read outside their module
    "causal:llama",
    "causal:mamba",  # no attention
    "causal:mixtral",  # experts fused
    "causal:opt",
    "causal:xlm-roberta",
    "seq2seq:bart",  # one table for encoder, decoder and head
    "seq2seq:marian",  # computed positions, a bias of the head
    "seq2seq:prophetnet",
    "seq2seq:switch_transformers",  # kernels that look at addresses
    "seq2seq:t5",
)

THE_OTHERS = [a for a in architectures() if a.name not in REPRESENTATIVE]


def _assert_equal(which: Architecture, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    record = compare(which, folder, dtype=dtype)
    assert not record.not_built
    assert {name: found for name, found in record.differences.items() if found} == {}


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_a_model_computes_the_same_bits_wherever_its_weights_rest(name: str, tmp_path: Path) -> None:
    _assert_equal(architecture(name), tmp_path)


@pytest.mark.parametrize("name", ["causal:llama", "causal:mixtral", "seq2seq:t5"])
def test_a_model_loaded_in_another_dtype_computes_the_same_bits(name: str, tmp_path: Path) -> None:
    _assert_equal(architecture(name), tmp_path, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("which", THE_OTHERS, ids=lambda a: a.name)
def test_every_other_architecture_computes_the_same_bits(which: Architecture, tmp_path: Path) -> None:
    if which.name in NOT_BUILDABLE:
        pytest.skip(NOT_BUILDABLE[which.name])
    _assert_equal(which, tmp_path)


def test_a_model_that_computes_something_else_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compute, calls = module.compute, []

    def off_by_a_bit(which: Architecture, model: torch.nn.Module) -> module.Computed:
        computed = compute(which, model)
        calls.append(model)
        if len(calls) == 2:  # the plain load, then the first over its budget
            computed.outputs["logits"].view(torch.int32)[0, 0, 0] ^= 1
        return computed

    monkeypatch.setattr(module, "compute", off_by_a_bit)
    record = compare(architecture("causal:llama"), tmp_path)
    assert [name for name, found in record.differences.items() if found] == ["40%"]
    assert "1 of" in record.differences["40%"]


def test_bits_differ_where_values_compare_equal() -> None:
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert same_bits(torch.tensor([float("nan")]), torch.tensor([float("nan")]))
    assert not same_bits(torch.ones(2), torch.ones(2, dtype=torch.bfloat16))
