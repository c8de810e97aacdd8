"""What importing a part of the package costs and needs, and the limits that the code keeps to.

`make check` reads the import statements (the contracts are in pyproject.toml); here modules are really imported.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hf_bigload"
LONGEST_FUNCTION, MEDIAN_FUNCTION = 80, 15  # lines


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = sorted(PACKAGE.rglob("*.py"))
MODULES = [module_name(path) for path in SOURCES]
WITHOUT_TORCH = [
    "hf_bigload",
    "hf_bigload.__main__",
    "hf_bigload.advice",
    "hf_bigload.bandwidth",
    "hf_bigload.checkpoint.formats",
    "hf_bigload.checkpoint.index",
    "hf_bigload.checkpoint.reader",
    "hf_bigload.checkpoint.repository",
    "hf_bigload.checkpoint.spill",
    "hf_bigload.checkpoint.spill_cache",
    "hf_bigload.cli",
    "hf_bigload.describe",
    "hf_bigload.doctor",
    "hf_bigload.errors",
    "hf_bigload.estimate",
    "hf_bigload.hardware",
    "hf_bigload.pictures",
    "hf_bigload.planner",
    "hf_bigload.plugin",
    "hf_bigload.registry",
    "hf_bigload.report",
    "hf_bigload.schedule",
    "hf_bigload.seams",
    "hf_bigload.search",
    "hf_bigload.settings",
    "hf_bigload.specs",
    "hf_bigload.timeline",
]


def run(code: str) -> str:
    """What `code` prints in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_is_imported_without_torch(module: str) -> None:
    heavy = ["torch", "transformers", "diffusers", "accelerate"]
    assert run(f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])") == "[]"


def test_enabling_the_plugin_imports_no_library() -> None:
    code = "import sys, hf_bigload; hf_bigload.enable(); print('torch' in sys.modules, 'transformers' in sys.modules)"
    assert run(code) == "False False"


def test_everything_but_loaders_works_where_no_framework_is_installed() -> None:
    general = [name for name in MODULES if not name.startswith("hf_bigload.loaders.")]
    absent = "sys.modules |= dict.fromkeys(('transformers', 'diffusers', 'accelerate', 'peft'))"
    assert run(f"import sys; {absent}; import {', '.join(general)}; print('imported')") == "imported"


def test_loaders_work_where_accelerate_is_not_installed() -> None:
    loaders = [name for name in MODULES if name.startswith("hf_bigload.loaders.")]
    assert run(f"import sys; sys.modules['accelerate'] = None; import {', '.join(loaders)}; print('yes')") == "yes"


def functions() -> Iterator[tuple[str, int]]:
    """(where, lines) of every function of the package."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{path.relative_to(ROOT)}:{node.name}", (node.end_lineno or node.lineno) - node.lineno + 1


def test_no_function_is_too_long_to_see_at_once() -> None:
    assert [where for where, lines in functions() if lines > LONGEST_FUNCTION] == []
    assert median(lines for _, lines in functions()) <= MEDIAN_FUNCTION
