"""A Transformers checkpoint into a Transformers skeleton: the library's names and conversions, our reads.

The library says which checkpoint key becomes which weight, and converts what its layout fuses or splits. Plain tensors
never pass through a conversion: they are used from where they lie.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import core_model_loading as library
from transformers.utils import logging
from transformers.utils.loading_report import LoadStateDictInfo

from ..checkpoint.index import build_index
from ..materialize import Materializer
from ..specs import CheckpointIndex, TensorEntry

Read = Callable[[str], torch.Tensor]


@dataclass
class Source:
    """Where checkpoint keys get their values: the files of an index, or tensors in memory."""

    index: CheckpointIndex
    in_memory: Mapping[str, torch.Tensor]

    @classmethod
    def open(
        cls, state_dict: Mapping[str, torch.Tensor] | None, files: list[str] | None, materializer: Materializer
    ) -> Source:
        """Index `files`, reading headers only; a file in torch's old format, which has no offsets, is loaded whole."""
        if state_dict is not None:
            return cls(CheckpointIndex({}, {}), state_dict)
        if not files:
            raise ValueError("Neither a state dict nor checkpoint files were found.")
        return cls(*materializer.with_legacy_files(build_index(files)))

    def sorted_keys(self) -> list[str]:
        """In the library's order: conversions collect their inputs as they come."""
        return sorted({*self.index, *self.in_memory}, key=library.dot_natural_key)

    def entry(self, key: str) -> TensorEntry | None:
        return None if key in self.in_memory else self.index[key]

    def shape(self, key: str) -> tuple[int, ...]:
        entry = self.entry(key)
        return tuple(self.in_memory[key].shape) if entry is None else entry.shape


@dataclass
class Assignment:
    """Which checkpoint key becomes which weight."""

    plain: dict[str, str] = field(default_factory=dict)
    """Weight -> key."""
    converted: list[tuple[str, str, str]] = field(default_factory=list)
    """(key, first weight, the pattern of the converter that takes it)."""


def load_weights(model: Any, source: Source, load_config: Any, materializer: Materializer) -> LoadStateDictInfo:
    """Fill `model` from `source`; what is missing, unexpected or mismatched is reported as the library reports it."""
    return _Loading(model, source, load_config, materializer).run()


class _Arrived:
    """The progress bar: it counts what has its values, not what was asked for."""

    def __init__(self, materializer: Materializer, progress: Any) -> None:
        self.materializer, self.progress = materializer, progress
        self.begun = self.shown = 0

    def one_more(self) -> None:
        self.begun += 1
        self._show(self.materializer.collect())

    def wait_for_all(self) -> None:
        while under_way := self.materializer.collect(wait=True):
            self._show(under_way)
        self._show(0)
        self.materializer.finish()

    def _show(self, under_way: int) -> None:
        arrived = self.begun - under_way - self.shown
        if arrived > 0:
            self.progress.update(arrived)
            self.shown += arrived


class _Loading:
    def __init__(self, model: Any, source: Source, load_config: Any, materializer: Materializer) -> None:
        self.model, self.source, self.materializer = model, source, materializer
        self.skeleton: dict[str, Any] = model.state_dict()
        mapping = load_config.weight_mapping or []
        self.mapping = mapping
        self.renamings = [m for m in mapping if isinstance(m, library.WeightRenaming)]
        self.converters = [m for m in mapping if isinstance(m, library.WeightConverter)]
        self.by_pattern = {pattern: c for c in self.converters for pattern in c.source_patterns}
        self.dtype_of = dtype_rule(self.skeleton, load_config.dtype_plan or {})
        self.info = LoadStateDictInfo(
            missing_keys=set(self.skeleton),
            unexpected_keys=set(),
            mismatched_keys=set(),
            conversion_errors={},
            error_msgs=[],
            skipped_pp_keys=set(),
        )

    def run(self) -> LoadStateDictInfo:
        assigned = self._assign()
        groups = self._groups(assigned.converted)
        try:
            with logging.tqdm(total=len(assigned.plain) + len(groups), desc="Loading weights") as progress:
                self._load_all(assigned.plain, groups, _Arrived(self.materializer, progress))
        except BaseException:
            self.materializer.abandon()
            raise
        self.model._weight_conversions = [m for m in self.mapping if m.was_used()]
        return self.info

    def _load_all(self, plain: dict[str, str], groups: dict[str, Any], arrived: _Arrived) -> None:
        for name, key in plain.items():
            self._load_plain(name, key)
            arrived.one_more()
        while groups:  # each conversion is dropped with the tensors it collected, before the next one begins
            first = next(iter(groups))
            self._convert(first, groups.pop(first))
            arrived.one_more()
        arrived.wait_for_all()

    # ---------------------------------------------------------------- names

    def _assign(self) -> Assignment:
        assigned = Assignment()
        for key in self.source.sorted_keys():
            name, pattern = self._rename(key)
            if name in self.skeleton:
                if pattern is None:
                    assigned.plain.setdefault(name, key)
                else:
                    assigned.converted.append((key, name, pattern))
            else:
                self._unmatched(name, pattern)
        return assigned

    def _rename(self, key: str) -> tuple[str, str | None]:
        prefix = self.model.base_model_prefix
        name, pattern = library.rename_source_key(key, self.renamings, self.converters, prefix, self.skeleton)
        if name not in self.skeleton and key in self.skeleton:  # renamed without need
            name, pattern = library.rename_source_key(
                key, [], [], base_model_prefix=prefix, meta_state_dict=self.skeleton
            )
        return name, pattern

    def _unmatched(self, name: str, pattern: str | None) -> None:
        targets = [""] if pattern is None else self.by_pattern[pattern].target_patterns
        for target in targets:
            full = name.replace(targets[0], target) if pattern is not None else name
            library._add_unmatched_checkpoint_key(full, self.model, self.info)

    # ---------------------------------------------------------------- values

    def _load_plain(self, name: str, key: str) -> None:
        wanted = self.skeleton[name]
        if not torch.is_tensor(wanted):  # a module's extra state
            self._set(name, self._read(key))
            return
        shape = self.source.shape(key)
        if shape != tuple(wanted.shape):
            self.info.missing_keys.discard(name)
            self.info.mismatched_keys.add((name, torch.Size(shape), wanted.shape))  # type: ignore[arg-type]
            return
        entry = self.source.entry(key)
        dtype = self.dtype_of(name)
        if entry is None:
            self._set(name, self.materializer.place(name, self.source.in_memory[key], dtype))
        else:
            self._set(name, self.materializer.load(name, entry, dtype))

    def _read(self, key: str) -> torch.Tensor:
        entry = self.source.entry(key)
        return self.source.in_memory[key] if entry is None else self.materializer.source(entry)

    def _groups(self, converted: list[tuple[str, str, str]]) -> dict[str, Any]:
        """The library's converters, one for each weight they make, with their inputs to be read when they run."""
        groups: dict[str, Any] = {}
        for key, name, pattern in converted:
            converter = groups.setdefault(name, copy.deepcopy(self.by_pattern[pattern]))
            converter.add_tensor(name, key, pattern, functools.partial(self._read_as, key, self.dtype_of(name)))
        return groups

    def _read_as(self, key: str, dtype: torch.dtype) -> torch.Tensor:
        return self._read(key).to(dtype)

    def _convert(self, first: str, converter: Any) -> None:
        try:
            made = converter.convert(first, model=self.model, config=self.model.config, loading_info=self.info)
        except library.SkipParameters:  # the library has noted the error in `info`, and goes on
            return
        for name in list(made):
            value = made.pop(name)
            value = value[0] if isinstance(value, list) else value
            self._set(name, self.materializer.place(name, value, packed=True))

    def _set(self, name: str, value: torch.Tensor) -> None:
        library.set_param_for_module(self.model, name, value, self.info, None)  # type: ignore[arg-type]


def dtype_rule(skeleton: Mapping[str, Any], dtype_plan: Mapping[str, torch.dtype]) -> Callable[[str], torch.dtype]:
    """Which dtype a weight is loaded in: what the library's plan keeps in fp32, else what the skeleton has."""
    if not dtype_plan:
        return lambda name: skeleton[name].dtype
    pattern, names, _ = library.build_glob_alternation(list(dtype_plan))

    def rule(name: str) -> torch.dtype:
        match = pattern.search(name)
        return skeleton[name].dtype if match is None else dtype_plan[names[str(match.lastgroup)]]

    return rule


def reverted_in_groups(
    revert: Callable[[Any, dict[str, Any]], dict[str, Any]],
    model: Any,
    state_dict: dict[str, torch.Tensor],
    keep: Callable[[str, torch.Tensor], torch.Tensor],
) -> dict[str, torch.Tensor]:
    """The library's reversal of its conversions for saving, one group of weights at a time.

    `revert` is the library's function over a whole state dict, whose results would all be in RAM at once; here each
    converted tensor is handed to `keep`, and the result of that (a mapped view, say) is what stays.
    """
    result: dict[str, torch.Tensor] = {}
    for names in _convertible_groups(model, state_dict):
        part = {name: state_dict[name] for name in names}
        given = {(tensor.data_ptr(), tensor.shape) for tensor in part.values()}
        for name, tensor in revert(model, part).items():
            result[name] = tensor if (tensor.data_ptr(), tensor.shape) in given else keep(name, tensor)
    return result


def _convertible_groups(model: Any, state_dict: Mapping[str, Any]) -> Iterator[list[str]]:
    """Names that the library has to see together to revert a conversion."""
    conversions = [c.reverse_transform() for c in reversed(getattr(model, "_weight_conversions", None) or [])]
    converters = [c for c in conversions if isinstance(c, library.WeightConverter)]
    groups: dict[str, list[str]] = {}
    for name in sorted(state_dict, key=library.dot_natural_key):
        target, _pattern = library.apply_converters(name, converters)
        groups.setdefault(target, []).append(name)
    yield from groups.values()
