"""On a real accelerator the same model gives the same bits, wherever its weights rest."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import hf_bigload
from benchmarks.accelerator import opened
from benchmarks.placements import EAGER, PLACEMENTS, Source, compare
from hf_bigload.timeline import COMPUTE, COPY
from tests.transformers_loader.models import CONFIGS, forward, save

QUARTER = 0.25


@pytest.fixture
def device() -> Iterator[torch.device]:
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if found is None or found.type in ("sim", "mps"):  # with unified memory there is nothing to place
        pytest.skip("needs an accelerator with memory of its own")
    with opened() as device:
        yield device


@pytest.fixture
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Source:
    name: str = request.param
    return Source(name, save(name, tmp_path / name).folder, EAGER.get(name, {}))


each_model = pytest.mark.parametrize("source", CONFIGS, indirect=True)
llama = pytest.mark.parametrize("source", ["llama"], indirect=True)


@each_model
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_bits_are_the_resident_models(source: Source, placement: str, device: torch.device) -> None:
    found = compare(source, placement, device)
    assert found.is_same, found


@llama
def test_a_model_that_fits_is_a_plain_model_on_the_device(source: Source, device: torch.device) -> None:
    model = source.budgeted(4, 4)
    assert {parameter.device for parameter in model.parameters()} == {device}
    assert [name for name, module in model.named_modules() if hasattr(module, "_hf_hook")] == []


@llama
def test_no_more_of_the_device_is_taken_than_the_budget_allows(source: Source, device: torch.device) -> None:
    before = torch.accelerator.memory_allocated(device)
    model = source.budgeted(0.5, 4)
    assert torch.accelerator.memory_allocated(device) - before <= 0.5 * source.nbytes
    del model


@llama
def test_weights_are_where_they_rest_after_a_forward(source: Source, device: torch.device) -> None:
    model = source.budgeted(0.5, 4)
    homes = {name: parameter.device for name, parameter in model.named_parameters()}
    forward(model, device)
    assert {name: parameter.device for name, parameter in model.named_parameters()} == homes
    assert {where.type for where in homes.values()} == {device.type, "cpu"}


@llama
def test_closing_gives_the_ring_back(source: Source, device: torch.device) -> None:
    model = hf_bigload.cpu_offload(source.plain(), device)
    before = torch.accelerator.memory_allocated(device)
    forward(model, device)
    hf_bigload.inspect(model).close()
    torch.accelerator.empty_cache()
    assert torch.accelerator.memory_allocated(device) <= before


@llama
def test_a_recording_times_copies_and_computing_on_the_device(source: Source, device: torch.device) -> None:
    model = hf_bigload.cpu_offload(source.plain(), device)
    forward(model, device)
    inspection = hf_bigload.inspect(model)
    inspection.stats.reset()
    with inspection.record() as timeline:
        forward(model, device)
    computing, copies = timeline.of(COMPUTE), timeline.of(COPY)
    assert {span.device.partition(":")[0] for span in (*computing, *copies)} == {device.type}
    assert all(one.end <= other.begin for one, other in pairwise(computing))
    assert sum(span.nbytes for span in copies) == inspection.stats.bytes_copied > 0
    arrived = {span.block: span.end for span in copies}
    assert all(arrived.get(span.block, 0.0) <= span.begin for span in computing)
