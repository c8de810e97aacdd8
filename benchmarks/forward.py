"""Load a checkpoint in one of three ways, run forwards, and print the figures as one JSON line.

    python -m benchmarks.forward --engine hf_bigload --checkpoint /data/llama_1b --max-memory cpu=1.5GB --tokens 1,64

`hf_bigload` and `stock` make the same `from_pretrained(device_map="auto")` call, with the plugin on and without it;
`plain` makes it without a device map: the logits that the other two must give, where the model fits.
"""

from __future__ import annotations

import argparse
import importlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import THREADS, AnonymousMemory, Measured, parse_max_memory, sha256
from benchmarks.proc import anonymous_bytes, disk_read_bytes, peak_resident_bytes

ENGINES = ("hf_bigload", "stock", "plain")
FIRST_TOKEN = 3  # 0, 1 and 2 are special tokens of every model here


def import_engine(engine: str, checkpoint: Path) -> type[Any]:
    """The checkpoint's class, with everything imported that a load would import, so that its figures are the load's
    alone; the plugin is turned on here."""
    import transformers

    (class_name,) = json.loads((checkpoint / "config.json").read_text())["architectures"]
    model_class = getattr(transformers, class_name)
    if engine == "hf_bigload":
        import hf_bigload

        hf_bigload.enable()
    elif engine == "stock":
        importlib.import_module("accelerate")
    return model_class


def load(model_class: type[Any], options: argparse.Namespace, offload: str | None) -> Any:
    """The model, by the call that a model card shows, ready to run."""
    arguments: dict[str, Any] = {"torch_dtype": getattr(torch, options.dtype) if options.dtype else "auto"}
    if options.engine != "plain":
        arguments |= {"device_map": "auto", "max_memory": options.max_memory}
    if options.engine == "stock":
        arguments["offload_folder"] = offload
    return model_class.from_pretrained(options.checkpoint, **arguments).eval()


def token_ids(vocab_size: int, tokens: int) -> torch.Tensor:
    """[1, tokens] token ids, the same on every run."""
    spread = torch.arange(tokens) * 997
    return (spread % (vocab_size - FIRST_TOKEN) + FIRST_TOKEN)[None]


def streamed_bytes(model: Any) -> int:
    """Bytes that the model, if it is one of ours, read from disk since it was loaded."""
    from hf_bigload import inspect

    return inspect(model).stats.bytes_read


def run_forward(model: Any, tokens: int, engine: str, anonymous: AnonymousMemory) -> dict[str, Any]:
    """One forward (an encoder-decoder's: of that many encoder tokens and one decoder token) and a hash of its logits.

    `streamed_bytes` is what the engine says it moved; for another engine, what the process had the disk read.
    `peak_anon_bytes` is the most since the process began.
    """
    inputs = {"input_ids": token_ids(model.config.vocab_size, tokens)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.zeros(1, 1, dtype=torch.long)
    ours = engine == "hf_bigload"
    before = streamed_bytes(model) if ours else 0
    with torch.no_grad():
        logits, measured = Measured.of(lambda: model(**inputs).logits)
    streamed = streamed_bytes(model) - before if ours else measured.read_bytes
    figures = {"tokens": tokens, **vars(measured), "streamed_bytes": streamed}
    figures["peak_anon_bytes"] = anonymous.peak_bytes
    return {**figures, "finite": bool(logits.isfinite().all()), "logits_sha256": sha256(logits)}


def run_generate(model: Any, tokens: int, new_tokens: int) -> dict[str, Any]:
    """Greedy generation of exactly `new_tokens` tokens."""
    ids = token_ids(model.config.vocab_size, tokens)
    exactly = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens, "do_sample": False}

    with torch.no_grad():
        result, measured = Measured.of(lambda: model.generate(ids, **exactly))
    return {**vars(measured), "new_tokens": new_tokens, "tokens_sha256": sha256(result)}


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


def planned(model: Any, engine: str) -> dict[str, dict[str, int]]:
    """What our plan says that each device holds, weights and ring, and the ring alone: bytes by device."""
    if engine != "hf_bigload":
        return {}
    from hf_bigload import inspect

    plan = inspect(model).plan
    return {"used": dict(plan.used), "ring": dict(plan.ring)}


def offload_folder(engine: str, checkpoint: Path) -> AbstractContextManager[str | None]:
    """A temporary folder on the checkpoint's own disk, for the one engine that needs to be given one."""
    return tempfile.TemporaryDirectory(dir=checkpoint.parent) if engine == "stock" else nullcontext()


def benchmark(options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(THREADS)
    checkpoint = options.checkpoint = options.checkpoint.resolve(strict=True)
    model_class = import_engine(options.engine, checkpoint)
    runtime_anon = anonymous_bytes()
    with offload_folder(options.engine, checkpoint) as folder, AnonymousMemory().sampling() as anonymous:
        model, loaded = Measured.of(lambda: load(model_class, options, folder))
        sizes = [options.tokens[0]] * options.warm_up + [n for n in options.tokens for _ in range(options.forwards)]
        forwards = [run_forward(model, tokens, options.engine, anonymous) for tokens in sizes]
        report = {
            "engine": options.engine,
            "load": vars(loaded),
            "warm_up": forwards[: options.warm_up],
            "forwards": forwards[options.warm_up :],
            "device_map": device_map_summary(model),
            "plan": planned(model, options.engine),
        }
        if options.new_tokens:
            report["generate"] = run_generate(model, options.tokens[0], options.new_tokens)
    report |= {"peak_anon_bytes": anonymous.peak_bytes, "peak_rss_bytes": peak_resident_bytes()}
    return report | {"runtime_anon_bytes": runtime_anon, "disk_read_bytes": disk_read_bytes()}


def counts(text: str) -> list[int]:
    """[1, 64] from "1,64"."""
    return [int(item) for item in text.split(",")]


def add_load_options(parser: argparse.ArgumentParser) -> None:
    """The options that `load` goes by."""
    parser.add_argument("--engine", choices=ENGINES, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="default: the checkpoint's")
    parser.add_argument("--max-memory", type=parse_max_memory, help="cpu=8GB or cpu=8GB,0=10GB; default: all there is")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Load a checkpoint, run forwards, print the figures as JSON.")
    add_load_options(parser)
    parser.add_argument("--tokens", type=counts, default=[16], help="input tokens of a forward; 1,64 for both")
    parser.add_argument("--warm-up", type=int, default=0, help="forwards that are reported apart")
    parser.add_argument("--forwards", type=int, default=2, help="for each number of tokens")
    parser.add_argument("--new-tokens", type=int, default=0, help="also generate this many tokens, greedily")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    print(json.dumps(benchmark(parser().parse_args(argv))))


if __name__ == "__main__":
    main()
