"""Random models of every architecture the Auto classes know, small enough to build, save and compare in a second.

One table of small values, by the names that configurations use (`SMALL`), shrinks almost all of them; `PATCHES` is for
the ones whose fields depend on one another. Layers are many and vocabularies short, so that a budget below half of the
model still holds its largest block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from .patches import BY_CLASS, INPUTS, PATCHES, WHOLE

VOCABULARY = 99
FIRST_WORD, LAST_WORD = 10, 80
"""Ids that are no special token in any of the models."""

_KINDS: Mapping[str, tuple[Any, Any]] = {
    "causal": (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
    "seq2seq": (AutoModelForSeq2SeqLM, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING),
}


def _values(value: Any, names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


SMALL: Mapping[str, Any] = {
    **_values(VOCABULARY, "vocab_size src_vocab_size tgt_vocab_size vocab_size_per_layer_input n_words"),
    **_values(64, "hidden_size d_model n_embd dim emb_dim embedding_size input_embedding_size output_embedding_size"),
    **_values(
        88,
        "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim d_ff n_inner ffn_hidden_size feed_forward_size "
        "dense_intermediate_size prefix_dense_intermediate_size intermediate_size_mlp dim_ff dff mlp_dim",
    ),
    **_values(
        32,
        "moe_intermediate_size shared_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size "
        "shared_experts_intermediate_size moe_shared_expert_intermediate_size",
    ),
    **_values(
        6,
        "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers "
        "num_encoder_layers",
    ),
    **_values(3, "depth num_global_layers conf_num_hidden_layers speech_encoder_layers t2u_encoder_layers"),
    **_values(
        4,
        "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads "
        "num_encoder_attention_heads num_decoder_attention_heads speech_encoder_attention_heads index_n_heads "
        "conf_num_attention_heads",
    ),
    **_values(2, "num_key_value_heads num_kv_heads"),
    **_values(16, "head_dim d_kv dim_head kv_channels attention_head_size v_head_dim qk_nope_head_dim index_head_dim"),
    **_values(8, "qk_rope_head_dim rotary_dim"),
    **_values(24, "q_lora_rank kv_lora_rank"),
    **_values(4, "num_experts n_routed_experts num_local_experts moe_num_experts"),
    **_values(2, "num_experts_per_tok moe_topk moe_k moe_top_k top_k_experts index_topk expert_capacity"),
    **_values(1, "n_group topk_group n_shared_experts num_shared_experts first_k_dense_replace"),
    **_values(64, "max_position_embeddings n_positions max_source_positions max_target_positions max_seq_len n_ctx"),
    **_values(8, "sliding_window sliding_window_size attention_window_size chunk_size mamba_chunk_size"),
    **_values(8, "mamba_d_state state_size ssm_state_size linear_num_value_heads mamba_n_heads mamba_num_heads"),
    **_values(4, "linear_num_key_heads linear_num_heads mamba_n_groups n_groups"),
    **_values(16, "linear_key_head_dim linear_value_head_dim linear_head_dim mamba_head_dim"),
}

_SPECIAL = {"pad": 0, "bos": 1, "eos": 2, "decoder_start": 3, "sep": 4, "cls": 5, "mask": 6}


@dataclass(frozen=True)
class Architecture:
    """One entry of an Auto class."""

    kind: str
    config_class: type[PreTrainedConfig]
    model_class: type[PreTrainedModel]

    @property
    def name(self) -> str:
        return f"{self.kind}:{self.config_class.model_type}"

    @property
    def auto(self) -> Any:
        """What a user loads it with."""
        return self.model_class if self.name in BY_CLASS else _KINDS[self.kind][0]


def architectures() -> Iterator[Architecture]:
    """Every causal and every sequence-to-sequence architecture of the installed Transformers."""
    for kind, (_auto, mapping) in _KINDS.items():
        for config_class, model_class in dict(mapping.items()).items():  # two names may share a configuration
            first = model_class[0] if isinstance(model_class, tuple) else model_class
            yield Architecture(kind, config_class, first)


def architecture(name: str) -> Architecture:
    """The one of that name ("causal:llama")."""
    return next(a for a in architectures() if a.name == name)


def tiny_model(which: Architecture, seed: int = 0) -> PreTrainedModel:
    """A random model in evaluation mode. No weight keeps a value that another weight has too (no ones, no zeros)."""
    torch.manual_seed(seed)
    config = tiny_config(which.config_class, which.name)
    owned = type(config) is which.model_class.config_class
    model = (which.model_class(config) if owned else _KINDS[which.kind][0].from_config(config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def tiny_inputs(which: Architecture, model: PreTrainedModel, seed: int = 0) -> dict[str, Any]:
    """What its forward takes."""
    torch.manual_seed(seed)
    words = torch.randint(FIRST_WORD, LAST_WORD, (2, 8))
    inputs: dict[str, Any] = {"input_ids": words}
    if which.kind == "seq2seq":
        inputs["decoder_input_ids"] = words.flip(1)
    make = INPUTS.get(which.name)
    return _as_computed(inputs if make is None else make(model.config, inputs), model.dtype)


def _as_computed(value: Any, dtype: torch.dtype) -> Any:
    """Pictures and sounds in the dtype of the weights that they meet."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: _as_computed(inner, dtype) for name, inner in value.items()}
    return tuple(_as_computed(inner, dtype) for inner in value) if isinstance(value, tuple) else value


def tiny_config(config_class: type[PreTrainedConfig], name: str = "") -> PreTrainedConfig:
    """`config_class` with small values, its own rules for derived fields applied to them."""
    whole = WHOLE.get(name)
    return _small(config_class) if whole is None else whole(_small)


def _small(config_class: type[PreTrainedConfig], **fields: Any) -> PreTrainedConfig:
    return config_class(**{**_small_fields(config_class), **fields})


def _small_fields(config_class: type[PreTrainedConfig], given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    chosen = dict(given or {})
    defaults = {f.name: f.default for f in dataclasses.fields(config_class) if f.default is not dataclasses.MISSING}
    for name, default in {**defaults, **chosen}.items():
        if isinstance(default, int) and not isinstance(default, bool):
            chosen.update(_small_value(name, default))
    if "num_key_value_heads" in chosen and _ungrouped(defaults):
        chosen["num_key_value_heads"] = chosen.get("num_attention_heads", SMALL["num_attention_heads"])
    chosen.update(_small_parts(config_class))
    chosen.update(PATCHES.get(config_class.model_type, {}))
    return chosen


def _ungrouped(defaults: Mapping[str, Any]) -> bool:
    """Whether each query head has keys of its own."""
    return defaults["num_key_value_heads"] == defaults.get("num_attention_heads")


def _small_value(name: str, default: int) -> dict[str, int]:
    if name in SMALL:
        return {name: min(default, SMALL[name])}
    if name.endswith(("_token_id", "_token_index")) and default >= LAST_WORD:
        return {name: _special(name)}
    return {}


def _special(name: str) -> int:
    """The same id wherever the name appears: a part's configuration has to agree with the whole's."""
    role = name.removesuffix("_token_id").removesuffix("_token_index")
    if role in _SPECIAL:
        return _SPECIAL[role]
    return LAST_WORD + sum(map(ord, role)) % (VOCABULARY - LAST_WORD)


def _small_parts(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    if not config_class.sub_configs:
        return {}
    whole = config_class()
    given = {name: spec.init_kwargs for name, spec in config_class.sub_configs_defaults.items()}
    parts = {}
    for name, part_class in config_class.sub_configs.items():
        part = getattr(whole, name, None)  # None: a part that models of this kind may lack
        kind = type(part) if isinstance(part, PreTrainedConfig) else part_class
        if kind is not AutoConfig:
            parts[name] = {**_small_fields(kind, given.get(name)), "model_type": kind.model_type}
    return parts
