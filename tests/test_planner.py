"""The planner's promises: every tensor placed once, no budget exceeded, nothing offloaded without need."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys

import pytest

from hf_bigload.errors import BudgetError
from hf_bigload.planner import STRATEGIES, compress, follow_map, make_plan, make_plan_with_room
from hf_bigload.specs import (
    CPU,
    DISK,
    BlockSpec,
    Hardware,
    ModelSpec,
    Needs,
    Plan,
    Speeds,
    TensorSpec,
    Workload,
    roofline,
)


def tensor(name: str, nbytes: int, is_buffer: bool = False) -> TensorSpec:
    return TensorSpec(name, nbytes, "uint8", (nbytes,), is_buffer)


def block(name: str, *sizes: int, gathers: bool = False, calls: int | None = None) -> BlockSpec:
    """A whole block with one leaf module per size, or for one size a single leaf."""
    if len(sizes) == 1:
        return BlockSpec(name, (tensor(f"{name}.weight", sizes[0]),), whole=False, gathers=gathers, calls=calls)
    leaves = tuple(
        BlockSpec(f"{name}.{i}", (tensor(f"{name}.{i}.weight", size),), whole=False, part_of=name, calls=calls)
        for i, size in enumerate(sizes)
    )
    return BlockSpec(name, tuple(t for leaf in leaves for t in leaf.tensors), whole=True, parts=leaves, calls=calls)


def spec(*blocks: BlockSpec, ties: dict[str, str] | None = None) -> ModelSpec:
    return ModelSpec(tuple(blocks), ties or {})


def homes(plan: Plan) -> dict[str, str]:
    return {t.name: p.home_of(t.name) for p in plan.placements for t in p.block.tensors}


def assert_within_budget(plan: Plan) -> None:
    over = {d: (plan.used[d], plan.budget[d]) for d in plan.used if d != DISK and plan.used[d] > plan.budget.get(d, 0)}
    assert not over


COMPUTES_AS_LONG_AS_IT_WAITS = Speeds(1e9, 1e9, cpu=roofline(1e9, 1e15, 1), device=roofline(1e9, 1e15, 1))
"""Where a second slot, in which the next block comes meanwhile, pays for the block that it drives away."""

LAYERS = [block(f"layers.{i}", 60, 40) for i in range(6)]


class TestWithoutOffload:
    def test_a_model_that_fits_in_ram_rests_there_and_streams_nothing(self) -> None:
        plan = make_plan(spec(*LAYERS), Hardware({}, 600))
        assert plan.device_map == {"": CPU} and not plan.streams and not plan.ring

    def test_a_model_that_fits_on_one_accelerator_leaves_ram_alone(self) -> None:
        plan = make_plan(spec(*LAYERS), Hardware({"cuda:0": 600}, 10_000))
        assert plan.device_map == {"": "cuda:0"} and plan.used == {"cuda:0": 600}

    @pytest.mark.parametrize("strategy", ["auto", "balanced"])
    def test_several_accelerators_share_evenly(self, strategy: str) -> None:
        plan = make_plan(spec(*LAYERS), Hardware({f"cuda:{i}": 1000 for i in range(3)}, 0), strategy)
        assert plan.used == {"cuda:0": 200, "cuda:1": 200, "cuda:2": 200}

    def test_sequential_fills_in_order(self) -> None:
        plan = make_plan(spec(*LAYERS), Hardware({"cuda:0": 450, "cuda:1": 450}, 0), "sequential")
        assert plan.used == {"cuda:0": 400, "cuda:1": 200}

    def test_balanced_low_0_leaves_the_first_accelerator_empty_if_it_can(self) -> None:
        plan = make_plan(spec(*LAYERS), Hardware({f"cuda:{i}": 1000 for i in range(3)}, 0), "balanced_low_0")
        assert plan.used == {"cuda:1": 300, "cuda:2": 300}

    def test_balanced_low_0_gives_the_first_only_what_the_others_cannot_take(self) -> None:
        plan = make_plan(spec(*LAYERS), Hardware({"cuda:0": 1000, "cuda:1": 400}, 0), "balanced_low_0")
        assert plan.used == {"cuda:0": 200, "cuda:1": 400}


class TestWithOffload:
    def test_ram_keeps_room_for_the_block_that_runs_and_the_next(self) -> None:
        plan = make_plan(spec(*LAYERS), Hardware({}, 350, speeds=COMPUTES_AS_LONG_AS_IT_WAITS))
        assert list(homes(plan).values()).count(CPU) == 2  # a layer of two tensors, beside a ring of two
        assert plan.ring == {CPU: 200} and plan.used[CPU] == 300

    def test_an_accelerator_keeps_room_for_the_block_that_runs_and_the_next(self) -> None:
        plan = make_plan(spec(*LAYERS), Hardware({"cuda:0": 350}, 10_000, speeds=COMPUTES_AS_LONG_AS_IT_WAITS))
        assert plan.ring == {"cuda:0": 200} and plan.used["cuda:0"] == 300

    def test_what_comes_from_disk_to_an_accelerator_finds_as_much_room_in_ram(self) -> None:
        plan = make_plan(spec(*LAYERS), Hardware({"cuda:0": 350}, 250, speeds=COMPUTES_AS_LONG_AS_IT_WAITS))
        assert plan.ring == {"cuda:0": 200, CPU: 200}

    @pytest.mark.parametrize("hardware", [Hardware({}, 150), Hardware({"cuda:0": 150}, 10_000)])
    def test_where_two_do_not_fit_one_streams_at_a_time(self, hardware: Hardware) -> None:
        assert set(make_plan(spec(*LAYERS), hardware).ring.values()) == {100}

    def test_a_ring_takes_the_two_largest_together(self) -> None:
        plan = make_plan(spec(*LAYERS, block("head", 150)), Hardware({}, 260), "sequential")
        assert plan.ring == {CPU: 250}

    def test_a_first_layer_larger_than_the_device_does_not_send_the_others_away(self) -> None:
        model = spec(block("huge", 1000), *LAYERS)
        plan = make_plan(model, Hardware({"cuda:0": 600}, 10_000))
        assert {homes(plan)[f"layers.{i}.0.weight"] for i in range(6)} == {"cuda:0"}
        huge = next(p for p in plan.placements if p.block.name == "huge")
        assert huge.home == CPU and huge.at_home and huge.device == "cuda:0"

    def test_only_the_largest_layer_fits(self) -> None:
        plan = make_plan(spec(*LAYERS), Hardware({"cuda:0": 100}, 10_000))
        assert set(homes(plan).values()) == {CPU} and plan.ring == {"cuda:0": 100}

    def test_a_block_larger_than_the_device_is_cut_at_its_leaves(self) -> None:
        plan = make_plan(spec(*LAYERS), Hardware({"cuda:0": 80}, 10_000))
        assert all(p.block.part_of for p in plan.placements)
        assert_within_budget(plan)

    def test_one_giant_that_stays_resident_shrinks_the_ring(self) -> None:
        model = spec(block("giant", 500), *LAYERS)
        plan = make_plan(model, Hardware({"cuda:0": 700}, 10_000, speeds=COMPUTES_AS_LONG_AS_IT_WAITS))
        assert homes(plan)["giant.weight"] == "cuda:0" and plan.ring["cuda:0"] == 200

    def test_rows_of_a_table_travel_not_the_table(self) -> None:
        hardware = Hardware({}, 300, speeds=COMPUTES_AS_LONG_AS_IT_WAITS)
        plan = make_plan(spec(block("embed", 5000, gathers=True), *LAYERS), hardware)
        embed = plan.placements[0]
        assert (embed.home, embed.at_home) == (DISK, True) and plan.ring == {CPU: 200}

    def test_a_table_that_a_head_multiplies_with_needs_room_as_a_whole(self) -> None:
        head = BlockSpec("head", (), whole=False, borrows=("embed.weight",))
        model = spec(block("embed", 500, gathers=True), *LAYERS, head, ties={"head.weight": "embed.weight"})
        with pytest.raises(BudgetError, match=r"'embed' alone needs 500 B \(500 bytes\)"):
            make_plan(model, Hardware({}, 300))
        assert_within_budget(make_plan(model, Hardware({}, 600)))

    def test_ram_below_the_largest_layer_names_it_and_the_budget(self) -> None:
        with pytest.raises(BudgetError, match=r"alone needs 60 B .* cpu: 50 B"):
            make_plan(spec(*LAYERS), Hardware({}, 50))

    def test_buffers_stay_on_the_device_that_computes_with_them(self) -> None:
        layers = [
            BlockSpec(f"l{i}", (tensor(f"l{i}.w", 90), tensor(f"l{i}.b", 10, True)), whole=False) for i in range(4)
        ]
        plan = make_plan(spec(*layers), Hardware({"cuda:0": 240}, 1000))
        assert_within_budget(plan)
        assert plan.used["cuda:0"] >= 40

    def test_the_first_value_of_the_map_is_a_device_that_computes(self) -> None:
        plan = make_plan(spec(*LAYERS), Hardware({}, 120))
        assert next(iter(plan.device_map.values())) == CPU
        plan = make_plan(spec(*LAYERS), Hardware({"cuda:0": 100}, 150), map_value=lambda d: 0 if d == "cuda:0" else d)
        assert next(iter(plan.device_map.values())) == 0


def random_instance(rng: random.Random) -> tuple[ModelSpec, Hardware]:
    blocks = []
    for i in range(rng.randint(1, 12)):
        sizes = [rng.randint(1, 50) for _ in range(rng.randint(1, 4))]
        blocks.append(block(f"b{i}", *sizes, gathers=len(sizes) == 1 and rng.random() < 0.3))
    total = sum(b.nbytes for b in blocks)
    devices = {f"cuda:{i}": rng.randint(1, total) for i in range(rng.randint(0, 3))}
    return spec(*blocks), Hardware(devices, rng.randint(1, total))


@pytest.mark.parametrize("strategy", ["auto", "balanced", "balanced_low_0", "sequential"])
def test_random_instances_place_every_tensor_once_within_every_budget(strategy: str) -> None:
    rng = random.Random(7)
    planned = 0
    for _ in range(1500):
        model, hardware = random_instance(rng)
        try:
            plan = make_plan(model, hardware, strategy)
        except BudgetError:
            assert hardware.ram < model.nbytes  # else it would simply rest there
            continue
        planned += 1
        names = [t.name for p in plan.placements for t in p.block.tensors]
        assert sorted(names) == sorted(t.name for b in model.blocks for t in b.tensors)
        assert_within_budget(plan)
    assert planned > 1000


def test_the_same_inputs_give_the_same_plan() -> None:
    rng = random.Random(3)
    for _ in range(50):
        model, hardware = random_instance(rng)
        try:
            assert make_plan(model, hardware) == make_plan(model, hardware)
        except BudgetError:
            continue


class TestFollowingAMap:
    def test_homes_are_the_maps(self) -> None:
        plan = follow_map(spec(*LAYERS), lambda n: DISK if n.startswith("layers.1.") else CPU, CPU, Hardware({}, 1000))
        assert {n for n, home in homes(plan).items() if home == DISK} == {"layers.1.0.weight", "layers.1.1.weight"}
        assert plan.ring == {CPU: 100}

    def test_a_block_that_the_map_splits_is_cut_at_its_leaves(self) -> None:
        plan = follow_map(spec(*LAYERS), lambda n: DISK if n == "layers.1.1.weight" else CPU, CPU, Hardware({}, 1000))
        assert [p.home for p in plan.placements if p.block.part_of == "layers.1"] == [CPU, DISK]
        assert plan.ring == {CPU: 40}

    def test_offloaded_blocks_run_on_the_main_device(self) -> None:
        plan = follow_map(spec(*LAYERS), lambda n: CPU, "cuda:0", Hardware({"cuda:0": 1000}, 1000))
        assert {p.device for p in plan.placements} == {"cuda:0"} and plan.streams


def test_compress_names_the_highest_module_that_agrees() -> None:
    homes = {"a.0.w": 0, "a.0.b": 0, "a.1.w": 1, "b.w": 1, "b.c.w": 1}
    assert compress(homes) == {"a.0": 0, "a.1": 1, "b": 1}
    assert compress({"a.w": 0, "b.w": 0}) == {"": 0}


ENCODER = [block(f"encoder.{i}", 60, 40, calls=1) for i in range(4)]
DECODER = [block(f"decoder.{i}", 60, 40) for i in range(4)]


QUICK = Speeds(cpu=roofline(1e12, 1e15), device=roofline(1e12, 1e15))
"""Arithmetic next to which it is weights that one waits for."""


@pytest.mark.parametrize("hardware", [Hardware({}, 500, speeds=QUICK), Hardware({"cuda:0": 500}, 10_000, speeds=QUICK)])
@pytest.mark.parametrize("blocks", [[*ENCODER, *DECODER], [*DECODER, *ENCODER]])
def test_the_decoder_rests_where_it_runs_and_the_encoder_streams_once(
    hardware: Hardware, blocks: list[BlockSpec]
) -> None:
    plan = make_plan(spec(*blocks), hardware)
    assert {p.block.name for p in plan.placements if not p.streamed_bytes} == {d.name for d in DECODER}
    assert_within_budget(plan)


def test_ram_that_is_not_named_lets_weights_from_disk_pass_and_keeps_none() -> None:
    plan = make_plan(spec(*LAYERS), Hardware({"cuda:0": 350}, 0, passage=100))
    assert CPU not in set(homes(plan).values()) and plan.used[CPU] == 100
    assert_within_budget(plan)


def test_buffers_of_blocks_on_disk_count_in_ram_where_the_cpu_computes_with_them() -> None:
    layers = [BlockSpec(f"l{i}", (tensor(f"l{i}.w", 70), tensor(f"l{i}.b", 30, True)), whole=False) for i in range(5)]
    for ram in range(220, 500, 7):
        plan = make_plan(spec(*layers), Hardware({}, ram))
        assert_within_budget(plan)


def test_what_streams_fits_beside_the_buffers_of_an_accelerator() -> None:
    layers = [BlockSpec(f"l{i}", (tensor(f"l{i}.w", 70), tensor(f"l{i}.b", 30, True)), whole=False) for i in range(5)]
    for limit in range(150, 500, 7):
        assert_within_budget(make_plan(spec(*layers), Hardware({"cuda:0": limit}, 1000)))


def test_a_plan_says_what_a_request_takes() -> None:
    resident, streamed = (make_plan(spec(*LAYERS), Hardware({}, ram)) for ram in (600, 300))
    assert [phase.name for phase in resident.predicted] == ["prefill", "decode"]
    assert 0 < resident.seconds < streamed.seconds


# ---------------------------------------------------------------- room for a request


def test_room_is_kept_for_activations_and_caches() -> None:
    needs = Needs(Workload(), activations=50, cache={layer.name: 10 for layer in LAYERS})
    plan = make_plan(spec(*LAYERS), Hardware({"cuda:0": 710}, 10_000), needs=needs)
    assert plan.cache == {"cuda:0": 60} and plan.activations == {"cuda:0": 50} and not plan.ring
    assert plan.used == {"cuda:0": 600 + 60 + 50}
    smaller = make_plan(spec(*LAYERS), Hardware({"cuda:0": 709}, 10_000), needs=needs)
    assert smaller.streams and smaller.used["cuda:0"] <= 709


def test_each_of_several_accelerators_keeps_what_its_own_blocks_remember() -> None:
    needs = Needs(Workload(), activations=5, cache={layer.name: 10 for layer in LAYERS})
    plan = make_plan(spec(*LAYERS), Hardware({"cuda:0": 400, "cuda:1": 400}, 0), needs=needs)
    assert plan.cache == {"cuda:0": 30, "cuda:1": 30} and plan.activations == {"cuda:0": 5, "cuda:1": 5}


def test_a_cache_of_a_block_that_was_cut_counts_once() -> None:
    needs = Needs(Workload(), cache={"layers.0": 7})
    plan = make_plan(spec(LAYERS[0]), Hardware({"cuda:0": 80}, 10_000), needs=needs)
    assert {p.block.part_of for p in plan.placements} == {"layers.0"} and plan.cache == {"cuda:0": 7}


def test_an_accelerator_that_cannot_hold_what_stays_on_it_is_left_out() -> None:
    needs = Needs(Workload(), activations=50)
    plan = make_plan(spec(*LAYERS), Hardware({"cuda:0": 40}, 10_000), needs=needs)
    assert plan.main_device == CPU and "cuda:0" not in plan.used


def test_each_accelerator_needs_room_for_the_caches_of_its_own_blocks_only() -> None:
    needs = Needs(Workload(), cache={layer.name: 50 for layer in LAYERS})
    plan = make_plan(spec(*LAYERS), Hardware({"cuda:0": 290, "cuda:1": 290}, 2000), needs=needs)
    assert plan.main_device == "cuda:0" and plan.used["cuda:1"] > 100
    assert_within_budget(plan)


def test_a_leaf_that_is_computed_where_it_rests_goes_to_ram_first_since_a_disk_would_be_read_at_each_call() -> None:
    head = block("head", 500)
    slow = Speeds(disk=10, bus=1e9)
    plan = make_plan(spec(*LAYERS, head), Hardware({"cuda:0": 250}, 700, speeds=slow))
    assert homes(plan)["head.weight"] == CPU


class TestARequestThatNobodyNamed:
    needs = Needs(Workload(), activations=500)

    def test_gets_no_room_where_that_would_cost_the_accelerator(self, caplog: pytest.LogCaptureFixture) -> None:
        plan = make_plan_with_room(spec(*LAYERS), Hardware({"cuda:0": 400}, 10_000), self.needs, firm=False)
        assert plan.main_device == "cuda:0" and not plan.activations
        assert "No room is kept" in caplog.text and "500 B" in caplog.text

    def test_gets_no_room_where_nothing_would_fit(self) -> None:
        plan = make_plan_with_room(spec(*LAYERS), Hardware({}, 400), self.needs, firm=False)
        assert plan.streams and not plan.activations

    def test_is_refused_where_it_was_named(self) -> None:
        with pytest.raises(BudgetError, match="beside 500 B for what a request computes with"):
            make_plan_with_room(spec(*LAYERS), Hardware({}, 400), self.needs, firm=True)


# ---------------------------------------------------------------- any model on any machine


def random_block(rng: random.Random, name: str) -> BlockSpec:
    calls = 1 if rng.random() < 0.3 else None
    if rng.random() < 0.4:
        return block(name, rng.randint(5, 150), gathers=rng.random() < 0.4, calls=calls)
    leaves = tuple(
        BlockSpec(
            f"{name}.{i}",
            (
                tensor(f"{name}.{i}.weight", rng.randint(5, 60)),
                *[tensor(f"{name}.{i}.buffer", 4, True)] * (rng.random() < 0.3),
            ),
            whole=False,
            part_of=name,
            calls=calls,
        )
        for i in range(rng.randint(1, 4))
    )
    return BlockSpec(name, tuple(t for leaf in leaves for t in leaf.tensors), whole=True, parts=leaves, calls=calls)


def random_case(rng: random.Random) -> tuple[ModelSpec, Hardware, Needs]:
    blocks = [random_block(rng, f"b{i}") for i in range(rng.randint(2, 9))]
    if rng.random() < 0.4:
        blocks.append(BlockSpec("head", (), whole=False, borrows=(blocks[0].tensors[0].name,)))
    model = spec(*blocks)
    total = model.nbytes
    arithmetic = roofline(10 ** rng.uniform(8, 12), 10 ** rng.uniform(9, 12))
    devices = {f"cuda:{i}": rng.randint(1, total) for i in range(rng.choice([0, 1, 1, 2, 3]))}
    ram = rng.choice([0, rng.randint(1, total)])
    hardware = Hardware(devices, ram, rng.choice([0, total]), Speeds(cpu=arithmetic, device=arithmetic))
    workload = Workload(1, rng.choice([1, 64]), rng.choice([1, 9]))
    cache = {b.name: rng.randint(0, 10) for b in blocks if b.tensors and rng.random() < 0.5}
    return model, hardware, Needs(workload, rng.choice([0, rng.randint(0, 40)]), cache)


def check_random_plans(seed: int, cases: int) -> None:
    rng, planned = random.Random(seed), 0
    for _ in range(cases):
        model, hardware, needs = random_case(rng)
        strategy, buffers = rng.choice(STRATEGIES), rng.random() < 0.3
        try:
            plan = make_plan(model, hardware, strategy, buffers, needs=needs)
        except BudgetError:
            continue
        planned += 1
        assert_within_budget(plan)
        placed = sorted(t.name for p in plan.placements for t in p.block.tensors)
        assert placed == sorted(t.name for b in model.blocks for t in b.tensors)
        assert plan.bound <= plan.seconds * (1 + 1e-9)
        assert plan == make_plan(model, hardware, strategy, buffers, needs=needs)
    assert planned > cases // 2


def test_no_plan_exceeds_a_budget_and_every_tensor_is_placed_once() -> None:
    check_random_plans(1, 300)


def exists(sizes: list[int], device: int, ram: int, needs: Needs) -> bool:
    """By trying every home of blocks that are not cut, with one slot: counted here, not by the planner."""
    left = device - needs.activations - sum(needs.cache.values())
    for homes in itertools.product(("device", "ram", "disk"), repeat=len(sizes)):
        of = {home: [size for size, at in zip(sizes, homes, strict=True) if at == home] for home in set(homes)}
        ring = max([*of.get("ram", ()), *of.get("disk", ())], default=0)
        on_device, in_ram = (
            sum(of.get("device", ())) + ring,
            sum(of.get("ram", ())) + max(of.get("disk", ()), default=0),
        )
        if on_device <= left and in_ram <= ram:
            return True
    return False


def test_a_plan_is_found_wherever_one_exists() -> None:
    rng, found = random.Random(3), 0
    for _ in range(300):
        sizes = [rng.choice([10, 40, rng.randint(5, 100)]) for _ in range(rng.randint(2, 6))]
        device, ram = rng.randint(max(sizes), sum(sizes)), rng.randint(1, sum(sizes))
        cache = {f"b{i}": rng.randint(0, 5) for i in range(len(sizes))}
        needs = Needs(Workload(), rng.randint(0, 20), cache)
        if not exists(sizes, device, ram, needs):
            continue
        blocks = [block(f"b{i}", size) for i, size in enumerate(sizes)]
        plan = make_plan(spec(*blocks), Hardware({"cuda:0": device}, ram), needs=needs)
        assert_within_budget(plan)
        assert plan.main_device == "cuda:0"
        found += 1
    assert found > 100


@pytest.mark.slow
def test_no_plan_of_thousands_exceeds_a_budget() -> None:
    check_random_plans(2, 5000)


IN_A_PROCESS = """
import random
from tests.test_planner import BudgetError, make_plan, random_case
rng = random.Random(5)
for _ in range(5):
    model, hardware, needs = random_case(rng)
    try:
        print(make_plan(model, hardware, needs=needs))
    except BudgetError as error:
        print(error)
"""


def test_another_process_makes_the_same_plan() -> None:
    def plans(seed: str) -> bytes:
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        return subprocess.run(
            [sys.executable, "-c", IN_A_PROCESS], env=environment, capture_output=True, check=True
        ).stdout

    assert plans("1") == plans("2") != b""
