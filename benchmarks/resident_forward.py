"""The tax on a model that rests whole in RAM: forwards of ours and of a plain load, in turns, as one JSON line.

    python -m benchmarks.resident_forward --checkpoint build/bench/llama_1b_tiny --forwards 3000 --rounds 3

Each round loads both afresh, in turns first: where an allocation happens to lie makes a difference of its own.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

import hf_bigload
from benchmarks.forward import import_engine, token_ids
from benchmarks.measure import THREADS, sha256

ENGINES = ("hf_bigload", "plain")


def load(engine: str, checkpoint: Path) -> Any:
    model_class = import_engine(engine, checkpoint)
    try:
        return model_class.from_pretrained(checkpoint, **({} if engine == "plain" else {"device_map": "auto"})).eval()
    finally:
        hf_bigload.disable()


def run_round(checkpoint: Path, order: Sequence[str], forwards: int, tokens: int) -> dict[str, Any]:
    """Median seconds of a forward by engine, and the hashes of their logits."""
    models = {engine: load(engine, checkpoint) for engine in order}
    ids = token_ids(models["plain"].config.vocab_size, tokens)
    seconds: dict[str, list[float]] = {engine: [] for engine in order}
    turns = [tuple(models.items()), tuple(models.items())[::-1]]
    with torch.no_grad():
        hashes = {engine: sha256(model(ids).logits) for engine, model in models.items()}
        for turn in range(forwards):
            for engine, model in turns[turn % 2]:
                started = time.perf_counter()
                model(ids)
                seconds[engine].append(time.perf_counter() - started)
    return {"seconds": {engine: median(each) for engine, each in seconds.items()}, "logits_sha256": hashes}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Forwards of a model in RAM, ours and plain in turns, as JSON.")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--forwards", type=int, default=3000, help="of each engine, in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=8)
    options = parser.parse_args(argv)
    torch.set_num_threads(THREADS)
    gc.disable()  # a collection in one engine's turn is no figure of it
    rounds = []
    for number in range(options.rounds):
        order = ENGINES if number % 2 else ENGINES[::-1]
        rounds.append(run_round(options.checkpoint, order, options.forwards, options.tokens))
        gc.collect()
    print(json.dumps({"rounds": rounds}))


if __name__ == "__main__":
    main()
