"""One architecture, loaded plainly and loaded over little memory: every bit of what it computes has to agree."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

import hf_bigload
from hf_bigload.dispatch import ring
from hf_bigload.specs import CPU, DISK

from .patches import GENERATE, PROMPTS
from .tiny import Architecture, tiny_inputs, tiny_model

NEW_TOKENS = 5
SHARDS = 8
BUDGET = 0.4
"""Of a model's bytes, allowed in RAM: resident weights and what the others stream through."""

ON_DISK, ALTERNATE = "disk", "alternate"
"""Nothing in RAM; every second weight in it, so that the weights of one block rest in two places."""

EQUAL = ""


@dataclass
class Computed:
    """What a model says to an input, and what it continues it with."""

    outputs: dict[str, torch.Tensor]
    tokens: torch.Tensor | None


@dataclass
class Record:
    """How one architecture fared. `differences` is by placement; an empty string says that there is none."""

    name: str
    model: str
    nbytes: int = 0
    not_built: str = ""
    generates: bool = False
    differences: dict[str, str] = field(default_factory=dict)

    @property
    def equal(self) -> bool:
        return not self.not_built and all(found == EQUAL for found in self.differences.values())


@dataclass(frozen=True)
class Case:
    """An architecture whose tiny model lies in `folder`, and how it is to be loaded."""

    which: Architecture
    folder: Path
    engine: str
    dtype: torch.dtype
    budget: float

    @property
    def ours(self) -> bool:
        return self.engine == "hf_bigload"

    @property
    def placements(self) -> tuple[str, ...]:
        budgeted = f"{self.budget:.0%}"
        return (budgeted, ON_DISK, ALTERNATE) if self.ours else (budgeted,)

    def load(self, **placed: Any) -> PreTrainedModel:
        return self.which.auto.from_pretrained(self.folder, dtype=self.dtype, **placed).eval()


def compare(
    which: Architecture,
    folder: Path,
    engine: str = "hf_bigload",
    dtype: torch.dtype = torch.float32,
    budget: float = BUDGET,
) -> Record:
    """Save a random fp32 model to `folder`, load it plainly and under each placement, and compare.

    Args:
        engine: "hf_bigload", or "stock": the same calls with Transformers and Accelerate alone, at the budget only.
        dtype: what it is loaded in.
        budget: of its bytes, allowed in RAM in the first placement.
    """
    record = Record(which.name, which.model_class.__name__)
    case = Case(which, folder, engine, dtype, budget)
    with _reproducible():
        try:
            _save(case)
            plain = case.load()
            expected = compute(which, plain)
            _require_finite(expected)
        except Exception as error:  # noqa: BLE001  the library's, for whatever reason: nothing to compare
            record.not_built = _told(error)
            return record
        record.nbytes = bytes_of(plain)
        record.generates = expected.tokens is not None
        for placement in case.placements:
            record.differences[placement] = _difference(case, placement, plain, expected)
    return record


def _save(case: Case) -> None:
    model = tiny_model(case.which)
    model.save_pretrained(case.folder, max_shard_size=max(1000, bytes_of(model) // SHARDS))


def bytes_of(model: torch.nn.Module) -> int:
    """Of its weights, tied ones once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def compute(which: Architecture, model: Any) -> Computed:
    """A forward, and a greedy continuation where the library can generate with this model."""
    inputs = tiny_inputs(which, model)
    torch.manual_seed(0)  # some draw inside their forward
    outputs = dict(_tensors("", dict(model(**inputs))))
    options = GENERATE.get(which.name, {})
    if options is None or not model.can_generate():
        return Computed(outputs, None)
    prompt = {name: value for name, value in inputs.items() if not name.startswith("decoder_")}
    prompt["input_ids"] = prompt["input_ids"][:, : PROMPTS.get(which.name)]
    length = dict(max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
    torch.manual_seed(0)
    return Computed(outputs, model.generate(**prompt, **length, **options))


def _tensors(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _tensors(f"{name}.{key}" if name else str(key), inner)
    elif isinstance(value, list | tuple):
        for position, inner in enumerate(value):
            yield from _tensors(f"{name}[{position}]", inner)


def _require_finite(computed: Computed) -> None:
    """Not-a-numbers would be equal to nothing, and would hide what a poisoned slot leaves."""
    for name, tensor in computed.outputs.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"output {name} of the tiny model is not finite")


# ---------------------------------------------------------------- the comparison


def _difference(case: Case, placement: str, plain: PreTrainedModel, expected: Computed) -> str:
    try:
        with hf_bigload.enable() if case.ours else contextlib.nullcontext():
            model = case.load(**_placed(case, placement, plain))
        found = _outputs_differ(expected, compute(case.which, model))
        if case.ours:
            found = found or _weights_differ(plain, model) or _outputs_differ(expected, compute(case.which, model))
            found = found or _misplaced(case, placement, model, bytes_of(plain))
        return found
    except Exception as error:  # noqa: BLE001  the record is what is wanted of it
        return _told(error)


def _placed(case: Case, placement: str, plain: PreTrainedModel) -> dict[str, Any]:
    if placement == ON_DISK:
        return {"device_map": {"": DISK}}
    if placement == ALTERNATE:
        return {"device_map": {"": CPU, **_every_second_on_disk(plain)}}
    return {
        "device_map": "auto",
        "max_memory": {CPU: int(bytes_of(plain) * case.budget)},
        "offload_folder": str(case.folder / "offload"),
    }


def _every_second_on_disk(model: PreTrainedModel) -> dict[str, str]:
    """Tied names go together."""
    order = {id(parameter): position for position, parameter in enumerate(model.parameters())}
    named = model.named_parameters(remove_duplicate=False)
    return {name: DISK for name, parameter in named if order[id(parameter)] % 2}


def _misplaced(case: Case, placement: str, model: PreTrainedModel, nbytes: int) -> str:
    """A comparison of two models in RAM would prove nothing."""
    plan, budget = hf_bigload.inspect(model).plan, int(nbytes * case.budget)
    if DISK not in plan.devices:
        return "equal, but nothing rests on disk"
    if placement not in (ON_DISK, ALTERNATE) and plan.used[CPU] > budget:
        return f"equal, but the plan uses {plan.used[CPU]} bytes of RAM and the budget is {budget}"
    return EQUAL


def _outputs_differ(expected: Computed, got: Computed) -> str:
    if expected.outputs.keys() != got.outputs.keys():
        return f"outputs: {sorted(expected.outputs.keys() ^ got.outputs.keys())} only in one"
    for name, tensor in expected.outputs.items():
        if not same_bits(tensor, got.outputs[name]):
            return f"output {name}: {_how_far(tensor, got.outputs[name])}"
    if expected.tokens is not None and (got.tokens is None or not same_bits(expected.tokens, got.tokens)):
        return f"generate: {expected.tokens.tolist()} became {got.tokens.tolist() if got.tokens is not None else None}"
    return EQUAL


def _weights_differ(plain: PreTrainedModel, model: PreTrainedModel) -> str:
    expected, got = plain.state_dict(), model.state_dict()
    if list(expected) != list(got):
        return f"state_dict: {sorted(expected.keys() ^ got.keys())} only in one, or another order"
    expected |= dict(plain.named_buffers())
    got |= dict(model.named_buffers())
    on_meta = [name for name, tensor in (*got.items(), *model.named_parameters()) if tensor.is_meta]
    if on_meta:
        return f"on the meta device: {on_meta[:5]}"
    different = [name for name, tensor in expected.items() if name not in got or not same_bits(tensor, got[name])]
    return f"weights: {different[:5]}" if different else EQUAL


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in shape, dtype and every bit (zeros of either sign, and not-a-numbers, included)."""
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    return torch.equal(_bits(a), _bits(b))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _how_far(expected: torch.Tensor, got: torch.Tensor) -> str:
    if expected.shape != got.shape or expected.dtype != got.dtype:
        return f"{tuple(expected.shape)} {expected.dtype} became {tuple(got.shape)} {got.dtype}"
    wrong = (expected != got).sum().item()
    return f"{wrong} of {expected.numel()} differ, by up to {(expected - got).abs().max().item():.3g}"


def _told(error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {str(error)[:400]} [{Path(last.filename).name}:{last.lineno}]"


@contextlib.contextmanager
def _reproducible() -> Iterator[None]:
    """One thread, no gradients, slots that do not keep what they held, a quiet library; all as before, afterwards."""
    threads, verbosity = torch.get_num_threads(), logging.get_verbosity()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with torch.no_grad(), torch.random.fork_rng(), mock.patch.object(ring, "POISON", True):
            yield
    finally:
        torch.set_num_threads(threads)
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
