"""A model of 100 billion parameters, built in a moment, in a process that could never hold its weights.

Inside `init_empty_weights` parameters have a shape and a dtype but no memory. That is all it takes to size a model and
to plan where its weights would go, before a single byte of them is downloaded.
"""

from __future__ import annotations

import time

import psutil
from torch import nn

import hf_bigload

GB = 10**9
LAYERS, WIDTH = 1000, 10_000


def main() -> None:
    process = psutil.Process()
    memory_before, started = process.memory_info().rss, time.perf_counter()

    with hf_bigload.init_empty_weights():
        model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))

    # Nearly all of the memory is torch's own code, imported on first use; a second such model takes 5 MB.
    seconds = time.perf_counter() - started
    memory = process.memory_info().rss - memory_before
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters / 1e9:.1f} billion parameters, built in {seconds:.2f} s, in {memory / 1e6:.0f} MB of memory")
    print(f"every parameter is on the meta device: {all(p.is_meta for p in model.parameters())}")

    # What the real weights would need, and what would become of them on a machine with 64 GB of RAM.
    print(f"its weights would be {hf_bigload.estimate(model).weights[''] / GB:.0f} GB")
    plan = hf_bigload.plan(model, max_memory={"cpu": "64GB"})
    print(f"with 64 GB of RAM: {plan.used['cpu'] / GB:.0f} GB in RAM, {plan.used['disk'] / GB:.0f} GB read from disk")


if __name__ == "__main__":
    main()
