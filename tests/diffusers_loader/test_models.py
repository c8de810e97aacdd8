"""Models by themselves: `from_pretrained` and `from_single_file` with a device map."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

import hf_bigload
from hf_bigload.dispatch.attach import attachment_of
from hf_bigload.errors import CheckpointError, DeviceMapError, WeightsMismatchError
from hf_bigload.loaders.calls import no_default_device_map

from .pipelines import TINY, vae

ON_DISK = {"": "disk"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Flux transformer."""
    transformer().save_pretrained(tmp_path)
    return tmp_path


def transformer() -> Any:
    return TINY["flux"].make().transformer


def step(model: Any, device: str = "cpu") -> torch.Tensor:
    """One denoising step: float [1, 4, 16]."""
    torch.manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, 4, 16),
        "encoder_hidden_states": torch.randn(1, 6, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(4, 3),
        "txt_ids": torch.zeros(6, 3),
    }
    dtype = model.dtype
    with torch.no_grad():
        return model(**{name: value.to(device, dtype) for name, value in inputs.items()}, return_dict=False)[0].cpu()


def load(folder: Path, **options: Any) -> Any:
    return diffusers.FluxTransformer2DModel.from_pretrained(folder, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"device_map": "auto"},
        {"device_map": "auto", "max_memory": {"cpu": 400_000}},
        {"device_map": "sequential", "max_memory": {"cpu": 400_000}},
        {"device_map": "cpu"},
        {"device_map": torch.device("cpu")},
        {"device_map": ON_DISK},
        {"device_map": {"": "cpu", "transformer_blocks.1": "disk"}},
    ],
    ids=repr,
)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_model_computes_the_same_under_every_map(options: dict[str, Any], dtype: Any, folder: Path) -> None:
    expected = step(load(folder, torch_dtype=dtype))
    with hf_bigload.enable():
        model = load(folder, torch_dtype=dtype, **options)
        assert torch.equal(step(model), expected)


@pytest.mark.parametrize(
    "saving", [{"max_shard_size": "50KB"}, {"safe_serialization": False}, {"variant": "fp16"}], ids=repr
)
def test_from_every_form_of_checkpoint(saving: dict[str, Any], tmp_path: Path) -> None:
    transformer().save_pretrained(tmp_path, **saving)
    loading = {"variant": "fp16"} if "variant" in saving else {}
    expected = step(load(tmp_path, **loading))
    with hf_bigload.enable():
        assert torch.equal(step(load(tmp_path, device_map=ON_DISK, **loading)), expected)


def test_from_a_bin_in_torchs_old_format(tmp_path: Path) -> None:
    transformer().save_pretrained(tmp_path, safe_serialization=False)
    file = tmp_path / "diffusion_pytorch_model.bin"
    torch.save(torch.load(file), file, _use_new_zipfile_serialization=False)
    expected = step(load(tmp_path))
    with hf_bigload.enable():
        assert torch.equal(step(load(tmp_path, device_map=ON_DISK)), expected)


def test_a_model_on_one_device_that_was_asked_for_is_a_plain_one(folder: Path) -> None:
    with hf_bigload.enable():
        model = load(folder, device_map="cpu")
    assert attachment_of(model) is None and not hasattr(model, "hf_device_map")


def test_without_a_device_map_nothing_of_ours_happens(folder: Path) -> None:
    with hf_bigload.enable():
        model = load(folder)
    assert not hasattr(model, "hf_device_map")
    with pytest.raises(ValueError, match="no plan"):
        hf_bigload.inspect(model)


def test_a_default_device_map_holds_for_models(folder: Path) -> None:
    with hf_bigload.enable(device_map="auto", max_memory={"cpu": 400_000}):
        assert hf_bigload.inspect(load(folder)).plan.streams


def test_parts_of_what_is_not_planned_get_no_default_each(folder: Path) -> None:
    with hf_bigload.enable(device_map="auto", max_memory={"cpu": 400_000}), no_default_device_map():
        assert attachment_of(load(folder)) is None
        assert attachment_of(load(folder, device_map="auto")) is not None


def test_an_unknown_device_is_refused(folder: Path) -> None:
    with hf_bigload.enable(), pytest.raises(DeviceMapError, match="quantum"):
        load(folder, device_map={"": "quantum"})


def test_loading_info_names_what_is_unexpected(folder: Path) -> None:
    file = folder / "diffusion_pytorch_model.safetensors"
    save_file({**load_file(file), "surplus": torch.ones(1)}, file)
    with hf_bigload.enable():
        _, info = load(folder, device_map="auto", output_loading_info=True)
    assert info == {"missing_keys": [], "unexpected_keys": ["surplus"], "mismatched_keys": [], "error_msgs": []}


def test_a_weight_in_another_shape_is_named(folder: Path) -> None:
    file = folder / "diffusion_pytorch_model.safetensors"
    save_file({**load_file(file), "proj_out.bias": torch.ones(3)}, file)
    with hf_bigload.enable(), pytest.raises(WeightsMismatchError, match=r"proj_out.bias is \(3,\), and \(16,\)"):
        load(folder, device_map="auto")


def test_a_truncated_file_is_named(folder: Path) -> None:
    file = folder / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with hf_bigload.enable(), pytest.raises(CheckpointError, match="diffusion_pytorch_model"):
        load(folder, device_map=ON_DISK)


def test_an_index_that_leaves_its_folder_is_refused(tmp_path: Path) -> None:
    transformer().save_pretrained(tmp_path / "model", max_shard_size="50KB")
    index = tmp_path / "model" / "diffusion_pytorch_model.safetensors.index.json"
    shard = sorted((tmp_path / "model").glob("*-00002-*"))[0]
    shard.rename(tmp_path / shard.name)
    index.write_text(index.read_text().replace(shard.name, f"../{shard.name}"))
    with hf_bigload.enable(), pytest.raises(ValueError, match="plain filenames"):
        load(tmp_path / "model", device_map=ON_DISK)


def test_a_vae_is_called_by_encode_and_decode(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae().save_pretrained(tmp_path)
    picture = torch.rand(1, 3, 32, 32)
    plain = diffusers.AutoencoderKL.from_pretrained(tmp_path)
    with hf_bigload.enable():
        ours = diffusers.AutoencoderKL.from_pretrained(tmp_path, device_map=ON_DISK)
    with torch.no_grad():
        latents = plain.encode(picture).latent_dist.mean
        assert torch.equal(ours.encode(picture).latent_dist.mean, latents)
        assert torch.equal(ours.decode(latents).sample, plain.decode(latents).sample)
        for each in (plain, ours):
            each.enable_tiling()
            each.tile_latent_min_size, each.tile_sample_min_size = 8, 16
        large = torch.rand(1, 4, 16, 16)
        assert torch.equal(ours.decode(large).sample, plain.decode(large).sample)


def test_gradients_are_those_of_a_plain_model(folder: Path) -> None:
    plain = load(folder)
    with hf_bigload.enable():
        ours = load(folder, device_map=ON_DISK)
    inputs = {"img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(6, 3), "timestep": torch.tensor([0.5])}
    for model in (plain, ours):
        torch.manual_seed(0)
        states = [torch.randn(1, 4, 16), torch.randn(1, 6, 32), torch.randn(1, 32)]
        model(states[0], states[1], states[2], **inputs, return_dict=False)[0].sum().backward()
    for (name, one), other in zip(plain.named_parameters(), ours.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        assert one.grad is None or torch.equal(one.grad, other.grad), name


def test_saving_gives_the_same_file(folder: Path, tmp_path: Path) -> None:
    with hf_bigload.enable():
        load(folder, device_map=ON_DISK).save_pretrained(tmp_path / "again", max_shard_size="100KB")
    again = load(tmp_path / "again").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in load(folder).state_dict().items())


def test_two_threads_load_at_once_and_each_keeps_its_budget(folder: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    expected = step(load(folder))
    with hf_bigload.enable(), ThreadPoolExecutor(2) as pool:
        loads = [pool.submit(load, folder, device_map="auto", max_memory={"cpu": size}) for size in (350_000, 450_000)]
        models = [each.result() for each in loads]
    assert [hf_bigload.inspect(model).plan.budget["cpu"] for model in models] == [350_000, 450_000]
    assert all(torch.equal(step(model), expected) for model in models)


def test_models_that_declare_nothing_are_cut_where_their_lists_repeat(tmp_path: Path) -> None:
    model = TINY["kandinsky_2_2"].make().movq
    assert model._no_split_modules is None
    model.save_pretrained(tmp_path)
    with hf_bigload.enable():
        ours = diffusers.VQModel.from_pretrained(tmp_path, device_map=ON_DISK)
    blocks = [p.block for p in hf_bigload.inspect(ours).plan.placements]
    assert max(block.nbytes for block in blocks) < sum(block.nbytes for block in blocks) / 3


def test_the_loader_is_there_whatever_of_the_library_is_imported_first() -> None:
    program = (
        "import hf_bigload; hf_bigload.enable(); "
        "import diffusers.hooks; from diffusers import ModelMixin; "
        "assert hasattr(ModelMixin.from_pretrained, '__wrapped__')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "could not be installed" not in done.stderr and done.returncode == 0, done.stderr
