"""A scene as SVG inside HTML, without scripts, styles or files from elsewhere."""

from __future__ import annotations

from html import escape
from itertools import count
from typing import Any

from .scene import WIDTH, Box, Scene, Word

_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
_numbers = count()


def html(scene: Scene) -> str:
    """A `div` that holds the drawing."""
    hatch = f"hf-bigload-hatch-{next(_numbers)}"  # ids are the whole notebook's
    body = "".join([*(_box(box, hatch) for box in scene.boxes), *map(_word, scene.words)])
    size: dict[str, Any] = {"viewBox": f"0 0 {WIDTH} {scene.height:.0f}", "width": WIDTH}
    svg = _element(
        "svg",
        _hatch(hatch) + body,
        xmlns="http://www.w3.org/2000/svg",
        role="img",
        aria_label=scene.title,
        font_family=_FONT,
        style="max-width:100%;height:auto;background:#fff",
        **size,
    )
    return _element("div", svg)


def _element(tag: str, content: str = "", /, **attributes: Any) -> str:
    """`content` is markup; attributes are escaped here, and an underscore in their names is a hyphen."""
    named = "".join(f' {name.replace("_", "-")}="{escape(_plain(value))}"' for name, value in attributes.items())
    return f"<{tag}{named}>{content}</{tag}>"


def _plain(value: Any) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def _hatch(name: str) -> str:
    line = _element("path", d="M0 6 L6 0", stroke="#ffffff", stroke_width=1.6)
    pattern = _element("pattern", line, id=name, width=6, height=6, patternUnits="userSpaceOnUse")
    return _element("defs", pattern)


def _box(box: Box, hatch: str) -> str:
    place: dict[str, Any] = {name: float(getattr(box, name)) for name in ("x", "y", "width", "height")}
    edge: dict[str, Any] = {"stroke": "#ffffff", "stroke_width": 0.8} if box.edge else {}
    drawn = _element("rect", fill=box.colour, **place, **edge)
    if box.hatched:
        drawn += _element("rect", fill=f"url(#{hatch})", **place)
    return _element("g", _element("title", escape(box.says)) + drawn) if box.says else drawn


def _word(word: Word) -> str:
    look: dict[str, Any] = {"x": float(word.x), "y": float(word.y), "font_size": float(word.size), "fill": word.colour}
    weight: dict[str, Any] = {"font_weight": 600} if word.bold else {}
    return _element("text", escape(word.text), text_anchor=word.anchor, **look, **weight)
