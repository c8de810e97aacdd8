"""An offloaded model in its user's hands behaves as a resident one."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import hf_bigload
from hf_bigload.dispatch import attach
from hf_bigload.errors import DoesNotFitError

from .models import (
    BUDGETED,
    CONFIGS,
    OFFLOADED,
    ON_DISK,
    PLACEMENTS,
    Saved,
    all_tensors,
    assert_same_model,
    forward,
    generate,
    new_model,
    prompt,
    same,
)

STRATEGIES: dict[str, dict[str, Any]] = {
    "sampled": {"do_sample": True, "temperature": 0.7, "top_k": 20},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("placement", OFFLOADED)
@pytest.mark.parametrize("name", CONFIGS)
def test_generate(name: str, placement: str, saved: Any, plain: Any) -> None:
    assert same(generate(saved(name).load(placement)), generate(plain(name)))


@pytest.mark.parametrize("options", STRATEGIES.values(), ids=STRATEGIES)
@pytest.mark.parametrize("name", ["llama", "bart"])
def test_ways_to_generate(name: str, options: dict[str, Any], saved: Any, plain: Any) -> None:
    if "prompt_lookup_num_tokens" in options and name == "bart":
        pytest.skip("the library has it for decoders alone")
    assert same(generate(saved(name).load(BUDGETED), **options), generate(plain(name), **options))


@pytest.mark.parametrize("placement", OFFLOADED)
def test_generate_with_an_assistant(placement: str, llama: Saved, plain: Any) -> None:
    assistant = llama.load(placement)
    found = generate(llama.load(placement), assistant_model=assistant)
    assert same(found, generate(plain("llama"), assistant_model=llama.plain()))


# ---------------------------------------------------------------- what a model says of itself


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_figures(placement: str, dtype: torch.dtype, saved: Any, plain: Any) -> None:
    model, expected = saved("t5").load(placement, dtype=dtype), plain("t5", dtype)
    assert model.dtype == expected.dtype
    assert model.device == expected.device
    assert model.num_parameters() == expected.num_parameters()
    assert model.num_parameters(only_trainable=True, exclude_embeddings=True) == expected.num_parameters(
        only_trainable=True, exclude_embeddings=True
    )
    assert model.get_memory_footprint() == expected.get_memory_footprint()


@pytest.mark.parametrize("placement", OFFLOADED)
def test_weights_are_never_on_meta(placement: str, llama: Saved) -> None:
    model = llama.load(placement)
    assert all(not tensor.is_meta for _, tensor in all_tensors(model))
    forward(model)
    assert all(not tensor.is_meta for _, tensor in all_tensors(model))


@pytest.mark.parametrize("placement", OFFLOADED)
def test_weights_are_real_while_a_block_runs(placement: str, llama: Saved, plain: Any) -> None:
    """Of all blocks, seen from inside one of them."""
    model, expected, seen = llama.load(placement), dict(all_tensors(plain("llama"))), []

    def look(*_: Any) -> None:
        state = model.state_dict()
        seen.append([name for name in state if not same(state[name], expected[name])])

    model.model.layers[3].register_forward_hook(look)
    forward(model)
    assert seen == [[]]


# ---------------------------------------------------------------- state dicts


@pytest.mark.parametrize("placement", OFFLOADED)
def test_load_state_dict_replaces_the_weights_for_good(placement: str, saved: Any) -> None:
    other = new_model("gpt2")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    model = saved("gpt2").load(placement)
    forward(model)
    assert str(model.load_state_dict(other.state_dict())) == "<All keys matched successfully>"
    assert_same_model(model, other)


@pytest.mark.parametrize("placement", OFFLOADED)
def test_load_state_dict_by_assignment(placement: str, saved: Any) -> None:
    other = new_model("llama")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    model = saved("llama").load(placement)
    model.load_state_dict(other.state_dict(), assign=True)
    assert_same_model(model, other)


def test_a_state_dict_outlives_the_model(llama: Saved, plain: Any) -> None:
    state = llama.load(ON_DISK, dtype=torch.bfloat16).state_dict()
    expected = plain("llama", torch.bfloat16).state_dict()
    assert all(same(state[name], tensor) for name, tensor in expected.items())


# ---------------------------------------------------------------- copies


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", ["llama", "bart"])
def test_a_deep_copy_runs_and_is_independent(name: str, placement: str, saved: Any, plain: Any) -> None:
    model = saved(name).load(placement)
    forward(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.fill_(0.5)
    assert_same_model(model, plain(name))
    again = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    del model
    assert_same_model(again, plain(name))
    assert same(generate(again), generate(plain(name)))


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", ["llama", "bart"])
def test_a_pickled_model_is_unpickled_as_a_plain_one(name: str, placement: str, saved: Any, plain: Any) -> None:
    model = saved(name).load(placement)
    forward(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    for again in (pickle.loads(pickle.dumps(model)), torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)):
        assert_same_model(again, plain(name))
        assert same(generate(again), generate(plain(name)))
        with pytest.raises(ValueError, match="no plan"):
            hf_bigload.inspect(again)
    assert_same_model(model, plain(name))


# ---------------------------------------------------------------- moves and casts


@pytest.mark.parametrize("move", [lambda m: m.to("cpu"), lambda m: m.cpu(), lambda m: m.to(device=torch.device("cpu"))])
@pytest.mark.parametrize("placement", OFFLOADED)
def test_moving_to_the_cpu_brings_everything_into_memory(
    placement: str, move: Any, llama: Saved, plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama.load(placement)
    assert move(model) is model
    assert_same_model(model, plain("llama"))
    with pytest.raises(ValueError, match="no plan"):
        hf_bigload.inspect(model)
    assert not any(hasattr(module, "_hf_hook") for module in model.modules())


@pytest.mark.parametrize("placement", OFFLOADED)
def test_a_move_that_does_not_fit_is_refused_and_nothing_moves(
    placement: str, llama: Saved, plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama.load(placement)
    device_map = dict(model.hf_device_map)
    monkeypatch.setattr(attach, "free_ram", lambda: 100_000)
    with pytest.raises(DoesNotFitError, match=r"cannot move to cpu: .* are free there\. Nothing was moved"):
        model.to("cpu")
    assert model.hf_device_map == device_map
    before = hf_bigload.inspect(model).stats.bytes_read
    assert_same_model(model, plain("llama"))
    assert hf_bigload.inspect(model).stats.bytes_read > before  # still streaming


CASTS = {
    "half": (lambda m: m.half(), torch.float16),
    "bfloat16": (lambda m: m.bfloat16(), torch.bfloat16),
    "to": (lambda m: m.to(torch.float16), torch.float16),
    "to by name": (lambda m: m.to(dtype=torch.bfloat16), torch.bfloat16),
    "double": (lambda m: m.double(), torch.float64),
}


@pytest.mark.parametrize(("cast", "dtype"), CASTS.values(), ids=CASTS)
@pytest.mark.parametrize("placement", OFFLOADED)
def test_casts(placement: str, cast: Any, dtype: torch.dtype, llama: Saved) -> None:
    model, expected = cast(llama.load(placement)), cast(llama.plain())
    assert model.dtype == dtype
    assert_same_model(model, expected)


@pytest.mark.parametrize("placement", OFFLOADED)
def test_a_cast_forth_and_back(placement: str, llama: Saved) -> None:
    model, expected = llama.load(placement).half().float(), llama.plain().half().float()
    assert_same_model(model, expected)


@pytest.mark.parametrize("placement", OFFLOADED)
def test_train_and_eval(placement: str, saved: Any) -> None:
    model, expected = saved("gpt2").load(placement), saved("gpt2").plain()
    assert not model.training
    for each in (model, expected):
        each.train()
    torch.manual_seed(3)
    dropped = forward(model)
    torch.manual_seed(3)
    assert same(dropped, forward(expected))
    assert_same_model(model.eval(), expected.eval())


def test_moving_and_casting_at_once(llama: Saved) -> None:
    model, expected = llama.load(BUDGETED).to("cpu", torch.bfloat16), llama.plain().to("cpu", torch.bfloat16)
    assert_same_model(model, expected)


# ---------------------------------------------------------------- writes


def _in_place(parameter: nn.Parameter) -> None:
    parameter.mul_(2)


def _through_data(parameter: nn.Parameter) -> None:
    parameter.data.mul_(2)


def _by_data(parameter: nn.Parameter) -> None:
    parameter.data = parameter.data * 2


WRITES = {"in place": _in_place, "through .data": _through_data, "by .data": _by_data}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("run_before", [True, False])
@pytest.mark.parametrize("placement", OFFLOADED)
def test_a_write_is_kept_and_used(placement: str, run_before: bool, write: Any, llama: Saved) -> None:
    model, expected = llama.load(placement), llama.plain()
    if run_before:
        forward(model)
    for each in (model, expected):
        with torch.no_grad():
            for parameter in each.parameters():
                write(parameter)
    assert_same_model(model, expected)


@pytest.mark.parametrize("placement", OFFLOADED)
def test_a_replaced_parameter_is_used(placement: str, llama: Saved) -> None:
    model, expected = llama.load(placement), llama.plain()
    for each in (model, expected):
        for layer in each.model.layers:
            layer.mlp.up_proj.weight = nn.Parameter(layer.mlp.up_proj.weight.detach() * 2)
    assert_same_model(model, expected)


def test_writes_reach_neither_the_files_nor_another_load(llama: Saved, plain: Any) -> None:
    model = llama.load(ON_DISK)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_same_model(llama.load(ON_DISK), plain("llama"))


# ---------------------------------------------------------------- training


def gradients(model: nn.Module) -> dict[str, torch.Tensor | None]:
    model.zero_grad()
    inputs = {"input_ids": prompt(), "labels": prompt()}
    model(**inputs).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("placement", OFFLOADED)
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients(name: str, placement: str, saved: Any) -> None:
    found, expected = gradients(saved(name).load(placement)), gradients(saved(name).plain())
    assert [n for n in expected if not _same_gradient(found[n], expected[n])] == []


def _same_gradient(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is b if a is None or b is None else same(a, b)


@pytest.mark.parametrize("placement", OFFLOADED)
def test_gradient_checkpointing(placement: str, llama: Saved) -> None:
    model, expected = llama.load(placement), llama.plain()
    for each in (model, expected):
        each.gradient_checkpointing_enable()
        each.train()
    found, wanted = gradients(model), gradients(expected)
    assert [n for n in wanted if not _same_gradient(found[n], wanted[n])] == []


@pytest.mark.parametrize("placement", OFFLOADED)
def test_steps_of_an_optimiser(placement: str, llama: Saved) -> None:
    model, expected = llama.load(placement), llama.plain()
    for each in (model, expected):
        optimiser = torch.optim.AdamW(each.parameters(), lr=0.01)
        for _ in range(3):
            gradients(each)
            optimiser.step()
        optimiser.zero_grad()
    assert_same_model(model, expected)


# ---------------------------------------------------------------- ties and sizes


@pytest.mark.parametrize("placement", OFFLOADED)
@pytest.mark.parametrize("name", ["gpt2", "bart"])
def test_tied_weights_are_one_object(name: str, placement: str, saved: Any, plain: Any) -> None:
    model = saved(name).load(placement)
    for _ in range(2):
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert_same_model(model, plain(name))
        model.tie_weights()


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize(("name", "size"), [*((name, 150) for name in CONFIGS), ("llama", 100)])
def test_resize_token_embeddings(name: str, placement: str, size: int, saved: Any) -> None:
    model, expected = saved(name).load(placement), saved(name).plain()
    for each in (model, expected):
        torch.manual_seed(1)
        each.resize_token_embeddings(size)
    assert_same_model(model, expected)
    assert same(generate(model), generate(expected))


# ---------------------------------------------------------------- people's own


@pytest.mark.parametrize("placement", OFFLOADED)
def test_peoples_own_forward_hooks_run(placement: str, llama: Saved, plain: Any) -> None:
    model, calls = llama.load(placement), []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, output: calls.append(output))
    assert same(forward(model), forward(plain("llama")))
    assert len(calls) == len(model.model.layers)


@pytest.mark.parametrize("placement", OFFLOADED)
def test_outputs_of_every_layer(placement: str, llama: Saved, plain: Any) -> None:
    """None is a view of memory that streams."""
    with torch.no_grad():
        found = llama.load(placement)(prompt(), output_hidden_states=True, output_attentions=True)
        expected = plain("llama")(prompt(), output_hidden_states=True, output_attentions=True)
    for kind in ("hidden_states", "attentions"):
        assert all(same(a, b) for a, b in zip(found[kind], expected[kind], strict=True))


def test_inference_mode(llama: Saved, plain: Any) -> None:
    with torch.inference_mode():
        model = llama.load(BUDGETED)
        first = model(prompt()).logits.clone()
    assert not any(tensor.is_inference() for _, tensor in all_tensors(model))
    assert same(first, forward(plain("llama")))
    gradients(model)
    assert_same_model(model, plain("llama"))
