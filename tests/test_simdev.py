"""What the simulated accelerator promises to the tests that stand on it."""

from __future__ import annotations

import copy
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, accelerator, nn
from torch.nn import functional as F
from torch.utils.dlpack import from_dlpack, to_dlpack

from tests import simdev
from tests.simdev import build

MIB = 1 << 20


@pytest.fixture(autouse=True)
def sim() -> Iterator[ModuleType]:
    with simdev.devices([]) as module:
        module.clear_violations()
        yield module
        module.set_async(False)


# ------------------------------------------------------------------------------------------------ devices and memory
def test_load_returns_the_registered_module_every_time(sim: ModuleType) -> None:
    assert simdev.load() is sim is sys.modules["torch.sim"]
    assert accelerator.current_accelerator() == torch.device("sim")
    assert accelerator.device_count() == sim.device_count() >= 2


def test_memory_is_counted_on_the_device_that_holds_it() -> None:
    before = [accelerator.memory_allocated(index) for index in (0, 1)]
    tensor = torch.zeros(MIB, dtype=torch.uint8, device="sim:1")
    view = tensor[10:]
    assert accelerator.memory_allocated(0) == before[0]
    assert accelerator.memory_allocated(1) == before[1] + MIB
    del tensor
    assert accelerator.memory_allocated(1) == before[1] + MIB, "a view keeps the storage"
    del view
    assert accelerator.memory_allocated(1) == before[1]
    assert accelerator.max_memory_allocated(1) == before[1] + MIB


def test_what_a_kernel_allocates_is_counted_too() -> None:
    a = torch.ones(1000, device="sim:1")
    before = accelerator.memory_allocated(1)
    result = a * 2
    assert accelerator.memory_allocated(1) == before + 4000
    result.untyped_storage().resize_(0)
    assert accelerator.memory_allocated(1) == before


def test_an_out_argument_that_grows_is_recharged() -> None:
    out = torch.empty(0, device="sim:1")
    before = accelerator.memory_allocated(1)
    torch.add(torch.ones(256, device="sim:1"), 1, out=out)
    assert out.sum().item() == 512
    assert out.untyped_storage().nbytes() == 1024
    assert accelerator.memory_allocated(1) == before + 1024


def test_an_allocation_beyond_capacity_is_out_of_memory() -> None:
    with simdev.devices([None, MIB]):
        kept = torch.empty(MIB // 2, dtype=torch.uint8, device="sim:1")
        with pytest.raises(torch.OutOfMemoryError, match=r"on sim:1.*capacity of 1024\.00 KiB.*512\.00 KiB is free"):
            torch.empty(MIB, dtype=torch.uint8, device="sim:1")
        with pytest.raises(torch.OutOfMemoryError):
            kept.to(torch.float32)
        assert accelerator.get_memory_info(1) == (MIB // 2, MIB)
        assert torch.empty(MIB // 2, dtype=torch.uint8, device="sim:1").numel() == MIB // 2
        torch.empty(2 * MIB, dtype=torch.uint8, device="sim:0")
    assert torch.empty(2 * MIB, dtype=torch.uint8, device="sim:1").numel() == 2 * MIB


def test_devices_starts_peaks_from_what_is_allocated_now() -> None:
    torch.empty(MIB, dtype=torch.uint8, device="sim:1")
    with simdev.devices([]):
        assert accelerator.max_memory_allocated(1) == accelerator.memory_allocated(1)


def test_devices_can_hide_the_others() -> None:
    everything = accelerator.device_count()
    with simdev.devices([MIB], hide_others=True):
        assert accelerator.device_count() == 1
    assert accelerator.device_count() == everything


def test_more_capacities_than_devices_are_refused(sim: ModuleType) -> None:
    with pytest.raises(ValueError, match="SIM_DEVICE_COUNT"), simdev.devices([MIB] * (sim.device_count() + 1)):
        pass


def test_a_device_that_does_not_exist_is_refused(sim: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.empty(1, device=f"sim:{sim.device_count()}")


def test_the_current_device_follows_the_context(sim: ModuleType) -> None:
    with sim.device(1):
        assert torch.empty(1, device="sim").device == torch.device("sim:1")
    assert torch.empty(1, device="sim").device == torch.device("sim:0")


def test_the_current_stream_follows_the_context(sim: ModuleType) -> None:
    stream = torch.Stream("sim:1")
    with stream:
        assert sim.current_stream(1) == stream
        assert sim.current_stream(0) == sim.default_stream(0)
    assert sim.current_stream(1) == sim.default_stream(1) != stream


def test_pinned_memory_is_host_memory_and_counted(sim: ModuleType) -> None:
    before = sim.pinned_bytes()
    pinned = torch.arange(256.0).pin_memory()
    assert pinned.is_pinned() and pinned.device.type == "cpu"
    assert sim.pinned_bytes() == before + 1024
    assert pinned[3:].is_pinned() and not torch.ones(1).is_pinned()
    del pinned
    assert sim.pinned_bytes() == before


# ------------------------------------------------------------------------------------------------ mixed devices
CPU_ONES, SIM_ONES, OTHER_ONES = (lambda: torch.ones(4, 4)), (lambda: _ones("sim:0")), (lambda: _ones("sim:1"))


def _ones(device: str) -> Tensor:
    return torch.ones(4, 4, device=device)


MIXED: dict[str, Callable[[], object]] = {
    "add, cpu": lambda: SIM_ONES() + CPU_ONES(),
    "add, other device": lambda: SIM_ONES() + OTHER_ONES(),
    "linear, cpu weight": lambda: F.linear(SIM_ONES(), CPU_ONES()),
    "cat": lambda: torch.cat([SIM_ONES(), OTHER_ONES()]),
    "embedding, cpu indices": lambda: F.embedding(torch.tensor([1]), SIM_ONES()),
    "embedding, cpu weight": lambda: F.embedding(torch.tensor([1], device="sim:0"), CPU_ONES()),
    "layer_norm, cpu weight": lambda: F.layer_norm(SIM_ONES(), (4,), torch.ones(4)),
    "layer_norm, other device's bias": lambda: F.layer_norm(SIM_ONES(), (4,), None, torch.ones(4, device="sim:1")),
    "write to a cpu number": lambda: torch.tensor(1.0).add_(torch.tensor(1.0, device="sim:0")),
}


@pytest.mark.parametrize("operation", MIXED.values(), ids=MIXED.keys())
def test_mixing_devices_raises(operation: Callable[[], object]) -> None:
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        operation()


def test_cpu_numbers_and_cpu_index_tensors_may_be_mixed_in() -> None:
    assert (SIM_ONES() + torch.tensor(2.0)).sum().item() == 48
    assert SIM_ONES()[torch.tensor([0, 2])].shape == (2, 4)


# ------------------------------------------------------------------------------------------------ copies
def test_copies_return_what_was_copied() -> None:
    source = torch.randn(6, 8)
    conjugated = torch.view_as_complex(source.view(-1, 2)).conj()
    for sent in (source, source.t(), source[::2, 1:], source.to(torch.bfloat16), conjugated):
        assert torch.equal(sent.to("sim:0").to("sim:1").cpu(), sent)
    assert torch.equal(source.to("sim:1", torch.float16).cpu(), source.half())


def test_copied_bytes_are_counted_by_direction_and_device(sim: ModuleType) -> None:
    sim.reset_copies()
    tensor = torch.ones(256).to("sim:0")
    other = tensor.to("sim:1")
    other.cpu()
    (tensor + tensor).copy_(tensor)
    assert sim.copied_bytes("sim:0") == (1024, 0, 0)
    assert sim.copied_bytes("sim:1") == (0, 1024, 1024)
    assert sim.copied_bytes() == (1024, 1024, 1024)
    sim.reset_copies()
    assert sim.copied_bytes() == (0, 0, 0)


def test_setting_data_across_devices_keeps_the_parameter() -> None:
    parameter = nn.Parameter(torch.arange(3.0))
    identity, values = id(parameter), parameter.detach().clone()
    parameter.data = values.to("sim:1")
    assert id(parameter) == identity and isinstance(parameter, nn.Parameter)
    assert parameter.device == torch.device("sim:1") and torch.equal(parameter.detach().cpu(), values)
    parameter.data = values
    assert parameter.device.type == "cpu"


def test_moving_a_module_keeps_its_parameters() -> None:
    module = nn.Linear(2, 2)
    weight = module.weight
    assert module.to("sim:1").weight is weight and weight.device == torch.device("sim:1")


# ------------------------------------------------------------------------------------------------ the CPU's bits
@pytest.fixture(scope="module")
def llama() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


TOKENS = torch.tensor([[3, 14, 15, 9, 26], [5, 35, 8, 9, 7]])


def test_a_transformer_computes_the_same_logits(llama: Any) -> None:
    with torch.no_grad():
        logits = copy.deepcopy(llama).to("sim:1")(TOKENS.to("sim:1")).logits
        assert logits.device == torch.device("sim:1")
        assert torch.equal(logits.cpu(), llama(TOKENS).logits)


@pytest.mark.parametrize("do_sample", [False, True])
def test_a_transformer_generates_the_same_tokens(llama: Any, do_sample: bool) -> None:
    def generate(model: Any) -> Tensor:
        torch.manual_seed(1)
        tokens = TOKENS.to(model.device)
        generated = model.generate(tokens, max_new_tokens=8, min_new_tokens=8, do_sample=do_sample)
        assert generated.device == tokens.device
        return generated.cpu()

    assert torch.equal(generate(copy.deepcopy(llama).to("sim")), generate(llama))


def test_training_computes_the_same_gradients_and_step(llama: Any) -> None:
    def train(model: Any) -> list[Tensor]:
        optimizer = torch.optim.AdamW(model.parameters())
        tokens = TOKENS.to(model.device)
        model(tokens, labels=tokens).loss.backward()
        gradients = [parameter.grad.cpu() for parameter in model.parameters()]
        optimizer.step()
        return gradients + [parameter.detach().cpu() for parameter in model.parameters()]

    ours, theirs = train(copy.deepcopy(llama).to("sim:1")), train(copy.deepcopy(llama))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


COMPUTE: dict[str, Callable[[Tensor], Tensor]] = {
    "layer_norm": lambda x: F.layer_norm(x, (8,)),
    "group_norm": lambda x: F.group_norm(x, 2),
    "batch_norm": lambda x: F.batch_norm(x, None, None, training=True),
    "conv2d": lambda x: F.conv2d(x, x[:2, :, :3, :3], padding=1),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
    "softmax": lambda x: x.softmax(-1),
    "interpolate": lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear"),
    "sort": lambda x: torch.sort(x, dim=-1).values,
    "fft": lambda x: torch.view_as_real(torch.fft.rfft(x).conj().resolve_conj()),
}


@pytest.mark.parametrize("compute", COMPUTE.values(), ids=COMPUTE.keys())
def test_kernels_and_their_backwards_round_as_on_cpu(compute: Callable[[Tensor], Tensor]) -> None:
    values = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    results = []
    for device in ("cpu", "sim:1"):
        x = values.to(device).detach().requires_grad_()
        y = compute(x)
        y.square().sum().backward()
        assert x.grad is not None
        results.append((y.detach().cpu(), x.grad.cpu()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_autocast_lowers_the_precision_of_matrix_products() -> None:
    with torch.autocast("sim", dtype=torch.bfloat16):
        assert (SIM_ONES() @ SIM_ONES()).dtype == torch.bfloat16
        assert SIM_ONES().softmax(-1).dtype == torch.float32


def test_a_seed_gives_the_cpu_s_numbers(sim: ModuleType) -> None:
    torch.manual_seed(7)
    expected = torch.randn(5)
    torch.manual_seed(7)
    assert torch.equal(torch.randn(5, device="sim:1").cpu(), expected)
    generator = torch.Generator("sim:1").manual_seed(7)
    assert torch.equal(torch.randn(5, device="sim:1", generator=generator).cpu(), expected)


def test_generator_state_is_kept_per_device_and_restored(sim: ModuleType) -> None:
    state = sim.get_rng_state(1)
    first = torch.randn(5, device="sim:1")
    torch.randn(5, device="sim:0")
    sim.set_rng_state(state, 1)
    assert torch.equal(torch.randn(5, device="sim:1").cpu(), first.cpu())


# ------------------------------------------------------------------------------------------------ asynchronous mode
class Prefetch:
    """A weight in pinned memory, a slot for it on the device, and a copy stream that is ordered after the slot."""

    def __init__(self, device: str = "sim:0", slots: int = 1) -> None:
        self.host = torch.arange(1.0, 9.0).pin_memory()
        self.ring = torch.zeros(slots, 8, device=device)
        self.slot = self.ring[0]
        self.stream = torch.Stream(device)
        self.compute = accelerator.current_stream(device)
        self.stream.wait_stream(self.compute)

    def start(self, slot: Tensor | None = None) -> torch.Event:
        with self.stream:
            (self.slot if slot is None else slot).copy_(self.host, non_blocking=True)
            return self.stream.record_event()

    @property
    def arrived(self) -> bool:
        return torch.equal(self.slot.cpu(), self.host)


@pytest.fixture
def async_sim(sim: ModuleType) -> ModuleType:
    sim.set_async(True)
    return sim


def test_copies_are_immediate_outside_asynchronous_mode(sim: ModuleType) -> None:
    prefetch = Prefetch()
    prefetch.start()
    assert prefetch.arrived and sim.violations() == 0


def test_a_missing_wait_reads_nan_and_counts(async_sim: ModuleType) -> None:
    prefetch = Prefetch()
    prefetch.start()
    assert (prefetch.slot * 2).isnan().all().item()
    assert async_sim.violations() == 1
    assert re.match(r"aten::mul.* \(read.* is not ordered after copy \(write", async_sim.violation_messages()[0])


WAITS: dict[str, Callable[[Prefetch, torch.Event], object]] = {
    "a stream waits for the event": lambda prefetch, event: prefetch.compute.wait_event(event),
    "a stream waits for the stream": lambda prefetch, event: prefetch.compute.wait_stream(prefetch.stream),
    "the host waits for the event": lambda prefetch, event: event.synchronize(),
    "the host waits for the stream": lambda prefetch, event: prefetch.stream.synchronize(),
    "the host waits for the device": lambda prefetch, event: accelerator.synchronize("sim:0"),
    "the host polls the event": lambda prefetch, event: [None for _ in iter(event.query, True)],
}


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS.keys())
def test_after_a_proper_wait_the_values_are_there(
    async_sim: ModuleType, wait: Callable[[Prefetch, torch.Event], object]
) -> None:
    prefetch = Prefetch()
    event = prefetch.start()
    assert not event.query()
    wait(prefetch, event)
    assert prefetch.arrived
    assert async_sim.violation_messages() == []


def test_an_event_covers_only_what_came_before_it(async_sim: ModuleType) -> None:
    prefetch = Prefetch(slots=2)
    event = prefetch.start(prefetch.ring[0])
    prefetch.start(prefetch.ring[1])
    event.synchronize()
    assert prefetch.arrived
    assert prefetch.ring[1].isnan().all().item()


def test_order_passes_through_a_third_stream(async_sim: ModuleType) -> None:
    prefetch, third = Prefetch(), torch.Stream("sim:1")
    third.wait_event(prefetch.start())
    prefetch.compute.wait_stream(third)
    assert prefetch.arrived
    assert async_sim.violation_messages() == []


def test_a_host_buffer_overwritten_before_its_copy_ran_shows(async_sim: ModuleType) -> None:
    prefetch = Prefetch()
    event = prefetch.start()
    prefetch.compute.wait_event(event)
    prefetch.host.fill_(-1)
    assert prefetch.slot.cpu().eq(-1).all()


def test_a_host_buffer_overwritten_before_the_host_knows_of_its_copy_counts(async_sim: ModuleType) -> None:
    """Also where the bits are right, because a kernel has made the copy run: on a device it may still be waiting."""
    prefetch = Prefetch()
    prefetch.compute.wait_event(prefetch.start())
    doubled = prefetch.slot * 2
    prefetch.host.fill_(-1)
    assert doubled.cpu()[0] == 2
    assert async_sim.violations() == 1
    assert re.match(r"the host overwrote pinned memory before a copy .* 32 bytes", async_sim.violation_messages()[0])


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS.keys())
def test_a_host_buffer_may_be_overwritten_once_the_host_has_waited(
    async_sim: ModuleType, wait: Callable[[Prefetch, torch.Event], object]
) -> None:
    prefetch = Prefetch()
    wait(prefetch, prefetch.start())
    assert prefetch.arrived  # which makes the host wait, too
    prefetch.host.fill_(-1)
    accelerator.synchronize("sim:0")
    assert async_sim.violation_messages() == []


def test_part_of_a_host_buffer_may_be_overwritten_while_another_is_copied(async_sim: ModuleType) -> None:
    host, slot, stream = torch.zeros(8).pin_memory(), torch.zeros(4, device="sim:0"), torch.Stream("sim:0")
    stream.wait_stream(accelerator.current_stream("sim:0"))
    with stream:
        slot.copy_(host[:4], non_blocking=True)
    host[4:].fill_(1)
    accelerator.synchronize("sim:0")
    assert async_sim.violation_messages() == []


def test_a_device_may_overwrite_the_host_buffer_that_it_has_copied(async_sim: ModuleType) -> None:
    host, slot = torch.zeros(8).pin_memory(), torch.ones(8, device="sim:0")
    torch.empty(8, device="sim:0").copy_(host, non_blocking=True)
    host.copy_(slot, non_blocking=True)
    accelerator.synchronize("sim:0")
    assert host.eq(1).all() and async_sim.violation_messages() == []


def test_a_pinned_buffer_outlives_the_copies_from_it(async_sim: ModuleType) -> None:
    prefetch = Prefetch()
    expected = prefetch.host.clone()
    event = prefetch.start()
    del prefetch.host
    event.synchronize()
    assert torch.equal(prefetch.slot.cpu(), expected)


def test_a_copy_to_the_host_is_poisoned_until_waited_for(async_sim: ModuleType) -> None:
    host = torch.zeros(8).pin_memory()
    source = torch.ones(8, device="sim:0")
    host.copy_(source, non_blocking=True)
    assert host.isnan().all()
    accelerator.synchronize()
    assert host.eq(1).all()


def test_a_slot_can_be_saved_and_refilled_on_one_stream(async_sim: ModuleType) -> None:
    prefetch = Prefetch()
    saved = torch.zeros(8).pin_memory()
    with prefetch.stream:
        saved.copy_(prefetch.slot, non_blocking=True)
    prefetch.start().synchronize()
    assert saved.eq(0).all() and prefetch.arrived
    assert async_sim.violation_messages() == []


def test_blocking_and_pageable_copies_are_immediate(async_sim: ModuleType) -> None:
    slot = torch.zeros(8, device="sim:0")
    assert slot.copy_(torch.ones(8).pin_memory()).sum().item() == 8
    assert slot.copy_(torch.full((8,), 2.0), non_blocking=True).sum().item() == 16


# ------------------------------------------------------------------------------------------------ races
def test_overwriting_a_slot_that_is_still_read_counts(async_sim: ModuleType) -> None:
    prefetch = Prefetch()
    prefetch.compute.wait_event(prefetch.start())
    prefetch.slot * 2
    prefetch.start()
    assert async_sim.violations() == 1
    assert async_sim.violation_messages()[0].startswith("copy (write")


def test_overwriting_a_slot_after_its_reader_s_event_is_in_order(async_sim: ModuleType) -> None:
    prefetch = Prefetch()
    for _ in range(3):
        prefetch.compute.wait_event(prefetch.start())
        prefetch.slot * 2
        prefetch.stream.wait_event(prefetch.compute.record_event())
    assert async_sim.violation_messages() == []


def test_an_event_recorded_before_the_reader_does_not_cover_it(async_sim: ModuleType) -> None:
    prefetch = Prefetch()
    prefetch.compute.wait_event(prefetch.start())
    too_early = prefetch.compute.record_event()
    prefetch.slot * 2
    prefetch.stream.wait_event(too_early)
    prefetch.start()
    assert async_sim.violations() == 1


def test_slots_of_one_ring_are_told_apart(async_sim: ModuleType) -> None:
    prefetch = Prefetch(slots=2)
    prefetch.compute.wait_event(prefetch.start())
    prefetch.slot * 2
    prefetch.compute.wait_event(prefetch.start(prefetch.ring[1]))
    assert torch.equal(prefetch.ring[1].cpu(), prefetch.host)
    assert async_sim.violation_messages() == []


class Arena:
    """One piece of device memory, and slots of it with storages of their own, as DLPack makes them."""

    def __init__(self) -> None:
        self.memory = torch.zeros(64, device="sim:0")
        self.copies, self.compute = torch.Stream("sim:0"), accelerator.current_stream("sim:0")
        self.copies.wait_stream(self.compute)
        self.host = torch.arange(1.0, 33.0).pin_memory()

    def slot(self, start: int, end: int) -> Tensor:
        return from_dlpack(to_dlpack(self.memory[start:end]))

    def fill(self, slot: Tensor) -> None:
        with self.copies:
            slot.copy_(self.host[: len(slot)], non_blocking=True)
            self.compute.wait_event(self.copies.record_event())


def test_a_dlpack_slot_overwritten_while_it_is_read_counts(async_sim: ModuleType) -> None:
    arena = Arena()
    arena.fill(slot := arena.slot(0, 32))
    slot * 2
    assert async_sim.violation_messages() == []
    arena.fill(slot)
    assert async_sim.violations() == 1
    assert "is not ordered after aten::mul (read" in async_sim.violation_messages()[0]


@pytest.mark.parametrize(("start", "end", "races"), [(0, 8, 1), (24, 48, 1), (31, 63, 1), (32, 64, 0)])
def test_a_second_dlpack_slot_over_the_same_bytes_counts(
    async_sim: ModuleType, start: int, end: int, races: int
) -> None:
    arena = Arena()
    arena.fill(slot := arena.slot(0, 32))
    slot * 2
    del slot
    arena.fill(arena.slot(start, end))
    assert async_sim.violations() == races


def test_a_dlpack_slot_overwritten_after_its_reader_s_event_is_in_order(async_sim: ModuleType) -> None:
    arena = Arena()
    for start in (0, 16, 8):
        arena.fill(slot := arena.slot(start, start + 32))
        assert torch.equal((slot * 2).view(-1), (slot + slot))
        arena.copies.wait_event(arena.compute.record_event())
    assert async_sim.violation_messages() == []


def test_an_arena_freed_while_a_dlpack_slot_of_it_is_read_counts(async_sim: ModuleType) -> None:
    arena = Arena()
    arena.fill(slot := arena.slot(0, 32))
    with (other := torch.Stream("sim:0")):
        other.wait_stream(arena.compute)
        slot * 2
    del slot
    assert async_sim.violation_messages() == []
    del arena.memory
    assert async_sim.violations() == 1
    assert async_sim.violation_messages()[0].startswith("free (write")


def test_taking_a_view_is_not_a_read(async_sim: ModuleType) -> None:
    prefetch = Prefetch()
    event = prefetch.start()
    weight = prefetch.slot.view(2, 4).t()
    prefetch.compute.wait_event(event)
    weight @ weight.t()
    assert async_sim.violation_messages() == []


def test_reading_a_result_on_the_host_orders_everything_before_it(async_sim: ModuleType) -> None:
    prefetch = Prefetch()
    prefetch.compute.wait_event(prefetch.start())
    prefetch.slot.sum().item()
    prefetch.start()
    assert async_sim.violation_messages() == []


def test_a_copy_between_devices_is_ordered_on_both(async_sim: ModuleType) -> None:
    prefetch = Prefetch("sim:0")
    prefetch.compute.wait_event(prefetch.start())
    moved = prefetch.slot.to("sim:1")
    assert torch.equal(moved.cpu(), prefetch.host)
    assert async_sim.violation_messages() == []


def test_memory_of_one_stream_filled_by_another_must_be_handed_over(async_sim: ModuleType) -> None:
    host, copies = torch.ones(8).pin_memory(), torch.Stream("sim:0")
    torch.ones(8, device="sim:0") + 1  # this stream has been at work, perhaps in the memory that it gets next
    slot = torch.empty(8, device="sim:0")
    with copies:
        slot.copy_(host, non_blocking=True)
    assert async_sim.violations() == 1
    assert "allocation (write, stream 0 of sim:0)" in async_sim.violation_messages()[0]


def _fetch_and_use(copies: torch.Stream) -> Tensor:
    """A tensor that belongs to the copy stream and was read on the current one."""
    with copies:
        weight = torch.ones(8).pin_memory().to("sim:0", non_blocking=True)
    accelerator.current_stream().wait_stream(copies)
    weight * 2
    return weight


def test_freeing_memory_that_another_stream_still_reads_counts(async_sim: ModuleType) -> None:
    weight = _fetch_and_use(torch.Stream("sim:0"))
    del weight
    assert async_sim.violations() == 1
    assert async_sim.violation_messages()[0].startswith("free (write")


def test_record_stream_keeps_memory_for_its_reader(async_sim: ModuleType) -> None:
    weight = _fetch_and_use(torch.Stream("sim:0"))
    weight.record_stream(accelerator.current_stream())
    del weight
    assert async_sim.violation_messages() == []


def test_memory_may_be_freed_once_its_stream_has_waited(async_sim: ModuleType) -> None:
    copies = torch.Stream("sim:0")
    weight = _fetch_and_use(copies)
    copies.wait_stream(accelerator.current_stream())
    del weight
    assert async_sim.violation_messages() == []


def test_training_and_generation_on_one_stream_are_in_order(llama: Any) -> None:
    with simdev.asynchronous():
        model = copy.deepcopy(llama).to("sim:1")
        model(TOKENS.to("sim:1"), labels=TOKENS.to("sim:1")).loss.backward()
        model.generate(TOKENS.to("sim:1"), max_new_tokens=4, do_sample=False)


def test_asynchronous_raises_for_a_race_inside_and_waits_at_its_end(sim: ModuleType) -> None:
    with simdev.asynchronous():
        prefetch = Prefetch()
        prefetch.start()
    assert prefetch.arrived
    with pytest.raises(AssertionError, match="out of order:\naten::mul"), simdev.asynchronous():
        prefetch.start()
        prefetch.slot * 2


# ------------------------------------------------------------------------------------------------ the build
@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with nothing in it, and sources that compile at once; returns the source file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = tmp_path / "sources" / "one.cpp"
    source.parent.mkdir()
    source.write_text("int one() { return 1; }\n")
    monkeypatch.setattr(build, "SOURCE_FOLDER", source.parent)
    return source


def test_a_library_is_compiled_once_however_many_ask(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    run = build._run

    def counted_run(command: list[str]) -> None:
        commands.append(command)
        run(command)

    monkeypatch.setattr(build, "_run", counted_run)
    with ThreadPoolExecutor(4) as pool:
        libraries = {future.result() for future in [pool.submit(build.library) for _ in range(4)]}
    assert len(libraries) == 1 and libraries.pop().is_file()
    assert len(commands) == 2, "one to compile, one to link"


def test_a_changed_source_is_another_library(empty_cache: Path) -> None:
    before = build.library()
    empty_cache.write_text("int one() { return 2; }\n")
    assert build.library() != before and before.exists()


def test_sources_that_do_not_compile_say_why_and_leave_nothing(empty_cache: Path) -> None:
    empty_cache.write_text("int one() { return missing_name; }\n")
    with pytest.raises(RuntimeError, match="missing_name"):
        build.library()
    assert not list(build.cache_folder().rglob("*.so"))


def test_without_a_compiler_the_error_names_what_to_install(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match=r"install g\+\+"):
        build.library()
