"""What people do with a pipeline after it was placed: it works, or an error says what to do instead."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from peft import LoraConfig

import hf_bigload
from hf_bigload.dispatch import attach
from hf_bigload.dispatch.attach import attachment_of
from hf_bigload.errors import BudgetError, DeviceMapError, DoesNotFitError
from hf_bigload.loaders.calls import turn
from hf_bigload.loaders.diffusers_pipelines import models_of, plan_of

from .conftest import Plain, Saved, load
from .pipelines import run

ON_DISK = {"": "disk"}


@pytest.fixture
def expected(plain: Plain) -> torch.Tensor:
    """The plain image."""
    return plain("flux")


@pytest.fixture
def pipeline(saved: Saved, expected: torch.Tensor) -> Any:
    """All on disk, with the plugin on."""
    hf_bigload.enable()
    return load(saved("flux"), "flux", device_map=ON_DISK)


def is_plain(pipeline: Any) -> bool:
    return pipeline.hf_device_map is None and not any(attachment_of(model) for model in models_of(pipeline))


def test_to_a_device_makes_it_a_plain_pipeline(pipeline: Any, expected: torch.Tensor) -> None:
    assert pipeline.to("cpu") is pipeline
    assert is_plain(pipeline)
    assert torch.equal(run(pipeline, "flux"), expected)


def test_to_a_dtype_keeps_it_placed(pipeline: Any, saved: Saved) -> None:
    hf_bigload.disable()
    cast = run(load(saved("flux"), "flux").to(torch.bfloat16), "flux")
    hf_bigload.enable()
    pipeline.to(torch.bfloat16)
    assert not is_plain(pipeline)
    assert torch.equal(run(pipeline, "flux"), cast)


def test_what_does_not_fit_a_device_together_is_refused_before_anything_moves(
    pipeline: Any, expected: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = max(sum(p.nbytes for p in model.parameters()) for model in models_of(pipeline))
    monkeypatch.setattr(attach, "free_ram", lambda: largest + 1000)
    with pytest.raises(DoesNotFitError, match="Nothing was moved"):
        pipeline.to("cpu")
    assert all(attachment_of(model) is not None for model in models_of(pipeline))
    assert torch.equal(run(pipeline, "flux"), expected)


def test_reset_device_map_makes_it_a_plain_pipeline(pipeline: Any, expected: torch.Tensor) -> None:
    pipeline.reset_device_map()
    assert is_plain(pipeline)
    assert torch.equal(run(pipeline, "flux"), expected)


def test_remove_all_hooks_leaves_it_working(pipeline: Any, expected: torch.Tensor) -> None:
    pipeline.remove_all_hooks()
    assert torch.equal(run(pipeline, "flux"), expected)


@pytest.mark.parametrize("method", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading_that_is_asked_for_is_what_it_does_already(
    method: str, pipeline: Any, expected: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    getattr(pipeline, method)()
    assert method in caplog.text and "reset_device_map()" in caplog.text
    assert torch.equal(run(pipeline, "flux"), expected)


def test_group_offloading_is_refused_and_works_after_a_reset(pipeline: Any, expected: torch.Tensor) -> None:
    options = {"onload_device": torch.device("cpu"), "offload_type": "leaf_level"}
    with pytest.raises(DeviceMapError, match="reset_device_map"):
        pipeline.enable_group_offload(**options)
    with pytest.raises(DeviceMapError, match="FluxTransformer2DModel"):
        pipeline.transformer.enable_group_offload(**options)
    assert torch.equal(run(pipeline, "flux"), expected)
    pipeline.reset_device_map()
    pipeline.enable_group_offload(**options)
    assert torch.equal(run(pipeline, "flux"), expected)


def test_save_pretrained_writes_what_a_plain_pipeline_writes(pipeline: Any, saved: Saved, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path / "ours", max_shard_size="100KB")
    hf_bigload.disable()
    load(saved("flux"), "flux").save_pretrained(tmp_path / "plain", max_shard_size="100KB")
    files = [file.relative_to(tmp_path / "plain") for file in (tmp_path / "plain").glob("*/*.safetensors")]
    assert len(files) > 4
    assert all((tmp_path / "ours" / f).read_bytes() == (tmp_path / "plain" / f).read_bytes() for f in files)


def test_saving_over_the_folder_it_streams_from(saved: Saved, expected: torch.Tensor, tmp_path: Path) -> None:
    load(saved("flux"), "flux").save_pretrained(tmp_path)
    with hf_bigload.enable():
        pipeline = load(tmp_path, "flux", device_map=ON_DISK)
        pipeline.save_pretrained(tmp_path)
        assert torch.equal(run(pipeline, "flux"), expected)
    assert torch.equal(run(load(tmp_path, "flux"), "flux"), expected)


def test_from_pipe_shares_components_and_plan(saved: Saved, plain: Plain) -> None:
    text_to_image, image_to_image = plain("stable_diffusion"), plain("img2img")
    hf_bigload.enable()
    pipeline = load(saved("stable_diffusion"), "stable_diffusion", device_map=ON_DISK)
    other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipeline)
    assert other.unet is pipeline.unet and other.hf_device_map == pipeline.hf_device_map
    assert torch.isfinite(image_to_image).all()
    hf_bigload.disable()
    reference = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(load(saved("stable_diffusion"), "stable_diffusion"))
    hf_bigload.enable()
    assert torch.equal(run(other, "img2img"), run(reference, "img2img"))
    assert torch.equal(run(pipeline, "stable_diffusion"), text_to_image)
    other.to("cpu")
    assert is_plain(other)


def made_of(pipeline: Any) -> Any:
    return type(pipeline)(**pipeline.components)


@pytest.mark.parametrize("other", [made_of, diffusers.AutoPipelineForImage2Image.from_pipe])
def test_any_pipeline_made_of_placed_components_is_a_placed_one(other: Any, saved: Saved, plain: Plain) -> None:
    expected = plain("stable_diffusion")
    hf_bigload.enable()
    first = load(saved("stable_diffusion"), "stable_diffusion", device_map=ON_DISK)
    pipeline = other(first)
    assert plan_of(pipeline) is plan_of(first) is not None
    pipeline.remove_all_hooks()
    with pytest.raises(DeviceMapError, match="reset_device_map"):
        pipeline.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    assert torch.equal(run(first, "stable_diffusion"), expected)
    pipeline.reset_device_map()
    assert is_plain(pipeline) and is_plain(first) and plan_of(first) is None
    assert first.to("cpu") is first
    assert torch.equal(run(first, "stable_diffusion"), expected)


def test_a_copy_is_reset_by_itself(pipeline: Any, expected: torch.Tensor) -> None:
    copied = copy.deepcopy(pipeline)
    assert plan_of(copied) is not None
    made = run(copied, "flux")
    copied.reset_device_map()
    assert is_plain(copied) and not is_plain(pipeline)
    assert torch.equal(run(pipeline, "flux"), expected)
    assert torch.equal(run(copied, "flux"), made)


def test_components_made_before_are_used_as_they_are(saved: Saved, expected: torch.Tensor) -> None:
    hf_bigload.enable()
    folder = saved("flux")
    transformer = diffusers.FluxTransformer2DModel.from_pretrained(folder / "transformer", device_map=ON_DISK)
    pipeline = load(folder, "flux", device_map="auto", transformer=transformer, max_memory={"cpu": 600_000})
    assert pipeline.transformer is transformer and attachment_of(transformer) is not None
    assert torch.equal(run(pipeline, "flux"), expected)


def test_a_component_of_two_pipelines_is_reset_with_both(pipeline: Any, saved: Saved, expected: torch.Tensor) -> None:
    other = load(saved("flux"), "flux", device_map=ON_DISK, transformer=pipeline.transformer)
    assert plan_of(other) is not plan_of(pipeline)
    other.reset_device_map()
    assert is_plain(other) and is_plain(pipeline)
    assert torch.equal(run(pipeline, "flux"), expected)


def test_inspect_says_to_look_at_components(pipeline: Any) -> None:
    with pytest.raises(ValueError, match="components one by one"):
        hf_bigload.inspect(pipeline)
    assert hf_bigload.inspect(pipeline.vae).plan.streams


def test_a_component_may_be_moved_by_itself(pipeline: Any, expected: torch.Tensor) -> None:
    pipeline.text_encoder_2.to("cpu")
    assert attachment_of(pipeline.text_encoder_2) is None
    assert torch.equal(run(pipeline, "flux"), expected)


def test_a_copy_makes_what_a_copy_of_a_plain_pipeline_makes(pipeline: Any, saved: Saved) -> None:
    hf_bigload.disable()
    reference = copy.deepcopy(load(saved("flux"), "flux"))
    hf_bigload.enable()
    assert torch.equal(run(copy.deepcopy(pipeline), "flux"), run(reference, "flux"))


def test_a_placed_pipeline_goes_on_working_when_the_plugin_goes_off(pipeline: Any, expected: torch.Tensor) -> None:
    hf_bigload.disable()
    assert torch.equal(run(pipeline, "flux"), expected)


@pytest.mark.parametrize("cls", [diffusers.FluxPipeline, diffusers.AutoencoderKL])
def test_a_default_map_is_ignored_where_the_library_can_follow_none(cls: Any, saved: Saved) -> None:
    options = {} if cls is diffusers.FluxPipeline else {"subfolder": "vae"}
    hf_bigload.enable(device_map=ON_DISK)
    loaded = cls.from_pretrained(saved("flux"), low_cpu_mem_usage=False, **options)
    models = models_of(loaded) if cls is diffusers.FluxPipeline else [loaded]
    assert not any(attachment_of(model) for model in models)
    with pytest.raises(ValueError, match="low_cpu_mem_usage"):
        cls.from_pretrained(saved("flux"), low_cpu_mem_usage=False, device_map=ON_DISK, **options)


def test_a_pipeline_that_loads_others_gets_no_default_map(
    saved: Saved, expected: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diffusers.FluxPipeline, "_load_connected_pipes", True)
    hf_bigload.enable(device_map=ON_DISK)
    pipeline = load(saved("flux"), "flux")
    assert is_plain(pipeline)
    assert torch.equal(run(pipeline, "flux"), expected)
    with pytest.raises(NotImplementedError, match="connected"):
        load(saved("flux"), "flux", device_map=ON_DISK)


def test_others_may_load_while_one_downloads(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    free, load_config = [], diffusers.FluxPipeline.load_config

    def downloads(folder: Path, *args: Any, **kwargs: Any) -> Any:
        with ThreadPoolExecutor(1) as other:
            free.append(other.submit(lambda: turn.acquire(blocking=False) and not turn.release()).result())
        return load_config(folder, *args, **kwargs)

    monkeypatch.setattr(diffusers.FluxPipeline, "load_config", downloads)
    hf_bigload.enable()
    load(saved("flux"), "flux", device_map=ON_DISK)
    assert free and all(free)


def test_a_component_is_replanned_by_a_budget_of_its_own_only(pipeline: Any, expected: torch.Tensor) -> None:
    with pytest.raises(BudgetError, match="load the pipeline again"):
        hf_bigload.inspect(pipeline.transformer).replan()
    assert torch.equal(run(pipeline, "flux"), expected)
    replanned = hf_bigload.inspect(pipeline.transformer).replan(max_memory={"cpu": "1GB"})
    assert {p.home for p in replanned.plan.placements} == {"cpu"}
    assert torch.equal(run(pipeline, "flux"), expected)
    with pytest.raises(BudgetError, match="load the pipeline again"):
        replanned.replan()


def test_names_in_a_map_that_the_pipeline_does_not_have_are_told(
    saved: Saved, caplog: pytest.LogCaptureFixture
) -> None:
    hf_bigload.enable()
    known = {"": "cpu", "vae": "disk", "transformer.single_transformer_blocks.0": "disk"}
    load(saved("flux"), "flux", device_map=known)
    assert "device_map names" not in caplog.text
    load(saved("flux"), "flux", device_map={**known, "unet": "disk", "vae.encodre": "disk"})
    assert "unet, vae.encodre" in caplog.text


def test_true_guidance(pipeline: Any, saved: Saved) -> None:
    options = {"true_cfg_scale": 4.0, "negative_prompt": "a dog"}
    hf_bigload.disable()
    reference = run(load(saved("flux"), "flux"), "flux", **options)
    assert torch.equal(run(pipeline, "flux", **options), reference)


def test_a_tiled_vae_called_twice(pipeline: Any, saved: Saved) -> None:
    hf_bigload.disable()
    reference = load(saved("flux"), "flux")
    made = []
    for each in (reference, pipeline):
        each.vae.enable_tiling()
        each.vae.tile_latent_min_size, each.vae.tile_sample_min_size = 8, 16
        made.append([run(each, "flux"), run(each, "flux")])
    assert all(torch.equal(one, other) for one, other in zip(*made, strict=True))


def test_an_adapter_of_the_transformer_may_be_switched_off_and_on(pipeline: Any, saved: Saved) -> None:
    hf_bigload.disable()
    made = []
    for each in (load(saved("flux"), "flux"), pipeline):
        torch.manual_seed(3)
        each.transformer.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_k"]))
        with_adapter = run(each, "flux")
        each.transformer.disable_adapters()
        made.append((with_adapter, run(each, "flux")))
    assert all(torch.equal(one, other) for one, other in zip(*made, strict=True))
    assert not torch.equal(*made[0])
