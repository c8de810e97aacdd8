"""The picture of a run: what the disk, each bus and each device did when, and where one waited for weights."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from ..errors import human_bytes
from ..report import human_seconds, lane_name
from ..timeline import COMPUTE, COPY, LANES, READ, STALL, LaneUse, Span, Timeline, busy_seconds
from .scene import (
    BLUE,
    MARGIN,
    ORANGE,
    PALE,
    PURPLE,
    RED,
    RULE,
    TRACK,
    WIDTH,
    Box,
    Scene,
    Word,
    clipped,
    family,
    lighter,
    on_colour,
    text_width,
    ticks,
)

COLOURS = {READ: ORANGE, COPY: PURPLE, COMPUTE: BLUE, STALL: RED}
_X, _END = MARGIN + 118, WIDTH - MARGIN - 104
_ROW, _GAP = 40, 12
_MOST_TRACKS = 4
_SMALLEST = 0.6
"""Pixels: what is there is seen."""
_NAMED_STALLS = 3
_NARROWEST_FAMILY = 40
"""Pixels: of the many blocks of a long run, a line over each would only be noise."""
_FOR_LATER = 0.7
"""How pale that is which came for later."""


def draw(timeline: Timeline) -> Scene:
    """Lanes from the top: disk, buses, devices. What a device waited for is in its own lane, between its blocks."""
    scene = Scene(f"Timeline of {timeline.model}")
    scene.heading(timeline.model, _summary(timeline))
    uses = timeline.uses()
    rows = [use for use in uses if use.lane != STALL]
    stalled = {use.device for use in uses if use.lane == STALL}
    rows += [LaneUse(COMPUTE, device, 0.0, 0, 0) for device in sorted(stalled - _computing(uses))]
    _draw_families(scene, timeline)
    top = scene.y
    for use in sorted(rows, key=lambda use: (LANES.index(use.lane), use.device)):
        _draw_lane(scene, timeline, use)
    if rows:
        _draw_scale(scene, timeline.seconds, top)
    scene.legend(_legend(timeline))
    return scene


def _summary(timeline: Timeline) -> str:
    waited = busy_seconds(timeline.of(STALL))
    share = f"{waited / timeline.seconds:.0%} of it " if timeline.seconds else ""
    stalls = f"{share}waiting for weights ({human_seconds(waited)})" if waited else "nothing waited for weights"
    read = sum(span.nbytes for span in timeline.of(READ))
    moved = f"; {human_bytes(read)} read from disk" if read else ""
    return f"{human_seconds(timeline.seconds)}, {stalls}{moved}"


def _computing(uses: Sequence[LaneUse]) -> set[str]:
    return {use.device for use in uses if use.lane == COMPUTE}


# ---------------------------------------------------------------- lanes


def _draw_families(scene: Scene, timeline: Timeline) -> None:
    """Over the lanes, which of the repeated blocks are on: an encoder's or a decoder's, say."""
    scale = (_END - _X) / max(timeline.seconds, 1e-12)
    for name, group in groupby(timeline.of(COMPUTE), key=lambda span: family(span.block)):
        spans = list(group)
        begin, width = spans[0].begin * scale, (max(span.end for span in spans) - spans[0].begin) * scale
        if width >= _NARROWEST_FAMILY:
            scene.bracket(_X + begin, width, name)
    scene.y += 26


def _draw_lane(scene: Scene, timeline: Timeline, use: LaneUse) -> None:
    scale = (_END - _X) / max(timeline.seconds, 1e-12)
    scene.boxes.append(Box(_X, scene.y, _END - _X, _ROW, TRACK))
    scene.words.append(Word(_X - 10, scene.y + 24, clipped(lane_name(use.lane, use.device), 118, 12), 12, anchor="end"))
    here = [s for s in (*timeline.spans, *timeline.ahead) if (s.lane, s.device) == (use.lane, use.device)]
    here.sort(key=lambda span: span.begin)
    late = set(map(id, timeline.ahead))
    blocks = {block: number for number, block in enumerate(dict.fromkeys(span.block for span in here))}
    tracks = _tracks(here)
    height = _ROW / max(1, max(tracks, default=0) + 1)
    drawn_to = [0.0] * (max(tracks, default=0) + 1)
    for span, track in zip(here, tracks, strict=True):
        if span.end * scale < drawn_to[track]:
            continue  # nobody would see it
        shade = _FOR_LATER if id(span) in late else 0.28 * (blocks[span.block] % 2)
        colour = lighter(COLOURS[span.lane], shade)
        _draw_span(scene, span, scale, scene.y + track * height, height, colour, id(span) in late)
        drawn_to[track] = max(span.end * scale, span.begin * scale + _SMALLEST)
    _say_use(scene, use, timeline.seconds)
    if use.lane == COMPUTE:
        _draw_stalls(scene, timeline, use.device, scale)
    scene.y += _ROW + _GAP


def _draw_span(
    scene: Scene, span: Span, scale: float, y: float, height: float, colour: str, late: bool = False
) -> None:
    x, width = _X + span.begin * scale, max(_SMALLEST, span.seconds * scale)
    width = min(width, _END - x)
    if width <= 0:
        return
    said = f"{span.block or '(root)'}: {span.lane} {human_seconds(span.seconds)} from {human_seconds(span.begin)}"
    said += f", {human_bytes(span.nbytes)}" if span.nbytes else ""
    said += ", for later" if late else ""
    scene.boxes.append(Box(x, y, width, height, colour, said, hatched=span.lane == STALL, edge=width > 4))
    name = _ending(span.block, 1)
    if text_width(name, 10) <= width - 4 and height >= 12 and span.lane != STALL:
        scene.words.append(Word(x + width / 2, y + height / 2 + 3.5, name, 10, on_colour(colour), "middle"))


def _draw_stalls(scene: Scene, timeline: Timeline, device: str, scale: float) -> None:
    stalls = [span for span in timeline.of(STALL) if span.device == device]
    for span in stalls:
        _draw_span(scene, span, scale, scene.y, _ROW, COLOURS[STALL])
    taken: list[tuple[float, float]] = []
    for span in sorted(stalls, key=lambda span: -span.seconds)[:_NAMED_STALLS]:
        text = f"waits {human_seconds(span.seconds)} for {_ending(span.block, 2)}"
        width = text_width(text, 10)
        x = min(_X + span.begin * scale, WIDTH - MARGIN - width)
        if span.seconds * scale > 2 and all(x > end + 8 or x + width + 8 < begin for begin, end in taken):
            scene.words.append(Word(x, scene.y + _ROW + 12, text, 10, COLOURS[STALL]))
            taken.append((x, x + width))
    if taken:
        scene.y += 10


def _tracks(spans: Sequence[Span]) -> list[int]:
    """A track for each span, so that those at the same time lie below each other, as far as there are tracks."""
    ends: list[float] = []
    tracks = []
    for span in spans:
        free = [track for track, end in enumerate(ends) if end <= span.begin + 1e-9]
        track = free[0] if free else min(len(ends), _MOST_TRACKS - 1)
        ends[track : track + 1] = [span.end]
        tracks.append(track)
    return tracks


def _say_use(scene: Scene, use: LaneUse, seconds: float) -> None:
    busy = f"{use.busy / seconds:.0%} busy" if seconds else ""
    scene.words.append(Word(_END + 10, scene.y + 18, busy, 11.5))
    if use.nbytes:
        scene.words.append(Word(_END + 10, scene.y + 33, f"{use.rate / 1e9:.2f} GB/s", 11, PALE))


def _ending(block: str, parts: int) -> str:
    """The last parts of a block's name."""
    return ".".join(block.split(".")[-parts:]) or "(root)"


# ---------------------------------------------------------------- around them


def _draw_scale(scene: Scene, seconds: float, top: float) -> None:
    scale = (_END - _X) / max(seconds, 1e-12)
    bottom = scene.y - _GAP + 4
    for moment in ticks(seconds):
        x = _X + moment * scale
        scene.boxes.insert(0, Box(x, top - 4, 0.8, bottom - top + 8, RULE))
        number, _, unit = human_seconds(moment).partition(" ")
        label = f"{float(number):g} {unit}" if moment else "0"
        scene.words.append(Word(x, bottom + 17, label, 10.5, PALE, "middle"))
    scene.y = bottom + 32


def _legend(timeline: Timeline) -> list[tuple[str, str, bool]]:
    says = {
        READ: "read from disk",
        COPY: "copied between RAM and device",
        COMPUTE: "a block's forward",
        STALL: "waiting for weights",
    }
    there = {span.lane for span in (*timeline.spans, *timeline.ahead)}
    legend = [(says[lane], COLOURS[lane], lane == STALL) for lane in LANES if lane in there]
    if timeline.ahead:
        legend.append(("pale: for later", lighter(COLOURS[timeline.ahead[0].lane], _FOR_LATER), False))
    return legend
