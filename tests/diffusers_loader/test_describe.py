"""`hf-bigload plan` of a pipeline: its components, how often they run, and where they would rest."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import diffusers.pipelines
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import hf_bigload
from hf_bigload import cli
from hf_bigload.describe import describe
from hf_bigload.loaders.diffusers_skeleton import calls_of, stored_dtype, weight_files
from hf_bigload.specs import BlockSpec

from .conftest import Saved, load
from .pipelines import TINY, denoiser_of, weight_bytes


def component_bytes(blocks: tuple[BlockSpec, ...]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for block in blocks:
        component = block.name.partition(".")[0]
        sizes[component] = sizes.get(component, 0) + block.nbytes
    return sizes


@pytest.mark.parametrize("name", ["flux", "sd3", "stable_video_diffusion"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_description_has_what_a_load_has(name: str, dtype: str | None, saved: Saved) -> None:
    found = describe(saved(name), dtype)
    hf_bigload.enable()
    options = {} if dtype is None else {"torch_dtype": getattr(torch, dtype)}
    pipeline = load(saved(name), name, device_map={"": "disk"}, **options)
    loaded = {component: hf_bigload.inspect(getattr(pipeline, component)) for component in pipeline.hf_device_map}
    expected = {
        component: sum(p.block.nbytes for p in inspected.plan.placements) for component, inspected in loaded.items()
    }
    assert component_bytes(found.spec.blocks) == expected
    assert found.repository.file_bytes == weight_bytes(saved(name)) and found.repository.download_bytes == 0


def test_components_come_in_the_order_in_which_they_run(saved: Saved) -> None:
    blocks = describe(saved("flux")).spec.blocks
    assert list(component_bytes(blocks)) == ["text_encoder", "text_encoder_2", "transformer", "vae"]


@pytest.mark.parametrize(
    ("name", "calls"),
    [("stable_diffusion", 50), ("flux", 28), ("wan_2_2", 100), ("pixart_sigma", 20), ("stable_video_diffusion", 25)],
)
def test_a_denoiser_runs_at_every_step_and_twice_where_guidance_calls_it_apart(name: str, calls: int) -> None:
    tiny = TINY[name]
    components = tiny.make().components
    denoiser = denoiser_of(name)
    assert calls_of(denoiser, type(components[denoiser]), tiny.cls) == calls
    others = [n for n in components if n.startswith(("text_encoder", "vae", "image_encoder")) and components[n]]
    assert {calls_of(other, type(components[other]), tiny.cls) for other in others} == {1}


PIPELINES = [
    cls
    for cls in (getattr(diffusers.pipelines, name, None) for name in sorted(dir(diffusers.pipelines)))
    if isinstance(cls, type) and issubclass(cls, diffusers.DiffusionPipeline) and inspect.isfunction(cls.__call__)
]


class Unknown(torch.nn.Module):
    """A model whose class and parameters say nothing of what it does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def denoisers_and_controlnets(cls: type) -> tuple[dict[str, int], dict[str, int]]:
    names = inspect.signature(cls).parameters
    calls = {name: calls_of(name, Unknown, cls) for name in names if name.startswith(("transformer", "unet"))}
    return calls, {name: calls_of(name, Unknown, cls) for name in names if name.startswith("controlnet")}


@pytest.mark.parametrize("cls", PIPELINES, ids=lambda cls: cls.__name__)
def test_in_every_pipeline_denoisers_run_at_every_step_and_no_controlnet_more_often(cls: type) -> None:
    steps = inspect.signature(cls.__call__).parameters.get("num_inference_steps")
    least = steps.default if steps is not None and isinstance(steps.default, int) else 2
    denoisers, controlnets = denoisers_and_controlnets(cls)
    assert all(calls >= least for calls in (*denoisers.values(), *controlnets.values()))
    assert not denoisers or max(controlnets.values(), default=0) <= max(denoisers.values())


@pytest.mark.parametrize(
    ("pipeline", "component", "model", "calls"),
    [
        ("StableCascadePriorPipeline", "prior", "StableCascadeUNet", 20),
        ("StableCascadeDecoderPipeline", "decoder", "StableCascadeUNet", 10),
        ("UnCLIPPipeline", "decoder", "UNet2DConditionModel", 25),
        ("UnCLIPPipeline", "super_res_first", "UNet2DModel", 7),
        ("KandinskyV22CombinedPipeline", "prior_prior", "PriorTransformer", 25),
        ("AmusedPipeline", "transformer", "UVit2DModel", 12),
        ("AmusedPipeline", "vqvae", "VQModel", 1),
        ("StableDiffusion3ControlNetPipeline", "controlnet", "SD3ControlNetModel", 28),
        ("FluxControlNetInpaintPipeline", "controlnet", "FluxControlNetModel", 28),
        ("StableDiffusionAttendAndExcitePipeline", "unet", "UNet2DConditionModel", 50),
        ("StableDiffusionSAGPipeline", "unet", "UNet2DConditionModel", 50),
        ("StableDiffusion3Pipeline", "transformer", "SD3Transformer2DModel", 28),
        ("ChromaPipeline", "transformer", "ChromaTransformer2DModel", 70),
        ("ChromaInpaintPipeline", "transformer", "ChromaTransformer2DModel", 56),
        ("QwenImagePipeline", "transformer", "QwenImageTransformer2DModel", 100),
        ("AceStepPipeline", "transformer", "AceStepTransformer1DModel", 8),
    ],
)
def test_calls_are_those_of_the_loop_over_the_steps(pipeline: str, component: str, model: str, calls: int) -> None:
    assert calls_of(component, getattr(diffusers, model), getattr(diffusers, pipeline)) == calls


@pytest.mark.parametrize("pipeline", ["WuerstchenDecoderPipeline", "WuerstchenCombinedPipeline"])
def test_a_denoiser_that_is_named_a_decoder_is_told_by_its_class(pipeline: str) -> None:
    model = type("WuerstchenDiffNeXt", (Unknown,), {})
    assert calls_of("decoder", model, getattr(diffusers, pipeline)) == 12


@pytest.mark.parametrize(
    ("boundary", "shift", "calls"),
    [(None, 1.0, (50, 50)), (0.875, 1.0, (12, 88)), (0.875, 3.0, (30, 70)), (0.5, None, (50, 50))],
)
def test_two_transformers_share_the_steps(
    boundary: float | None, shift: float | None, calls: tuple[int, int], saved: Saved, tmp_path: Path
) -> None:
    shutil.copytree(saved("wan_2_2"), tmp_path, dirs_exist_ok=True)
    for file, change in (
        ("model_index.json", {"boundary_ratio": boundary}),
        ("scheduler/scheduler_config.json", {"flow_shift": shift, "shift": shift}),
    ):
        (tmp_path / file).write_text(json.dumps(json.loads((tmp_path / file).read_text()) | change))
    found = {block.name.partition(".")[0]: block.calls for block in describe(tmp_path).spec.blocks}
    assert (found["transformer"], found["transformer_2"]) == calls


def test_the_command_shows_components_calls_and_phases(saved: Saved) -> None:
    done = CliRunner().invoke(cli.app, ["plan", str(saved("flux")), "--device", "700KB", "--ram", "2MB"])
    assert done.exit_code == 0, done.output
    for line in ("text_encoder_2", "transformer", "28 calls 28 times", "encode"):
        assert line in done.output
    rows = {cells[0]: cells[-1] for row in done.output.splitlines() if len(cells := row.replace("│", " ").split()) > 2}
    assert (rows["transformer"], rows["vae"]) == ("28", "1")


def test_the_commands_json_names_the_pipeline(saved: Saved) -> None:
    done = CliRunner().invoke(cli.app, ["plan", str(saved("flux")), "--device", "none", "--ram", "2MB", "--json"])
    content = json.loads(done.stdout)
    assert content["fits"] and {b["name"].partition(".")[0] for b in content["blocks"]} >= {"transformer", "vae"}


def test_a_pipeline_that_no_library_makes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "UnknownPipeline", "part": ["nowhere", "Nothing"]}')
    with pytest.raises(OSError, match=r"pipeline of several models \(UnknownPipeline\)"):
        describe(tmp_path)


STORED = {
    "model.safetensors": torch.float32,
    "model.fp16.safetensors": torch.float16,
    "pytorch_model.bin": torch.bfloat16,
}


@pytest.fixture
def component(tmp_path: Path) -> Path:
    for name, dtype in STORED.items():
        tensors = {"ids": torch.zeros(2, dtype=torch.int64), "weight": torch.zeros(2, dtype=dtype)}
        (torch.save if name.endswith(".bin") else save_file)(tensors, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize(
    ("options", "file"),
    [
        ({}, "model.safetensors"),
        ({"variant": "fp16"}, "model.fp16.safetensors"),
        ({"variant": "ema"}, "model.safetensors"),
        ({"use_safetensors": False}, "pytorch_model.bin"),
    ],
)
def test_auto_is_the_dtype_of_the_files_that_are_loaded(options: dict[str, Any], file: str, component: Path) -> None:
    assert stored_dtype(str(component), **options) == STORED[file]


def test_shards_of_a_variant_are_found_whichever_way_they_are_named(tmp_path: Path) -> None:
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.fp16.safetensors"]
    names += ["model.fp16-00001-of-00002.safetensors", "model.fp16.safetensors.index.json", "adapter.safetensors"]
    for name in names:
        (tmp_path / name).touch()
    found = [Path(file).name for file in weight_files(str(tmp_path), "fp16")]
    assert found == ["model-00002-of-00002.fp16.safetensors", "model.fp16-00001-of-00002.safetensors"]
