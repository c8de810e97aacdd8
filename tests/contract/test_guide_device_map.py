"""Device maps: sizes, budgets, the map that is inferred from them, and the reading of a map."""

from __future__ import annotations

import copy
import random
import sys
import warnings
from collections import Counter
from enum import Enum

import pytest
import torch
from torch import nn

from hf_bigload import device_map as maps
from hf_bigload import hardware
from hf_bigload.errors import DeviceMapError

from .models import Block, LanguageModel, MaskedLanguageModel, Part, Translator, nested

pytestmark = pytest.mark.filterwarnings("ignore:.*buffer:UserWarning")

FLOAT = 4


@pytest.fixture
def model():
    """Three layers of 144, 288 and 112 bytes in a row, and one more below a module: 40."""
    return nn.Sequential(nn.Linear(8, 4), nn.Linear(8, 8), nn.Linear(6, 4), nn.Sequential(nn.Linear(4, 2)))


def placed(device_map, model):
    """What a map says in the end, whichever modules it names: tensor -> device."""
    return {name: maps.resolve(device_map, name) for name in model.state_dict()}


def bytes_used(device_map, model):
    used = Counter()
    for name, tensor in model.named_parameters():
        used[maps.resolve(device_map, name)] += tensor.numel() * FLOAT
    return used


# ------------------------------------------------------------------------------------------- both engines: sizes


def test_every_module_and_tensor_has_a_size(engine, model):
    sizes = engine.compute_module_sizes(model)
    assert sizes[""] == 144 + 288 + 112 + 40
    assert (sizes["1"], sizes["1.weight"], sizes["3"], sizes["3.0.bias"]) == (288, 256, 40, 8)


def test_sizes_count_the_dtype_that_will_be_loaded(engine, model):
    assert engine.compute_module_sizes(model, dtype=torch.float16)[""] == 292
    assert engine.compute_module_sizes(model, dtype="torch.float16", special_dtypes={"0.weight": "float32"})[""] == 356


def test_integers_keep_their_size(engine):
    model = nn.Module()
    model.register_buffer("ids", torch.zeros(3, dtype=torch.int64))
    assert engine.compute_module_sizes(model, dtype=torch.float16)[""] == 24


def test_tied_weights_count_once(engine):
    tied, untied = LanguageModel(), LanguageModel(tied=False)
    table = untied.head.weight.numel() * FLOAT
    assert engine.compute_module_sizes(untied)[""] - engine.compute_module_sizes(tied)[""] == table


def test_buffers_are_sized_alone(engine):
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4))
    assert dict(engine.compute_module_sizes(model, buffers_only=True))["0"] == 4 * FLOAT * 2 + 8
    assert engine.compute_module_total_buffer_size(model) == 40
    assert engine.compute_module_total_buffer_size(nn.Linear(1, 1)) == 0


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2), (torch.int8, 1), (torch.float8_e4m3fn, 1)]
)
def test_dtypes_have_a_size(engine, dtype, size):
    assert engine.dtype_byte_size(dtype) == size


@pytest.mark.parametrize(
    ("text", "size"), [("1KiB", 2**10), ("2MB", 2 * 10**6), ("1.5GiB", 3 * 2**29), ("3GB", 3 * 10**9), (7, 7)]
)
def test_sizes_are_read_from_text(engine, text, size):
    assert engine.convert_file_size_to_int(text) == size


@pytest.mark.parametrize("text", ["5XB", "GB", "-1GB"])
def test_what_is_no_size_is_refused(engine, text):
    with pytest.raises(ValueError, match="size"):
        engine.convert_file_size_to_int(text)


@pytest.mark.parametrize(
    ("no_split", "largest"), [([], (288, ["1"])), (["Linear"], (288, ["1"])), (["Sequential"], (288, ["1"]))]
)
def test_the_largest_layer_is_named(engine, model, no_split, largest):
    modules = list(model.named_children())
    assert engine.get_max_layer_size(modules, engine.compute_module_sizes(model), no_split) == largest


def test_layers_of_the_same_size_are_all_named(engine):
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)), nn.ReLU())
    sizes = engine.compute_module_sizes(model)
    assert engine.get_max_layer_size(list(model.named_children()), sizes, []) == (24, ["0", "1.0"])
    assert engine.calculate_maximum_sizes(model) == (48, (24, ["0", "1.0"]))


def test_leaves_are_the_names_without_names_below(engine):
    assert engine.get_module_leaves({"": 1, "a": 1, "a.b": 1, "a.b.w": 1, "c": 1}) == ["a.b.w", "c"]


# ------------------------------------------------------------------------------------- both engines: budgets


def test_budgets_are_put_in_order_and_in_bytes(engine):
    budgets = engine.get_max_memory({"disk": "1GB", "cpu": "1KiB", 1: 5, 0: "2KB"})
    assert list(budgets.items()) == [(0, 2000), (1, 5), ("cpu", 1024), ("disk", 10**9)]


def test_a_budget_for_no_device_is_refused(engine):
    with pytest.raises(ValueError, match="gpu"):
        engine.get_max_memory({"gpu": 1})


def test_free_memory_is_the_default_budget(engine):
    assert engine.get_max_memory()["cpu"] > 0


@pytest.mark.parametrize("no_split", [[], ["Layer"], "Layer"])
@pytest.mark.parametrize("low_zero", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_balanced_budgets_are_those_of_the_guide(ours, theirs, count, low_zero, no_split):
    model = LanguageModel(layers=6)
    budgets = {**dict.fromkeys(range(count), 10**6), "cpu": 10**6}
    given = [engine.get_balanced_memory(model, dict(budgets), no_split, low_zero=low_zero) for engine in (ours, theirs)]
    assert given[0] == given[1]


# ------------------------------------------------------------------------------- both engines: the inferred map


@pytest.mark.parametrize(
    ("budgets", "expected"),
    [
        ({0: 1000, "cpu": 1000}, {"": 0}),
        ({0: 440, 1: 1000}, {"0": 0, "1": 1, "2": 1, "3": 1}),
        ({0: 144 + 288, "cpu": 1000}, {"0": 0, "1": "cpu", "2": "cpu", "3": "cpu"}),
        ({0: 431, "cpu": 1000}, {"": "cpu"}),
        ({"cpu": 600}, {"": "cpu"}),
        ({0: 440, "cpu": 400 + 40}, {"0": 0, "1": "cpu", "2": "cpu", "3": "cpu"}),
        ({0: 440, "cpu": 0}, {"0": 0, "1": "disk", "2": "disk", "3": "disk"}),
    ],
)
def test_devices_are_filled_in_order_with_room_for_what_streams(engine, model, budgets, expected):
    assert placed(engine.infer_auto_device_map(model, dict(budgets)), model) == placed(expected, model)


def test_a_module_is_split_unless_its_class_says_no(engine):
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 4))
    budgets = {0: 160, 1: 400}
    assert engine.infer_auto_device_map(model, dict(budgets)) == {"0.0": 0, "0.1": 1, "1": 1}
    whole = engine.infer_auto_device_map(model, dict(budgets), no_split_module_classes=["Sequential"])
    assert whole == {"": 1}


def test_modules_of_one_device_are_grouped_if_wished(engine, model):
    grouped = engine.infer_auto_device_map(model, {0: 1000}, clean_result=True)
    single = engine.infer_auto_device_map(model, {0: 1000}, clean_result=False)
    assert grouped == {"": 0}
    assert single == {"0": 0, "1": 0, "2": 0, "3": 0}


def test_the_dtype_to_load_decides_what_fits(engine, model):
    assert engine.infer_auto_device_map(model, {0: 292, 1: 1000}, dtype=torch.float16) == {"": 0}


def test_tied_modules_share_a_device(engine):
    model = LanguageModel()
    device_map = engine.infer_auto_device_map(model, {0: 2000, 1: 1500, "cpu": 10**5})
    assert device_map["embed"] == device_map["head"] == 0
    assert "cpu" in device_map.values()


def test_fallback_fills_a_device_that_would_stay_empty(engine):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(1, 1))
    budgets = {0: 100, "cpu": 1000}
    assert 0 not in engine.infer_auto_device_map(model, dict(budgets)).values()
    assert engine.infer_auto_device_map(model, dict(budgets), fallback_allocation=True)["2"] == 0


def test_buffers_without_room_are_warned_about(engine):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(100))
    with pytest.warns(UserWarning, match="offload_buffers=True"):
        engine.infer_auto_device_map(model, {0: 100, "cpu": 10**5})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.infer_auto_device_map(model, {0: 100, "cpu": 10**5}, offload_buffers=True)


def budgets_that_fit(rng, model, no_split):
    """Random budgets, none of them smaller than the largest layer, so that the guide's way of filling makes sense."""
    sizes = maps.compute_module_sizes(model)
    largest = maps.get_max_layer_size(list(model.named_children()), sizes, no_split)[0]
    budgets = {index: rng.randint(largest, max(largest, sizes[""])) for index in range(rng.randint(0, 3))}
    return {**budgets, "cpu": rng.randint(largest, max(largest, sizes[""]))} if rng.random() < 0.8 else budgets


@pytest.mark.parametrize("seed", range(0, 300, 10))
def test_random_models_are_placed_as_the_guide_places_them(ours, theirs, seed):
    for rng in map(random.Random, range(seed, seed + 10)):
        model = nested(rng.getrandbits(32))
        no_split = rng.choice([[], ["Block"], ["Part"]])
        budgets = budgets_that_fit(rng, model, no_split)
        options = {"no_split_module_classes": no_split, "fallback_allocation": rng.random() < 0.3}
        mine, other = (engine.infer_auto_device_map(model, dict(budgets), **options) for engine in (ours, theirs))
        assert placed(mine, model) == placed(other, model), (budgets, options)


@pytest.mark.parametrize("no_split", [[], ["Layer"]])
def test_language_models_are_placed_as_the_guide_places_them(ours, theirs, no_split):
    for rng in map(random.Random, range(60)):
        model = LanguageModel(tied=rng.random() < 0.5, vocabulary=rng.choice([8, 32, 128]))
        budgets = budgets_that_fit(rng, model, no_split)
        mine, other = (engine.infer_auto_device_map(model, dict(budgets), no_split) for engine in (ours, theirs))
        assert placed(mine, model) == placed(other, model), budgets


# -------------------------------------------------------------------------------- both engines: reading a map


@pytest.mark.parametrize(
    ("given", "cleaned"),
    [
        ({"a": 0, "b": 0}, {"": 0}),
        ({"a.x": 0, "a.y": 0, "b": 1}, {"a": 0, "b": 1}),
        ({"a.x.p": 0, "a.x.q": 0, "a.y": "cpu"}, {"a.x": 0, "a.y": "cpu"}),
        ({"a.x": 0, "b": 1}, {"a.x": 0, "b": 1}),
        ({"layers.1.a": 0, "layers.1.b": 0, "layers.10.a": 1}, {"layers.1": 0, "layers.10.a": 1}),
        ({"": 0}, {"": 0}),
        ({}, {}),
    ],
)
def test_a_map_is_cleaned_in_place(engine, given, cleaned):
    given = dict(given)
    assert engine.clean_device_map(given) is given
    assert given == cleaned


def test_a_map_is_cleaned_below_a_module(engine):
    assert engine.clean_device_map({"a.x": 0, "a.y": 0, "b": 0}, "a") == {"a": 0, "b": 0}


def test_a_map_that_covers_everything_passes(engine, model):
    for device_map in ({"": 0}, {"0": 0, "1": 1, "2": "cpu", "3.0": "disk"}):
        engine.check_device_map(model, device_map)


def test_tensors_without_a_device_are_named(engine, model):
    with pytest.raises(ValueError, match=r"2\.weight, 2\.bias, 3\.0\.weight, 3\.0\.bias"):
        engine.check_device_map(model, {"0": 0, "1": 1})


def test_keys_that_name_nothing_are_warned_about(engine, model):
    with pytest.warns(UserWarning, match="nothing"):
        engine.check_device_map(model, {"": 0, "nothing": 1})


def test_ties_across_devices_are_warned_about(engine, caplog):
    engine.check_tied_parameters_on_same_device([["a.weight", "b.weight"]], {"a": 0, "b": 0})
    assert caplog.text == ""
    engine.check_tied_parameters_on_same_device([["a.weight", "b.weight"]], {"a": 0, "": "cpu"})
    assert "a.weight" in caplog.text


# -------------------------------------------------------------------------------------------------- ours alone, and why


@pytest.mark.parametrize("name", ["layers.1", "layers.1.up.weight"])
def test_keys_are_prefixes_up_to_a_dot(name):
    device_map = {"layers": "cpu", "layers.1": 0, "layers.10": 1, "layers.1.up.bias": "disk"}
    assert maps.resolve(device_map, name) == 0
    assert maps.resolve(device_map, "layers.10.up") == 1
    assert maps.resolve(device_map, "layers.2") == "cpu"


def test_a_name_without_a_device_is_named():
    with pytest.raises(DeviceMapError, match="'head'"):
        maps.resolve({"layers.1": 0}, "head")
    assert maps.missing_from({"layers.1": 0}, ["layers.1.w", "layers.10", "head"]) == ["layers.10", "head"]
    assert maps.missing_from({"": 0}, ["head"]) == []


def test_devices_are_normalised_to_what_maps_show():
    given = {"a": "cpu", "b": torch.device("cpu"), "c": "disk"}
    assert maps.normalize_devices(given) == {"a": "cpu", "b": "cpu", "c": "disk"}


def test_accelerators_are_normalised_to_their_index(monkeypatch):
    monkeypatch.setattr(hardware, "accelerator_names", lambda: ["cuda:0", "cuda:1"])
    monkeypatch.setattr(hardware, "accelerator_type", lambda default: "cuda")
    given = {"a": 1, "b": "cuda:0", "c": torch.device("cuda", 1), "d": "cuda"}
    assert maps.normalize_devices(given) == {"a": 1, "b": 0, "c": 1, "d": 0}
    with pytest.raises(DeviceMapError, match=r"'e': 2.*'f': 'xpu:0'.*cuda:0, cuda:1, cpu, disk"):
        maps.normalize_devices({**given, "e": 2, "f": "xpu:0"})


@pytest.mark.parametrize("device", ["gpu", "meta", True, None, 1.5, 10**6, "cuda:-1"])
def test_devices_that_are_none_are_named_with_their_key(device):
    with pytest.raises(DeviceMapError, match=r"'head'.*cpu, disk"):
        maps.normalize_devices({"ok": "cpu", "head": device})


def test_budgets_are_not_changed_under_the_caller():
    """Accelerate turns the caller's own texts into numbers."""
    budgets = {0: "1KB", "cpu": "1MB"}
    maps.get_balanced_memory(LanguageModel(), budgets)
    assert budgets == {0: "1KB", "cpu": "1MB"}


def test_a_single_measured_accelerator_keeps_some_room(monkeypatch):
    monkeypatch.setattr(hardware, "free_by_accelerator", lambda: {"cuda:0": 1000})
    monkeypatch.setattr(hardware, "accelerator_type", lambda default: "cuda")
    assert maps.get_max_memory()[0] == 1000
    assert maps.get_balanced_memory(LanguageModel())[0] == 900


def test_memory_that_an_accelerator_shares_with_the_cpu_counts_once(monkeypatch):
    monkeypatch.setattr(hardware, "free_by_accelerator", lambda: {"mps": 1000})
    assert maps.get_max_memory() == {"mps": 1000}


def test_balance_takes_whichever_accelerators_there_are():
    """Accelerate looks for index 0, and raises KeyError without one."""
    budgets = maps.get_balanced_memory(LanguageModel(layers=6), {1: 10**6, 3: 10**6, "disk": 5}, low_zero=True)
    assert budgets[1] < budgets[3] == 10**6


def test_sizes_are_read_whatever_their_case_and_unit():
    """Accelerate takes "Gb" for bits, and refuses a number without a unit or a size in terabytes."""
    given = ["8Gb", "5", "1 tib", "200 KB"]
    assert [maps.convert_file_size_to_int(text) for text in given] == [8 * 10**9, 5, 2**40, 200_000]


def test_a_boolean_takes_a_byte():
    """Accelerate counts an eighth of one."""
    assert maps.dtype_byte_size(torch.bool) == 1


class PackedDtype(Enum):
    INT4 = "int4"


def test_packed_formats_have_a_size():
    assert maps.dtype_byte_size(PackedDtype.INT4) == 0.5
    assert maps.compute_module_sizes(nn.Linear(4, 4, bias=False), dtype=PackedDtype.INT4)["weight"] == 8


def test_a_cast_to_a_larger_dtype_counts_in_full():
    """Accelerate counts the smaller of the two, and the loaded model exceeds its budget."""
    linear = nn.Linear(4, 4, bias=False, dtype=torch.float16)
    assert maps.compute_module_sizes(linear, dtype=torch.float32)["weight"] == 64


def test_a_device_of_a_parent_survives_cleaning():
    """Accelerate gives a module the device of its children, whatever its own was."""
    assert maps.clean_device_map({"a": 0, "a.x": 1, "a.y": 1}) == {"a": 0, "a.x": 1, "a.y": 1}


def test_keys_may_name_tensors(recwarn):
    """Accelerate warns of the keys that its own maps have for a model's own parameters."""
    model = nn.Module()
    model.scale = nn.Parameter(torch.ones(1))
    maps.check_device_map(model, {"scale": 0})
    assert not recwarn.list


MODELS = {"language": LanguageModel, "masked": MaskedLanguageModel, "translator": Translator}


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_ties_never_break_a_map(make, seed):
    """Accelerate raises IndexError where a tied module is placed already, takes a name that merely contains another
    for a tie, counts a module with two ties twice, and keeps room for layers that it has placed along with a tie."""
    rng = random.Random(seed)
    model = make()
    no_split = rng.choice([[], ["Layer"]])
    budgets = budgets_that_fit(rng, model, no_split)
    device_map = maps.infer_auto_device_map(model, budgets, no_split, clean_result=False)
    maps.check_device_map(model, device_map)
    for names in maps.find_tied_parameters(model):
        assert len({maps.resolve(device_map, name) for name in names}) == 1
    used = bytes_used(device_map, model)
    assert all(used[device] <= budget for device, budget in budgets.items())


@pytest.mark.parametrize("seed", range(40))
def test_random_ties_keep_every_promise(seed):
    rng = random.Random(seed)
    model = copy.deepcopy(nested(seed)).to_empty(device="meta")
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    for _ in range(3 if len(layers) > 1 else 0):
        first, second = rng.sample(layers, 2)
        second.weight = first.weight
    budgets = budgets_that_fit(rng, model, [])
    device_map = maps.infer_auto_device_map(model, budgets, rng.choice([[], ["Block"]]))
    maps.check_device_map(model, device_map)
    for names in maps.find_tied_parameters(model):
        assert len({maps.resolve(device_map, name) for name in names}) == 1
    used = bytes_used(device_map, model)
    assert all(used[device] <= budget for device, budget in budgets.items())


def test_a_layer_larger_than_the_accelerator_does_not_keep_the_others_off_it():
    """Accelerate goes to the next device for good, and everything that follows is offloaded."""
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(4, 4), nn.Linear(4, 4))
    assert maps.infer_auto_device_map(model, {0: 200, "cpu": 10**5}) == {"0": "cpu", "1": 0, "2": 0}


def test_no_room_is_kept_for_a_layer_that_can_never_come():
    """Accelerate keeps it anyway, and the accelerator stays empty."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(20, 20))
    assert maps.infer_auto_device_map(model, {0: 200, "cpu": 10**5}) == {"0": 0, "1": 0, "2": "cpu"}


def test_modules_without_weights_do_not_claim_a_device():
    """Accelerate puts them on an accelerator that nothing else fits, which then is the model's main device."""
    model = nn.Sequential(nn.Dropout(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    assert maps.infer_auto_device_map(model, {0: 100, "cpu": 10**5}) == {"": "cpu"}
    assert maps.infer_auto_device_map(nn.Sequential(nn.ReLU()), {0: 0, "cpu": 0}) == {"0": 0}


def test_own_buffers_of_a_split_module_are_placed():
    """Accelerate forgets them, and its own check then refuses the map."""
    model = nn.Sequential(Part(), nn.Linear(4, 4))
    model[0].register_buffer("table", torch.zeros(4))
    model[0].linear = nn.Linear(4, 4)
    model[0].other = nn.Linear(4, 4)
    device_map = maps.infer_auto_device_map(model, {0: 180, 1: 180, "cpu": 10**5})
    assert len(set(device_map.values())) > 1
    maps.check_device_map(model, device_map)


def test_own_parameters_of_a_module_are_layers_too():
    """Accelerate keeps no room for them, though they stream like all others."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), Part())
    model[1].experts = nn.Parameter(torch.zeros(10))
    model[1].act = nn.ReLU()
    assert maps.infer_auto_device_map(model, {0: 64 + 40, "cpu": 10**5}) == {"": 0}
    assert maps.infer_auto_device_map(model, {0: 64 + 39, "cpu": 10**5}) == {"": "cpu"}


def test_a_module_under_two_names_is_placed_under_both():
    """Accelerate lists it once, and its own check then refuses the map."""
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "x": nn.Linear(8, 8), "b": shared})
    device_map = maps.infer_auto_device_map(model, {0: 400, "cpu": 10**5}, clean_result=False)
    maps.check_device_map(model, device_map)
    assert device_map["a"] == device_map["b"]


def test_a_module_is_split_where_its_tie_cannot_come_along():
    """Accelerate passes it on whole, though parts of it fit."""
    model = nn.ModuleDict({"stack": Part(), "head": Block()})
    model["stack"].first = nn.Linear(4, 4, bias=False)
    model["stack"].last = nn.Linear(4, 4, bias=False)
    model["head"].tied, model["head"].own = nn.Linear(4, 4, bias=False), nn.Linear(8, 8, bias=False)
    model["head"].tied.weight = model["stack"].last.weight
    budgets = {0: 330 + 56, 1: 10**5}
    device_map = maps.infer_auto_device_map(model, budgets, no_split_module_classes=["Block"])
    assert device_map["stack.first"] == 0
    assert device_map["stack.last"] == device_map["head"] == 1


def test_the_decisions_can_be_read(capsys, model):
    maps.infer_auto_device_map(model, {0: 440, "cpu": 1000}, verbose=True)
    assert "0 (144 bytes) goes to 0" in capsys.readouterr().out


def test_the_work_grows_with_the_model_and_no_faster():
    """A hundred thousand modules take seconds. Counted in calls: a quadratic step would double the ratio."""

    def calls(blocks):
        with torch.device("meta"):
            model = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)) for _ in range(blocks))
        total = maps.compute_module_sizes(model)[""]
        budgets = {0: total // 3, 1: total // 3, "cpu": total // 5}
        return calls_made(lambda: maps.infer_auto_device_map(model, budgets, clean_result=True))

    assert calls(800) < 2.5 * calls(400)


def calls_made(work):
    count = 0

    def note(_frame, event, _argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count
