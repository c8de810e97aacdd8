"""What a Transformers model will be once loaded, from its config: skeleton, ties, and the dtype of each weight."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Container, Mapping
from typing import Any

import torch
import transformers
from transformers.utils.generic import ContextManagers

from ..checkpoint.index import SAFETENSORS_SUFFIX
from ..registry import Described
from ..skeleton import LoadedAs, dtype_name, model_spec
from ..specs import TensorSpec
from ..trace import needs_of
from .transformers_weights import dtype_rule

logger = logging.getLogger(__name__)

_NOT_MADE = (AttributeError, ImportError, KeyError, NotImplementedError, OSError, RuntimeError, TypeError, ValueError)
"""What the library raises for a config that it cannot make a model of."""


def describe(folder: str, stored: Mapping[str, TensorSpec] | None, dtype: str | None = None) -> Described | None:
    """The model that `from_pretrained(folder, dtype=dtype)` would make; None where the library cannot say.

    It cannot for a model with code of its own (which is not run), and for a quantised one, whose modules depend on
    the quantiser.
    """
    return _describe(transformers.AutoConfig, None, folder, stored, dtype)


def describe_as(
    cls: Any, folder: str, stored: Mapping[str, TensorSpec] | None, dtype: str | None = None
) -> Described | None:
    """As `describe`, of a model that is known to be of class `cls`."""
    return _describe(cls.config_class, cls, folder, stored, dtype)


def _describe(
    configs: Any, cls: Any, folder: str, stored: Mapping[str, TensorSpec] | None, dtype: str | None
) -> Described | None:
    try:
        config = configs.from_pretrained(folder, local_files_only=True)
        if getattr(config, "quantization_config", None) is not None:
            return None
        main = _main_dtype(config, stored, dtype)
        model = make_skeleton(config, main, cls)
    except _NOT_MADE as error:
        logger.info("transformers makes no model of the config in %s: %s", folder, error)
        return None
    spec = model_spec(model, None, ties(model, _telling(folder, stored)), loaded_as(model, main))
    return Described(spec, functools.partial(needs_of, model, spec))


def _telling(folder: str, stored: Mapping[str, TensorSpec] | None) -> Container[str]:
    """The stored names that tell what is tied: a `.bin` is written with all names, whatever they share."""
    files = os.listdir(folder)
    only_bin = any(file.endswith(".bin") for file in files) and not any(f.endswith(SAFETENSORS_SUFFIX) for f in files)
    return () if stored is None or only_bin else stored


def make_skeleton(config: Any, dtype: torch.dtype, cls: Any = None) -> Any:
    """The model of `config`, of class `cls` or the one that its `architectures` name, on meta and in `dtype`."""
    cls = cls or _class_of(config)
    for each in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        if each is not None:
            each.dtype = dtype
    with ContextManagers(cls.get_init_context(dtype, False, False, None)):
        return cls(config)


def _class_of(config: Any) -> Any:
    named = (getattr(transformers, name, None) for name in config.architectures or ())
    return next((cls for cls in named if cls is not None), None) or transformers.MODEL_MAPPING[type(config)]


def _main_dtype(config: Any, stored: Mapping[str, TensorSpec] | None, dtype: str | None) -> torch.dtype:
    """As the library settles it: what was asked for, else the config's, else that of the first floating weight."""
    if dtype is not None:
        return getattr(torch, dtype)
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    found = (getattr(torch, tensor.dtype, None) for tensor in (stored or {}).values())
    return next((each for each in found if each is not None and each.is_floating_point), torch.float32)


def ties(model: Any, stored: Container[str]) -> dict[str, str]:
    """Tied names -> owners. A name that the checkpoint stores too may turn out not to be tied: it needs room."""
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    prefix = f"{model.base_model_prefix}."
    return {
        name: owner
        for name, owner in tied.items()
        if not any(key in stored for key in (name, prefix + name, name.removeprefix(prefix)))
    }


def loaded_as(model: Any, dtype: torch.dtype | None) -> LoadedAs:
    """Dtype and bytes of each weight of a skeleton once loaded: some modules are kept in fp32."""
    skeleton = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    rule: Callable[[str], torch.dtype] = dtype_rule(skeleton, model._get_dtype_plan(dtype))

    def loaded(name: str, tensor: torch.Tensor) -> tuple[str, int]:
        found = rule(name) if name in skeleton else tensor.dtype
        return dtype_name(found), tensor.numel() * found.itemsize

    return loaded
