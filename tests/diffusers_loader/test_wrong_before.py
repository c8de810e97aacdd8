"""What the library and Accelerate get wrong by themselves, or refuse, with a device map: each is right here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

import hf_bigload
from hf_bigload.errors import DeviceMapError, WeightsMismatchError
from hf_bigload.loaders.diffusers_pipelines import models_of, plan_of

from .conftest import Plain, Saved, load
from .pipelines import TINY, run, weight_bytes, write_lora

ON_DISK = {"": "disk"}
Loads = Callable[..., Any]


@pytest.fixture
def on_disk(saved: Saved) -> Loads:
    """`on_disk("flux", torch_dtype=...)`: that pipeline with all weights on disk."""

    def load_on_disk(name: str, **options: Any) -> Any:
        hf_bigload.enable()
        pipeline = load(saved(name), name, device_map=ON_DISK, **options)
        hf_bigload.disable()
        return pipeline

    return load_on_disk


def test_01_buffers_that_a_checkpoint_holds_have_its_values(on_disk: Loads, saved: Saved) -> None:
    reference = load(saved("flux2"), "flux2").vae.bn
    ours = on_disk("flux2").vae.bn
    assert torch.equal(ours.running_mean, reference.running_mean) and ours.running_mean.abs().sum() > 0
    latents_mean = load(saved("ltx"), "ltx").vae.latents_mean
    assert torch.equal(on_disk("ltx").vae.latents_mean, latents_mean)


def test_02_modules_kept_in_fp32_stay_so_on_disk(on_disk: Loads, saved: Saved) -> None:
    reference = load(saved("wan_2_2"), "wan_2_2", torch_dtype=torch.bfloat16).transformer
    ours = on_disk("wan_2_2", torch_dtype=torch.bfloat16).transformer
    dtypes = {name: parameter.dtype for name, parameter in reference.named_parameters()}
    assert {name: parameter.dtype for name, parameter in ours.named_parameters()} == dtypes
    assert set(dtypes.values()) == {torch.bfloat16, torch.float32}


def test_03_two_models_may_share_an_offload_folder(saved: Saved, plain: Plain, tmp_path: Path) -> None:
    expected = plain("wan_2_2", torch_dtype=torch.bfloat16)
    hf_bigload.enable()
    options = {"device_map": ON_DISK, "torch_dtype": torch.bfloat16, "offload_folder": str(tmp_path)}
    one, other = (load(saved("wan_2_2"), "wan_2_2", **options) for _ in range(2))
    assert torch.equal(run(one, "wan_2_2"), expected)
    assert torch.equal(run(other, "wan_2_2"), expected)


def test_04_max_memory_is_for_the_pipeline_and_holds_on_a_cpu(saved: Saved) -> None:
    budget = weight_bytes(saved("sdxl")) * 6 // 10
    hf_bigload.enable()
    pipeline = load(saved("sdxl"), "sdxl", device_map="auto", max_memory={"cpu": budget})
    plan = plan_of(pipeline)
    assert plan is not None and plan.used["cpu"] <= budget
    resting = sum(
        tensor.nbytes
        for model in models_of(pipeline)
        for tensor in (*model.parameters(), *model.buffers())
        if not _is_on_disk(model, tensor)
    )
    assert resting + plan.ring["cpu"] <= budget


def _is_on_disk(model: Any, tensor: torch.Tensor) -> bool:
    attachment = model.__dict__.get("_hf_bigload")
    return attachment is not None and tensor in attachment.executor.on_disk


def test_05_the_execution_device_is_never_meta(on_disk: Loads) -> None:
    pipeline = on_disk("flux")
    assert pipeline._execution_device == pipeline.device == torch.device("cpu")
    assert not any(p.is_meta for model in models_of(pipeline) for p in model.parameters())


def test_06_sequential_offload_takes_no_hook_off(on_disk: Loads, plain: Plain) -> None:
    pipeline = on_disk("flux")
    hf_bigload.enable()
    pipeline.enable_sequential_cpu_offload()
    assert all(hf_bigload.inspect(model) for model in models_of(pipeline))
    hf_bigload.disable()
    assert torch.equal(run(pipeline, "flux"), plain("flux"))


def test_07_the_vae_of_sdxl_is_upcast_and_cast_back(on_disk: Loads, plain: Plain) -> None:
    pipeline = on_disk("sdxl", torch_dtype=torch.float16)
    assert pipeline.vae.config.force_upcast
    expected = plain("sdxl", torch_dtype=torch.float16)
    assert torch.equal(run(pipeline, "sdxl"), expected)
    assert torch.equal(run(pipeline, "sdxl"), expected)
    assert pipeline.vae.dtype == torch.float16


def test_08_a_lora_loaded_after_dispatch_counts(on_disk: Loads, saved: Saved, plain: Plain, tmp_path: Path) -> None:
    write_lora(TINY["flux"].make(), tmp_path)
    reference, ours = load(saved("flux"), "flux"), on_disk("flux")
    for pipeline in (reference, ours):
        pipeline.load_lora_weights(tmp_path)
    made = run(ours, "flux")
    assert torch.equal(made, run(reference, "flux")) and not torch.equal(made, plain("flux"))
    for pipeline in (reference, ours):
        pipeline.fuse_lora(lora_scale=0.5)
    assert torch.equal(run(ours, "flux"), run(reference, "flux"))
    for pipeline in (reference, ours):
        pipeline.unfuse_lora()
        pipeline.unload_lora_weights()
    assert torch.equal(run(ours, "flux"), run(reference, "flux"))


def test_09_layerwise_casting_and_fused_projections_compute_the_same(on_disk: Loads, saved: Saved) -> None:
    def prepared(pipeline: Any) -> list[torch.Tensor]:
        pipeline.transformer.fuse_qkv_projections()
        fused = run(pipeline, "flux")
        pipeline.transformer.unfuse_qkv_projections()
        options = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.float32}
        pipeline.transformer.enable_layerwise_casting(**options)
        return [fused, run(pipeline, "flux"), run(pipeline, "flux")]

    reference, ours = prepared(load(saved("flux"), "flux")), prepared(on_disk("flux"))
    assert all(torch.equal(one, other) for one, other in zip(reference, ours, strict=True))
    assert not torch.equal(reference[0], reference[1])


def test_10_tied_embeddings_stay_tied_on_disk_and_group_offload_is_not_laid_over(on_disk: Loads, plain: Plain) -> None:
    encoder = (pipeline := on_disk("flux")).text_encoder_2
    assert encoder.shared.weight is encoder.encoder.embed_tokens.weight
    assert torch.equal(run(pipeline, "flux"), plain("flux"))
    with hf_bigload.enable(), pytest.raises(DeviceMapError):
        pipeline.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")


def test_11_a_missing_key_is_named_before_anything_is_loaded(saved: Saved, tmp_path: Path) -> None:
    load(saved("flux"), "flux").save_pretrained(tmp_path)
    file = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["single_transformer_blocks.1.proj_mlp.weight"]
    save_file(tensors, file)
    hf_bigload.enable()
    with pytest.raises(WeightsMismatchError, match=r"lacks 1 of .* single_transformer_blocks.1.proj_mlp.weight"):
        load(tmp_path, "flux", device_map=ON_DISK)


@pytest.mark.parametrize("safe", [True, False])
def test_12_auto_is_the_checkpoints_dtype_for_all_components(safe: bool, tmp_path: Path) -> None:
    TINY["flux"].make().to(torch.bfloat16).save_pretrained(tmp_path, safe_serialization=safe)
    hf_bigload.enable()
    pipeline = load(tmp_path, "flux", device_map="auto", torch_dtype="auto")
    assert {model.dtype for model in models_of(pipeline)} == {torch.bfloat16}


def test_12_none_is_what_the_library_makes_of_it_for_each(tmp_path: Path) -> None:
    TINY["flux"].make().to(torch.bfloat16).save_pretrained(tmp_path)
    reference = [model.dtype for model in models_of(load(tmp_path, "flux"))]
    hf_bigload.enable()
    assert [model.dtype for model in models_of(load(tmp_path, "flux", device_map=ON_DISK))] == reference


def test_13_from_pipe_takes_a_placed_pipeline(on_disk: Loads, saved: Saved) -> None:
    pipeline = on_disk("stable_diffusion")
    reference = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(load(saved("stable_diffusion"), "stable_diffusion"))
    with hf_bigload.enable():
        ours = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipeline)
    assert torch.equal(run(ours, "img2img"), run(reference, "img2img"))


def test_14_group_offload_of_a_placed_model_is_refused(on_disk: Loads) -> None:
    pipeline = on_disk("stable_diffusion")
    with hf_bigload.enable(), pytest.raises(DeviceMapError, match="already"):
        pipeline.unet.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    assert not any(hasattr(module, "_diffusers_hook") for module in pipeline.unet.modules())


def test_15_a_single_file_follows_its_device_map(saved: Saved, tmp_path: Path) -> None:
    folder = saved("flux") / "transformer"
    file = folder / "diffusion_pytorch_model.safetensors"
    cls, options = diffusers.FluxTransformer2DModel, {"config": str(folder), "torch_dtype": torch.bfloat16}
    reference = cls.from_single_file(str(file), **options)
    hf_bigload.enable()
    ours = cls.from_single_file(str(file), device_map="auto", max_memory={"cpu": 180_000}, **options)
    plan = hf_bigload.inspect(ours).plan
    assert plan.streams and plan.used["cpu"] <= 180_000
    weights = ours.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in reference.state_dict().items())
    pipelines = [
        load(saved("flux"), "flux", transformer=each, torch_dtype=torch.bfloat16) for each in (reference, ours)
    ]
    assert torch.equal(*(run(pipeline, "flux") for pipeline in pipelines))


def test_15_a_pipeline_in_a_single_file_does_not_drop_its_device_map_silently(tmp_path: Path) -> None:
    hf_bigload.enable()
    with pytest.raises(DeviceMapError, match="from_single_file follows no device_map"):
        diffusers.StableDiffusionPipeline.from_single_file(str(tmp_path / "model.safetensors"), device_map="auto")


@pytest.mark.parametrize(
    "method",
    [
        lambda pipeline, folder: pipeline.to("cpu"),
        lambda pipeline, folder: pipeline.save_pretrained(folder),
        lambda pipeline, folder: pipeline.reset_device_map(),
        lambda pipeline, folder: pipeline.enable_model_cpu_offload(),
        lambda pipeline, folder: pipeline.enable_sequential_cpu_offload(),
    ],
    ids=["to", "save_pretrained", "reset_device_map", "enable_model_cpu_offload", "enable_sequential_cpu_offload"],
)
def test_16_methods_of_a_placed_pipeline_work(method: Any, on_disk: Loads, plain: Plain, tmp_path: Path) -> None:
    pipeline = on_disk("stable_diffusion")
    with hf_bigload.enable():
        method(pipeline, tmp_path)
    assert torch.equal(run(pipeline, "stable_diffusion"), plain("stable_diffusion"))
