"""A door: sizes, budgets, device maps and a module's tensors, under the names of the guide's `utils.modeling`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..device_map import (
    calculate_maximum_sizes,
    check_device_map,
    check_tied_parameters_on_same_device,
    clean_device_map,
    compute_module_sizes,
    compute_module_total_buffer_size,
    convert_file_size_to_int,
    dtype_byte_size,
    get_balanced_memory,
    get_max_layer_size,
    get_max_memory,
    get_module_leaves,
    infer_auto_device_map,
)
from ..module_tensors import (
    align_module_device,
    find_tied_parameters,
    get_non_persistent_buffers,
    get_state_dict_from_offload,
    get_state_dict_offloaded_model,
    has_offloaded_params,
    id_tensor_storage,
    load_offloaded_weights,
    named_module_tensors,
    retie_parameters,
    set_module_tensor_to_device,
)

if TYPE_CHECKING:
    from ..big_modeling import load_checkpoint_in_model, load_state_dict

__all__ = [
    "align_module_device",
    "calculate_maximum_sizes",
    "check_device_map",
    "check_tied_parameters_on_same_device",
    "clean_device_map",
    "compute_module_sizes",
    "compute_module_total_buffer_size",
    "convert_file_size_to_int",
    "dtype_byte_size",
    "find_tied_parameters",
    "get_balanced_memory",
    "get_max_layer_size",
    "get_max_memory",
    "get_module_leaves",
    "get_non_persistent_buffers",
    "get_state_dict_from_offload",
    "get_state_dict_offloaded_model",
    "has_offloaded_params",
    "id_tensor_storage",
    "infer_auto_device_map",
    "load_checkpoint_in_model",
    "load_offloaded_weights",
    "load_state_dict",
    "named_module_tensors",
    "retie_parameters",
    "set_module_tensor_to_device",
]


def __getattr__(name: str) -> Any:
    if name not in ("load_checkpoint_in_model", "load_state_dict"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .. import big_modeling  # loads the whole engine

    return getattr(big_modeling, name)
