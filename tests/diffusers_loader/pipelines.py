"""Tiny pipelines with random weights, one for each way in which components are built and called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5Tokenizer,
)

LETTERS = [chr(c) for c in range(ord("a"), ord("z") + 1)]
PROMPT = "a cat"
SIZE = 32
"""Pixels of an image's side."""


@dataclass(frozen=True)
class Tiny:
    """A pipeline to make, and how to call it for an image, frames or sound."""

    make: Callable[[], Any]
    cls: Any
    inputs: Callable[[], dict[str, Any]] = field(default=dict)
    steps: str = "num_inference_steps"


TINY: dict[str, Tiny] = {}


def tiny(cls: Any, **inputs: Any) -> Callable[[Callable[[], dict[str, Any]]], Callable[[], dict[str, Any]]]:
    """Register the function that makes a pipeline's components. Inputs that are functions are called each time."""

    def register(components: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
        def make() -> Any:
            torch.manual_seed(0)
            pipeline = cls(**components())
            for model in pipeline.components.values():
                if isinstance(model, torch.nn.Module):
                    _scatter_buffers(model)
            return pipeline

        TINY[components.__name__] = Tiny(
            make, cls, lambda: {name: value() if callable(value) else value for name, value in inputs.items()}
        )
        return components

    return register


def _scatter_buffers(model: torch.nn.Module) -> None:
    """Statistics that a checkpoint holds should not be those that a module begins with."""
    for name, buffer in model.named_buffers():
        if name in model.state_dict() and buffer.is_floating_point():
            buffer.copy_(torch.rand_like(buffer) + 0.5)


def run(pipeline: Any, name: str, **options: Any) -> torch.Tensor:
    """What the pipeline `name` makes, the same each time: on the CPU."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(1)
    inputs = {"num_inference_steps": 2, "generator": generator, "output_type": "pt", **TINY[name].inputs(), **options}
    made = pipeline(**inputs)[0]
    made = made[0] if isinstance(made, list) else made
    return torch.as_tensor(made).float().cpu()


# ---------------------------------------------------------------- components


def picture() -> Image.Image:
    values = torch.arange(SIZE * SIZE * 3, dtype=torch.int64).remainder(251).to(torch.uint8)
    return Image.fromarray(values.view(SIZE, SIZE, 3).numpy())


def mask() -> Image.Image:
    half = torch.zeros(SIZE, SIZE, dtype=torch.uint8)
    half[:, SIZE // 2 :] = 255
    return Image.fromarray(half.numpy())


def clip_tokenizer() -> CLIPTokenizer:
    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=16)


def clip_config(**options: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=54,
        hidden_size=32,
        intermediate_size=37,
        projection_dim=32,
        num_attention_heads=4,
        num_hidden_layers=3,
        max_position_embeddings=16,
        bos_token_id=52,
        eos_token_id=53,
        **options,
    )


def clip() -> CLIPTextModel:
    return CLIPTextModel(clip_config())


def clip_projecting() -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(clip_config(hidden_act="gelu"))


def t5_tokenizer() -> T5Tokenizer:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *((letter, -2.0) for letter in LETTERS)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=16)


def t5(cls: Any = transformers.T5EncoderModel) -> Any:
    config = T5Config(vocab_size=32, d_model=32, d_kv=8, d_ff=37, num_layers=3, num_heads=4, is_gated_act=True)
    return cls(config)


def unet(**options: Any) -> diffusers.UNet2DConditionModel:
    config = {
        "block_out_channels": (4, 8),
        "layers_per_block": 1,
        "sample_size": SIZE,
        "norm_num_groups": 2,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
    }
    return diffusers.UNet2DConditionModel(**{**config, **options})


def vae(**options: Any) -> diffusers.AutoencoderKL:
    config = {
        "block_out_channels": [4, 8],
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D"],
        "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D"],
        "latent_channels": 4,
        "norm_num_groups": 2,
        "sample_size": SIZE,
    }
    return diffusers.AutoencoderKL(**{**config, **options})


def ddim() -> DDIMScheduler:
    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)


def stable_diffusion_components() -> dict[str, Any]:
    return {
        "unet": unet(),
        "scheduler": ddim(),
        "vae": vae(),
        "text_encoder": clip(),
        "tokenizer": clip_tokenizer(),
        "safety_checker": None,
        "feature_extractor": None,
    }


# ---------------------------------------------------------------- pipelines


@tiny(diffusers.StableDiffusionPipeline, prompt=PROMPT, height=SIZE, width=SIZE)
def stable_diffusion() -> dict[str, Any]:
    return stable_diffusion_components()


@tiny(diffusers.StableDiffusionImg2ImgPipeline, prompt=PROMPT, image=picture, num_inference_steps=3)
def img2img() -> dict[str, Any]:
    return stable_diffusion_components()


@tiny(diffusers.StableDiffusionInpaintPipeline, prompt=PROMPT, image=picture, mask_image=mask, height=SIZE, width=SIZE)
def inpaint() -> dict[str, Any]:
    return {**stable_diffusion_components(), "unet": unet(in_channels=9)}


@tiny(diffusers.StableDiffusionControlNetPipeline, prompt=PROMPT, image=picture)
def controlnet() -> dict[str, Any]:
    control = diffusers.ControlNetModel(
        block_out_channels=(4, 8),
        layers_per_block=1,
        in_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        conditioning_embedding_out_channels=(2, 4),
        cross_attention_dim=32,
        norm_num_groups=1,
        attention_head_dim=4,
    )
    for each in (*control.controlnet_down_blocks, control.controlnet_mid_block):
        torch.nn.init.normal_(each.weight)  # they begin as zeros, and would change nothing
    return {**stable_diffusion_components(), "controlnet": control}


@tiny(diffusers.StableDiffusionXLPipeline, prompt=PROMPT, height=SIZE, width=SIZE)
def sdxl() -> dict[str, Any]:
    return {
        "unet": unet(
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=80,
            cross_attention_dim=64,
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
            attention_head_dim=(2, 4),
        ),
        "scheduler": ddim(),
        "vae": vae(force_upcast=True),
        "text_encoder": clip(),
        "text_encoder_2": clip_projecting(),
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": clip_tokenizer(),
    }


@tiny(diffusers.StableDiffusion3Pipeline, prompt=PROMPT, height=SIZE, width=SIZE, max_sequence_length=16)
def sd3() -> dict[str, Any]:
    return {
        "transformer": diffusers.SD3Transformer2DModel(
            sample_size=16,
            patch_size=1,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pooled_projection_dim=64,
            pos_embed_max_size=16,
            out_channels=4,
        ),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "vae": vae(shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False, use_post_quant_conv=False),
        "text_encoder": clip_projecting(),
        "text_encoder_2": clip_projecting(),
        "text_encoder_3": t5(),
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": clip_tokenizer(),
        "tokenizer_3": t5_tokenizer(),
    }


@tiny(diffusers.FluxPipeline, prompt=PROMPT, height=SIZE, width=SIZE, max_sequence_length=16)
def flux() -> dict[str, Any]:
    return {
        "transformer": diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=[4, 4, 8],
        ),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "vae": vae(shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False, use_post_quant_conv=False),
        "text_encoder": clip(),
        "text_encoder_2": t5(),
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": t5_tokenizer(),
    }


@tiny(
    diffusers.Flux2KleinPipeline,
    prompt=PROMPT,
    height=SIZE,
    width=SIZE,
    max_sequence_length=16,
    text_encoder_out_layers=(1, 2),
)
def flux2() -> dict[str, Any]:
    return {
        "transformer": diffusers.Flux2Transformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=64,
            timestep_guidance_channels=32,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        ),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "vae": diffusers.AutoencoderKLFlux2(
            sample_size=SIZE,
            down_block_types=("DownEncoderBlock2D",),
            up_block_types=("UpDecoderBlock2D",),
            block_out_channels=(4,),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=1,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        "text_encoder": transformers.Qwen3ForCausalLM(
            transformers.Qwen3Config(
                vocab_size=64,
                hidden_size=32,
                intermediate_size=37,
                num_hidden_layers=3,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=16,
                tie_word_embeddings=True,
            )
        ),
        "tokenizer": chat_tokenizer(),
    }


def chat_tokenizer() -> Any:
    words = {word: i for i, word in enumerate(("<pad>", "<unk>", *PROMPT.split(), *LETTERS))}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return fast


@tiny(diffusers.PixArtSigmaPipeline, prompt=PROMPT, height=SIZE, width=SIZE, use_resolution_binning=False)
def pixart_sigma() -> dict[str, Any]:
    return {
        "transformer": diffusers.PixArtTransformer2DModel(
            sample_size=16,
            num_layers=2,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=3,
            caption_channels=32,
            in_channels=4,
            cross_attention_dim=24,
            out_channels=8,
            attention_bias=True,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
        ),
        "scheduler": ddim(),
        "vae": vae(),
        "text_encoder": t5(),
        "tokenizer": t5_tokenizer(),
    }


@tiny(
    diffusers.WanPipeline, prompt=PROMPT, height=16, width=16, num_frames=5, max_sequence_length=16, guidance_scale=3.0
)
def wan_2_2() -> dict[str, Any]:
    def transformer() -> Any:
        return diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=16,
            out_channels=16,
            text_dim=32,
            freq_dim=16,
            ffn_dim=32,
            num_layers=2,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=32,
        )

    return {
        "transformer": transformer(),
        "transformer_2": transformer(),
        "vae": diffusers.AutoencoderKLWan(
            base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        ),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0),
        "text_encoder": t5(transformers.T5EncoderModel),
        "tokenizer": t5_tokenizer(),
        "boundary_ratio": 0.875,
    }


@tiny(diffusers.LTXPipeline, prompt=PROMPT, height=32, width=32, num_frames=9, max_sequence_length=16)
def ltx() -> dict[str, Any]:
    return {
        "transformer": diffusers.LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            patch_size=1,
            patch_size_t=1,
            num_attention_heads=4,
            attention_head_dim=8,
            cross_attention_dim=32,
            num_layers=2,
            caption_channels=32,
        ),
        "vae": diffusers.AutoencoderKLLTXVideo(
            in_channels=3,
            out_channels=3,
            latent_channels=8,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
            spatio_temporal_scaling=(True, True, False, False),
            decoder_spatio_temporal_scaling=(True, True, False, False),
            decoder_inject_noise=(False, False, False, False, False),
            upsample_residual=(False, False, False, False),
            upsample_factor=(1, 1, 1, 1),
            timestep_conditioning=False,
            patch_size=1,
            patch_size_t=1,
            encoder_causal=True,
            decoder_causal=False,
        ),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "text_encoder": t5(),
        "tokenizer": t5_tokenizer(),
    }


@tiny(diffusers.CogVideoXPipeline, prompt=PROMPT, height=16, width=16, num_frames=8, max_sequence_length=16)
def cogvideox() -> dict[str, Any]:
    return {
        "transformer": diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=4,
            attention_head_dim=8,
            in_channels=4,
            out_channels=4,
            time_embed_dim=2,
            text_embed_dim=32,
            num_layers=2,
            sample_width=2,
            sample_height=2,
            sample_frames=9,
            patch_size=2,
            temporal_compression_ratio=4,
            max_text_seq_length=16,
        ),
        "vae": diffusers.AutoencoderKLCogVideoX(
            in_channels=3,
            out_channels=3,
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            temporal_compression_ratio=4,
        ),
        "scheduler": ddim(),
        "text_encoder": t5(),
        "tokenizer": t5_tokenizer(),
    }


@tiny(
    diffusers.StableVideoDiffusionPipeline, image=picture, num_frames=2, height=SIZE, width=SIZE, max_guidance_scale=2.5
)
def stable_video_diffusion() -> dict[str, Any]:
    return {
        "unet": diffusers.UNetSpatioTemporalConditionModel(
            block_out_channels=(32, 64),
            layers_per_block=1,
            sample_size=32,
            in_channels=8,
            out_channels=4,
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            cross_attention_dim=32,
            num_attention_heads=4,
            projection_class_embeddings_input_dim=96,
            addition_time_embed_dim=32,
        ),
        "scheduler": diffusers.EulerDiscreteScheduler(
            prediction_type="v_prediction", timestep_type="continuous", sigma_min=0.002, sigma_max=700.0
        ),
        "vae": diffusers.AutoencoderKLTemporalDecoder(
            block_out_channels=[32, 64],
            in_channels=3,
            out_channels=3,
            down_block_types=["DownEncoderBlock2D", "DownEncoderBlock2D"],
            latent_channels=4,
        ),
        "image_encoder": clip_vision(),
        "feature_extractor": image_processor(),
    }


def clip_vision() -> Any:
    config = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=37,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=224,
        patch_size=32,
    )
    return transformers.CLIPVisionModelWithProjection(config)


def image_processor() -> Any:
    return transformers.CLIPImageProcessor(crop_size=224, size=224)


@tiny(diffusers.KandinskyV22PriorPipeline, prompt=PROMPT)
def kandinsky_2_2_prior() -> dict[str, Any]:
    prior = diffusers.PriorTransformer(
        num_attention_heads=2,
        attention_head_dim=12,
        embedding_dim=32,
        num_layers=2,
        num_embeddings=16,
        additional_embeddings=4,
    )
    torch.nn.init.normal_(prior.clip_std)  # zeros at first
    return {
        "prior": prior,
        "image_encoder": clip_vision(),
        "text_encoder": clip_projecting(),
        "tokenizer": clip_tokenizer(),
        "scheduler": diffusers.UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample"),
        "image_processor": image_processor(),
    }


def embeds() -> torch.Tensor:
    return torch.linspace(-1, 1, 32)[None]


@tiny(
    diffusers.KandinskyV22Pipeline,
    image_embeds=embeds,
    negative_image_embeds=lambda: -embeds(),
    height=64,
    width=64,
    guidance_scale=4.0,
)
def kandinsky_2_2() -> dict[str, Any]:
    return {
        "unet": unet(
            in_channels=4,
            out_channels=8,
            addition_embed_type="image",
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            encoder_hid_dim=32,
            encoder_hid_dim_type="image_proj",
            cross_attention_dim=32,
            resnet_time_scale_shift="scale_shift",
            class_embed_type=None,
            norm_num_groups=4,
        ),
        "scheduler": ddim(),
        "movq": diffusers.VQModel(
            block_out_channels=[32, 64],
            down_block_types=["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
            in_channels=3,
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=8,
            norm_type="spatial",
            num_vq_embeddings=12,
            out_channels=3,
            up_block_types=["AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
            vq_embed_dim=4,
        ),
    }


@tiny(diffusers.StableAudioPipeline, prompt=PROMPT, audio_end_in_s=1.0)
def stable_audio() -> dict[str, Any]:
    from diffusers.pipelines.stable_audio import StableAudioProjectionModel

    return {
        "transformer": diffusers.StableAudioDiTModel(
            sample_size=4,
            in_channels=3,
            num_layers=2,
            attention_head_dim=4,
            num_key_value_attention_heads=2,
            out_channels=3,
            cross_attention_dim=4,
            time_proj_dim=8,
            global_states_input_dim=8,
            cross_attention_input_dim=4,
        ),
        "scheduler": diffusers.EDMDPMSolverMultistepScheduler(
            solver_order=2, prediction_type="v_prediction", sigma_data=1.0, sigma_schedule="exponential"
        ),
        "vae": diffusers.AutoencoderOobleck(
            encoder_hidden_size=6,
            downsampling_ratios=[1, 2],
            decoder_channels=3,
            decoder_input_channels=3,
            audio_channels=2,
            channel_multiples=[2, 4],
            sampling_rate=4,
        ),
        "projection_model": StableAudioProjectionModel(
            text_encoder_dim=32, conditioning_dim=4, min_value=0, max_value=32
        ),
        "text_encoder": t5(),
        "tokenizer": t5_tokenizer(),
    }


def weight_bytes(folder: Path) -> int:
    """Bytes of a pipeline's weights files."""
    return sum(file.stat().st_size for file in folder.glob("*/*.safetensors"))


def denoiser_of(name: str) -> str:
    return next(n for n in ("transformer", "unet", "prior") if n in TINY[name].make().components)


def write_lora(pipeline: Any, folder: Path) -> None:
    from peft import LoraConfig  # needs accelerate
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(5)
    targets = ["to_q", "to_k", "to_v", "proj_out", "x_embedder"]
    pipeline.transformer.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=targets))
    pipeline.save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(pipeline.transformer))
