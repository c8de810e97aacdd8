"""What a pipeline's components will be once loaded, from their configs: blocks, bytes, and how often they run."""

from __future__ import annotations

import ast
import functools
import inspect
import json
import logging
import os
import re
import textwrap
from collections.abc import Mapping, Sequence
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
    declared = _read_json(os.path.join(folder, _INDEX))
    if not declared:
        return None
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
    shares = _shares(folder, pipeline_class)
    for name, (cls, dtype) in in_order(components, pipeline_class):
        spec = describe_component(cls, folder_of(folder, name), dtype)
        if spec is not None:
            found[name] = called(spec, calls_of(name, cls, pipeline_class, shares.get(name, 1.0)))
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


_DENOISER = re.compile(r"(?:^|_)(?:transformer|unet|controlnet)|(?:^|_)prior$")
"""Names of components that run at every step in every pipeline."""

_DENOISER_CLASS = re.compile(r"UNet|DiffNeXt")
"""Classes of denoisers, which some pipelines name `decoder`."""

_TIME = frozenset({"timestep", "timesteps", "timestep_ratio", "timestep_img"})
"""Parameters of models that are told the time."""

_CLASSIFIER_FREE = re.compile(r"classifier_free_guidance|cfg|guidance_scale")
"""Conditions of the calls that have no prompt."""


def calls_of(name: str, cls: Any, pipeline_class: Any, share: float = 1.0) -> int:
    """How often a request of `pipeline_class` calls its component `name`, a model of class `cls`.

    A denoiser is called at its `share` of the steps, all else once. Which they are is told by the component's name, its
    class, or the pipeline's loop over the steps: there is no one parameter that all denoisers take.
    """
    call = getattr(pipeline_class, "__call__", None)  # noqa: B004 - of the class: what its instances are called with
    step_calls = {} if call is None else _step_calls(call)
    told_the_time = not _TIME.isdisjoint(inspect.signature(cls.forward).parameters)
    by_class = told_the_time or _DENOISER_CLASS.search(cls.__name__) is not None
    if not (by_class or _DENOISER.search(name) or f"self.{name}" in step_calls):
        return 1
    defaults = {} if call is None else {p.name: p.default for p in inspect.signature(call).parameters.values()}
    steps = max(1, round(_steps(name, defaults) * share))
    callees = [f"self.{name}", *([_EITHER] if name.startswith("transformer") else [])]
    return steps * (2 if any(_is_guided_apart(step_calls.get(each, ()), defaults) for each in callees) else 1)


def _steps(name: str, defaults: Mapping[str, Any]) -> int:
    """The default number of steps, by the parameter that is the component's own where there is one."""
    found = {
        parameter.removesuffix("num_inference_steps"): default
        for parameter, default in defaults.items()
        if parameter.endswith("num_inference_steps") and isinstance(default, int)
    }
    own = [prefix for prefix in found if f"{name}_".startswith(prefix)]
    return found[max(own, key=len)] if own else next(iter(found.values()), _DEFAULT_STEPS)


def _is_guided_apart(calls: Sequence[Conditions], defaults: Mapping[str, Any]) -> bool:
    """Whether a step calls the denoiser once with the prompt and once without it, rather than with both in a batch."""
    return any(
        conditions != ()
        and all(_CLASSIFIER_FREE.search(test) and is_met for test, is_met in conditions)
        and (*conditions[:-1], (conditions[-1][0], False)) not in calls  # else it is the one call or the other
        and _is_guided(conditions[-1][0], defaults)
        for conditions in calls
    )


def _is_guided(test: str, defaults: Mapping[str, Any]) -> bool:
    """Whether the scale that a condition is about is above one by default. Some pipelines have two."""
    scales = ("true_cfg_scale", "guidance_scale")
    scale = next((defaults[s] for s in (scales if "true_cfg" in test else scales[::-1]) if s in defaults), None)
    return isinstance(scale, int | float) and scale > 1


# ---------------------------------------------------------------- what the loop over the steps calls

Conditions = tuple[tuple[str, bool], ...]
"""The tests of the `if` statements around a call, and whether it is made where they are met."""

_EITHER = "current_model"
"""What a pipeline calls whichever of its two transformers a step belongs to."""


@functools.cache
def _step_calls(call: Any) -> Mapping[str, Sequence[Conditions]]:
    """What is called within a pipeline's loop over the steps; empty where that is not in its `__call__` itself."""
    visitor = _StepCalls()
    try:
        visitor.visit(ast.parse(textwrap.dedent(inspect.getsource(call))))
    except (OSError, SyntaxError, TypeError) as error:  # defined where there is no source
        logger.info("The steps of %s cannot be read: %s", call, error)
    return visitor.found


class _StepCalls(ast.NodeVisitor):
    def __init__(self) -> None:
        self.found: dict[str, list[Conditions]] = {}
        self._conditions: Conditions = ()
        self._in_steps = False

    def visit_For(self, node: ast.For) -> None:
        self._visit_loop(node, node.iter)

    def visit_While(self, node: ast.While) -> None:
        self._visit_loop(node, node.test)

    def _visit_loop(self, node: ast.For | ast.While, over: ast.expr) -> None:
        was_in_steps = self._in_steps
        self._in_steps = was_in_steps or "step" in ast.unparse(over)
        self.generic_visit(node)
        self._in_steps = was_in_steps

    def visit_If(self, node: ast.If) -> None:
        self.visit(node.test)
        outer, test = self._conditions, ast.unparse(node.test)
        for branch, is_met in ((node.body, True), (node.orelse, False)):
            self._conditions = (*outer, (test, is_met)) if self._in_steps else outer
            for statement in branch:
                self.visit(statement)
        self._conditions = outer

    def visit_Call(self, node: ast.Call) -> None:
        if self._in_steps:
            self.found.setdefault(ast.unparse(node.func), []).append(self._conditions)
        self.generic_visit(node)


def _shares(folder: str, pipeline_class: Any) -> dict[str, float]:
    """The shares of two transformers that divide the steps: the first has those before the boundary, the noisy ones."""
    declared = _read_json(os.path.join(folder, _INDEX))
    call = getattr(pipeline_class, "__call__", None)  # noqa: B004 - as above
    second = declared.get("transformer_2")
    if call is None or _EITHER not in _step_calls(call) or not isinstance(second, list) or None in second:
        return {}
    boundary = declared.get("boundary_ratio")
    if not isinstance(boundary, int | float):
        return {"transformer": 0.5, "transformer_2": 0.5}
    scheduler = _read_json(os.path.join(folder, "scheduler", "scheduler_config.json"))
    shift = scheduler.get("flow_shift") or scheduler.get("shift") or 1.0
    after = boundary / (shift - boundary * (shift - 1))  # undoes the schedule's shift of the steps to the noisy end
    return {"transformer": 1 - after, "transformer_2": after}


def _read_json(path: str) -> dict[str, Any]:
    if not os.path.isfile(path):
        return {}
    with open(path, encoding="utf-8") as file:
        content = json.load(file)
    return content if isinstance(content, dict) else {}
