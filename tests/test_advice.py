"""The next step up is the least one: with it the plan gets better, and with less it does not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hf_bigload.advice import next_steps
from hf_bigload.errors import BudgetError
from hf_bigload.planner import make_plan
from hf_bigload.specs import CPU, DISK, BlockSpec, Hardware, ModelSpec, Plan, TensorSpec

MIB = 1 << 20
BLOCKS = tuple(
    BlockSpec(f"h.{i}", (TensorSpec(f"h.{i}.w", 50 * MIB, "uint8", (50 * MIB,)),), whole=False) for i in range(10)
)
SPEC = ModelSpec(BLOCKS)  # 500 MiB
GRAIN = MIB


def plan_with(hardware: Hardware, device: str = CPU, more: int = 0) -> Plan | None:
    if device == CPU:
        hardware = replace(hardware, ram=hardware.ram + more)
    else:
        hardware = replace(hardware, devices={device: hardware.devices[device] + more})
    try:
        return make_plan(SPEC, hardware)
    except BudgetError:
        return None


def holds(plan: Plan | None, buys: str) -> bool:
    if plan is None:
        return False
    return {"it runs": True, "nothing streams": not plan.streams}.get(buys, DISK not in plan.devices)


@pytest.mark.parametrize(
    ("hardware", "expected"),
    [
        (Hardware({}, 10 * MIB), {"it runs", "nothing streams"}),
        (Hardware({}, 200 * MIB), {"nothing streams"}),
        (Hardware({"cuda:0": 200 * MIB}, 200 * MIB), {"nothing is read from disk", "nothing streams"}),
        (Hardware({"cuda:0": 200 * MIB}, 1000 * MIB), {"nothing streams"}),
    ],
)
def test_a_step_is_enough_and_no_smaller_one_is(hardware: Hardware, expected: set[str]) -> None:
    steps = next_steps(SPEC, hardware, plan_with(hardware))
    assert {step.buys for step in steps} == expected
    for step in steps:
        assert holds(plan_with(hardware, step.device, step.more), step.buys)
        assert not holds(plan_with(hardware, step.device, step.more - 2 * GRAIN), step.buys)
    assert [step.more for step in steps] == sorted(step.more for step in steps)


def test_where_nothing_streams_there_is_no_step() -> None:
    hardware = Hardware({"cuda:0": 600 * MIB}, 100 * MIB)
    assert next_steps(SPEC, hardware, plan_with(hardware)) == ()
