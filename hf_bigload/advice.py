"""What the next step up would buy: the least more memory with which a plan gets better in kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from .errors import BudgetError
from .planner import make_plan
from .specs import CPU, DISK, Hardware, ModelSpec, Needs, Plan

_STEP = 1 << 20
"""Bytes to which an answer is exact, for a model of some GiB."""


@dataclass(frozen=True)
class Step:
    """With `more` bytes on `device`, `buys` would hold."""

    device: str
    more: int
    buys: str
    times_as_fast: float | None = None
    """Predicted, for a request; None where there is no plan to compare with."""


def next_steps(spec: ModelSpec, hardware: Hardware, plan: Plan | None, needs: Needs | None = None) -> tuple[Step, ...]:
    """Where more memory would help, the smallest step first; none where nothing streams.

    `plan` is the one that `hardware` allows for `needs`, None where it allows none.
    """
    main = next(iter(hardware.devices), CPU)
    wanted: list[tuple[str, str, Callable[[Plan], bool]]] = []
    if plan is None:
        wanted.append((CPU, "it runs", lambda plan: True))
    elif DISK in plan.devices:
        wanted.append((CPU, "nothing is read from disk", lambda plan: DISK not in plan.devices))
    if plan is None or plan.streams:
        wanted.append((main, "nothing streams", lambda plan: not plan.streams))
    found = {}
    for device, buys, reached in wanted:
        more = _least(spec, hardware, device, reached, needs)
        if more is not None:
            after = make_plan(spec, _with_more(hardware, device, more), needs=needs)
            faster = plan.seconds / after.seconds if plan is not None and after.seconds else None
            found[device, more] = Step(device, more, buys, faster)  # the later one says more
    return tuple(sorted(found.values(), key=lambda step: step.more))


def _least(
    spec: ModelSpec, hardware: Hardware, device: str, reached: Callable[[Plan], bool], needs: Needs | None
) -> int | None:
    """The fewest bytes more on `device` that reach it (to the grain of `_STEP`); None where no number does."""
    grain = max(1, min(_STEP, spec.nbytes // 256))
    beside = 0 if needs is None else needs.activations + sum(needs.cache.values())

    def enough(steps: int) -> bool:
        try:
            return reached(make_plan(spec, _with_more(hardware, device, steps * grain), needs=needs))
        except BudgetError:
            return False

    low, high = 0, (2 * spec.nbytes + beside) // grain + 1
    if not enough(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high * grain


def _with_more(hardware: Hardware, device: str, more: int) -> Hardware:
    if device == CPU:
        return replace(hardware, ram=hardware.ram + more)
    return replace(hardware, devices={**hardware.devices, device: hardware.devices[device] + more})
