"""Flux pipelines with random weights: tiny, or with the real widths and as many layers as asked for."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Depth:
    """How many layers there are, of the width that the published models have; None: tiny in everything."""

    double: int
    single: int
    t5: int


SIZES: dict[str, Depth | None] = {"tiny": None, "short": Depth(4, 8, 6), "flux": Depth(19, 38, 24)}
"""`short` has 7.9 GB in bf16, `flux` 33.7 GB: FLUX.1-schnell with T5-XXL and CLIP-L."""


def ensure_pipeline(size: str, folder: Path, device: torch.device) -> Path:
    """`folder`, with a pipeline of this size; its weights are made on `device` where they are many.

    A folder whose `model_index.json` exists is complete: that file is written last.
    """
    from tests.diffusers_loader.pipelines import TINY

    if (folder / "model_index.json").exists():
        return folder
    depth = SIZES[size]
    pipeline = TINY["flux"].make() if depth is None else flux(depth, device)
    pipeline.save_pretrained(folder)
    del pipeline
    if depth is not None and device.type != "cpu":
        gc.collect()
        torch.get_device_module(device).empty_cache()  # the processes that are measured need it
    return folder


def dtype_of(size: str) -> torch.dtype:
    return torch.float32 if SIZES[size] is None else torch.bfloat16


def flux(depth: Depth, device: torch.device) -> Any:
    """A pipeline in bf16, made on `device`."""
    import diffusers

    from tests.diffusers_loader.pipelines import clip_tokenizer, t5_tokenizer

    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            models = {**_denoiser_and_vae(depth), **_encoders(depth)}
    finally:
        torch.set_default_dtype(default)
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        tokenizer=clip_tokenizer(),
        tokenizer_2=t5_tokenizer(),
        **models,
    )


def _denoiser_and_vae(depth: Depth) -> dict[str, Any]:
    from diffusers import AutoencoderKL, FluxTransformer2DModel

    widths = [128, 256, 512, 512]
    return {
        "transformer": FluxTransformer2DModel(num_layers=depth.double, num_single_layers=depth.single),
        "vae": AutoencoderKL(
            block_out_channels=widths,
            down_block_types=["DownEncoderBlock2D"] * len(widths),
            up_block_types=["UpDecoderBlock2D"] * len(widths),
            layers_per_block=2,
            latent_channels=16,
            sample_size=1024,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
    }


def _encoders(depth: Depth) -> dict[str, Any]:
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    clip = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, eos_token_id=53
    )
    t5 = T5Config(d_model=4096, d_kv=64, d_ff=10240, num_heads=64, num_layers=depth.t5, feed_forward_proj="gated-gelu")
    return {"text_encoder": CLIPTextModel(clip), "text_encoder_2": T5EncoderModel(t5)}
