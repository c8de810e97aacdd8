"""The functions of the guide *Loading big models into memory*, for any `nn.Module`, on simulated accelerators."""

from __future__ import annotations

import copy
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import hf_bigload
from hf_bigload import (
    cpu_offload,
    cpu_offload_with_hook,
    disk_offload,
    dispatch_model,
    infer_auto_device_map,
    init_empty_weights,
    load_checkpoint_and_dispatch,
    load_checkpoint_in_model,
)
from hf_bigload.errors import BudgetError, CheckpointError, DeviceMapError, OffloadedWeightError, SpillError
from hf_bigload.hooks import remove_hook_from_submodules
from hf_bigload.utils import align_module_device, has_offloaded_params, load_state_dict, set_module_tensor_to_device
from tests import simdev

from . import Layer, Net, Tied, assert_model_at_rest, same_bits, seeded, values

MiB = 1 << 20


@pytest.fixture(autouse=True)
def two_devices() -> Iterator[None]:
    with torch.no_grad(), simdev.devices([None, None], hide_others=True):
        yield


class Buffered(Tied):
    """Tied weights, a persistent and a non-persistent buffer: what a state dict gets wrong."""

    def __init__(self, layers: int = 3, width: int = 16) -> None:
        super().__init__(layers, width)
        self.register_buffer("scale", torch.linspace(1, 2, width))
        self.register_buffer("shift", torch.ones(width), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) * self.scale
        x = x + self.shift.to(x.dtype)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


TOKENS = torch.arange(6)[None]


def nbytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def on_meta(make: Any = Buffered, *args: Any) -> Any:
    with init_empty_weights():
        model = make(*args)
    if hasattr(model, "head"):
        model.head.weight = model.embed.weight
    return model.eval()


# ---------------------------------------------------------------- checkpoints in every format


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t for name, t in values(model.state_dict()).items() if name != "head.weight"}


def halves(tensors: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    names = list(tensors)
    return [{n: tensors[n] for n in names[: len(names) // 2]}, {n: tensors[n] for n in names[len(names) // 2 :]}]


def write_safetensors(model: nn.Module, folder: Path) -> Path:
    save_file(tensors_of(model), folder / "model.safetensors")
    return folder / "model.safetensors"


def write_bin(model: nn.Module, folder: Path) -> Path:
    torch.save(tensors_of(model), folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


def write_old_bin(model: nn.Module, folder: Path) -> Path:
    torch.save(tensors_of(model), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    return folder / "pytorch_model.bin"


def _sharded(model: nn.Module, folder: Path, stem: str, suffix: str, write: Callable[..., None]) -> Path:
    weight_map = {}
    for i, part in enumerate(halves(tensors_of(model))):
        name = f"{stem}-{i + 1:05}-of-00002.{suffix}"
        write(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def write_shards(model: nn.Module, folder: Path) -> Path:
    return _sharded(model, folder, "model", "safetensors", save_file)


def write_bin_shards(model: nn.Module, folder: Path) -> Path:
    return _sharded(model, folder, "pytorch_model", "bin", torch.save)


FORMATS = [write_safetensors, write_shards, write_bin, write_bin_shards, write_old_bin]

MAPS: dict[str, Any] = {
    "auto": "auto",
    "balanced": "balanced",
    "balanced_low_0": "balanced_low_0",
    "sequential": "sequential",
    "the CPU": "cpu",
    "a device": "sim:1",
    "an index": 1,
    "the disk": {"": "disk"},
    "parts": {"embed": 0, "layers.0": "cpu", "layers": 1, "": "disk"},
    "single tensors": {"": 0, "layers.0.up.weight": "cpu", "layers.1.down": "disk", "scale": "cpu"},
}


def assert_computes(model: nn.Module, plain: nn.Module) -> None:
    """On inputs where the model expects them."""
    first = next(iter(model.hf_device_map.values())) if hasattr(model, "hf_device_map") else "cpu"
    for _ in range(2):
        assert same_bits(model(TOKENS.to("cpu" if first == "disk" else first)), plain(TOKENS))
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))


class TestLoadCheckpointAndDispatch:
    @pytest.mark.parametrize("device_map", MAPS)
    @pytest.mark.parametrize("write", FORMATS)
    def test_every_map_of_every_format(self, write: Any, device_map: str, tmp_path: Path) -> None:
        plain = seeded(Buffered)
        model = load_checkpoint_and_dispatch(on_meta(), write(plain, tmp_path), device_map=MAPS[device_map])
        assert_computes(model, plain)
        assert model.head.weight is model.embed.weight
        assert same_bits(model.scale, plain.scale) and same_bits(model.shift, plain.shift)

    @pytest.mark.parametrize("write", FORMATS)
    def test_a_folder_stands_for_what_is_in_it(self, write: Any, tmp_path: Path) -> None:
        plain = seeded(Buffered)
        write(plain, tmp_path)
        assert_computes(load_checkpoint_and_dispatch(on_meta(), str(tmp_path), device_map="auto"), plain)

    @pytest.mark.parametrize("share", [0.3, 0.7])
    @pytest.mark.parametrize("write", FORMATS)
    def test_on_a_budget(self, write: Any, share: float, tmp_path: Path) -> None:
        plain = seeded(Buffered, layers=6)
        budget = {0: int(nbytes(plain) * share), "cpu": int(nbytes(plain) * 0.4)}
        model = load_checkpoint_and_dispatch(
            on_meta(Buffered, 6), write(plain, tmp_path), device_map="auto", max_memory=budget
        )
        assert {"disk", 0} <= set(model.hf_device_map.values()) | {0}
        assert_computes(model, plain)
        assert_model_at_rest(model)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, "bfloat16", "torch.float16"])
    @pytest.mark.parametrize("device_map", ["auto", "parts", "the disk"])
    def test_a_dtype_is_a_cast_of_floating_weights(self, dtype: Any, device_map: str, tmp_path: Path) -> None:
        plain = seeded(Buffered)
        plain.register_buffer("count", torch.arange(3))
        file = write_safetensors(plain, tmp_path)
        empty = on_meta()
        empty.register_buffer("count", torch.zeros(3, dtype=torch.int64))
        model = load_checkpoint_and_dispatch(empty, file, device_map=MAPS[device_map], dtype=dtype)
        target = getattr(torch, dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
        plain.to(target)
        assert model.count.tolist() == [0, 1, 2] and model.embed.weight.dtype == target
        assert_computes(model, plain)

    def test_without_a_map_only_loads(self, tmp_path: Path) -> None:
        plain = seeded(Buffered)
        model = load_checkpoint_and_dispatch(on_meta(), write_shards(plain, tmp_path))
        assert not hasattr(model, "hf_device_map") and not any("_hf_hook" in vars(m) for m in model.modules())
        assert same_bits(model(TOKENS), plain(TOKENS))

    def test_into_a_model_that_is_not_on_meta(self, tmp_path: Path) -> None:
        plain = seeded(Buffered)
        model = load_checkpoint_and_dispatch(seeded(Buffered, seed=3), write_bin(plain, tmp_path), {"": "disk"})
        assert_computes(model, plain)

    def test_names_of_classes_are_kept_whole(self, tmp_path: Path) -> None:
        plain = seeded(Buffered, layers=4)
        budget = {0: int(nbytes(plain) * 0.5), 1: nbytes(plain)}
        model = load_checkpoint_and_dispatch(
            on_meta(Buffered, 4),
            write_safetensors(plain, tmp_path),
            device_map="auto",
            max_memory=budget,
            no_split_module_classes=["Layer"],
        )
        assert not any(name.startswith("layers.") and name.count(".") > 1 for name in model.hf_device_map)
        assert_computes(model, plain)

    def test_hooks_that_are_forced(self, tmp_path: Path) -> None:
        plain = seeded(Buffered)
        model = load_checkpoint_and_dispatch(on_meta(), write_bin(plain, tmp_path), {"": 0}, force_hooks=True)
        assert same_bits(model(TOKENS), plain(TOKENS))  # moved to the device, and back

    def test_no_folder_is_demanded_and_one_that_is_given_is_left_clean(self, tmp_path: Path) -> None:
        plain = seeded(Buffered)
        file, folder = write_safetensors(plain, tmp_path), tmp_path / "offload"
        model = load_checkpoint_and_dispatch(
            on_meta(), file, {"": "disk"}, dtype="bfloat16", offload_folder=folder, offload_state_dict=True
        )
        assert list(folder.iterdir())
        assert_computes(model, plain.bfloat16())
        del model
        gc.collect()
        assert not list(folder.iterdir())

    def test_options_that_only_move_work_elsewhere(self, tmp_path: Path) -> None:
        plain = seeded(Buffered)
        model = load_checkpoint_and_dispatch(
            on_meta(),
            write_safetensors(plain, tmp_path),
            {"": "cpu", "layers.0": 0},
            offload_buffers=True,
            skip_keys=["past"],
            preload_module_classes=["Layer"],
        )
        assert_computes(model, plain)

    def test_offloaded_buffers_rest_with_their_block(self, tmp_path: Path) -> None:
        plain = seeded(Buffered)
        file = write_safetensors(plain, tmp_path)
        kept = load_checkpoint_and_dispatch(on_meta(), file, {"": "cpu", "layers.0": 0})
        offloaded = load_checkpoint_and_dispatch(on_meta(), file, {"": "cpu", "layers.0": 0}, offload_buffers=True)
        assert kept.scale.device.type == "sim" and offloaded.scale.device.type == "cpu"
        assert_computes(kept, plain), assert_computes(offloaded, plain)


class TestWhatALoadRefuses:
    """Before anything is changed: the model that was given is as it was."""

    def refused(self, error: type[Exception], match: str, model: Any, *args: Any, **kwargs: Any) -> None:
        before = {name: (id(t), t.is_meta) for name, t in model.state_dict(keep_vars=True).items()}
        with pytest.raises(error, match=match):
            load_checkpoint_and_dispatch(model, *args, **kwargs)
        assert {name: (id(t), t.is_meta) for name, t in model.state_dict(keep_vars=True).items()} == before
        assert not any("_hf_hook" in vars(m) for m in model.modules())

    def test_weights_that_are_missing_or_unexpected_if_strict(self, tmp_path: Path) -> None:
        tensors = tensors_of(seeded(Buffered))
        tensors["extra.weight"] = tensors.pop("layers.1.up.weight")
        save_file(tensors, tmp_path / "model.safetensors")
        match = r"Missing: layers\.1\.up\.weight\. Unexpected: extra\.weight\."
        self.refused(CheckpointError, match, on_meta(), tmp_path, "auto", strict=True)

    def test_not_if_not(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        tensors = tensors_of(seeded(Buffered))
        tensors["extra.weight"] = tensors.pop("layers.1.up.weight")
        save_file(tensors, tmp_path / "model.safetensors")
        model = load_checkpoint_and_dispatch(on_meta(), tmp_path, device_map={"": "disk"})
        assert "extra.weight" in caplog.text and "layers.1.up.weight" in caplog.text
        with pytest.raises(OffloadedWeightError, match=r"'layers\.1\.up\.weight' .* never loaded"):
            model(TOKENS)

    def test_another_shape(self, tmp_path: Path) -> None:
        write_safetensors(seeded(Buffered, width=8), tmp_path)
        self.refused(CheckpointError, r"has shape \(.*8.*\) in the checkpoint", on_meta(), tmp_path, "auto")

    def test_another_architecture(self, tmp_path: Path) -> None:
        write_safetensors(seeded(nn.Sequential, nn.Linear(2, 2)), tmp_path)
        self.refused(CheckpointError, "another architecture", on_meta(), tmp_path, "auto")

    def test_a_map_that_misses_weights(self, tmp_path: Path) -> None:
        write_safetensors(seeded(Buffered), tmp_path)
        self.refused(DeviceMapError, r"layers\.0\.norm\.weight", on_meta(), tmp_path, {"embed": 0, "scale": 0})

    @pytest.mark.parametrize("device", ["sim:7", "nowhere", 9, "cuda:0"])
    def test_a_device_that_is_not_there(self, device: Any, tmp_path: Path) -> None:
        write_safetensors(seeded(Buffered), tmp_path)
        self.refused(DeviceMapError, str(device), on_meta(), tmp_path, {"": device})

    def test_a_budget_below_the_largest_layer(self, tmp_path: Path) -> None:
        write_safetensors(seeded(Buffered), tmp_path)
        self.refused(BudgetError, "max_memory", on_meta(), tmp_path, "auto", max_memory={0: 100, "cpu": 100})

    def test_a_truncated_shard(self, tmp_path: Path) -> None:
        file = write_safetensors(seeded(Buffered), tmp_path)
        os.truncate(file, file.stat().st_size - 100)
        self.refused(CheckpointError, "model.safetensors", on_meta(), tmp_path, "auto")

    def test_a_missing_shard(self, tmp_path: Path) -> None:
        write_shards(seeded(Buffered), tmp_path)
        (tmp_path / "model-00002-of-00002.safetensors").unlink()
        self.refused(FileNotFoundError, "model-00002-of-00002", on_meta(), tmp_path, "auto")

    def test_no_checkpoint(self, tmp_path: Path) -> None:
        self.refused(OSError, str(tmp_path), on_meta(), tmp_path, "auto")

    def test_a_folder_that_cannot_be_written_to(self, tmp_path: Path) -> None:
        file = write_safetensors(seeded(Buffered), tmp_path)
        (tmp_path / "taken").write_text("a file")
        with pytest.raises(SpillError, match="taken"):
            load_checkpoint_and_dispatch(
                on_meta(), file, {"": "disk"}, dtype=torch.float16, offload_folder=tmp_path / "taken"
            )


class TestLoadCheckpointInModel:
    @pytest.mark.parametrize("device_map", ["parts", "the disk", "single tensors"])
    def test_then_dispatch_is_load_and_dispatch(self, device_map: str, tmp_path: Path) -> None:
        plain, model = seeded(Buffered), on_meta()
        chosen = MAPS[device_map]
        load_checkpoint_in_model(model, write_shards(plain, tmp_path), device_map=chosen)
        assert same_bits(model.layers[1].up.weight, plain.layers[1].up.weight)
        model = dispatch_model(model, chosen)
        assert_computes(model, plain)
        if device_map == "the disk":
            assert hf_bigload.inspect(model).stats.bytes_read > nbytes(plain)  # from the shards: nothing was copied

    def test_without_a_map_fills_the_very_parameters(self, tmp_path: Path) -> None:
        plain, model = seeded(Buffered), seeded(Buffered, seed=3)
        before = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
        load_checkpoint_in_model(model, write_bin(plain, tmp_path))
        assert {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()} == before
        assert same_bits(model(TOKENS), plain(TOKENS))

    def test_modules_that_stay_in_full_precision(self, tmp_path: Path) -> None:
        plain, model = seeded(Buffered), on_meta()
        file = write_safetensors(plain, tmp_path)
        load_checkpoint_in_model(model, file, {"": "cpu"}, dtype=torch.float16, keep_in_fp32_modules=["down"])
        dtypes = {n: p.dtype for n, p in model.named_parameters()}
        assert {dtypes[n] for n in dtypes if ".down." in n} == {torch.float32}
        assert {dtypes[n] for n in dtypes if ".down." not in n} == {torch.float16}

    def test_eight_bit_loading_is_left_to_its_library(self, tmp_path: Path) -> None:
        with pytest.raises(OffloadedWeightError, match="quantization_config"):
            load_checkpoint_in_model(on_meta(), tmp_path, {"": "cpu"}, offload_8bit_bnb=True)

    def test_a_state_dict_of_one_file(self, tmp_path: Path) -> None:
        plain = seeded(Buffered)
        for write in (write_safetensors, write_bin, write_old_bin):
            tensors = load_state_dict(write(plain, tmp_path), {"": "cpu", "layers.0": 1, "layers.1": "disk"})
            assert all(same_bits(t, plain.state_dict()[name]) for name, t in tensors.items())
            assert {str(t.device) for n, t in tensors.items() if n.startswith("layers.0.")} == {"sim:1"}
            assert {str(t.device) for n, t in tensors.items() if not n.startswith("layers.0.")} == {"cpu"}


class TestDispatchModel:
    @pytest.mark.parametrize("device_map", [name for name, value in MAPS.items() if isinstance(value, dict)])
    def test_a_model_in_memory(self, device_map: str) -> None:
        plain = seeded(Buffered)
        model = copy.deepcopy(plain)
        parameters = dict(model.named_parameters())
        assert dispatch_model(model, MAPS[device_map]) is model
        assert all(p is parameters[name] for name, p in model.named_parameters())
        assert_computes(model, plain)

    def test_on_one_device_is_a_plain_model_there(self) -> None:
        plain = seeded(Buffered)
        model = dispatch_model(copy.deepcopy(plain), {"": 1})
        assert {str(t.device) for t in (*model.parameters(), *model.buffers())} == {"sim:1"}
        assert model.hf_device_map == {"": 1} and not any("_hf_hook" in vars(m) for m in model.modules())

    def test_on_the_disk_of_a_folder_that_keeps_what_was_written(self, tmp_path: Path) -> None:
        plain = seeded(Buffered)
        model = dispatch_model(copy.deepcopy(plain), {"": 0, "layers": "disk"}, offload_dir=tmp_path)
        assert_computes(model, plain)
        written = json.loads((tmp_path / "index.json").read_text())
        assert all(name.startswith("layers.") for name in written) and len(written) == 18
        again = seeded(Buffered, seed=4)
        again.embed.load_state_dict(plain.embed.state_dict())
        assert_computes(dispatch_model(again, {"": 0, "layers": "disk"}, offload_dir=tmp_path), plain)

    def test_a_folder_of_another_model_is_refused(self, tmp_path: Path) -> None:
        dispatch_model(seeded(Buffered), {"": "disk"}, offload_dir=tmp_path)
        with pytest.raises(CheckpointError, match="another model's"):
            dispatch_model(seeded(Buffered, width=8), {"": "disk"}, offload_dir=tmp_path)

    @pytest.mark.parametrize("device_map", ["parts", "the disk"])
    def test_weights_on_meta_come_from_a_state_dict(self, device_map: str) -> None:
        plain = seeded(Buffered)
        model = dispatch_model(on_meta(), MAPS[device_map], state_dict=values(plain.state_dict()))
        assert_computes(model, plain)

    def test_or_from_where_an_index_says(self, tmp_path: Path) -> None:
        plain = seeded(Buffered)
        file = write_safetensors(plain, tmp_path)
        index = {name: {"safetensors_file": str(file), "weight_name": name} for name in tensors_of(plain)}
        model = dispatch_model(on_meta(), {"": "disk"}, main_device=0, offload_index=index)
        assert_computes(model, plain)

    def test_a_weight_that_nobody_knows_is_named_when_it_is_needed(self) -> None:
        model = dispatch_model(on_meta(), {"": 0, "layers.1": "cpu"})
        with pytest.raises(OffloadedWeightError, match=r"'embed\.weight' .* never loaded"):
            model(TOKENS)

    def test_again_with_other_maps(self, tmp_path: Path) -> None:
        plain = seeded(Buffered)
        model = load_checkpoint_and_dispatch(on_meta(), write_bin(plain, tmp_path), {"": "disk"})
        for device_map in (*(MAPS[name] for name in ("parts", "single tensors", "the disk")), {"": "cpu"}, {"": 1}):
            assert_computes(dispatch_model(model, device_map), plain)
        hooks = [h for module in model.modules() for h in module._state_dict_hooks.values()]
        assert not hooks and not any("_hf_hook" in vars(m) for m in model.modules())

    def test_a_main_device_of_choice(self) -> None:
        plain, ran_on = seeded(Buffered), []
        model = dispatch_model(copy.deepcopy(plain), {"": "cpu"}, main_device=1)
        model.layers[0].register_forward_hook(lambda m, args, out: ran_on.append(str(out.device)))
        assert same_bits(model(TOKENS), plain(TOKENS)) and ran_on == ["sim:1"]


class TestOffload:
    def test_to_ram(self) -> None:
        plain = seeded(Buffered)
        model = cpu_offload(copy.deepcopy(plain), execution_device=0)
        assert same_bits(model(TOKENS), plain(TOKENS))
        assert {str(p.device) for p in model.parameters()} == {"cpu"}
        assert hf_bigload.inspect(model).stats.bytes_copied > 0

    def test_to_ram_from_where_the_model_is(self) -> None:
        plain = seeded(Buffered)
        model = cpu_offload(copy.deepcopy(plain).to(1))
        assert {str(p.device) for p in model.parameters()} == {"cpu"}
        assert same_bits(model(TOKENS), plain(TOKENS))
        assert hf_bigload.inspect(model).plan.main_device == "sim:1"

    def test_to_ram_with_values_of_a_state_dict(self) -> None:
        plain = seeded(Buffered)
        model = cpu_offload(on_meta(), 0, state_dict=values(plain.state_dict()), offload_buffers=True)
        assert same_bits(model(TOKENS), plain(TOKENS)) and str(model.scale.device) == "cpu"

    @pytest.mark.parametrize("device", [0, "cpu"])
    def test_to_disk(self, device: Any, tmp_path: Path) -> None:
        plain = seeded(Buffered)
        model = disk_offload(copy.deepcopy(plain), tmp_path, execution_device=device)
        assert same_bits(model(TOKENS), plain(TOKENS))
        assert hf_bigload.inspect(model).stats.bytes_read > 0 and (tmp_path / "index.json").exists()

    def test_to_disk_without_a_folder(self) -> None:
        plain = seeded(Buffered)
        model = disk_offload(copy.deepcopy(plain), execution_device=0)
        assert same_bits(model(TOKENS), plain(TOKENS)) and hf_bigload.inspect(model).stats.bytes_read > 0

    @pytest.mark.parametrize("shape", [Buffered, Net])
    def test_to_a_folder_that_accelerate_wrote(self, shape: Any, tmp_path: Path) -> None:
        accelerate = pytest.importorskip("accelerate")
        plain = seeded(shape)
        accelerate.disk_offload(copy.deepcopy(plain), str(tmp_path), execution_device="cpu")
        model = disk_offload(on_meta(shape), tmp_path, execution_device=0)
        given = TOKENS if shape is Buffered else torch.randn(2, 8)
        assert same_bits(model(given), plain(given))

    def test_a_folder_that_accelerate_s_loading_wrote(self, tmp_path: Path) -> None:
        accelerate = pytest.importorskip("accelerate")
        plain = seeded(Net)
        device_map = {"first": "cpu", "layers": "disk", "norm": "cpu", "last": "cpu"}
        file = write_bin(plain, tmp_path)
        theirs = accelerate.load_checkpoint_and_dispatch(
            on_meta(Net), str(file), dict(device_map), offload_folder=str(tmp_path / "theirs")
        )
        model = dispatch_model(
            on_meta(Net),
            device_map,
            main_device=0,
            state_dict=values(plain.state_dict()),
            offload_dir=tmp_path / "theirs",
        )
        x = torch.randn(2, 8)
        assert same_bits(model(x), theirs(x)) and hf_bigload.inspect(model).stats.bytes_read > 0


class TestThreeModelsInALoop:
    """The guide's pipeline: one of three models at a time on an accelerator that holds no more than one."""

    def test_each_waits_in_ram_for_its_turn(self) -> None:
        plain = [seeded(Net, seed=i, width=64) for i in range(3)]
        with simdev.devices([2 * nbytes(plain[0])]) as sim:
            models, hooks = [], [None]
            for each in plain:
                model, hook = cpu_offload_with_hook(copy.deepcopy(each), 0, prev_module_hook=hooks[-1])
                models.append(model), hooks.append(hook)
            x = torch.randn(2, 64)
            inputs = [x, torch.nn.functional.pad(plain[0](x), (0, 61)), torch.nn.functional.pad(plain[1](x), (0, 61))]
            for _ in range(3):
                for model, each, given in zip(models, plain, inputs, strict=True):
                    assert same_bits(model(given), each(given))
                    assert [next(m.parameters()).device.type for m in models].count("sim") == 1
                hooks[-1].offload()
            assert sim.memory_allocated(0) == 0
            hooks[1].remove()
            assert not hasattr(models[0], "_hf_hook")
            assert sim.max_memory_allocated(0) < 1.5 * nbytes(plain[0])

    def test_a_model_may_run_many_times_before_the_next(self) -> None:
        plain = [seeded(Net, seed=i) for i in range(2)]
        first, hook = cpu_offload_with_hook(copy.deepcopy(plain[0]), 0)
        second, _ = cpu_offload_with_hook(copy.deepcopy(plain[1]), 0, prev_module_hook=hook)
        x = torch.randn(2, 8)
        assert same_bits(first(x), plain[0](x)) and same_bits(first(x), plain[0](x))
        assert same_bits(second(x), plain[1](x)) and next(first.parameters()).device.type == "cpu"


class TestHooksAndWeightsOfADispatchedModel:
    @pytest.fixture(params=["the disk", "parts", "on sim"])
    def model(self, request: pytest.FixtureRequest) -> Any:
        if request.param == "on sim":
            return dispatch_model(seeded(Buffered), {"": "cpu"}, main_device=0)
        return dispatch_model(seeded(Buffered), MAPS[request.param])

    def test_removing_all_hooks_leaves_a_plain_model_of_real_weights(self, model: Any) -> None:
        plain = seeded(Buffered)
        model(TOKENS)
        remove_hook_from_submodules(model)
        assert not any({"_hf_hook", "_old_forward", "to"} & set(vars(m)) for m in model.modules())
        assert all(type(m._parameters) is type(m._buffers) is dict for m in model.modules())
        assert same_bits(model.to("cpu")(TOKENS), plain(TOKENS))
        assert same_bits(model.to(1)(TOKENS.to(1)), plain(TOKENS))

    def test_offloaded_blocks_are_known(self, model: Any) -> None:
        offloaded = {name for name, module in model.named_modules() if has_offloaded_params(module)}
        streamed = {p.block.name for p in hf_bigload.inspect(model).plan.placements if p.streamed_bytes}
        assert streamed and streamed <= offloaded

    def test_a_block_is_aligned_for_a_while_and_keeps_what_is_written(self, model: Any) -> None:
        layer, plain = model.layers[1], seeded(Buffered).layers[1]
        home = layer.up.weight.device
        with align_module_device(layer):
            assert layer.up.weight.device == layer._hf_hook.execution_device
            assert same_bits(layer.up.weight, plain.up.weight)
            layer.up.weight.add_(1)
        assert layer.up.weight.device == home and same_bits(layer.up.weight, plain.up.weight + 1)
        with align_module_device(layer, 1):
            assert str(layer.up.weight.device) == "sim:1" and same_bits(layer.up.weight, plain.up.weight + 1)
        assert_model_at_rest(model)

    def test_aligning_ends_when_its_body_raises(self, model: Any) -> None:
        with pytest.raises(ZeroDivisionError), align_module_device(model.layers[1], 1):
            raise ZeroDivisionError
        assert_model_at_rest(model)

    def test_a_weight_that_is_set_is_used(self, model: Any) -> None:
        plain = seeded(Buffered)
        model(TOKENS)
        new = torch.randn(32, 16)
        device = model.layers[1].up.weight.device
        set_module_tensor_to_device(model, "layers.1.up.weight", device, value=new)
        plain.layers[1].up.weight.copy_(new)
        assert same_bits(model(TOKENS), plain(TOKENS)) and same_bits(model(TOKENS), plain(TOKENS))

    def test_a_weight_that_is_set_on_another_device_is_used(self, model: Any) -> None:
        plain = seeded(Buffered)
        new = torch.randn(32, 16)
        set_module_tensor_to_device(model, "layers.1.up.weight", 1, value=new)
        plain.layers[1].up.weight.copy_(new)
        assert same_bits(model(TOKENS), plain(TOKENS)) and same_bits(model(TOKENS), plain(TOKENS))

    def test_weights_can_be_read_written_and_saved_as_ever(self, model: Any, tmp_path: Path) -> None:
        plain = seeded(Buffered)
        model(TOKENS)
        assert list(model.state_dict()) == list(plain.state_dict())
        for name, tensor in plain.state_dict().items():
            assert same_bits(model.state_dict()[name], tensor)
        model.layers[1].up.weight.data[0] = 7
        model.embed.weight[3] = 5
        plain.layers[1].up.weight.data[0] = 7
        plain.embed.weight[3] = 5
        assert same_bits(model(TOKENS), plain(TOKENS))
        torch.save(model.state_dict(), tmp_path / "saved.bin")
        loaded = torch.load(tmp_path / "saved.bin", map_location="cpu")
        assert all(same_bits(t, plain.state_dict()[name]) for name, t in loaded.items())

    def test_a_hook_of_somebody_else_lives_beside_ours(self, model: Any) -> None:
        from hf_bigload.hooks import ModelHook, add_hook_to_module

        class Doubling(ModelHook):
            def post_forward(self, module: nn.Module, output: Any) -> Any:
                return 2 * output

        plain = seeded(Buffered)
        add_hook_to_module(model.layers[1], Doubling(), append=True)
        plain.layers[1].register_forward_hook(lambda m, args, out: 2 * out)
        assert same_bits(model(TOKENS), plain(TOKENS))
        hf_bigload.inspect(model).close()
        assert isinstance(model.layers[1]._hf_hook, Doubling)


class TestTheGuidesSnippets:
    """As the guide prints them, but for the import line and the sizes."""

    def test_build_load_dispatch(self, tmp_path: Path) -> None:
        plain = seeded(Buffered)
        weights_location = write_shards(plain, tmp_path)

        with init_empty_weights():
            model = Buffered()
        model.head.weight = model.embed.weight
        model = load_checkpoint_and_dispatch(
            model, checkpoint=weights_location, device_map="auto", no_split_module_classes=["Layer"]
        )
        assert_computes(model, plain)
        assert model.hf_device_map

    def test_a_map_of_one_s_own(self, tmp_path: Path) -> None:
        plain = seeded(Buffered, layers=4)
        model = on_meta(Buffered, 4)
        device_map = infer_auto_device_map(
            model, max_memory={0: nbytes(plain) // 2, "cpu": nbytes(plain)}, no_split_module_classes=["Layer"]
        )
        assert set(device_map.values()) == {0, "cpu"}
        model = load_checkpoint_and_dispatch(model, write_bin(plain, tmp_path), device_map=device_map)
        assert_computes(model, plain)

    def test_one_hundred_billion_parameters(self) -> None:
        script = (
            "import resource, torch\n"
            "from torch import nn\n"
            "from hf_bigload import init_empty_weights, infer_auto_device_map\n"
            "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "with init_empty_weights():\n"
            "    model = nn.Sequential(*[nn.Linear(10000, 10000) for _ in range(1000)])\n"
            "assert sum(p.numel() for p in model.parameters()) == 1000 * (10**8 + 10**4)\n"
            "infer_auto_device_map(model, max_memory={'cpu': '10GiB', 'disk': '1000GiB'})\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) < 100 * 1024  # KiB

    @pytest.mark.slow
    def test_a_model_with_thirty_gigabyte_tensors(self) -> None:
        script = (
            "import resource\n"
            "from transformers import AutoModelForCausalLM, DeepseekV3Config\n"
            "from hf_bigload import init_empty_weights\n"
            "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "with init_empty_weights():\n"
            "    model = AutoModelForCausalLM.from_config(DeepseekV3Config())\n"
            "assert sum(p.numel() for p in model.parameters()) > 6e11\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert int(done.stdout.splitlines()[-1]) < 1024 * 1024  # KiB


def test_layers_are_blocks_also_where_they_are_built_one_by_one() -> None:
    plain = seeded(nn.Sequential, Layer(), Layer())
    model = dispatch_model(copy.deepcopy(plain), {"": "disk"})
    x = torch.randn(2, 8)
    assert same_bits(model(x), plain(x)) and hf_bigload.inspect(model).stats.fetches == 2
