"""All of it where Accelerate is not installed: `without_accelerate.py` has the checks, and is run once."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples.embedded_hub import EmbeddedHub

from .models import new_model, save
from .without_accelerate import REPOSITORY

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("without_accelerate.py")
CHECKS = re.findall(r"^@check\ndef (\w+)", PROGRAM.read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("without_accelerate")
    program = [sys.executable, "-m", "tests.transformers_loader.without_accelerate", str(folder)]
    with EmbeddedHub({REPOSITORY: write_branches(folder)}) as hub:
        environment = {**os.environ, **hub.environment()}
        done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def write_branches(folder: Path) -> dict[str, Path]:
    save("gpt2", folder / "main")
    other = new_model("gpt2")
    with torch.no_grad():
        other.transformer.ln_f.weight += 1
    other.save_pretrained(folder / "other")
    return {"main": folder / "main", "other": folder / "other"}


@pytest.mark.parametrize("check", CHECKS)
def test_without_accelerate(check: str, said: dict[str, str]) -> None:
    assert said[check] == "", said[check]


def test_every_check_was_made(said: dict[str, str]) -> None:
    assert list(said) == CHECKS
