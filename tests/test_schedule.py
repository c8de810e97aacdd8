"""What a placement is predicted to take, worked out by hand."""

from __future__ import annotations

import pytest

from hf_bigload.schedule import Task, phase_seconds, phases, predict
from hf_bigload.specs import CPU, DISK, BlockSpec, Needs, Placement, Speeds, TensorSpec, Workload, roofline


def block(name: str, nbytes: int, calls: int | None = None) -> BlockSpec:
    return BlockSpec(name, (TensorSpec(f"{name}.weight", nbytes, "uint8", (nbytes,)),), whole=False, calls=calls)


def test_resident_blocks_take_what_they_compute() -> None:
    assert phase_seconds([Task(0, 0, 2), Task(0, 0, 3)], calls=10, slots=2) == 50


def test_with_one_slot_nothing_comes_while_something_that_came_runs() -> None:
    assert phase_seconds([Task(4, 0, 1)] * 3, calls=1, slots=1) == 15


def test_with_two_slots_the_next_block_comes_while_one_runs() -> None:
    assert phase_seconds([Task(4, 0, 1)] * 3, calls=1, slots=2) == 13


def test_with_one_slot_a_block_comes_while_resident_ones_run() -> None:
    tasks = [Task(4, 0, 1), Task(0, 0, 3), Task(4, 0, 1)]
    assert phase_seconds(tasks, calls=1, slots=1) == 5 + 4 + 1


def test_disk_and_bus_work_at_the_same_time_each_on_one_block() -> None:
    assert phase_seconds([Task(4, 3, 0)] * 3, calls=1, slots=2) == 3 * 4 + 3
    assert phase_seconds([Task(4, 3, 0)] * 3, calls=1, slots=1) == 3 * (4 + 3)


def test_from_disk_the_next_call_s_first_block_comes_ahead_from_memory_it_does_not() -> None:
    disk, memory = [Task(2, 0, 1), Task(0, 0, 5)], [Task(0, 2, 1, from_memory=True), Task(0, 0, 5)]
    assert phase_seconds(disk, calls=100, slots=2) == 2 + 100 * 6
    assert phase_seconds(memory, calls=100, slots=2) == 100 * (2 + 6)


def test_calls_that_are_not_followed_take_as_long_as_the_last() -> None:
    tasks = [Task(4, 0, 1), Task(0, 0, 1)]
    each = phase_seconds(tasks, 51, 2) - phase_seconds(tasks, 50, 2)
    assert phase_seconds(tasks, 1000, 2) == pytest.approx(phase_seconds(tasks, 50, 2) + 950 * each)


def test_an_encoder_runs_once_and_the_rest_once_for_the_prompt_and_once_per_token_after_it() -> None:
    found = phases([block("shared", 1), block("encoder", 1, calls=1), block("decoder", 1)], Workload(2, 100, 16))
    assert [(p.name, p.blocks, p.calls, p.tokens) for p in found] == [
        ("encode", (1,), 1, 200), ("prefill", (0, 2), 1, 200), ("decode", (0, 2), 15, 2)
    ]  # fmt: skip


def test_one_new_token_needs_no_decoding() -> None:
    assert [p.name for p in phases([block("b", 1)], Workload(new_tokens=1))] == ["prefill"]


def test_seconds_are_bytes_over_bandwidths() -> None:
    speeds = Speeds(10, 100, cpu=roofline(1000, 1e9, 1), device=roofline(1000, 1e9, 1))
    from_disk = Placement(block("a", 1000), DISK, "cuda:0")
    (prefill, decode) = predict([from_disk], Needs(Workload(1, 1, 11)), speeds, slots=1)
    assert prefill.seconds == pytest.approx(100 + 10 + 1) and decode.seconds_per_call == pytest.approx(111)
    at_home = Placement(block("a", 1000), CPU, "cuda:0", at_home=True)
    assert predict([at_home], Needs(Workload(1, 1, 1)), speeds, slots=1)[0].seconds == pytest.approx(1)
