"""What the general table of `tiny` cannot know of single architectures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from transformers.models.musicgen import configuration_musicgen as musicgen
from transformers.models.musicgen_melody import configuration_musicgen_melody as musicgen_melody

Small = Callable[..., Any]
"""(configuration class, **fields) -> a small configuration of that class."""
Build = Callable[[Small], Any]
Inputs = dict[str, Any]

_SLIDING_AND_FULL = ["sliding_attention", "full_attention"] * 3
_GEMMA4 = {"layer_types": _SLIDING_AND_FULL, "num_kv_shared_layers": 2, "global_head_dim": 32}
_GRANITE_SPEECH = {"hidden_dim": 64, "output_dim": 99, "context_size": 8, "max_pos_emb": 16}

PATCHES: Mapping[str, Mapping[str, Any]] = {
    "bamba": {"attn_layer_indices": [2]},
    "blenderbot": {"encoder_layers": 6},
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "blt_local_encoder": {"hidden_size_global": 64},
    "blt_local_decoder": {"hidden_size_global": 64},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8}},
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "deepseek_v4": {
        "o_groups": 2,
        "o_lora_rank": 16,
        "partial_rotary_factor": 0.5,
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
    },
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "dots3_note_text": {
        "head_dim": 24,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 24,
        "swa_kv_lora_rank": 24,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
    },
    "dots3_note_vision_encoder": {
        "mlp_layer_types": ["dense", "sparse"] * 3,
        "num_local_experts": 4,
        "adapter_in_dim": 64,
        "adapter_out_dim": 64,
    },
    "dots3_note_audio_encoder": {"adapter_input_size": 64, "adapter_out_dim": 64, "downsample_hidden_size": 16},
    "gemma3n_text": {
        "num_kv_shared_layers": 1,
        "hidden_size_per_layer_input": 16,
        "laurel_rank": 8,
        "intermediate_size": 88,
        "activation_sparsity_pattern": [0.95] * 2 + [0.0] * 4,
    },
    "gemma4_text": {
        **_GEMMA4,
        "hidden_size_per_layer_input": 16,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
    },
    "gemma4_unified_text": _GEMMA4,
    "gemma4_vision": {"position_embedding_size": 16},
    "gemma4_unified_assistant": {
        "backbone_hidden_size": 64,
        "use_ordered_embeddings": True,
        "num_centroids": 9,
        "centroid_intermediate_top_k": 4,
    },
    "gemma4_unified_vision": {"patch_size": 4, "mm_embed_dim": 64, "mm_posemb_size": 16, "output_proj_dims": 64},
    "gemma4_unified_audio": {"audio_embed_dim": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 3]], "window_size": 4},
    "granite_speech_encoder": _GRANITE_SPEECH,
    "granite_speech_plus_encoder": _GRANITE_SPEECH,
    "granitemoehybrid": {"layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "inkling_text": {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16, "rel_extent": 8},
    "inkling2_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 16,
        "rel_extent": 8,
        "unpadded_vocab_size": 97,
    },
    "jamba": {"attn_layer_period": 3, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 3},
    "blip_2_qformer": {"encoder_hidden_size": 64},
    "fuyu": {"patch_size": 8},
    "gemma3": {"mm_tokens_per_image": 4},
    "glmasr_encoder": {"intermediate_size": 256},
    "got_ocr2_vision": {"image_size": 128, "output_channels": 16, "window_size": 4},
    "t5gemma2_encoder": {"mm_tokens_per_image": 4},
    "voxtral": {"audio_token_id": 95},
    "voxtral_encoder": {"intermediate_size": 256},
    "siglip_vision_model": {"image_size": 32},
    "git_vision_model": {"image_size": 32},
    "longcat_flash": {"head_dim": 8, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8},
    "minimax": {"block_size": 8},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron3_diarization": {"head_config": {"audio_hidden_size": 64, "hidden_size": 32}},
    "phi4_multimodal_vision": {"image_size": 56, "crop_size": 56},
    "phi4_multimodal_audio": {
        "ext_pw_out_channel": 64,
        "depthwise_separable_out_channel": 64,
        "nemo_conv_channels": 16,
    },
    "qwen3_asr_encoder": {"downsample_hidden_size": 16, "output_dim": 64},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": (8, 8),
        "axial_pos_embds_dim": (16, 48),
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "hash_seed": 0,
    },
    "roc_bert": {"shape_embed_dim": 16, "pronunciation_embed_dim": 16, "shape_vocab_size": 99},
    "xlnet": {"d_inner": 88, "d_head": 16},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "t5": {"decoder_start_token_id": 0},
    "longt5": {"decoder_start_token_id": 0},
    "switch_transformers": {"decoder_start_token_id": 0},
    "vibevoice_acoustic_tokenizer_encoder": {
        "num_filters": 4,
        "downsampling_ratios": (2, 2, 4),
        "depths": (2, 2, 2, 2),
        "hidden_size": 16,
    },
    "zamba": {"layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2},
    "zamba2": {
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2,
        "intermediate_size": 88,
        "adapter_rank": 8,
    },
}
"""Fields by the `model_type` of the configuration, or part of one, that has them."""


def _encoder_decoder(small: Small) -> Any:
    decoder = small(transformers.BertConfig, is_decoder=True, add_cross_attention=True)
    encoder = small(transformers.BertConfig)
    return transformers.EncoderDecoderConfig(
        encoder=encoder.to_dict(), decoder=decoder.to_dict(), decoder_start_token_id=1, pad_token_id=0
    )


WHOLE: Mapping[str, Build] = {
    "causal:musicgen": lambda small: small(musicgen.MusicgenDecoderConfig),
    "causal:musicgen_melody": lambda small: small(musicgen_melody.MusicgenMelodyDecoderConfig),
    "seq2seq:encoder-decoder": _encoder_decoder,
}
"""Configurations that have to be put together by hand, by architecture."""

BY_CLASS = frozenset({"causal:emu3", "causal:mllama", "causal:musicgen", "causal:musicgen_melody"})
"""Architectures that an Auto class lists, and cannot load from what they save: their own class can."""

NOT_BUILDABLE: Mapping[str, str] = {
    "causal:gemma3n": "its vision tower needs timm",
    "causal:gemma4_assistant": "this Transformers refuses every configuration of it, its own default included",
}
"""Architectures without a tiny model, and why."""

GENERATE: Mapping[str, Mapping[str, Any] | None] = {
    "causal:gemma4_unified_assistant": None,
    "causal:blt": None,
    "causal:musicgen": {"decoder_start_token_id": 0, "num_return_sequences": 1},
    "causal:musicgen_melody": {"decoder_start_token_id": 0},
    "causal:reformer": {"use_cache": False},
}
"""What `generate` needs to be told, by architecture; None: the library cannot generate with it alone."""


# ---------------------------------------------------------------- what a forward takes besides words


def _uncached(_config: Any, inputs: Inputs) -> Inputs:
    return {**inputs, "use_cache": False}


def _codebooks(config: Any, inputs: Inputs) -> Inputs:
    return {"input_ids": inputs["input_ids"].repeat_interleave(config.num_codebooks, dim=0)}


def _described_codebooks(config: Any, inputs: Inputs) -> Inputs:
    return {**_codebooks(config, inputs), "encoder_hidden_states": torch.randn(2, 5, 64)}


def _drafted(config: Any, _inputs: Inputs) -> Inputs:
    """The state of the model that an assistant drafts for; full attention has larger heads."""
    text = config.text_config
    sizes = {
        "sliding_attention": text.per_layer_config[0].head_dim,
        "full_attention": text.per_layer_config[1].head_dim,
    }
    keys = {kind: torch.randn(2, text.num_key_value_heads, 8, size) for kind, size in sizes.items()}
    return {
        "inputs_embeds": torch.randn(2, 8, 2 * config.backbone_hidden_size),
        "shared_kv_states": {kind: (states, states.flip(2)) for kind, states in keys.items()},
        "position_ids": torch.arange(8).repeat(2, 1),
    }


def _encoded(_config: Any, inputs: Inputs) -> Inputs:
    """A decoder with nothing to attend to would leave its cross-attention out."""
    return {**inputs, "encoder_hidden_states": torch.randn(2, 5, 64)}


def _heard(_config: Any, inputs: Inputs) -> Inputs:
    return {**inputs, "encoder_outputs": (torch.randn(2, 5, 64),)}


def _seen(_config: Any, inputs: Inputs) -> Inputs:
    return {**inputs, "cross_attention_states": torch.randn(2, 6, 64)}


def _streamed(config: Any, inputs: Inputs) -> Inputs:
    frames = inputs["input_ids"].shape[1] * config.audio_length_per_tok
    return {
        "input_ids": inputs["input_ids"],
        "input_features": torch.randn(2, config.audio_config.num_mel_bins, frames),
    }


def _behind(inputs: Inputs, token: int, count: int) -> Inputs:
    """The words behind `count` placeholders."""
    words = inputs["input_ids"]
    return {**inputs, "input_ids": torch.cat([torch.full((len(words), count), token), words], dim=1)}


def _picture(config: Any, inputs: Inputs) -> Inputs:
    size = config.vision_config.image_size
    return {**inputs, "pixel_values": torch.randn(2, 3, size, size)}


def _picture_of_four(config: Any, inputs: Inputs) -> Inputs:
    return _behind(_picture(config, inputs), config.image_token_id, 4)


def _encoder_picture(config: Any, inputs: Inputs) -> Inputs:
    return _behind(_picture(config.encoder, inputs), config.image_token_index, 4)


def _patches(config: Any, inputs: Inputs) -> Inputs:
    return {**_behind(inputs, config.image_token_id, 4), "image_patches": torch.randn(2, 4, 3 * config.patch_size**2)}


def _grid(height: int, width: int) -> torch.Tensor:
    return torch.cartesian_prod(torch.arange(height), torch.arange(width)).repeat(2, 1, 1)


def _picture_and_sound(config: Any, inputs: Inputs) -> Inputs:
    """18 patches, of which 9 each make one token; 32 frames, 8 tokens."""
    return {
        **_behind(_behind(inputs, config.image_token_id, 2), config.audio_token_id, 8),
        "pixel_values": torch.randn(2, 18, 3 * config.vision_config.patch_size**2),
        "image_position_ids": _grid(3, 6),
        "input_features": torch.randn(2, 32, 128),
        "input_features_mask": torch.ones(2, 32, dtype=torch.bool),
    }


def _plain_picture_and_sound(config: Any, inputs: Inputs) -> Inputs:
    return {
        **_behind(_behind(inputs, config.image_token_id, 2), config.audio_token_id, 8),
        "pixel_values": torch.randn(2, 2, 3 * config.vision_config.model_patch_size**2),
        "image_position_ids": _grid(1, 2),
        "input_features": torch.randn(2, 8, config.audio_config.audio_embed_dim),
        "input_features_mask": torch.ones(2, 8, dtype=torch.bool),
    }


def _sound(tokens: int, frames: int = 128, bands: int = 128, mask: str = "") -> Callable[[Any, Inputs], Inputs]:
    """A spectrogram of `bands` by `frames` that becomes `tokens` tokens."""

    def inputs_of(config: Any, inputs: Inputs) -> Inputs:
        made = {**_behind(inputs, config.audio_token_id, tokens), "input_features": torch.randn(2, bands, frames)}
        made.pop("decoder_input_ids", None)  # these have a decoder only
        return {**made, mask: torch.ones(2, frames, dtype=torch.long)} if mask else made

    return inputs_of


def _frames(config: Any, inputs: Inputs) -> Inputs:
    return {
        "input_ids": _behind(inputs, config.audio_token_id, 3)["input_ids"],
        "input_features": torch.randn(2, 15, config.encoder_config.input_dim),
    }


def _long_frames(config: Any, inputs: Inputs) -> Inputs:
    return {
        **_behind(inputs, config.audio_config.audio_token_id, 4),
        "audio_input_features": torch.randn(2, 32, config.audio_config.input_size),
        "audio_embed_sizes": torch.tensor([4, 4]),
    }


def _wave(config: Any, inputs: Inputs) -> Inputs:
    words = _behind(inputs, config.audio_token_id, 4)["input_ids"]
    return {"input_ids": words, "input_values": torch.randn(2, 1, 64)}


_DECODERS = "bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart prophetnet trocr"

INPUTS: Mapping[str, Callable[[Any, Inputs], Inputs]] = {
    **{f"causal:{name}": _encoded for name in _DECODERS.split()},
    "causal:blt": _uncached,
    "causal:fuyu": _patches,
    "causal:gemma3": _picture_of_four,
    "causal:gemma4": _picture_and_sound,
    "causal:gemma4_unified": _plain_picture_and_sound,
    "causal:gemma4_unified_assistant": _drafted,
    "causal:git": _picture,
    "causal:got_ocr2": _picture_of_four,
    "causal:mllama": _seen,
    "causal:moss_transcribe_diarize": _sound(16, bands=80, mask="input_features_mask"),
    "causal:musicgen": _described_codebooks,
    "causal:musicgen_melody": _codebooks,
    "causal:phi4_multimodal": _long_frames,
    "causal:whisper": _heard,
    "seq2seq:audioflamingo3": _sound(32, mask="input_features_mask"),
    "seq2seq:glmasr": _sound(16, mask="input_features_mask"),
    "seq2seq:granite_speech": _frames,
    "seq2seq:granite_speech_plus": _frames,
    "seq2seq:moss_transcribe_diarize": _sound(16, bands=80, mask="input_features_mask"),
    "seq2seq:musicflamingo": _sound(32, mask="input_features_mask"),
    "seq2seq:nemo_speechlm": _sound(16, mask="input_features_mask"),
    "seq2seq:qwen2_audio": _sound(32, mask="feature_attention_mask"),
    "seq2seq:qwen3_asr": _sound(13, frames=100, mask="input_features_mask"),
    "seq2seq:t5gemma2": _encoder_picture,
    "seq2seq:vibevoice_asr": _wave,
    "seq2seq:voxtral": _sound(16),
    "seq2seq:voxtral_realtime": _streamed,
}
"""(configuration, token ids) -> what a forward takes, by architecture."""

PROMPTS: Mapping[str, int] = {"seq2seq:voxtral_realtime": 4}
"""Tokens to generate from, by architecture, where not all of the input: speech has to be left to transcribe."""
