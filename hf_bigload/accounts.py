"""What a model takes of each device's memory, beside what its plan said; and what the process takes of the host's.

The host's figures are of anonymous memory: of weights, page-locked packs of them, rings. Clean pages of mapped files
are told apart: the kernel takes them back before it refuses memory to anybody.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from .dispatch.attach import attachment_of
from .errors import human_bytes
from .hardware import ProcessMemory, device_name, process_memory
from .pinned import memory_around
from .placed import placed_of, tensors_of
from .specs import CPU, DISK, Plan


@dataclass(frozen=True)
class DeviceAccount:
    """One device's memory, in bytes."""

    budget: int | None
    """What the plan may use; None if it was not told."""
    planned: int
    """What the plan counts: weights at rest and rings, caches and activations where it knows them."""
    weights: int
    """At rest there now, packs of them included."""
    ring: int
    """That streamed weights land in or pass through, now."""
    ring_peak: int
    """The most that was, since the plan is followed."""

    @property
    def held(self) -> int:
        """What the model holds there now."""
        return self.weights + self.ring

    @property
    def peak(self) -> int:
        """The most that the model held there while it ran, since the plan is followed."""
        return self.weights + self.ring_peak


@dataclass(frozen=True)
class HostAccount:
    """The process's memory, in bytes. `weights`, `pinned`, `ring` and `other` are anonymous, and nothing is in two."""

    weights: int
    """The model's, at rest in plain memory."""
    pinned: int
    """The model's, at rest in packs that an accelerator copies from."""
    ring: int
    other: int
    """Python, torch, activations, other models: no budget counts it."""
    clean_file_pages: int
    """Of files that are mapped: given up when memory is short."""

    @property
    def anonymous(self) -> int:
        return self.weights + self.pinned + self.ring + self.other


@dataclass(frozen=True)
class Memory:
    """What a model takes of each memory."""

    devices: Mapping[str, DeviceAccount]
    """By device name; "cpu" is the host's."""
    host: HostAccount | None
    """None where the system does not tell."""

    def __str__(self) -> str:
        lines = [
            f"{name}: {human_bytes(d.held)} held, {human_bytes(d.peak)} at the most, {human_bytes(d.planned)} planned"
            for name, d in self.devices.items()
        ]
        if self.host is not None:
            clean = human_bytes(self.host.clean_file_pages)
            lines.append(f"process: {human_bytes(self.host.anonymous)} anonymous, beside {clean} of clean file pages")
        return "\n".join(lines)


def memory_of(model: nn.Module, plan: Plan) -> Memory:
    """The account of a model that follows `plan`."""
    resting, rings = _resting(model), _rings(model)
    names = [name for name in {**plan.used, **resting, **rings} if name != DISK]
    devices = {
        name: DeviceAccount(
            plan.budget.get(name), plan.used.get(name, 0), sum(resting.get(name, (0, 0))), *rings.get(name, (0, 0))
        )
        for name in names
    }
    process = process_memory()
    return Memory(devices, None if process is None else _host(process, *resting.get(CPU, (0, 0)), rings))


def _host(process: ProcessMemory, weights: int, pinned: int, rings: Mapping[str, tuple[int, int]]) -> HostAccount:
    ring = rings.get(CPU, (0, 0))[0]
    other = max(0, process.anonymous - weights - pinned - ring)
    return HostAccount(weights, pinned, ring, other, process.clean_file_pages)


def held_by(model: nn.Module) -> dict[str, int]:
    """Bytes of each device's memory that the weights and rings of `model` take now."""
    resting, rings = _resting(model), _rings(model)
    return {name: sum(resting.get(name, (0, 0))) + rings.get(name, (0, 0))[0] for name in {**resting, **rings}}


def _resting(model: nn.Module) -> dict[str, tuple[int, int]]:
    """By device: bytes of weights in memory of their own, and of the packs that others lie in.

    A weight on disk is a mapping of its file: it takes no memory.
    """
    attachment, materializer = attachment_of(model), placed_of(model).materializer
    plain: dict[str, int] = {}
    packs: dict[int, int] = {}
    for tensor in {id(tensor): tensor for tensor in tensors_of(model).values()}.values():
        on_disk = attachment is not None and tensor in attachment.executor.on_disk
        if tensor.device.type == "meta" or on_disk or (materializer is not None and materializer.is_mapped(tensor)):
            continue
        home = tensor.data if attachment is None else attachment.executor.home(tensor)
        pack = memory_around(home)
        if pack is not None:
            packs[pack.data_ptr()] = pack.numel()
        else:
            place = device_name(home.device)
            plain[place] = plain.get(place, 0) + home.numel() * home.element_size()
    pinned = {CPU: sum(packs.values())} if packs else {}
    return {name: (plain.get(name, 0), pinned.get(name, 0)) for name in {**plain, **pinned}}


def _rings(model: nn.Module) -> dict[str, tuple[int, int]]:
    """By device: bytes of the ring now, and at the most."""
    attachment = attachment_of(model)
    if attachment is None:
        return {}
    return {device_name(device): (ring.held, ring.peak) for device, ring in attachment.executor.machine.rings.items()}
