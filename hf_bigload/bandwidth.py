"""How fast this machine moves weights (from the disk of the cache folder, in host memory, and to each accelerator), and
how fast it multiplies by them.

Measured once, with the very reader and buffers that a model streams through, and kept in the cache folder. What is kept
is found again by what the machine is: a cache folder that several machines share holds a record for each of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from . import hardware
from .checkpoint.reader import Extent, Reader, page_buffer
from .checkpoint.spill import cache_root
from .errors import SpillError, human_bytes
from .specs import CPU, Arithmetic, Speeds

logger = logging.getLogger(__name__)

RECORD_NAME = "machine.json"
DISK_BYTES = 512 << 20
"""Bytes of the file that is written, read once and removed: enough to outlast a device's own cache, and its start."""
DISK_PIECE = 64 << 20
"""Bytes of one read, as those of a block of a model of some billion parameters."""
MEMORY_BYTES = 128 << 20
"""Bytes of one copy in memory: more than the caches of most processors. Some servers' hold more; there, what is
measured is in part the speed of a cache."""

_FORMAT = 5
_MIB = 1 << 20
_REPEATS = 4


@dataclass(frozen=True)
class Bandwidths:
    """Bytes per second, each alone on an idle machine."""

    disk: float
    """From a file in the cache folder to host memory, past the page cache where `direct`."""
    direct: bool
    """Whether the file system lets reads go past its cache; else `disk` may be the speed of memory."""
    host_copy: float
    """From host memory to host memory, on one thread."""
    to_device: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """From host memory to each accelerator that had room to be measured, page-locked unless it is in `not_pinned`."""
    not_pinned: tuple[str, ...] = ()
    """Accelerators for which the system refused to lock host memory."""
    arithmetic: Mapping[str, Arithmetic] = dataclasses.field(default_factory=dict)
    """How fast the CPU ("cpu") and each accelerator that had room to be measured multiply by weights."""


@dataclass(frozen=True)
class Measurement:
    """Bandwidths, and the time (seconds since the epoch) at which they were measured."""

    bandwidths: Bandwidths
    measured_at: float


def known(folder: str | None = None) -> Measurement | None:
    """What was measured on this machine before, or None. Measures nothing.

    `folder` is the cache folder (None: `cache_root()`); a record that cannot be read counts as none.
    """
    folder = os.path.abspath(folder or cache_root())
    found = _records(folder).get(_identity(folder))
    if not isinstance(found, dict):
        return None
    try:
        content = dict(found["bandwidths"])
        content["not_pinned"] = tuple(content["not_pinned"])
        content["arithmetic"] = {device: _curves(each) for device, each in content["arithmetic"].items()}
        return Measurement(Bandwidths(**content), float(found["measured_at"]))
    except (KeyError, TypeError, ValueError):  # another version's
        return None


def _curves(content: Mapping[str, Any]) -> Arithmetic:
    curves = {dtype: tuple((float(n), float(s)) for n, s in rows) for dtype, rows in content["curves"].items()}
    return Arithmetic(curves, float(content["per_weight"]), float(content["per_value"]))


def speeds(device: str, folder: str | None = None) -> Speeds:
    """What predictions for a model on `device` divide by: as measured, or round figures where nothing was."""
    found, usual = known(folder), Speeds()
    if found is None:
        return usual
    figures = found.bandwidths
    return Speeds(
        disk=figures.disk,
        bus=figures.to_device.get(device, usual.bus),
        host=figures.host_copy,
        cpu=figures.arithmetic.get(CPU, usual.cpu),
        device=figures.arithmetic.get(device, usual.device),
        measured=device in figures.arithmetic,
    )


def measured(folder: str | None = None, fresh: bool = False) -> Measurement:
    """What is known of this machine; measured now, and kept, where nothing is, or where it is to be `fresh`.

    Raises:
        SpillError: nothing can be written to the cache folder.
    """
    folder = os.path.abspath(folder or cache_root())
    found = None if fresh else known(folder)
    if found is None:
        found = Measurement(measure(folder), time.time())
        _keep(folder, found)
    return found


def measure(folder: str, disk_bytes: int = DISK_BYTES, memory_bytes: int = MEMORY_BYTES) -> Bandwidths:
    """Measure now, some seconds long: writes `disk_bytes` to a file of its own in `folder`, and removes it.

    An accelerator on which that fails (its memory is full, say) is left out of the figures.

    Raises:
        SpillError: nothing can be written there, or there is too little room.
    """
    disk, direct = disk_bandwidth(folder, disk_bytes)
    to_device, not_pinned, arithmetic = {}, [], {CPU: multiplying(CPU)}
    for name in hardware.accelerator_names():
        try:
            to_device[name], pinned = device_bandwidth(name, memory_bytes)
            if not pinned:
                not_pinned.append(name)
            arithmetic[name] = multiplying(name)
        except RuntimeError as error:  # torch.OutOfMemoryError is one, as is what a device says that others have taken
            logger.warning("%s could not be measured: %s", name, error)
    return Bandwidths(disk, direct, host_bandwidth(memory_bytes), to_device, tuple(not_pinned), arithmetic)


# ---------------------------------------------------------------- what is measured


def disk_bandwidth(folder: str, nbytes: int = DISK_BYTES) -> tuple[float, bool]:
    """(bytes per second, whether past the page cache) of one read of a new file in `folder`.

    The file has `nbytes` bytes (whole MiB, one at least), or less where that would take more than a quarter of what is
    free.

    Raises:
        SpillError: nothing can be written there, or there is too little room.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        free = hardware.free_disk(folder)
        nbytes = max(1, min(nbytes, free // 4) // _MIB) * _MIB
        with tempfile.NamedTemporaryFile(dir=folder, prefix="bandwidth-") as file:
            _write(file.fileno(), nbytes)
            return _read(file.name, nbytes)
    except OSError as error:
        raise SpillError(
            f"The disk of {folder} could not be measured: {error}. Make room there ({human_bytes(nbytes)} are needed "
            "for some seconds), or name another folder in HF_BIGLOAD_CACHE."
        ) from error


def _write(fd: int, nbytes: int) -> None:
    block = os.urandom(_MIB)  # nothing that a file system could compress or leave out
    for _ in range(nbytes // _MIB):
        os.write(fd, block)
    os.fsync(fd)
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):  # advice
            os.posix_fadvise(fd, 0, nbytes, os.POSIX_FADV_DONTNEED)


def _read(path: str, nbytes: int) -> tuple[float, bool]:
    reader, piece = Reader(), min(nbytes, DISK_PIECE)
    buffer = page_buffer(piece)
    buffer.write(bytes(piece))  # memory behind every page: the first touch of it is not the disk's affair
    try:
        begin = time.perf_counter()
        for offset in range(0, nbytes, piece):
            reader.read([Extent(path, offset, min(piece, nbytes - offset), 0)], buffer).result()
        return nbytes / (time.perf_counter() - begin), reader.is_direct(path)
    finally:
        reader.close()


def host_bandwidth(nbytes: int = MEMORY_BYTES) -> float:
    """Bytes per second of a copy from host memory to host memory, on one thread."""
    import torch

    source, target = (torch.ones(nbytes, dtype=torch.uint8) for _ in range(2))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return nbytes / _best(lambda: target.copy_(source), lambda: None)
    finally:
        torch.set_num_threads(threads)


def device_bandwidth(name: str, nbytes: int = MEMORY_BYTES) -> tuple[float, bool]:
    """(bytes per second, whether the host memory was page-locked) of a copy from host memory to an accelerator.

    A device with little free memory is measured with a quarter of that.
    """
    import torch

    from .pinned import pinned_buffer

    device = hardware.torch_device(name)
    nbytes = max(1, min(nbytes, hardware.free_by_accelerator()[name] // 4))
    host = pinned_buffer(nbytes, device)
    target = torch.empty(nbytes, dtype=torch.uint8, device=device)
    source = host.tensor[:nbytes]
    source.fill_(1)
    seconds = _best(
        lambda: target.copy_(source, non_blocking=host.pinned), lambda: torch.accelerator.synchronize(device)
    )
    return nbytes / seconds, host.pinned


def multiplying(name: str) -> Arithmetic:
    """How fast a device multiplies; see `arithmetic.measure`. On an accelerator, in a quarter of what is free there.

    Raises:
        torch.OutOfMemoryError: the device has no room for that.
    """
    from . import arithmetic

    device = hardware.torch_device(name)
    if name == CPU:
        return arithmetic.measure(device)
    return arithmetic.measure(device, *arithmetic.fitting(hardware.free_by_accelerator()[name] // 4))


def _best(copy: Callable[[], Any], wait: Callable[[], None]) -> float:
    """Seconds of the quickest of some calls; the first one only warms up."""
    copy()
    wait()
    seconds = []
    for _ in range(_REPEATS):
        begin = time.perf_counter()
        copy()
        wait()
        seconds.append(time.perf_counter() - begin)
    return max(min(seconds), 1e-9)


# ---------------------------------------------------------------- what is kept


def _identity(folder: str) -> str:
    """What has to be the same for a measurement to hold: the machine, the disk of the folder, and the versions.

    Not the host's name: a container has a new one each time it starts.
    """
    import psutil
    import torch

    from . import __version__

    devices = [torch.cuda.get_device_name(n) if n.startswith("cuda") else n for n in hardware.accelerator_names()]
    what: dict[str, Any] = {
        "machine": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "ram": psutil.virtual_memory().total,
        "disk": os.stat(hardware.existing_folder(folder)).st_dev,
        "accelerators": devices,
        "torch": str(torch.__version__),
        "hf_bigload": __version__,
    }
    return json.dumps(what, sort_keys=True)


def _records(folder: str) -> dict[str, Any]:
    try:
        with open(os.path.join(folder, RECORD_NAME), encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError):  # none yet, or damaged: measured again
        return {}
    return dict(content["machines"]) if isinstance(content, dict) and content.get("format") == _FORMAT else {}


def _keep(folder: str, found: Measurement) -> None:
    content = {"format": _FORMAT, "machines": _records(folder) | {_identity(folder): dataclasses.asdict(found)}}
    path = os.path.join(folder, RECORD_NAME)
    partial = f"{path}.{os.getpid()}"
    try:
        with open(partial, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=2)
        os.replace(partial, path)  # whole or not at all: other processes may be reading it
    except OSError as error:
        logger.warning("What was measured could not be kept in %s: %s. It will be measured again.", path, error)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(partial)
