"""How a model is cut: every tensor in one block, ties once, no-split modules whole."""

from __future__ import annotations

import torch
from torch import nn

from hf_bigload.skeleton import blocks_of, gathers, model_spec, no_split_classes
from hf_bigload.specs import ModelSpec


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
        self.register_buffer("scale", torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x)) * self.scale[0]


class Model(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.position = nn.Parameter(torch.zeros(4))
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.head = nn.Linear(4, 10, bias=False)
        if tied:
            self.head.weight = self.embed.weight


def names(spec: ModelSpec) -> list[str]:
    return [t.name for block in spec.blocks for t in block.tensors]


def test_every_tensor_is_in_exactly_one_block() -> None:
    model = Model()
    expected = [n for n, _ in (*model.named_parameters(), *model.named_buffers())]
    assert sorted(names(model_spec(model))) == sorted(expected)


def test_repeated_children_of_a_list_are_blocks_and_the_rest_are_leaves() -> None:
    found = [(name, whole) for name, _, whole in blocks_of(Model())]
    assert found == [
        ("", False), ("embed", False), ("layers.0", True), ("layers.1", True), ("layers.2", True), ("head", False)
    ]  # fmt: skip


def test_the_models_own_no_split_modules_win() -> None:
    model = Model()
    model._no_split_modules = ["Linear"]
    assert no_split_classes(model) == {"Linear"}
    assert ("layers.0.up", True) in [(name, whole) for name, _, whole in blocks_of(model)]


def test_a_container_that_is_never_called_is_not_a_block() -> None:
    class Shelf(nn.Module):  # no forward: only holds weights for its parent
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(2, 2)

    found = [name for name, _, _ in blocks_of(nn.ModuleList([Shelf(), Shelf()]))]
    assert found == ["0.lin", "1.lin"]


def test_tied_weights_count_once_and_the_borrower_says_whose_they_are() -> None:
    spec = model_spec(Model(tied=True))
    assert names(spec).count("embed.weight") == 1 and "head.weight" not in names(spec)
    assert spec.ties == {"head.weight": "embed.weight"}
    assert next(b for b in spec.blocks if b.name == "head").borrows == ("embed.weight",)


def test_ties_that_only_the_library_knows_count_once_too() -> None:
    spec = model_spec(Model(), ties={"head.weight": "embed.weight"})
    assert "head.weight" not in names(spec)
    assert spec.nbytes == model_spec(Model(tied=True)).nbytes


def test_parts_are_the_leaves_of_a_whole_block() -> None:
    layer = next(b for b in model_spec(Model()).blocks if b.name == "layers.0")
    assert [p.name for p in layer.parts] == ["layers.0", "layers.0.up", "layers.0.down"]
    assert {p.part_of for p in layer.parts} == {"layers.0"}
    assert sum(p.nbytes for p in layer.parts) == layer.nbytes
    assert layer.buffer_bytes == 12


def test_sizes_are_those_of_the_dtype_a_tensor_is_loaded_in() -> None:
    spec = model_spec(Model(), loaded_as=lambda name, t: ("float16", t.numel() * 2))
    assert spec.nbytes * 2 == model_spec(Model()).nbytes


def test_a_table_is_gathered_unless_its_forward_writes_to_it() -> None:
    assert gathers(nn.Embedding(3, 3))
    assert not gathers(nn.Embedding(3, 3, max_norm=1.0)) and not gathers(nn.Linear(3, 3))


class WithEncoder(Model):
    """Layers beside which a part stands that turns the prompt into what they read."""

    def __init__(self, **parts: type[nn.Module]) -> None:
        super().__init__()
        for name, kind in parts.items():
            setattr(self, name, kind())


def once(model: nn.Module) -> set[str]:
    """First names of the blocks, and of their parts, that run once per request."""
    blocks = model_spec(model).blocks
    assert all(part.calls == block.calls for block in blocks for part in block.parts)
    return {block.name.split(".")[0] for block in blocks if block.calls == 1}


def test_an_encoder_beside_a_decoder_and_towers_beside_a_language_model_run_once() -> None:
    assert once(WithEncoder(encoder=Model, decoder=Model)) == {"encoder"}
    assert once(WithEncoder(vision_tower=Model, multi_modal_projector=Layer)) == {
        "vision_tower",
        "multi_modal_projector",
    }
    assert once(WithEncoder(visual=Model, audio_tower=Model)) == {"visual", "audio_tower"}


def test_a_model_that_is_an_encoder_or_a_tower_runs_as_often_as_it_is_called() -> None:
    assert once(WithEncoder(encoder=Model)) == set()
    assert once(nn.ModuleDict({"vision_model": Model()})) == set()
