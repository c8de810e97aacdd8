"""Calls that are not ours go through untouched, and what is ours stays in its own call and its own thread."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    BertModel,
    EncoderDecoderModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    modeling_utils,
)
from transformers.generation import utils as generation_utils
from transformers.integrations import accelerate as integration

import hf_bigload
from hf_bigload import flow
from hf_bigload.dispatch.attach import attachment_of
from hf_bigload.errors import SeamMovedWarning

from .models import BUDGETED, CONFIGS, ON_DISK, Saved, assert_same_model, forward, same

BERT: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The class of every model that was planned for."""
    made: list[str] = []
    original = flow.plan_model

    def plan_model(model: Any, *args: Any, **kwargs: Any) -> Any:
        made.append(type(model).__name__)
        return original(model, *args, **kwargs)

    monkeypatch.setattr(flow, "plan_model", plan_model)
    return made


# ---------------------------------------------------------------- not ours


def test_without_a_device_map_a_load_is_the_librarys(llama: Saved, plans: list[str], plain: Any) -> None:
    model = llama.load()
    assert plans == [] and attachment_of(model) is None
    assert not hasattr(model, "hf_device_map")
    assert_same_model(model, plain("llama"))


@pytest.mark.parametrize(
    "argument",
    [{"tp_plan": "auto"}, {"tp_size": 2}, {"device_mesh": object()}, {"distributed_config": object()}],
    ids=lambda argument: next(iter(argument)),
)
def test_tensor_parallelism_is_the_librarys(
    argument: dict[str, Any], llama: Saved, plans: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It needs several processes, so it is enough to see that its own code is reached, and in the same way."""
    if "device_mesh" not in argument:
        reached = RuntimeError("the library's own code")

        def prepare(*args: Any, **kwargs: Any) -> None:
            raise reached

        monkeypatch.setattr(PreTrainedModel, "prepare_distribute_model", prepare)
        with pytest.raises(RuntimeError, match="the library's own code"):
            llama.load(device_map="auto", **argument)
    else:
        assert attachment_of(llama.load(device_map={"": "cpu"}, **argument)) is None
    assert plans == []


@pytest.mark.parametrize("predicate", ["is_deepspeed_zero3_enabled", "is_fsdp_enabled"])
def test_sharded_training_is_the_librarys(
    predicate: str, llama: Saved, plans: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(integration, "is_accelerate_available", lambda: asked.append(True) or True)
    with hf_bigload.enable():
        monkeypatch.setattr(modeling_utils, predicate, lambda: True)
        modeling_utils.check_and_set_device_map("auto")
    assert plans == [] and asked == [True]


@pytest.mark.parametrize("device_map", ["meta", {"": "meta"}, torch.device("meta")])
def test_a_model_without_weights_is_the_librarys(device_map: Any, llama: Saved, plans: list[str]) -> None:
    model = llama.load(device_map=device_map)
    assert plans == []
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_config_alone_is_not_ours(llama: Saved, plans: list[str]) -> None:
    with hf_bigload.enable(), torch.device("cpu"):
        AutoModelForCausalLM.from_config(CONFIGS["llama"])
    assert plans == []


# ---------------------------------------------------------------- defaults


def test_the_device_map_of_enable_counts_where_a_call_names_none(llama: Saved, plain: Any) -> None:
    with hf_bigload.enable(device_map="auto", max_memory={"cpu": int(0.4 * llama.nbytes)}):
        model = llama.auto.from_pretrained(llama.folder)
        own = llama.auto.from_pretrained(llama.folder, device_map="cpu", max_memory={"cpu": "1GB"})
    assert "disk" in model.hf_device_map.values()
    assert attachment_of(own) is None
    assert_same_model(model, plain("llama"))


@pytest.mark.parametrize("argument", [{"tp_plan": "auto"}, {"distributed_config": object()}])
def test_the_device_map_of_enable_leaves_parallel_calls_alone(
    argument: dict[str, Any], llama: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def prepare(config: Any, device_map: Any = None, **kwargs: Any) -> None:
        seen.append(device_map)
        raise RuntimeError("reached")

    monkeypatch.setattr(PreTrainedModel, "prepare_distribute_model", prepare)
    with hf_bigload.enable(device_map="auto"), pytest.raises(RuntimeError, match="reached"):
        llama.auto.from_pretrained(llama.folder, **argument)
    assert seen == [None]


# ---------------------------------------------------------------- calls inside calls


class Outer(PreTrainedModel):
    """Its `__init__` loads a part of it: a call without a device map, inside one that has one."""

    config_class = GPT2Config
    inner_folder: Path
    inner_was_claimed: bool

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        self.before = torch.nn.Linear(32, 32)
        with torch.device("cpu"):
            self.inner = GPT2LMHeadModel.from_pretrained(self.inner_folder)
        type(self).inner_was_claimed = hasattr(self.inner, "hf_device_map")
        self.after = torch.nn.Linear(128, 32)
        self.post_init()

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.after(self.inner(input_ids).logits) @ self.before.weight,)


def test_a_load_inside_a_load_does_not_inherit_the_claim(saved: Any, tmp_path: Path, plans: list[str]) -> None:
    Outer.inner_folder = saved("gpt2").folder
    torch.manual_seed(0)
    Outer(GPT2Config.from_pretrained(saved("gpt2").folder)).save_pretrained(tmp_path)
    outer = Saved(tmp_path, Outer, saved("gpt2").nbytes)
    expected = outer.plain()
    model = outer.load(BUDGETED)
    assert plans == ["Outer"]
    assert not Outer.inner_was_claimed
    assert_same_model(model, expected)


def test_parts_of_a_model_are_claimed_each_for_itself(saved: Any, tmp_path: Path, plans: list[str]) -> None:
    config = BertConfig(**BERT)
    torch.manual_seed(0)
    BertModel(config).save_pretrained(tmp_path / "encoder")
    BertLMHeadModel(BertConfig(**BERT, is_decoder=True, add_cross_attention=True)).save_pretrained(tmp_path / "decoder")
    folders = (tmp_path / "encoder", tmp_path / "decoder")
    expected = EncoderDecoderModel.from_encoder_decoder_pretrained(*folders)
    with hf_bigload.enable():
        model = EncoderDecoderModel.from_encoder_decoder_pretrained(*folders, encoder_device_map={"": "disk"})
    assert plans == ["BertModel"]
    assert attachment_of(model.encoder) is not None and attachment_of(model.decoder) is None
    assert_same_model(model, expected)


# ---------------------------------------------------------------- threads


def in_threads(*jobs: Callable[[], Any]) -> list[Any]:
    """What each of `jobs` returned, run at the same time."""
    results: list[Any] = [None] * len(jobs)
    begin = threading.Barrier(len(jobs))

    def run(number: int, job: Callable[[], Any]) -> None:
        begin.wait()
        results[number] = job()

    threads = [threading.Thread(target=run, args=(i, job)) for i, job in enumerate(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_loads_at_the_same_time(saved: Any, plain: Any) -> None:
    """Stock loads disturb each other: tied weights stay on meta."""
    names, placements = ["llama", "gpt2", "t5", "llama"], [BUDGETED, ON_DISK, BUDGETED, ON_DISK]

    def load(name: str, placement: str) -> Any:
        return saved(name).auto.from_pretrained(saved(name).folder, **saved(name).placed(placement))

    for name in names:
        plain(name)
    with hf_bigload.enable():
        models = in_threads(*(functools.partial(load, *each) for each in zip(names, placements, strict=True)))
    for name, model in zip(names, models, strict=True):
        assert_same_model(model, plain(name))


def test_a_load_in_another_thread_is_not_claimed(
    llama: Saved, saved: Any, plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, others = flow.plan_model, []

    def plan_model(*args: Any, **kwargs: Any) -> Any:
        others.extend(in_threads(lambda: GPT2LMHeadModel.from_pretrained(saved("gpt2").folder)))
        return original(*args, **kwargs)

    monkeypatch.setattr(flow, "plan_model", plan_model)
    model = llama.load(BUDGETED)
    assert attachment_of(model) is not None and attachment_of(others[0]) is None
    assert_same_model(others[0], plain("gpt2"))


def test_one_model_in_several_threads(llama: Saved, plain: Any) -> None:
    model, wanted = llama.load(BUDGETED), forward(plain("llama"))
    assert all(same(found, wanted) for found in in_threads(*[lambda: forward(model)] * 4))


# ---------------------------------------------------------------- on and off

PATCHED = (modeling_utils, generation_utils, integration, PreTrainedModel, modeling_utils.ModuleUtilsMixin)


def attributes() -> list[dict[str, Any]]:
    return [dict(vars(owner)) for owner in PATCHED]


def test_disable_puts_every_attribute_back() -> None:
    before = attributes()
    with hf_bigload.enable():
        assert attributes() != before
    after = attributes()
    for owner, was, is_now in zip(PATCHED, before, after, strict=True):
        assert was.keys() == is_now.keys(), owner
        assert [name for name in was if was[name] is not is_now[name]] == []


def test_a_model_goes_on_working_after_disable(saved: Any, plain: Any, tmp_path: Path) -> None:
    hf_bigload.enable()
    model = saved("t5").auto.from_pretrained(saved("t5").folder, **saved("t5").placed(BUDGETED))
    hf_bigload.disable()
    assert_same_model(model, plain("t5"))
    model.save_pretrained(tmp_path)
    assert_same_model(Saved(tmp_path, saved("t5").auto, 0).plain(), plain("t5"))
    model.resize_token_embeddings(150)
    assert model.generate(torch.arange(3, 9)[None], max_new_tokens=3).shape[0] == 1
    model.to("cpu")
    assert forward(model).shape[-1] == 150


# ---------------------------------------------------------------- a seam that moved


def _gone(patch: pytest.MonkeyPatch) -> str:
    patch.delattr(modeling_utils, "_get_device_map")
    return "_get_device_map"


def _with_other_parameters(patch: pytest.MonkeyPatch) -> str:
    patch.setattr(modeling_utils, "accelerate_dispatch", lambda model, quantizer, device_map: None)
    return "accelerate_dispatch"


def _no_property_any_more(patch: pytest.MonkeyPatch) -> str:
    patch.setattr(modeling_utils.ModuleUtilsMixin, "device", torch.device("cpu"))
    return "ModuleUtilsMixin.device"


@pytest.mark.parametrize("move", [_gone, _with_other_parameters, _no_property_any_more])
def test_a_moved_seam_is_named_and_nothing_is_patched(move: Any, llama: Saved, plain: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        named = move(patch)
        before = attributes()
        with pytest.warns(SeamMovedWarning, match=rf"transformers [\d.]+ has moved .*:{named} .*stock behaviour"):
            hf_bigload.enable()
        assert attributes() == before
        if move is _with_other_parameters:  # which the library calls only for several devices
            assert attachment_of(llama.auto.from_pretrained(llama.folder, device_map="auto")) is None
        hf_bigload.disable()
    assert_same_model(llama.load(BUDGETED), plain("llama"))
