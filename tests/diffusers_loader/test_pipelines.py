"""Whatever rests where, a pipeline makes the same image, frames or sound, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import hf_bigload
from hf_bigload.composition import part_of
from hf_bigload.dispatch.attach import attachment_of
from hf_bigload.loaders.diffusers_pipelines import models_of, plan_of

from .conftest import Plain, Saved, load
from .pipelines import TINY, run, weight_bytes

ON_DISK = {"": "disk"}


@pytest.fixture(autouse=True)
def enabled() -> None:
    """For the whole test; `disable` comes by itself."""
    hf_bigload.enable()


def unplanned(plain: Plain, name: str, **options: Any) -> torch.Tensor:
    hf_bigload.disable()
    made = plain(name, **options)
    hf_bigload.enable()
    return made


@pytest.mark.parametrize("name", TINY)
def test_with_all_weights_on_disk(name: str, saved: Saved, plain: Plain) -> None:
    expected = unplanned(plain, name)
    pipeline = load(saved(name), name, device_map=ON_DISK)
    assert torch.equal(run(pipeline, name), expected)
    assert torch.equal(run(pipeline, name), expected)
    assert {p.home for p in planned(pipeline).placements} == {"disk"}


@pytest.mark.parametrize("name", TINY)
def test_split_between_ram_and_disk(name: str, saved: Saved, plain: Plain) -> None:
    expected = unplanned(plain, name)
    budget = weight_bytes(saved(name)) * 7 // 10
    pipeline = load(saved(name), name, device_map="auto", max_memory={"cpu": budget})
    assert torch.equal(run(pipeline, name), expected)
    assert {p.home for p in planned(pipeline).placements} == {"cpu", "disk"}
    assert planned(pipeline).used["cpu"] <= budget


@pytest.mark.parametrize("name", ["flux", "wan_2_2", "ltx"])
def test_in_bfloat16(name: str, saved: Saved, plain: Plain) -> None:
    dtype = {"torch_dtype": torch.bfloat16}
    expected = unplanned(plain, name, **dtype)
    on_disk = load(saved(name), name, device_map=ON_DISK, **dtype)
    assert torch.equal(run(on_disk, name), expected)
    split = load(saved(name), name, device_map="auto", max_memory={"cpu": weight_bytes(saved(name)) * 4 // 10}, **dtype)
    assert torch.equal(run(split, name), expected)


def test_with_room_for_all_of_it_the_components_are_plain_models(saved: Saved, plain: Plain) -> None:
    expected = unplanned(plain, "flux")
    pipeline = load(saved("flux"), "flux", device_map="auto", max_memory={"cpu": "1GB"})
    assert torch.equal(run(pipeline, "flux"), expected)
    assert [attachment_of(model) for model in models_of(pipeline)] == [None] * 4
    assert pipeline.hf_device_map == dict.fromkeys(("transformer", "vae", "text_encoder", "text_encoder_2"), "cpu")


@pytest.mark.parametrize("form", ["sharded", "variant", "bin"])
def test_in_every_form_that_checkpoints_have(form: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "sharded": {"max_shard_size": "50KB"},
        "variant": {"variant": "fp16"},
        "bin": {"safe_serialization": False},
    }[form]
    TINY["flux"].make().save_pretrained(tmp_path, **options)
    loading = {"variant": "fp16"} if form == "variant" else {}
    hf_bigload.disable()
    expected = run(load(tmp_path, "flux", **loading), "flux")
    hf_bigload.enable()
    pipeline = load(tmp_path, "flux", device_map=ON_DISK, **loading)
    assert torch.equal(run(pipeline, "flux"), expected)


def test_a_map_may_name_components_and_modules_of_theirs(saved: Saved, plain: Plain) -> None:
    expected = unplanned(plain, "flux")
    device_map = {"": "cpu", "text_encoder_2": "disk", "transformer.single_transformer_blocks": "disk"}
    pipeline = load(saved("flux"), "flux", device_map=device_map)
    assert torch.equal(run(pipeline, "flux"), expected)
    assert attachment_of(pipeline.vae) is None
    assert pipeline.transformer.hf_device_map["single_transformer_blocks"] == "disk"


def planned(pipeline: Any) -> Any:
    plan = plan_of(pipeline)
    assert plan is not None
    return plan


def test_however_many_steps_text_encoders_are_read_once_and_the_denoiser_never(saved: Saved) -> None:
    denoiser = sum(p.nbytes for p in TINY["flux"].make().transformer.parameters())
    pipeline = load(saved("flux"), "flux", device_map="auto", max_memory={"cpu": denoiser + 80_000})
    assert {p.home for p in part_of(planned(pipeline), "transformer").placements} == {"cpu"}
    streamed = sum(p.streamed_bytes for p in part_of(planned(pipeline), "text_encoder_2").placements)
    for steps in (2, 30):
        before = bytes_read(pipeline)
        run(pipeline, "flux", num_inference_steps=steps)
        read = {name: count - before[name] for name, count in bytes_read(pipeline).items()}
        assert read["transformer"] == 0
        assert streamed <= read["text_encoder_2"] < 1.2 * streamed  # whole pages


def bytes_read(pipeline: Any) -> dict[str, int]:
    return {name: hf_bigload.inspect(getattr(pipeline, name)).stats.bytes_read for name in pipeline.hf_device_map}
