"""A language model that generates text on a budget of RAM, and what each token costs in bytes read from disk.

    python examples/chat_budget.py                                                  a tiny model, random weights
    python examples/chat_budget.py --model org/name --ram 8GiB --prompt "Hello"     a real one

The lines that load and generate are those of any model card. More RAM leaves fewer bytes to read for each token, down
to none; less RAM never changes the answer.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

import hf_bigload

MB = 10**6


def write_tiny_llama(folder: str) -> None:
    """Takes the place of a model from the Hub: 16 layers, 50 MB, a tokenizer that reads bytes. It babbles."""
    tokenizer = ByT5Tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=16,
        num_attention_heads=4,
        num_key_value_heads=4,
        initializer_range=0.2,  # ten times the usual: each word depends on the ones before, noise as it is
        eos_token_id=None,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(model_id: str, ram: str, prompt: str, new_tokens: int) -> None:
    hf_bigload.enable(explain=True)  # prints the plan of every load
    tokenizer = AutoTokenizer.from_pretrained(model_id)
    model = AutoModelForCausalLM.from_pretrained(model_id, device_map="auto", max_memory={"cpu": ram})

    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    before = hf_bigload.inspect(model).stats.bytes_read
    output = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    read = hf_bigload.inspect(model).stats.bytes_read - before

    answer = output[0, inputs["input_ids"].shape[1] :]
    print("answer:", repr(tokenizer.decode(answer, skip_special_tokens=True)))
    print(f"weights: {model.get_memory_footprint() / MB:.1f} MB, on a budget of {ram} RAM")
    print(f"read from disk: {read / len(answer) / MB:.1f} MB per token, {len(answer)} tokens")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a repository of the Hub, or a folder")
    parser.add_argument("--ram", default="30MB")
    parser.add_argument("--prompt", default="What is a river?")
    parser.add_argument("--new-tokens", type=int, default=16)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if options.model is None:
            write_tiny_llama(scratch)
        main(options.model or scratch, options.ram, options.prompt, options.new_tokens)
