"""Pipelines from a repository on a Hub, here an embedded one, and the card of one as it stands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from examples import image_demo
from examples.embedded_hub import EmbeddedHub, write_tiny_flux

ROOT = Path(__file__).parents[2]

PROGRAM = """
import torch
from diffusers import DiffusionPipeline

import hf_bigload
from hf_bigload.describe import describe

described = describe("black-forest-labs/FLUX.1-schnell", "bfloat16")
assert described.spec.blocks[0].name.startswith("text_encoder.")
assert described.repository.download_bytes == described.repository.file_bytes > 1_000_000

def image(**options):
    pipe = DiffusionPipeline.from_pretrained("black-forest-labs/FLUX.1-schnell", torch_dtype=torch.bfloat16, **options)
    generator = torch.Generator("cpu").manual_seed(0)
    return pipe("a cat", height=32, width=32, num_inference_steps=2, generator=generator, output_type="pt").images

plain = image()
assert describe("black-forest-labs/FLUX.1-schnell", "bfloat16").repository.download_bytes == 0
hf_bigload.enable()
assert torch.equal(plain, image(device_map="auto", max_memory={"cpu": "1MB"}))
print("the same")
"""


def test_a_pipeline_on_the_hub_is_described_then_downloaded_and_planned(tmp_path: Path) -> None:
    folder = write_tiny_flux(tmp_path / "flux")
    with EmbeddedHub({image_demo.REPO_ID: folder}) as hub:
        environment = {**hub.environment(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["the same"], done.stderr


def test_the_card_names_no_map_and_asks_for_the_librarys_offloading() -> None:
    card = image_demo.CARD.read_text()
    assert image_demo.REPO_ID in card and "enable_model_cpu_offload()" in card
    assert "hf_bigload" not in card and "device_map" not in card


@pytest.mark.slow
def test_the_card_of_an_image_model_runs_as_it_stands(capfd: pytest.CaptureFixture[str]) -> None:
    assert image_demo.main() == 0
    assert "the same image, bit for bit" in capfd.readouterr().out
    assert not os.path.exists(image_demo.IMAGE)
