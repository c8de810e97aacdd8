"""The same model wherever its weights rest: logits and generated tokens beside the resident model's, on one device.

    python -m benchmarks.placements [--device sim] [--checkpoint FOLDER ...]

Without a checkpoint, tiny random models of several architectures. Prints one JSON line, a list of comparisons.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import hf_bigload
from benchmarks.accelerator import opened
from benchmarks.forward import import_engine
from benchmarks.measure import shards
from tests.transformers_loader.models import CONFIGS, forward, generate, same, save

EAGER: dict[str, dict[str, Any]] = {"mixtral": {"experts_implementation": "eager"}}
"""The library's fused experts have no kernel for every device and dtype."""


@dataclass(frozen=True)
class Comparison:
    model: str
    placement: str
    homes: tuple[str, ...]
    """Where the model's map says that its weights rest."""
    same_logits: bool
    same_tokens: bool

    @property
    def is_same(self) -> bool:
        return self.same_logits and self.same_tokens


@dataclass(frozen=True)
class Source:
    """A checkpoint, and the arguments that every load of it gets."""

    name: str
    folder: Path
    options: dict[str, Any]

    @property
    def nbytes(self) -> int:
        return sum(shard.stat().st_size for shard in shards(self.folder))

    def plain(self) -> Any:
        return import_engine("plain", self.folder).from_pretrained(self.folder, dtype="auto", **self.options).eval()

    def budgeted(self, on_device: float, in_ram: float) -> Any:
        """Loaded with budgets that are these shares of the checkpoint's size."""
        budget = {0: int(on_device * self.nbytes), "cpu": int(in_ram * self.nbytes)}
        model_class = import_engine("plain", self.folder)
        with hf_bigload.enable():
            options = {"dtype": "auto", "device_map": "auto", "max_memory": budget, **self.options}
            return model_class.from_pretrained(self.folder, **options).eval()


Place = Callable[[Source, torch.device, str], Any]

PLACEMENTS: dict[str, Place] = {
    "all on the device": lambda source, device, scratch: source.budgeted(4, 4),
    "half on the device, half in RAM": lambda source, device, scratch: source.budgeted(0.5, 4),
    "half on the device, the rest in RAM and on disk": lambda source, device, scratch: source.budgeted(0.5, 0.45),
    "all in RAM": lambda source, device, scratch: hf_bigload.cpu_offload(source.plain(), device),
    "all on disk": lambda source, device, scratch: hf_bigload.disk_offload(source.plain(), scratch, device),
}


def tiny_sources(folder: Path, names: Sequence[str]) -> Iterator[Source]:
    """Random models of these of `CONFIGS`, in fp32."""
    for name in names:
        yield Source(name, save(name, folder / name).folder, EAGER.get(name, {}))


def compare(source: Source, placement: str, device: torch.device) -> Comparison:
    """Load `source` twice, resident on `device` and placed, and run both on the same inputs."""
    resident = source.plain().to(device)
    wanted = forward(resident, device), generate(resident, device)
    del resident
    with tempfile.TemporaryDirectory(dir=source.folder.parent) as scratch:
        model = PLACEMENTS[placement](source, device, scratch)
        found = forward(model, device), generate(model, device)
        homes = {str(home) for home in getattr(model, "hf_device_map", {}).values()}
        if any(parameter.device.type == "cpu" for parameter in model.parameters()):
            hf_bigload.inspect(model).close()
    return Comparison(
        source.name, placement, tuple(sorted(homes)), same(wanted[0], found[0]), same(wanted[1], found[1])
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Placed models beside the resident one, as JSON.")
    parser.add_argument("--device", help="cuda, xpu, sim; default: what there is")
    parser.add_argument("--checkpoint", type=Path, action="append", help="default: tiny models")
    parser.add_argument("--tiny", action="append", choices=list(CONFIGS), help="only these tiny models")
    parser.add_argument("--placement", action="append", choices=list(PLACEMENTS), help="default: all")
    options = parser.parse_args(argv)
    with opened(options.device) as device, tempfile.TemporaryDirectory() as folder:
        given = [Source(path.name, path, {}) for path in options.checkpoint or ()]
        sources = given or tiny_sources(Path(folder), options.tiny or list(CONFIGS))
        placements = options.placement or list(PLACEMENTS)
        found = [compare(source, placement, device) for source in sources for placement in placements]
    print(json.dumps({"comparisons": [asdict(each) | {"is_same": each.is_same} for each in found]}))


if __name__ == "__main__":
    main()
