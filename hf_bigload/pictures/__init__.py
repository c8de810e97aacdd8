"""Pictures of plans and runs: one drawing of each, put on paper as SVG for a notebook or as a matplotlib figure.

`plans` and `timelines` draw; `scene` is what they draw with; `svg` and `figures` put a scene on paper.
"""

from __future__ import annotations

from typing import Any

from .. import report
from ..specs import Plan
from ..timeline import Timeline
from . import plans, svg, timelines
from .scene import Scene


def as_text(pictured: Any) -> str:
    """A plan or a timeline as tables for a terminal."""
    return report.timeline_table(pictured) if isinstance(pictured, Timeline) else report.plan_table(pictured)


def as_html(pictured: Any, title: str = "") -> str:
    """A plan or a timeline as HTML that needs nothing else: a drawing whose parts name themselves under the mouse."""
    return svg.html(_scene(pictured, title))


def as_figure(pictured: Any, title: str = "") -> Any:
    """A plan or a timeline as a `matplotlib.figure.Figure`.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    from . import figures  # here: the rest does without matplotlib

    return figures.figure(_scene(pictured, title))


def _scene(pictured: Any, title: str) -> Scene:
    if isinstance(pictured, Timeline):
        return timelines.draw(pictured)
    if isinstance(pictured, Plan):
        return plans.draw(pictured, title)
    raise TypeError(f"There is no picture of a {type(pictured).__name__}: only of a Plan or a Timeline.")
