"""Load a pipeline in one of several ways, call it a few times for the same image, and print one JSON line.

    python -m benchmarks.pipeline_call --engine hf_bigload --checkpoint build/bench/pipeline_short --steps 30

`hf_bigload` has one budget, for the denoiser and a share of the encoders; `resident` has all weights on the device:
the pixels that the others must give. The rest are the three ways that diffusers offers, as its guides give them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.accelerator import SIMULATED, opened, synchronize
from benchmarks.measure import Measured, sha256
from benchmarks.proc import disk_read_bytes

DENOISER = "transformer"
ENCODERS = ("text_encoder", "text_encoder_2")
FULL_SIZE = {"height": 1024, "width": 1024, "max_sequence_length": 512}
"""Pixels and tokens of a call with real widths."""
ROOM_FOR_ENCODERS = 0.25
"""The share of the encoders' bytes that the budget has beside the denoiser: a ring for them, and not themselves."""


def group_offload(offload_type: str) -> Callable[[Any, torch.device], None]:
    def apply(pipeline: Any, device: torch.device) -> None:
        blocks = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
        pipeline.enable_group_offload(
            onload_device=device, offload_type=offload_type, use_stream=True, non_blocking=True, **blocks
        )

    return apply


PEERS: dict[str, Callable[[Any, torch.device], Any]] = {
    "resident": lambda pipeline, device: pipeline.to(device),
    "model_cpu_offload": lambda pipeline, device: pipeline.enable_model_cpu_offload(device=device),
    "sequential_cpu_offload": lambda pipeline, device: pipeline.enable_sequential_cpu_offload(device=device),
    "group_offload_blocks": group_offload("block_level"),
    "group_offload_leaves": group_offload("leaf_level"),
}
ENGINES = ("hf_bigload", *PEERS)


def file_bytes(checkpoint: Path, *components: str) -> int:
    """Bytes of these components' weights files; none stands for all of them."""
    names = components or ("*",)
    return sum(file.stat().st_size for name in names for file in checkpoint.glob(f"{name}/*.safetensors"))


def load(options: argparse.Namespace, device: torch.device) -> Any:
    """The pipeline in its files' dtype, ready to run on `device`."""
    from diffusers import FluxPipeline

    arguments: dict[str, Any] = {"torch_dtype": getattr(torch, options.dtype)}
    if options.engine != "hf_bigload":
        pipeline = FluxPipeline.from_pretrained(options.checkpoint, **arguments)
        PEERS[options.engine](pipeline, device)
        return pipeline
    import hf_bigload

    hf_bigload.enable()
    arguments |= {"device_map": "auto", "max_memory": {0: options.budget, "cpu": 2 * file_bytes(options.checkpoint)}}
    return FluxPipeline.from_pretrained(options.checkpoint, **arguments)


def components_of(pipeline: Any) -> dict[str, nn.Module]:
    return {name: model for name, model in pipeline.components.items() if isinstance(model, nn.Module)}


def by_block(pipeline: Any) -> dict[str, dict[str, int]]:
    """Bytes that ours copied so far: by component, by block."""
    from hf_bigload import inspect

    return {
        name: {block: traffic.bytes_copied for block, traffic in inspect(model).stats.blocks.items()}
        for name, model in components_of(pipeline).items()
    }


def streamed(pipeline: Any) -> dict[str, dict[str, int]]:
    """Bytes that one pass over a component brings by the plan: by component, by block."""
    from hf_bigload import inspect

    return {
        name: {p.block.name: p.streamed_bytes for p in inspect(model).plan.placements if p.streamed_bytes}
        for name, model in components_of(pipeline).items()
    }


def to_the_device(device: torch.device) -> int | None:
    """Bytes copied to the device so far, where it counts them: the simulated one does."""
    if device.type != SIMULATED:
        return None
    return int(torch.get_device_module(device).copied_bytes(device).host_to_device)


def call(pipeline: Any, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """One image: seconds, the device's peak (bytes), bytes to the device, and a hash of the pixels."""
    from tests.diffusers_loader.pipelines import run

    size = FULL_SIZE if options.full_size else {}
    before = to_the_device(device)
    synchronize()
    torch.get_device_module(device).reset_peak_memory_stats(device)
    started = time.perf_counter()
    image = run(pipeline, "flux", num_inference_steps=options.steps, **size)
    synchronize()
    seconds = time.perf_counter() - started
    after = to_the_device(device)
    if not image.isfinite().all() or image.min() == image.max():
        raise ValueError("the image is not finite, or all of one value: equal pixels would say nothing")
    return {
        "seconds": seconds,
        "peak_bytes": torch.get_device_module(device).max_memory_allocated(device),
        "copied_bytes": None if before is None or after is None else after - before,
        "pixels_sha256": sha256(image),
    }


def benchmark(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    pipeline, loaded = Measured.of(lambda: load(options, device))
    is_ours = options.engine == "hf_bigload"
    calls = [call(pipeline, options, device) for _ in range(options.calls - 1)]
    before = by_block(pipeline) if is_ours else {}
    calls.append(call(pipeline, options, device))
    after = by_block(pipeline) if is_ours else {}
    moved = {
        name: {block: copied - before[name].get(block, 0) for block, copied in blocks.items()}
        for name, blocks in after.items()
    }
    return {
        "engine": options.engine,
        "load": vars(loaded),
        "calls": calls,
        "budget": options.budget if is_ours else None,
        "moved": moved,
        "streamed": streamed(pipeline) if is_ours else {},
        "disk_read_bytes": disk_read_bytes(),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Call a pipeline on an accelerator, figures as JSON.")
    parser.add_argument("--engine", choices=ENGINES, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a folder of benchmarks.write_pipeline")
    parser.add_argument("--device", help="cuda, xpu, sim; default: what there is")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--budget", type=int, help="bytes on the device, ours only; default: holds the denoiser")
    parser.add_argument("--full-size", action="store_true", help="an image of 1024 pixels a side from 512 tokens")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--calls", type=int, default=2, help="the last one counts")
    options = parser.parse_args(argv)
    options.checkpoint = options.checkpoint.resolve(strict=True)
    room = int(ROOM_FOR_ENCODERS * file_bytes(options.checkpoint, *ENCODERS))
    options.budget = options.budget or file_bytes(options.checkpoint, DENOISER) + room
    with opened(options.device) as device:
        print(json.dumps(benchmark(options, device)))


if __name__ == "__main__":
    main()
