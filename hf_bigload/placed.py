"""How each model was placed: what has to be known to look at it again, and to place it anew."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from . import settings
from .dispatch.rescue import Rememberer
from .errors import BudgetError
from .materialize import Materializer
from .planner import STRATEGIES
from .specs import LoadRequest


@dataclass(frozen=True, eq=False)
class Placed:
    """How a model was placed: what has to be known to place it anew."""

    request: LoadRequest
    materializer: Materializer | None = None
    """None for a copy of a model, whose weights are all in memory and came from nowhere."""
    skip_keys: Sequence[str] = ()
    force_hooks: bool = False
    settle_in: Callable[[nn.Module], None] | None = None
    """What a loader does with a model that was dispatched."""
    shared: bool = False
    """The plan was a part of one over several models, which share one budget."""
    remember: Rememberer = lambda _given: None
    """Knows how to set back what a forward is given (caches); see `dispatch.rescue`."""
    demotes: bool = field(default_factory=lambda: settings.current().demote_on_oom)
    """Whether weights make room where an accelerator runs out of memory: by the settings in force at the load."""

    def asked(self, max_memory: Any, device_map: Any) -> LoadRequest:
        """The request that a new plan answers: what is not given stays, except for a map of the old places.

        Raises:
            BudgetError: the budget is one that the model shares with others, and `max_memory` is None.
        """
        if self.shared and max_memory is None:
            raise BudgetError(
                "The model is a component of a pipeline, whose components share one budget: a plan for it alone would "
                "take what the others have. Give it a budget of its own (`replan(max_memory=...)`), or load the "
                "pipeline again with another max_memory."
            )
        if device_map is None:
            kept = self.request.device_map
            device_map = kept if isinstance(kept, str) and kept in STRATEGIES else "auto"
        if max_memory is None:
            max_memory = self.request.max_memory
        return replace(self.request, device_map=device_map, max_memory=max_memory)


_placed: weakref.WeakKeyDictionary[nn.Module, Placed] = weakref.WeakKeyDictionary()


def remember(model: nn.Module, placed: Placed) -> None:
    """Keep how `model` was placed, as long as it lives."""
    _placed[model] = placed


def placed_of(model: nn.Module) -> Placed:
    """How `model` was placed; nothing special for one that was copied from another."""
    return _placed.get(model) or Placed(LoadRequest(device_map="auto"))


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer by all of its names."""
    everything = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return dict(everything)
