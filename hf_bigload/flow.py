"""The stages in order: a request and a skeleton become a spec, a plan, weights at rest, and a model that runs.

A loader calls `plan_model`, then loads through `Materializer`, then calls `dispatch`. Each stage takes what the one
before returned; this is the one file that names them all.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from . import bandwidth, hardware, pictures, report, settings
from .accounts import Memory, held_by, memory_of
from .checkpoint.index import open_checkpoint
from .checkpoint.reader import Reader, layout
from .checkpoint.repository import CONFIG_NAME
from .demotion import demoted, shortage, told_of, with_placements
from .describe import FLOATING, describe, spec_from_headers
from .device_map import missing_from, normalize_devices, resolve
from .dispatch.attach import attach, attachment_of, detach, resident_plan, suspend
from .dispatch.executor import Executor, Machine, Stats
from .dispatch.recording import record
from .dispatch.rescue import Demoted, Rescue
from .errors import DeviceMapError, DtypeError, OffloadedWeightError
from .estimate import Estimate, bound, fields_of
from .hardware import torch_device
from .materialize import Materializer
from .pinned import ALIGNMENT
from .placed import Placed, placed_of, remember
from .planner import STRATEGIES, follow_map, make_plan_with_room
from .replan import Relocation, alone
from .skeleton import LoadedAs, as_it_is, model_spec
from .specs import CPU, DISK, Hardware, LoadRequest, ModelSpec, Needs, Placement, Plan, TensorSpec, Workload
from .timeline import Timeline
from .trace import needs_of

__all__ = ["dispatch", "estimate", "inspect", "needs_of", "plan", "plan_model", "relocate", "replan"]

logger = logging.getLogger(__name__)
ModelT = TypeVar("ModelT", bound=nn.Module)


def plan_model(
    model: nn.Module,
    request: LoadRequest,
    ties: Mapping[str, str] | None = None,
    loaded_as: LoadedAs | None = None,
    held: Mapping[str, int] | None = None,
) -> Plan:
    """Where every tensor of `model` (on meta or not) will rest and run.

    `held`: bytes by device that a model which was placed before takes now; the plan may use them again.

    Raises:
        DeviceMapError: the request's device map names an unknown device, or leaves parameters without one.
        BudgetError: no placement keeps the budgets.
    """
    share = _share.get()
    if share is not None and not share.taken:
        share.taken = True
        return share.plan
    spec = model_spec(model, request.no_split, ties, loaded_as)
    plan = _plan(spec, request, partial(needs_of, model, spec), fields_of(getattr(model, "config", None)), held)
    if not is_strategy(request.device_map):
        _warn_unknown_modules(model, as_map(request.device_map))
    if settings.current().explain:
        print(report.plan_table(plan, type(model).__name__), file=sys.stderr)
    return plan


def plan_spec(spec: ModelSpec, request: LoadRequest, needs: Needs, title: str = "model") -> Plan:
    """As `plan_model`, for models that are described already, and take `needs` (a pipeline's components, joined)."""
    budget = _budget(request)
    strategy = is_strategy(request.device_map)
    plan = (
        _chosen(spec, request, budget, needs, firm=False)
        if strategy
        else _follow(spec, request, budget, lambda _: needs)
    )
    if settings.current().explain:
        print(report.plan_table(plan, title), file=sys.stderr)
    return plan


def is_strategy(device_map: Any) -> bool:
    """Whether it leaves the placing to the planner."""
    return isinstance(device_map, str) and device_map in STRATEGIES


def _max_memory(request: LoadRequest) -> Mapping[Any, int | str] | None:
    return request.max_memory if request.max_memory is not None else settings.current().max_memory


def _budget(request: LoadRequest, held: Mapping[str, int] | None = None) -> Hardware:
    budget = hardware.probe(_max_memory(request), held)
    return replace(budget, speeds=bandwidth.speeds(next(iter(budget.devices), CPU)))


def _plan(
    spec: ModelSpec,
    request: LoadRequest,
    needs_for: NeedsFor,
    config: Mapping[str, Any],
    held: Mapping[str, int] | None = None,
) -> Plan:
    budget = _budget(request, held)
    if is_strategy(request.device_map):
        return _best(spec, request, budget, _max_memory(request) is not None, needs_for, config)
    return _follow(spec, request, budget, needs_for)


NeedsFor = Callable[[Workload], Needs]


def _best(
    spec: ModelSpec,
    request: LoadRequest,
    budget: Hardware,
    asked_for: bool,
    needs_for: NeedsFor,
    config: Mapping[str, Any],
) -> Plan:
    """The planner's choice, with room for what a request takes beside the weights.

    Budgets that were `asked_for` are for weights and rings, as Accelerate documents `max_memory`, unless a workload was
    named: then they are for everything.
    """
    named = settings.current().workload
    most = bound(spec, named or Workload(), config)
    if (named is None and asked_for) or _has_room(spec, budget, most):
        needs = Needs(most.workload, work=most.work)  # for predictions; nothing has to be kept room for
    else:
        needs = needs_for(most.workload)
    return _chosen(spec, request, budget, needs, firm=named is not None)


def _chosen(spec: ModelSpec, request: LoadRequest, budget: Hardware, needs: Needs, firm: bool) -> Plan:
    return make_plan_with_room(
        spec,
        budget,
        needs,
        firm=firm,
        strategy=request.device_map,
        offload_buffers=request.offload_buffers,
        map_value=hardware.map_value,
    )


def _has_room(spec: ModelSpec, budget: Hardware, most: Needs) -> bool:
    """Whether everything fits on one device even with the most that a request could take: no trace is needed then."""
    room = max(budget.devices.values(), default=budget.ram)
    return spec.nbytes + most.activations + sum(most.cache.values()) <= room


def _follow(spec: ModelSpec, request: LoadRequest, budget: Hardware, needs_for: NeedsFor) -> Plan:
    """What the request's map says; a workload that was named is counted, and nothing is moved for it."""
    device_map = {k: hardware.device_name(v) for k, v in normalize_devices(as_map(request.device_map)).items()}
    _check_covered(spec, device_map)
    placed = [name for name in dict.fromkeys(device_map.values()) if name not in (CPU, DISK)]
    main = hardware.device_name(request.main_device) if request.main_device is not None else next(iter(placed), CPU)
    named = settings.current().workload
    return follow_map(
        spec,
        lambda name: resolve(device_map, name),
        main,
        budget,
        request.offload_buffers,
        hardware.map_value,
        None if named is None else needs_for(named),
    )


def as_map(device_map: Any) -> dict[str, Any]:
    """A device, an index or a map, as a map."""
    return dict(device_map) if isinstance(device_map, Mapping) else {"": device_map}


def _check_covered(spec: ModelSpec, device_map: Mapping[str, str]) -> None:
    names = [t.name for block in spec.blocks for t in block.tensors]
    missing = missing_from(device_map, names)
    if missing:
        raise DeviceMapError(
            f"The device_map gives no device for {len(missing)} of {len(names)} tensors: {', '.join(missing[:20])}"
            f"{', ...' if len(missing) > 20 else ''}. Add the modules they are in, or an entry '' for the rest."
        )


def _warn_unknown_modules(model: nn.Module, device_map: Mapping[str, str]) -> None:
    known = {name for name, _ in model.named_modules(remove_duplicate=False)}
    known |= {name for name, _ in model.named_parameters(remove_duplicate=False)}
    known |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
    unknown = [name for name in device_map if name and name not in known]
    if unknown:
        logger.warning("The device_map names modules that the model does not have: %s", ", ".join(unknown))


@dataclass(eq=False)
class Share:
    """What one model gets of a plan over several: its part, and the rings that it has in common with the others."""

    plan: Plan
    machine: Machine
    taken: bool = False


_share: ContextVar[Share | None] = ContextVar("hf_bigload_share", default=None)


@contextlib.contextmanager
def sharing(plan: Plan, machine: Machine) -> Iterator[None]:
    """The first model that is planned within the context follows `plan`, and shares the rings of `machine`."""
    token = _share.set(Share(plan, machine))
    try:
        yield
    finally:
        _share.reset(token)


def _share_of(plan: Plan) -> Share | None:
    share = _share.get()
    return share if share is not None and share.plan is plan else None


def dispatch(model: ModelT, plan: Plan, placed: Placed, stats: Stats | None = None) -> ModelT:
    """Make `model`, whose weights rest where `plan` says, run over it. What is moved counts in `stats`, if given."""
    materializer = placed.materializer
    _settle_buffers(model, plan)
    reader = materializer.reader if materializer is not None else Reader()
    share = _share_of(plan)
    machine = Machine(reader, {}) if share is None else share.machine.beside(reader)
    if share is not None:
        apart = plan.main_device not in plan.devices  # it runs elsewhere than the others
        placed = replace(placed, shared=True, force_hooks=placed.force_hooks or apart)
    moves = any(name not in (CPU, DISK) for name in plan.devices)
    executor = Executor(machine, plan.offload_buffers, watching=moves and _several_places(plan))
    executor.machine.stats = stats or executor.machine.stats
    if materializer is not None:
        materializer.register(executor, (*model.parameters(), *model.buffers()))
    for name, size in plan.ring.items():
        rings, device = machine.ring_bytes, torch_device(name)
        rings[device] = max(rings.get(device, 0), size + _slack(model, plan, executor, name))
    keep_alive = () if materializer is None else materializer.keep_alive
    attach(model, plan, executor, placed.skip_keys, keep_alive, placed.force_hooks, _rescue(plan, placed))
    if materializer is not None and attachment_of(model) is None:
        materializer.close_files()
    remember(model, placed)
    return model


def _rescue(plan: Plan, placed: Placed) -> Rescue | None:
    """What to do where an accelerator runs out of memory; nothing where the user decided what is where."""
    devices = sorted({p.device for p in plan.placements} - {CPU})
    if placed.shared:
        return None  # a plan for this model alone would take what the others have
    if not devices or placed.request.device_map != "auto" or not placed.demotes:
        return None
    return Rescue(demote, placed.remember, tuple(map(torch_device, devices)))


def _slack(model: nn.Module, plan: Plan, executor: Executor, device: str) -> int:
    """Bytes of a ring beside the weights: from files come whole pages, and on a device each tensor is aligned."""
    tensors = max((len(p.block.tensors) + len(p.block.borrows) for p in plan.placements), default=0)
    return 2 * (tensors * ALIGNMENT if device != CPU else _page_slack(model, plan, executor))


def _page_slack(model: nn.Module, plan: Plan, executor: Executor) -> int:
    """Bytes that come with the weights of one block, where that is most."""
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    most = 0
    for placement in plan.placements:
        tensors = [named[name] for t in placement.block.tensors if (name := t.name) in named]
        entries = [executor.on_disk[tensor].entry for tensor in tensors if tensor in executor.on_disk]
        most = max(most, layout(entries).nbytes - sum(entry.nbytes for entry in entries))
    return most


def _several_places(plan: Plan) -> bool:
    return len(plan.devices) > 1


def _settle_buffers(model: nn.Module, plan: Plan) -> None:
    """Buffers that no checkpoint holds were made somewhere: bring them to where they are computed with."""
    if plan.offload_buffers:
        return
    for placement in plan.placements:
        device = torch_device(CPU if placement.at_home else placement.device)
        for spec in placement.block.tensors:
            if not spec.is_buffer:
                continue
            owner, _, leaf = spec.name.rpartition(".")
            module = model.get_submodule(owner)
            buffer = module._buffers.get(leaf)
            if buffer is not None and buffer.device.type != "meta" and buffer.device != device:
                module._buffers[leaf] = buffer.to(device)


# ---------------------------------------------------------------- another plan for a model that lives


def replan(model: nn.Module, request: LoadRequest) -> Plan:
    """Plan `model`, which was placed before, as `request` asks, and move its weights to where the plan says.

    Raises:
        OffloadedWeightError: a thread is inside of a forward, or a weight cannot be moved. Nothing was moved.
        DeviceMapError, BudgetError: see `plan_model`. Nothing was moved.
        CheckpointError, SpillError, torch.OutOfMemoryError: the move failed on the way. The model has all its weights,
            and runs over a plan that has each where it is now.
    """
    with alone(model):
        plan = plan_model(model, request, held=held_by(model))
        relocate(model, plan, replace(placed_of(model), request=request))
    return plan


def relocate(model: nn.Module, plan: Plan, placed: Placed) -> None:
    """Move the weights of `model`, which nobody is inside of, to where `plan` says; raises as `replan` does."""
    before = inspect(model)
    attachment = attachment_of(model)
    placed = replace(placed, materializer=placed.materializer or Materializer(plan))
    assert placed.materializer is not None
    limits = {name: max(plan.used.get(name, 0), used) for name, used in (*before.plan.used.items(), *plan.used.items())}
    executor = None if attachment is None else attachment.executor
    relocation = Relocation(model, before.plan, plan, placed.materializer, executor, limits)
    relocation.check()
    suspend(model)
    try:
        relocation.run()
    except BaseException:
        plan = _plan_of_places(model, before.plan, plan, placed.request, relocation.places())
        raise
    finally:
        relocation.settle(plan)
        dispatch(model, plan, placed, before.stats)
        if placed.settle_in is not None:
            placed.settle_in(model)


def _plan_of_places(
    model: nn.Module, before: Plan, plan: Plan, request: LoadRequest, places: Mapping[str, str]
) -> Plan:
    """The plan that leaves every weight where it is. What rests on no accelerator is computed where it was `before`:
    there the caller's inputs and caches are."""
    spec = model_spec(model, request.no_split)
    budget = Hardware(plan.budget, plan.budget.get(CPU, 0))
    found = follow_map(spec, places.__getitem__, before.main_device, budget, plan.offload_buffers, hardware.map_value)
    devices = {p.block.name: p.device for p in before.placements}
    devices |= {t.name: p.device for p in before.placements for t in p.block.tensors}

    def as_before(p: Placement) -> Placement:
        names = (p.block.name, *(t.name for t in p.block.tensors))
        device = next((devices[name] for name in names if name in devices), p.device)
        if device == p.device or {p.home_of(t.name) for t in p.block.tensors} - {CPU, DISK}:
            return p
        return replace(p, device=device, at_home=p.block.gathers and p.home != device)

    placements = [as_before(p) for p in found.placements]
    plans = [with_placements(found, placements, hardware.map_value, depth) for depth in (2, 1)]
    return next((each for each in plans if each.keeps_budget), plans[-1])


def demote(model: nn.Module, error: torch.OutOfMemoryError) -> Demoted:
    """Send resident blocks of the accelerator that `error` is about to RAM or disk, for as much as it asked for."""
    try:
        with alone(model, forwards=1):
            return _demote(model, error)
    except OffloadedWeightError as refusal:  # before anything moved
        return Demoted(False, f"No weights were demoted: {refusal}")


def _demote(model: nn.Module, error: torch.OutOfMemoryError) -> Demoted:
    plan, placed = inspect(model).plan, placed_of(model)
    lower = demoted(plan, *shortage(plan, str(error)), *_ram_left(plan, placed), hardware.map_value)
    if lower is None:
        return Demoted(False, "No weights were demoted: no block is left whose place would help.")
    relocate(model, lower, placed)
    told = told_of(plan, lower)
    logger.warning("%s ran out of memory: %s", type(model).__name__, told)
    return Demoted(True, told)


def _ram_left(plan: Plan, placed: Placed) -> tuple[int, int]:
    """Bytes of RAM that weights which leave an accelerator may take, and those that they may pass through."""
    free = hardware.free_ram()
    max_memory = _max_memory(placed.request)
    if max_memory is not None and CPU not in max_memory:
        return 0, free
    return max(0, min(plan.budget.get(CPU, 0) - plan.used.get(CPU, 0), free)), 0


# ---------------------------------------------------------------- what a user asks about a model


@dataclass(frozen=True, eq=False)
class Inspection:
    """What hf_bigload knows of a model it placed."""

    model: nn.Module
    plan: Plan
    stats: Stats
    """Bytes moved so far; none, ever, for a model that rests whole on one device."""

    def explain(self) -> str:
        """The plan as a table for a terminal."""
        return report.plan_table(self.plan, type(self.model).__name__)

    def plot(self) -> Any:
        """The plan as a `matplotlib.figure.Figure`.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        return pictures.as_figure(self.plan, type(self.model).__name__)

    def _repr_html_(self) -> str:
        return pictures.as_html(self.plan, type(self.model).__name__)

    def record(self) -> AbstractContextManager[Timeline]:
        """Measure what the model does inside a context: when blocks are read, copied, computed, and waited for.

            with hf_bigload.inspect(model).record() as timeline:
                model(**inputs)
            timeline.plot().savefig("forward.png")

        The timeline is filled when the context ends, also by an exception. It begins with nothing under way: what was
        sent ahead by an earlier forward is dropped and read again. Of a model that was compiled before, only blocks
        that stream are seen to compute: the others are part of the compiler's graphs.

        Raises:
            RuntimeError: the model is being recorded already.
        """
        return record(self.model, self.plan)

    @property
    def memory(self) -> Memory:
        """What the model holds of each device's memory, and held at the most, beside what the plan counts; and what the
        process takes of the host's, clean pages of files told apart."""
        return memory_of(self.model, self.plan)

    def replan(self, max_memory: Any = None, device_map: Any = None) -> Inspection:
        """Give the model another plan, and move its blocks to where that says; what it computes stays the same, bit for
        bit. Between forwards only, and no thread may begin one meanwhile; one that calls a model which rests by "auto"
        on an accelerator, and so has a wrapper that knows, waits until the blocks are there.

        Args:
            max_memory: budgets as for a load. None: those of the load; if it had none, what is free now. A component of
                a pipeline has to be given its own.
            device_map: a strategy or a map. None: the strategy of the load, or "auto" if that was given a map.

        Returns the model as it then is. Raises as `flow.replan` does; the model is usable in any case.
        """
        replan(self.model, placed_of(self.model).asked(max_memory, device_map))
        return inspect(self.model)

    def close(self) -> None:
        """Take the hooks off and give the ring back; the weights stay where they rest, readable there."""
        detach(self.model)


def inspect(model: nn.Module) -> Inspection:
    """The plan and the counters of a model that was placed by this package.

    Raises:
        ValueError: it was not.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"{type(model).__name__} is no model. Of a pipeline, inspect the components one by one "
            "(`inspect(pipe.transformer)`); `enable(explain=True)` prints the plan over all of them when it is loaded."
        )
    attachment = attachment_of(model)
    plan = resident_plan(model) if attachment is None else attachment.plan
    if plan is None:
        raise ValueError(
            f"{type(model).__name__} has no plan: it was neither loaded with a device_map while hf_bigload was enabled "
            "nor dispatched by it, or it was moved since."
        )
    return Inspection(model, plan, Stats() if attachment is None else attachment.stats)


Name = str | os.PathLike[str]
"""Of a model on the Hub, or a folder."""


def plan(model: nn.Module | Name, device_map: Any = "auto", max_memory: Any = None, **options: Any) -> Plan:
    """The plan that `device_map` and `max_memory` would give `model`: a module, which may be on the meta device, or the
    name of one on the Hub or of a folder, of which no weights are read.

    `options` are the other fields of `specs.LoadRequest`.
    """
    request = LoadRequest(device_map=device_map, max_memory=max_memory, **options)
    if isinstance(model, nn.Module):
        return plan_model(model, request)
    found = describe(model)
    return _plan(found.spec, request, found.needs, found.repository.config)


def estimate(model: nn.Module | Name, workload: Workload | None = None, dtype: Any = None) -> Estimate:
    """What a model takes: its weights, and what a request remembers and computes with. No weights are read.

    Args:
        model: a module, which may be on the meta device; or a name on the Hub, or a folder.
        workload: None: the one in force (`hf_bigload.workload`), else the default one.
        dtype: what floating weights are loaded in (torch.bfloat16, or its name); None: as they are, or as the library
            chooses it.

    Raises:
        RepositoryError, CheckpointError, DtypeError: see `describe.describe`.
    """
    asked = workload or settings.current().workload or Workload()
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    if not isinstance(model, nn.Module):
        if os.path.exists(model) and not os.path.exists(os.path.join(model, CONFIG_NAME)):
            return Estimate(os.fspath(model), _spec_of_files(model, name), Needs(asked))
        found = describe(model, name)
        return Estimate(found.repository.name, found.spec, found.needs(asked))
    spec = model_spec(model, loaded_as=as_it_is if name is None else _cast_to(name))
    return Estimate(type(model).__name__, spec, needs_of(model, spec, asked))


def _spec_of_files(path: Name, dtype: str | None) -> ModelSpec:
    """A checkpoint that has no config: what its headers say."""
    entries = open_checkpoint(path).entries
    stored = {name: TensorSpec(name, e.nbytes, e.dtype, e.shape) for name, e in entries.items()}
    return spec_from_headers(stored, dtype)


def _cast_to(name: str) -> LoadedAs:
    if name not in FLOATING:
        raise DtypeError(f"Weights cannot be loaded in dtype {name!r}: choose one of {', '.join(FLOATING)}.")
    dtype: torch.dtype = getattr(torch, name)
    return lambda leaf, t: (name, t.numel() * dtype.itemsize) if t.is_floating_point() else as_it_is(leaf, t)
