"""Several models planned as one: the components of a pipeline, which run one after another and share one budget.

Their blocks are joined under the components' names, placed together, and each component gets back its part of the
plan. The rings are common to all of them: what one component has streamed is gone when the next one runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from .planner import MapValue, device_map_of, resting
from .specs import BlockSpec, ModelSpec, Placement, Plan


def called(spec: ModelSpec, calls: int) -> ModelSpec:
    """`spec`, each of whose blocks runs `calls` times per request."""
    return ModelSpec(tuple(_called(block, calls) for block in spec.blocks), spec.ties)


def joined(components: Mapping[str, ModelSpec]) -> ModelSpec:
    """All components as one model, whose names begin with a component's name and a dot."""
    blocks = [_renamed(block, f"{name}.") for name, spec in components.items() for block in spec.blocks]
    ties = {
        f"{name}.{tied}": f"{name}.{owner}" for name, spec in components.items() for tied, owner in spec.ties.items()
    }
    return ModelSpec(tuple(blocks), ties)


def part_of(plan: Plan, component: str, map_value: MapValue = str) -> Plan:
    """What a plan of `joined` components says of one of them, with its own names.

    `used` is what this component has at rest, and the rings, which are common to all.
    """
    prefix = f"{component}."
    placements = tuple(_unprefixed(p, prefix) for p in plan.placements if _is_below(p.block, prefix))
    ties = {
        tied.removeprefix(prefix): owner.removeprefix(prefix)
        for tied, owner in plan.ties.items()
        if tied.startswith(prefix)
    }
    return replace(
        plan,
        placements=placements,
        device_map=device_map_of(placements, ties, plan.main_device, map_value),
        used=_with(plan.ring, resting(placements, plan.offload_buffers)),
        ties=ties,
        predicted=(),
    )


def _with(ring: Mapping[str, int], at_rest: Mapping[str, int]) -> dict[str, int]:
    return {device: ring.get(device, 0) + at_rest.get(device, 0) for device in {**ring, **at_rest}}


def _called(block: BlockSpec, calls: int) -> BlockSpec:
    return replace(block, calls=calls, parts=tuple(_called(part, calls) for part in block.parts))


def _is_below(block: BlockSpec, prefix: str) -> bool:
    return f"{block.name}.".startswith(prefix)


def _renamed(block: BlockSpec, prefix: str) -> BlockSpec:
    """`block` as a part of something; the block of a whole model is named as the component is."""

    def longer(name: str) -> str:
        return f"{prefix}{name}" if name else prefix[:-1]

    return replace(
        block,
        name=longer(block.name),
        tensors=tuple(replace(t, name=prefix + t.name) for t in block.tensors),
        parts=tuple(_renamed(part, prefix) for part in block.parts),
        borrows=tuple(prefix + name for name in block.borrows),
        part_of=None if block.part_of is None else longer(block.part_of),
    )


def _unprefixed(placement: Placement, prefix: str) -> Placement:
    exceptions = {name.removeprefix(prefix): home for name, home in placement.exceptions.items()}
    return replace(placement, block=_shortened(placement.block, prefix), exceptions=exceptions)


def _shortened(block: BlockSpec, prefix: str) -> BlockSpec:
    def shorter(name: str) -> str:
        return f"{name}.".removeprefix(prefix).removesuffix(".")

    return replace(
        block,
        name=shorter(block.name),
        tensors=tuple(replace(t, name=t.name.removeprefix(prefix)) for t in block.tensors),
        parts=tuple(_shortened(part, prefix) for part in block.parts),
        borrows=tuple(name.removeprefix(prefix) for name in block.borrows),
        part_of=None if block.part_of is None else shorter(block.part_of),
    )
