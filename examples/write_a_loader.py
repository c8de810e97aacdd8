"""Teach hf_bigload a library it does not know. A loader is one small class; its heart is one function.

The library here is `ToyNet`, below: it has its own way to load, and no idea of device maps. Once its loader is
registered and the plugin is on, `ToyNet.load` accepts weights larger than RAM, and the library is none the wiser.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import hf_bigload
from hf_bigload.seams import Seam

# ------------------------------------------------------------------ the library, which you do not want to change


class ToyNet(nn.Module):
    """A stack of layers, and the two files that it is saved as."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.config = {"width": width, "depth": depth}
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x

    def save(self, folder: str) -> None:
        Path(folder, "toy.json").write_text(json.dumps(self.config))
        save_file(self.state_dict(), Path(folder, "model.safetensors"))

    @classmethod
    def load(cls, folder: str) -> ToyNet:
        net = cls(**json.loads(Path(folder, "toy.json").read_text()))
        net.load_state_dict(load_file(Path(folder, "model.safetensors")))  # all of it, in RAM
        return net


# ------------------------------------------------------------------ its loader, which you write


def load(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> nn.Module:
    """Takes the place of `ToyNet.load`: `wrapped` is the original, `instance` the class it was called on."""

    def place(folder: str) -> nn.Module:
        with hf_bigload.init_empty_weights():
            net = instance(**json.loads(Path(folder, "toy.json").read_text()))
        # The budget is the one that `enable` below was given. What exceeds it is read from the library's own file.
        return hf_bigload.load_checkpoint_and_dispatch(net, Path(folder, "model.safetensors"), device_map="auto")

    return place(*args, **kwargs)


class ToyLoader:
    """The `hf_bigload.Loader` protocol: three names, and what to take over once the library is imported.

    A package of its own would name this class in its metadata instead of registering it by hand:

        [project.entry-points."hf_bigload.loaders"]
        toy = "toy_bigload:ToyLoader"
    """

    name = "toy"
    library = "toylib"
    trigger = __name__  # the module to wait for; `ToyNet` lives in this file

    def seams(self) -> Sequence[Seam]:
        # Where the function is, and the parameters that ours relies on. If a new version of the library moves it,
        # a warning says so, and the library works as it always did.
        return [Seam(__name__, "ToyNet.load", ("folder",), load)]


# ------------------------------------------------------------------ and what it gives the library's users


def main(folder: str) -> None:
    torch.manual_seed(0)
    ToyNet(width=256, depth=16).save(folder)
    inputs = torch.randn(2, 256)
    plain = ToyNet.load(folder)

    hf_bigload.register_loader(ToyLoader())
    with hf_bigload.enable(max_memory={"cpu": "2MB"}):
        net = ToyNet.load(folder)

    print(hf_bigload.inspect(net).explain())
    with torch.no_grad():
        print(f"same output, to the bit: {torch.equal(net(inputs), plain(inputs))}")
    print(f"read from disk: {hf_bigload.inspect(net).stats.bytes_read / 1e6:.1f} MB")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        main(scratch)
