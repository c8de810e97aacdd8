"""Weights read by name outside their module's forward: the executor is told, and hands out what its reader needs."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from .executor import Executor


class WatchedParameters(dict[str, Any]):
    """A module's parameters or buffers, which tells the executor when one is read by name.

    Whoever reads a weight outside its module's forward (a parent that multiplies with `child.weight`) gets it on its
    own device. Iterating, as `named_parameters` and `state_dict` do, gives the weights themselves.
    """

    def __init__(self, tensors: Mapping[str, Any], executor: Executor, device: torch.device) -> None:
        super().__init__(tensors)
        self.executor, self.device = executor, device

    def __getitem__(self, name: str) -> Any:
        tensor = super().__getitem__(name)  # as the compiler can trace it
        if tensor is None:
            return None
        scopes = self.executor._thread.scopes
        if scopes:  # what `see` would find first, without a call: every module reads its weights here
            scope = scopes[-1]
            held = scope.held.get(id(tensor))
            if held is not None and held.device == scope.device:
                return held
        return self.executor.see(tensor, self.device)

    def __deepcopy__(self, memo: dict[int, Any]) -> WatchedParameters:
        copied = {name: deepcopy(tensor, memo) for name, tensor in self.items()}
        return WatchedParameters(copied, deepcopy(self.executor, memo), self.device)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self.items()),)


_WATCHED = ("_parameters", "_buffers")


def watch(module: nn.Module, executor: Executor, device: torch.device) -> None:
    """Notice reads of `module`'s parameters and buffers from now on; it runs on `device`."""
    for name in _WATCHED:
        held = module.__dict__[name]
        if held and type(held) is dict:
            module.__dict__[name] = WatchedParameters(held, executor, device)


def unwatch(module: nn.Module) -> None:
    """Give `module` its plain parameters and buffers back."""
    for name in _WATCHED:
        if isinstance(module.__dict__[name], WatchedParameters):
            module.__dict__[name] = dict(module.__dict__[name].items())
