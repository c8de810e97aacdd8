"""The calls of a request to a Transformers model: which inputs it takes, and what it keeps between two of them.

The library makes its own cache in these calls, as it does in `generate`: whatever kind a model's config asks for.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from ..specs import Workload
from ..trace import Request

_CACHES = ("past_key_values", "cache_params", "state", "mems")
"""What a cache is called, as an output and as an argument."""
_TABLES = ("max_position_embeddings", "n_positions", "max_seq_len", "max_source_positions")


def request(model: nn.Module, workload: Workload) -> Request | None:
    """What `generate` (or one forward, of a model that generates nothing) calls; None for what is not known."""
    if not isinstance(model, PreTrainedModel):
        return None
    batch, context = workload.batch_size, workload.context_length
    if model.config.is_encoder_decoder:
        return _EncoderDecoder(batch, context).request()
    if model.main_input_name != "input_ids":
        return Request(lambda model, _: _keep(model(**_prompt(model, batch, context))))
    return _Decoder(batch, context).request()


class _Decoder:
    """A model of tokens: with a cache where it keeps one, else one forward."""

    def __init__(self, batch: int, context: int) -> None:
        self.batch, self.context = batch, context

    def request(self) -> Request:
        return Request(self.first, self.step)

    def first(self, model: Any, ahead: int) -> Any:
        if _sees(model):
            model.get_image_features(_pictures(model.config.vision_config, self.batch, model.dtype))
        tokens = _within(model, self.context, ahead)
        return _keep(_call(model, input_ids=_ids(self.batch, tokens)))

    def step(self, model: Any, held: Any) -> Any:
        return _keep(_call(model, input_ids=_ids(self.batch, 1), **held))


class _EncoderDecoder(_Decoder):
    """The encoder runs once, over the context; the decoder begins with one token."""

    def first(self, model: Any, ahead: int) -> Any:
        prompt = _prompt(model, self.batch, self.context)
        return _keep(_call(model, **prompt, decoder_input_ids=_ids(self.batch, 1 + ahead)))

    def step(self, model: Any, held: Any) -> Any:
        return _keep(_call(model, **held, decoder_input_ids=_ids(self.batch, 1)))


def _call(model: Any, **inputs: Any) -> Any:
    """A forward that keeps its cache, where there is one."""
    known = inspect.signature(type(model).forward).parameters
    if "use_cache" in known:
        inputs["use_cache"] = True
    return model(**inputs)


def _keep(output: Any) -> dict[str, Any]:
    """What the next call is given."""
    held = {name: value for name in _CACHES if (value := getattr(output, name, None)) is not None}
    encoded = getattr(output, "encoder_last_hidden_state", None)
    return held if encoded is None else held | {"encoder_outputs": BaseModelOutput(last_hidden_state=encoded)}


def _ids(batch: int, tokens: int) -> torch.Tensor:
    return torch.zeros(batch, tokens, dtype=torch.long)


def _within(model: Any, context: int, ahead: int) -> int:
    """So many tokens, as far as the model's table of positions goes. Rotations go on."""
    config = model.config.get_text_config()
    if getattr(config, "rope_parameters", None):
        return context + ahead
    tables = [value for name in _TABLES if isinstance(value := getattr(config, name, None), int) and value > 1]
    return min([context + ahead, *(table - 1 for table in tables)])


def _prompt(model: Any, batch: int, context: int) -> dict[str, torch.Tensor]:
    """The main input: tokens, or pictures or sounds of the size that the config gives."""
    name, config = model.main_input_name, model.config
    if name == "input_ids":
        return {name: _ids(batch, _within(model, context, 0))}
    if name == "pixel_values":
        return {name: _pictures(config, batch, model.dtype)}
    if name == "input_features":
        return {name: torch.zeros(batch, config.num_mel_bins, 2 * config.max_source_positions, dtype=model.dtype)}
    raise NotImplementedError(f"{type(model).__name__} takes {name}: not known how much of it")


def _pictures(config: Any, batch: int, dtype: torch.dtype) -> torch.Tensor:
    """One for each sequence."""
    size = config.image_size
    height, width = size if isinstance(size, tuple | list) else (size, size)
    return torch.zeros(batch, config.num_channels, height, width, dtype=dtype)


_OPTIONAL = {"vision_feature_layer", "vision_feature_select_strategy", "kwargs"}


def _sees(model: Any) -> bool:
    """Whether it has a tower that takes pictures and nothing else. (How many tokens they become depends on values.)"""
    towers = getattr(type(model), "get_image_features", None)
    config = getattr(model.config, "vision_config", None)
    if towers is None or not hasattr(config, "image_size") or not hasattr(config, "num_channels"):
        return False
    return set(inspect.signature(towers).parameters) - _OPTIONAL == {"self", "pixel_values"}
