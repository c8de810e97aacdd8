"""What was measured of a run: when weights were read and copied, when blocks computed, when they waited."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from .specs import Pictured

READ, COPY, COMPUTE, STALL = LANES = ("read", "copy", "compute", "stall")
"""From disk to memory; between host and devices; a block's forward; a thread, or a device, that waits for weights."""


@dataclass(frozen=True)
class Span:
    """Something that took from `begin` to `end`, in seconds since the recording began."""

    block: str
    lane: str
    """One of `LANES`."""
    begin: float
    end: float
    nbytes: int = 0
    """That travelled; 0 where nothing did."""
    device: str = "cpu"
    """Where weights arrive, or where a block computes or waits."""
    thread: int = 0
    """Which of the threads that were seen inside blocks; 0 for what the machine's own threads do."""

    @property
    def seconds(self) -> float:
        return self.end - self.begin


@dataclass(frozen=True)
class LaneUse:
    """How one lane of one device was used."""

    lane: str
    device: str
    busy: float
    """Seconds in which anything went on."""
    spans: int
    nbytes: int

    @property
    def rate(self) -> float:
        """Bytes per second while it was busy."""
        return self.nbytes / self.busy if self.busy else 0.0


@dataclass(eq=False)
class Timeline(Pictured):
    """A recording, of a forward or of several. It is empty while the recording lasts, and does not change afterwards.

    `spans` are in order of their beginning. `ahead` is what came for blocks that did not run any more, for the next
    forward perhaps: those bytes are no block's in `Stats` either.
    """

    model: str
    spans: tuple[Span, ...] = ()
    ahead: tuple[Span, ...] = ()
    seconds: float = 0.0

    def of(self, *lanes: str) -> list[Span]:
        """The spans of these lanes, in order of their beginning."""
        return [span for span in self.spans if span.lane in lanes]

    def uses(self) -> list[LaneUse]:
        """Each lane of each device that anything went on in, in the order of `LANES`."""
        ordered = sorted((*self.spans, *self.ahead), key=_lane_and_device)
        return [_use(list(spans)) for _, spans in groupby(ordered, key=_lane_and_device)]

    def stalls(self) -> list[tuple[str, float]]:
        """Blocks and the seconds that they were waited for, the longest first."""
        seconds: dict[str, float] = {}
        for span in self.of(STALL):
            seconds[span.block] = seconds.get(span.block, 0.0) + span.seconds
        return sorted(seconds.items(), key=lambda item: -item[1])


def busy_seconds(spans: Iterable[Span]) -> float:
    """Seconds in which any of `spans` goes on."""
    busy = reached = 0.0
    for span in sorted(spans, key=lambda span: span.begin):
        busy += max(0.0, span.end - max(reached, span.begin))
        reached = max(reached, span.end)
    return busy


def _lane_and_device(span: Span) -> tuple[int, str]:
    return LANES.index(span.lane), span.device


def _use(spans: Sequence[Span]) -> LaneUse:
    first = spans[0]
    return LaneUse(first.lane, first.device, busy_seconds(spans), len(spans), sum(span.nbytes for span in spans))
