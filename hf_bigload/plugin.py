"""Turning the plugin on and off.

    hf_bigload.enable()                        # until hf_bigload.disable()
    with hf_bigload.enable(max_memory={...}):  # for the block
        ...
    %load_ext hf_bigload                       # in a notebook

The plugin is on while any `enable` is in force. Each one's arguments lie over those of the one before, and over the
environment's; leaving a `with` block takes just that one away, whichever thread made the others. `disable` ends them
all. Both concern the whole process: the hooks are in the libraries, not in a thread.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from hf_bigload import registry, settings

_lock = threading.RLock()


@dataclass(eq=False)
class _Layer:
    """Arguments of `enable` in force; `count` calls in a row gave the same ones."""

    overrides: dict[str, Any]
    count: int = 0


_layers: list[_Layer] = []


@dataclass(eq=False)
class Activation:
    """One `enable`. As a context manager it ends with the block; ending it twice, or after `disable`, does nothing."""

    _layer: _Layer = field(repr=False)
    _ended: bool = field(default=False, repr=False)

    def __enter__(self) -> Activation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with _lock:
            if self._ended:
                return
            self._ended = True
            self._layer.count -= 1
            if self._layer.count == 0 and self._layer in _layers:
                _layers.remove(self._layer)
                _follow_layers()


def enable(
    device_map: Any = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    explain: bool | None = None,
) -> Activation:
    """From here on, `from_pretrained(device_map=...)` is planned, loaded and dispatched by this package.

    Libraries are hooked once they are imported, before or after this call; neither they nor torch are imported by it.
    Calling it again is harmless.

    Args:
        device_map: the map for calls that give none. By default these are left to the library.
        max_memory: budgets for calls that give none, by accelerator index, "cpu", "disk" or "mps": bytes or "10GiB".
        offload_folder: where converted weights go for calls that name no folder.
        explain: print the plan of every load to stderr.

    Each argument that is None keeps what an `enable` still in force said, else what the environment says
    (HF_BIGLOAD_DEVICE_MAP, HF_BIGLOAD_MAX_MEMORY, HF_BIGLOAD_OFFLOAD_FOLDER, HF_BIGLOAD_EXPLAIN).

    Returns a context manager, for those who want it to end with a block. A load under way when the plugin goes off
    continues with the library's stock functions; hold an `enable` of your own around a load in a thread.

    Raises DeviceMapError (a ValueError) for a budget or a variable that cannot be read; nothing is changed then.
    """
    overrides = settings.overrides(device_map, max_memory, offload_folder, explain)
    with _lock:
        layer = _layers[-1] if _layers and _layers[-1].overrides == overrides else _Layer(overrides)
        if layer.count == 0:
            ...
