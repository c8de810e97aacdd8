"""What the disk gives: read bandwidth of files, past the page cache and through it.

    python -m benchmarks.raw_disk --bytes 2GiB /data/t0pp/*.safetensors

For Linux. Rented disks have a burst budget that a long benchmark exhausts, so a run never asks for more than `--bytes`.
Every mode reads bytes of its own: a second read of the same ones may be answered by a cache below this machine.
"""

from __future__ import annotations

import argparse
import errno
import json
import mmap
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.memory_cgroup import parse_bytes
from benchmarks.proc import disk_read_bytes

CHUNK = 8 << 20
PAGE = mmap.PAGESIZE
HUGE_PAGE = 2 << 20


@dataclass(frozen=True)
class Mode:
    """How to read; with `cached`, pages that the page cache has are taken from there, else it is emptied of them."""

    direct: bool
    threads: int
    cached: bool = False

    @property
    def name(self) -> str:
        plural = "s" if self.threads > 1 else ""
        kind = "direct" if self.direct else "cached" if self.cached else "buffered"
        return f"{kind}, {self.threads} thread{plural}"


MODES = (Mode(direct=True, threads=8), Mode(direct=True, threads=1), Mode(direct=False, threads=1))


@dataclass(frozen=True)
class Chunk:
    path: Path
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Reading:
    """One mode's figures: bytes, wall seconds and seconds of CPU time (user and system, of all threads).

    `disk_bytes` is what the kernel had the disk read: less than `nbytes` and the cache answered, somewhat more and it
    read ahead.
    """

    mode: str
    nbytes: int
    disk_bytes: int
    seconds: float
    cpu_seconds: float
    gigabytes_per_second: float


def list_chunks(files: Sequence[Path]) -> Iterator[Chunk]:
    """The files in order, cut every 8 MiB: every chunk begins where O_DIRECT may read."""
    for path in files:
        size = path.stat().st_size
        for offset in range(0, size, CHUNK):
            yield Chunk(path, offset, min(CHUNK, size - offset))


def share_out(chunks: Iterator[Chunk], limit: int, shares: int) -> list[list[Chunk]]:
    """`shares` runs of chunks, one after the other, together at most `limit` bytes; short files give short runs."""
    lists: list[list[Chunk]] = []
    for _ in range(shares):
        room = limit // shares // PAGE * PAGE
        run: list[Chunk] = []
        while room and (chunk := next(chunks, None)):
            run.append(Chunk(chunk.path, chunk.offset, min(chunk.nbytes, room)))
            room -= run[-1].nbytes
        lists.append(run)
    return lists


def _buffer() -> memoryview:
    """CHUNK bytes whose pages exist, in huge ones where the kernel has them.

    In small pages a request has so many pieces that it is cut up: half the speed was seen.
    """
    memory = mmap.mmap(-1, CHUNK + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(memory, np.uint8)
    begin = -whole.ctypes.data % HUGE_PAGE
    aligned = whole[begin : begin + CHUNK]
    aligned[::PAGE] = 0
    return aligned.data


@contextmanager
def _opened(chunks: Sequence[Chunk], mode: Mode) -> Iterator[dict[Path, int]]:
    flags = os.O_RDONLY | (os.O_DIRECT if mode.direct else 0)
    files: dict[Path, int] = {}
    try:
        for path in dict.fromkeys(chunk.path for chunk in chunks):
            files[path] = os.open(path, flags)
            if not mode.cached:
                # They would be measured as disk; nothing is lost, they are clean or written out first.
                os.posix_fadvise(files[path], 0, 0, os.POSIX_FADV_DONTNEED)
        yield files
    finally:
        for file in files.values():
            os.close(file)


def _read_chunk(file: int, chunk: Chunk, buffer: memoryview) -> int:
    """Whole pages are asked for, as O_DIRECT must; a read that ends with the file is shorter."""
    wanted = -(-chunk.nbytes // PAGE) * PAGE
    done = 0
    while done < chunk.nbytes:
        count = os.preadv(file, [buffer[done:wanted]], chunk.offset + done)
        if count == 0:
            raise OSError(errno.EIO, f"{chunk.path} ended at byte {chunk.offset + done}: it shrank while being read")
        done += count
    return done


def measure(mode: Mode, chunks: Sequence[Chunk]) -> Reading:
    """Read the chunks, each once. Raises OSError (EINVAL) where the filesystem has no O_DIRECT."""
    local, started_threads = threading.local(), threading.Barrier(mode.threads)

    def prepare(_: int) -> None:
        local.buffer = _buffer()
        started_threads.wait()

    def read(chunk: Chunk) -> int:
        return _read_chunk(files[chunk.path], chunk, local.buffer)

    with _opened(chunks, mode) as files, ThreadPoolExecutor(mode.threads) as pool:
        list(pool.map(prepare, range(mode.threads)))
        disk, cpu, started = disk_read_bytes(), time.process_time(), time.perf_counter()
        nbytes = sum(pool.map(read, chunks))
        seconds, cpu, disk = time.perf_counter() - started, time.process_time() - cpu, disk_read_bytes() - disk
    return Reading(mode.name, nbytes, disk, round(seconds, 4), round(cpu, 4), round(nbytes / seconds / 1e9, 3))


def measure_all(files: Sequence[Path], limit: int) -> list[Reading]:
    """Every mode over bytes of its own, `limit` bytes in all; modes without bytes or without support are left out."""
    readings = []
    for mode, run in zip(MODES, share_out(list_chunks(files), limit, len(MODES)), strict=True):
        if not run:
            print(f"{mode.name}: nothing left to read, the files are too small", file=sys.stderr)
            continue
        try:
            readings.append(measure(mode, run))
        except OSError as error:
            if not (mode.direct and error.errno == errno.EINVAL):
                raise
            print(f"{mode.name}: {run[0].path} is on a filesystem without O_DIRECT", file=sys.stderr)
    return readings


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Read bandwidth of files, one JSON line for each way of reading.")
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--bytes", type=parse_bytes, default=2 << 30, help="read at most this much in all (2GiB)")
    options = parser.parse_args(argv)
    for reading in measure_all(options.files, options.bytes):
        print(json.dumps(asdict(reading)))


if __name__ == "__main__":
    main()
