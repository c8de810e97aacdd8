"""Quantised checkpoints are loaded by the library where nothing has to stream, and refused where something would."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.quantizers import auto

from hf_bigload.dispatch.attach import attachment_of
from hf_bigload.errors import QuantizedOffloadError

from .models import Saved, assert_same_model

BLOCK = 64
QUANTISED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A Llama in blockwise FP8, which the library dequantises where there is no GPU."""
    folder = tmp_path_factory.mktemp("fp8")
    config = LlamaConfig(
        vocab_size=128, hidden_size=128, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    tensors = {}
    for name, weight in model.state_dict().items():
        tensors[name] = weight
        if any(part in name for part in QUANTISED):
            tensors[name], tensors[name + "_scale_inv"] = quantise(weight)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    quantised = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
    fields = {**json.loads(config.to_json_string(use_diff=False)), "quantization_config": quantised}
    (folder / "config.json").write_text(json.dumps(fields))
    return Saved(folder, AutoModelForCausalLM, sum(t.numel() * 2 for t in model.state_dict().values()))


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = weight.shape
    blocks = weight.view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    scale = blocks.abs().amax(dim=(1, 3), keepdim=True) / 448
    return (blocks / scale).view(rows, columns).to(torch.float8_e4m3fn), scale[:, 0, :, 0]


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}], ids=str)
def test_without_offload_the_library_loads_it(device_map: Any, fp8: Saved) -> None:
    model = fp8.load(device_map=device_map)
    assert attachment_of(model) is None
    assert_same_model(model, fp8.plain())


@pytest.mark.parametrize(
    "arguments",
    [
        {"device_map": "auto", "max_memory": {"cpu": 400_000}},
        {"device_map": {"": "disk"}},
        {"device_map": {"": "cpu", "model.layers.2": "disk"}},
    ],
    ids=str,
)
def test_what_would_have_to_stream_is_refused(arguments: dict[str, Any], fp8: Saved) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in fp8.folder.iterdir()}
    with pytest.raises(QuantizedOffloadError, match=r"fp8 checkpoint would stream .* max_memory"):
        fp8.load(**arguments)
    assert {path.name: path.stat().st_mtime_ns for path in fp8.folder.iterdir()} == before


def test_a_quantiser_of_ones_own(llama: Saved, plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked for sizes and budgets, and told the map."""
    told: dict[str, Any] = {}

    class Config(auto.QuantizationConfigMixin):
        def __init__(self, quant_method: str = "half", **kwargs: Any) -> None:
            self.quant_method = quant_method

    class Quantizer(auto.HfQuantizer):
        requires_calibration = False

        def param_element_size(self, model: Any, name: str, tensor: torch.Tensor) -> float:
            return 0.5

        def adjust_max_memory(self, max_memory: dict[Any, Any]) -> dict[Any, Any]:
            told["max_memory"] = max_memory
            return max_memory

        def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
            told["device_map"] = device_map

        def is_serializable(self) -> bool:
            return True

        @property
        def is_trainable(self) -> bool:
            return True

    monkeypatch.setitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "half", Config)
    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "half", Quantizer)
    config = json.loads((llama.folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "half"}
    for path in llama.folder.glob("model*"):
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    budget = {"cpu": llama.nbytes // 4}
    model = Saved(tmp_path, llama.auto, 0).load(device_map="auto", max_memory=budget)
    assert told == {"max_memory": budget, "device_map": {"": "cpu"}}
    assert_same_model(model, plain("llama"))
