"""What this machine can hold, probed in one place: accelerators, free memory, container limits.

torch is imported only where an accelerator is asked about, so that header-only commands stay quick.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import DeviceMapError
from .settings import parse_size
from .specs import CPU, DISK, Hardware

if TYPE_CHECKING:
    import torch

MaxMemory = Mapping[Any, "int | str"]

HEADROOM = 0.10
"""Share of a *measured* free figure that is left alone, for what a plan does not count (other programs, fragments)."""

_UNLIMITED = 1 << 60
_CGROUP = Path("/sys/fs/cgroup")
_SMAPS = Path("/proc/self/smaps_rollup")


def probe(max_memory: MaxMemory | None = None, held: Mapping[str, int] | None = None) -> Hardware:
    """The memory a plan may use, in bytes.

    Without `max_memory`, what is free now less `HEADROOM`. With it, exactly what it allows: a device that it does not
    name is not used, as Accelerate documents it (weights from disk may still pass through RAM). `held` are the bytes
    that the model to be planned takes already, by device: they are its own to use again.

    Raises:
        DeviceMapError: `max_memory` names a device that this machine does not have, or a size that is none.
    """
    if max_memory is None:
        keep, held = 1 - HEADROOM, held or {}
        free = {name: count + held.get(name, 0) for name, count in free_by_accelerator().items()}
        ram = free_ram() + held.get(CPU, 0)
        return Hardware({name: int(count * keep) for name, count in free.items()}, int(ram * keep))
    if not isinstance(max_memory, Mapping):
        raise DeviceMapError(f"max_memory={max_memory!r} is not a map: write it as {{0: '10GiB', 'cpu': '30GiB'}}.")
    limits = {memory_key(key): _size(key, value) for key, value in max_memory.items()}
    passage = 0 if CPU in limits else int(free_ram() * (1 - HEADROOM))
    ram = limits.pop(CPU, 0)
    limits.pop(DISK, None)
    known = accelerator_names()
    unknown = [name for name in limits if name not in known]
    if unknown:
        raise DeviceMapError(f"max_memory names {', '.join(unknown)}, but this machine has {_listing(known)}.")
    return Hardware({name: limits[name] for name in known if name in limits}, ram, passage)


def _size(key: Any, value: int | str) -> int:
    try:
        size = parse_size(value) if isinstance(value, str) else int(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise DeviceMapError(f"max_memory[{key!r}] = {value!r} is not a size: use bytes or text as '10GiB'.") from error
    if size < 0:
        raise DeviceMapError(f"max_memory[{key!r}] = {value!r} is negative.")
    return size


def _listing(accelerators: list[str]) -> str:
    return ", ".join([*accelerators, CPU, DISK]) if accelerators else "no accelerator: only 'cpu' and 'disk'"


def memory_key(key: Any) -> str:
    """The device name of a `max_memory` or device-map key: 0 -> "cuda:0" (or what the accelerator is called)."""
    if isinstance(key, str) and key in (CPU, DISK):
        return key
    return device_name(key)


def device_name(value: Any) -> str:
    """A device's one name in this package: `0`, `"cuda"`, `torch.device("cuda", 0)` are all "cuda:0".

    Raises:
        DeviceMapError: `value` names no device.
    """
    if isinstance(value, str) and value in (CPU, DISK):
        return value
    import torch

    if isinstance(value, int) and not isinstance(value, bool):
        return f"{accelerator_type(default='cuda')}:{value}"
    try:
        device = torch.device(value)
    except (RuntimeError, TypeError) as error:
        raise DeviceMapError(f"{value!r} is not a device; this machine has {_listing(accelerator_names())}.") from error
    if device.type in (CPU, "meta", "mps"):
        return device.type
    index = torch.accelerator.current_device_index() if device.index is None and _has_accelerator() else device.index
    return f"{device.type}:{index or 0}"


def torch_device(name: str) -> torch.device:
    """The torch device of a device name; "disk" is computed with on the CPU."""
    import torch

    return torch.device(CPU if name == DISK else name)


def map_value(name: str) -> int | str:
    """A device name as device maps show it: accelerators by number, as users expect them."""
    kind, _, index = name.partition(":")
    return int(index) if index and kind == accelerator_type(default="") else name


def _has_accelerator() -> bool:
    import torch

    return torch.accelerator.is_available()


def accelerator_type(default: str) -> str:
    """ "cuda", "xpu", "mps", ... of this machine, or `default` where it has none."""
    import torch

    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else default  # type: ignore[union-attr]


def accelerator_names() -> list[str]:
    """Every accelerator of this machine, in order."""
    if not _has_accelerator():
        return []
    import torch

    kind = accelerator_type(default="")
    return [kind] if kind == "mps" else [f"{kind}:{i}" for i in range(torch.accelerator.device_count())]


def main_accelerator() -> str | None:
    """The accelerator that a model runs on when nothing says otherwise."""
    names = accelerator_names()
    return names[0] if names else None


def free_by_accelerator() -> dict[str, int]:
    """Bytes each accelerator could still give: free on the device, plus what the allocator holds unused.

    What other processes hold there is not free.
    """
    return {name: _free_on(name) for name in accelerator_names()}


def _free_on(name: str) -> int:
    import torch

    device = torch.device(name)
    if device.type == "mps":  # shares host memory
        return free_ram()
    free, _total = torch.accelerator.get_memory_info(device)
    return free + torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(device)


def free_ram() -> int:
    """Bytes of host memory that may still be used, by the machine and by every container limit above this process.

    What other processes hold, here or in the same container, is not free. Clean file pages are: the kernel gives them
    up before it refuses memory.
    """
    import psutil

    return max(0, min(psutil.virtual_memory().available, *(limit - used for limit, used in container_limits())))


def container_limits() -> list[tuple[int, int]]:
    """(limit, unreclaimable use) in bytes of each memory cgroup this process is in, v1 and v2; at least one entry."""
    found = [(_UNLIMITED, 0)]
    for version, relative in _cgroups():
        root = _CGROUP / "memory" if version == 1 else _CGROUP
        folder = root / relative.lstrip("/")
        while folder == root or root in folder.parents:
            limit = min(_size_in(folder / name) for name in _LIMITS[version])
            if limit < _UNLIMITED:
                found.append((limit, _unreclaimable(folder, version)))
            folder = folder.parent
    return found


def _cgroups() -> list[tuple[int, str]]:
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return []
    fields = [line.split(":", 2) for line in lines]
    v1 = [(1, path) for _, controllers, path in fields if "memory" in controllers.split(",")]
    return v1 or [(2, path) for number, controllers, path in fields if number == "0" and not controllers]


_LIMITS = {1: ("memory.limit_in_bytes",), 2: ("memory.max", "memory.high")}
"""Above `memory.high` a group is not killed, but throttled until it can hardly run."""
_USAGE = {1: "memory.usage_in_bytes", 2: "memory.current"}


def _size_in(file: Path) -> int:
    """The bytes that a cgroup's file says; none at all where there is no such file, as in the root group."""
    try:
        text = file.read_text().strip()
    except OSError:
        return _UNLIMITED
    return _UNLIMITED if text == "max" else int(text)


def _unreclaimable(folder: Path, version: int) -> int:
    """Bytes that a group uses, less those that the kernel would take back: clean file pages, and its own caches."""
    try:
        used = int((folder / _USAGE[version]).read_text())
        lines = [line.split() for line in (folder / "memory.stat").read_text().splitlines()]
    except OSError:
        return 0
    stat, prefix = {name: int(value) for name, value in lines}, "total_" if version == 1 else ""
    pages = stat.get(f"{prefix}inactive_file", 0) + stat.get(f"{prefix}active_file", 0)
    names = (f"{prefix}dirty", f"{prefix}writeback") if version == 1 else ("file_dirty", "file_writeback")
    clean = max(0, pages - sum(stat.get(name, 0) for name in names))
    return max(0, used - clean - stat.get("slab_reclaimable", 0))


class ProcessMemory(NamedTuple):
    """Of this process, in bytes."""

    anonymous: int
    """Memory that is in no file: it can only be swapped."""
    clean_file_pages: int
    """Pages of mapped files, libraries among them, that are as on disk."""


def process_memory() -> ProcessMemory | None:
    """What this process holds of the host's memory; None where the system does not tell.

    The kernel walks all of the process's pages for it: milliseconds, more for many gigabytes.
    """
    try:
        lines = [line.split() for line in _SMAPS.read_text().splitlines()[1:]]
    except OSError:
        return None
    sizes = {fields[0].rstrip(":"): int(fields[1]) * 1024 for fields in lines}
    return ProcessMemory(sizes["Anonymous"], sizes["Private_Clean"] + sizes["Shared_Clean"])


def free_disk(folder: str) -> int:
    """Bytes free to this user on the file system of `folder`."""
    stat = os.statvfs(folder)
    return stat.f_bavail * stat.f_frsize


def existing_folder(folder: str) -> str:
    """`folder`, or the nearest one above it that exists: where it would be made."""
    while not os.path.isdir(folder):
        folder = os.path.dirname(os.path.abspath(folder))
    return folder
