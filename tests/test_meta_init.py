"""Building without weights: parameters on meta, buffers with their values, no memory used on the way."""

from __future__ import annotations

import resource
import threading

import pytest
import torch
from torch import nn

from hf_bigload.meta_init import DEFER_FROM, init_empty_weights, init_on_device

SIDE = 700  # a square of this many floats is larger than what is made for real
assert SIDE * SIDE * 4 > DEFER_FROM


class Buffers(nn.Module):
    """Buffers and attributes made in the ways that models make them, from tensors large enough to be deferred."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(SIDE, SIDE))
        self.register_buffer("mask", torch.tril(torch.ones(SIDE, SIDE)).view(1, 1, SIDE, SIDE))
        table = torch.zeros(4 * SIDE, SIDE)
        table[:, 0::2] = torch.sin(torch.arange(4 * SIDE)[:, None] / 10.0)
        table[5] = torch.full((SIDE,), 7.0)
        self.register_buffer("table", table)
        base = torch.zeros(SIDE, SIDE)
        view = base[3:5]
        view.add_(2)
        self.register_buffer("written_through_a_view", base)
        small = torch.zeros(4)
        small.copy_(torch.full((SIDE, SIDE), 3.0)[0, :4])
        self.register_buffer("small_from_large", small)
        self.attribute = torch.ones(SIDE, SIDE) * 3
        self.total = torch.full((SIDE, SIDE), 2.0).sum().item()
        self.late = None
        self.register_buffer("replaced", torch.zeros(2))
        self.replaced = torch.eye(SIDE) + torch.ones(SIDE, SIDE)


def test_buffers_have_the_values_of_a_plain_build() -> None:
    plain = Buffers()
    with init_empty_weights():
        built = Buffers()
    assert [p.device.type for p in built.parameters()] == ["meta"]
    for (name, expected), (_, buffer) in zip(plain.named_buffers(), built.named_buffers(), strict=True):
        assert torch.equal(buffer, expected), name
    assert torch.equal(built.attribute, plain.attribute) and built.total == plain.total


def test_include_buffers_puts_everything_on_meta() -> None:
    with init_empty_weights(include_buffers=True):
        built = nn.BatchNorm1d(4)
    assert {t.device.type for t in (*built.parameters(), *built.buffers())} == {"meta"}


def test_a_hundred_billion_parameters_take_no_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with init_empty_weights():
        model = nn.Sequential(*[nn.Linear(10_000, 10_000) for _ in range(1000)])
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert sum(p.numel() for p in model.parameters()) == 100_010_000_000
    assert grown < 200e6


def test_a_tensor_too_large_for_the_machine_is_never_allocated() -> None:
    with init_empty_weights():
        parameter = nn.ParameterList([nn.Parameter(torch.empty(1 << 20, 1 << 20)), nn.Parameter(torch.zeros(1 << 40))])
    assert {p.device.type for p in parameter} == {"meta"}


def test_tied_parameters_stay_tied() -> None:
    with init_empty_weights():
        embed, head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
        head.weight = embed.weight
    assert head.weight is embed.weight


def test_parameters_keep_requires_grad_class_and_attributes() -> None:
    class Marked(nn.Parameter):
        pass

    module = nn.Module()
    parameter = Marked(torch.zeros(3), requires_grad=False)
    parameter.tag = "kept"
    with init_empty_weights():
        module.register_parameter("p", parameter)
    assert type(module.p) is Marked and module.p.is_meta and module.p.tag == "kept" and not module.p.requires_grad


def test_nothing_is_patched_afterwards_not_even_after_an_error() -> None:
    before = nn.Module.__setattr__
    with pytest.raises(RuntimeError, match="on purpose"), init_empty_weights():
        raise RuntimeError("on purpose")
    assert nn.Module.__setattr__ is before
    assert next(nn.Linear(2, 2).parameters()).device.type == "cpu"


def test_other_threads_build_real_models_meanwhile() -> None:
    built: list[nn.Module] = []
    with init_empty_weights():
        thread = threading.Thread(target=lambda: built.append(nn.Linear(2, 2)))
        thread.start()
        thread.join()
    assert built[0].weight.device.type == "cpu"


def test_init_on_device_reaches_parameters_only_unless_told() -> None:
    with init_on_device(torch.device("cpu")):
        assert nn.Linear(2, 2).weight.device.type == "cpu"
    with init_on_device("meta", include_buffers=False):
        built = nn.BatchNorm1d(3)
    assert built.weight.is_meta and built.running_mean.device.type == "cpu"
