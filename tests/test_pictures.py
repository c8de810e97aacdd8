"""Plans and runs as pictures: HTML that is well-formed whatever things are called, figures that leave nothing out."""

from __future__ import annotations

import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from hf_bigload import pictures
from hf_bigload.errors import MissingExtraError
from hf_bigload.pictures import plans, timelines
from hf_bigload.pictures.scene import MARGIN, WIDTH, Scene, clipped, lighter, on_colour, ticks
from hf_bigload.report import DeviceMemory, human_seconds, memory_of, plan_table, plan_view, timeline_table
from hf_bigload.specs import BlockSpec, PhaseTime, Placement, Plan, TensorSpec
from hf_bigload.timeline import COMPUTE, COPY, READ, STALL, Span, Timeline

ROOT = Path(__file__).resolve().parents[1]
MIB = 1 << 20
EVIL = "<script>&\"'$x_1$"


def block(name: str, nbytes: int = 8 * MIB) -> BlockSpec:
    return BlockSpec(name, (TensorSpec(f"{name}.weight", nbytes, "float32", (nbytes // 4,)),), True)


def plan_of(homes: list[str], device: str = "cuda:0", name: str = "layers.{}", **fields: Any) -> Plan:
    placements = tuple(Placement(block(name.format(i)), home, device) for i, home in enumerate(homes))
    weights = {home: homes.count(home) * 8 * MIB for home in homes}
    ring = {device: 16 * MIB}
    used = {home: weights.get(home, 0) + ring.get(home, 0) for home in {*homes, device}}
    budget = {home: used[home] + 4 * MIB for home in used if home != "disk"}
    return Plan(placements, {}, device, budget, used, ring, **fields)


def timeline_of(blocks: int, name: str = "layers.{}") -> Timeline:
    """Each block read, copied and computed; every third one waited for."""
    spans = []
    for i in range(blocks):
        spans += [
            Span(name.format(i), READ, i + 0.0, i + 0.5, 8 * MIB, "cpu"),
            Span(name.format(i), COPY, i + 0.5, i + 0.7, 8 * MIB, "cuda:0"),
            Span(name.format(i), COMPUTE, i + 0.7, i + 1.0, device="cuda:0"),
        ]
        if i % 3 == 0:
            spans.append(Span(name.format(i), STALL, i + 0.1, i + 0.7, device="cuda:0"))
    ahead = (Span(name.format(0), READ, blocks - 0.4, blocks + 0.0, 8 * MIB),)
    return Timeline("Net", tuple(sorted(spans, key=lambda span: span.begin)), ahead, float(blocks))


PLAN = plan_of(["cuda:0", "cpu", "cpu", "disk", "disk"])
PICTURED: dict[str, Any] = {
    "plan": PLAN,
    "plan of 200": plan_of(["cuda:0", "cpu", "disk", "cpu"] * 50),
    "plan on two devices": replace(PLAN, placements=(*PLAN.placements, Placement(block("head"), "cuda:1", "cuda:1"))),
    "plan with predictions": replace(PLAN, predicted=(PhaseTime("encoder", 1, 0.5), PhaseTime("decode", 127, 9.0))),
    "plan with cache": replace(PLAN, cache={"cuda:0": MIB}, activations={"cuda:0": MIB}),
    "plan of nothing": plan_of([]),
    "plan with evil names": plan_of(["cuda:0", "disk"], name=EVIL + "{}"),
    "timeline": timeline_of(5),
    "timeline of 200": timeline_of(200),
    "timeline of nothing": Timeline("Net"),
    "timeline with evil names": timeline_of(4, EVIL + "{}"),
}

each = pytest.mark.parametrize("pictured", PICTURED.values(), ids=PICTURED.keys())


def scene_of(pictured: Plan | Timeline) -> Scene:
    return plans.draw(pictured) if isinstance(pictured, Plan) else timelines.draw(pictured)


def texts(html: str) -> list[str]:
    return [text for text in ElementTree.fromstring(html).itertext() if text.strip()]


@each
class TestEveryPicture:
    def test_is_well_formed_html_without_scripts(self, pictured: Any) -> None:
        root = ElementTree.fromstring(pictured._repr_html_())
        tags = {element.tag.rpartition("}")[2] for element in root.iter()}
        assert root.tag == "div" and tags <= {"div", "svg", "defs", "pattern", "path", "g", "title", "rect", "text"}

    def test_stays_on_its_paper(self, pictured: Any) -> None:
        scene = scene_of(pictured)
        for box in scene.boxes:
            assert box.width >= 0 and box.height > 0
            assert box.x >= 0 and box.x + box.width <= WIDTH and box.y >= 0 and box.y + box.height <= scene.height
        for word in scene.words:
            assert 0 <= word.x <= WIDTH - MARGIN / 2 and 0 < word.y < scene.height

    def test_is_the_same_on_matplotlib(self, pictured: Any) -> None:
        figure, scene = pictured.plot(), scene_of(pictured)
        axes = figure.axes[0]
        assert [text.get_text() for text in axes.texts] == [word.text for word in scene.words]
        assert sum(len(drawn.get_paths()) for drawn in axes.collections) == len(scene.boxes)

    def test_is_text_for_a_terminal(self, pictured: Any) -> None:
        table = plan_table(pictured) if isinstance(pictured, Plan) else timeline_table(pictured)
        assert pictured.explain() == table != ""


@pytest.mark.parametrize("pictured", [plan_of(["cpu"] * 2, name=EVIL + "{}"), timeline_of(2, EVIL + "{}")])
def test_names_are_escaped(pictured: Any) -> None:
    html = pictured._repr_html_()
    assert "<script" not in html
    assert any(EVIL in text for text in texts(html))


@pytest.mark.parametrize("pictured", [PLAN, timeline_of(3)])
def test_two_pictures_on_one_page_share_no_id(pictured: Any) -> None:
    page = f"<div>{pictured._repr_html_()}{pictured._repr_html_()}</div>"
    ids = [element.get("id") for element in ElementTree.fromstring(page).iter() if element.get("id")]
    assert len(ids) == len(set(ids)) == 2


def test_a_figure_is_written_without_a_window() -> None:
    file = io.BytesIO()
    PLAN.plot().savefig(file, format="png")
    assert file.getvalue().startswith(b"\x89PNG")
    assert "matplotlib.pyplot" not in sys.modules


class TestAPlan:
    def test_shows_every_device_and_its_parts(self) -> None:
        full = replace(PLAN, cache={"cuda:0": MIB}, activations={"cuda:0": 2 * MIB}, used={**PLAN.used, "cuda:1": 0})
        said = [word.text for word in plans.draw(full).words]
        assert {"cuda:0", "cuda:1", "RAM", "disk"} <= set(said)
        assert {"ring", "cache", "activations"} <= {box.says.partition(":")[0] for box in plans.draw(full).boxes}

    def test_parts_of_memory_add_up_to_what_is_used(self) -> None:
        full = replace(PLAN, cache={"cuda:0": MIB}, activations={"cuda:0": 2 * MIB})
        assert {each.device: each.used for each in memory_of(full)} == PLAN.used
        assert memory_of(full)[0] == DeviceMemory(
            "cuda:0",
            (("weights", 5 * MIB), ("ring", 16 * MIB), ("cache", MIB), ("activations", 2 * MIB)),
            28 * MIB,
        )

    def test_gives_every_block_a_place_as_wide_as_its_bytes(self) -> None:
        boxes = [box for box in plans.draw(PLAN).boxes if "rests in" in box.says]
        assert [box.says.partition(":")[0] for box in boxes] == [f"layers.{i}" for i in range(5)]
        assert len({round(box.width, 6) for box in boxes}) == 1
        assert sum(box.width for box in boxes) == pytest.approx(WIDTH - 2 * MARGIN)

    def test_colours_blocks_by_where_they_sleep(self) -> None:
        colours = [box.colour for box in plans.draw(PLAN).boxes if "rests in" in box.says]
        assert [colours.index(colour) for colour in colours] == [0, 1, 1, 3, 3]

    def test_shows_where_blocks_run_if_that_differs(self) -> None:
        assert not any("runs on cuda:1" in box.says for box in plans.draw(PLAN).boxes)
        assert any(box.says == "runs on cuda:1" for box in plans.draw(PICTURED["plan on two devices"]).boxes)

    def test_shows_predicted_seconds_if_there_are_any(self) -> None:
        said = [word.text for word in plans.draw(PICTURED["plan with predictions"]).words]
        assert {"encoder", "500 ms, once", "decode", "9.00 s, 127 times 70.9 ms"} <= set(said)
        assert not any("predicted" in word.text for word in plans.draw(PLAN).words)


class TestATimeline:
    def test_has_a_lane_for_disk_bus_and_device(self) -> None:
        said = [word.text for word in timelines.draw(timeline_of(5)).words]
        assert [text for text in said if text in ("disk to RAM", "copies to cuda:0", "compute on cuda:0")] == [
            "disk to RAM",
            "copies to cuda:0",
            "compute on cuda:0",
        ]

    def test_places_spans_in_proportion(self) -> None:
        boxes = {box.says: box for box in timelines.draw(timeline_of(4)).boxes}
        first, third = (
            boxes["layers.0: read 500 ms from 0.00 µs, 8.00 MiB"],
            boxes["layers.2: read 500 ms from 2.00 s, 8.00 MiB"],
        )
        assert third.x - first.x == pytest.approx(4 * first.width)

    def test_marks_stalls_in_the_lane_that_waits_and_names_the_longest(self) -> None:
        scene = timelines.draw(timeline_of(5))
        hatched = [box for box in scene.boxes if box.hatched and box.says]
        computing = next(box for box in scene.boxes if "compute" in box.says)
        assert len(hatched) == 2 and {box.y for box in hatched} == {computing.y}
        assert any(word.text == "waits 600 ms for layers.0" for word in scene.words)

    def test_shows_a_device_that_only_waited(self) -> None:
        waited = Timeline("Net", (Span("a", STALL, 0.0, 1.0, device="cuda:0"),), (), 1.0)
        assert any(box.hatched and box.says for box in timelines.draw(waited).boxes)

    def test_puts_what_is_read_at_once_below_each_other(self) -> None:
        spans = tuple(Span(f"a.{i}", READ, 0.0, 1.0, 1) for i in range(3))
        boxes = [box for box in timelines.draw(Timeline("Net", spans, (), 1.0)).boxes if box.says]
        assert len({box.y for box in boxes}) == 3

    def test_of_a_long_run_draws_no_more_than_can_be_seen(self) -> None:
        spans = tuple(Span("a", COMPUTE, i * 1e-3, i * 1e-3 + 9e-4) for i in range(20_000))
        assert len(timelines.draw(Timeline("Net", spans, (), 20.0)).boxes) < 3_000

    def test_as_text_has_shares_bandwidth_and_the_longest_stalls(self) -> None:
        table = timeline_of(9).explain()
        assert all(
            words in table for words in ("disk to RAM", "80.00 MiB", "copies to cuda:0", "0.04 GB", "waiting on")
        )
        assert all(f"layers.{i}" in table for i in (0, 3, 6))


def test_a_terminal_without_the_characters_of_a_box_gets_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    short = Timeline("Net", (Span("a", READ, 0.0, 5e-6, 1), Span("a", STALL, 0.0, 5e-6)), (), 5e-6)
    assert short.explain().isascii() and PLAN.explain().isascii()


def test_a_terminals_bars_have_every_part() -> None:
    console = Console(file=io.StringIO(), width=140)
    console.print(plan_view(PICTURED["plan with cache"]))
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(label in printed for label in ("weights", "ring", "cache", "activations", "budget"))
    assert all(sign in printed for sign in "█▓▒▚░")


class TestWithoutMatplotlib:
    def test_the_extra_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(MissingExtraError, match=r"pip install 'hf_bigload\[plot\]'"):
            PLAN.plot()
        with pytest.raises(ImportError):
            timeline_of(1).plot()

    def test_notebooks_and_terminals_have_their_pictures(self) -> None:
        code = (
            "import sys; sys.modules['matplotlib'] = sys.modules['torch'] = None;"
            "from hf_bigload.specs import Plan; plan = Plan((), {}, 'cpu', {}, {}, {});"
            "print(len(plan._repr_html_()) > 0, len(plan.explain()) > 0)"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert done.stdout.strip() == "True True", done.stderr


class TestSmallThings:
    @pytest.mark.parametrize(
        ("seconds", "said"),
        [
            (0.0, "0.00 µs"),
            (8.01e-4, "801 µs"),
            (0.0351, "35.1 ms"),
            (1.918, "1.92 s"),
            (59.96, "60.0 s"),
            (1234.0, "1234 s"),
        ],
    )
    def test_seconds_have_three_digits(self, seconds: float, said: str) -> None:
        assert human_seconds(seconds) == said

    def test_ticks_are_round_and_reach_far(self) -> None:
        for seconds in (0.0, 3e-5, 0.14, 1.0, 7.3, 640.0):
            found = ticks(seconds)
            assert found[0] == 0 and found[-1] <= seconds * (1 + 1e-9) and len(found) <= 8
            assert not found[1:] or found[-1] > seconds * 0.6

    def test_words_are_shortened_in_their_middle(self) -> None:
        assert clipped("decoder.layers.3", 1000, 10) == "decoder.layers.3"
        short = clipped("decoder.layers.3", 50, 10)
        assert short.startswith("dec") and "…" in short and short.endswith(".3") and len(short) <= 8
        assert clipped("decoder.layers.3", 10, 10) == ""

    def test_colours(self) -> None:
        assert lighter("#000000", 0.5) == "#808080" and lighter("#0072b2", 0.0) == "#0072b2"
        assert on_colour("#0072b2") == "#ffffff" != on_colour("#f0e442")


def test_only_what_can_be_drawn_is() -> None:
    with pytest.raises(TypeError, match="int"):
        pictures.as_html(3)
