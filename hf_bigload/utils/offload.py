"""A door: folders of offloaded weights, under the names of the guide's `utils.offload`."""

from __future__ import annotations

from ..checkpoint.offload_folder import (
    OffloadedWeightsLoader,
    PrefixedDataset,
    load_offloaded_weight,
    offload_state_dict,
    offload_weight,
    save_offload_index,
)
from ..module_tensors import extract_submodules_state_dict

__all__ = [
    "OffloadedWeightsLoader",
    "PrefixedDataset",
    "extract_submodules_state_dict",
    "load_offloaded_weight",
    "offload_state_dict",
    "offload_weight",
    "save_offload_index",
]
