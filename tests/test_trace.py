"""What a trace says a request takes is what a real one takes; and the model never notices."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers")

import transformers

import hf_bigload
from hf_bigload import flow
from hf_bigload import trace as module
from hf_bigload.estimate import BOUND_ERROR, bound, fields_of
from hf_bigload.skeleton import model_spec
from hf_bigload.specs import Needs, Work, Workload
from hf_bigload.trace import ERROR, EXTRAPOLATION_ERROR, needs_of
from tests.architectures.tiny import FIRST_WORD, LAST_WORD, architecture, tiny_model

BATCH, CONTEXT, NEW = 2, 24, 6
DECODERS = (
    "causal:llama",  # grouped heads
    "causal:mistral",  # a sliding window, shorter than the context
    "causal:gemma2",  # every second layer has one
    "causal:deepseek_v3",  # latent attention, experts
    "causal:mamba",
    "causal:jamba",  # attention and state spaces
    "causal:bamba",
    "causal:qwen3_next",
    "causal:mixtral",
    "causal:gpt2",
)
ENCODER_DECODERS = ("seq2seq:t5", "seq2seq:bart")


class Live(TorchDispatchMode):
    """Bytes of the tensors that a real run makes, as long as they live; counted apart from the package's own meter."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        self.now = self.peak = 0
        self.seen: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.count(tensor.untyped_storage())
        return out

    def count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.seen:

            def freed(_: object) -> None:
                self.now -= size
                del self.seen[key]

            self.seen[key] = weakref.ref(storage, freed)
            self.now += size
            self.peak = max(self.peak, self.now)


def words(tokens: int = CONTEXT) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randint(FIRST_WORD, LAST_WORD, (BATCH, tokens))


def needs(model: nn.Module, new_tokens: int = NEW, context: int = CONTEXT) -> Needs:
    found = needs_of(model, model_spec(model), Workload(BATCH, context, new_tokens))
    assert found.method == "trace"
    return found


def tensors_in(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """Every tensor that hangs on a cache."""
    if id(value) in seen or isinstance(value, type):
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from tensors_in(inner, seen)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from tensors_in(inner, seen)
    elif hasattr(value, "__dict__") and type(value).__module__.startswith("transformers."):
        yield from tensors_in(vars(value), seen)


def bytes_of(cache: Any) -> int:
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors_in(cache, set())}
    return sum(storages.values())


def generated(model: Any) -> Any:
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        output = model.generate(words(), max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True)
    assert output.sequences.shape[1] == NEW + (1 if model.config.is_encoder_decoder else CONTEXT)
    return output.past_key_values


def per_token(model: nn.Module, found: Needs) -> int:
    """What is remembered beside the encoder's output, which no cache holds."""
    once = {block.name for block in model_spec(model).blocks if block.calls == 1}
    return sum(size for name, size in found.cache.items() if name not in once and not name.startswith("encoder."))


@pytest.mark.parametrize("name", [*DECODERS, *ENCODER_DECODERS])
def test_the_cache_has_the_bytes_that_generating_leaves(name: str) -> None:
    model = tiny_model(architecture(name))
    assert per_token(model, needs(model)) == bytes_of(generated(model))


@pytest.mark.parametrize("name", DECODERS)
def test_the_peak_is_that_of_a_real_forward(name: str) -> None:
    model = tiny_model(architecture(name))
    found = needs(model, new_tokens=1)
    with torch.no_grad(), Live(model) as live:
        model(words(), use_cache=True)
    last = [block.name for block in model_spec(model).blocks if block.whole][-1]  # where such a small model peaks
    before = sum(size for block, size in found.cache.items() if block != last)
    assert live.peak - before == pytest.approx(found.activations, rel=ERROR)


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_the_peak_is_that_of_a_real_encoder_where_the_decoder_begins_with_one_token(name: str) -> None:
    model = tiny_model(architecture(name))
    with torch.no_grad(), Live(model) as live:
        model.get_encoder()(words())
    assert live.peak == pytest.approx(needs(model).activations, rel=ERROR)


@pytest.mark.parametrize("name", ["causal:llama", "causal:gemma2", "causal:qwen3_next", "seq2seq:t5"])
def test_blocks_that_are_alike_need_to_run_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(architecture(name))
    once = needs(model)
    monkeypatch.setattr(module, "kind_of", lambda block: object())
    monkeypatch.setattr(module, "_known", {})
    assert needs(model) == once


def test_operations_are_those_of_the_multiplications() -> None:
    model = tiny_model(architecture("causal:llama"))
    found, tokens = needs(model), BATCH * CONTEXT
    head = 2 * model.lm_head.weight.numel()
    assert [work.operations for work in found.work["lm_head"]] == [head * tokens, head * BATCH]
    weights = sum(p.numel() for p in model.model.layers[0].parameters() if p.dim() == 2)
    first, step = (work.operations for work in found.work["model.layers.5"])
    assert first > 2 * weights * tokens and step > 2 * weights * BATCH
    assert found.work["model.layers.0"] == found.work["model.layers.5"]


def test_a_tower_runs_once() -> None:
    model = transformers.LlavaForConditionalGeneration(llava_config()).eval()
    found = needs(model)
    tower = [figures for name, figures in found.work.items() if "vision_tower" in name]
    assert sum(first.operations for first, _ in tower) > 0 and all(step == Work() for _, step in tower)
    assert per_token(model, found) == bytes_of(generated(model))


def llava_config() -> Any:
    shared = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    return transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**shared, image_size=28, patch_size=14),
        text_config=transformers.LlamaConfig(**shared, num_key_value_heads=2, vocab_size=99),
        image_token_index=98,
    )


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("AutoModel", "BertConfig(num_hidden_layers=3)"),
        ("AutoModel", "ViTConfig(num_hidden_layers=3)"),
        ("AutoModelForSpeechSeq2Seq", "WhisperConfig(num_hidden_layers=2, encoder_layers=2, decoder_layers=2)"),
    ],
)
def test_other_inputs_are_traced_too(kind: str, config: str) -> None:
    name, _, fields = config.partition("(")
    options = eval(f"dict({fields}")
    with torch.device("meta"):
        model = getattr(transformers, kind).from_config(getattr(transformers, name)(**options)).eval()
    found = needs(model)
    assert found.activations > 0 and found.work


# ---------------------------------------------------------------- models of real sizes, on meta


def on_meta(config: Any, dtype: torch.dtype = torch.float16) -> Any:
    kind = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        return kind.from_config(config, dtype=dtype).eval()


def request(model: nn.Module, workload: Workload) -> Needs:
    return needs_of(model, model_spec(model), workload)


def test_llama_7b_takes_what_is_known_of_it() -> None:
    half = request(on_meta(transformers.LlamaConfig()), Workload(1, 4096, 1))
    assert sum(half.cache.values()) == 2 * 32 * 4096 * 32 * 128 * 2
    single = request(on_meta(transformers.LlamaConfig(), torch.float32), Workload(1, 4096, 1))
    assert single.activations == pytest.approx(0.94e9, rel=0.01)


def test_nothing_of_a_models_size_is_allocated() -> None:
    config = transformers.LlamaConfig(
        num_hidden_layers=80, hidden_size=8192, num_attention_heads=64, num_key_value_heads=8, intermediate_size=28672
    )
    model, process = on_meta(config), psutil.Process()
    before = process.memory_info().rss
    found = request(model, Workload(4, 8192, 128))
    assert found.activations > 4e9 and process.memory_info().rss - before < 3e8
    assert found.cache["model.layers.79"] == 2 * 4 * (8192 + 127) * 1024 * 2


def test_a_loop_over_tokens_is_extrapolated(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(architecture("causal:jamba"))
    model.config.max_position_embeddings = 1000
    drawn = needs(model, context=100)
    monkeypatch.setattr(module, "_known", {})
    monkeypatch.setattr(module, "LONGEST", 100_000)
    exact = needs(model, context=100)
    assert drawn.error == EXTRAPOLATION_ERROR and drawn.cache == exact.cache
    assert drawn.activations == pytest.approx(exact.activations, rel=EXTRAPOLATION_ERROR)
    total, of_exact = (sum(first.operations for first, _ in each.work.values()) for each in (drawn, exact))
    assert total == pytest.approx(of_exact, rel=EXTRAPOLATION_ERROR)


@pytest.mark.parametrize(
    "config",
    [
        transformers.LlamaConfig(),
        transformers.MixtralConfig(),
        transformers.Gemma2Config(),
        transformers.T5Config(d_model=1024, num_layers=24, num_heads=16, d_ff=4096),
    ],
    ids=lambda config: config.model_type,
)
def test_a_bound_is_no_less_than_a_trace_and_not_much_more(config: Any) -> None:
    model, workload = on_meta(config), Workload()
    traced, most = request(model, workload), bound(model_spec(model), workload, config.to_dict())
    assert traced.activations <= most.activations <= (1 + BOUND_ERROR) * traced.activations
    assert sum(traced.cache.values()) <= sum(most.cache.values())


def test_a_bound_counts_the_scores_of_eager_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    model = on_meta(transformers.LlamaConfig())
    fused = bound(model_spec(model), Workload(), fields_of(model.config))
    model.config._attn_implementation = "eager"
    eager = bound(model_spec(model), Workload(), fields_of(model.config))
    assert eager.activations > 2 * fused.activations
    saved = model.config.to_dict() | {"attn_implementation": "eager"}  # as a config.json may have it
    assert bound(model_spec(model), Workload(), saved) == eager
    asked: list[Needs] = []
    monkeypatch.setattr(flow, "_has_room", lambda _spec, _budget, most: asked.append(most) or True)
    hf_bigload.plan(model)
    assert [most.activations for most in asked] == [eager.activations]


# ---------------------------------------------------------------- what stays as it was


def test_a_real_model_is_not_touched() -> None:
    model = tiny_model(architecture("causal:llama")).train()
    tensors = {name: t for name, t in (*model.named_parameters(), *model.named_buffers())}
    before = {name: t.detach().clone() for name, t in tensors.items()}
    attributes = {name: set(vars(each)) for name, each in model.named_modules()}
    needs(model)
    after = dict((*model.named_parameters(), *model.named_buffers()))
    assert after.keys() == tensors.keys() and all(after[name] is tensors[name] for name in tensors)
    assert all(torch.equal(t, before[name]) for name, t in after.items())
    assert {name: set(vars(each)) for name, each in model.named_modules()} == attributes and model.training


def test_what_is_asked_twice_is_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(architecture("causal:llama"))
    found = needs(model)
    monkeypatch.setattr(module, "trace", None)
    assert needs(tiny_model(architecture("causal:llama"), seed=1)) is found


@pytest.mark.parametrize(
    "mode", [torch.inference_mode, torch.enable_grad, lambda: torch.autocast("cpu"), lambda: torch.device("meta")]
)
def test_figures_do_not_depend_on_where_they_are_asked_for(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(architecture("causal:llama"))
    found = needs(model)
    monkeypatch.setattr(module, "_known", {})
    with mode():
        assert needs(model) == found


def test_figures_are_of_the_dtype_that_is_loaded() -> None:
    model = tiny_model(architecture("causal:llama"))
    half = model_spec(model, loaded_as=lambda _, t: ("bfloat16", 2 * t.numel()))
    workload = Workload(BATCH, CONTEXT, NEW)
    whole, halved = needs_of(model, model_spec(model), workload), needs_of(model, half, workload)
    assert 2 * sum(halved.cache.values()) == sum(whole.cache.values())


def test_a_model_that_cannot_be_traced_gets_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        return hidden_states * hidden_states.sum().item()

    model = tiny_model(architecture("causal:llama"))
    monkeypatch.setattr(type(model.model.layers[0].mlp), "forward", forward)
    monkeypatch.setattr(module, "_known", {})
    found = request(model, Workload(BATCH, CONTEXT, NEW))
    assert (
        found.method == "bound" and found.activations and found.cache.keys() == {f"model.layers.{i}" for i in range(6)}
    )


def test_a_loader_that_fails_leaves_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("on purpose")

    monkeypatch.setattr(module.registry, "request", fail)
    assert request(tiny_model(architecture("causal:llama")), Workload(BATCH, CONTEXT, NEW)).method == "bound"


def test_what_another_thread_drops_at_once_is_still_given(monkeypatch: pytest.MonkeyPatch) -> None:
    class Forgetful(dict[Any, Any]):
        def __setitem__(self, key: Any, value: Any) -> None:
            pass

    monkeypatch.setattr(module, "_known", Forgetful())
    assert needs(tiny_model(architecture("causal:llama"))).method == "trace"


def test_nothing_is_known_of_a_module_that_is_nobodys() -> None:
    assert request(nn.Sequential(nn.Linear(4, 4)), Workload()) == Needs(Workload())
