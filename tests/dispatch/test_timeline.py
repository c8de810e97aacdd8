"""A recording shows what a forward did, in an order that could have been, and costs nothing when there is none."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from itertools import pairwise
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
import torch
from torch import nn

import hf_bigload
from hf_bigload.timeline import COMPUTE, COPY, READ, STALL, Span, Timeline, busy_seconds
from tests import simdev

from . import Net, assert_model_at_rest, executor_of, from_disk, placed, same_bits, seeded

BLOCKS = ["first", "layers.0", "layers.1", "layers.2", "norm", "last"]


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def recorded(model: nn.Module, x: torch.Tensor, forwards: int = 1) -> Timeline:
    """A warm model's timeline; its counters say the same as the timeline afterwards."""
    model(x)
    inspection = hf_bigload.inspect(model)
    inspection.stats.reset()
    with inspection.record() as timeline:
        for _ in range(forwards):
            model(x)
    return timeline


def nbytes(spans: list[Span]) -> int:
    return sum(span.nbytes for span in spans)


def assert_possible(timeline: Timeline) -> None:
    """Spans lie within the recording; what a thread computes never overlaps, and weights come first."""
    for span in timeline.spans:
        assert 0 <= span.begin <= span.end <= timeline.seconds
    for one, other in pairwise(timeline.of(COMPUTE)):
        assert one.thread != other.thread or one.end <= other.begin
    for span in timeline.of(COMPUTE):
        came = [each for each in timeline.of(READ, COPY) if each.block == span.block and each.begin < span.begin]
        assert all(each.end <= span.begin for each in came), span


class TestFromDiskToRam:
    @pytest.fixture
    def model(self, tmp_path: Path) -> Any:
        return from_disk(seeded(Net, width=64), tmp_path)

    def test_each_block_is_read_and_then_computed(self, model: Any) -> None:
        timeline = recorded(model, torch.randn(2, 64))
        assert [span.block for span in timeline.of(COMPUTE)] == BLOCKS
        assert sorted(span.block for span in timeline.of(READ)) == sorted(BLOCKS)
        assert_possible(timeline)
        for span in timeline.of(COMPUTE):
            assert [each.block for each in timeline.of(READ) if each.end <= span.begin].count(span.block) == 1

    @pytest.mark.parametrize("forwards", [1, 3])
    def test_the_bytes_of_its_reads_are_the_counters(self, model: Any, forwards: int) -> None:
        timeline = recorded(model, torch.randn(2, 64), forwards)
        stats = hf_bigload.inspect(model).stats
        assert nbytes(timeline.of(READ)) == stats.bytes_read > 0
        assert {block: t.bytes_read for block, t in stats.blocks.items()} == {
            block: nbytes([s for s in timeline.of(READ) if s.block == block]) for block in BLOCKS
        }

    def test_what_came_for_the_next_forward_is_told_apart(self, model: Any) -> None:
        timeline = recorded(model, torch.randn(2, 64))
        assert {span.lane for span in timeline.ahead} <= {READ}
        assert {span.block for span in timeline.ahead} <= set(BLOCKS)
        assert executor_of(model).machine.reader.bytes_read >= nbytes([*timeline.of(READ), *timeline.ahead])

    def test_what_is_still_being_read_at_the_end_is_in_it(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        model(torch.randn(2, 64))
        reader = executor_of(model).machine.reader
        read, asked = reader.read, []
        with hf_bigload.inspect(model).record() as timeline:

            def late(*args: Any) -> Future[int]:
                asked.append(sum(extent.nbytes for extent in args[0]))
                future: Future[int] = Future()
                Timer(0.05, lambda: future.set_result(read(*args).result())).start()
                return future

            monkeypatch.setattr(reader, "read", late)
            model(torch.randn(2, 64))
        assert nbytes([*timeline.of(READ), *timeline.ahead]) == sum(asked)
        assert timeline.ahead and {span.lane for span in timeline.ahead} == {READ}

    def test_a_stall_holds_what_the_counters_say(self, model: Any) -> None:
        timeline = recorded(model, torch.randn(2, 64))
        stalls = timeline.of(STALL)
        assert stalls[0].block == "first"  # nothing was under way when the recording began
        assert sum(span.seconds for span in stalls) >= hf_bigload.inspect(model).stats.seconds_stalled > 0
        assert timeline.stalls()[0][1] == max(seconds for _, seconds in timeline.stalls())

    def test_the_result_is_the_plain_models(self, model: Any, tmp_path: Path) -> None:
        x = torch.randn(2, 64)
        with hf_bigload.inspect(model).record():
            assert same_bits(model(x), seeded(Net, width=64)(x))
        assert_model_at_rest(model)

    def test_nothing_is_noted_outside(self, model: Any) -> None:
        x = torch.randn(2, 64)
        timeline = recorded(model, x)
        spans, machine = timeline.spans, executor_of(model).machine
        assert machine.recorder is None and machine.aside.recorder is None
        model(x)
        assert timeline.spans == spans
        assert all(
            transfer.journey is None for a in executor_of(model).prefetcher._ahead.values() for transfer in a.transfers
        )

    def test_is_closed_by_an_exception(self, model: Any) -> None:
        model(torch.randn(2, 64))
        inspection = hf_bigload.inspect(model)
        with pytest.raises(RuntimeError, match="on purpose"), inspection.record() as timeline:
            model.layers[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("on purpose")))
            model(torch.randn(2, 64))
        assert executor_of(model).machine.recorder is None
        assert [span.block for span in timeline.of(COMPUTE)] == BLOCKS[:2] and timeline.seconds > 0

    def test_a_block_that_raises_has_computed_until_then(self, model: Any) -> None:
        with pytest.raises(RuntimeError), hf_bigload.inspect(model).record() as timeline:
            model(torch.randn(2, 63))  # the first matrix does not fit
        assert [span.block for span in timeline.of(COMPUTE)] == ["first"]

    def test_two_recordings_at_once_are_refused(self, model: Any) -> None:
        inspection = hf_bigload.inspect(model)
        with inspection.record():
            with pytest.raises(RuntimeError, match="recorded already"), inspection.record():
                pass
            assert executor_of(model).machine.recorder is not None
        with inspection.record():
            pass

    def test_threads_are_told_apart(self, model: Any) -> None:
        x = torch.randn(2, 64)
        barrier = threading.Barrier(2)

        def work() -> None:
            with torch.no_grad():
                barrier.wait()
                model(x)

        with hf_bigload.inspect(model).record() as timeline:
            threads = [threading.Thread(target=work) for _ in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        for number in (0, 1):
            mine = [span for span in timeline.of(COMPUTE) if span.thread == number]
            assert [span.block for span in mine] == BLOCKS
            assert all(one.end <= other.begin for one, other in pairwise(mine))

    def test_weights_read_again_for_gradients_are_in_it(self, model: Any) -> None:
        x = torch.randn(2, 64)
        with torch.enable_grad(), hf_bigload.inspect(model).record() as timeline:
            hf_bigload.inspect(model).stats.reset()
            model(x.requires_grad_()).sum().backward()
        assert nbytes(timeline.of(READ)) == hf_bigload.inspect(model).stats.bytes_read


class TestBlocksThatStay:
    def test_compute_too_and_their_hooks_go(self, tmp_path: Path) -> None:
        model = from_disk(seeded(Net, width=16), tmp_path, device_map={"": "cpu", "layers.1": "disk"})
        timeline = recorded(model, torch.randn(2, 16))
        assert [span.block for span in timeline.of(COMPUTE)] == BLOCKS
        assert {span.block for span in timeline.of(READ)} == {"layers.1"}
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

    def test_of_a_compiled_model_those_that_stream_are_seen(self, tmp_path: Path) -> None:
        model = from_disk(seeded(Net, width=16), tmp_path, device_map={"": "cpu", "layers.1": "disk"})
        compiled: Any = torch.compile(model, backend="eager")
        x = torch.randn(2, 16)
        expected = compiled(x)
        with hf_bigload.inspect(model).record() as timeline:
            assert same_bits(compiled(x), expected)
        assert "layers.1" in [span.block for span in timeline.of(COMPUTE)]
        assert same_bits(compiled(x), expected)

    def test_a_resident_model_only_computes(self) -> None:
        model = placed(seeded(Net, width=16), "cpu")
        timeline = recorded(model, torch.randn(2, 16))
        assert [span.block for span in timeline.spans] == BLOCKS
        assert {span.lane for span in timeline.spans} == {COMPUTE}
        assert [name for name, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks] == []

    def test_a_block_with_blocks_inside_leaves_their_time_to_them(self, tmp_path: Path) -> None:
        class Root(Net):
            def __init__(self) -> None:
                super().__init__(width=16)
                self.shift = nn.Parameter(torch.ones(16))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return super().forward(x + self.shift)

        timeline = recorded(from_disk(seeded(Root), tmp_path), torch.randn(2, 16))
        assert [span.block for span in timeline.of(COMPUTE)] == BLOCKS
        assert {span.block for span in timeline.of(READ)} == {"", *BLOCKS}
        assert_possible(timeline)


class TestToAnAccelerator:
    @pytest.mark.parametrize("asynchronous", [False, True])
    def test_weights_are_read_copied_and_computed_with(self, asynchronous: bool, tmp_path: Path) -> None:
        plain = seeded(Net, width=64)
        with simdev.devices([None]):
            model = from_disk(plain, tmp_path, device_map={"": "disk", "norm": 0})
            x = torch.randn(2, 64, device="sim:0")
            if asynchronous:
                with simdev.asynchronous():
                    timeline = recorded(model, x)
            else:
                timeline = recorded(model, x)
            streamed = [block for block in BLOCKS if block != "norm"]
            assert [span.block for span in timeline.of(COMPUTE)] == BLOCKS
            assert {span.device for span in timeline.of(COMPUTE, COPY, STALL)} == {"sim:0"}
            assert sorted(span.block for span in timeline.of(READ)) == sorted(streamed)
            assert sorted(span.block for span in timeline.of(COPY)) == sorted(streamed)
            stats = hf_bigload.inspect(model).stats
            assert (nbytes(timeline.of(READ)), nbytes(timeline.of(COPY))) == (stats.bytes_read, stats.bytes_copied)
            assert_possible(timeline)

    def test_each_copy_begins_after_its_read(self, tmp_path: Path) -> None:
        with simdev.devices([None]):
            model = from_disk(seeded(Net, width=64), tmp_path, device_map={"": "disk", "norm": 0})
            timeline = recorded(model, torch.randn(2, 64, device="sim:0"))
            read = {span.block: span for span in timeline.of(READ)}
            for copy in timeline.of(COPY):
                assert read[copy.block].end <= copy.begin

    def test_weights_in_ram_are_copied_only(self) -> None:
        with simdev.devices([None]):
            model = placed(seeded(Net, width=64), {"": "cpu", "norm": 0})
            timeline = recorded(model, torch.randn(2, 64, device="sim:0"))
            assert timeline.of(READ) == []
            assert nbytes(timeline.of(COPY)) == hf_bigload.inspect(model).stats.bytes_copied > 0
            assert_possible(timeline)

    def test_a_device_without_timed_events_is_timed_as_it_is_commanded(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: Any) -> float:
            raise RuntimeError("no timing")

        with simdev.devices([None]):
            model = from_disk(seeded(Net, width=64), tmp_path, device_map={"": "disk", "norm": 0})
            monkeypatch.setattr("hf_bigload.dispatch.recorder._Clock.time_of", refuse)
            timeline = recorded(model, torch.randn(2, 64, device="sim:0"))
            assert [span.block for span in timeline.of(COMPUTE)] == BLOCKS
            assert_possible(timeline)


def test_time_in_which_several_are_busy_counts_once() -> None:
    spans = [
        Span("a", READ, 0.0, 2.0),
        Span("b", READ, 1.0, 3.0),
        Span("c", READ, 1.5, 1.75),
        Span("d", READ, 5.0, 6.0),
    ]
    assert busy_seconds(spans) == 4.0


def test_lanes_are_summed_by_device_in_the_order_of_the_journey() -> None:
    spans = (
        Span("a", COMPUTE, 2.0, 3.0, device="x:1"),
        Span("a", COPY, 1.0, 2.0, 40, "x:1"),
        Span("a", READ, 0.0, 1.0, 40),
    )
    uses = Timeline("Net", spans, ahead=(Span("b", READ, 0.5, 2.0, 20),), seconds=3.0).uses()
    assert [(use.lane, use.device, use.busy, use.nbytes, use.rate) for use in uses] == [
        (READ, "cpu", 2.0, 60, 30.0),
        (COPY, "x:1", 1.0, 40, 40.0),
        (COMPUTE, "x:1", 1.0, 0, 0.0),
    ]
