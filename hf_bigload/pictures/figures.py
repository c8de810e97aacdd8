"""A scene as a matplotlib figure."""

from __future__ import annotations

from typing import Any

from ..errors import MissingExtraError
from .scene import WIDTH, Box, Scene, Word

_DPI = 100
"""Pixels of a scene in an inch of the figure."""
_POINTS = 72 / _DPI


def figure(scene: Scene) -> Any:
    """A `matplotlib.figure.Figure` of the scene, in no window and known to no `pyplot`.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(
            "plot() draws with matplotlib, which is not installed: pip install 'hf_bigload[plot]'. A notebook shows "
            "the same picture without it."
        ) from error
    drawn = Figure(figsize=(WIDTH / _DPI, scene.height / _DPI), dpi=2 * _DPI, facecolor="white")
    axes = drawn.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(0, WIDTH)
    axes.set_ylim(scene.height, 0)
    _draw_boxes(axes, scene.boxes)
    for word in scene.words:
        _draw_word(axes, word)
    return drawn


def _draw_boxes(axes: Any, boxes: list[Box]) -> None:
    """Boxes in their order: one collection for each run of those that look alike but for colour."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    kinds: list[tuple[tuple[bool, bool], list[Box]]] = []
    for box in boxes:
        kind = (box.hatched, box.edge)
        if not kinds or kinds[-1][0] != kind:
            kinds.append((kind, []))
        kinds[-1][1].append(box)
    for (hatched, edge), alike in kinds:
        patches = [Rectangle((box.x, box.y), box.width, box.height) for box in alike]
        look: dict[str, Any] = {"edgecolor": "white", "linewidth": 0.6 * edge, "hatch": "/////" if hatched else None}
        axes.add_collection(PatchCollection(patches, facecolor=[box.colour for box in alike], **look))


def _draw_word(axes: Any, word: Word) -> None:
    axes.text(
        word.x,
        word.y,
        word.text,
        fontsize=word.size * _POINTS,
        color=word.colour,
        ha={"start": "left", "middle": "center", "end": "right"}[word.anchor],
        va="baseline",
        fontweight="semibold" if word.bold else "normal",
        parse_math=False,  # a name may hold a dollar sign
    )
