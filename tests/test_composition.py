"""Components joined into one model, planned, and taken apart again."""

from __future__ import annotations

from hf_bigload.composition import called, joined, part_of
from hf_bigload.planner import follow_map, make_plan
from hf_bigload.specs import BlockSpec, Hardware, ModelSpec, Needs, TensorSpec, Workload


def block(name: str, size: int, **options: object) -> BlockSpec:
    tensor = TensorSpec(f"{name}.weight" if name else "weight", size, "float32", (size // 4,))
    return BlockSpec(name, (tensor,), whole=False, **options)  # type: ignore[arg-type]


def layer(name: str, size: int) -> BlockSpec:
    """A block that can be cut into two leaves."""
    parts = tuple(block(f"{name}.{leaf}", size // 2, part_of=name) for leaf in ("a", "b"))
    return BlockSpec(name, tuple(t for part in parts for t in part.tensors), whole=True, parts=parts)


TEXT = ModelSpec((block("shared", 40), BlockSpec("embed", (), whole=False, borrows=("shared.weight",)), layer("l", 80)))
TEXT = ModelSpec(TEXT.blocks, {"embed.weight": "shared.weight"})
DENOISER = ModelSpec((block("", 4), layer("blocks.0", 400), layer("blocks.1", 400)))
HOME = "disk"


def test_a_joined_model_has_the_names_of_its_components() -> None:
    both = joined({"text": TEXT, "unet": DENOISER})
    names = [b.name for b in both.blocks]
    assert names == ["text.shared", "text.embed", "text.l", "unet", "unet.blocks.0", "unet.blocks.1"]
    assert both.nbytes == TEXT.nbytes + DENOISER.nbytes
    assert both.ties == {"text.embed.weight": "text.shared.weight"}
    assert both.blocks[2].parts[0].part_of == "text.l" and both.blocks[1].borrows == ("text.shared.weight",)


def test_a_part_has_its_own_names_again() -> None:
    both = joined({"text": TEXT, "unet": DENOISER})
    plan = follow_map(both, lambda name: HOME, "cpu", Hardware({}, 10_000))
    for name, spec in (("text", TEXT), ("unet", DENOISER)):
        part = part_of(plan, name)
        assert tuple(p.block for p in part.placements) == spec.blocks
        assert part.ties == spec.ties
        assert part.used[HOME] == spec.nbytes
        assert part.ring == plan.ring


def test_names_that_begin_alike_are_told_apart() -> None:
    both = joined({"text_encoder": TEXT, "text_encoder_2": DENOISER})
    plan = make_plan(both, Hardware({}, 10_000))
    assert [len(part_of(plan, name).placements) for name in ("text_encoder", "text_encoder_2")] == [3, 3]


def test_what_runs_often_is_resident_first() -> None:
    both = joined({"text": called(TEXT, 1), "unet": called(DENOISER, 30)})
    plan = make_plan(both, Hardware({}, 1000), needs=Needs(Workload(context_length=0, new_tokens=1)))
    assert {p.home for p in part_of(plan, "unet").placements} == {"cpu"}


def test_calls_hold_for_the_leaves_too() -> None:
    cut = called(DENOISER, 7).blocks[1]
    assert [cut.calls, *(part.calls for part in cut.parts)] == [7, 7, 7]
