"""The tensors of one `nn.Module`: naming, replacing and tying them, and reading the ones that are offloaded.

For any module, hooked or not, on any device or on meta. A hook counts as offloading when it has a truthy attribute
`offload`, whoever wrote it.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from hf_bigload.checkpoint.offload_folder import load_offloaded_weight, weight_file
from hf_bigload.errors import DeviceMapError, OffloadedWeightError

logger = logging.getLogger(__name__)

Device = int | str | torch.device
META = torch.device("meta")


def accelerator() -> torch.device | None:
    """This machine's current accelerator with its index, or None where there is none."""
    if not torch.accelerator.is_available():
        return None
    current = torch.accelerator.current_accelerator()
    return None if current is None else torch.device(current.type, torch.accelerator.current_device_index())


def as_device(device: Device) -> torch.device:
    """`device` as torch's: an index means the accelerator of that index, an accelerator's bare type the current one.

    Raises `DeviceMapError` for an index where there is no accelerator; torch's own error for a name it does not know.
    """
    if isinstance(device, int):
        current = accelerator()
        if current is None:
            raise DeviceMapError(f"device {device} names an accelerator, and this machine has none: use 'cpu'")
        return torch.device(current.type, device)
    device = torch.device(device)
    if device.index is None and device.type not in ("cpu", "meta"):
        current = accelerator()
        return current if current is not None and current.type == device.type else device
    return device
