"""Decide yourself where each part of a model rests, and read back what came of it.

A device map gives modules a place by their name: an accelerator's index, "cpu" or "disk". The longest name that covers
a weight decides, and "" stands for the whole model. Start from the automatic map, change what you know better, and give
the result to the call that loads the model.
"""

from __future__ import annotations

import tempfile

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import hf_bigload


def write_tiny_llama(folder: str) -> None:
    """Takes the place of a model from the Hub: random weights, 8 layers, 25 MB."""
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)


def main(folder: str) -> None:
    write_tiny_llama(folder)

    # The automatic map, as a dict to look at: without weights, from the configuration alone.
    with hf_bigload.init_empty_weights():
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    device_map = hf_bigload.infer_auto_device_map(
        skeleton, max_memory={"cpu": "15MB"}, no_split_module_classes=["LlamaDecoderLayer"]
    )
    print("automatic:", device_map)

    # One of our own: the first layers in RAM, the rest of them on disk. No need to name each: the longest name wins.
    device_map = {"": "cpu", "model.layers": "disk", "model.layers.0": "cpu", "model.layers.1": "cpu"}
    print("our own:", device_map)

    # The call is the library's. `enable` for a block of code; `hf_bigload.enable()` alone is for the whole program.
    with hf_bigload.enable():
        model = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map)

    # What rests where and runs where, and what each device has to hold for it.
    print(hf_bigload.inspect(model).explain())

    tokens = torch.arange(16).unsqueeze(0)
    with torch.no_grad():
        same = torch.equal(model(tokens).logits, AutoModelForCausalLM.from_pretrained(folder)(tokens).logits)
    print(f"same logits as a plain load, to the bit: {same}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        main(scratch)
