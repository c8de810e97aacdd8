"""A program without Accelerate (and PEFT, which needs it): a pipeline runs plainly, then placed in several ways.

    python -m tests.diffusers_loader.without_accelerate FOLDER NAME

prints "same" for each way in which the pipeline NAME, saved in FOLDER, makes the same as a plain one.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.absent import hide

if __name__ == "__main__":
    hide("accelerate", "peft")

import torch

import hf_bigload

from .conftest import load
from .pipelines import run, weight_bytes


def main(folder: Path, name: str) -> None:
    expected = run(load(folder, name, low_cpu_mem_usage=False), name)
    budget = {"cpu": weight_bytes(folder) * 7 // 10}
    hf_bigload.enable()
    for options in ({"device_map": {"": "disk"}}, {"device_map": "auto", "max_memory": budget}, {"device_map": "cpu"}):
        pipeline = load(folder, name, **options)
        print("same" if torch.equal(run(pipeline, name), expected) else "different", options)
        pipeline.to("cpu")
        print("same" if torch.equal(run(pipeline, name), expected) else "different", options, "moved")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
