"""Every example runs as it stands, offline, and says what it promises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from examples import three_models
from tests import simdev

ROOT = Path(__file__).parents[1]
OFFLINE = {
    "PYTHONPATH": str(ROOT),
    "HF_HUB_OFFLINE": "1",
    "TORCHINDUCTOR_CACHE_DIR": os.path.join(os.environ["HF_HOME"], "inductor"),  # torch makes it when it is imported
}

PROMISES = {
    "guide_meta_model.py": ["100\\.0 billion parameters", "every parameter is on the meta device: True"],
    "guide_load_and_dispatch.py": ["blocks.*: cpu", "blocks.*: disk", "same output .*, to the bit: True"],
    "custom_device_map.py": ["model.layers.2 .* disk", "same logits .*, to the bit: True"],
    "three_models.py": ["result: \\(1, 256\\)"],
    "write_a_loader.py": ["plan for ToyNet", "layers.* disk", "same output, to the bit: True"],
}


@pytest.mark.parametrize(("script", "promised"), PROMISES.items(), ids=PROMISES.keys())
def test_an_example_keeps_its_promises_and_leaves_nothing_behind(
    script: str, promised: list[str], tmp_path: Path
) -> None:
    printed = run(tmp_path, script)
    assert [line for line in promised if not re.search(line, printed)] == []
    assert list(tmp_path.iterdir()) == []


def test_less_ram_changes_what_a_token_costs_and_not_what_it_is(tmp_path: Path) -> None:
    roomy, tight = (run(tmp_path, "chat_budget.py", "--ram", ram) for ram in ("1GB", "10MB"))
    assert re.findall(r"answer: '.+'", roomy) == re.findall(r"answer: '.+'", tight) != []
    assert mb_per_token(roomy) == 0 < 40 < mb_per_token(tight)
    assert list(tmp_path.iterdir()) == []


def mb_per_token(printed: str) -> float:
    return float(re.findall(r"read from disk: (.*) MB per token, 16 tokens", printed)[0])


def test_of_three_models_one_at_a_time_is_on_an_accelerator_that_holds_no_more(
    capsys: pytest.CaptureFixture[str],
) -> None:
    one_model = 4 * three_models.WIDTH * (three_models.WIDTH + 1)
    with simdev.devices([one_model + 16_384], hide_others=True):
        three_models.main()
    assert capsys.readouterr().out.splitlines() == [
        "after the loop: encoder on cpu, refiner on sim:0",
        "after the last model: refiner on cpu, decoder on sim:0",
        "after offload(): decoder on cpu",
        "result: (1, 256) on sim:0",
    ]


def run(folder: Path, script: str, *arguments: str) -> str:
    """What an example prints; `folder` is where it runs and all that it may write to."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), *arguments],
        cwd=folder,
        env=os.environ | OFFLINE | {"TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
