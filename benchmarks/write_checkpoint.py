"""Write a random checkpoint of a real architecture at its real size.

Names and shapes come from the library's own model on meta, so they cannot drift from what a load expects. The values
are one block of normal numbers, entered at a point that the tensor's name decides: the same name, dtype and shape
give the same bytes on every run, and only the block is ever held in memory.

    python -m benchmarks.write_checkpoint t0pp /data/t0pp
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

SAFETENSORS_DTYPE = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
# Prime, so that no row length divides it: rows of a matrix never repeat, and its rank stays full.
BLOCK_ELEMENTS = 8_388_593
# Near 1/sqrt(d_model) for the widths below: activations keep their scale from layer to layer.
WEIGHT_STD = 0.02
HEADER_ALIGNMENT = 8


@dataclass(frozen=True)
class Architecture:
    """What a published checkpoint says of itself, and how it is cut into files.

    `untied` names tensors that the class ties by default and the published file nevertheless holds apart.
    """

    config: dict[str, Any]
    generation_config: dict[str, Any]
    dtype: torch.dtype
    shards: int
    untied: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Tensor:
    """One tensor of the checkpoint; `offset` is in bytes from the first tensor of the whole checkpoint."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _t5_v1_1(
    d_model: int, d_ff: int, heads: int, *, d_kv: int = 64, layers: int = 24, vocab: int = 32128, shards: int
) -> Architecture:
    config = {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "d_model": d_model,
        "d_ff": d_ff,
        "d_kv": d_kv,
        "num_heads": heads,
        "num_layers": layers,
        "num_decoder_layers": layers,
        "vocab_size": vocab,
        "feed_forward_proj": "gated-gelu",
        "relative_attention_num_buckets": 32,
        "tie_word_embeddings": False,
        "is_encoder_decoder": True,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    generation = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    return Architecture(config, generation, torch.bfloat16, shards, untied=frozenset({"lm_head.weight"}))


def _llama(
    hidden: int,
    intermediate: int,
    heads: int,
    *,
    kv_heads: int,
    layers: int,
    vocab: int,
    shards: int,
    dtype: torch.dtype = torch.float32,
) -> Architecture:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": layers,
        "vocab_size": vocab,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return Architecture(config, {"bos_token_id": 1, "eos_token_id": 2}, dtype, shards)


def _mixtral(hidden: int, intermediate: int, heads: int, *, layers: int, vocab: int, shards: int) -> Architecture:
    """Eight experts in every layer, of which each token meets two."""
    llama = _llama(hidden, intermediate, heads, kv_heads=4, layers=layers, vocab=vocab, shards=shards)
    config = {**llama.config, "architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
    experts = {"num_local_experts": 8, "num_experts_per_tok": 2}
    return Architecture(config | experts, llama.generation_config, torch.bfloat16, shards)


ARCHITECTURES: dict[str, Architecture] = {
    "t0_3b": _t5_v1_1(2048, 5120, 32, shards=2),
    "t0pp": _t5_v1_1(4096, 10240, 64, shards=5),
    "llama_1b": _llama(2048, 5632, 32, kv_heads=4, layers=22, vocab=32000, shards=1),
    "llama_8b": _llama(4096, 14336, 32, kv_heads=8, layers=32, vocab=128256, shards=4, dtype=torch.bfloat16),
    "mixtral_1b": _mixtral(1024, 3584, 16, layers=16, vocab=32000, shards=2),
    "t0_3b_tiny": _t5_v1_1(64, 160, 4, d_kv=16, layers=2, vocab=128, shards=2),
    "t0pp_tiny": _t5_v1_1(128, 320, 8, d_kv=16, layers=3, vocab=128, shards=5),
    "llama_1b_tiny": _llama(64, 176, 8, kv_heads=2, layers=3, vocab=128, shards=1),
    "mixtral_1b_tiny": _mixtral(64, 224, 8, layers=3, vocab=128, shards=2),
    "llama_8b_tiny": _llama(64, 224, 8, kv_heads=2, layers=8, vocab=128, shards=4, dtype=torch.bfloat16),
}


def meta_model(architecture: Architecture) -> torch.nn.Module:
    """The architecture's own class on the meta device: names and shapes, no data."""
    import transformers

    config = transformers.AutoConfig.for_model(**architecture.config)
    (class_name,) = architecture.config["architectures"]
    with torch.device("meta"):
        return getattr(transformers, class_name)(config)


def list_tensors(architecture: Architecture, dtype: torch.dtype) -> list[Tensor]:
    """The tensors that the published file holds, in module order: tied names once."""
    model = meta_model(architecture)
    tied = set(model.all_tied_weights_keys) - architecture.untied  # type: ignore[arg-type]
    tensors: list[Tensor] = []
    offset = 0
    for name, parameter in model.state_dict().items():
        if name not in tied:
            tensors.append(Tensor(name, tuple(parameter.shape), dtype, offset))
            offset += tensors[-1].nbytes
    return tensors


def split_into_shards(tensors: Sequence[Tensor], count: int) -> list[list[Tensor]]:
    """Cut the list in `count` runs of nearly equal bytes; a tensor goes where it begins.

    Raises ValueError when a shard would be empty.
    """
    total = sum(tensor.nbytes for tensor in tensors)
    shards: list[list[Tensor]] = [[] for _ in range(count)]
    for tensor in tensors:
        shards[tensor.offset * count // total].append(tensor)
    if not all(shards):
        largest = max(tensors, key=lambda tensor: tensor.nbytes)
        raise ValueError(
            f"{count} shards leave one empty: the checkpoint has {total} bytes in {len(tensors)} tensors, and "
            f"{largest.name} alone has {largest.nbytes}. Ask for fewer shards."
        )
    return shards


class RandomBlock:
    """One block of normal numbers that every tensor's bytes are cut from."""

    def __init__(self, dtype: torch.dtype, elements: int = BLOCK_ELEMENTS) -> None:
        values = torch.randn(elements, generator=torch.Generator().manual_seed(0)) * WEIGHT_STD
        self._dtype = dtype
        self._bytes = memoryview(values.to(dtype).view(torch.uint8).numpy())  # type: ignore[arg-type]
        self._ones = memoryview(torch.ones(elements, dtype=dtype).view(torch.uint8).numpy())  # type: ignore[arg-type]

    def chunks(self, tensor: Tensor) -> Iterator[memoryview]:
        """The tensor's bytes, a block at most at a time. A vector is a norm's scale, and all ones."""
        source = self._ones if len(tensor.shape) == 1 else self._bytes
        seed = int.from_bytes(hashlib.sha256(tensor.name.encode()).digest()[:8], "little")
        position = seed * self._dtype.itemsize % len(source)
        remaining = tensor.nbytes
        while remaining:
            chunk = source[position : position + remaining]
            yield chunk
            remaining -= len(chunk)
            position = 0


def safetensors_header(tensors: Sequence[Tensor]) -> bytes:
    """Length prefix and JSON header, padded with spaces as the format's own writer does."""
    start = tensors[0].offset
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for tensor in tensors:
        begin = tensor.offset - start
        entries[tensor.name] = {
            "dtype": SAFETENSORS_DTYPE[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, begin + tensor.nbytes],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _write_out(file: BinaryIO) -> None:
    """To the disk and out of the page cache: the first load after a write is then a cold one."""
    os.fdatasync(file.fileno())
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def write_shard(path: Path, tensors: Sequence[Tensor], block: RandomBlock) -> None:
    """Stream one safetensors file; raises FileExistsError where there is one already."""
    with open(path, "xb") as file:
        file.write(safetensors_header(tensors))
        for tensor in tensors:
            for chunk in block.chunks(tensor):
                file.write(chunk)
        file.flush()
        _write_out(file)


def _check_destination(folder: Path, nbytes: int) -> None:
    """Raises FileExistsError for a folder with anything in it, OSError for a disk with too little room."""
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty, and nothing in it is overwritten: name a new folder.")
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if nbytes > free:
        raise OSError(
            errno.ENOSPC,
            f"the checkpoint has {nbytes} bytes, the disk {free} bytes free: name another disk",
            str(folder),
        )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def write_checkpoint(name: str, folder: Path | str, dtype: torch.dtype | None = None, shards: int | None = None) -> int:
    """Write the named architecture's checkpoint into a new folder and return the bytes of its tensors.

    `dtype` and `shards` default to the published ones. One shard has no index, as a published one has none.
    Raises FileExistsError, OSError (no room) or ValueError (too many shards) before any tensor is written.
    """
    architecture, folder = ARCHITECTURES[name], Path(folder)
    dtype = dtype or architecture.dtype
    tensors = list_tensors(architecture, dtype)
    total = sum(tensor.nbytes for tensor in tensors)
    parts = split_into_shards(tensors, shards or architecture.shards)
    _check_destination(folder, total)
    folder.mkdir(parents=True, exist_ok=True)

    _write_json(folder / "generation_config.json", architecture.generation_config)
    block = RandomBlock(dtype)
    names = _shard_names(len(parts))
    for file_name, part in zip(names, parts, strict=True):
        write_shard(folder / file_name, part, block)
    if len(parts) > 1:
        weight_map = {tensor.name: file for file, part in zip(names, parts, strict=True) for tensor in part}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)
    # Last: a folder with a config is a whole checkpoint.
    _write_json(folder / "config.json", {**architecture.config, "torch_dtype": str(dtype).removeprefix("torch.")})
    return total


def ensure_checkpoint(name: str, folder: Path | str, dtype: torch.dtype | None = None) -> Path:
    """`folder`, with the named architecture's checkpoint: written, in `dtype`, if it is not there.

    Raises ValueError where the folder has another one.
    """
    folder = Path(folder)
    if not (folder / "config.json").exists():
        write_checkpoint(name, folder, dtype)
    found, wanted = json.loads((folder / "config.json").read_text()), ARCHITECTURES[name].config
    if any(found.get(key) != value for key, value in wanted.items()):
        raise ValueError(f"{folder} holds another model than {name}: name another folder, or another model.")
    return folder


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write a random checkpoint of a real architecture at real size.")
    parser.add_argument("name", choices=sorted(ARCHITECTURES))
    parser.add_argument("folder", type=Path, help="a new or an empty folder")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="default: the published one")
    parser.add_argument("--shards", type=int, help="default: the published number")
    options = parser.parse_args(argv)
    if options.shards is not None and options.shards < 1:
        parser.error(f"--shards {options.shards}: at least one file is needed")
    started = time.perf_counter()
    dtype = getattr(torch, options.dtype) if options.dtype else None
    nbytes = write_checkpoint(options.name, options.folder, dtype, options.shards)
    seconds = time.perf_counter() - started
    print(f"{options.folder}: {nbytes} bytes in {seconds:.1f} s, {nbytes / seconds / 1e9:.2f} GB/s")


if __name__ == "__main__":
    main()
