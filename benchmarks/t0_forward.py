"""Load a T0 checkpoint in one of three ways, run forwards, and print the figures as one JSON line.

    python -m benchmarks.t0_forward --engine hf_bigload --checkpoint /data/t0pp --max-memory cpu=8GB

`hf_bigload` and `stock` make the same `from_pretrained(device_map="auto")` call, with the plugin on and without it;
`plain` makes it without a device map: the logits that the other two must give, where the model fits.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.proc import anonymous_bytes, disk_read_bytes, peak_resident_bytes

T = TypeVar("T")

ENGINES = ("hf_bigload", "stock", "plain")
THREADS = 2
INPUT_TOKENS = 16
FIRST_TOKEN = 3  # 0, 1 and 2 are T5's special tokens
SAMPLE_SECONDS = 0.02


@dataclass
class Measured:
    """Wall seconds, and the bytes that came from the disk meanwhile."""

    seconds: float = 0.0
    read_bytes: int = 0

    @classmethod
    def of(cls, work: Callable[[], T]) -> tuple[T, Measured]:
        read, started = disk_read_bytes(), time.perf_counter()
        result = work()
        seconds = time.perf_counter() - started
        return result, cls(round(seconds, 3), disk_read_bytes() - read)


@dataclass
class AnonymousMemory:
    """The largest resident anonymous memory seen, sampled from another thread."""

    peak_bytes: int = 0
    _done: threading.Event = field(default_factory=threading.Event)

    def sample(self) -> None:
        self.peak_bytes = max(self.peak_bytes, anonymous_bytes())

    @contextmanager
    def sampling(self) -> Iterator[AnonymousMemory]:
        thread = threading.Thread(target=self._run, name="memory-sampler", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._done.set()
            thread.join()
            self.sample()

    def _run(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self.sample()


def parse_max_memory(text: str) -> dict[int | str, str]:
    """`{"cpu": "8GB", 0: "10GB"}` from "cpu=8GB,0=10GB": the libraries' own `max_memory`."""
    pairs = [item.partition("=") for item in text.split(",")]
    if not all(device and size for device, _, size in pairs):
        raise ValueError(f"{text!r} is not a max_memory: write it like cpu=8GB,0=10GB")
    return {int(device) if device.isdigit() else device: size for device, _, size in pairs}


def import_engine(engine: str) -> None:
    """Everything a load would import, so that its figures are the load's alone; the plugin is turned on here."""
    importlib.import_module("transformers.models.t5.modeling_t5")
    if engine == "hf_bigload":
        import hf_bigload

        hf_bigload.enable()


def load(engine: str, checkpoint: Path, max_memory: dict[int | str, str] | None, offload: str | None) -> Any:
    """The model, loaded in bfloat16 by the call that a model card shows."""
    from transformers import AutoModelForSeq2SeqLM

    options: dict[str, Any] = {"torch_dtype": torch.bfloat16}
    if engine != "plain":
        options |= {"device_map": "auto", "max_memory": max_memory}
    if engine == "stock":
        options["offload_folder"] = offload
    return AutoModelForSeq2SeqLM.from_pretrained(checkpoint, **options)


def token_ids(vocab_size: int) -> torch.Tensor:
    """[1, 16] token ids, the same on every run."""
    spread = torch.arange(INPUT_TOKENS) * 997
    return (spread % (vocab_size - FIRST_TOKEN) + FIRST_TOKEN)[None]


def sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def run_forward(model: Any) -> dict[str, Any]:
    """One forward of 16 encoder tokens and 1 decoder token: seconds, bytes read, and a hash of the logits' bits."""
    ids = token_ids(model.config.vocab_size)
    start = torch.zeros(1, 1, dtype=torch.long)

    with torch.no_grad():
        logits, measured = Measured.of(lambda: model(input_ids=ids, decoder_input_ids=start).logits)
    return {**vars(measured), "finite": bool(logits.isfinite().all()), "logits_sha256": sha256(logits)}


def run_generate(model: Any, new_tokens: int) -> dict[str, Any]:
    """Greedy generation of exactly `new_tokens` tokens."""
    ids = token_ids(model.config.vocab_size)
    exactly = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens, "do_sample": False}

    with torch.no_grad():
        tokens, measured = Measured.of(lambda: model.generate(ids, **exactly))
    return {**vars(measured), "new_tokens": tokens.shape[1] - 1, "tokens_sha256": sha256(tokens)}


def device_map_summary(model: torch.nn.Module) -> dict[str, dict[str, int]]:
    """Modules and parameter bytes by device, as the model's `hf_device_map` says."""
    device_map: Mapping[str, Any] = getattr(model, "hf_device_map", {"": "no device map"})
    summary = {str(device): {"modules": 0, "bytes": 0} for device in device_map.values()}
    for device in device_map.values():
        summary[str(device)]["modules"] += 1
    for name, parameter in model.named_parameters():
        owners = [module for module in device_map if not module or f"{name}.".startswith(f"{module}.")]
        if owners:
            device = str(device_map[max(owners, key=len)])
            summary[device]["bytes"] += parameter.numel() * parameter.element_size()
    return summary


def offload_folder(engine: str, checkpoint: Path) -> AbstractContextManager[str | None]:
    """A temporary folder on the checkpoint's own disk, for the one engine that needs to be given one."""
    return tempfile.TemporaryDirectory(dir=checkpoint.parent) if engine == "stock" else nullcontext()


def benchmark(options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(THREADS)
    import_engine(options.engine)
    runtime_anon = anonymous_bytes()
    checkpoint = options.checkpoint.resolve(strict=True)
    with offload_folder(options.engine, checkpoint) as folder, AnonymousMemory().sampling() as anonymous:
        model, loaded = Measured.of(lambda: load(options.engine, checkpoint, options.max_memory, folder))
        model.eval()
        report = {
            "engine": options.engine,
            "load": vars(loaded),
            "forwards": [run_forward(model) for _ in range(options.forwards)],
            "device_map": device_map_summary(model),
        }
        if options.new_tokens:
            report["generate"] = run_generate(model, options.new_tokens)
    report["peak_anon_bytes"] = anonymous.peak_bytes
    report["peak_rss_bytes"] = peak_resident_bytes()
    return report | {"runtime_anon_bytes": runtime_anon}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Load a T0 checkpoint, run forwards, print the figures as JSON.")
    parser.add_argument("--engine", choices=ENGINES, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--max-memory", type=parse_max_memory, help="cpu=8GB or cpu=8GB,0=10GB; default: all there is")
    parser.add_argument("--forwards", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=0, help="also generate this many tokens, greedily")
    print(json.dumps(benchmark(parser.parse_args(argv))))


if __name__ == "__main__":
    main()
