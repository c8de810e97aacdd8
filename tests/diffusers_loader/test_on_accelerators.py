"""With accelerators, here simulated ones with the CPU's arithmetic: the same image, whatever rests where.

A plain pipeline that is whole on the device is what each is compared with.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import hf_bigload
from hf_bigload.composition import part_of
from hf_bigload.dispatch import attach
from hf_bigload.dispatch.attach import attachment_of
from hf_bigload.errors import DoesNotFitError
from hf_bigload.loaders import diffusers_skeleton
from hf_bigload.loaders.diffusers_pipelines import models_of, plan_of
from hf_bigload.specs import Placement, Plan
from tests import simdev

from .conftest import Plain, Saved, load
from .pipelines import TINY, denoiser_of, run, weight_bytes, write_lora

QUICK = ("img2img", "sdxl", "flux", "wan_2_2", "ltx")
NAMES = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in TINY if name not in QUICK)]
DEVICE = "sim:0"


@pytest.fixture(autouse=True, scope="module")
def sim() -> Any:
    return simdev.load()


@pytest.fixture(autouse=True)
def two() -> Iterator[None]:
    with simdev.devices([None, None], hide_others=True), simdev.asynchronous():
        yield


def planned(folder: Path, name: str, max_memory: dict[Any, int], **options: Any) -> tuple[Any, Plan]:
    hf_bigload.enable()
    pipeline = load(folder, name, device_map="auto", max_memory=max_memory, **options)
    plan = plan_of(pipeline)
    assert plan is not None
    return pipeline, plan


@pytest.mark.parametrize("name", NAMES)
def test_on_two_devices(name: str, saved: Saved, plain: Plain) -> None:
    expected, total = plain(name, DEVICE), weight_bytes(saved(name))
    pipeline, plan = planned(saved(name), name, {0: total * 7 // 10, 1: total * 7 // 10, "cpu": total})
    assert plan.devices == {"sim:0", "sim:1"}
    assert torch.equal(run(pipeline, name), expected)
    assert pipeline._execution_device == torch.device(DEVICE)


@pytest.mark.parametrize("name", NAMES)
def test_with_a_denoiser_larger_than_the_device(name: str, saved: Saved, plain: Plain) -> None:
    expected, total = plain(name, DEVICE), weight_bytes(saved(name))
    denoiser = sum(p.nbytes for p in getattr(TINY[name].make(), denoiser_of(name)).parameters())
    room = max(denoiser * 9 // 10, 400_000 if name == "kandinsky_2_2_prior" else 0)
    pipeline, plan = planned(saved(name), name, {0: room, "cpu": total})
    assert plan.used[DEVICE] <= room
    assert torch.equal(run(pipeline, name), expected)
    assert torch.equal(run(pipeline, name), expected)


def test_with_all_weights_on_disk_and_room_for_little_else(saved: Saved, plain: Plain) -> None:
    expected = plain("flux", DEVICE)
    hf_bigload.enable()
    ours = load(saved("flux"), "flux", device_map={"": "disk", "vae.decoder.conv_norm_out": 0})
    assert torch.equal(run(ours, "flux"), expected)


def test_what_pipelines_make_latents_on_is_never_where_a_weight_rests(saved: Saved) -> None:
    total = weight_bytes(saved("flux"))
    pipeline, _ = planned(saved("flux"), "flux", {0: 450_000, "cpu": total})
    assert pipeline._execution_device == pipeline.device == torch.device(DEVICE)
    for model in models_of(pipeline):
        assert model.device == torch.device(DEVICE)
        assert getattr(model, "_hf_hook", None) is None or model._hf_hook.execution_device == torch.device(DEVICE)


def test_a_component_that_is_whole_on_another_device_takes_inputs_from_the_first(saved: Saved, plain: Plain) -> None:
    expected = plain("sdxl", DEVICE)
    hf_bigload.enable()
    pipeline = load(saved("sdxl"), "sdxl", device_map={"": 0, "vae": 1, "text_encoder_2": 1})
    assert torch.equal(run(pipeline, "sdxl"), expected)
    decoded = pipeline.vae.decode(torch.ones(1, 4, 4, 4, device=DEVICE), return_dict=False)[0]
    assert decoded.device == torch.device(DEVICE)
    assert {p.device for p in pipeline.vae.parameters()} == {torch.device("sim:1")}


def test_components_share_one_ring_and_one_budget_on_a_device(saved: Saved) -> None:
    total = weight_bytes(saved("flux"))
    room = 450_000
    pipeline, plan = planned(saved("flux"), "flux", {0: room, "cpu": total})
    run(pipeline, "flux")
    attached = [a for model in models_of(pipeline) if (a := attachment_of(model)) is not None]
    rings = {id(a.executor.machine.ring(torch.device(DEVICE))): a.executor.machine for a in attached}
    assert len(attached) > 1 and len(rings) == 1
    resting = sum(
        tensor.nbytes
        for model in models_of(pipeline)
        for tensor in (*model.parameters(), *model.buffers())
        if tensor.device == torch.device(DEVICE)
    )
    ring = next(iter(rings.values())).ring(torch.device(DEVICE))
    assert resting + plan.ring[DEVICE] <= room
    assert ring.peak <= plan.ring[DEVICE] + 64 * 512 * 2  # each tensor begins at a multiple of 512 bytes


def test_the_denoiser_is_resident_first_and_never_moved(saved: Saved) -> None:
    denoiser = sum(p.nbytes for p in TINY["flux"].make().transformer.parameters())
    total = weight_bytes(saved("flux"))
    pipeline, plan = planned(saved("flux"), "flux", {0: denoiser + 80_000, "cpu": total})
    assert {p.home for p in part_of(plan, "transformer").placements} == {DEVICE}
    run(pipeline, "flux", num_inference_steps=30)
    assert attachment_of(pipeline.transformer) is None  # nothing of it could be moved
    streamed = [p for name in ("text_encoder", "text_encoder_2") for p in part_of(plan, name).placements if is_layer(p)]
    assert len(streamed) > 2
    for name in ("text_encoder", "text_encoder_2"):
        inspected = hf_bigload.inspect(getattr(pipeline, name))
        for placement in filter(is_layer, inspected.plan.placements):
            assert inspected.stats.blocks[placement.block.name].bytes_copied == placement.streamed_bytes


def is_layer(placement: Placement) -> bool:
    return placement.block.whole and placement.streamed_bytes > 0


def test_to_another_device_makes_a_plain_pipeline(saved: Saved, plain: Plain) -> None:
    expected = plain("flux", DEVICE)
    pipeline, _ = planned(saved("flux"), "flux", {0: 450_000, "cpu": weight_bytes(saved("flux"))})
    assert pipeline.to(DEVICE) is pipeline
    assert {p.device for model in models_of(pipeline) for p in model.parameters()} == {torch.device(DEVICE)}
    assert torch.equal(run(pipeline, "flux"), expected)


def test_a_reset_of_one_pipeline_resets_all_that_are_made_of_its_components(saved: Saved, plain: Plain) -> None:
    expected = plain("stable_diffusion")
    name, total = "stable_diffusion", weight_bytes(saved("stable_diffusion"))
    pipeline, _ = planned(saved(name), name, {0: total // 2, "cpu": total})
    other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipeline)
    other.reset_device_map()
    assert pipeline._execution_device == torch.device("cpu") and pipeline.hf_device_map is None
    assert torch.equal(run(pipeline, name), expected)


def test_room_is_checked_for_components_that_carry_no_hooks_too(
    saved: Saved, plain: Plain, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, total = plain("flux", DEVICE), weight_bytes(saved("flux"))
    pipeline, _ = planned(saved("flux"), "flux", {0: total * 7 // 10, "cpu": total})
    resident = [model for model in models_of(pipeline) if attachment_of(model) is None]
    assert resident
    monkeypatch.setattr(attach, "free_ram", lambda: total * 6 // 10)
    with pytest.raises(DoesNotFitError, match="Nothing was moved"):
        pipeline.reset_device_map()
    assert all(p.device == torch.device(DEVICE) for model in resident for p in model.parameters())
    assert torch.equal(run(pipeline, "flux"), expected)


@pytest.mark.parametrize("passed", ["text_encoder", "vae"])
def test_a_plain_model_that_was_passed_runs_where_the_others_do(passed: str, saved: Saved, plain: Plain) -> None:
    name = "stable_diffusion"
    expected, total = plain(name, DEVICE), weight_bytes(saved(name))
    model = getattr(load(saved(name), name), passed)
    pipeline, _ = planned(saved(name), name, {0: total, "cpu": 2 * total}, **{passed: model})
    assert getattr(pipeline, passed) is model and model.device == torch.device(DEVICE)
    assert torch.equal(run(pipeline, name), expected)
    assert {p.device for p in model.parameters()} == {torch.device("cpu")}
    pipeline.to(DEVICE)
    assert torch.equal(run(pipeline, name), expected)


def test_what_no_plan_reaches_is_named_and_taken_off_the_budget(
    saved: Saved, plain: Plain, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected, total = plain("flux", DEVICE), weight_bytes(saved("flux"))
    describe = diffusers_skeleton.describe_component
    monkeypatch.setattr(
        diffusers_skeleton,
        "describe_component",
        lambda cls, *rest: None if cls is diffusers.AutoencoderKL else describe(cls, *rest),
    )
    budget = total * 8 // 10
    pipeline, plan = planned(saved("flux"), "flux", {0: budget, "cpu": total})
    vae = sum(p.nbytes for p in pipeline.vae.parameters())
    assert plan.used[DEVICE] + vae <= budget < plan.used[DEVICE] + vae + total // 2
    assert "vae" in caplog.text and DEVICE in caplog.text
    assert torch.equal(run(pipeline, "flux"), expected)


def test_a_lora_loaded_after_dispatch_runs_where_its_block_does(saved: Saved, tmp_path: Path) -> None:
    write_lora(TINY["flux"].make(), tmp_path)
    reference = load(saved("flux"), "flux").to(DEVICE)
    ours, _ = planned(saved("flux"), "flux", {0: 400_000, "cpu": weight_bytes(saved("flux"))})
    cut = load(saved("flux"), "flux", device_map={"": "cpu", "vae.decoder.conv_norm_out": 0})
    for pipeline in (reference, ours, cut):
        pipeline.load_lora_weights(tmp_path)
    expected = run(reference, "flux")
    assert torch.equal(run(ours, "flux"), expected)
    assert torch.equal(run(cut, "flux"), expected)


def test_layerwise_casting_and_fused_projections(saved: Saved) -> None:
    reference = load(saved("flux"), "flux").to(DEVICE)
    ours, _ = planned(saved("flux"), "flux", {0: 400_000, "cpu": weight_bytes(saved("flux"))})
    made = []
    for pipeline in (reference, ours):
        pipeline.transformer.fuse_qkv_projections()
        fused = run(pipeline, "flux")
        pipeline.transformer.unfuse_qkv_projections()
        pipeline.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
        made.append((fused, run(pipeline, "flux")))
    assert all(torch.equal(one, other) for one, other in zip(*made, strict=True))


def test_the_vae_of_sdxl_is_upcast_and_cast_back(saved: Saved, plain: Plain) -> None:
    expected = plain("sdxl", DEVICE, torch_dtype=torch.float16)
    pipeline, _ = planned(
        saved("sdxl"), "sdxl", {0: 110_000, "cpu": weight_bytes(saved("sdxl"))}, torch_dtype=torch.float16
    )
    assert torch.equal(run(pipeline, "sdxl"), expected)
    assert torch.equal(run(pipeline, "sdxl"), expected)
