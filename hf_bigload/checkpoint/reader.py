"""Byte ranges of files into memory, past the page cache, as futures.

A scan over weights larger than RAM finds nothing in the page cache and evicts everything from it. So whole aligned
pages go from the disk straight to where they are wanted (O_DIRECT), by a few threads at once: `preadv` releases the
GIL. Where a filesystem refuses that, reads are buffered and the pages dropped behind them.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import errno
import fcntl
import functools
import mmap
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
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


def page_buffer(nbytes: int, kind: type[mmap.mmap] = mmap.mmap, huge: bool = True) -> mmap.mmap:
    """A zeroed, page-aligned buffer of `nbytes` bytes (at least one page), private to this process.

    Private, because a mapping that a forked child shared with its parent would be read into by both. `huge`: of huge
    pages, where there are any.
    """
    buffer = kind(-1, nbytes or PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if huge and hasattr(mmap, "MADV_HUGEPAGE"):
        # O_DIRECT pins every page it reads into: huge ones made reads 1.3 to 2.5 times as fast where this was measured
        with contextlib.suppress(OSError):
            buffer.madvise(mmap.MADV_HUGEPAGE)
    return buffer


_MADV_POPULATE_WRITE = 23
"""Of Linux 5.14 and later; Python has no name for it."""


def populate(address: int, nbytes: int) -> None:
    """Have memory behind these bytes, all pages at once: a first write to each takes half as long again.

    Does nothing where the system cannot, or where there is memory already.
    """
    begin = -(-address // PAGE) * PAGE
    whole = (address + nbytes - begin) // PAGE * PAGE
    if sys.platform == "linux" and whole > 0:
        _libc().madvise(ctypes.c_void_p(begin), ctypes.c_size_t(whole), _MADV_POPULATE_WRITE)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


_PAGE_REPORTING = "/sys/module/page_reporting/parameters/page_reporting_order"


@functools.cache
def huge_pages_are_kept() -> bool:
    """Whether free huge pages stay with this system.

    A virtual machine may give them back to its host. To touch one then took ten times as long as where they are kept,
    and three times as long as the same bytes of small pages.
    """
    try:
        with open(_PAGE_REPORTING) as order:
            return int(order.read()) < 0  # the size from which free pages are reported to the host
    except (OSError, ValueError):
        return True


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
    def threads(self) -> int:
        return self._arguments[0]

    @property
    def bytes_read(self) -> int:
        """Bytes delivered so far: of extents, slack not counted, and what tasks say."""
        return self._pool.bytes_read

    def read(
        self, extents: Sequence[Extent], buffer: Buffer, before: Callable[[], object] | None = None
    ) -> Future[int]:
        """Start reading `extents` into `buffer`; the result is the number of bytes, the sum of their `nbytes`.

        `buffer` (writable, page-aligned, `Layout.nbytes` long: see `page_buffer`) must not be reused or read before
        the future is done. It is kept alive until then, and nothing is written to it afterwards, failed or not. The
        read cannot be cancelled.

        `before` is called by each thread before it writes to the buffer, for every part of the read anew; what it
        raises fails the read.

        The future fails with:
            MissingShardError: a file does not exist.
            CheckpointChangedError: a file is no longer the indexed one, or shrank since it was opened.
            CorruptShardError: a file ends before an extent does.
            OSError: the disk failed.

        Raises:
            ValueError: the buffer or an extent is not as described, or the reader is closed.
        """
        target = _Target(extents, buffer)
        with self._pool.lock:
            self._check_open()
            try:
                tasks = [part for extent in extents for part in self._parts(target, extent)]
            except OSError as error:
                return _failed(error)
            return self._pool.start(_Job(self._pool, tasks, before, target))

    def submit(self, tasks: Sequence[Callable[[], int]], before: Callable[[], object] | None = None) -> Future[int]:
        """Start `tasks` on the threads that read; the result is the sum of theirs, a number of bytes.

        The future is done once no thread works on any of them any more; the first error makes it fail, and tasks not
        begun by then are left out. A forked child repeats all of them if one was unfinished. `before`: see `read`.

        Raises:
            ValueError: the reader is closed.
        """
        with self._pool.lock:
            self._check_open()
            return self._pool.start(_Job(self._pool, tasks, before))

    def _check_open(self) -> None:
        if not self._stop.alive:
            raise ValueError("read from a closed Reader")

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

    def is_direct(self, path: str) -> bool:
        """Whether the file is read past the page cache: what its file system has allowed so far."""
        return self._opened(path).direct

    def is_cached(self, path: str, offset: int) -> bool:
        """Whether the byte at `offset` lies in the page cache; False where the system does not tell."""
        return self._opened(path).is_cached(offset)

    def read_here(self, path: str, offset: int, view: memoryview, needed: int, cached: bool) -> None:
        """Fill `view` on the calling thread (a task's, say) with at least the first `needed` bytes from `offset` on.

        `offset` and `view` are whole pages. `cached`: through the page cache, which keeps what was read.

        Raises:
            see `read`.
        """
        self._opened(path).read(view, offset, needed, cached)

    def announce(self, path: str, offset: int, nbytes: int) -> None:
        """Have the system begin to bring these bytes into the page cache, for `read_here` to find them there."""
        self._opened(path).announce(offset, nbytes)

    def _opened(self, path: str) -> _File:
        with self._pool.lock:
            file = self._file(path)
            assert file.cached  # made here: by two threads at once, there would be two
        return file

    def _file(self, path: str) -> _File:
        if path not in self._files:
            self._files[path] = _File(path, self._stamps.get(path))
        return self._files[path]

    def _parts(self, target: _Target, extent: Extent) -> Iterator[_Part]:
        """Cut an extent into reads of whole pages."""
        file = self._file(extent.file)
        shift = extent.at - extent.offset
        for begin in range(extent.offset - extent.offset % PAGE, extent.end, self._chunk):
            end = min(begin + self._chunk, extent.end)
            yield _Part(target, file, begin, end, begin + shift, end - max(begin, extent.offset))


def _failed(error: BaseException) -> Future[int]:
    future: Future[int] = Future()
    future.set_exception(error)
    return future


class _File:
    """A file that is kept open, and read past the page cache as long as its filesystem allows."""

    def __init__(self, path: str, expected: FileStamp | None) -> None:
        self.path = path
        self.expected = expected
        self.fd = _open(path, expected)
        self._close = weakref.finalize(self, os.close, self.fd)
        self._close.atexit = False  # a daemon thread may still be reading
        self.size = os.fstat(self.fd).st_size
        self.direct = bool(_O_DIRECT) and _set_direct(self.fd, True)

    def close(self) -> None:
        self._close()
        if "cached" in self.__dict__:
            self.cached.close()

    @functools.cached_property
    def cached(self) -> _Cached:
        """The same open file, read through the page cache."""
        return _Cached(self)

    def is_cached(self, offset: int) -> bool:
        try:
            return os.preadv(self.cached.fd, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
        except (OSError, AttributeError):  # not there, or a system or filesystem that cannot tell
            return False

    def announce(self, offset: int, nbytes: int) -> None:
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):  # advice
                os.posix_fadvise(self.cached.fd, offset, nbytes, os.POSIX_FADV_WILLNEED)

    def read(self, view: memoryview, offset: int, needed: int, cached: bool = False) -> None:
        """Fill `view` from `offset` on, with at least the first `needed` bytes: the rest may lie behind the end."""
        got = 0
        while got < needed:
            with view[got:] as rest:
                count = os.preadv(self.cached.fd, [rest], offset + got) if cached else self._preadv(rest, offset + got)
            if count == 0:
                raise self._short(offset, needed, got)
            got += count
        if self.expected is not None:
            check_stamp(self.expected, os.fstat(self.fd))
        if not (cached or self.direct) and hasattr(os, "posix_fadvise"):
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


class _Cached:
    """A second descriptor of a file, without O_DIRECT, which is a property of the first."""

    def __init__(self, file: _File) -> None:
        try:
            fd = os.open(f"/proc/self/fd/{file.fd}", os.O_RDONLY)
        except OSError:  # no /proc, or a file that only its opener may read
            fd = os.dup(file.fd)
        self.fd = fd
        self.close = weakref.finalize(self, os.close, fd)
        self.close.atexit = False


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


class _Target:
    """The buffer of one read, let go of when that is done, whoever still refers to its parts (a traceback does)."""

    __slots__ = ("buffer", "view")

    def __init__(self, extents: Sequence[Extent], buffer: Buffer) -> None:
        view = memoryview(buffer)
        if view.readonly or not view.c_contiguous:
            raise ValueError("the buffer must be writable and contiguous")
        if extents and ctypes.addressof(ctypes.c_char.from_buffer(buffer)) % PAGE:
            raise ValueError(f"the buffer must begin at a multiple of {PAGE} bytes: see page_buffer")
        for extent in extents:
            if extent.at % PAGE != extent.offset % PAGE:
                raise ValueError(f"{extent} lies at another position in its page than in the file")
            if _round_up(extent.at + extent.nbytes) > view.nbytes:
                raise ValueError(f"the buffer has {view.nbytes} bytes; the pages of {extent} end after that")
        self.buffer: Buffer | None = buffer
        view.release()

    def open(self) -> None:
        assert self.buffer is not None, "the read is done"
        self.view = memoryview(self.buffer).cast("B")

    def close(self) -> None:
        self.view.release()


class _Part:
    """One read: the bytes [begin, end) of a file to position `at`; `wanted` of them are an extent's."""

    __slots__ = ("at", "begin", "end", "file", "target", "wanted")

    def __init__(self, target: _Target, file: _File, begin: int, end: int, at: int, wanted: int) -> None:
        self.target, self.file, self.begin, self.end, self.at, self.wanted = target, file, begin, end, at, wanted

    def __call__(self) -> int:
        pages = _round_up(self.end) - self.begin
        # Released at once: the owner of the buffer may close it as soon as the future is done.
        with self.target.view[self.at : self.at + pages] as view:
            self.file.read(view, self.begin, self.end - self.begin)
        return self.wanted


class _Job:
    """What one future stands for. It is done once no thread works on any task any more."""

    __slots__ = ("before", "error", "future", "lock", "pool", "target", "tasks", "total", "unfinished")

    def __init__(
        self,
        pool: _Pool,
        tasks: Sequence[Callable[[], int]],
        before: Callable[[], object] | None = None,
        target: _Target | None = None,
    ) -> None:
        self.pool, self.tasks, self.before, self.target = pool, tasks, before, target
        self.future: Future[int] = Future()
        self.future.set_running_or_notify_cancel()
        self.error: BaseException | None = None
        self.begin()

    def begin(self) -> None:
        self.total, self.unfinished = 0, len(self.tasks)
        self.lock = threading.Lock()
        if self.target is not None:
            self.target.open()

    def run(self, task: Callable[[], int]) -> None:
        nbytes, failure = 0, None
        try:
            if self.error is None:
                if self.before is not None:
                    self.before()
                nbytes = task()
        except BaseException as error:  # noqa: BLE001 - it belongs to whoever waits for the future
            failure = error
        with self.lock:
            self.total += nbytes
            self.error = self.error or failure
            self.unfinished -= 1
            last = not self.unfinished
        if last:
            self.finish()

    def finish(self) -> None:
        if self.target is not None:
            self.target.close()
        self.pool.finish(self)
        # A traceback refers back to this job and its tasks: neither may keep the buffer alive.
        self.tasks, self.before, self.error = (), None, None
        if self.target is not None:
            self.target.buffer = None


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
        self.queue: SimpleQueue[tuple[_Job, Callable[[], int]] | None] = SimpleQueue()
        self.threads: list[threading.Thread] = []

    def start(self, job: _Job) -> Future[int]:
        """Queue a job. The caller holds the lock."""
        future = job.future
        if not job.tasks:
            future.set_result(0)
            return future
        self.jobs.add(job)
        self._start_threads()
        for task in job.tasks:
            self.queue.put((job, task))
        return future

    def _start_threads(self) -> None:
        while len(self.threads) < self.size:
            thread = threading.Thread(target=_work, args=(self.queue,), name="hf_bigload-reader", daemon=True)
            self.threads.append(thread)
            _THREADS.add(thread)
            thread.start()

    def finish(self, job: _Job) -> None:
        if job.error is None:
            with self.lock:
                self.bytes_read += job.total
            job.future.set_result(job.total)
        else:
            job.future.set_exception(job.error)
        self.jobs.discard(job)  # last: what a fork finds here is begun again in the child

    def stop(self) -> None:
        """Let the threads end after what is queued."""
        for _ in self.threads:
            self.queue.put(None)

    def end(self) -> None:
        """Let the threads end; whatever is read afterwards begins new ones."""
        with self.lock:
            self.stop()
            self.threads = []

    def after_fork(self) -> None:
        """In a child, where no thread lives on: begin again what was under way, on the child's copy of the buffers."""
        self._reset()
        unfinished = [job for job in self.jobs if not job.future.done()]
        self.jobs.clear()
        for job in unfinished:
            job.begin()
            self.start(job)


def _work(queue: SimpleQueue[tuple[_Job, Callable[[], int]] | None]) -> None:
    while (item := queue.get()) is not None:
        job, task = item
        job.run(task)
        del item, job, task  # while this thread waits, it keeps nothing alive


_POOLS: weakref.WeakSet[_Pool] = weakref.WeakSet()
_THREADS: weakref.WeakSet[threading.Thread] = weakref.WeakSet()

_AT_EXIT_SECONDS = 5.0


def _at_exit() -> None:
    """A thread that ran torch must not be ending when the interpreter does: that would abort the process."""
    for pool in list(_POOLS):
        pool.end()
    deadline = time.monotonic() + _AT_EXIT_SECONDS  # one that hangs on a disk is left to its fate
    for thread in list(_THREADS):
        thread.join(max(0.0, deadline - time.monotonic()))


atexit.register(_at_exit)


def _after_fork() -> None:
    for pool in list(_POOLS):
        pool.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
