"""Host memory for copies to a device: aligned, page-locked where that can be had, plain where it cannot."""

from __future__ import annotations

import contextlib
import gc
import logging
from pathlib import Path

import pytest
import torch

from hf_bigload import pinned
from hf_bigload.checkpoint.reader import PAGE, Extent, Reader
from hf_bigload.pinned import pinned_buffer
from tests import simdev

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


class Cudart:
    """The two calls of the CUDA runtime that lock pages; `error` is what locking answers."""

    def __init__(self, error: int = 0) -> None:
        self.error = error
        self.locked: dict[int, int] = {}

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        if not self.error:
            self.locked[address] = nbytes
        return self.error

    def cudaHostUnregister(self, address: int) -> int:
        del self.locked[address]
        return 0


@pytest.fixture
def cudart(monkeypatch: pytest.MonkeyPatch) -> Cudart:
    made = Cudart()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: made)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    return made


@pytest.mark.parametrize("device", ["cpu", "sim:0", "cuda:0"])
@pytest.mark.parametrize("nbytes", [0, 1, PAGE, 3 * PAGE + 1])
def test_a_buffer_is_whole_pages_and_one_memory_as_tensor_and_as_buffer(
    cudart: Cudart, device: str, nbytes: int, tmp_path: Path
) -> None:
    simdev.load()
    made = pinned_buffer(nbytes, torch.device(device))
    assert made.tensor.data_ptr() % PAGE == 0
    assert nbytes <= made.nbytes < nbytes + 2 * PAGE
    assert made.nbytes % PAGE == 0
    (tmp_path / "file").write_bytes(b"weights")
    Reader(threads=1).read([Extent(str(tmp_path / "file"), 0, 7, 0)], made.buffer).result(30)
    assert bytes(made.tensor[:7].tolist()) == b"weights"


def test_an_accelerator_gets_pinned_memory() -> None:
    sim = simdev.load()
    before = sim.pinned_bytes()
    made = pinned_buffer(PAGE, torch.device("sim:0"))
    assert made.pinned
    assert made.tensor.is_pinned()
    assert sim.pinned_bytes() > before
    assert not pinned_buffer(PAGE, CPU).pinned


def test_pages_stay_locked_for_cuda_as_long_as_any_tensor_of_them_lives(cudart: Cudart) -> None:
    made = pinned_buffer(3 * PAGE, CUDA)
    assert made.pinned
    assert cudart.locked == {made.tensor.data_ptr(): 3 * PAGE}
    view = made.tensor[8:12].view(torch.float32)
    del made
    gc.collect()
    assert cudart.locked
    del view
    gc.collect()
    assert cudart.locked == {}


def test_where_pages_cannot_be_locked_they_are_plain_and_it_is_said_once(
    cudart: Cudart, caplog: pytest.LogCaptureFixture
) -> None:
    cudart.error = 2
    pinned._told.clear()
    with caplog.at_level(logging.WARNING, logger=pinned.__name__):
        made = [pinned_buffer(PAGE, CUDA) for _ in range(3)]
    assert not any(each.pinned for each in made)
    assert len(caplog.records) == 1
    assert "could not be page-locked for cuda" in caplog.text
