"""Load a decoder onto an accelerator in one of several ways, decode token by token, and print one JSON line.

    python -m benchmarks.decode --engine hf_bigload --checkpoint /data/llama_8b --max-memory 0=8GB,cpu=64GB

`hf_bigload` and `stock` make the same `from_pretrained(device_map="auto")` call; `resident` has all weights on the
device, as a plain load and `.to(device)` leave them: the logits that the others must give. `group_offload` is
diffusers' streamed offload of the same module, block by block, from RAM.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.accelerator import opened, synchronize
from benchmarks.forward import import_engine, token_ids
from benchmarks.measure import Measured, parse_max_memory, sha256
from benchmarks.proc import disk_read_bytes

ENGINES = ("hf_bigload", "stock", "resident", "group_offload")
PROMPT_TOKENS = 16


def load(options: argparse.Namespace, model_class: type[Any], device: torch.device, folder: str) -> Any:
    """The model in the checkpoint's own dtype, ready to run on `device`."""
    arguments: dict[str, Any] = {"torch_dtype": "auto"}
    if options.engine in ("hf_bigload", "stock"):
        arguments |= {"device_map": "auto", "max_memory": options.max_memory}
    if options.engine == "stock":
        arguments["offload_folder"] = folder
    model = model_class.from_pretrained(options.checkpoint, **arguments).eval()
    if options.engine == "resident":
        model.to(device)
    elif options.engine == "group_offload":
        group_offload(model, device)
    synchronize()
    return model


def group_offload(model: torch.nn.Module, device: torch.device) -> None:
    """Diffusers' fastest setting, as its guide gives it: a block at a time, on a stream of its own.

    It looks for lists of blocks among a module's own children; what holds none (a head) stays on the device.
    """
    from diffusers.hooks import apply_group_offloading

    lists = (torch.nn.ModuleList, torch.nn.Sequential)
    for child in model.children():
        if not any(isinstance(module, lists) for module in child.children()):
            child.to(device)
            continue
        apply_group_offloading(
            child,
            onload_device=device,
            offload_type="block_level",
            num_blocks_per_group=1,
            use_stream=True,
            non_blocking=True,
        )


def moved(model: Any, engine: str) -> tuple[int, int]:
    """Bytes that ours read from disk, and copied between host and device, since the load."""
    if engine != "hf_bigload":
        return 0, 0
    from hf_bigload import inspect

    stats = inspect(model).stats
    return stats.bytes_read, stats.bytes_copied


def decode(model: Any, engine: str, device: torch.device, steps: int) -> list[dict[str, Any]]:
    """The prompt, then `steps` tokens greedily, one forward each: seconds, bytes moved and a hash of the logits."""
    token = token_ids(model.config.vocab_size, PROMPT_TOKENS).to(device)
    cache, runs = None, []
    for _ in range(steps + 1):
        read, copied = moved(model, engine)
        synchronize()
        started = time.perf_counter()
        with torch.no_grad():
            output = model(input_ids=token, past_key_values=cache, use_cache=True)
            next_token = output.logits[:, -1:].argmax(-1).to(device)
            synchronize()
        seconds = time.perf_counter() - started
        read_after, copied_after = moved(model, engine)
        runs.append(
            {
                "tokens": token.shape[1],
                "seconds": seconds,
                "read_bytes": read_after - read,
                "copied_bytes": copied_after - copied,
                "logits_sha256": sha256(output.logits),
            }
        )
        token, cache = next_token, output.past_key_values
    return runs


def weight_bytes(model: torch.nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def benchmark(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    checkpoint = options.checkpoint = options.checkpoint.resolve(strict=True)
    model_class = import_engine(options.engine, checkpoint)
    with tempfile.TemporaryDirectory(dir=checkpoint.parent) as folder:
        model, loaded = Measured.of(lambda: load(options, model_class, device, folder))
        prompt, *steps = decode(model, options.engine, device, options.steps)
    return {
        "engine": options.engine,
        "load": vars(loaded),
        "weight_bytes": weight_bytes(model),
        "prompt": prompt,
        "steps": steps,
        "disk_read_bytes": disk_read_bytes(),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Decode token by token on an accelerator, figures as JSON.")
    parser.add_argument("--engine", choices=ENGINES, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--device", help="cuda, xpu, sim; default: what there is")
    parser.add_argument("--max-memory", type=parse_max_memory, help="0=8GB,cpu=64GB; default: all there is")
    parser.add_argument("--steps", type=int, default=8, help="tokens after the prompt")
    options = parser.parse_args(argv)
    with opened(options.device) as device:
        print(json.dumps(benchmark(options, device)))


if __name__ == "__main__":
    main()
