"""A simulated accelerator, so that placement, budgets and prefetch are tested on a machine that has none.

Device type "sim" has SIM_DEVICE_COUNT devices (default 4). Their memory is host memory with accounting and a settable
capacity, their kernels are the CPU's, so results are bit-equal to the CPU's, and mixing devices raises. In asynchronous
mode copies happen no earlier than something waits for them, and every use of device memory that no event or stream
has ordered is counted. Not simulated: time, overlap, fragmentation, a GPU's rounding; LSTM does not run.

    from tests import simdev

    sim = simdev.load()                           # compiles on first use, then registers "sim"; returns torch.sim
    with simdev.devices([20 << 20, 40 << 20]):    # two small devices, for as long as the block lasts
        ...
    with simdev.asynchronous():                   # a race inside is an AssertionError when the block ends
        ...
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

import torch

from . import build, device_module

__all__ = ["asynchronous", "devices", "load"]

_load_lock = threading.Lock()


def load() -> ModuleType:
    """Compile the simulator if need be, register device type "sim", and return `torch.sim`. Later calls only return.

    Raises:
        RuntimeError: there is no C++ compiler, it rejects the sources, or another backend is registered already.
    """
    with _load_lock:
        if getattr(torch, "sim", None) is not device_module:
            _register()
    return device_module


def _register() -> None:
    library = build.library()
    torch.utils.rename_privateuse1_backend("sim")
    torch.ops.load_library(library)
    torch.ops.sim.prefer_cpu_kernels()
    torch._register_device_module("sim", device_module)
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)


@contextmanager
def devices(capacities: Sequence[int | None], *, hide_others: bool = False) -> Iterator[ModuleType]:
    """Devices 0, 1, ... have these capacities inside, and every device's peak and the copy counters start from zero.

    Args:
        capacities: bytes for each device, None for unlimited; devices beyond those are unlimited.
        hide_others: let `torch.accelerator.device_count()` answer `len(capacities)`.

    Yields:
        `torch.sim`. Afterwards devices are unlimited again, and as many of them are shown as before.

    Raises:
        ValueError: there are more capacities than devices.
    """
    sim = load()
    shown_before = sim.set_visible_count(None)
    count = sim.device_count()
    unlimited = [None] * count
    try:
        if len(capacities) > count:
            raise ValueError(f"{len(capacities)} capacities for {count} devices: raise SIM_DEVICE_COUNT")
        _reset([*capacities, *unlimited[len(capacities) :]])
        sim.set_visible_count(len(capacities) if hide_others else None)
        yield sim
    finally:
        sim.set_visible_count(None)
        _reset(unlimited)
        sim.set_visible_count(shown_before)


def _reset(capacities: Sequence[int | None]) -> None:
    if any(map(device_module.memory_allocated, range(len(capacities)))):
        gc.collect()  # what only a reference cycle keeps alive would count against the next test
    device_module.empty_cache()
    device_module.reset_copies()
    for index, capacity in enumerate(capacities):
        device_module.set_capacity(index, capacity)
        device_module.reset_peak_memory_stats(index)


@contextmanager
def asynchronous() -> Iterator[ModuleType]:
    """Asynchronous mode inside; when the block ends every stream has been waited for.

    Yields:
        `torch.sim`.

    Raises:
        AssertionError: device memory was used out of order inside; the message names the operations and streams.
    """
    sim = load()
    before = sim.violations()
    sim.set_async(True)
    try:
        yield sim
    finally:
        sim.set_async(False)
    races = sim.violation_messages()[before:]
    assert not races, "device memory used out of order:\n" + "\n".join(races)
