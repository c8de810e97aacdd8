"""Record what a placed model does: `with record(model, plan) as timeline`."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..hardware import torch_device
from ..module_tensors import iter_hooks
from ..specs import CPU, DISK, Plan
from ..timeline import Timeline
from .attach import AlignDevicesHook, attachment_of
from .compiling import untraced
from .executor import Executor
from .recorder import Recorder


@contextmanager
def record(model: nn.Module, plan: Plan) -> Iterator[Timeline]:
    """Note what `model` does inside the context; the timeline is filled when that ends, also by an exception.

    It begins with nothing under way: what was sent ahead before is dropped, so that each read is seen.

    Raises:
        RuntimeError: it is being recorded already.
    """
    timeline = Timeline(type(model).__name__)
    attachment = attachment_of(model)
    names = [placement.block.name for placement in plan.placements]
    devices = [torch_device(name) for name in sorted(plan.devices - {CPU, DISK})]
    with ExitStack() as ends:
        if attachment is not None:
            if attachment.executor.machine.recorder is not None:
                raise RuntimeError(f"{timeline.model} is being recorded already: end that recording first.")
            attachment.executor.prefetcher.close()
        recorder = Recorder(devices, _with_others_inside(names))
        ends.callback(recorder.finish, timeline)
        if attachment is not None:
            ends.callback(_set_recorder, attachment.executor, None)
            _set_recorder(attachment.executor, recorder)
        for placement in plan.placements:
            module = model.get_submodule(placement.block.name)
            if not any(isinstance(hook, AlignDevicesHook) for hook in iter_hooks(module)):
                _watch(module, recorder, placement.block.name, torch_device(placement.device), ends)
        yield timeline


def _with_others_inside(names: Collection[str]) -> frozenset[str]:
    """Those blocks whose forward calls others of them, as far as names tell."""
    parents = {name.rpartition(".")[0] for name in names if name}
    above: set[str] = set()
    while parents:
        above |= parents
        parents = {name.rpartition(".")[0] for name in parents if name} - above
    return frozenset(above.intersection(names))


def _set_recorder(executor: Executor, recorder: Recorder | None) -> None:
    executor.machine.recorder = executor.machine.aside.recorder = recorder


def _watch(module: nn.Module, recorder: Recorder, block: str, device: torch.device, ends: ExitStack) -> None:
    """Note when a block without a hook computes."""

    def enter(_module: nn.Module, _args: Any) -> None:
        recorder.enter(block, device)

    def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
        recorder.leave(block, device)

    ends.callback(module.register_forward_pre_hook(untraced(enter)).remove)
    ends.callback(module.register_forward_hook(untraced(leave), always_call=True).remove)
