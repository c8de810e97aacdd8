"""Moving nested data: types kept, nothing moved that is not data, nothing rebuilt that need not be."""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict, namedtuple
from types import MappingProxyType

import pytest
import torch
from torch import nn

from hf_bigload.dispatch.moving import map_tensors
from hf_bigload.errors import DeviceMapError
from hf_bigload.utils import find_device, send_to_device

Pair = namedtuple("Pair", ["left", "right"])


class Output(OrderedDict):
    """Like a model's output: an ordered dict whose items are attributes too."""

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        super().__setattr__(key, value)


class Encoding(UserDict):
    """Like a tokenizer's output: a mapping that moves itself."""

    def to(self, device):
        self.data = {key: value.to(device) for key, value in self.data.items()}
        return self


class Cache:
    """Like a key-value cache: holds tensors, and is no container."""

    def __init__(self):
        self.keys = torch.ones(1)


def t():
    return torch.ones(2)


# ------------------------------------------------------------------------------------------------------ both engines


@pytest.mark.parametrize(
    "data",
    [
        t(),
        [t(), 1],
        (t(), "text", [t()]),
        Pair(t(), None),
        {"a": t(), "b": (t(),)},
        OrderedDict(a=t()),
        Output(a=t()),
        UserDict(a=t()),
        MappingProxyType({"a": t()}),
    ],
    ids=lambda data: type(data).__name__,
)
def test_containers_move_and_keep_their_type(engine, data):
    moved = engine.send_to_device(data, "meta")
    assert type(moved) is type(data)
    assert engine.find_device(moved) == torch.device("meta")
    assert engine.find_device(data) == torch.device("cpu")


def test_the_attributes_of_an_output_move_with_its_items(engine):
    moved = engine.send_to_device(Output(loss=t()), "meta")
    assert moved.loss is moved["loss"]
    assert moved.loss.is_meta


def test_objects_that_move_themselves_are_asked_to(engine):
    encoding = Encoding(ids=t())
    assert engine.send_to_device([encoding], "meta")[0] is encoding
    assert encoding["ids"].is_meta


def test_what_is_no_data_passes_untouched(engine):
    data = {"cache": Cache(), "device": torch.device("cpu"), "name": "x", "none": None, "number": 3}
    moved = engine.send_to_device({**data, "tensor": t()}, "meta")
    assert all(moved[key] is value for key, value in data.items())
    assert not data["cache"].keys.is_meta


@pytest.mark.parametrize("keys", ["past", ["past", "other"]])
def test_skipped_keys_stay_where_they_are_at_any_depth(engine, keys):
    moved = engine.send_to_device({"past": t(), "inner": {"past": t(), "x": t()}}, "meta", skip_keys=keys)
    assert not moved["past"].is_meta
    assert not moved["inner"]["past"].is_meta
    assert moved["inner"]["x"].is_meta


def test_the_first_tensor_tells_the_device(engine):
    assert engine.find_device({"a": None, "b": [1, (torch.ones(1, device="meta"),)], "c": t()}) == torch.device("meta")
    assert engine.find_device([1, "text", {}]) is None


# -------------------------------------------------------------------------------------------------- ours alone, and why


@pytest.mark.parametrize(
    "data", [t(), [t(), [t()]], Pair(t(), t()), {"a": t()}, Output(a=t()), torch.Size([1, 2])], ids=str
)
def test_nothing_is_rebuilt_where_nothing_moves(data):
    """Accelerate rebuilds every container of every block's inputs, and identity is lost."""
    assert send_to_device(data, "cpu") is data


def test_parts_that_need_not_move_are_the_same_objects():
    kept = [t()]
    moved = send_to_device({"kept": kept, "moved": torch.ones(1)}, "meta", skip_keys="kept")
    assert moved["kept"] is kept
    assert moved["moved"].is_meta


def test_a_default_dict_keeps_its_factory():
    """Accelerate calls the type with the items, which a default dict takes for its factory."""
    moved = send_to_device(defaultdict(list, a=t()), "meta")
    assert moved["a"].is_meta
    assert moved["new"] == []


def test_modules_are_no_data():
    """Accelerate moves a module that is passed as an argument, against the map that placed it."""
    linear = nn.Linear(1, 1)
    assert send_to_device({"adapter": linear}, "meta")["adapter"] is linear
    assert not linear.weight.is_meta


def test_classes_are_no_data():
    """Accelerate takes a class that has a `to` for an object that moves itself, and raises."""
    assert send_to_device([torch.Tensor, t()], "meta")[0] is torch.Tensor


def test_an_index_is_an_accelerator():
    if torch.accelerator.device_count():  # a backend may be there, with no device
        assert send_to_device(t(), 0).device.index == 0
    else:
        with pytest.raises(DeviceMapError, match="none"):
            send_to_device(t(), 0)


def test_disk_is_no_place_for_inputs():
    with pytest.raises(DeviceMapError, match="disk"):
        send_to_device(t(), "disk")


def test_map_tensors_keeps_what_does_not_change():
    data = {"a": t(), "b": [t(), None], "c": Encoding(ids=t())}
    assert map_tensors(lambda tensor: tensor, data) is data
    doubled = map_tensors(lambda tensor: 2 * tensor, data)
    assert find_device(doubled) == torch.device("cpu")
    assert doubled["b"][0].tolist() == [2, 2]
    assert doubled["c"]["ids"].tolist() == [2, 2]
