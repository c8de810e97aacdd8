"""What a model takes, as figures: weights, buffers, what a request remembers and computes with. No torch.

The figures of a request come from a trace (`trace.py`); `bound` stands in where a model cannot be traced.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

from . import report
from .specs import DTYPE_BYTES, BlockSpec, ModelSpec, Needs, TensorSpec, Work, Workload


@dataclass(frozen=True)
class Estimate:
    """What a model and a request to it take, in bytes. `str` of it is a table."""

    name: str
    spec: ModelSpec
    needs: Needs

    @cached_property
    def weights(self) -> Mapping[str, int]:
        """By top-level part ("" is the whole), as they will be once loaded; tied ones once, buffers left out."""
        parts: Counter[str] = Counter({"": 0})
        for block in self.spec.blocks:
            for tensor in block.tensors:
                if not tensor.is_buffer:
                    parts[""] += tensor.nbytes
                    parts[tensor.name.partition(".")[0]] += tensor.nbytes
        return dict(parts)

    @property
    def buffers(self) -> int:
        return sum(block.buffer_bytes for block in self.spec.blocks)

    @property
    def cache(self) -> int:
        """Of all blocks, at the end of the request. By block: `needs.cache`."""
        return sum(self.needs.cache.values())

    @property
    def activations(self) -> int:
        """At once, at the peak of a call, on the device that computes."""
        return self.needs.activations

    @property
    def total(self) -> int:
        """On one device that holds everything. The runtime's own memory is not in it."""
        return self.spec.nbytes + self.cache + self.activations

    @property
    def method(self) -> str:
        """Of cache and activations: "trace", "bound", or "none" for a model that no loader knows how to call."""
        return self.needs.method

    @property
    def error(self) -> float:
        """How far activations may be from what is measured, as a share; see `specs.Needs.error`."""
        return self.needs.error

    def __str__(self) -> str:
        return report.estimate_table(self)


FP32_BYTES = 4
BOUND_ERROR = 4.0
"""Bounds of activations of language models were up to five times what a trace gave (tests/test_trace.py)."""
_STATES = 16
"""Per channel, for each token: larger states are computed in chunks."""
_EXPERT = re.compile(r"(^|[._])experts?([._]|$)")


def fields_of(config: Any) -> dict[str, Any]:
    """The fields of a library's config, with how attention is computed: what is saved of it leaves that out."""
    fields = dict(getattr(config, "to_dict", dict)())
    attention = getattr(config, "_attn_implementation", None)
    return fields if attention is None else {**fields, "attn_implementation": attention}


def bound(spec: ModelSpec, workload: Workload, config: Mapping[str, Any] | None = None) -> Needs:
    """What a request of a transformer takes at most, from its weights' shapes and its config.

    - Activations: all that the weights of the block with the most outputs put out for the whole context (experts: as
      many as a token is sent to), and the hidden state four times, each in the weights' dtype and in fp32; twice that
      for the scores of attention, if its implementation is "eager", and for the states of a state space.
    - Cache: keys and values of every block that runs for each token, for each attention head that has them; beside an
      encoder, those of the context too.
    - Operations: two per weight and token.

    Attention over parts, states and latent keys take less cache than this.
    """
    shape = _Shape(spec, dict(config or {}))
    batch, context = workload.batch_size, workload.context_length
    prompt, end = batch * context, batch * (context + workload.new_tokens)
    width = DTYPE_BYTES.get(shape.dtype, FP32_BYTES)
    outputs = max((shape.outputs(block) for block in spec.blocks), default=0)
    scores = 0 if shape.fusible else context * shape.heads
    values = prompt * (outputs + 4 * shape.hidden + 2 * scores + 4 * shape.hidden * shape.states)
    if any(not block.prompt for block in spec.blocks):
        end += prompt
    per_token = [b for b in spec.blocks if b.whole and b.calls is None]
    cache = {block.name: 2 * shape.key_width(block) * end * width for block in per_token}
    return Needs(
        workload,
        activations=values * (width + FP32_BYTES),
        cache={name: size for name, size in cache.items() if size},
        work={b.name: shape.work(b, workload) for b in spec.blocks if not b.gathers and b.elements},
        method="bound",
        error=BOUND_ERROR,
    )


class _Shape:
    """The widths of a transformer, from its config where it says them, else from its weights."""

    def __init__(self, spec: ModelSpec, config: Mapping[str, Any]) -> None:
        text: Mapping[str, Any] = next((config[n] for n in ("text_config", "llm_config") if config.get(n)), {})
        self.config = {**config, **dict(text)}
        self.spec = spec
        self.shapes = {t.name: t.shape for block in spec.blocks for t in block.tensors}

    @cached_property
    def dtype(self) -> str:
        sizes: Counter[str] = Counter()
        for block in self.spec.blocks:
            sizes[block.dtype] += block.nbytes
        return max(sizes, key=lambda name: sizes[name], default="float32")

    @cached_property
    def hidden(self) -> int:
        """Width of what goes from block to block."""
        named = self._first("hidden_size", "d_model", "n_embd", "dim", "model_dim")
        blocks = [_matrices(block) for block in self.spec.blocks if block.whole]
        return named or max((min(t.shape) for block in blocks for t in block), default=0)

    @cached_property
    def heads(self) -> int:
        return self._first("num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads") or 1

    @cached_property
    def states(self) -> int:
        """Values that a state space has for each of its channels."""
        return min(self._first("state_size", "mamba_d_state", "ssm_state_size") or 0, _STATES)

    @property
    def fusible(self) -> bool:
        """Eager attention, with a learned bias, or with values of another width than keys has its scores in memory."""
        eager = "eager" in (self.config.get("attn_implementation"), self.config.get("_attn_implementation"))
        return not eager and not {"relative_attention_num_buckets", "v_head_dim"} & self.config.keys()

    def outputs(self, block: BlockSpec) -> int:
        """Values that the weights of a block put out for one token, all of them together."""
        if block.gathers:
            return max((t.shape[-1] for t in block.tensors if t.shape), default=0)
        own = sum(int(prod(t.shape[:-1]) * self._share(t)) for t in _matrices(block))
        borrowed = (self.shapes.get(name, ()) for name in block.borrows)
        return own + sum(prod(shape[:-1]) for shape in borrowed if len(shape) > 1)

    def key_width(self, block: BlockSpec) -> int:
        """Values of a token's keys: all of the heads that have them."""
        if not _matrices(block):
            return 0
        heads = self._first("num_key_value_heads", "num_kv_heads", "n_head_kv") or self.heads
        size = self._first("head_dim", "d_kv", "kv_channels") or self.hidden // self.heads
        return heads * size if heads > 1 else self.hidden

    def work(self, block: BlockSpec, workload: Workload) -> tuple[Work, Work]:
        weights = sum(prod(t.shape) * self._share(t) for t in block.tensors if not t.is_buffer)
        batch = workload.batch_size
        first = batch * workload.context_length if block.prompt or block.calls is not None else batch
        return Work(2.0 * weights * first), Work(2.0 * weights * batch if block.calls is None else 0.0)

    def _share(self, tensor: TensorSpec) -> float:
        """Of an expert's weights, the share that one token uses."""
        if not _EXPERT.search(tensor.name):
            return 1.0
        experts = self._first("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts") or 1
        used = self._first("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k_experts")
        return min(1.0, (used or experts) / experts)

    def _first(self, *names: str) -> int | None:
        return next((v for name in names if isinstance(v := self.config.get(name), int) and v > 0), None)


def _matrices(block: BlockSpec) -> list[TensorSpec]:
    return [t for t in block.tensors if not t.is_buffer and len(t.shape) > 1]
