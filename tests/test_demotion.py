"""Which blocks leave an accelerator that is full: as few as will do, found without making a plan for each number."""

from __future__ import annotations

import random
from typing import Any

import pytest

from hf_bigload import demotion
from hf_bigload.demotion import demoted, with_placements
from hf_bigload.planner import rings
from hf_bigload.specs import CPU, DISK, BlockSpec, Placement, Plan, TensorSpec

DEVICE = "cuda:0"


def placement(name: str, nbytes: int, home: str = DEVICE, buffers: int = 0, gathers: bool = False) -> Placement:
    tensors = [TensorSpec(f"{name}.weight", nbytes, "uint8", (nbytes,))]
    if buffers:
        tensors.append(TensorSpec(f"{name}.buffer", buffers, "uint8", (buffers,), is_buffer=True))
    block = BlockSpec(name, tuple(tensors), whole=True, gathers=gathers)
    return Placement(block, home, DEVICE, at_home=gathers and home != DEVICE)


def plan_of(placements: list[Placement]) -> Plan:
    return with_placements(Plan((), {}, DEVICE, {DEVICE: 1 << 40, CPU: 1 << 40}, {}, {}), placements)


def test_two_thousand_blocks_are_decided_by_sums_and_planned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of([placement(f"layers.{i}", 1000 + i) for i in range(2000)])
    calls: list[str] = []

    def count(name: str) -> None:
        function = getattr(demotion, name)

        def counted(*args: Any) -> Any:
            calls.append(name)
            return function(*args)

        monkeypatch.setattr(demotion, name, counted)

    for name in ("rings", "resting", "execution_device_first"):
        count(name)
    lower = demoted(plan, DEVICE, plan.used[DEVICE] // 2, ram=plan.used[DEVICE] // 4)
    assert lower is not None and lower.used[DEVICE] <= plan.used[DEVICE] // 2
    assert calls.count("execution_device_first") == 1 and len(calls) < 20


def some_plan(seed: int) -> Plan:
    draw = random.Random(seed)
    homes = [draw.choice([DEVICE, DEVICE, DEVICE, CPU, DISK]) for _ in range(draw.randint(1, 12))]
    return plan_of(
        [
            placement(f"b{i}", draw.randint(1, 50), home, draw.choice([0, 3]), gathers=draw.random() < 0.1)
            for i, home in enumerate([DEVICE, *homes])
        ]
    )


@pytest.mark.parametrize("seed", range(60))
def test_no_more_leaves_than_is_asked_and_ram_holds_what_it_gets(seed: int) -> None:
    draw, plan = random.Random(seed), some_plan(seed)
    wanted, ram = draw.randint(1, plan.used[DEVICE]), draw.choice([0, 20, 100, 1000])
    passage = draw.choice([0, 1000]) if not ram else 0
    lower = demoted(plan, DEVICE, wanted, ram, passage)
    if lower is None:
        return
    assert lower.used.get(DEVICE, 0) < plan.used[DEVICE]
    assert lower.used.get(CPU, 0) - plan.used.get(CPU, 0) <= max(ram, passage) + 3 * len(plan.placements)
    gone = [at for at, p in enumerate(lower.placements) if p.home != plan.placements[at].home]
    assert all(p.device == DEVICE for p in lower.placements)
    if gone and plan.used[DEVICE] - lower.used.get(DEVICE, 0) >= wanted:
        placements = list(lower.placements)
        placements[gone[-1]] = plan.placements[gone[-1]]
        depth = next(depth for depth in (2, 1) if rings(lower.placements, depth) == lower.ring)
        assert plan.used[DEVICE] - with_placements(plan, placements, depth=depth).used[DEVICE] < wanted


def test_where_all_of_it_cannot_be_had_as_much_as_possible_goes() -> None:
    plan = plan_of([placement(f"b{i}", 10) for i in range(6)])
    lower = demoted(plan, DEVICE, 60, ram=30)
    assert lower is not None
    # one block in RAM beside a ring for two, or two beside a ring for one: the device keeps a ring for one
    assert lower.used[DEVICE] == 10 and lower.used[CPU] <= 30
    assert demoted(plan, DEVICE, 60, ram=0) is None  # what is on disk would have nothing to come through
    through = demoted(plan, DEVICE, 60, ram=0, passage=20)
    assert through is not None and through.used[DEVICE] == 10 and {p.home for p in through.placements} == {DISK}
