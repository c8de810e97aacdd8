"""What a model takes, as figures: weights, buffers, what a request remembers and computes with. No torch.

A traced model (`trace.py`) gives the figures of a request exactly. `bound` stands in where a model cannot be traced.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from math import prod
from typing import Any

from .specs import DTYPE_BYTES, BlockSpec, ModelSpec, Needs, TensorSpec, Workload

FP32_BYTES = 4
_EXPERT = re.compile(r"(^|[._])experts?([._]|$)")


def bound(spec: ModelSpec, workload: Workload, config: Mapping[str, Any] | None = None) -> Needs:
    """What a request of a transformer takes at most, from its weights' shapes and its config.

    - Activations: all that the weights of the block with the most outputs put out for the whole context (an embedding:
      its rows; experts: as many as a token is sent to), and the hidden state four times, in the weights' dtype and in
      fp32 at once; the scores of attention, as if they were not fused, likewise.
    - Cache: keys and values of every block that runs for each token, for each attention head that has them; beside an
      encoder, those of the context too.
    - Operations: two per weight and token.
    """
    shape = _Shape(spec, dict(config or {}))
    batch, context = workload.batch_size, workload.context_length
    prompt, end = batch * context, batch * (context + workload.new_tokens)
    width = DTYPE_BYTES.get(shape.dtype, FP32_BYTES)
    outputs = max((shape.outputs(block) for block in spec.blocks), default=0)
    values = prompt * (outputs + 4 * shape.hidden) + prompt * context * shape.heads
    if any(not block.prompt for block in spec.blocks):
        end += prompt
    per_token = [b for b in spec.blocks if b.whole and b.calls is None]
    cache = {block.name: 2 * shape.key_width(block) * end * width for block in per_token}
    return Needs(
        workload,
        activations=values * (width + FP32_BYTES),
        cache={name: size for name, size in cache.items() if size},
        operations={b.name: shape.operations(b, workload) for b in spec.blocks if not b.gathers and b.elements},
        method="bound",
        error=1.0,
    )


class _Shape:
    """The widths of a transformer, from its config where it says them, else from its weights."""

    def __init__(self, spec: ModelSpec, config: Mapping[str, Any]) -> None:
        text: Mapping[str, Any] = next((config[n] for n in ("text_config", "llm_config") if config.get(n)), {})
        self.config = {**config, **dict(text)}
        self.spec = spec

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

    def outputs(self, block: BlockSpec) -> int:
        """Values that the weights of a block put out for one token, all of them together."""
        if block.gathers:
            return max((t.shape[-1] for t in block.tensors if t.shape), default=0)
        return sum(int(prod(t.shape[:-1]) * self._share(t)) for t in _matrices(block))

    def key_width(self, block: BlockSpec) -> int:
        """Values of a token's keys: all of the heads that have them."""
        if not _matrices(block):
            return 0
        heads = self._first("num_key_value_heads", "num_kv_heads", "n_head_kv") or self.heads
        size = self._first("head_dim", "d_kv", "kv_channels") or self.hidden // self.heads
        return heads * size if heads > 1 else self.hidden

    def operations(self, block: BlockSpec, workload: Workload) -> tuple[float, float]:
        weights = sum(prod(t.shape) * self._share(t) for t in block.tensors if not t.is_buffer)
        batch = workload.batch_size
        first = batch * workload.context_length if block.prompt or block.calls is not None else batch
        return 2.0 * weights * first, 2.0 * weights * batch if block.calls is None else 0.0

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
