"""The command `hf-bigload`. Each group of commands is a `typer.Typer` of its own; none imports torch before it must.

hf-bigload cache ls [--json]
hf-bigload cache rm [ENTRY... | --all | --stale]
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import time
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console, JustifyMethod
from rich.table import Table

from hf_bigload import __version__
from hf_bigload.checkpoint import spill_cache
from hf_bigload.checkpoint.spill_cache import EntryInfo
from hf_bigload.errors import BigloadError, human_bytes

app = typer.Typer(
    name="hf-bigload",
    help="Models of any size on the machine you have: what hf_bigload keeps, and what it would do.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
cache = typer.Typer(no_args_is_help=True, help="Converted weights on disk that later loads use again.")
app.add_typer(cache, name="cache")

_SHOWN_CHARACTERS = 8
"""Of an entry's name: `rm` takes any beginning that only one has."""
_HUB_FOLDER = re.compile(r"models--(?P<repo>[^/\\]+)")


def main() -> None:
    """The console script. Exits 1 where something could not be done, 2 for bad usage."""
    try:
        app()
    except (BigloadError, OSError) as error:
        sys.exit(f"hf-bigload: {error}")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hf_bigload {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


# ------------------------------------------------------------------------------------------------------------- cache


@cache.command("ls")
def cache_ls(as_json: Annotated[bool, typer.Option("--json", help="For programs; sizes in bytes.")] = False) -> None:
    """List the entries: one for each checkpoint and dtype, the one used last first."""
    entries, folder, limit = spill_cache.entries(), spill_cache.casts_folder(), spill_cache.size_limit()
    if as_json:
        content = [dataclasses.asdict(entry) for entry in entries]
        typer.echo(json.dumps({"folder": folder, "limit": limit, "entries": content}, indent=2))
        return
    if entries:
        width = None if sys.stdout.isatty() else 200  # what is piped may be read line by line
        Console(width=width).print(_table(entries))
    count = f"{len(entries)} {'entry' if len(entries) == 1 else 'entries'}"
    total = human_bytes(sum(entry.nbytes for entry in entries))
    typer.echo(f"{count}, {total} of at most {human_bytes(limit)}, in {folder}")


@cache.command("rm")
def cache_rm(
    names: Annotated[list[str] | None, typer.Argument(metavar="ENTRY", help="As `ls` shows them.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every entry.")] = False,
    stale: Annotated[bool, typer.Option("--stale", help="Those whose checkpoint is gone or was changed.")] = False,
) -> None:
    """Remove entries; the next load that needs one converts its weights again. Those in use stay."""
    if sum(map(bool, (names, everything, stale))) != 1:
        raise typer.BadParameter("Say what to remove: entries by name, or --all, or --stale.")
    known = {entry.name: entry for entry in spill_cache.entries()}
    wanted = [_chosen(name, known) for name in names] if names else list(known.values())
    results = [_remove(entry) for entry in wanted if entry.stale or not stale]
    if not results:
        typer.echo("Nothing to remove.")
    if not all(results):
        raise typer.Exit(1)


def _chosen(name: str, known: dict[str, EntryInfo]) -> EntryInfo:
    """The entry of that name, or the only one whose name begins with it."""
    matches = [entry for each, entry in known.items() if name and each.startswith(name)]
    if len(matches) != 1:
        found = "several entries begin" if matches else "no entry begins"
        raise typer.BadParameter(f"{found} with {name!r}: `hf-bigload cache ls` shows their names.")
    return matches[0]


def _remove(entry: EntryInfo) -> bool:
    try:
        removed = spill_cache.remove(entry.name)
    except FileNotFoundError:
        removed = True  # by somebody else, just now
    if removed:
        typer.echo(f"Removed {entry.name} ({_checkpoint(entry)}, {human_bytes(entry.nbytes)}).")
    else:
        typer.echo(
            f"Kept {entry.name} ({_checkpoint(entry)}): a loaded model uses it. End that program first.", err=True
        )
    return removed


def _table(entries: Sequence[EntryInfo]) -> Table:
    table = Table()
    for name in ("entry", "checkpoint", "dtype", "size", "last used", "state"):
        justify: JustifyMethod = "right" if name == "size" else "left"
        table.add_column(name, justify=justify, no_wrap=name != "checkpoint", overflow="fold")
    for entry in entries:
        state = "in use" if entry.in_use else "stale" if entry.stale else ""
        cells = (_checkpoint(entry), entry.dtype or "?", human_bytes(entry.nbytes), _age(entry.last_used), state)
        table.add_row(entry.name[:_SHOWN_CHARACTERS], *cells)
    return table


def _checkpoint(entry: EntryInfo) -> str:
    """The repository's name for what is in the Hub's cache, else the folder."""
    hub = _HUB_FOLDER.search(entry.checkpoint)
    return hub["repo"].replace("--", "/") if hub else entry.checkpoint or "unknown checkpoint"


def _age(since: float) -> str:
    seconds = max(0.0, time.time() - since)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{int(seconds / length)} {unit} ago"
    return "just now"
