"""The accelerator that is measured, in torch's device-neutral terms; the simulated one of the tests will do."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

import torch

SIMULATED = "sim"
REPETITIONS = 5
COPIES = 8


@contextmanager
def opened(name: str | None = None) -> Iterator[torch.device]:
    """The first accelerator of this machine, ready for use, or with "sim" a simulated one of unlimited memory.

    Raises:
        RuntimeError: there is none, or its type is not `name`.
    """
    if name == SIMULATED:
        from tests import simdev

        with simdev.devices([None], hide_others=True):
            yield torch.device(SIMULATED, 0)
        return
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if found is None or name not in (None, found.type):
        raise RuntimeError(
            f"torch {torch.__version__} sees {found or 'no accelerator'}, not {name or 'one'}: install a build of torch"
            " for the device, or try the logic with --device sim --tiny"
        )
    device = torch.device(found.type, 0)
    torch.empty(1, device=device)  # makes the context, which is no part of any figure
    yield device


def synchronize() -> None:
    torch.accelerator.synchronize()


def pinned_bandwidth(device: torch.device, nbytes: int) -> float:
    """Bytes per second from pinned memory to the device, copied `nbytes` at a time."""
    source = torch.ones(nbytes, dtype=torch.uint8).pin_memory()
    destination = torch.empty(nbytes, dtype=torch.uint8, device=device)
    rates = []
    for _ in range(REPETITIONS + 1):
        synchronize()
        started = time.perf_counter()
        for _ in range(COPIES):
            destination.copy_(source, non_blocking=True)
        synchronize()
        rates.append(COPIES * nbytes / (time.perf_counter() - started))
    return median(rates[1:])  # the first warms up
