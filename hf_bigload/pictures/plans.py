"""The picture of a plan: each device's memory, the blocks in order with where each sleeps, the predicted seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from ..errors import human_bytes
from ..report import DeviceMemory, human_seconds, memory_of, rests_in, runs_on
from ..specs import CPU, Placement, Plan
from .scene import (
    GREY,
    INK,
    INNER,
    MARGIN,
    PALE,
    PURPLE,
    TRACK,
    WIDTH,
    YELLOW,
    Box,
    Scene,
    Word,
    clipped,
    family,
    home_colours,
    lighter,
    on_colour,
    text_width,
)

_PARTS = {"ring": PURPLE, "cache": YELLOW, "activations": GREY}
_BAR_X, _BAR_END, _BAR_HEIGHT = MARGIN + 70, WIDTH - MARGIN - 170, 22
_STRIP_HEIGHT = 54
_EDGES_UP_TO = 320
"""Blocks that are drawn with a line between them: more of them would be nothing but lines."""


def draw(plan: Plan, title: str = "") -> Scene:
    """The plan of `title`, a model's name."""
    memory = memory_of(plan)
    colours = home_colours([each.device for each in memory])
    scene = Scene(f"Plan of {title or 'a model'}")
    scene.heading(title or "Where each block sleeps", _summary(plan))
    _draw_memory(scene, memory, colours)
    _draw_strip(scene, plan, colours)
    _draw_prediction(scene, plan)
    return scene


def _summary(plan: Plan) -> str:
    sizes = [placement.block.nbytes for placement in plan.placements if placement.block.nbytes]
    streamed = sum(placement.streamed_bytes for placement in plan.placements)
    travels = f"{human_bytes(streamed)} travel in a pass over all blocks" if plan.streams else "nothing streams"
    seconds = f", {human_seconds(plan.seconds)} predicted for a request" if plan.predicted else ""
    return f"{human_bytes(sum(sizes))} of weights in {len(sizes)} blocks; {travels}{seconds}"


# ---------------------------------------------------------------- memory


def _draw_memory(scene: Scene, memory: Sequence[DeviceMemory], colours: dict[str, str]) -> None:
    scene.section("memory, each bar as long as the budget")
    largest = max((each.used for each in memory), default=0)
    for each in memory:
        _draw_bar(scene, each, colours[each.device], largest)
    labels = dict.fromkeys(label for each in memory for label, _ in each.parts if label in _PARTS)
    names = {"ring": "ring, for weights that pass through", "cache": "cache of keys and values"}
    free = [("free", TRACK, False)] if any(each.budget for each in memory) else []
    scene.y += 4
    scene.legend([(names.get(label, label), _PARTS[label], False) for label in labels] + free)


def _draw_bar(scene: Scene, memory: DeviceMemory, colour: str, largest: int) -> None:
    """A device without a budget has a bar in proportion to the fullest device."""
    whole = max(memory.budget or largest, memory.used, 1)
    y, scale = scene.y, (_BAR_END - _BAR_X) / whole
    name = clipped(rests_in(memory.device), _BAR_X - MARGIN - 8, 12.5)
    scene.words.append(Word(_BAR_X - 10, y + 15.5, name, 12.5, anchor="end"))
    if memory.budget is not None:
        scene.boxes.append(Box(_BAR_X, y, _BAR_END - _BAR_X, _BAR_HEIGHT, TRACK, "free"))
    x = float(_BAR_X)
    for label, nbytes in memory.parts:
        width, said = nbytes * scale, f"{label}: {human_bytes(nbytes)}"
        paint = _PARTS.get(label, colour)
        scene.boxes.append(Box(x, y, width, _BAR_HEIGHT, paint, said, edge=True))
        for text in (f"{label} {human_bytes(nbytes)}", label):
            if text_width(text, 11) < width - 8:
                scene.words.append(Word(x + width / 2, y + 15, text, 11, on_colour(paint), "middle"))
                break
        x += width
    limit = "" if memory.budget is None else f" of {human_bytes(memory.budget)}"
    scene.words.append(Word(_BAR_END + 10, y + 15, f"{human_bytes(memory.used)}{limit}", 11.5, INK))
    scene.y += _BAR_HEIGHT + 7


# ---------------------------------------------------------------- the strip of blocks


@dataclass(frozen=True)
class _Cell:
    """A block's place in the strip."""

    placement: Placement
    x: float
    width: float

    @property
    def name(self) -> str:
        return self.placement.block.name or "(root)"


def _cells(plan: Plan) -> list[_Cell]:
    total = sum(placement.block.nbytes for placement in plan.placements)
    cells, before = [], 0
    for placement in plan.placements:
        nbytes = placement.block.nbytes
        if nbytes:
            cells.append(_Cell(placement, MARGIN + INNER * before / total, INNER * nbytes / total))
        before += nbytes
    return cells


def _draw_strip(scene: Scene, plan: Plan, colours: dict[str, str]) -> None:
    cells = _cells(plan)
    scene.section("blocks in the order in which they run, as wide as their bytes")
    for x, width, name in _runs(cells, lambda cell: family(cell.placement.block.name)):
        scene.bracket(x, width, name)
    scene.y += 22
    edge = len(cells) <= _EDGES_UP_TO
    for cell in cells:
        placement = cell.placement
        said = f"{cell.name}: {human_bytes(placement.block.nbytes)}, rests in {rests_in(placement.home)}, runs on "
        colour = colours.get(placement.home, PALE)
        box = Box(cell.x, scene.y, cell.width, _STRIP_HEIGHT, colour, said + runs_on(placement), edge=edge)
        scene.boxes.append(box)
    for x, width, home in _runs(cells, lambda cell: cell.placement.home):
        text, room = rests_in(home), text_width(rests_in(home), 12) + 8
        if room <= width:
            middle, y, colour = x + width / 2, scene.y + _STRIP_HEIGHT / 2, colours.get(home, PALE)
            scene.boxes.append(Box(middle - room / 2, y - 9, room, 18, colour))  # no lines behind words
            scene.words.append(Word(middle, y + 4, text, 12, on_colour(colour), "middle"))
    scene.y += _STRIP_HEIGHT + 4
    _draw_where_computed(scene, cells, colours)
    scene.y += 10
    scene.legend([(text, colours.get(home, PALE), False) for home, text in _homes(cells)])


def _draw_where_computed(scene: Scene, cells: Sequence[_Cell], colours: dict[str, str]) -> None:
    """A second, thin strip: only where blocks run on several devices."""
    devices = {_computed_on(cell) for cell in cells}
    if len(devices) < 2:
        scene.words.append(Word(MARGIN, scene.y + 14, f"all run on {', '.join(devices)}", 11, PALE))
        scene.y += 18
        return
    for x, width, device in _runs(cells, _computed_on):
        colour = lighter(colours.get(device, PALE))
        scene.boxes.append(Box(x, scene.y, width, 16, colour, f"runs on {device}", edge=True))
        if text_width(f"runs on {device}", 10.5) < width - 6:
            words = Word(x + width / 2, scene.y + 12, f"runs on {device}", 10.5, on_colour(colour), "middle")
            scene.words.append(words)
    scene.y += 18


def _homes(cells: Sequence[_Cell]) -> Iterator[tuple[str, str]]:
    """(home, what rests there) in the order in which homes are met."""
    for home in dict.fromkeys(cell.placement.home for cell in cells):
        sizes = [cell.placement.block.nbytes for cell in cells if cell.placement.home == home]
        yield home, f"{rests_in(home)}: {human_bytes(sum(sizes))} in {len(sizes)} block{'s'[: len(sizes) > 1]}"


def _runs(cells: Sequence[_Cell], key: Callable[[_Cell], str]) -> Iterator[tuple[float, float, str]]:
    """(x, width, key) of neighbours that have the same key."""
    for value, group in groupby(cells, key=key):
        members = list(group)
        yield members[0].x, members[-1].x + members[-1].width - members[0].x, value


def _computed_on(cell: _Cell) -> str:
    return CPU if cell.placement.at_home else cell.placement.device


# ---------------------------------------------------------------- predicted seconds


def _draw_prediction(scene: Scene, plan: Plan) -> None:
    if not plan.predicted:
        return
    scene.section("predicted seconds of a request, phase by phase")
    scale = (_BAR_END - _BAR_X) / max(plan.seconds, 1e-12)
    for phase in plan.predicted:
        calls = "once" if phase.calls == 1 else f"{phase.calls} times {human_seconds(phase.seconds_per_call)}"
        said = f"{human_seconds(phase.seconds)}, {calls}"
        name = clipped(phase.name, _BAR_X - MARGIN - 10, 12)
        scene.words.append(Word(_BAR_X - 10, scene.y + 12, name, 12, anchor="end"))
        width = max(1.0, phase.seconds * scale)
        scene.boxes.append(Box(_BAR_X, scene.y, width, 16, GREY, f"{phase.name}: {said}"))
        scene.words.append(Word(_BAR_X + width + 8, scene.y + 12, said, 11.5))
        scene.y += 22
    scene.y += 4
