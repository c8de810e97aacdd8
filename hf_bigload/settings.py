"""The defaults of a call that says nothing itself, and the reading of the texts that people write them in.

Arguments of `hf_bigload.enable` come before the environment:

    HF_BIGLOAD_DEVICE_MAP       auto, cpu, 0, or a map in JSON: {"encoder": 0, "decoder": "cpu"}
    HF_BIGLOAD_MAX_MEMORY       0=10GiB,cpu=30GiB
    HF_BIGLOAD_OFFLOAD_FOLDER   a folder for weights that must be kept converted
    HF_BIGLOAD_EXPLAIN          1 to print the plan of every load
    HF_BIGLOAD_DEMOTE_ON_OOM    0 to let a model die where its accelerator runs out of memory
    HF_BIGLOAD_CACHE_SIZE       100GiB: what the cache of converted weights may grow to; 0 for none
    HF_BIGLOAD_WORKLOAD         batch=4,context=8192,new=256: what a plan should count on
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from hf_bigload.errors import DeviceMapError
from hf_bigload.specs import Workload

MEMORY_NAMES = ("cpu", "disk", "mps")
"""What `max_memory` may name besides the index of an accelerator."""

_UNIT_BYTES = {"": 1, "B": 1}
for _power, _prefix in enumerate("KMGT", start=1):
    _UNIT_BYTES[f"{_prefix}B"] = 1000**_power
    _UNIT_BYTES[f"{_prefix}IB"] = 1024**_power

_SIZE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)", re.IGNORECASE)


@dataclass(frozen=True)
class Settings:
    """Defaults for loads: `device_map` for one without a map (None: it stays the library's own affair), `max_memory` in
    bytes by device, `offload_folder`, whether to `explain` each plan on stderr, whether weights make room where an
    accelerator runs out of memory (`demote_on_oom`, for device_map="auto"), the bytes that the cache of converted
    weights may take, `cache_size` (None: see `checkpoint.spill_cache.size_limit`), and the `workload` to plan for
    (None: nobody named one)."""

    device_map: Any = None
    max_memory: Mapping[int | str, int] | None = None
    offload_folder: str | None = None
    explain: bool = False
    demote_on_oom: bool = True
    cache_size: int | None = None
    workload: Workload | None = None


_in_force: Settings | None = None


def current() -> Settings:
    """The settings of this process: what the plugin was enabled with, over the environment's."""
    found = _in_force or from_environment()
    return found if _workload is None else replace(found, workload=_workload)


def put_in_force(settings: Settings | None) -> None:
    """Make `settings` current for the whole process; None goes back to the environment's. The plugin's to call."""
    global _in_force
    _in_force = settings


_workload: Workload | None = None


class NamedWorkload:
    """What `workload` named. As a context manager it ends with the block, and what was named before is back."""

    def __init__(self, named: Workload, before: Workload | None) -> None:
        self.workload = named
        self._before = before

    def __enter__(self) -> Workload:
        return self.workload

    def __exit__(self, *_: object) -> None:
        global _workload
        _workload = self._before


def workload(batch_size: int = 1, context_length: int = 2048, new_tokens: int = 128) -> NamedWorkload:
    """From here on, plans count on requests of `batch_size` sequences, each with `context_length` tokens given and
    `new_tokens` to generate: they leave room for what such a request remembers and computes with.

    For the whole process, over the environment's HF_BIGLOAD_WORKLOAD; with the plugin on or off.

    Returns a context manager, for those who want it to end with a block.

    Raises ValueError for what is no positive integer; nothing is changed then.
    """
    global _workload
    named = NamedWorkload(checked_workload(Workload(batch_size, context_length, new_tokens)), _workload)
    _workload = named.workload
    return named


def overrides(
    device_map: Any = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    explain: bool | None = None,
    demote_on_oom: bool | None = None,
) -> dict[str, Any]:
    """The fields of `Settings` that are given (not None), checked and in their final form.

    Raises DeviceMapError if `max_memory` does not make sense.
    """
    given = {
        "device_map": dict(device_map) if isinstance(device_map, Mapping) else device_map,
        "max_memory": None if max_memory is None else normalize_max_memory(max_memory),
        "offload_folder": None if offload_folder is None else os.fspath(offload_folder),
        "explain": explain,
        "demote_on_oom": demote_on_oom,
    }
    return {name: value for name, value in given.items() if value is not None}


def layered(settings: Settings, layers: Iterable[Mapping[str, Any]]) -> Settings:
    """`settings` with each of `layers` (as `overrides` makes them) over the one before."""
    for layer in layers:
        settings = replace(settings, **layer)
    return settings


def from_environment(environ: Mapping[str, str] = os.environ) -> Settings:
    """The settings that HF_BIGLOAD_* variables give; empty ones count as not set.

    Raises DeviceMapError (a ValueError) naming the variable that cannot be read.
    """
    readers: dict[str, Callable[[str], Any]] = {
        "device_map": parse_device_map,
        "max_memory": parse_max_memory,
        "offload_folder": str,
        "explain": _parse_flag,
        "demote_on_oom": _parse_flag,
        "cache_size": parse_size,
        "workload": parse_workload,
    }
    values = {}
    for field, read in readers.items():
        variable = f"HF_BIGLOAD_{field.upper()}"
        text = environ.get(variable, "").strip()
        if not text:
            continue
        try:
            values[field] = read(text)
        except ValueError as error:
            raise DeviceMapError(f"environment variable {variable}: {error}") from error
    return Settings(**values)


def parse_size(size: int | float | str) -> int:
    """A size in bytes: a number of them, or a text such as "10GiB", "200 KB" or "1.5gib" (upper and lower case alike).

    Binary units are powers of 1024, decimal ones of 1000. Fractions of a byte are dropped. Raises ValueError.
    """
    if isinstance(size, str):
        match = _SIZE.fullmatch(size.strip())
        unit = _UNIT_BYTES.get(match[2].upper()) if match else None
        if match and unit:
            return int(float(match[1]) * unit) if "." in match[1] else int(match[1]) * unit
    elif isinstance(size, (int, float)) and not isinstance(size, bool) and math.isfinite(size) and size >= 0:
        return int(size)
    raise ValueError(f"{size!r} is not a size: give bytes, or a number with a unit, such as 10GiB, 1.5GiB or 800MB")


def parse_max_memory(text: str) -> dict[int | str, int]:
    """`max_memory` from a text such as "0=10GiB,cpu=30GiB", in bytes. Raises DeviceMapError naming the bad piece."""
    budgets: dict[int | str, int] = {}
    for piece in text.split(","):
        name, equals, size = piece.partition("=")
        if not equals:
            raise DeviceMapError(f"max_memory {piece.strip()!r} is not KEY=SIZE, such as 0=10GiB or cpu=30GiB")
        key, allowed = _budget(name.strip(), size.strip())
        if key in budgets:
            raise DeviceMapError(f"max_memory names {key!r} twice: {text!r}")
        budgets[key] = allowed
    return budgets


def normalize_max_memory(budgets: Mapping[int | str, int | str]) -> dict[int | str, int]:
    """`max_memory` as its users may write it, with bytes for values and int for accelerators.

    Raises DeviceMapError naming the key that is neither an index nor "cpu", "disk" or "mps", or the size that is none.
    """
    return dict(_budget(key, size) for key, size in budgets.items())


def _budget(key: int | str, size: int | float | str) -> tuple[int | str, int]:
    index = int(key) if isinstance(key, str) and key.isdecimal() else key
    is_index = isinstance(index, int) and not isinstance(index, bool) and index >= 0
    if not is_index and index not in MEMORY_NAMES:
        raise DeviceMapError(
            f"max_memory names {key!r}, which is no device: use the index of an accelerator (0 for cuda:0), "
            f"or one of {', '.join(MEMORY_NAMES)}"
        )
    try:
        return index, parse_size(size)
    except ValueError as error:
        raise DeviceMapError(f"max_memory for {key!r}: {error}") from error


_WORKLOAD = {"batch": "batch_size", "context": "context_length", "new": "new_tokens"}


def parse_workload(text: str) -> Workload:
    """A workload from a text such as "batch=4,context=8192,new=256"; what it leaves out keeps its default.

    Raises ValueError naming the piece that is none.
    """
    given: dict[str, int] = {}
    for piece in text.split(","):
        name, _, count = (part.strip() for part in piece.partition("="))
        if name not in _WORKLOAD or _WORKLOAD[name] in given or not count.isdecimal():
            raise ValueError(f"workload {piece.strip()!r}: give each of {', '.join(_WORKLOAD)} once, as batch=4")
        given[_WORKLOAD[name]] = int(count)
    return checked_workload(Workload(**given))


def checked_workload(workload: Workload) -> Workload:
    """`workload` itself. Raises ValueError naming the field that is no positive integer."""
    for name, value in vars(workload).items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}: a workload counts sequences and tokens, 1 at least")
    return workload


def parse_device_map(text: str) -> str | int | dict[str, int | str]:
    """A device map from a text: a strategy or device ("auto", "cpu"), an index ("0"), or a map in JSON.

    Raises DeviceMapError where the text is empty or its JSON is not a map of module names to devices.
    """
    text = text.strip()
    if text.isdecimal():
        return int(text)
    if text and not text.startswith("{"):
        return text
    try:
        device_map: dict[str, int | str] = json.loads(text)
    except ValueError as error:
        raise DeviceMapError(f"{text!r} is not a device map (auto, cpu, 0, or JSON): {error}") from error
    for module, device in device_map.items():
        if isinstance(device, bool) or not isinstance(device, (int, str)):
            raise DeviceMapError(f"the device map gives module {module!r} the device {device!r}: not a name or index")
    return device_map


def _parse_flag(text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
        return False
    raise ValueError(f"{text!r} is neither 1 (true, yes, on) nor 0 (false, no, off)")
