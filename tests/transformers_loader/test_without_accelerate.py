"""All of it where Accelerate is not installed: `without_accelerate.py` has the checks, and is run once."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("without_accelerate.py")
CHECKS = re.findall(r"^@check\ndef (\w+)", PROGRAM.read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    program = [sys.executable, "-m", "tests.transformers_loader.without_accelerate"]
    folder = tmp_path_factory.mktemp("without_accelerate")
    done = subprocess.run([*program, str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("check", CHECKS)
def test_without_accelerate(check: str, said: dict[str, str]) -> None:
    assert said[check] == "", said[check]


def test_every_check_was_made(said: dict[str, str]) -> None:
    assert list(said) == CHECKS
