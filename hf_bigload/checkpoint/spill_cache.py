"""Converted copies of tensors that later loads use again: an entry per checkpoint and dtype, and a limit for them all.

    <cache_root()>/casts/<entry>/    the tensors of one checkpoint (its files as stamped) in one dtype
        lock                         shared by all that use the entry; its time of change is that of the last use
        writer                       held by the one process that adds to the entry
        <random>.weights             a segment: tensors, each in pages of its own
        <random>.json                its manifest, which is there only once the segment is complete and on the disk

A segment never changes once it has a manifest; what a load finds missing, it adds as a segment of its own. What a
killed writer leaves has no manifest, so nobody believes it, and the next process to have the entry to itself removes
it. Locks are the kernel's (flock): they end with their process, however that ends. Nobody waits for a writer: who
comes second writes privately (`SpillFolder`), and so does everybody where the cache has no room or cannot be written.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import re
import secrets
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from hf_bigload import settings
from hf_bigload.checkpoint.index import check_stamp
from hf_bigload.checkpoint.spill import PAGE, SpillFile, cache_root
from hf_bigload.errors import CheckpointChangedError, SpillError, human_bytes
from hf_bigload.hardware import free_disk
from hf_bigload.specs import DTYPE_BYTES, FileStamp, TensorEntry

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

FORMAT = 1
"""Of manifests, and of how tensors lie: entries of another format have other names."""
DEFAULT_LIMIT = 100 * 1024**3
LOCK_NAME, WRITER_NAME = "lock", "writer"

_FOLDER = "casts"
_ENTRY = re.compile(r"[0-9a-f]{16}")
_SEGMENT = re.compile(r"(?P<stem>[0-9a-f]{16})(?P<suffix>\.weights|\.json|\.json\.tmp)")
_WEIGHTS, _MANIFEST, _TEMPORARY = ".weights", ".json", ".json.tmp"
_GRANT_BYTES = 256 * 1024**2
"""A writer looks again at what others take after this much."""
_ATTEMPTS, _PAUSE_SECONDS = 100, 0.01
"""For a lock that is held only while an entry is looked at or removed."""

Origin = tuple[int, str]
"""Which of the checkpoint's files (by number in `Identity.sources`), and the tensor's name in it."""


@dataclass(frozen=True)
class Identity:
    """What the tensors of an entry were made from, into which dtype, and by what."""

    sources: tuple[FileStamp, ...]
    """By real path: the same file under another name (the Hub's cache links to it) is the same source."""
    dtype: str
    made_by: str

    @property
    def name(self) -> str:
        """The entry's."""
        return hashlib.sha256(json.dumps(self.as_json()).encode()).hexdigest()[:16]

    def as_json(self) -> dict[str, Any]:
        sources = [list(astuple(source)) for source in self.sources]
        return {"format": FORMAT, "dtype": self.dtype, "made_by": self.made_by, "sources": sources}


class SpillCache:
    """The copies of one checkpoint's tensors, for one load; in use as long as this object lives.

    `stamps` are the checkpoint's files as they were indexed, by path; `made_by` names the software whose conversions
    these are, so that another version never gets them. Nothing is touched on disk before the first `slot`. Safe to use
    from several threads.
    """

    def __init__(self, stamps: Mapping[str, FileStamp], made_by: str) -> None:
        self._stamps = dict(stamps)
        self._made_by = made_by
        self._entries: dict[str, _Entry | None] = {}
        self._lock = threading.Lock()

    def slot(self, dtype: str, file: str, name: str) -> Slot | None:
        """The place for the tensor `name` of `file` in `dtype` (torch's name, or a word for what is not cast).

        None where there is no place: `file` is none of the checkpoint's, or the cache cannot be used.
        """
        entry = self._entry(dtype) if file in self._stamps else None
        return None if entry is None else Slot(entry, (self._number[file], name))

    def whole(self, dtype: str) -> dict[str, TensorEntry] | None:
        """Every tensor of a checkpoint of one file, if they were all written (`seal(whole=True)`); else None."""
        entry = self._entry(dtype)
        return None if entry is None else entry.whole()

    def seal(self, whole: bool = False) -> None:
        """Have later loads find what was written since the last time; `whole` says that this is all there is.

        Raises:
            SpillError: the disk failed to take what was written: the tensors are not to be used.
        """
        for entry in self._entries.values():
            if entry is not None:
                entry.seal(whole)

    def _entry(self, dtype: str) -> _Entry | None:
        if not self._stamps:
            return None
        with self._lock:
            if dtype not in self._entries:
                label = os.path.dirname(next(iter(self._stamps)))
                self._entries[dtype] = _open(Identity(self._sources, dtype, self._made_by), label)
            return self._entries[dtype]

    @cached_property
    def _real(self) -> dict[str, str]:
        return {path: os.path.realpath(path) for path in self._stamps}

    @cached_property
    def _sources(self) -> tuple[FileStamp, ...]:
        sources = {self._real[path]: replace(stamp, path=self._real[path]) for path, stamp in self._stamps.items()}
        return tuple(sources[path] for path in sorted(sources))

    @cached_property
    def _number(self) -> dict[str, int]:
        """Of each file in `_sources`."""
        numbers = {source.path: i for i, source in enumerate(self._sources)}
        return {path: numbers[real] for path, real in self._real.items()}


@dataclass(frozen=True)
class Slot:
    """The place of one tensor in the cache."""

    entry: _Entry
    origin: Origin

    def find(self) -> TensorEntry | None:
        """Where the tensor lies, if it is there."""
        return self.entry.tensors.get(self.origin)

    def write(self, flat: torch.Tensor, shape: tuple[int, ...], stride: tuple[int, ...] | None) -> TensorEntry | None:
        """Put it there: the elements as they lie, which are of `shape` and `stride`. None where that is not possible.

        Raises:
            ValueError, DtypeError: see `SpillFile.write`.
        """
        return self.entry.write(self.origin, flat, shape, stride)


# ---------------------------------------------------------------------------------------------------------- an entry


def _open(identity: Identity, label: str) -> _Entry | None:
    folder = os.path.join(casts_folder(), identity.name)
    if settings.current().cache_size == 0:
        return None
    try:
        lock = _hold(folder, identity)
        return None if lock is None else _Entry(folder, identity, label, lock)
    except OSError as error:
        logger.info("%s cannot be used as a cache of converted weights: %s", folder, error)
        return None


class _Entry:
    """An entry that this load has a shared lock on (`lock`, a descriptor), and so nobody removes."""

    def __init__(self, folder: str, identity: Identity, label: str, lock: int) -> None:
        self._fds = [lock]
        """And, while this process writes, the lock that says so."""
        self.close = weakref.finalize(self, _close_all, self._fds)
        self._folder, self._identity, self._label = folder, identity, label
        self._lock = threading.Lock()
        self._owner = os.getpid()
        self._segment: _Segment | None = None
        self._unsealed: dict[Origin, TensorEntry] = {}
        self._written: list[_Segment] = []
        """Kept, because one that could not be sealed is removed with this object."""
        self._room = 0
        self._refuses = False
        self.tensors: dict[Origin, TensorEntry] = {}
        self._count: int | None = None
        self._look()
        with contextlib.suppress(OSError):  # a folder that only others may write to
            os.utime(lock)

    def _look(self) -> None:
        """Learn what is there."""
        for stem in _stems(self._folder):
            try:
                segment = _read_segment(self._folder, stem, self._identity)
            except _Untrusted as error:
                logger.warning("%s%s is ignored: %s", os.path.join(self._folder, stem), _MANIFEST, error)
                continue
            self.tensors.update(segment.tensors)
            self._count = segment.count or self._count

    def whole(self) -> dict[str, TensorEntry] | None:
        with self._lock:
            complete = self._count is not None and len(self.tensors) == self._count
            return {name: entry for (_, name), entry in self.tensors.items()} if complete else None

    def write(
        self, origin: Origin, flat: torch.Tensor, shape: tuple[int, ...], stride: tuple[int, ...] | None
    ) -> TensorEntry | None:
        with self._lock:
            segment = None if origin in self.tensors else self._segment_for(flat.nbytes)
            if segment is None or origin in self.tensors:  # another process has sealed it in the meantime
                return self.tensors.get(origin)
            before = segment.nbytes
            try:
                written = replace(segment.write(flat, origin[1]), shape=shape, stride=stride)
            except SpillError as error:
                logger.info("The cache takes no more of this load: %s", str(error))
                self._refuses = True
                return None
            self._room -= segment.nbytes - before
            self.tensors[origin] = self._unsealed[origin] = written
            return written

    def _segment_for(self, nbytes: int) -> _Segment | None:
        """The segment that this process writes, begun if need be, if it may take `nbytes` more."""
        if self._refuses or os.getpid() != self._owner:
            return None
        nbytes += 2 * PAGE  # for the gaps
        try:
            if self._segment is None:
                self._begin()
            if self._segment is not None and nbytes > self._room:
                self._room = make_room(nbytes)
        except OSError as error:
            logger.info("%s cannot be written to: %s", self._folder, str(error))
            self._refuses = True
        self._refuses = self._refuses or self._segment is None or nbytes > self._room
        return None if self._refuses else self._segment

    def _begin(self) -> None:
        writer = os.open(os.path.join(self._folder, WRITER_NAME), os.O_RDWR | os.O_CREAT, 0o600)
        if not _flock(writer, fcntl.LOCK_EX):
            os.close(writer)
            return
        self._fds.append(writer)
        try:
            self._look()
            _tidy_others(self._folder)
            self._segment = _Segment(self._folder)
        except BaseException:
            os.close(self._fds.pop())
            raise

    def seal(self, whole: bool) -> None:
        with self._lock:
            segment, unsealed = self._segment, self._unsealed
            if segment is None or os.getpid() != self._owner:
                return
            self._segment, self._unsealed = None, {}
            try:
                if unsealed:
                    self._written.append(segment)
                    count = len(self.tensors) if whole and not self._refuses else None
                    self._publish(segment, unsealed, count)
            finally:
                if not unsealed:
                    segment.close()
                os.close(self._fds.pop())

    def _publish(self, segment: _Segment, tensors: Mapping[Origin, TensorEntry], count: int | None) -> None:
        segment.flush()
        rows = [[*origin, *astuple(entry)[2:]] for origin, entry in tensors.items()]
        manifest = {**self._identity.as_json(), "checkpoint": self._label, "count": count, "tensors": rows}
        try:
            for source in self._identity.sources:  # else what was read may be of two versions
                check_stamp(source)
            segment.publish(manifest)
        except OSError as error:  # of which a changed checkpoint is one; its traceback would keep this object alive
            logger.warning("%s: converted weights are not kept for later loads: %s", self._folder, str(error))


def _close_all(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())


# --------------------------------------------------------------------------------------------------------- a segment


class _Segment(SpillFile):
    """A file of an entry while it is written; without a manifest, it is removed when this object goes."""

    def __init__(self, folder: str) -> None:
        self._stem = os.path.join(folder, secrets.token_hex(8))
        super().__init__(folder, os.path.basename(self._stem) + _WEIGHTS)
        self.close = weakref.finalize(self, _discard, self._file, self._fd, self._owner)

    def flush(self) -> None:
        """See to it that the disk has everything. Raises SpillError."""
        try:
            os.ftruncate(self._fd, self._end)
            os.fsync(self._fd)
        except OSError as error:
            raise SpillError(self._no_room("the cache of converted weights", self._end, str(error))) from error
        self._length = self._end

    def publish(self, manifest: Mapping[str, Any]) -> None:
        """Make the segment one that readers believe; it takes no more tensors."""
        status = os.fstat(self._fd)
        content = {**manifest, "nbytes": status.st_size, "mtime_ns": status.st_mtime_ns}
        temporary = self._stem + _TEMPORARY
        with open(temporary, "x", encoding="utf-8", opener=_private) as file:
            json.dump(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, self._stem + _MANIFEST)
        self.close.detach()
        os.close(self._fd)
        _sync_folder(self.path)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _sync_folder(path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _discard(file: str, fd: int, owner: int) -> None:
    if os.getpid() == owner:
        with contextlib.suppress(OSError):
            os.unlink(file)
    os.close(fd)


class _Untrusted(Exception):
    """A manifest that does not describe what is there."""


@dataclass(frozen=True)
class _Sealed:
    """What a manifest says. `count` is that of the entry's tensors, if the writer knew that they were all."""

    tensors: Mapping[Origin, TensorEntry]
    count: int | None


def _read_segment(folder: str, stem: str, identity: Identity) -> _Sealed:
    """What a manifest says of its segment, if it is true. Raises _Untrusted."""
    manifest = _read_manifest(folder, stem)
    if {key: manifest.get(key) for key in identity.as_json()} != identity.as_json():
        raise _Untrusted("it is of another checkpoint")
    weights = os.path.join(folder, stem + _WEIGHTS)
    try:
        status = os.stat(weights)
        if (status.st_size, status.st_mtime_ns) != (manifest["nbytes"], manifest["mtime_ns"]):
            raise _Untrusted(f"{stem}{_WEIGHTS} was changed since it was written")
        tensors = dict(_tensor(weights, status.st_size, *row) for row in manifest["tensors"])
        count = manifest["count"]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise _Untrusted(f"it is damaged ({error!r})") from error
    return _Sealed(tensors, count)


def _read_manifest(folder: str, stem: str) -> dict[str, Any]:
    try:
        with open(os.path.join(folder, stem + _MANIFEST), encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise _Untrusted(f"it cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise _Untrusted("it is no manifest")
    return content


def _tensor(
    file: str,
    length: int,
    source: int,
    name: str,
    offset: int,
    nbytes: int,
    dtype: str,
    shape: list[int],
    stride: list[int] | None,
) -> tuple[Origin, TensorEntry]:
    """A row of a manifest. Raises ValueError, KeyError or TypeError where it makes no sense."""
    count = math.prod(shape)
    reach = count if stride is None else sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) + 1
    steps = (offset, *shape, *(stride or ()))
    if min(steps) < 0 or nbytes != count * DTYPE_BYTES[dtype] or (count and reach > count) or offset + nbytes > length:
        raise ValueError(f"tensor {name!r} does not fit its file")
    entry = TensorEntry(name, file, offset, nbytes, dtype, tuple(shape), None if stride is None else tuple(stride))
    return (source, name), entry


# ------------------------------------------------------------------------------------------------------------- locks


def _flock(fd: int, kind: int) -> bool:
    """Whether the lock could be had at once. Raises OSError where there are no locks."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _hold(folder: str, identity: Identity) -> int | None:
    """A shared lock on an entry, made if need be: an open descriptor. None where somebody keeps it to himself."""
    lock = os.path.join(folder, LOCK_NAME)
    for _ in range(_ATTEMPTS):
        if not os.path.isdir(folder):
            with contextlib.suppress(FileExistsError):  # `exist_ok` fails where a folder goes while it looks
                os.makedirs(folder, mode=0o700)
        with contextlib.ExitStack() as undo:
            try:
                fd = _open_lock(lock)
            except FileNotFoundError:  # the entry was removed just now
                continue
            undo.callback(os.close, fd)
            if _flock(fd, fcntl.LOCK_EX) and _is_at(lock, fd):  # nobody else is here
                _tidy(folder, identity)
            if _flock(fd, fcntl.LOCK_SH) and _is_at(lock, fd):  # not removed by somebody who was first
                undo.pop_all()
                return fd
        time.sleep(_PAUSE_SECONDS)
    return None


def _open_lock(path: str) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        return os.open(path, os.O_RDONLY)  # a cache that others made: to be read


def _is_at(path: str, fd: int) -> bool:
    """Whether a descriptor is of the file that the path leads to now."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _alone(folder: str) -> Iterator[bool]:
    """Whether nobody uses the entry, nor begins to within the context."""
    lock = os.path.join(folder, LOCK_NAME)
    fd = _open_lock(lock)
    try:
        yield _flock(fd, fcntl.LOCK_EX) and _is_at(lock, fd)
    finally:
        os.close(fd)


# ---------------------------------------------------------------------------------------------------------- removal


def _stems(folder: str, suffix: str = _MANIFEST) -> list[str]:
    matches = (_SEGMENT.fullmatch(name) for name in sorted(os.listdir(folder)))
    return [match["stem"] for match in matches if match and match["suffix"] == suffix]


def _tidy(folder: str, identity: Identity | None = None) -> None:
    """Remove what is no part of a sealed segment, and with `identity` what is not to be trusted. For the only user."""
    for stem in _stems(folder) if identity else ():
        try:
            _read_segment(folder, stem, identity)  # type: ignore[arg-type]
        except _Untrusted as error:
            logger.warning("%s%s is removed: %s", os.path.join(folder, stem), _MANIFEST, error)
            _unlink(folder, stem, _MANIFEST)
    sealed, written = set(_stems(folder)), set(_stems(folder, _WEIGHTS))
    for stem in written - sealed:
        _unlink(folder, stem, _WEIGHTS)
    for stem in sealed - written:
        _unlink(folder, stem, _MANIFEST)
    for stem in _stems(folder, _TEMPORARY):
        _unlink(folder, stem, _TEMPORARY)


def _unlink(folder: str, stem: str, suffix: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(os.path.join(folder, stem + suffix))


def _tidy_others(own: str) -> None:
    """Remove what killed writers left in the entries that nobody uses."""
    for name in _entry_names():
        folder = os.path.join(casts_folder(), name)
        if folder == own:
            continue
        with contextlib.suppress(OSError), _alone(folder) as alone:
            if alone:
                _tidy(folder)
                if not _stems(folder):
                    _delete(folder)


def _delete(folder: str) -> None:
    """Remove an entry, manifests first, and of what is in it only what is ours. Raises OSError."""
    for suffix in (_MANIFEST, _WEIGHTS, _TEMPORARY):
        for stem in _stems(folder, suffix):
            os.unlink(os.path.join(folder, stem + suffix))
    for name in (WRITER_NAME, LOCK_NAME):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(folder, name))
    with contextlib.suppress(OSError):  # somebody's file, or one who comes just now
        os.rmdir(folder)


# ------------------------------------------------------------------------------------------------- the cache as a whole


@dataclass(frozen=True)
class EntryInfo:
    """An entry as a person sees it; `checkpoint`, `dtype` and `made_by` are "" where no manifest tells."""

    name: str
    checkpoint: str
    """The folder that it was loaded from."""
    dtype: str
    made_by: str
    nbytes: int
    last_used: float
    """Seconds since the epoch."""
    in_use: bool
    stale: bool
    """No load will use it again: its checkpoint is gone or was changed, or nothing in it is complete."""


def casts_folder() -> str:
    """Where the entries are."""
    return os.path.join(os.path.abspath(cache_root()), _FOLDER)


def entries() -> list[EntryInfo]:
    """The entries, the one that was used last first."""
    found = []
    for name in _entry_names():
        with contextlib.suppress(OSError):  # removed just now, or another user's
            found.append(_info(name))
    return sorted(found, key=lambda info: info.last_used, reverse=True)


def size_limit() -> int:
    """Bytes that all entries together may take: HF_BIGLOAD_CACHE_SIZE, or 100 GiB, but at most half of what the disk
    would have free without them."""
    return _limit(sum(_size_and_use(name)[0] for name in _entry_names()))


def remove(name: str) -> bool:
    """Remove an entry; False if it is in use, and stays.

    Raises:
        FileNotFoundError: there is no such entry.
        OSError: it cannot be removed.
    """
    if name not in _entry_names():
        raise FileNotFoundError(errno.ENOENT, f"There is no entry {name!r} in {casts_folder()}")
    folder = os.path.join(casts_folder(), name)
    with _alone(folder) as alone:
        if alone:
            _delete(folder)
        return alone


def make_room(nbytes: int) -> int:
    """Remove entries that nobody uses, least recently used first, until there is room for `nbytes` more.

    Returns the bytes that may be written before asking again: fewer than `nbytes` where they cannot be had.
    """
    sizes = {name: _size_and_use(name) for name in _entry_names()}
    used = sum(size for size, _ in sizes.values())
    limit = _limit(used)
    if nbytes > limit:
        return 0
    for name in sorted(sizes, key=lambda name: sizes[name][1]):
        if used + nbytes <= limit and nbytes <= free_disk(casts_folder()):
            break
        with contextlib.suppress(OSError):
            if remove(name):
                used -= sizes[name][0]
                logger.info("%s (%s) made room in the cache", name, human_bytes(sizes[name][0]))
    return max(0, min(limit - used, free_disk(casts_folder()), max(nbytes, _GRANT_BYTES)))


def _limit(used: int) -> int:
    given = settings.current().cache_size
    if given is not None:
        return given
    folder = casts_folder()
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return min(DEFAULT_LIMIT, (used + free_disk(folder)) // 2)


def _entry_names() -> list[str]:
    try:
        with os.scandir(casts_folder()) as children:
            return sorted(c.name for c in children if _ENTRY.fullmatch(c.name) and c.is_dir(follow_symlinks=False))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _size_and_use(name: str) -> tuple[int, float]:
    """Bytes that an entry takes, and when it was used last; (0, 0) if it is gone or another user's."""
    folder = os.path.join(casts_folder(), name)
    try:
        sealed = set(_stems(folder))
        written = {stem: os.stat(os.path.join(folder, stem + _WEIGHTS)) for stem in _stems(folder, _WEIGHTS)}
        used = os.stat(os.path.join(folder, LOCK_NAME)).st_mtime
    except OSError:
        return 0, 0.0
    # What is still written is longer than it is full
    return sum(s.st_size if stem in sealed else s.st_blocks * 512 for stem, s in written.items()), used


def _info(name: str) -> EntryInfo:
    folder = os.path.join(casts_folder(), name)
    size, used = _size_and_use(name)
    manifest: dict[str, Any] = {}
    for stem in _stems(folder):
        with contextlib.suppress(_Untrusted):
            manifest = _read_manifest(folder, stem)
    with _alone(folder) as alone:
        in_use = not alone
    checkpoint, dtype, made_by = (str(manifest.get(key, "")) for key in ("checkpoint", "dtype", "made_by"))
    stale = not in_use and not _is_current(manifest.get("sources"))
    return EntryInfo(name, checkpoint, dtype, made_by, size, used, in_use, stale)


def _is_current(sources: Iterable[Any] | None) -> bool:
    """Whether the files that an entry was made from, as its manifest has them, are there and unchanged."""
    try:
        stamps = [FileStamp(*source) for source in sources or ()]
        for stamp in stamps:
            check_stamp(stamp)
    except (CheckpointChangedError, TypeError, ValueError):
        return False
    except OSError:  # nobody can tell
        return True
    return bool(stamps)
