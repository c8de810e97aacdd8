"""What a streamed block costs in Python: tiny blocks on the simulated accelerator, ours and stock, as one JSON line.

    python -m benchmarks.block_time --blocks 50 --forwards 200

Both offload the same model by `cpu_offload`. Blocks are so small that copies and arithmetic take next to no time; the
`resident` model, with all its weights on the device and no hooks, says how much that still is.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks.measure import sha256

DEVICE = "sim:0"
WIDTH = 8


class Block(nn.Module):
    """The nine modules with weights that a decoder's layer has today, without the attention between them."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(2))
        self.maps = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v, out, gate, up, down = self.maps
        h = self.norms[0](x)
        x = x + out(q(h) + k(h) + v(h))
        h = self.norms[1](x)
        return x + down(torch.tanh(gate(h)) * up(h))


class Stack(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def place(engine: str, model: nn.Module) -> nn.Module:
    if engine == "resident":
        return model.to(DEVICE)
    if engine == "stock":
        from accelerate import cpu_offload as stock_offload

        return stock_offload(model, torch.device(DEVICE))
    from hf_bigload import cpu_offload

    return cpu_offload(model, torch.device(DEVICE))


def measure(blocks: int, forwards: int) -> dict[str, Any]:
    """Median seconds of a block by engine (in turns, so that all see the same machine), and hashes of their outputs."""
    torch.manual_seed(0)
    stack, x = Stack(blocks).eval(), torch.randn(1, WIDTH)
    models = {engine: place(engine, copy.deepcopy(stack)) for engine in ("hf_bigload", "stock", "resident")}
    x = x.to(DEVICE)
    seconds: dict[str, list[float]] = {engine: [] for engine in models}
    with torch.no_grad():
        hashes = {engine: sha256(model(x)) for engine, model in models.items()}
        for _ in range(forwards):
            for engine, model in models.items():
                started = time.perf_counter()
                model(x)
                torch.accelerator.synchronize()
                seconds[engine].append(time.perf_counter() - started)
    return {"seconds": {engine: median(each) / blocks for engine, each in seconds.items()}, "logits_sha256": hashes}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Python time of a streamed block, ours and stock, as JSON.")
    parser.add_argument("--blocks", type=int, default=50)
    parser.add_argument("--forwards", type=int, default=200)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    from tests import simdev

    with simdev.devices([None], hide_others=True):
        gc.disable()
        print(json.dumps(measure(options.blocks, options.forwards)))


if __name__ == "__main__":
    main()
