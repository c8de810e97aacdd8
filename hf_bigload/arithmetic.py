"""How fast a device multiplies by weights: measured in a layer like those of language models, not with one operator.

There caches are cold, small operators stand between multiplications, and Python calls all of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from .specs import CPU, Arithmetic

DTYPES = ("float32", "bfloat16", "float16")
HIDDEN = 2048
"""Width of the layers, of which there are as many as make `NBYTES`."""
NBYTES = 256 << 20
"""Of weights that are met one after another: more than most processors' caches."""

_TOKENS = (1, 2, 4, 8, 16, 32, 64, 256, 1024)
_FEW_TOKENS = 32
"""Up to so many memory takes the time; for more, arithmetic does, and one layer tells as much as several."""
_LONG = 0.1
"""Seconds of a call, after which more tokens are taken to be in proportion."""
_REPEATS = 4
_SMALL_MODULES = 200
_COLD = 1.5
"""Times as long as in a loop small modules took between others, in decoding with a T5 and a Llama on a CPU."""
_HEAD = 64
_VALUES = ("neg", "tanh", "square", "float", "sigmoid", "abs")
"""Operators of which some are as quick as memory, and some are not."""


def fitting(nbytes: int) -> tuple[int, int]:
    """(width, bytes of weights) for `measure`, such that it takes no more than `nbytes` bytes on the device.

    Raises:
        torch.OutOfMemoryError: it always takes more.
    """
    hidden, weights = HIDDEN, min(NBYTES, nbytes // 4)
    while _peak(hidden) + weights > nbytes:
        hidden //= 2
        if hidden < _HEAD:
            raise torch.OutOfMemoryError(f"{nbytes} bytes are too few to measure arithmetic with")
    return hidden, weights


def _peak(hidden: int) -> int:
    """Bytes beside the weights asked for, at the most: a layer in fp32, and what that computes."""
    layers = 4 * (4 + 3 * 11 / 4) * hidden**2
    values, scores = 24 * hidden, 4 * _TOKENS[-1] * hidden // _HEAD  # of a token; scores are in memory on some devices
    return int(layers + 4 * _TOKENS[-1] * (values + scores))


def measure(device: torch.device, hidden: int = HIDDEN, nbytes: int = NBYTES) -> Arithmetic:
    """What an element of a weight takes on a device, by dtype and number of tokens; `hidden`: a multiple of 64.

    Takes some seconds, and `nbytes` bytes on the device, beside what the widest layer takes (`fitting`).

    Raises:
        torch.OutOfMemoryError: the device has no room for that.
    """
    with torch.inference_mode(), torch.device(device):
        values = torch.rand(512, hidden).bfloat16()
        per_value = _mean(partial(_values, values), device) / (len(_VALUES) * values.numel())
        curves = {dtype: tuple(_curve(getattr(torch, dtype), hidden, nbytes, per_value)) for dtype in DTYPES}
        module, inputs = nn.Linear(8, 8), torch.rand(1, 8)
        per_weight = _COLD * _mean(partial(_small_modules, module, inputs), device) / _SMALL_MODULES
    return Arithmetic({**curves, "": curves["bfloat16"]}, per_weight, per_value)


def _curve(dtype: torch.dtype, hidden: int, nbytes: int, per_value: float) -> Iterator[tuple[float, float]]:
    """(tokens, seconds per element of a weight), without those of other operators' values."""
    first = _Layer(hidden, dtype)
    layers = [first, *(_Layer(hidden, dtype) for _ in range(nbytes // first.nbytes))]
    for tokens in _TOKENS:
        used = layers if tokens <= _FEW_TOKENS else layers[:1]
        inputs = torch.rand(1, tokens, used[0].hidden).to(dtype)
        seconds = _mean(partial(_run, used, inputs), inputs.device)
        values = per_value * tokens * sum(layer.values for layer in used)
        yield float(tokens), max(seconds / 2, seconds - values) / sum(layer.elements for layer in used)
        if seconds > _LONG and tokens > _FEW_TOKENS:
            break


class _Layer(nn.Module):
    """Attention over the tokens themselves, and a gated network 2.75 times as wide as the hidden state."""

    def __init__(self, hidden: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.hidden, self.inner = hidden, hidden * 11 // 4
        linear = partial(nn.Linear, bias=False, dtype=dtype)
        self.q, self.k, self.v, self.o = (linear(hidden, hidden) for _ in range(4))
        self.gate, self.up, self.down = (*(linear(hidden, self.inner) for _ in range(2)), linear(self.inner, hidden))

    @property
    def elements(self) -> int:
        return sum(weight.numel() for weight in self.parameters())

    @property
    def nbytes(self) -> int:
        return sum(weight.nbytes for weight in self.parameters())

    @property
    def values(self) -> int:
        """Elements that all but multiplications put out for a token: two norms, two sums, a copy, a gate."""
        return 2 * 5 * self.hidden + 3 * self.hidden + 2 * self.inner

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        normed = _norm(hidden)
        heads = [
            each(normed).view(1, -1, self.hidden // _HEAD, _HEAD).transpose(1, 2) for each in (self.q, self.k, self.v)
        ]
        attended = nn.functional.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        hidden = hidden + self.o(attended.transpose(1, 2).reshape(hidden.shape))
        normed = _norm(hidden)
        return hidden + self.down(nn.functional.silu(self.gate(normed)) * self.up(normed))


def _norm(hidden: torch.Tensor) -> torch.Tensor:
    wide = hidden.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(hidden.dtype)


def _run(layers: Sequence[_Layer], hidden: torch.Tensor) -> None:
    for layer in layers:
        hidden = layer(hidden)


def _values(values: torch.Tensor) -> None:
    for operator in _VALUES:
        getattr(values, operator)()


def _small_modules(module: nn.Module, inputs: torch.Tensor) -> None:
    """As many operators to a weight as a layer has, ten or so."""
    for _ in range(_SMALL_MODULES):
        hidden = module(_norm(inputs)).view(1, 2, 4).transpose(0, 1).reshape(1, 8)
        hidden = inputs + hidden


def _mean(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a call, on average; the first one only warms up."""
    for repeats in (1, _REPEATS):
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        if device.type != CPU:
            torch.accelerator.synchronize(device)
    return max((time.perf_counter() - begin) / _REPEATS, 1e-9)
