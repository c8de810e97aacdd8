"""The tensors of a module: naming, replacing, tying them, and reading those that a hook keeps elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_bigload.errors import DeviceMapError
from hf_bigload.hooks import ModelHook, add_hook_to_module
from hf_bigload.utils import (
    align_module_device,
    find_tied_parameters,
    get_non_persistent_buffers,
    get_state_dict_from_offload,
    get_state_dict_offloaded_model,
    has_offloaded_params,
    id_tensor_storage,
    named_module_tensors,
    retie_parameters,
    set_module_tensor_to_device,
)

from .models import LanguageModel, Translator


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))
        self.inner = nn.Linear(2, 3)
        self.norm = nn.BatchNorm1d(3)
        self.norm.register_buffer("scratch", torch.zeros(1), persistent=False)
        self.register_buffer("table", torch.arange(3.0), persistent=False)

    def forward(self, x):
        return self.norm(self.inner(x * self.scale))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


# ------------------------------------------------------------------------------------------------------ both engines


def test_named_module_tensors_gives_parameters_then_buffers(engine, net):
    assert [name for name, _ in engine.named_module_tensors(net)] == ["scale", "table"]
    assert [name for name, _ in engine.named_module_tensors(net, include_buffers=False)] == ["scale"]
    assert [name for name, _ in engine.named_module_tensors(net, remove_non_persistent=True)] == ["scale"]
    recursed = dict(engine.named_module_tensors(net, recurse=True))
    assert recursed == {**dict(net.named_parameters()), **dict(net.named_buffers())}


def test_non_persistent_buffers_by_short_name(engine, net):
    assert engine.get_non_persistent_buffers(net) == {"table"}
    assert engine.get_non_persistent_buffers(net, recurse=True) == {"table", "scratch"}


@pytest.mark.parametrize("name", ["inner.weight", "norm.running_mean"])
def test_a_tensor_moves_alone(engine, net, name):
    engine.set_module_tensor_to_device(net, name, "meta")
    on_meta = {each for each, tensor in engine.named_module_tensors(net, recurse=True) if tensor.is_meta}
    assert on_meta == {name}


def test_a_tensor_comes_back_from_meta_with_a_value_only(engine, net):
    engine.set_module_tensor_to_device(net, "inner.weight", "meta")
    with pytest.raises(ValueError, match="meta"):
        engine.set_module_tensor_to_device(net, "inner.weight", "cpu")
    value = torch.randn(3, 2)
    engine.set_module_tensor_to_device(net, "inner.weight", "cpu", value=value)
    assert torch.equal(net.inner.weight, value)
    assert isinstance(net.inner.weight, nn.Parameter)


def test_a_value_takes_the_dtype_of_what_it_replaces(engine, net):
    engine.set_module_tensor_to_device(net, "scale", "cpu", value=torch.ones(2, dtype=torch.float64))
    assert net.scale.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["float16", "torch.float16", torch.float16])
def test_a_value_takes_the_dtype_that_was_asked_for(ours, net, dtype):
    ours.set_module_tensor_to_device(net, "scale", "cpu", value=torch.ones(2), dtype=dtype)
    assert net.scale.dtype == torch.float16


def test_integers_are_never_cast(engine, net):
    engine.set_module_tensor_to_device(
        net, "norm.num_batches_tracked", "cpu", value=torch.tensor(7), dtype=torch.float16
    )
    assert net.norm.num_batches_tracked.dtype == torch.int64


def test_a_frozen_parameter_stays_frozen(engine, net):
    net.scale.requires_grad_(False)
    engine.set_module_tensor_to_device(net, "scale", "cpu", value=torch.zeros(2))
    assert not net.scale.requires_grad


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("inner.weight", torch.ones(2, 3), "shape"),
        ("inner.nothing", None, "nothing"),
        ("inner.bias", torch.ones(1), "bias"),
    ],
)
def test_what_cannot_be_set_is_refused_and_nothing_changes(engine, net, name, value, said):
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    with pytest.raises(ValueError, match=said):
        engine.set_module_tensor_to_device(net, name, "cpu", value=value)
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())


def test_a_tied_weight_that_was_moved_is_shared(engine):
    model = LanguageModel()
    pointer = model.embed.weight.data_ptr()
    tied = {pointer: {}}
    engine.set_module_tensor_to_device(model, "embed.weight", "meta", tied_params_map=tied)
    engine.set_module_tensor_to_device(model, "head.weight", "meta", tied_params_map=tied)
    assert model.head.weight is model.embed.weight


def test_tied_parameters_are_found_in_groups(engine):
    groups = engine.find_tied_parameters(Translator())
    assert groups == [
        [
            "lm_head.weight",
            "model.decoder.embed_tokens.weight",
            "model.encoder.embed_tokens.weight",
            "model.shared.weight",
        ]
    ]
    assert engine.find_tied_parameters(LanguageModel(tied=False)) == []


def test_parameters_are_tied_again_to_the_one_that_is_real(engine):
    model = LanguageModel()
    groups = engine.find_tied_parameters(model)
    engine.set_module_tensor_to_device(model, "embed.weight", "meta")
    assert model.embed.weight is not model.head.weight
    engine.retie_parameters(model, groups)
    assert model.embed.weight is model.head.weight
    assert not model.head.weight.is_meta


def test_a_storage_has_one_identity(engine):
    tensor = torch.ones(4)
    assert engine.id_tensor_storage(tensor) == engine.id_tensor_storage(tensor[1:])
    assert engine.id_tensor_storage(tensor) != engine.id_tensor_storage(tensor.clone())


def test_parts_of_a_state_dict_end_at_dots(engine):
    state = {"h.1.w": 1, "h.10.w": 2, "h.1": 3, "other": 4}
    assert engine.extract_submodules_state_dict(state, ["h.1"]) == {"h.1.w": 1, "h.1": 3}


def offload(module, theirs):
    """Put the tensors of a module on meta, in the care of a hook that knows pre_forward and post_forward only."""
    add_hook_to_module(module, theirs.AlignDevicesHook(execution_device="cpu", offload=True))


def test_offloaded_parameters_are_known_by_the_hook(engine, theirs, net):
    offload(net.inner, theirs)
    assert engine.has_offloaded_params(net.inner)
    assert not engine.has_offloaded_params(net)


def test_an_offloaded_module_is_aligned_for_a_while(engine, theirs, net):
    weight = net.inner.weight.detach().clone()
    offload(net.inner, theirs)
    with engine.align_module_device(net.inner, "cpu"):
        assert torch.equal(net.inner.weight, weight)
    assert net.inner.weight.is_meta


def test_a_plain_module_is_aligned_for_a_while(engine, net):
    meta = nn.Linear(2, 2, device="meta")
    with engine.align_module_device(meta):
        assert meta.weight.is_meta
    with engine.align_module_device(net.inner, "cpu"):
        net.inner.weight.data.fill_(3)
    assert net.inner.weight.unique().tolist() == [3]


def test_the_state_dict_of_an_offloaded_model_has_its_weights(engine, theirs, net):
    del net.scale, net.table
    expected = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    offload(net.inner, theirs)
    state = engine.get_state_dict_offloaded_model(net)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], tensor) for key, tensor in expected.items())
    assert net.inner.weight.is_meta


def test_a_module_fills_its_part_of_a_state_dict(engine, theirs, net):
    weight = net.inner.weight.detach().clone()
    offload(net.inner, theirs)
    wanted = {"inner.weight": "", "inner.bias": "", "norm.weight": ""}
    state = engine.get_state_dict_from_offload(net.inner, "inner.weight", wanted)
    assert torch.equal(state["inner.weight"], weight)
    assert state["norm.weight"] == ""


# -------------------------------------------------------------------------------------------------- ours alone, and why


def test_nested_non_persistent_buffers_are_left_out(net):
    """Accelerate compares short names with dotted ones, and leaves out none that is nested."""
    assert get_non_persistent_buffers(net, recurse=True, fqns=True) == {"table", "norm.scratch"}
    names = {name for name, _ in named_module_tensors(net, recurse=True, remove_non_persistent=True)}
    assert names == set(net.state_dict())


def test_a_parameter_that_need_not_change_is_the_same_object(net):
    before = net.scale
    set_module_tensor_to_device(net, "scale", "cpu")
    assert net.scale is before


def test_the_dtype_counts_without_a_value_too(net):
    """Accelerate documents it so, and does it on meta only."""
    set_module_tensor_to_device(net, "scale", "cpu", dtype=torch.float16)
    assert net.scale.dtype == torch.float16


def test_attributes_of_a_parameter_follow_it(net):
    """Accelerate makes a bare parameter of it: a loader's marks are lost."""
    net.scale.mark = "mine"
    set_module_tensor_to_device(net, "scale", "cpu", value=torch.zeros(2))
    assert net.scale.mark == "mine"


class Packed(nn.Parameter):
    """Like a quantised weight: packs itself where it lands, and carries what it needs for it."""

    def to(self, *args, **kwargs):
        moved = torch.Tensor._make_subclass(Packed, self.detach().to(*args, **kwargs), self.requires_grad)
        moved.scheme = f"{self.scheme}, moved"
        return moved


def test_a_parameter_class_moves_by_its_own_rules(net):
    net.scale = Packed(torch.ones(2))
    net.scale.scheme = "int4"
    set_module_tensor_to_device(net, "scale", "cpu", value=torch.zeros(2))
    assert type(net.scale) is Packed
    assert net.scale.scheme == "int4, moved"


def test_a_buffer_is_never_taken_for_a_tied_parameter(net):
    """Accelerate puts the shared tensor among the parameters, and the module then has both."""
    pointer = net.table.data_ptr()
    shared = torch.zeros(3, device="meta")
    set_module_tensor_to_device(net, "table", "meta", tied_params_map={pointer: {"meta": shared}})
    assert net._buffers["table"] is shared
    assert "table" not in net._parameters


def test_statistics_of_an_eight_bit_weight_go_along():
    linear = nn.Linear(2, 2)
    linear.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    value = torch.full((2, 2), 5, dtype=torch.int8)
    set_module_tensor_to_device(linear, "weight", "cpu", value=value, fp16_statistics=torch.ones(2))
    assert linear.weight.SCB.tolist() == [1, 1]


@pytest.mark.parametrize("device", ["disk", "nowhere", 10**6])
def test_a_device_that_is_none_is_named(net, device):
    with pytest.raises(DeviceMapError, match=str(device)):
        set_module_tensor_to_device(net, "scale", device)


def test_a_tensor_that_is_registered_as_none_is_named():
    """Accelerate fails on an attribute of None."""
    with pytest.raises(ValueError, match="'bias' is registered as None"):
        set_module_tensor_to_device(nn.Linear(1, 1, bias=False), "bias", "cpu", value=torch.ones(1))


def test_groups_of_tied_parameters_come_in_module_order():
    """Accelerate's order changes from run to run."""
    model = nn.Module()
    for index in range(20):
        model.add_module(f"a{index}", nn.Linear(1, 1, bias=False))
        model.add_module(f"b{index}", nn.Linear(1, 1, bias=False))
        model.get_submodule(f"b{index}").weight = model.get_submodule(f"a{index}").weight
    assert find_tied_parameters(model) == [[f"a{index}.weight", f"b{index}.weight"] for index in range(20)]


def test_a_group_that_is_all_on_meta_is_left_alone():
    with torch.device("meta"):
        model = LanguageModel(tied=False)
    retie_parameters(model, [["embed.weight", "head.weight"]])
    assert model.embed.weight is not model.head.weight


class Wrapped(torch.Tensor):
    """A tensor made of others."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(tensors, meta, size, stride):
        return Wrapped(tensors["inner"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(func)


def test_a_tensor_made_of_others_has_their_storage():
    inner = torch.ones(3)
    assert id_tensor_storage(Wrapped(inner)) == id_tensor_storage(inner)


def test_a_hook_inside_a_sequence_offloads_too(theirs, net):
    """Accelerate looks at the outermost hook only."""
    weight = net.inner.weight.detach().clone()
    add_hook_to_module(net.inner, ModelHook())
    add_hook_to_module(net.inner, theirs.AlignDevicesHook(execution_device="cpu", offload=True), append=True)
    assert has_offloaded_params(net.inner)
    with align_module_device(net.inner):
        assert torch.equal(net.inner.weight, weight)
    assert net.inner.weight.is_meta


def test_a_hook_that_can_align_is_asked_to(net):
    calls = []

    class Hook(ModelHook):
        offload = True

        def align(self, module, device):
            calls.append((module, device))
            return torch.no_grad()

    add_hook_to_module(net.inner, Hook())
    with align_module_device(net.inner, "cpu"):
        assert not torch.is_grad_enabled()
    assert calls == [(net.inner, "cpu")]


def test_aligning_keeps_the_parameter_and_what_was_written_into_it():
    """Accelerate makes new parameters on the way there and back: an optimiser or a tie holds the old ones."""
    linear = nn.Linear(2, 2)
    weight = linear.weight
    with align_module_device(linear, "meta"):
        assert linear.weight.is_meta
        linear.weight = nn.Parameter(torch.full((2, 2), 7.0))
    assert linear.weight is weight
    assert linear.weight.unique().tolist() == [7]


def test_the_state_dict_has_the_model_s_own_tensors_too(theirs, net):
    """Accelerate passes over the model itself: its own parameters are not saved."""
    expected = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    offload(net.inner, theirs)
    state = get_state_dict_offloaded_model(net)
    assert list(state) == list(expected)
    assert all(torch.equal(state[key], tensor) for key, tensor in expected.items())


def test_what_no_hook_can_fetch_is_named_and_left_out(net, caplog):
    set_module_tensor_to_device(net, "inner.weight", "meta")
    state = get_state_dict_offloaded_model(net)
    assert "inner.weight" not in state
    assert "inner.bias" in state
    assert "inner.weight" in caplog.text


def test_a_tensor_of_the_model_itself_fills_its_entry(net):
    """Accelerate cuts the last letter off a name without a dot."""
    assert get_state_dict_from_offload(net, "scale", {"scale": ""})["scale"].tolist() == [1, 1]
