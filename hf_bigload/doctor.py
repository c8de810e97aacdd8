"""What this machine is, as far as running large models goes, and what is wrong with it."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

from . import bandwidth, hardware, registry, seams
from .bandwidth import Measurement
from .checkpoint.spill import cache_root
from .errors import SpillError, human_bytes

_LIBRARIES = ("hf_bigload", "torch", "transformers", "diffusers", "peft", "safetensors", "huggingface_hub")
_PAGEMAP = "/proc/self/pagemap"
_NVIDIA = "/dev/nvidiactl"
_LITTLE_RAM, _LITTLE_DISK = 2 << 30, 10 << 30
_SLOW_DISK = 200e6
"""Bytes per second below which streaming from disk is hardly worth it."""


@dataclass(frozen=True)
class Accelerator:
    """An accelerator: its name in plans, what it is called, and bytes."""

    name: str
    model: str
    free: int
    total: int


@dataclass(frozen=True)
class Library:
    """A library; `seams` says whether what a loader hooks is where it should be, None where there is no loader."""

    name: str
    version: str | None
    seams: str | None = None

    @property
    def moved(self) -> bool:
        return self.seams not in (None, "hold")


@dataclass(frozen=True)
class Diagnosis:
    """What was found; sizes in bytes."""

    system: str
    cpus: int
    accelerators: tuple[Accelerator, ...]
    ram_total: int
    ram_free: int
    """What may still be used, by every limit."""
    container_limits: tuple[tuple[int, int], ...]
    """(limit, use) of each container around this process that has one."""
    cache_folder: str
    disk_free: int
    measurement: Measurement | None
    libraries: tuple[Library, ...]
    problems: tuple[str, ...]


def examine(fresh: bool = False) -> Diagnosis:
    """Look at this machine; measures its bandwidths where that was not done before, or if `fresh`."""
    import psutil

    folder, problems = os.path.abspath(cache_root()), []
    measurement = None
    try:
        measurement = bandwidth.measured(folder, fresh)
    except SpillError as error:
        problems.append(str(error))
    found = Diagnosis(
        system=f"{platform.system()} {platform.release()} {platform.machine()}, Python {platform.python_version()}",
        cpus=os.cpu_count() or 1,
        accelerators=tuple(map(_accelerator, hardware.accelerator_names())),
        ram_total=psutil.virtual_memory().total,
        ram_free=hardware.free_ram(),
        container_limits=tuple(hardware.container_limits()[1:]),
        cache_folder=folder,
        disk_free=hardware.free_disk(hardware.existing_folder(folder)),
        measurement=measurement,
        libraries=tuple(_libraries()),
        problems=(),
    )
    return Diagnosis(**{**vars(found), "problems": (*problems, *_problems(found))})


def _accelerator(name: str) -> Accelerator:
    import torch

    device = torch.device(name)
    model = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    total = hardware.free_ram() if device.type == "mps" else torch.accelerator.get_memory_info(device)[1]
    return Accelerator(name, model, hardware.free_by_accelerator()[name], total)


# ---------------------------------------------------------------- libraries


def _libraries() -> Iterator[Library]:
    hooked = {loader.library: loader for loader in registry.loaders()}
    for name in dict.fromkeys((*_LIBRARIES, *hooked)):
        version = _version(name)
        loader = hooked.get(name)
        yield Library(name, version, None if loader is None or version is None else _state(loader))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        module = sys.modules.get(name)  # run from its source
        return str(getattr(module, "__version__", "")) or None if module else None


def _state(loader: registry.Loader) -> str:
    """ "hold", or what was said about a loader whose seams do not. Nothing is patched."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            importlib.import_module(loader.trigger)
            if seams.prepare(loader.library, loader.seams()) is not None:
                return "hold"
        except Exception as error:  # noqa: BLE001 - another package's, and what we are here to report
            return f"{type(error).__name__}: {error}"
    return "; ".join(str(each.message) for each in said if issubclass(each.category, seams.SeamMovedWarning))


# ---------------------------------------------------------------- what is wrong


def _problems(found: Diagnosis) -> Iterator[str]:
    yield from _problems_of_devices(found)
    yield from _problems_of_disk(found)
    if found.ram_free < _LITTLE_RAM:
        limits = [limit for limit, _used in found.container_limits]
        why = f", by a container limit of {human_bytes(min(limits))}" if limits else ""
        yield f"Only {human_bytes(found.ram_free)} of RAM may be used{why}. End other programs, or raise the limit."
    if not os.path.exists(_PAGEMAP):
        yield (
            f"This system has no {_PAGEMAP}, so it cannot be told whether a weight on disk was written to: such "
            "weights are read through the page cache, which is slower."
        )
    for library in found.libraries:
        if library.moved:
            yield f"The loader for {library.name} {library.version} does not fit it: {library.seams}"


def _problems_of_devices(found: Diagnosis) -> Iterator[str]:
    if not found.accelerators and os.path.exists(_NVIDIA):
        yield "There is an NVIDIA driver, and torch sees no GPU: install a build of torch with CUDA."
    if found.measurement is None:
        return
    figures = found.measurement.bandwidths
    for accelerator in found.accelerators:
        if accelerator.name not in figures.to_device or accelerator.name not in figures.arithmetic:
            yield (
                f"{accelerator.name} could not be measured, perhaps because its memory was full: predictions for it go "
                "by round figures. Make room there, and run `hf-bigload doctor --fresh`."
            )
    for name in figures.not_pinned:
        yield (
            f"Host memory could not be page-locked for {name}, so copies to it are slower. Raise the limit on locked "
            "memory (ulimit -l), or the container's memory."
        )


def _problems_of_disk(found: Diagnosis) -> Iterator[str]:
    elsewhere = "Name a folder on another disk in HF_BIGLOAD_CACHE."
    if found.disk_free < _LITTLE_DISK:
        yield f"Only {human_bytes(found.disk_free)} are free on the disk of {found.cache_folder}. {elsewhere}"
    if found.measurement is None:
        return
    figures = found.measurement.bandwidths
    if not figures.direct:
        yield (
            f"The file system of {found.cache_folder} does not let reads go past the page cache (O_DIRECT): what "
            f"streams from there is slower, and pushes other files out of it. {elsewhere}"
        )
    if figures.disk < _SLOW_DISK:
        yield (
            f"The disk of {found.cache_folder} gives {human_bytes(figures.disk)}/s: a model that streams from one like "
            "it takes long for each step. Keep checkpoints on a local SSD."
        )
