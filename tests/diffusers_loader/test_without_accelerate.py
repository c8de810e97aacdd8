"""Pipelines where Accelerate is not installed: `without_accelerate.py`, run once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from .conftest import Saved

ROOT = Path(__file__).parents[2]


def test_a_pipeline_is_placed_without_accelerate(saved: Saved) -> None:
    program = [sys.executable, "-m", "tests.diffusers_loader.without_accelerate", str(saved("sdxl")), "sdxl"]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answers = [line.split()[0] for line in done.stdout.splitlines() if "device_map" in line]
    assert answers == ["same"] * 6
