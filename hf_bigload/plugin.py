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

import contextlib
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
_environment = settings.Settings()  # as it was when the plugin went on


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
    demote_on_oom: bool | None = None,
) -> Activation:
    """From here on, `from_pretrained(device_map=...)` is planned, loaded and dispatched by this package.

    Libraries are hooked once they are imported, before or after this call; neither they nor torch are imported by it.
    Calling it again is harmless.

    Args:
        device_map: the map for calls that give none. By default these are left to the library.
        max_memory: budgets for calls that give none, by accelerator index, "cpu", "disk" or "mps": bytes or "10GiB".
        offload_folder: where converted weights go for calls that name no folder.
        explain: print the plan of every load to stderr.
        demote_on_oom: where the accelerator of a model with device_map="auto" runs out of memory in a forward, send
            some of its weights to RAM or disk, and go on; on by default.

    Each argument that is None keeps what an `enable` still in force said, else what the environment says
    (HF_BIGLOAD_DEVICE_MAP, HF_BIGLOAD_MAX_MEMORY, HF_BIGLOAD_OFFLOAD_FOLDER, HF_BIGLOAD_EXPLAIN,
    HF_BIGLOAD_DEMOTE_ON_OOM).

    Returns a context manager, for those who want it to end with a block. A load under way when the plugin goes off
    continues with the library's stock functions; hold an `enable` of your own around a load in a thread.

    Raises DeviceMapError (a ValueError) for a budget or a variable that cannot be read; nothing is changed then.
    """
    overrides = settings.overrides(device_map, max_memory, offload_folder, explain, demote_on_oom)
    with contextlib.ExitStack() as undo:
        activation = undo.enter_context(_begin(overrides))
        registry.install_loaders()  # imports modules, so not under the lock
        undo.pop_all()
    return activation


def disable() -> None:
    """End every `enable` in force, and put back all that was hooked. Harmless if there is none."""
    with _lock:
        _layers.clear()
        _follow_layers()


def is_enabled() -> bool:
    """Whether any `enable` is in force."""
    return bool(_layers)


def load_ipython_extension(ipython: object) -> None:
    """What `%load_ext hf_bigload` calls."""
    enable()


def unload_ipython_extension(ipython: object) -> None:
    """What `%unload_ext hf_bigload` calls."""
    disable()


def _begin(overrides: dict[str, Any]) -> Activation:
    global _environment
    with _lock:
        if not _layers:
            _environment = settings.from_environment()
        if not _layers or _layers[-1].overrides != overrides:
            _layers.append(_Layer(overrides))
        _layers[-1].count += 1
        _follow_layers()
        return Activation(_layers[-1])


def _follow_layers() -> None:
    if _layers:
        settings.put_in_force(settings.layered(_environment, (layer.overrides for layer in _layers)))
        registry.enable()
    else:
        settings.put_in_force(None)
        registry.disable()
