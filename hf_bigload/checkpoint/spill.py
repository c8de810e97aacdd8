"""Where converted copies of tensors go when they cannot stay in memory: appended to a file of this process.

    <offload folder, or ~/.cache/hf_bigload/spill>/hf_bigload-<host>-<process>-<random>/weights.spill

Each `SpillFolder` has a subfolder of its own, so that nothing of the user's and nothing of another model is ever
overwritten, and removes it when it goes. What a killed process left behind, the next one removes. Copies that later
loads can use again go to the managed cache instead, see `spill_cache`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import socket
import tempfile
import threading
import weakref
from typing import TYPE_CHECKING

from hf_bigload.errors import DtypeError, SpillError, human_bytes
from hf_bigload.specs import DTYPE_BYTES, TensorEntry

if TYPE_CHECKING:
    import torch

CACHE_ENV = "HF_BIGLOAD_CACHE"
DEFAULT_CACHE = os.path.join("~", ".cache", "hf_bigload")
SPILL_NAME = "weights.spill"
PAGE = 4096
"""Each tensor begins in a page of its own: a private mapping that was written to would hide what is appended to it."""
PHASE_BYTES = 64
"""Some kernels round by an address modulo this: a spilled tensor keeps the residue its plain load has."""
CHUNK_BYTES = 16 * 1024 * 1024
GROWTH_BYTES = 64 * 1024 * 1024
"""The file is made longer (not fuller: it is sparse) in doubling steps from here, so that readers map it few times."""

_SUBFOLDER = re.compile(r"hf_bigload-(?P<host>.+)-(?P<pid>\d{1,9})-[^-]+")


def cache_root() -> str:
    """The folder for what this package writes on its own account; the variable HF_BIGLOAD_CACHE names another."""
    return os.environ.get(CACHE_ENV) or os.path.expanduser(DEFAULT_CACHE)


class SpillFile:
    """A file in the folder `path` that tensors are appended to, each in pages of its own.

    `close` (a finalizer, which the subclass sets) ends its use and removes what is not to stay. Safe to use from
    several threads; a forked child may read what was written, and needs a file of its own to write.
    """

    close: weakref.finalize[..., SpillFile]

    def __init__(self, path: str, name: str = SPILL_NAME) -> None:
        self.path = path
        self._file = os.path.join(path, name)
        self._fd = os.open(self._file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        self._end = 0
        self._length = 0
        self._lock = threading.Lock()
        self._owner = os.getpid()

    @property
    def nbytes(self) -> int:
        """Bytes of the file in use so far, gaps between tensors included."""
        return self._end

    def reserve(self, nbytes: int, name: str = "the offloaded weights") -> None:
        """Check that `nbytes` more bytes would fit now; nothing is set aside. `name` says of what, for the error.

        Raises:
            SpillError: they would not, or the file is gone.
        """
        self._check_usable(name)
        if nbytes > self._free_bytes():
            raise SpillError(self._no_room(name, nbytes, "the disk has too little room"))

    def write(self, tensor: torch.Tensor, name: str = "", phase: int | None = None) -> TensorEntry:
        """Append a contiguous CPU tensor; the entry returned tells where it lies.

        The offset modulo 64 is `phase`, by default the tensor's address modulo 64. A tensor that was not written to
        its last byte is taken back, and its room used again.

        Raises:
            SpillError: the disk is full or failed.
            ValueError: the tensor is not on the CPU, or not contiguous.
            DtypeError: the tensor's elements are no whole bytes of their own (quantised dtypes).
        """
        data = _bytes_of(tensor, name)
        if phase is None:
            phase = tensor.data_ptr() % PHASE_BYTES
        with self._lock:
            offset = -(-self._end // PAGE) * PAGE + phase % PHASE_BYTES
            self.reserve(offset + data.nbytes - self._end, f"tensor {name!r}")
            if data.nbytes:
                self._append(data, offset, name)
        dtype = str(tensor.dtype).removeprefix("torch.")
        return TensorEntry(name, self._file, offset, data.nbytes, dtype, tuple(tensor.shape))

    def _append(self, data: memoryview, offset: int, name: str) -> None:
        try:
            written = 0
            while written < data.nbytes:
                written += os.pwrite(self._fd, data[written : written + CHUNK_BYTES], offset + written)
        except BaseException as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._end)
                os.ftruncate(self._fd, max(self._end, self._length))
            if not isinstance(error, OSError):
                raise
            reason = error.strerror or str(error)
            raise SpillError(self._no_room(f"tensor {name!r}", data.nbytes, reason)) from error
        self._end = offset + data.nbytes
        if self._end > self._length:
            self._grow(max(GROWTH_BYTES, 1 << (self._end - 1).bit_length()))

    def _grow(self, length: int) -> None:
        with contextlib.suppress(OSError):  # a limit on file sizes: readers map the file more often then
            os.ftruncate(self._fd, length)
            self._length = length

    def _check_usable(self, name: str) -> None:
        if not self.close.alive or os.getpid() != self._owner or not os.path.exists(self._file):
            raise SpillError(
                f"{name} cannot be written to {self.path}, which was closed, removed, or made by another process. Load "
                "again."
            )

    def _free_bytes(self) -> int:
        """Bytes that an ordinary user may still write to this disk."""
        status = os.fstatvfs(self._fd)
        return status.f_bavail * status.f_frsize

    def _no_room(self, name: str, nbytes: int, reason: str) -> str:
        free = self._free_bytes()
        return (
            f"{name} needs {nbytes} bytes ({human_bytes(nbytes)}) in {self.path}, where {free} bytes "
            f"({human_bytes(free)}) are free: {reason}. Free some space, name a folder on a larger disk with "
            "offload_folder=..., or load in the checkpoint's own dtype or a smaller one."
        )


class SpillFolder(SpillFile):
    """A file on disk that tensors are appended to, below `folder` if given, else below `cache_root()`.

    The file is removed when this object is collected, at `close()`, or at exit: keep it as long as its entries are
    used.

    Raises:
        SpillError: the folder cannot be made or written to.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        parent = os.path.abspath(folder or os.path.join(cache_root(), "spill"))
        try:
            os.makedirs(parent, exist_ok=True)
            _remove_stale(parent)
            path = tempfile.mkdtemp(prefix=f"hf_bigload-{socket.gethostname()}-{os.getpid()}-", dir=parent)
            super().__init__(path)
            held = _hold(path)
        except OSError as error:
            raise SpillError(
                f"{parent} cannot take offloaded weights: {error.strerror}. Name a folder that you may write to, on a "
                "disk with room for them: offload_folder=..."
            ) from error
        self.close = weakref.finalize(self, _close, path, (self._fd, held), self._owner)


def _bytes_of(tensor: torch.Tensor, name: str) -> memoryview:
    import torch

    if str(tensor.dtype).removeprefix("torch.") not in DTYPE_BYTES:
        raise DtypeError(f"tensor {name!r} is of {tensor.dtype}, which has no plain bytes to write to disk")
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(f"tensor {name!r} on {tensor.device} must be contiguous and on the CPU to be written to disk")
    plain = tensor.detach().resolve_conj().resolve_neg()
    return plain.reshape(-1).view(torch.uint8).numpy().data


def _hold(path: str) -> int | None:
    """Lock a folder for the life of this process; None where the filesystem has no such locks.

    A process's number alone would not do: those of other containers on the same disk are not to be seen.
    """
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        return None
    return fd


def _close(path: str, fds: tuple[int | None, ...], owner: int) -> None:
    if os.getpid() == owner:  # at the exit of a forked child, the parent still uses its files
        _remove(path)
    for fd in fds:
        if fd is not None:
            os.close(fd)


def _remove(path: str) -> None:
    """Remove a subfolder, and of what is in it only our own file."""
    with contextlib.suppress(OSError):
        os.unlink(os.path.join(path, SPILL_NAME))
    with contextlib.suppress(OSError):
        os.rmdir(path)


def _remove_stale(parent: str) -> None:
    """Remove the subfolders of processes that ended without doing so."""
    with os.scandir(parent) as children:
        names = [child.name for child in children if child.is_dir(follow_symlinks=False)]
    for name in names:
        match = _SUBFOLDER.fullmatch(name)
        # Another host's processes cannot be seen from here
        if match and match["host"] == socket.gethostname() and not _is_alive(int(match["pid"])):
            path = os.path.join(parent, name)
            if not _is_held(path):
                _remove(path)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _is_held(path: str) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False  # no locks on this filesystem: the process's number has to do
    finally:
        os.close(fd)
    return False
