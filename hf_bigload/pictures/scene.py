"""What a picture is drawn with: boxes and words on a sheet of paper, in pixels from its upper left corner."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..specs import CPU, DISK

WIDTH, MARGIN = 960, 28
INNER = WIDTH - 2 * MARGIN

INK, PALE, RULE, TRACK = "#3b4048", "#7c838c", "#d5d9de", "#eef0f2"
"""Of words, of lesser words, of lines, of what is empty."""

BLUE, SKY, GREEN, ORANGE = "#0072b2", "#56b4e9", "#009e73", "#e69f00"
RED, PURPLE, YELLOW, GREY = "#d55e00", "#cc79a7", "#f0e442", "#8a94a0"
"""Told apart with any kind of colour vision (Okabe and Ito's palette, with a grey)."""

_ACCELERATORS = (BLUE, SKY, "#44619d", "#8fc7d9")
_CHARACTER = 0.56
"""Width of an average character, of the height of its line."""


@dataclass(frozen=True)
class Box:
    x: float
    y: float
    width: float
    height: float
    colour: str
    says: str = ""
    """What it is, for whoever points at it."""
    hatched: bool = False
    edge: bool = False
    """A white line around it, as where boxes touch."""


@dataclass(frozen=True)
class Word:
    x: float
    y: float
    """Of the line that it stands on."""
    text: str
    size: float = 12
    colour: str = INK
    anchor: str = "start"
    """"start", "middle" or "end": what of it is at `x`."""
    bold: bool = False


@dataclass
class Scene:
    """A picture, drawn from the top down: `y` is where the next thing goes."""

    title: str
    boxes: list[Box] = field(default_factory=list)
    words: list[Word] = field(default_factory=list)
    y: float = MARGIN

    @property
    def height(self) -> float:
        return self.y + MARGIN / 2

    def heading(self, title: str, subtitle: str) -> None:
        self.words.append(Word(MARGIN, self.y + 14, clipped(title, INNER, 19), 19))
        self.words.append(Word(MARGIN, self.y + 36, clipped(subtitle, INNER, 12.5), 12.5, PALE))
        self.y += 60

    def section(self, title: str) -> None:
        self.words.append(Word(MARGIN, self.y + 10, title, 12, PALE))
        self.y += 22

    def bracket(self, x: float, width: float, text: str) -> None:
        """A line over what `text` is about, with the words over it where they have room."""
        shown = clipped(text, width - 6, 11)
        if shown:
            self.words.append(Word(x + width / 2, self.y + 8, shown, 11, INK, "middle"))
        if width > 3:
            self.boxes.append(Box(x + 1, self.y + 14, width - 2, 1.4, PALE if shown else RULE, text))

    def legend(self, entries: Sequence[tuple[str, str, bool]]) -> None:
        """(words, colour, hatched) for each, in as many lines as they need."""
        x = float(MARGIN)
        for text, colour, hatched in entries:
            width = 16 + text_width(text, 11.5) + 20
            if x > MARGIN and x + width > WIDTH - MARGIN:
                x, self.y = float(MARGIN), self.y + 19
            self.boxes.append(Box(x, self.y, 11, 11, colour, hatched=hatched))
            self.words.append(Word(x + 16, self.y + 10, text, 11.5))
            x += width
        self.y += 30


def home_colours(homes: Sequence[str]) -> dict[str, str]:
    """A colour for each place that weights rest in or run on."""
    accelerators = [home for home in homes if home not in (CPU, DISK)]
    colours = {home: _ACCELERATORS[i % len(_ACCELERATORS)] for i, home in enumerate(accelerators)}
    return colours | {CPU: GREEN, DISK: ORANGE}


def family(block: str) -> str:
    """What the names of repeated blocks have in common: `decoder.layers.*`."""
    return re.sub(r"(?<![^.])\d+(?![^.]).*", "*", block) or "(root)"


def text_width(text: str, size: float) -> float:
    return _CHARACTER * size * len(text)


def clipped(text: str, width: float, size: float) -> str:
    """`text`, shortened in its middle to fit `width`; empty where less than three characters would."""
    room = int(width / (_CHARACTER * size))
    if len(text) <= room:
        return text
    head = (room - 1) // 2
    return f"{text[: room - 1 - head]}…{text[len(text) - head :] if head else ''}" if room >= 3 else ""


def ticks(seconds: float, count: int = 6) -> list[float]:
    """About `count` round moments from 0 to `seconds`."""
    if seconds <= 0:
        return [0.0]
    rough = seconds / count
    unit = 10.0 ** math.floor(math.log10(rough))
    step = unit * next(factor for factor in (1, 2, 5, 10) if factor * unit >= rough)
    return [i * step for i in range(int(seconds / step + 1e-9) + 1)]


def on_colour(colour: str) -> str:
    """The colour of words that are read on `colour`."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#ffffff" if 0.299 * red + 0.587 * green + 0.114 * blue < 150 else INK


def lighter(colour: str, share: float = 0.35) -> str:
    """`colour`, mixed with white."""
    parts = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(part + (255 - part) * share):02x}" for part in parts)
