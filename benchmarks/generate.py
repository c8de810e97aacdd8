"""Load a checkpoint, generate token by token, and print the figures of every token as one JSON line.

    python -m benchmarks.generate --engine hf_bigload --checkpoint /data/t0_3b --max-memory cpu=3.8GB --new-tokens 16

The engines are those of `benchmarks.forward`. Ours is told the workload, so that its plan counts on it, and prints what
the plan predicted.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from typing import Any

import torch

from benchmarks import forward
from benchmarks.measure import THREADS, AnonymousMemory, Measured, sha256
from benchmarks.proc import anonymous_bytes, disk_read_bytes


class Tokens:
    """A stopping criterion that stops nothing: it looks at the clock and at what was read, after every token."""

    def __init__(self, model: Any, engine: str) -> None:
        self.model, self.engine = model, engine
        self.moments = [self._now()]

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.moments.append(self._now())
        return torch.zeros(len(input_ids), dtype=torch.bool)

    def _now(self) -> tuple[float, int]:
        ours = self.engine == "hf_bigload"
        return time.perf_counter(), forward.streamed_bytes(self.model) if ours else disk_read_bytes()

    @property
    def each(self) -> list[dict[str, float]]:
        """Seconds and bytes of every token; the first one's are those of the encoder and the prompt too."""
        pairs = zip(self.moments, self.moments[1:], strict=False)
        return [{"seconds": later - since, "streamed_bytes": more - so_far} for (since, so_far), (later, more) in pairs]


def generate(model: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Greedy generation of exactly `new_tokens` tokens."""
    ids = forward.token_ids(model.config.vocab_size, options.context)
    exactly = {"min_new_tokens": options.new_tokens, "max_new_tokens": options.new_tokens, "do_sample": False}
    tokens = Tokens(model, options.engine)
    with torch.no_grad(), timed_forwards(model) as forwards:
        found = model.generate(ids, **exactly, stopping_criteria=[tokens])
    return {"tokens": tokens.each, "forwards": forwards, "tokens_sha256": sha256(found)}


@contextmanager
def timed_forwards(model: Any) -> Iterator[list[float]]:
    """Seconds of each forward of the model as a whole: a step without what `generate` does around it."""
    seconds: list[float] = []
    begun = model.register_forward_pre_hook(lambda *_: seconds.append(-time.perf_counter()))
    ended = model.register_forward_hook(lambda *_: seconds.append(seconds.pop() + time.perf_counter()))
    try:
        yield seconds
    finally:
        begun.remove()
        ended.remove()


def workload(options: argparse.Namespace) -> AbstractContextManager[Any]:
    if options.engine != "hf_bigload":
        return nullcontext()
    import hf_bigload

    return hf_bigload.workload(batch_size=1, context_length=options.context, new_tokens=options.new_tokens)


def predicted(model: Any, engine: str) -> dict[str, Any]:
    """What our plan promised: seconds by phase, and bytes by device."""
    if engine != "hf_bigload":
        return {}
    from hf_bigload import inspect

    plan = inspect(model).plan
    figures = {name: dict(getattr(plan, name)) for name in ("used", "ring", "cache", "activations")}
    return figures | {"phases": [asdict(phase) for phase in plan.predicted], "bound": plan.bound}


def benchmark(options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(THREADS)
    checkpoint = options.checkpoint = options.checkpoint.resolve(strict=True)
    model_class = forward.import_engine(options.engine, checkpoint)
    runtime_anon = anonymous_bytes()
    with (
        forward.offload_folder(options.engine, checkpoint) as folder,
        AnonymousMemory().sampling() as anonymous,
        workload(options),
    ):
        model, loaded = Measured.of(lambda: forward.load(model_class, options, folder))
        runs = [generate(model, options) for _ in range(options.runs)]
        plan = predicted(model, options.engine)
    report = {"engine": options.engine, "load": vars(loaded), "runs": runs, "plan": plan}
    report |= {"peak_anon_bytes": anonymous.peak_bytes, "runtime_anon_bytes": runtime_anon}
    return report | {"disk_read_bytes": disk_read_bytes()}


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Load a checkpoint, generate, print the figures as JSON.")
    forward.add_load_options(parser)
    parser.add_argument("--context", type=int, default=16, help="tokens of the prompt")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--runs", type=int, default=2, help="the first one warms up")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    print(json.dumps(benchmark(parser().parse_args(argv))))


if __name__ == "__main__":
    main()
