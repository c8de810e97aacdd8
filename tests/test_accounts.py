"""What a model holds of each memory: no more than it was allowed, and told as it is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hf_bigload
from hf_bigload.hardware import process_memory
from tests import simdev
from tests.dispatch import Net, from_disk, seeded

WIDTH = 512
SLACK = 64 << 10
"""Bytes beside a budget: whole pages, where tensors begin and end within one."""


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def plain() -> nn.Module:
    return seeded(Net, layers=12, width=WIDTH)  # 25 MiB


def nbytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def load(plain: nn.Module, folder: Path, memory: dict[int | str, int]) -> Any:
    return from_disk(plain, folder, device_map="auto", max_memory=memory)


class TestABudgetOfRam:
    def test_includes_the_ring_and_excludes_the_runtime(self, plain: nn.Module, tmp_path: Path) -> None:
        budget = int(0.5 * nbytes(plain))
        model = load(plain, tmp_path, {"cpu": budget})
        before = hf_bigload.inspect(model).memory
        model(torch.randn(1, WIDTH))
        after = hf_bigload.inspect(model).memory
        account = after.devices["cpu"]
        assert account.budget == budget and account.planned <= budget
        assert account.ring >= 2 * nbytes(plain.layers[0]) and account.peak <= budget + SLACK
        assert account.weights + account.ring > 0.8 * budget
        if after.host is not None and before.host is not None:
            assert after.host.other < before.host.other + (4 << 20) and after.host.weights == account.weights

    def test_is_what_the_process_takes_more(self, plain: nn.Module, tmp_path: Path) -> None:
        budget = int(0.5 * nbytes(plain))
        from_disk(plain, tmp_path, device_map={"": "disk"})(torch.randn(1, WIDTH))  # what is loaded once, is
        before = process_memory()
        if before is None:
            pytest.skip("this system has no /proc/self/smaps_rollup")
        with hf_bigload.init_empty_weights():
            empty = Net(layers=12, width=WIDTH)
        model = hf_bigload.load_checkpoint_and_dispatch(
            empty, tmp_path, device_map="auto", max_memory={"cpu": budget}
        ).eval()
        model(torch.randn(1, WIDTH))
        after = process_memory()
        assert after is not None and after.anonymous - before.anonymous <= budget + (4 << 20)

    def test_includes_what_passes_through_to_an_accelerator(self, plain: nn.Module, tmp_path: Path) -> None:
        with simdev.devices([None]) as sim:
            memory = {0: int(0.4 * nbytes(plain)), "cpu": int(0.4 * nbytes(plain))}
            pinned = sim.pinned_bytes()
            model = load(plain, tmp_path, memory)
            model(torch.randn(1, WIDTH))
            accounts = hf_bigload.inspect(model).memory.devices
            assert accounts["cpu"].ring > 0 and accounts["cpu"].peak <= memory["cpu"] + SLACK
            assert sim.pinned_bytes() - pinned <= memory["cpu"] + SLACK + 4 * 4096
            assert accounts["sim:0"].peak <= memory[0] + SLACK
            assert sim.memory_allocated(0) == accounts["sim:0"].held


def test_a_weight_that_is_mapped_takes_no_memory_until_it_is_written(plain: nn.Module, tmp_path: Path) -> None:
    model = load(plain, tmp_path, {"cpu": 2 * nbytes(plain)})
    assert hf_bigload.inspect(model).memory.devices["cpu"].held == 0
    model.first.weight.mul_(2)
    held = hf_bigload.inspect(model).memory.devices["cpu"].held
    assert model.first.weight.nbytes <= held < model.first.weight.nbytes + SLACK  # neighbours share its last pages


def test_is_told_in_a_line_for_each_device(plain: nn.Module, tmp_path: Path) -> None:
    with simdev.devices([None]):
        model = load(plain, tmp_path, {0: int(0.4 * nbytes(plain)), "cpu": 2 * nbytes(plain)})
        told = str(hf_bigload.inspect(model).memory).splitlines()
    assert [line.split(":")[0] for line in told[:2]] == ["sim", "cpu"] and "clean file pages" in told[-1]
