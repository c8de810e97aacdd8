"""What a pipeline's components will be once loaded, from their configs: blocks, bytes, and how often they run."""

from __future__ import annotations

import inspect
import json
import logging
import os
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import diffusers
import torch
import transformers
from torch import nn

from ..checkpoint.index import build_index
from ..composition import called, joined
from ..meta_init import init_empty_weights
from ..registry import Described
from ..skeleton import model_spec
from ..specs import ModelSpec, Needs, TensorSpec, Workload
from . import transformers_skeleton
from .diffusers_weights import DtypeRule, loaded_as

logger = logging.getLogger(__name__)
T = TypeVar("T")

_NOT_MADE = (AttributeError, ImportError, KeyError, NotImplementedError, OSError, RuntimeError, TypeError, ValueError)
"""What the libraries raise for a config that they cannot make a model of."""

_INDEX = "model_index.json"
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|model|pytorch_model)(?:\.(?P<variant>[^.]+?))?(?:-\d+-of-\d+)?"
    r"(?:\.(?P<shards_variant>[^.]+))?\.(?P<suffix>safetensors|bin)"
)
"""Names of weights files in both libraries; shards of older files have the variant behind their numbers."""

_DEFAULT_STEPS = 28
"""Of a pipeline whose signature names none."""


def no_split_of(model: nn.Module) -> tuple[str, ...] | None:
    """Classes of modules to keep whole: what the models in `model` declare, or what they say that they repeat.

    None where they say neither: what their lists repeat, then.
    """
    declared: set[str] = set()
    for each in model.modules():
        declared |= set(getattr(each, "_no_split_modules", None) or getattr(each, "_repeated_blocks", None) or ())
    return tuple(sorted(declared)) or None


def component_class(folder: str, name: str, library: str, class_name: str) -> Any:
    """The class that `model_index.json` names for a component, or None for one whose weights no plan can place."""
    if os.path.isfile(os.path.join(folder, name, f"{library}.py")):
        return None  # code of the repository's own
    from diffusers import pipelines
    from diffusers.pipelines import pipeline_loading_utils as library_utils

    try:
        known = library_utils.ALL_IMPORTABLE_CLASSES
        own = hasattr(pipelines, library)
        cls, _ = library_utils.get_class_obj_and_candidates(library, class_name, known, pipelines, own)
    except _NOT_MADE as error:
        logger.info("%s is no class of %s: %s", class_name, library, error)
        return None
    models = (diffusers.ModelMixin, transformers.PreTrainedModel)
    return cls if isinstance(cls, type) and issubclass(cls, models) else None


def describe_component(cls: Any, folder: str, dtype: torch.dtype | None) -> ModelSpec | None:
    """The model of class `cls` that a load of `folder` would make; None where it cannot be known (it is quantised)."""
    if issubclass(cls, transformers.PreTrainedModel):
        name = None if dtype is None else str(dtype).removeprefix("torch.")
        described = transformers_skeleton.describe_as(cls, folder, _stored(folder), name)
        return None if described is None else described.spec
    try:
        model = make_skeleton(cls, folder, dtype)
    except _NOT_MADE as error:
        logger.info("diffusers makes no model of the config in %s: %s", folder, error)
        return None
    if model is None:
        return None
    rule = DtypeRule(dtype, tuple(model._keep_in_fp32_modules or ()))
    return model_spec(model, no_split_of(model), None, loaded_as(model, rule))


def make_skeleton(cls: Any, folder: str, dtype: torch.dtype | None) -> Any:
    """The model on meta, as `from_pretrained` makes it; None for a quantised one."""
    config, unused, _ = cls.load_config(
        folder, return_unused_kwargs=True, return_commit_hash=True, local_files_only=True
    )
    if config.get("quantization_config") is not None:
        return None
    usual = torch.get_default_dtype()
    try:
        if dtype is not None and dtype.itemsize > 1:
            torch.set_default_dtype(dtype)
        with init_empty_weights():
            return cls.from_config(config, **unused)
    finally:
        torch.set_default_dtype(usual)


def weight_files(folder: str, variant: str | None = None, use_safetensors: bool | None = None) -> list[str]:
    """The files of a component that a load with these arguments reads, by their names; empty if there are none.

    As the libraries have it: files of the variant before those of none, safetensors before `.bin`. Where only another
    variant is there, which no load would find, it still tells the model's tensors.
    """
    found: dict[tuple[str | None, str], list[str]] = {}
    for name in sorted(os.listdir(folder)):
        if (match := _WEIGHTS.fullmatch(name)) is not None:
            key = (match["variant"] or match["shards_variant"], match["suffix"])
            found.setdefault(key, []).append(os.path.join(folder, name))
    suffixes = ("safetensors", "bin") if use_safetensors is None else ("safetensors",) if use_safetensors else ("bin",)
    tags = dict.fromkeys((variant, None, *(tag for tag, _ in found)))
    return next((found[tag, suffix] for tag in tags for suffix in suffixes if (tag, suffix) in found), [])


def _stored(folder: str, variant: str | None = None, use_safetensors: bool | None = None) -> Mapping[str, TensorSpec]:
    """The tensors of a component's files, but for those in the format that torch had before its zip archives."""
    entries = build_index(weight_files(folder, variant, use_safetensors)).entries
    return {name: TensorSpec(name, e.nbytes, e.dtype, e.shape) for name, e in entries.items()}


def stored_dtype(folder: str, variant: str | None = None, use_safetensors: bool | None = None) -> torch.dtype | None:
    """The dtype of the first weight in a component's files, as `torch_dtype="auto"` means it; None if unknown."""
    dtypes = (getattr(torch, tensor.dtype, None) for tensor in _stored(folder, variant, use_safetensors).values())
    return next((dtype for dtype in dtypes if dtype is not None and dtype.is_floating_point), None)


# ---------------------------------------------------------------- pipelines

BY_BYTES = Needs(Workload(context_length=0, new_tokens=1))
"""How many positions a denoiser sees is known when the pipeline is called: what is minimised is what travels."""


def describe_pipeline(folder: str, dtype: str | None) -> Described | None:
    """The pipeline whose `model_index.json` is in `folder`, its components' configs below; None for anything else."""
    index = os.path.join(folder, _INDEX)
    if not os.path.exists(index):
        return None
    with open(index, encoding="utf-8") as file:
        declared = json.load(file)
    pipeline_class = getattr(diffusers, str(declared.get("_class_name")), None)
    classes = {
        name: component_class(folder, name, *named)
        for name, named in declared.items()
        if isinstance(named, list) and None not in named
    }
    main = None if dtype is None else getattr(torch, dtype)
    specs = describe_components(
        {n: (cls, main) for n, cls in classes.items() if cls is not None}, folder, pipeline_class
    )
    return Described(joined(specs), lambda _workload: BY_BYTES) if specs else None


def describe_components(
    components: Mapping[str, tuple[Any, torch.dtype | None]], folder: str, pipeline_class: Any
) -> dict[str, ModelSpec]:
    """Those components of a pipeline that can be described, by name: given are their classes and dtypes."""
    found = {}
    for name, (cls, dtype) in in_order(components, pipeline_class):
        spec = describe_component(cls, folder_of(folder, name), dtype)
        if spec is not None:
            found[name] = called(spec, calls_of(name, cls, pipeline_class))
    return found


def folder_of(folder: str, name: str) -> str:
    """As the library has it: a component's own folder, or the pipeline's."""
    own = os.path.join(folder, name)
    return own if os.path.isdir(own) else folder


# ---------------------------------------------------------------- when and how often components run


def in_order(components: Mapping[str, T], pipeline_class: Any) -> list[tuple[str, T]]:
    """Components in the order in which the pipeline calls them, as far as its class says it; a repository may not."""
    order = (getattr(pipeline_class, "model_cpu_offload_seq", None) or "").split("->")
    return sorted(components.items(), key=lambda item: (order.index(item[0]) if item[0] in order else 99, item[0]))


def calls_of(name: str, cls: Any, pipeline_class: Any) -> int:
    """How often a request of `pipeline_class` calls its component `name`, a model of class `cls`.

    What is told the time is called at every denoising step; all else once.
    """
    parameters = inspect.signature(cls.forward).parameters
    if not any(parameter in parameters for parameter in ("timestep", "timesteps")):
        return 1
    call = getattr(pipeline_class, "__call__", None)  # noqa: B004 - of the class: what its instances are called with
    defaults = {} if call is None else {p.name: p.default for p in inspect.signature(call).parameters.values()}
    steps = next((d for n, d in defaults.items() if n.endswith("num_inference_steps") and isinstance(d, int)), None)
    return (steps or _DEFAULT_STEPS) * (2 if _is_guided_apart(name, call, defaults) else 1)


def _is_guided_apart(name: str, call: Any, defaults: Mapping[str, Any]) -> bool:
    """Whether a step calls the denoiser once with the prompt and once without it, rather than with both in a batch."""
    scale = defaults.get("true_cfg_scale", defaults.get("guidance_scale"))
    if not isinstance(scale, int | float) or scale <= 1:
        return False
    try:
        source = inspect.getsource(call)
    except OSError:
        return False
    called_as = rf"(?:self\.{re.escape(name)}|current_model|self\.transformer)\("
    return len(re.findall(called_as, source)) > 1
