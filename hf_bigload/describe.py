"""A model that is not loaded: its blocks and their bytes, from its config and the headers of its files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby

from . import registry
from .checkpoint.repository import CONFIG_NAME, Repository, open_repository
from .errors import DtypeError, RepositoryError
from .estimate import bound
from .specs import DTYPE_BYTES, BlockSpec, ModelSpec, Needs, TensorSpec, Workload

FLOATING = ("float16", "bfloat16", "float32", "float64")
"""Dtypes that a load casts from and to."""


@dataclass(frozen=True)
class Description:
    """A repository, and the model that a load would make of it."""

    repository: Repository
    spec: ModelSpec
    from_class: bool
    """Whether the model's class said so. Else tensors are as the files have them, cut into blocks by their names."""
    needs: Callable[[Workload], Needs] = field(compare=False, repr=False)
    """What a request takes beside the weights: traced, or bounded where there are headers only."""

    @property
    def dtype(self) -> str:
        """The dtype that most of the bytes have."""
        sizes: Counter[str] = Counter()
        for block in self.spec.blocks:
            for tensor in block.tensors:
                sizes[tensor.dtype] += tensor.nbytes
        return max(sizes, key=lambda name: sizes[name], default="float32")


def describe(name: str | os.PathLike[str], dtype: str | None = None, revision: str | None = None) -> Description:
    """The model in a folder or on the Hub, as it will be once loaded. No weights are downloaded or read.

    Args:
        dtype: what weights are loaded in, as "bfloat16"; None: as the library chooses it.

    Raises:
        RepositoryError, CheckpointError, DtypeError: see `checkpoint.repository.open_repository`; or what the model
            holds can be known neither from its class nor from headers; or weights cannot be loaded in `dtype`.
    """
    if dtype is not None and dtype not in FLOATING:
        raise DtypeError(f"Weights cannot be loaded in dtype {dtype!r}: choose one of {', '.join(FLOATING)}.")
    repository = open_repository(name, revision)
    described = registry.describe(repository.folder, repository.stored, dtype)
    if described is not None:
        return Description(repository, described.spec, from_class=True, needs=described.needs)
    if repository.is_pipeline:
        kind = repository.config.get("_class_name", "of no class")
        raise RepositoryError(
            f"{repository.name}: it is a pipeline of several models ({kind}), and no installed library makes them. "
            f"Install or update diffusers, or name the folder of one of them, with a {CONFIG_NAME}."
        )
    if repository.stored is None:
        kind = repository.config.get("model_type", "without a model_type")
        raise RepositoryError(
            f"{repository.name} has no safetensors headers to read sizes from, and no installed library makes a model "
            f"of its config ({kind}). Install or update transformers, or use a safetensors version of this model."
        )
    spec = spec_from_headers(repository.stored, dtype)
    config = repository.config
    return Description(repository, spec, from_class=False, needs=lambda workload: bound(spec, workload, config))


def spec_from_headers(stored: Mapping[str, TensorSpec], dtype: str | None = None) -> ModelSpec:
    """The tensors of some files as blocks: what is numbered in their names (`layers.3`) is taken for a block."""
    tensors = [_cast(tensor, dtype) for tensor in stored.values()]
    ordered = sorted(tensors, key=lambda tensor: _natural(_block_of(tensor.name)))
    return ModelSpec(tuple(_block(name, group) for name, group in groupby(ordered, key=lambda t: _block_of(t.name))))


def _cast(tensor: TensorSpec, dtype: str | None) -> TensorSpec:
    if dtype is None or tensor.dtype not in FLOATING:
        return tensor
    return replace(tensor, dtype=dtype, nbytes=tensor.nbytes // DTYPE_BYTES[tensor.dtype] * DTYPE_BYTES[dtype])


def _block_of(name: str) -> str:
    parts = name.split(".")
    numbered = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    return ".".join(parts[:-1] if numbered is None else parts[: numbered + 1])


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """layers.2 before layers.10."""
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in name.split(".")]


def _block(name: str, tensors: Iterable[TensorSpec]) -> BlockSpec:
    def owner(tensor: TensorSpec) -> str:
        return tensor.name.rpartition(".")[0]

    inside = sorted(tensors, key=owner)
    parts = tuple(
        BlockSpec(each, tuple(group), whole=False, part_of=name) for each, group in groupby(inside, key=owner)
    )
    if len(parts) == 1 and parts[0].name == name:
        return replace(parts[0], part_of=None)
    return BlockSpec(name, tuple(inside), whole=True, parts=parts)
