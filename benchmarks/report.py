"""One table of a run: what was measured, beside what, and whether the target is met. For a terminal and as markdown."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

COLUMNS = ("case", "ours", "beside", "ratio", "target", "met", "note")
UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
VERSIONS = ("torch", "transformers", "accelerate", "diffusers", "safetensors")


@dataclass(frozen=True)
class Target:
    """What a ratio has to reach (`at_least`) or to stay below."""

    value: float
    at_least: bool

    def met_by(self, ratio: float) -> bool:
        return ratio >= self.value if self.at_least else ratio <= self.value

    def __str__(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.value:g}"


@dataclass(frozen=True)
class Within:
    """A ratio that has to be near 1: no farther than this share."""

    share: float

    def met_by(self, ratio: float) -> bool:
        return abs(ratio - 1) <= self.share

    def __str__(self) -> str:
        return f"1 ± {self.share:g}"


@dataclass(frozen=True)
class Row:
    """One case's figures. `verdict` says why a row has no ratio, or why it does not count; None: the target decides."""

    case: str
    ours: str = ""
    beside: str = ""
    ratio: float | None = None
    target: Target | Within | None = None
    note: str = ""
    verdict: str | None = None

    @property
    def met(self) -> str:
        if self.verdict is not None:
            return self.verdict
        if self.ratio is None or self.target is None:
            return ""
        return "met" if self.target.met_by(self.ratio) else "NOT MET"

    def cells(self) -> tuple[str, ...]:
        ratio = "" if self.ratio is None else f"{self.ratio:.3f}"
        return self.case, self.ours, self.beside, ratio, str(self.target or ""), self.met, self.note


def print_table(rows: Sequence[Row], title: str) -> None:
    table = Table(title=title, title_justify="left", show_lines=True)
    for column in COLUMNS:
        table.add_column(column, overflow="fold", justify="right" if column == "ratio" else "left")
    for row in rows:
        table.add_row(*row.cells())
    console = Console(markup=False, highlight=False)
    # A pipe has no width of its own, and a folded number is none.
    console.print(table) if console.is_terminal else Console(markup=False, width=180).print(table)


def markdown(rows: Iterable[Row], title: str, about: Sequence[str]) -> str:
    lines = [f"## {title}", "", *about, "", _line(COLUMNS), _line("---" for _ in COLUMNS)]
    lines += [_line(row.cells()) for row in rows]
    return "\n".join(lines) + "\n"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def append(path: Path, text: str) -> None:
    """Add a section to a file; what is in it stays."""
    before = path.read_text() if path.exists() else ""
    gap = "" if not before else "\n" if before.endswith("\n") else "\n\n"
    with open(path, "a") as file:
        file.write(gap + text)


def machine(*more: str) -> list[str]:
    """What a figure depends on: the date, the cores, the memory, the system and the versions of the libraries."""
    hardware = f"{os.cpu_count()} cores ({_processor()}), {psutil.virtual_memory().total / 2**30:.0f} GiB of RAM"
    system = f"{platform.system()} {platform.release()}, Python {platform.python_version()}"
    date = datetime.datetime.now(tz=datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return [f"{date}. {hardware}; {system}; {versions()}.", *more]


def versions() -> str:
    found = []
    for name in VERSIONS:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def size(nbytes: float) -> str:
    """In the decimal units that disks are sold by."""
    unit, scale = next(((unit, scale) for unit, scale in UNITS if abs(nbytes) >= scale), UNITS[-1])
    return f"{nbytes / scale:.2f} {unit}"


def rate(bytes_per_second: float) -> str:
    return f"{size(bytes_per_second)}/s"


def duration(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"
