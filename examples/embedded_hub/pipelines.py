"""Folders of pipelines to serve: a black-forest-labs/FLUX.1-schnell in miniature."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]


def write_tiny_flux(folder: str | Path, *, seed: int = 0, dtype: torch.dtype | None = None) -> Path:
    """Write a repository of black-forest-labs/FLUX.1-schnell: all its parts, two narrow layers of each kind, and random
    weights, some 5 MB in 32 bit.

    Args:
        folder: where to write; made if missing.
        seed: of the weights. The same arguments write the same files.
        dtype: of the stored weights; None: float32.

    Returns:
        The folder.
    """
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
            tokenizer=_clip_tokenizer(),
            tokenizer_2=_t5_tokenizer(),
            **_models(),
        )
    pipeline.set_progress_bar_config(disable=True)
    if dtype is not None:
        pipeline.to(dtype)
    pipeline.save_pretrained(folder, max_shard_size="1MB")
    return Path(folder)


def _models() -> dict[str, Any]:
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    clip = CLIPTextConfig(
        vocab_size=2 * len(_LETTERS) + 2,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_hidden_layers=2,
        max_position_embeddings=77,
        bos_token_id=2 * len(_LETTERS),
        eos_token_id=2 * len(_LETTERS) + 1,
    )
    t5 = T5Config(vocab_size=len(_LETTERS) + 4, d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4)
    return {
        "transformer": FluxTransformer2DModel(
            patch_size=1,
            in_channels=64,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=32,
            num_attention_heads=2,
            joint_attention_dim=128,
            pooled_projection_dim=32,
            axes_dims_rope=(8, 12, 12),
        ),
        "vae": AutoencoderKL(
            block_out_channels=(16,),
            latent_channels=16,
            norm_num_groups=8,
            shift_factor=0.1159,
            scaling_factor=0.3611,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        "text_encoder": CLIPTextModel(clip),
        "text_encoder_2": T5EncoderModel(t5),
    }


def _clip_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    words = [*_LETTERS, *(f"{letter}</w>" for letter in _LETTERS), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77)


def _t5_tokenizer() -> Any:
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *((letter, -2.0) for letter in _LETTERS)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)
