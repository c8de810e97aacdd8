"""Tiny random models of a few architectures, and what it means that two loads of one are the same model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    GPT2Config,
    HrmTextConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
)

import hf_bigload

VOCABULARY = 128
LAYERS = 12
"""Of the deep Llama, in which one layer's name begins with another's: layers.1, layers.10."""
NEW_TOKENS = 5
SHARD_BYTES = 60_000

_SMALL: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_ENCODER_DECODER: dict[str, Any] = {**_SMALL, "d_model": 32, "decoder_start_token_id": 0}
_DECODER: dict[str, Any] = {**_SMALL, "hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 128}


def _configs() -> dict[str, PreTrainedConfig]:
    t5 = {**_ENCODER_DECODER, "d_ff": 80, "d_kv": 8, "num_layers": 3, "num_heads": 4}
    bart_layers = {
        f"{side}_{what}": n
        for side in ("encoder", "decoder")
        for what, n in (("layers", 3), ("ffn_dim", 64), ("attention_heads", 4))
    }
    return {
        "llama": LlamaConfig(**_DECODER, intermediate_size=64, num_hidden_layers=5, num_key_value_heads=2),
        "gpt2": GPT2Config(**_SMALL, n_embd=32, n_layer=4, n_head=4, n_positions=128),
        "mixtral": MixtralConfig(
            **_DECODER, intermediate_size=48, num_hidden_layers=3, num_key_value_heads=2, num_local_experts=4
        ),
        "hrm_text": HrmTextConfig(**_DECODER, intermediate_size=48, num_hidden_layers=2, head_dim=8, L_cycles=2),
        "t5": T5Config(**t5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
        "bart": BartConfig(
            **_ENCODER_DECODER,
            **bart_layers,
            max_position_embeddings=128,
            forced_eos_token_id=None,
        ),
    }


CONFIGS = _configs()
DEEP = LlamaConfig(**_DECODER, intermediate_size=64, num_hidden_layers=LAYERS, num_key_value_heads=2)

RESIDENT, BUDGETED, ON_DISK = "resident", "budgeted", "on disk"
PLACEMENTS = (RESIDENT, BUDGETED, ON_DISK)
OFFLOADED = (BUDGETED, ON_DISK)


@dataclass(frozen=True)
class Saved:
    """A model in a folder: `plain` loads it as the library does by itself, `load` through hf_bigload."""

    folder: Path
    auto: Any
    nbytes: int
    """Of its weights in fp32, tied ones once."""

    def plain(self, **kwargs: Any) -> PreTrainedModel:
        return self.auto.from_pretrained(self.folder, **kwargs)

    def load(self, placement: str | None = None, **kwargs: Any) -> Any:
        with hf_bigload.enable():
            return self.auto.from_pretrained(self.folder, **(self.placed(placement) | kwargs))

    def placed(self, placement: str | None) -> dict[str, Any]:
        """The arguments that bring a placement about, on a machine without accelerator."""
        if placement is None:
            return {}
        if placement == ON_DISK:
            return {"device_map": {"": "disk"}}
        budget = {"max_memory": {"cpu": int(0.4 * self.nbytes)}} if placement == BUDGETED else {}
        return {"device_map": "auto", **budget}


def new_model(name: str) -> PreTrainedModel:
    """A random model of one of `CONFIGS`, or the "deep" Llama; every call gives the same one."""
    config = copy.deepcopy(CONFIGS.get(name, DEEP))  # a save writes to it
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    torch.manual_seed(0)
    return auto.from_config(config).eval()


def save(name: str, folder: Path, **options: Any) -> Saved:
    """Save `new_model(name)` to `folder`, in several shards unless `options` of `save_pretrained` say otherwise."""
    model = new_model(name)
    model.save_pretrained(folder, **({"max_shard_size": SHARD_BYTES} | options))
    auto = AutoModelForSeq2SeqLM if model.config.is_encoder_decoder else AutoModelForCausalLM
    return Saved(folder, auto, bytes_of(model))


def bytes_of(model: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def save_tokenizer(folder: Path) -> None:
    """One whose words are w0, w1, ...: word n is token n."""
    words = {f"w{n}": n for n in range(VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    special = {"pad_token": "w0", "bos_token": "w1", "eos_token": "w2", "unk_token": "w0"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


# ---------------------------------------------------------------- what a model computes


def prompt(device: Any = "cpu") -> torch.Tensor:
    return torch.arange(3, 12, device=device)[None]


def forward(model: Any, device: Any = "cpu") -> torch.Tensor:
    """Logits (or, of a base model, hidden states) of the same input every time: float [1, 9, ...], on the CPU."""
    inputs = {"input_ids": prompt(device)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = prompt(device)
    with torch.no_grad():
        return model(**inputs)[0].cpu()


def generate(model: Any, device: Any = "cpu", **options: Any) -> torch.Tensor:
    torch.manual_seed(0)
    defaults = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    return model.generate(prompt(device), **(defaults | options)).cpu()


# ---------------------------------------------------------------- sameness


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in shape, dtype and every bit."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def all_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def assert_same_weights(model: torch.nn.Module, expected: torch.nn.Module) -> None:
    found, wanted = dict(all_tensors(model)), dict(all_tensors(expected))
    assert list(found) == list(wanted)
    assert [name for name, tensor in found.items() if tensor.is_meta] == []
    assert [name for name, tensor in wanted.items() if not same(found[name], tensor)] == []
    states, wanted_states = model.state_dict(), expected.state_dict()
    assert list(states) == list(wanted_states)
    assert [name for name, tensor in wanted_states.items() if not same(states[name], tensor)] == []


def assert_same_model(model: torch.nn.Module, expected: torch.nn.Module, device: Any = "cpu") -> None:
    """The same weights and buffers, bit for bit, and twice the same outputs: once before they were read, once after."""
    wanted = forward(expected)
    assert same(forward(model, device), wanted)
    assert_same_weights(model, expected)
    assert same(forward(model, device), wanted)
