"""What a person reads of a plan."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from itertools import groupby

from rich import box
from rich.console import Console
from rich.table import Table

from .errors import human_bytes
from .specs import CPU, DISK, Placement, Plan


def plan_table(plan: Plan, title: str = "model") -> str:
    """The plan as text: which blocks rest where and run where, and what each device has to hold."""
    blocks = Table(title=f"hf_bigload plan for {title}", title_justify="left")
    for column, justify in (("blocks", "left"), ("rest in", "left"), ("run on", "left"), ("size", "right")):
        blocks.add_column(column, justify=justify)  # type: ignore[arg-type]
    for (home, runs), group in groupby(plan.placements, key=lambda p: (p.home, _runs_on(p))):
        members = list(group)
        blocks.add_row(_names(members), _rests_in(home), runs, human_bytes(sum(p.block.nbytes for p in members)))
    budgets = Table()
    for column in ("device", "weights and ring", "of which ring", "budget"):
        budgets.add_column(column, justify="left" if column == "device" else "right")
    for device in sorted({*plan.used, *plan.budget}, key=_order):
        ring, budget = plan.ring.get(device, 0), plan.budget.get(device)
        used = human_bytes(plan.used.get(device, 0))
        budgets.add_row(device, used, human_bytes(ring), "-" if budget is None else human_bytes(budget))
    return _as_text([blocks, budgets])


def _runs_on(placement: Placement) -> str:
    return "cpu, where it rests" if placement.at_home and placement.device != CPU else placement.device


def _rests_in(home: str) -> str:
    return {CPU: "RAM", DISK: "disk"}.get(home, home)


def _names(placements: list[Placement]) -> str:
    first, last = (p.block.name or "(root)" for p in (placements[0], placements[-1]))
    return first if len(placements) == 1 else f"{first} ... {last} ({len(placements)})"


def _order(device: str) -> tuple[int, str]:
    return ({CPU: 1, DISK: 2}.get(device, 0), device)


def _as_text(tables: Sequence[Table]) -> str:
    """For wherever the text goes: a pipe or terminal without the characters of a drawn box gets plain ones."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        "┏━┓│".encode(encoding)
    except UnicodeEncodeError:
        for table in tables:
            table.box = box.ASCII2
    console = Console(file=io.StringIO(), width=110, force_terminal=False)
    for table in tables:
        console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]
