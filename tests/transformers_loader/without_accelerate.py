"""A program in which Accelerate cannot be imported, and which says of each of its checks how it went.

    python -m tests.transformers_loader.without_accelerate FOLDER

prints a JSON object: name of the check -> "", or the traceback of its failure. Accelerate's absence is complete: no
module, no metadata.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.absent import hide

REPOSITORY = "org/tiny"
"""On the Hub that the environment names; a GPT-2, with other weights on its branch "other"."""
Check = Callable[[Path], None]
CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    CHECKS[function.__name__] = function
    return function


if __name__ == "__main__":
    hide("accelerate")

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, CompileConfig, PreTrainedModel, pipeline  # noqa: E402
from transformers.models.gemma3n import Gemma3nForCausalLM, Gemma3nTextConfig  # noqa: E402
from transformers.models.gemma4 import Gemma4ForCausalLM, Gemma4TextConfig  # noqa: E402
from transformers.utils import is_accelerate_available, logging  # noqa: E402

import hf_bigload  # noqa: E402
from tests.architectures.tiny import tiny_config  # noqa: E402

from .models import (  # noqa: E402
    CONFIGS,
    PLACEMENTS,
    Saved,
    assert_same_model,
    assert_same_weights,
    bytes_of,
    forward,
    generate,
    prompt,
    same,
    save,
    save_tokenizer,
)

MAPS: list[Any] = [
    "auto",
    "balanced",
    "balanced_low_0",
    "sequential",
    "cpu",
    torch.device("cpu"),
    {"": "cpu"},
    {"": "disk"},
    {"": "cpu", "lm_head": "disk"},
    {"model.embed_tokens": "cpu", "model": "disk", "lm_head.weight": "cpu"},
]


@check
def it_is_absent(folder: Path) -> None:
    assert not is_accelerate_available()
    try:
        import accelerate  # noqa: F401
    except ModuleNotFoundError:
        return
    raise AssertionError("it could be imported")


@check
def every_kind_of_map(folder: Path) -> None:
    llama = save("llama", folder)
    plain = llama.plain()
    for device_map in MAPS:
        assert_same_model(llama.load(device_map=device_map), plain)
        assert_same_model(llama.load(device_map=device_map, max_memory={"cpu": llama.nbytes // 2}), plain)


@check
def every_architecture_in_16_bit(folder: Path) -> None:
    for name in CONFIGS:
        saved = save(name, folder / name)
        plain = saved.plain(dtype=torch.bfloat16)
        for placement in PLACEMENTS:
            assert_same_model(saved.load(placement, dtype=torch.bfloat16), plain)


@check
def generating_whether_enabled_or_not(folder: Path) -> None:
    for name in CONFIGS:
        saved = save(name, folder / name)
        expected = generate(saved.plain())
        for placement in PLACEMENTS:
            model = saved.load(placement)
            assert same(generate(model), expected), (name, placement)
            with hf_bigload.enable():
                assert same(generate(model, num_beams=2), generate(model, num_beams=2))
                assert same(generate(model), expected), (name, placement)


@check
def the_pipeline(folder: Path) -> None:
    save("llama", folder)
    save_tokenizer(folder)
    options = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False}
    expected = pipeline("text-generation", model=str(folder))("w5 w9 w7", **options)
    for budget in ("1GB", "200KB"):
        with hf_bigload.enable(max_memory={"cpu": budget}):
            written = pipeline("text-generation", model=str(folder), device_map="auto")
        assert written("w5 w9 w7", **options) == expected
        assert ("disk" in written.model.hf_device_map.values()) == (budget == "200KB")


@check
def revisions_of_a_repository_on_the_hub(folder: Path) -> None:
    def load(**kwargs: Any) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(REPOSITORY, **kwargs)

    plain = {revision: load(revision=revision) for revision in ("main", "other")}
    assert not same(forward(plain["main"]), forward(plain["other"]))
    for revision, expected in plain.items():
        with hf_bigload.enable():
            model = load(revision=revision, device_map="auto", max_memory={"cpu": "130KB"})
        assert "disk" in model.hf_device_map.values()
        assert_same_model(model, expected)


@check
def resizing(folder: Path) -> None:
    for name in CONFIGS:
        _resize_alike(save(name, folder / name))


@check
def resizing_embeddings_of_every_layer(folder: Path) -> None:
    for cls, config in ((Gemma3nForCausalLM, Gemma3nTextConfig), (Gemma4ForCausalLM, Gemma4TextConfig)):
        torch.manual_seed(0)
        model = cls(tiny_config(config)).eval()
        model.save_pretrained(folder / cls.__name__)
        _resize_alike(Saved(folder / cls.__name__, cls, bytes_of(model)))


def _resize_alike(saved: Saved) -> None:
    def resized(model: PreTrainedModel) -> PreTrainedModel:
        torch.manual_seed(1)
        model.resize_token_embeddings(150)
        return model

    expected = resized(saved.plain())
    for placement in PLACEMENTS:
        assert_same_model(resized(saved.load(placement)), expected)
        model = saved.load(placement)
        with hf_bigload.enable():
            assert_same_model(resized(model), expected)
            assert same(generate(model), generate(expected))


@check
def saving(folder: Path) -> None:
    for name in CONFIGS:
        saved = save(name, folder / name)
        plain = saved.plain()
        for number, placement in enumerate(PLACEMENTS):
            target = folder / f"{name}-{number}"
            saved.load(placement).save_pretrained(target, max_shard_size=20_000)
            assert_same_weights(Saved(target, saved.auto, 0).plain(), plain)


@check
def compiling_is_not_tried_over_offloaded_weights(folder: Path) -> None:
    llama = save("llama", folder)
    config = CompileConfig(backend="eager", fullgraph=False)
    config._compile_all_devices = True
    expected = generate(llama.plain(), cache_implementation="static")

    def compiled(*_: Any) -> None:
        raise AssertionError("generate wanted to compile the model")

    for placement in PLACEMENTS[1:]:
        model = llama.load(placement)
        model.get_compiled_call = compiled
        assert same(generate(model, cache_implementation="static", compile_config=config), expected)


@check
def moving_casting_and_training(folder: Path) -> None:
    llama = save("llama", folder)
    for placement in PLACEMENTS:
        model, expected = llama.load(placement), llama.plain()
        for each in (model, expected):
            each(prompt(), labels=prompt()).loss.backward()
        for one, other in zip(model.parameters(), expected.parameters(), strict=True):
            assert same(one.grad, other.grad)
        assert_same_weights(model.to("cpu"), expected)
        assert same(forward(model.half()), forward(expected.half()))


def main(folder: Path) -> dict[str, str]:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    said = {}
    for name, function in CHECKS.items():
        try:
            function(folder / name)
            said[name] = ""
        except Exception:  # noqa: BLE001  what is wrong is what is to be said
            said[name] = traceback.format_exc()
        hf_bigload.disable()
    return said


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
