"""What a recording notes while a model runs, and by which clocks.

A device does its work later than it is asked to, so what goes on there is marked by timed events on its streams, and
read when the recording ends. What threads do is timed by the host's clock. Where no recording is under way, nothing of
this exists: a machine without a recorder costs one look at an attribute.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from functools import wraps
from itertools import count
from typing import Any

import torch

from ..checkpoint.reader import Extent, Reader
from ..timeline import COMPUTE, COPY, READ, STALL, Span, Timeline
from .transfer import then

NOTICED = 5e-5
"""Seconds: a device that waits for less waited for the commands, not for weights."""

Moment = float | torch.Event
"""On the host's clock, or on a device's."""


@dataclass(eq=False)
class Journey:
    """What is noted of one transfer."""

    recorder: Recorder
    reader: Reader
    copied: int
    """Bytes that are copied between host and device."""
    block: str = ""
    used: bool = False
    """Whether a block was entered that used what came."""
    coming: Future[int] | None = None
    """Done when all is noted, where other threads do it."""

    def read(self, extents: Sequence[Extent], buffer: memoryview, before: Callable[[], object] | None) -> Future[int]:
        """As `Reader.read`, noted from the moment at which a thread asks for the first byte."""
        asked: list[float] = []

        def ask() -> None:
            if before is not None:
                before()
            asked.append(time.perf_counter())

        def arrived() -> None:  # before anybody who waits for the bytes goes on
            if asked:
                nbytes = sum(extent.nbytes for extent in extents)
                self.recorder.add(_Mark(self, READ, "cpu", min(asked), time.perf_counter(), nbytes))

        return then(self.reader.read(extents, buffer, ask), arrived, lambda: None)

    def now(self, device: torch.device, stream: torch.Stream | None = None) -> Moment:
        return self.recorder.now(device, stream)

    def was_copied(self, device: torch.device, begin: Moment, stream: torch.Stream | None = None) -> None:
        """What was issued since `begin` brings the weights to `device`."""
        end = self.recorder.now(device, stream)
        self.recorder.add(_Mark(self, COPY, str(device), begin, end, self.copied))


@dataclass(frozen=True, eq=False)
class _Mark:
    """A span that is not measured yet."""

    of: Journey | str
    """A transfer, or a block."""
    lane: str
    device: str
    begin: Moment
    end: Moment
    nbytes: int = 0
    thread: int = 0


class _Thread(threading.local):
    """What one thread is inside of."""

    depth = 0
    begin: Moment = 0.0


@dataclass(eq=False)
class Recorder:
    """Notes what happens between its making and `finish`. `outer` are the blocks that have others inside them."""

    devices: Iterable[torch.device]
    outer: Collection[str] = ()
    _marks: list[_Mark] = field(default_factory=list)
    _journeys: list[Journey] = field(default_factory=list)
    _threads: dict[int, int] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=count)
    _here: _Thread = field(default_factory=_Thread)

    def __post_init__(self) -> None:
        self._clocks = {device: clock for device in self.devices if (clock := _Clock.of(device)) is not None}
        self._begun = time.perf_counter()

    # ------------------------------------------------------------ what happens

    def journey(self, reader: Reader, copied: int) -> Journey:
        begun = Journey(self, reader, copied)
        self._journeys.append(begun)
        return begun

    def now(self, device: torch.device, stream: torch.Stream | None = None) -> Moment:
        """When `stream` (by default the current one) of `device` gets here."""
        if device not in self._clocks:
            return time.perf_counter()
        return _timed_event(device, stream)

    def add(self, mark: _Mark) -> None:
        self._marks.append(mark)  # at once: several threads do

    def waited(self, block: str, device: torch.device, begin: Moment, stalled: bool) -> None:
        """The calling thread has waited for weights since `begin`; `stalled` if it did not find them there."""
        if stalled or device in self._clocks:  # a device may wait for copies that no thread waits for
            self.add(_Mark(block, STALL, str(device), begin, self.now(device), thread=self._thread()))

    def computing(self, forward: Callable[..., Any], block: str, device: torch.device) -> Callable[..., Any]:
        """`forward`, noted."""

        @wraps(forward)
        def noted(*args: Any, **kwargs: Any) -> Any:
            self.enter(block, device)
            try:
                return forward(*args, **kwargs)
            finally:
                self.leave(block, device)

        return noted

    def enter(self, block: str, device: torch.device) -> None:
        """The calling thread begins to compute a block. What it computes inside another one is that one's."""
        if block in self.outer:
            return
        self._here.depth += 1
        if self._here.depth == 1:
            self._here.begin = self.now(device)

    def leave(self, block: str, device: torch.device) -> None:
        if block in self.outer or not self._here.depth:
            return
        self._here.depth -= 1
        if not self._here.depth:
            self.add(_Mark(block, COMPUTE, str(device), self._here.begin, self.now(device), thread=self._thread()))

    def _thread(self) -> int:
        ident = threading.get_ident()
        number = self._threads.get(ident)
        return self._threads.setdefault(ident, next(self._numbers)) if number is None else number

    # ------------------------------------------------------------ what it was

    def finish(self, timeline: Timeline) -> None:
        """Wait for what devices, and threads that read, still do, and fill `timeline`."""
        ended = time.perf_counter() - self._begun
        wait([journey.coming for journey in self._journeys if journey.coming is not None])
        used, ahead = [], []
        for mark in tuple(self._marks):
            span = self._measured(mark)
            if isinstance(mark.of, Journey) and not mark.of.used:
                ahead.append(span)
            elif mark.lane != STALL or span.device == "cpu" or span.seconds > NOTICED:
                used.append(span)
        timeline.spans = tuple(sorted(used, key=_by_beginning))
        timeline.ahead = tuple(sorted(ahead, key=_by_beginning))
        timeline.seconds = max([ended, *(span.end for span in used)])

    def _measured(self, mark: _Mark) -> Span:
        device = torch.device(mark.device)
        begin, end = self._seconds(mark.begin, device), self._seconds(mark.end, device)
        block = mark.of.block if isinstance(mark.of, Journey) else mark.of
        return Span(block, mark.lane, begin, max(begin, end), mark.nbytes, mark.device, mark.thread)

    def _seconds(self, moment: Moment, device: torch.device) -> float:
        at = moment if isinstance(moment, float) else self._clocks[device].time_of(moment)
        return max(0.0, at - self._begun)


def _by_beginning(span: Span) -> tuple[float, float]:
    return span.begin, span.end


@dataclass(frozen=True, eq=False)
class _Clock:
    """Translates a device's events: `event` happened when the host's clock showed `at`."""

    event: torch.Event
    at: float

    @classmethod
    def of(cls, device: torch.device) -> _Clock | None:
        """None for the host, and for a device whose events carry no time: there the moment counts at which work is
        handed over."""
        if device.type == "cpu":
            return None
        torch.accelerator.current_stream(device).synchronize()
        try:
            event = _timed_event(device)
            event.synchronize()
            clock = cls(event, time.perf_counter())
            clock.time_of(_timed_event(device))
        except (RuntimeError, NotImplementedError):
            return None
        return clock

    def time_of(self, event: torch.Event) -> float:
        event.synchronize()
        return self.at + self.event.elapsed_time(event) / 1e3


def _timed_event(device: torch.device, stream: torch.Stream | None = None) -> torch.Event:
    event = torch.Event(device=device, enable_timing=True)
    event.record(stream or torch.accelerator.current_stream(device))
    return event
