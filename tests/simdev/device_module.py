"""`torch.sim`: the module of the simulated device type, with what PyTorch expects of one and the controls of tests.

It is registered by `tests.simdev.load()` and works from then on. Devices are given as an index, a string, a
`torch.device`, or None for the current device; memory is in bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import NamedTuple, TypeAlias

import torch
from torch import Event as Event
from torch import Stream as Stream
from torch import accelerator

Device: TypeAlias = torch.device | str | int | None

_sim = torch.ops.sim
_hardware_count = torch._C._accelerator_hooks_device_count
_visible_count: int | None = None


def _index(device: Device = None) -> int:
    index = device if isinstance(device, int) or device is None else torch.device(device).index
    return accelerator.current_device_index() if index is None else index


# ---------------------------------------------------------------------------------------------- controls for tests
class CopiedBytes(NamedTuple):
    """Bytes moved by copies; those between two devices count at the one that receives."""

    host_to_device: int
    device_to_host: int
    device_to_device: int


def set_capacity(device: Device, nbytes: int | None) -> None:
    """Limit a device's memory to `nbytes`, or with None to nothing; what is already allocated stays.

    An allocation beyond it raises `torch.OutOfMemoryError`.
    """
    _sim.set_capacity(_index(device), nbytes)


def set_visible_count(count: int | None) -> int | None:
    """Let `device_count`, and so `torch.accelerator.device_count`, answer less than there are; None shows all.

    Returns what was set before.
    """
    global _visible_count
    if count is not None and not 0 <= count <= _hardware_count():
        raise ValueError(f"there are {_hardware_count()} simulated devices (SIM_DEVICE_COUNT), {count} cannot be shown")
    before, _visible_count = _visible_count, count
    return before


def set_async(on: bool) -> None:
    """Defer non-blocking copies from and to pinned memory until something waits for them, and check their order.

    Until then their destination holds NaN (-1 in integers). Turning it off waits for every stream.
    """
    _sim.set_async(on)


def violations() -> int:
    """How often device memory was used in asynchronous mode without waiting for an earlier, conflicting use."""
    return len(_sim.violations())


def violation_messages() -> list[str]:
    """One line for each violation: both operations, their streams and the bytes they share."""
    return list(_sim.violations())


def clear_violations() -> None:
    """Forget the violations so far."""
    _sim.clear_violations()


def pinned_bytes() -> int:
    """Pinned host memory that is allocated now."""
    return _sim.pinned_bytes()


def copied_bytes(device: Device = None) -> CopiedBytes:
    """What copies have moved since `reset_copies`, from and to one device; None stands for all of them together."""
    devices = range(_hardware_count()) if device is None else [_index(device)]
    return CopiedBytes(*map(sum, zip(*(_sim.copied_bytes(index) for index in devices), strict=True)))


def reset_copies() -> None:
    """Count copied bytes from zero again, on every device."""
    _sim.reset_copies()


# ---------------------------------------------------------------------------------------------- devices and streams
class device:
    """Context manager: the current device inside is this one."""

    def __init__(self, device: Device) -> None:
        self._inside = _index(device)

    def __enter__(self) -> None:
        self._outside = torch._C._accelerator_exchangeDevice(self._inside)

    def __exit__(self, *exception: object) -> None:
        torch._C._accelerator_maybeExchangeDevice(self._outside)


class device_of(device):
    """Context manager: the current device inside is the tensor's, if it is on one."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__(tensor.device if tensor.device.type == "sim" else None)


class StreamContext:
    """Context manager: the current stream inside is this one; None changes nothing."""

    def __init__(self, stream: torch.Stream | None) -> None:
        self._stream = stream

    def __enter__(self) -> None:
        if self._stream is not None:
            self._stream.__enter__()

    def __exit__(self, *exception: object) -> None:
        if self._stream is not None:
            self._stream.__exit__(*exception)


stream = StreamContext
current_device = accelerator.current_device_index
set_stream = accelerator.set_stream
_exchange_device = torch._C._accelerator_exchangeDevice
_maybe_exchange_device = torch._C._accelerator_maybeExchangeDevice


def device_count() -> int:
    """The devices that `set_visible_count` shows, else all of them."""
    # Not accelerator.device_count: that asks this function.
    return _hardware_count() if _visible_count is None else _visible_count


def is_available() -> bool:
    return True


def is_initialized() -> bool:
    return True


def init() -> None:
    """Nothing to do: a simulated device has no context to create."""


_lazy_init = init


def _is_in_bad_fork() -> bool:
    return False


def set_device(device: Device) -> None:
    accelerator.set_device_index(_index(device))


def current_stream(device: Device = None) -> torch.Stream:
    return accelerator.current_stream(_index(device))


def default_stream(device: Device = None) -> torch.Stream:
    kind = torch._C._autograd.DeviceType.PrivateUse1.value
    return torch.Stream(stream_id=0, device_index=_index(device), device_type=kind)


def synchronize(device: Device = None) -> None:
    accelerator.synchronize(_index(device))


# ---------------------------------------------------------------------------------------------- properties
def get_device_name(device: Device = None) -> str:
    return "Simulated accelerator"


def get_device_capability(device: Device = None) -> tuple[int, int]:
    return 0, 0


def get_device_properties(device: Device = None) -> SimpleNamespace:
    total_memory = mem_get_info(device)[1]
    return SimpleNamespace(name="sim", total_memory=total_memory, multi_processor_count=1, major=0, minor=0)


def is_bf16_supported(including_emulation: bool = True) -> bool:
    return True


def get_amp_supported_dtype() -> list[torch.dtype]:
    return [torch.bfloat16, torch.float16]


# ---------------------------------------------------------------------------------------------- memory
empty_cache = accelerator.empty_cache


def ipc_collect() -> None:
    """Nothing to do: no memory is shared with other processes."""


def memory_stats(device: Device = None) -> dict[str, int]:
    return accelerator.memory_stats(_index(device))


def memory_allocated(device: Device = None) -> int:
    return accelerator.memory_allocated(_index(device))


def memory_reserved(device: Device = None) -> int:
    return accelerator.memory_reserved(_index(device))


def max_memory_allocated(device: Device = None) -> int:
    return accelerator.max_memory_allocated(_index(device))


def max_memory_reserved(device: Device = None) -> int:
    return accelerator.max_memory_reserved(_index(device))


def reset_peak_memory_stats(device: Device = None) -> None:
    accelerator.reset_peak_memory_stats(_index(device))


def mem_get_info(device: Device = None) -> tuple[int, int]:
    """(free, total) bytes."""
    return accelerator.get_memory_info(_index(device))


# ---------------------------------------------------------------------------------------------- random numbers
def manual_seed_all(seed: int) -> None:
    _sim.manual_seed_all(int(seed) & 0x7FFF_FFFF_FFFF_FFFF)  # operators take signed integers


manual_seed = manual_seed_all


def get_rng_state(device: Device = None) -> torch.Tensor:
    return _sim.get_rng_state(_index(device))


def set_rng_state(state: torch.Tensor, device: Device = None) -> None:
    _sim.set_rng_state(_index(device), state)


def get_rng_state_all() -> list[torch.Tensor]:
    return [get_rng_state(index) for index in range(device_count())]


def set_rng_state_all(states: Sequence[torch.Tensor]) -> None:
    for index, state in enumerate(states):
        set_rng_state(state, index)
