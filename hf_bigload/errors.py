"""Every error this package raises on purpose.

    BigloadError
    ├── CheckpointError (OSError)         the files are not what they claim to be
    │   ├── MissingShardError             a file that the index names is not there
    │   ├── CorruptShardError             truncated, overlapping or lying headers
    │   ├── CheckpointChangedError        a shard changed or vanished while it was in use
    │   └── WeightsMismatchError (ValueError)  it lacks weights of the model, or has other shapes
    ├── RepositoryError (OSError)         no model is there, or it may not be read
    ├── DeviceMapError (ValueError)       a device map that cannot be followed
    ├── BudgetError (ValueError)          no placement fits the memory that was allowed
    ├── DoesNotFitError (MemoryError)     a move that would not fit its target; nothing was moved
    ├── SpillError (OSError)              a converted tensor could not be written to disk
    ├── DtypeError (ValueError)           a cast that cannot be done
    ├── OffloadedWeightError (RuntimeError)   an operation that an offloaded weight cannot take part in
    ├── QuantizedOffloadError (ValueError)    a quantised checkpoint whose plan would need to stream
    ├── LoaderError (TypeError)           a loader that does not keep the registry's protocol
    ├── MissingExtraError (ImportError)   a library that only one feature needs is not installed
    └── SeamMovedWarning (UserWarning)    a library version moved a function this package hooks

Each also derives from the built-in that callers of the libraries already catch, so that `except ValueError` or
`except OSError` keeps working after the import line has changed.
"""

from __future__ import annotations


def human_bytes(count: int | float) -> str:
    """`count` bytes for a reader: binary units, three significant digits ("1.50 GiB")."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1024 or unit == "TiB":
            return f"{int(size)} B" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1024
    raise AssertionError("unreachable")


def add_note(error: BaseException, note: str) -> None:
    """Have `error` tell `note` too, where its traceback is shown; before Python 3.11, as part of its message."""
    if hasattr(error, "add_note"):
        error.add_note(note)
    else:
        error.args = (f"{error}\n{note}", *error.args[1:])


class BigloadError(Exception):
    """Base of all errors of this package."""


class CheckpointError(BigloadError, OSError):
    """The files of a checkpoint are not what they claim to be."""


class MissingShardError(CheckpointError, FileNotFoundError):
    """A shard that the index names does not exist."""


class CorruptShardError(CheckpointError):
    """A shard is truncated, or its header contradicts the file or itself."""


class CheckpointChangedError(CheckpointError):
    """A shard is no longer the file that was indexed."""


class WeightsMismatchError(CheckpointError, ValueError):
    """A checkpoint lacks weights that the model has, or has some in other shapes."""


class RepositoryError(BigloadError, OSError):
    """A repository does not exist, may not be read, cannot be reached, or holds no model."""


class DeviceMapError(BigloadError, ValueError):
    """A device map names an unknown device, or leaves parameters without one."""


class BudgetError(BigloadError, ValueError):
    """No placement keeps the budgets that were given."""


class DoesNotFitError(BigloadError, MemoryError):
    """A move was refused because its target has too little memory; nothing was moved."""


class SpillError(BigloadError, OSError):
    """A converted tensor could not be written to disk."""


class DtypeError(BigloadError, ValueError):
    """A tensor cannot be cast to the dtype that was asked for."""


class OffloadedWeightError(BigloadError, RuntimeError):
    """An operation was asked of a weight that is not where the operation needs it."""


class QuantizedOffloadError(BigloadError, ValueError):
    """A quantised checkpoint would have to stream its weights, which is not supported yet."""


class LoaderError(BigloadError, TypeError):
    """A loader does not keep the registry's protocol."""


class MissingExtraError(BigloadError, ImportError):
    """A library that only one feature needs is not installed."""


class SeamMovedWarning(UserWarning):
    """A function that this package hooks has moved or changed in the installed library version."""
