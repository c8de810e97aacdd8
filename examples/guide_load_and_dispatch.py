"""Load a checkpoint of your own into your own `nn.Module`, with less memory than it has weights.

Three steps: build the model without weights, say how much memory there is, and load. What does not fit stays in the
checkpoint's own shards, and is read from there each time the model runs.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from huggingface_hub import save_torch_model
from torch import nn

import hf_bigload

BLOCKS, WIDTH = 12, 256


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # The skip connection needs `x` and both layers in one place: a block must not be cut apart (see below).
        return x + self.down(self.up(self.norm(x)).relu())


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        # A checkpoint as the Hub has them: weights in shards, and an index that says which tensor is in which.
        plain = Model().eval()
        save_torch_model(plain, folder, max_shard_size="4MB")
        shards = sorted(Path(folder).glob("*.safetensors"))
        total = sum(shard.stat().st_size for shard in shards)
        print(f"checkpoint: {len(shards)} shards, {total / 1e6:.1f} MB")

        with hf_bigload.init_empty_weights():
            model = Model().eval()

        model = hf_bigload.load_checkpoint_and_dispatch(
            model,
            folder,
            device_map="auto",
            max_memory={"cpu": total * 2 // 5},  # bytes, or "8GiB"; without it, whatever is free on this machine
            no_split_module_classes=["Block"],
        )

        print("where the weights rest:")
        for module, place in model.hf_device_map.items():
            print(f"  {module or '(everything else)'}: {place}")

        inputs = torch.randn(4, WIDTH)
        with torch.no_grad():
            same = torch.equal(model(inputs), plain(inputs))
        print(f"bytes read from disk by one forward: {hf_bigload.inspect(model).stats.bytes_read / 1e6:.1f} MB")
        print(f"same output as the plain model, to the bit: {same}")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
