"""What the documents show works: links lead somewhere, names exist, and the example of a loader loads."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_model
from torch import nn

import hf_bigload
from hf_bigload.registry import unregister_loader

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("benchmarks/*.md"))]
LAYER_BYTES = 64 * 64 * 4


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_that_exist(document: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text())
    assert [link for link in links if not (document.parent / link).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_of_the_package_exist(document: Path) -> None:
    names = set(re.findall(r"hf_bigload\.([a-z_]+)\(", document.read_text()))
    assert [name for name in names if not hasattr(hf_bigload, name)] == []


def test_every_room_is_in_the_design() -> None:
    design = (ROOT / "docs/design.md").read_text()
    rooms = [f"{path.name}/" if path.is_dir() else path.name for path in (ROOT / "hf_bigload").iterdir()]
    code = [room for room in rooms if room.endswith((".py", "/")) and room not in ("__init__.py", "__pycache__/")]
    assert [room for room in code if f"`{room}`" not in design] == []


def build(folder: Path) -> nn.Module:
    return nn.Sequential(*(nn.Sequential(nn.Linear(64, 64, bias=False), nn.ReLU()) for _ in range(4)))


def from_folder(folder: Path, device_map: object = None) -> str:
    return "stock"


@pytest.fixture
def mylib(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    loading = ModuleType("mylib.loading")
    loading.build, loading.from_folder = build, from_folder  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mylib", ModuleType("mylib"))
    monkeypatch.setitem(sys.modules, "mylib.loading", loading)
    yield loading
    hf_bigload.disable()
    unregister_loader("mylib")


def test_the_example_of_a_loader_loads_on_a_budget(mylib: ModuleType, tmp_path: Path) -> None:
    torch.manual_seed(0)
    original = build(tmp_path)
    save_model(original, str(tmp_path / "model.safetensors"))
    example, registration = re.findall(r"```python\n(.*?)```", (ROOT / "docs/loaders.md").read_text(), re.DOTALL)
    exec(compile(example + "import hf_bigload\n" + registration, "docs/loaders.md", "exec"), {})

    hf_bigload.enable(max_memory={"cpu": 3 * LAYER_BYTES})
    model = mylib.from_folder(tmp_path, device_map="auto")

    assert hf_bigload.inspect(model).plan.used["disk"] >= LAYER_BYTES
    given = torch.randn(2, 64)
    assert torch.equal(model(given), original(given))
    assert mylib.from_folder(tmp_path) == "stock"
    hf_bigload.disable()
    assert mylib.from_folder is from_folder
