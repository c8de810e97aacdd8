"""What every measuring process shares: clocks, memory sampled from a thread, hashes of results, the page cache's state.

A measuring process prints its figures as one JSON line; `processes.py` starts it and reads them.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch

from benchmarks.proc import anonymous_bytes, disk_read_bytes

T = TypeVar("T")

THREADS = 2
SAMPLE_SECONDS = 0.02
READ_BYTES = 16 << 20


@dataclass
class Measured:
    """Wall seconds, seconds of CPU time (user and system, all threads), and bytes that came from the disk meanwhile."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    read_bytes: int = 0

    @classmethod
    def of(cls, work: Callable[[], T]) -> tuple[T, Measured]:
        read, cpu, started = disk_read_bytes(), time.process_time(), time.perf_counter()
        result = work()
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        return result, cls(round(seconds, 6), round(cpu, 6), disk_read_bytes() - read)


@dataclass
class AnonymousMemory:
    """The largest resident anonymous memory seen, sampled from another thread."""

    peak_bytes: int = 0
    _done: threading.Event = field(default_factory=threading.Event)

    def sample(self) -> None:
        self.peak_bytes = max(self.peak_bytes, anonymous_bytes())

    @contextmanager
    def sampling(self) -> Iterator[AnonymousMemory]:
        thread = threading.Thread(target=self._run, name="memory-sampler", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._done.set()
            thread.join()
            self.sample()

    def _run(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self.sample()


def sha256(tensor: torch.Tensor) -> str:
    """Of the tensor's bytes: equal hashes are equal bits."""
    return hashlib.sha256(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def parse_max_memory(text: str) -> dict[int | str, int | str]:
    """`{"cpu": "8GB", 0: 1000}` from "cpu=8GB,0=1000": the libraries' own `max_memory`."""
    pairs = [item.partition("=") for item in text.split(",")]
    if not all(device and size for device, _, size in pairs):
        raise ValueError(f"{text!r} is not a max_memory: write it like cpu=8GB,0=10GB")
    return {_number(device): _number(size) for device, _, size in pairs}


def _number(text: str) -> int | str:
    """Accelerate takes "8GB", and bytes only as a number."""
    return int(text) if text.isdigit() else text


def warm(files: Iterable[Path]) -> int:
    """Read the files into the page cache; returns the bytes that a disk had to give for it."""
    before = disk_read_bytes()
    buffer = bytearray(READ_BYTES)
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return disk_read_bytes() - before


def evict(files: Iterable[Path]) -> None:
    """Take the files' pages out of the page cache. Needs no root, and spares pages that a process has mapped in."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fdatasync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def shards(folder: Path) -> list[Path]:
    """A checkpoint's weight files, in order."""
    return sorted(folder.glob("*.safetensors"))
