"""The command `hf-bigload`. Each group of commands is a `typer.Typer` of its own; none imports torch before it must.

hf-bigload estimate REPO_OR_PATH [--dtype D] [--batch N] [--context N] [--new-tokens N] [--json]
hf-bigload plan REPO_OR_PATH [--dtype D] [--device SIZE]... [--ram SIZE] [--batch|--context|--new-tokens N] [--json]
hf-bigload doctor [--fresh] [--json]
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
from typing import Annotated, Any

import typer
from rich.console import Console, JustifyMethod
from rich.table import Table

from hf_bigload import __version__, advice, bandwidth, doctor, hardware, report, settings
from hf_bigload.advice import Step
from hf_bigload.checkpoint import spill_cache
from hf_bigload.checkpoint.spill_cache import EntryInfo
from hf_bigload.describe import FLOATING, Description, describe
from hf_bigload.errors import BigloadError, BudgetError, human_bytes
from hf_bigload.estimate import Estimate
from hf_bigload.planner import make_plan_with_room
from hf_bigload.specs import CPU, Hardware, ModelSpec, Needs, Plan, Workload

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


# ---------------------------------------------------------------------------------------------------- estimate, plan

Model = Annotated[str, typer.Argument(metavar="REPO_OR_PATH", help="A name on the Hub (org/model), or a folder.")]
Dtype = Annotated[str | None, typer.Option(help="What to load weights in, as bfloat16; without it, the model's own.")]
Revision = Annotated[str | None, typer.Option(help="A branch, tag or commit on the Hub.")]
AsJson = Annotated[bool, typer.Option("--json", help="For programs; sizes in bytes.")]
Batch = Annotated[int | None, typer.Option(min=1, help="Sequences at once.")]
Context = Annotated[int | None, typer.Option(min=1, help="Tokens of each sequence's prompt.")]
NewTokens = Annotated[int | None, typer.Option(min=1, help="Tokens to generate for each sequence.")]


@app.command("estimate")
def estimate_(
    model: Model,
    dtype: Dtype = None,
    revision: Revision = None,
    batch: Batch = None,
    context: Context = None,
    new_tokens: NewTokens = None,
    as_json: AsJson = False,
) -> None:
    """What a model takes once loaded, block by block, and what a request takes. No weights are downloaded."""
    found = _described(model, dtype, revision)
    figures = Estimate(found.repository.name, found.spec, found.needs(_workload(batch, context, new_tokens)))
    if as_json:
        typer.echo(json.dumps(_description_as_json(found) | _estimate_as_json(figures), indent=2))
        return
    _say_description(found)
    _console().print(report.estimate_view(figures))


def _estimate_as_json(figures: Estimate) -> dict[str, Any]:
    names = ("weights", "buffers", "cache", "activations", "total", "method", "error")
    return {
        "workload": dataclasses.asdict(figures.needs.workload),
        **{name: getattr(figures, name) for name in names},
        "cache_by_block": dict(figures.needs.cache),
        "work_by_block": {name: [*map(dataclasses.asdict, work)] for name, work in figures.needs.work.items()},
    }


@app.command()
def plan(
    model: Model,
    dtype: Dtype = None,
    revision: Revision = None,
    device: Annotated[
        list[str] | None,
        typer.Option(metavar="SIZE", help="Memory of an accelerator to plan for, as 24GiB; once for each, or `none`."),
    ] = None,
    ram: Annotated[str | None, typer.Option(metavar="SIZE", help="RAM to plan for, as 30GiB.")] = None,
    batch: Batch = None,
    context: Context = None,
    new_tokens: NewTokens = None,
    as_json: AsJson = False,
) -> None:
    """Where each block of a model would rest and run, on this machine or one of the sizes given, and how fast.

    Nothing is loaded. Without --device or --ram, that is as this machine has it now, less a tenth. Room is kept for
    what a request of --batch sequences of --context tokens and --new-tokens generated ones takes beside the weights.
    """
    described = (None if not device else _sizes(device), None if ram is None else _size("--ram", ram))
    found = _described(model, dtype, revision)
    named = any((batch, context, new_tokens, settings.current().workload))
    machine, needs = _machine(*described), found.needs(_workload(batch, context, new_tokens))
    made, refusal = _plan_or_refusal(found.spec, machine, needs, named)
    if made is not None and not made.activations and not made.cache:
        needs = dataclasses.replace(needs, activations=0, cache={})
    steps = advice.next_steps(found.spec, machine, made, needs)
    if as_json:
        content = _description_as_json(found) | _plan_as_json(made, machine, steps)
        typer.echo(json.dumps(content, indent=2))
    else:
        _say_description(found)
        if made is not None:
            _console().print(report.plan_view(made, found.repository.name))
            typer.echo(_what_travels(made))
            typer.echo(report.travel(made) if found.repository.is_pipeline else report.prediction(made))
        for step in steps:
            faster = f": {step.times_as_fast:.1f} times as fast" if step.times_as_fast else ""
            typer.echo(f"{human_bytes(step.more)} more {_on(step.device)}, and {step.buys}{faster}.")
    if refusal is not None:
        typer.echo(f"hf-bigload: {refusal}", err=True)
        raise typer.Exit(1)


def _described(model: str, dtype: str | None, revision: str | None) -> Description:
    if dtype is not None and dtype not in FLOATING:
        raise typer.BadParameter(f"--dtype {dtype}: choose one of {', '.join(FLOATING)}.")
    return describe(model, dtype, revision)


def _machine(devices: Sequence[int] | None, ram: int | None) -> Hardware:
    """This machine, with the bytes given in place of its accelerators or its RAM."""
    here = Hardware({}, 0) if devices is not None and ram is not None else hardware.probe()
    given = here.devices if devices is None else {f"cuda:{i}": size for i, size in enumerate(devices)}
    speeds = bandwidth.speeds(next(iter(given), CPU))
    return Hardware(given, here.ram if ram is None else ram, speeds=speeds)


def _workload(batch: int | None, context: int | None, new_tokens: int | None) -> Workload:
    """The workload in force, with what was given in place of its figures."""
    given = {"batch_size": batch, "context_length": context, "new_tokens": new_tokens}
    usual = settings.current().workload or Workload()
    return dataclasses.replace(usual, **{name: value for name, value in given.items() if value is not None})


def _sizes(devices: Sequence[str]) -> list[int]:
    return [] if list(devices) == ["none"] else [_size("--device", text) for text in devices]


def _size(option: str, text: str) -> int:
    try:
        return settings.parse_size(text)
    except ValueError as error:
        raise typer.BadParameter(f"{option}: {error}") from error


def _plan_or_refusal(
    spec: ModelSpec, machine: Hardware, needs: Needs, firm: bool
) -> tuple[Plan | None, BudgetError | None]:
    try:
        return make_plan_with_room(spec, machine, needs, firm, map_value=_map_value), None
    except BudgetError as error:
        return None, error


def _map_value(device: str) -> int | str:
    kind, _, index = device.partition(":")
    return int(index) if index and kind != CPU else device


def _say_description(found: Description) -> None:
    repository, spec = found.repository, found.spec
    download = f", {human_bytes(repository.download_bytes)} to download" if repository.download_bytes else ""
    typer.echo(
        f"{repository.name}: {human_bytes(spec.nbytes)} of weights in {found.dtype} "
        f"(files: {human_bytes(repository.file_bytes)}{download})"
    )
    if not found.from_class:
        typer.echo("No installed library makes this model of its config: sizes and blocks are those of its headers.")
    if repository.is_pipeline:
        _console().print(report.components_table(spec.blocks))


def _what_travels(plan: Plan) -> str:
    """What one step moves, in words."""
    streamed: dict[str, int] = {}
    for placement in plan.placements:
        origin = "from disk" if placement.is_on_disk else "from RAM"
        if placement.streamed_bytes:
            streamed[origin] = streamed.get(origin, 0) + placement.streamed_bytes
    if not streamed:
        return "Of what is offloaded, only rows travel." if plan.streams else "Nothing streams."
    return f"Each pass through the model streams {' and '.join(f'{human_bytes(n)} {o}' for o, n in streamed.items())}."


def _on(device: str) -> str:
    return "RAM" if device == CPU else f"on {device}"


def _description_as_json(found: Description) -> dict[str, Any]:
    spec, repository = found.spec, found.repository
    blocks = [{"name": b.name, "nbytes": b.nbytes, "buffer_bytes": b.buffer_bytes} for b in spec.blocks]
    return {
        "model": repository.name,
        "architectures": repository.config.get("architectures"),
        "dtype": found.dtype,
        "from_class": found.from_class,
        "nbytes": spec.nbytes,
        "file_bytes": repository.file_bytes,
        "download_bytes": repository.download_bytes,
        "blocks": blocks,
        "ties": dict(spec.ties),
    }


def _plan_as_json(plan: Plan | None, machine: Hardware, steps: Sequence[Step]) -> dict[str, Any]:
    content: dict[str, Any] = {
        "machine": {"devices": dict(machine.devices), "ram": machine.ram},
        "fits": plan is not None,
        "next_steps": [dataclasses.asdict(step) for step in steps],
    }
    if plan is None:
        return content
    names = ("home", "device", "at_home", "streamed_bytes")
    placed = [
        {"name": p.block.name, "nbytes": p.block.nbytes} | {n: getattr(p, n) for n in names} for p in plan.placements
    ]
    return content | {
        "streams": plan.streams,
        "streamed_bytes": sum(p.streamed_bytes for p in plan.placements),
        "used": dict(plan.used),
        "cache": dict(plan.cache),
        "activations": dict(plan.activations),
        "workload": dataclasses.asdict(plan.workload),
        "predicted": {
            "phases": [dataclasses.asdict(phase) for phase in plan.predicted],
            "seconds": plan.seconds,
            "lower_bound": plan.bound,
            "measured": plan.measured,
        },
        "budget": dict(plan.budget),
        "ring": dict(plan.ring),
        "device_map": dict(plan.device_map),
        "placements": placed,
    }


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 110)


# ------------------------------------------------------------------------------------------------------------ doctor


@app.command("doctor")
def doctor_(
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again, instead of what was measured before.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs; bytes, and bytes per second.")] = False,
) -> None:
    """What this machine is, how fast it moves weights, and what is wrong with it.

    The first time, some seconds go by: a file of 512 MiB is written to the cache folder, read, and removed.
    """
    found = doctor.examine(fresh)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(found), indent=2))
    else:
        _console().print(report.machine_view(found))


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
