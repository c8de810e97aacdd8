"""What the kernel counts about this process (Linux)."""

from __future__ import annotations

from pathlib import Path


def _figure(file: str, key: str) -> int:
    for line in Path("/proc/self", file).read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0])
    raise KeyError(f"/proc/self/{file} has no {key}: the benchmarks need Linux")


def disk_read_bytes() -> int:
    """Bytes that this process had a disk read so far, faults and readahead included; cached pages are not counted."""
    return _figure("io", "read_bytes")


def anonymous_bytes() -> int:
    """Resident memory that no file on a disk backs, shared memory included."""
    return 1024 * (_figure("status", "RssAnon") + _figure("status", "RssShmem"))


def peak_resident_bytes() -> int:
    """The most that was ever resident, file pages that could have been dropped included."""
    return 1024 * _figure("status", "VmHWM")
