"""Byte ranges of files into memory, past the page cache, as futures.

A scan over weights larger than RAM finds nothing in the page cache and evicts everything from it. So whole aligned
pages go from the disk straight to where they are wanted (O_DIRECT), by a few threads at once: `preadv` releases the
GIL. Where a filesystem refuses that, reads are buffered and the pages dropped behind them.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import TYPE_CHECKING

from hf_bigload.checkpoint.formats import missing_shard
from hf_bigload.checkpoint.index import check_stamp
from hf_bigload.errors import CheckpointChangedError, CheckpointError, CorruptShardError
from hf_bigload.specs import FileStamp, TensorEntry

if TYPE_CHECKING:
    from typing_extensions import Buffer

PAGE = 4096
"""Bytes: what O_DIRECT wants positions in file and memory to be multiples of."""

MERGE_GAP = 64 * 1024
"""Bytes between two ranges of a file below which one read over both costs less than two."""

_O_DIRECT = getattr(os, "O_DIRECT", 0)


@dataclass(frozen=True)
class Extent:
    """The bytes [offset, offset + nbytes) of `file`, which go to position `at` of a buffer.

    `at` equals `offset` modulo PAGE, and the buffer's pages from the first to the last byte belong to this extent
    alone: whole pages are read, so the bytes around it are overwritten.
    """

    file: str
    offset: int
    nbytes: int
    at: int

    @property
    def end(self) -> int:
        return self.offset + self.nbytes


@dataclass(frozen=True)
class Layout:
    """How some tensors lie packed in one buffer of `nbytes` bytes (slack included): a position for each of them."""

    nbytes: int
    positions: tuple[int, ...]
    extents: tuple[Extent, ...]


def layout(entries: Sequence[TensorEntry]) -> Layout:
    """Pack tensors into one buffer, each at a position that equals its file offset modulo PAGE.

    Ranges of one file that overlap (tied tensors, views) or nearly touch become one extent. A tensor without elements
    takes no room.
    """
    positions = [0] * len(entries)
    extents: list[Extent] = []
    filled = 0
    in_file_order = sorted(range(len(entries)), key=lambda i: (entries[i].file, entries[i].offset))
    for i in (i for i in in_file_order if entries[i].nbytes):
        entry, last = entries[i], extents[-1] if extents else None
        if last and last.file == entry.file and entry.offset - last.end < MERGE_GAP:
            extents[-1] = last = replace(last, nbytes=max(last.end, entry.end) - last.offset)
        else:
            last = Extent(entry.file, entry.offset, entry.nbytes, filled + entry.offset % PAGE)
            extents.append(last)
        positions[i] = last.at + entry.offset - last.offset
        filled = _round_up(last.at + last.nbytes)
    return Layout(filled, tuple(positions), tuple(extents))


def page_buffer(nbytes: int) -> mmap.mmap:
    """A zeroed, page-aligned buffer of `nbytes` bytes (at least one page), private to this process.

    Private, because a mapping that a forked child shared with its parent would be read into by both.
    """
    buffer = mmap.mmap(-1, nbytes or PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # O_DIRECT pins every page it reads into: huge ones made reads 1.3 to 2.5 times as fast where this was measured
        with contextlib.suppress(OSError):
            buffer.madvise(mmap.MADV_HUGEPAGE)
    return buffer


def _round_up(nbytes: int) -> int:
    return -(-nbytes // PAGE) * PAGE


class Reader:
    """Reads extents with `threads` threads, `chunk` bytes at a time.

    Every file is opened once, by `open` or at its first read, and kept until `close()`: a file that replaces it under
    its path is not read. With `stamps`, a file that is not the indexed one is refused, when it is opened and after
    every read.

    Safe to use from several threads. A forked child gets threads of its own and repeats what was under way. A copy
    (`copy`, `pickle`) is a new reader with the same arguments, which opens the files for itself.
    """

    def __init__(
        self, threads: int = 8, chunk: int = 8 * 1024 * 1024, stamps: Mapping[str, FileStamp] | None = None
    ) -> None:
        if threads < 1 or chunk < PAGE or chunk % PAGE:
            raise ValueError(f"threads={threads} must be at least 1, chunk={chunk} a multiple of {PAGE} bytes")
        self._arguments = (threads, chunk, dict(stamps or {}))
        self._chunk, self._stamps = self._arguments[1:]
        self._files: dict[str, _File] = {}
        self._pool = _Pool(threads)
        self._stop = weakref.finalize(self, _Pool.stop, self._pool)
        self._stop.atexit = False  # the threads are daemons

    def __reduce__(self) -> tuple[type[Reader], tuple[int, int, dict[str, FileStamp]]]:
        return Reader, self._arguments

    @property
    def bytes_read(self) -> int:
        """Bytes of extents delivered so far, slack not counted."""
        return self._pool.bytes_read

    def read(self, extents: Sequence[Extent], buffer: Buffer) -> Future[int]:
        """Start reading `extents` into `buffer`; the result is the number of bytes, the sum of their `nbytes`.

        `buffer` (writable, page-aligned, `Layout.nbytes` long: see `page_buffer`) must not be reused or read before
        the future is done. It is kept alive until then, and nothing is written to it afterwards, failed or not. The
        read cannot be cancelled.

        The future fails with:
            MissingShardError: a file does not exist.
            CheckpointChangedError: a file is no longer the indexed one, or shrank since it was opened.
            CorruptShardError: a file ends before an extent does.
            OSError: the disk failed.

        Raises:
            ValueError: the buffer or an extent is not as described, or the reader is closed.
        """
        _check_buffer(extents, buffer)
        job = _Job(buffer, self._pool)
        with self._pool.lock:
            if not self._stop.alive:
                raise ValueError("read from a closed Reader")
            try:
                parts = [part for extent in extents for part in self._parts(job, extent)]
            except OSError as error:
                job.future.set_exception(error)
            else:
                self._pool.start(job, parts)
        return job.future

    @property
    def closed(self) -> bool:
        """Whether `close()` was called: nothing more can be read."""
        return not self._stop.alive

    def close(self) -> None:
        """Wait for the reads under way, end the threads and close the files. Repeating it does no harm.

        Raises:
            RuntimeError: called from a callback of a future, where it would wait for itself.
        """
        if threading.current_thread() in self._pool.threads:
            raise RuntimeError("a Reader cannot be closed from a callback of one of its futures")
        with self._pool.lock:
            self._stop()
        for thread in self._pool.threads:
            thread.join()
        for file in self._files.values():
            file.close()

    def open(self, path: str) -> None:
        """Open a file before its first read, so that a file which takes its place meanwhile is not read.

        Raises:
            MissingShardError, CheckpointChangedError: see `read`.
        """
        with self._pool.lock:
            self._file(path)

    def _file(self, path: str) -> _File:
        if path not in self._files:
            self._files[path] = _File(path, self._stamps.get(path))
        return self._files[path]

    def _parts(self, job: _Job, extent: Extent) -> Iterator[_Part]:
        """Cut an extent into reads of whole pages."""
        file = self._file(extent.file)
        shift = extent.at - extent.offset
        for begin in range(extent.offset - extent.offset % PAGE, extent.end, self._chunk):
            end = min(begin + self._chunk, extent.end)
            yield _Part(job, file, begin, end, begin + shift, end - max(begin, extent.offset))


def _check_buffer(extents: Sequence[Extent], buffer: Buffer) -> None:
    with memoryview(buffer) as view:
        size = view.nbytes
        if view.readonly or not view.c_contiguous:
            raise ValueError("the buffer must be writable and contiguous")
    if extents and ctypes.addressof(ctypes.c_char.from_buffer(buffer)) % PAGE:
        raise ValueError(f"the buffer must begin at a multiple of {PAGE} bytes: see page_buffer")
    for extent in extents:
        if extent.at % PAGE != extent.offset % PAGE:
            raise ValueError(f"{extent} lies at another position in its page than in the file")
        if _round_up(extent.at + extent.nbytes) > size:
            raise ValueError(f"the buffer has {size} bytes; the pages of {extent} end after that")


class _File:
    """A file that is kept open, and read past the page cache as long as its filesystem allows."""

    def __init__(self, path: str, expected: FileStamp | None) -> None:
        self.path = path
        self.expected = expected
        self.fd = _open(path, expected)
        self.close = weakref.finalize(self, os.close, self.fd)
        self.close.atexit = False  # a daemon thread may still be reading
        self.size = os.fstat(self.fd).st_size
        self.direct = bool(_O_DIRECT) and _set_direct(self.fd, True)

    def read(self, view: memoryview, offset: int, needed: int) -> None:
        """Fill `view` from `offset` on, with at least the first `needed` bytes: the rest may lie behind the end."""
        got = 0
        while got < needed:
            with view[got:] as rest:
                count = self._preadv(rest, offset + got)
            if count == 0:
                raise self._short(offset, needed, got)
            got += count
        if self.expected is not None:
            check_stamp(self.expected, os.fstat(self.fd))
        if not self.direct and hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):  # advice
                os.posix_fadvise(self.fd, offset, got, os.POSIX_FADV_DONTNEED)

    def _preadv(self, view: memoryview, offset: int) -> int:
        direct = self.direct  # now: another thread may turn it off during the read
        try:
            return os.preadv(self.fd, [view], offset)
        except OSError as error:
            if error.errno != errno.EINVAL or not direct:
                raise
        # The same open file, without O_DIRECT: some filesystems accept the flag and refuse the read.
        _set_direct(self.fd, False)
        self.direct = False
        return os.preadv(self.fd, [view], offset)

    def _short(self, offset: int, needed: int, got: int) -> CheckpointError:
        size = os.fstat(self.fd).st_size
        if size < self.size:
            return CheckpointChangedError(
                f"{self.path} shrank while it was in use, from {self.size} to {size} bytes: of the {needed} bytes at "
                f"{offset} only {got} are left. Restore the file and load again."
            )
        return CorruptShardError(
            f"{self.path} ends at byte {size}: of the {needed} bytes at {offset} only {got} could be read. Download "
            "the shard again."
        )


def _open(path: str, expected: FileStamp | None) -> int:
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        if expected is not None:
            check_stamp(expected)
        raise missing_shard(path) from None
    try:
        if expected is not None:
            check_stamp(expected, os.fstat(fd))
    except CheckpointChangedError:
        os.close(fd)
        raise
    return fd


def _set_direct(fd: int, direct: bool) -> bool:
    """Turn O_DIRECT on or off for an open file; whether that worked."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | _O_DIRECT if direct else flags & ~_O_DIRECT)
    except OSError:
        return False
    return True


class _Job:
    """One call of `Reader.read`. Its future is done once no thread works on any part of it any more."""

    def __init__(self, buffer: Buffer, pool: _Pool) -> None:
        self.buffer: Buffer | None = buffer
        self.pool = pool
        self.future: Future[int] = Future()
        self.future.set_running_or_notify_cancel()
        self.error: BaseException | None = None

    def begin(self, parts: Sequence[_Part]) -> None:
        self.parts = parts
        self.unfinished = len(parts)
        self.lock = threading.Lock()

    def finish_one(self, error: BaseException | None) -> None:
        with self.lock:
            self.error = self.error or error
            self.unfinished -= 1
            if self.unfinished:
                return
        self.pool.finish(self)
        # The parts and the error's traceback refer back to this job: neither may keep the buffer alive.
        self.buffer, self.parts, self.error = None, (), None


@dataclass(frozen=True)
class _Part:
    """One read: the bytes [begin, end) of a file to position `at`; `wanted` of them are an extent's."""

    job: _Job
    file: _File
    begin: int
    end: int
    at: int
    wanted: int

    def run(self) -> None:
        try:
            if self.job.error is None:
                self._read()
        except BaseException as error:  # noqa: BLE001 - it belongs to whoever waits for the future
            self.job.finish_one(error)
        else:
            self.job.finish_one(None)

    def _read(self) -> None:
        assert self.job.buffer is not None, "the job is done"
        # Views are released at once: the owner of the buffer may close it as soon as the future is done.
        with memoryview(self.job.buffer) as whole, whole.cast("B") as flat:
            pages = _round_up(self.end) - self.begin
            with flat[self.at : self.at + pages] as view:
                self.file.read(view, self.begin, self.end - self.begin)


class _Pool:
    """Daemon threads that run parts, begun with the first job."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.bytes_read = 0
        self.jobs: set[_Job] = set()
        self._reset()
        _POOLS.add(self)

    def _reset(self) -> None:
        self.lock = threading.Lock()
        self.queue: SimpleQueue[_Part | None] = SimpleQueue()
        self.threads: list[threading.Thread] = []

    def start(self, job: _Job, parts: Sequence[_Part]) -> None:
        """Queue a job. The caller holds the lock."""
        job.begin(parts)
        if not parts:
            job.future.set_result(0)
            return
        self.jobs.add(job)
        self._start_threads()
        for part in parts:
            self.queue.put(part)

    def _start_threads(self) -> None:
        while len(self.threads) < self.size:
            thread = threading.Thread(target=_work, args=(self.queue,), name="hf_bigload-reader", daemon=True)
            self.threads.append(thread)
            thread.start()

    def finish(self, job: _Job) -> None:
        if job.error is None:
            total = sum(part.wanted for part in job.parts)
            with self.lock:
                self.bytes_read += total
            job.future.set_result(total)
        else:
            job.future.set_exception(job.error)
        self.jobs.discard(job)  # last: what a fork finds here is begun again in the child

    def stop(self) -> None:
        """Let the threads end after what is queued."""
        for _ in self.threads:
            self.queue.put(None)

    def after_fork(self) -> None:
        """In a child, where no thread lives on: begin again what was under way, on the child's copy of the buffers."""
        self._reset()
        unfinished = [job for job in self.jobs if not job.future.done()]
        self.jobs.clear()
        for job in unfinished:
            self.start(job, job.parts)


def _work(queue: SimpleQueue[_Part | None]) -> None:
    while (part := queue.get()) is not None:
        part.run()


_POOLS: weakref.WeakSet[_Pool] = weakref.WeakSet()


def _after_fork() -> None:
    for pool in list(_POOLS):
        pool.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
