"""`torch.compile` over streamed blocks: the same results, one graph per block, and none again at the next call."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hf_bigload
from hf_bigload.dispatch import compiling
from hf_bigload.dispatch.attach import detach
from hf_bigload.dispatch.hooks import ModelHook, add_hook_to_module
from hf_bigload.errors import OffloadedWeightError
from tests import simdev

from . import Net, assert_model_at_rest, assert_same_gradients, from_disk, gradients, same_bits, save, seeded

LAYERS, VERSIONS = 5, 4
"""Blocks of a model, and how many versions of one function the compiler may keep here (it is 8 by itself): fewer."""


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Nothing compiled yet; passing the compiler's limit on versions is an error, not a quiet fall-back."""
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(recompile_limit=VERSIONS, fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


class Counting:
    """A backend that runs graphs as they are, and keeps them."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        self.graphs.append(graph)
        return graph.forward

    def __len__(self) -> int:
        return len(self.graphs)


def breaks() -> list[str]:
    return list(torch._dynamo.utils.counters["graph_break"])


def nbytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def streamed(plain: nn.Module, folder: Path, where: str) -> Any:
    """A copy of `plain` that rests on disk, all of it or the half that does not fit the budget."""
    half = {"device_map": "auto", "max_memory": {"cpu": int(0.6 * nbytes(plain))}}
    model = from_disk(plain, folder, **(half if where == "half" else {}))
    assert any(hasattr(module, "_hf_hook") for module in model.modules())
    return model


def llama(layers: int = LAYERS) -> tuple[Any, dict[str, torch.Tensor]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "max_position_embeddings": 64}
    model = seeded(LlamaForCausalLM, LlamaConfig(num_hidden_layers=layers, vocab_size=50, **sizes))
    return model, {"input_ids": torch.arange(7)[None]}


def gpt2(layers: int = LAYERS) -> tuple[Any, dict[str, torch.Tensor]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    tokens = {"bos_token_id": 0, "eos_token_id": 49}
    config = GPT2Config(n_embd=32, n_layer=layers, n_head=4, vocab_size=50, n_positions=64, **tokens)
    return seeded(GPT2LMHeadModel, config), {"input_ids": torch.arange(7)[None]}


def t5(layers: int = 2) -> tuple[Any, dict[str, torch.Tensor]]:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=layers, num_heads=4, vocab_size=50, decoder_start_token_id=0
    )
    inputs = {"input_ids": torch.arange(7)[None], "decoder_input_ids": torch.arange(3)[None]}
    return seeded(T5ForConditionalGeneration, config), inputs


@pytest.mark.parametrize(("make", "where"), [(llama, "disk"), (llama, "half"), (t5, "half")])
def test_a_language_model_gives_the_same_bits_and_compiles_once(make: Any, where: str, tmp_path: Path) -> None:
    plain, inputs = make()
    model = streamed(plain, tmp_path, where)
    backend = Counting()
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        expected = plain(**inputs).logits
        assert same_bits(compiled(**inputs).logits, expected)
        graphs = len(backend)
        assert graphs >= 4
        for _ in range(2):
            assert same_bits(compiled(**inputs).logits, expected)
    assert len(backend) == graphs
    assert breaks() and all(compiling.BORDER in reason for reason in breaks())
    assert_model_at_rest(model)


@pytest.mark.parametrize("where", ["disk", "half"])
def test_every_block_is_one_graph(where: str, tmp_path: Path) -> None:
    model = streamed(seeded(Net, LAYERS), tmp_path, where)
    backend = Counting()
    with torch.no_grad():
        torch.compile(model, backend=backend)(torch.randn(4, 8))
    assert len(backend) == LAYERS + 3 if where == "disk" else LAYERS <= len(backend) <= LAYERS + 3
    layers = [g for g in backend.graphs if any(node.target is torch.tanh for node in g.graph.nodes)]
    assert len(layers) == LAYERS


def by_torch(model: nn.Module, backend: Any) -> Any:
    return torch.compile(model, backend=backend)


def by_method(model: nn.Module, backend: Any) -> Any:
    model.compile(backend=backend)
    return model


def by_forward(model: nn.Module, backend: Any) -> Any:
    model.forward = torch.compile(model.forward, backend=backend)
    return model


def by_block(model: Any, backend: Any) -> Any:
    for layer in model.layers:
        layer.compile(backend=backend)
    return model


def by_wrapped_block(model: Any, backend: Any) -> Any:
    for i, layer in enumerate(model.layers):
        model.layers[i] = torch.compile(layer, backend=backend)
    return model


@torch.no_grad()
@pytest.mark.parametrize("compiled", [by_torch, by_method, by_forward, by_block, by_wrapped_block])
def test_every_way_to_compile_gives_the_same_bits(compiled: Any, tmp_path: Path) -> None:
    plain, x, backend = seeded(Net, LAYERS), torch.randn(4, 8), Counting()
    model = compiled(streamed(plain, tmp_path, "half"), backend)
    assert same_bits(model(x), plain(x))
    graphs = len(backend)
    assert graphs  # fewer than there are blocks: those that rest in RAM may share one
    assert same_bits(model(x), plain(x)) and len(backend) == graphs


@pytest.mark.parametrize("make", [llama, t5])
def test_generate_gives_the_same_tokens_and_compiles_once(make: Any, tmp_path: Path) -> None:
    plain, inputs = make(1)
    backend = Counting()
    model = by_method(from_disk(plain, tmp_path), backend)
    options = {"input_ids": inputs["input_ids"], "max_new_tokens": 4, "do_sample": False}
    expected = plain.generate(**options)
    assert torch.equal(model.generate(**options), expected)
    graphs = len(backend)
    assert graphs
    assert torch.equal(model.generate(**options), expected) and len(backend) == graphs


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("where", ["disk", "half"])
def test_gradients_are_those_of_the_plain_model(backend: str, where: str, tmp_path: Path) -> None:
    plain = seeded(Net, LAYERS)
    model = streamed(plain, tmp_path, where)
    compiled, x = torch.compile(model, backend=backend), torch.randn(4, 8)
    for _ in range(2):
        plain.zero_grad(), model.zero_grad()
        plain(x).square().sum().backward()
        compiled(x).square().sum().backward()
        assert_same_gradients(plain, model)
    assert_model_at_rest(model)


class Offset(ModelHook):
    """What a person may add around a block; each computes something else."""

    def __init__(self, by: int) -> None:
        self.by = by

    def pre_forward(self, module: nn.Module, /, x: torch.Tensor) -> Any:
        return (x + self.by,), {}

    def post_forward(self, module: nn.Module, output: torch.Tensor) -> torch.Tensor:
        return output / 2


@torch.no_grad()
def test_hooks_that_people_add_are_compiled_with_their_block(tmp_path: Path) -> None:
    plain = seeded(Net, LAYERS)
    model = streamed(plain, tmp_path, "half")
    for each in (plain, model):
        for i, layer in enumerate(each.layers):
            add_hook_to_module(layer, Offset(i), append=True)
    x, backend = torch.randn(4, 8), Counting()
    compiled = torch.compile(model, backend=backend)
    assert same_bits(compiled(x), plain(x))
    graphs = len(backend)
    assert same_bits(compiled(x), plain(x)) and len(backend) == graphs


class Broken(nn.Module):
    """A block that the compiler cannot take in one piece."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(x) + self.factor
        torch._dynamo.graph_break()
        return self.inner(x) * self.factor


class Breaking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Broken(i) for i in range(LAYERS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@torch.no_grad()
@pytest.mark.parametrize("regions", [True, False], ids=["regions", "older torch"])
def test_a_graph_break_inside_a_block_is_allowed(
    regions: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not regions:
        monkeypatch.setattr(compiling, "_new_region", lambda: None)
    elif not hasattr(compiling.eval_frame, "set_eval_frame_isolate_recompiles_id"):
        pytest.skip("this torch cannot count the versions of one function apart")
    plain = seeded(Breaking)
    model = from_disk(plain, tmp_path)
    x, backend = torch.randn(4, 8), Counting()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=regions):
        compiled = torch.compile(model, backend=backend)
        assert same_bits(compiled(x), plain(x))
        graphs = len(backend)
        assert same_bits(compiled(x), plain(x)) and len(backend) == graphs
    assert graphs >= 2 * LAYERS - 1 if regions else graphs > LAYERS


@torch.no_grad()
def test_an_error_inside_a_block_leaves_model_and_compiler_working(tmp_path: Path) -> None:
    plain = seeded(Net, LAYERS)
    model = streamed(plain, tmp_path, "half")
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(Exception, match=r"shape|size"):
        compiled(torch.randn(4, 5))
    assert compiling._switch(None) is None
    x = torch.randn(4, 8)
    assert same_bits(compiled(x), plain(x))
    assert_model_at_rest(model)


@torch.no_grad()
def test_compiled_before_the_dispatch_or_used_after_its_end(tmp_path: Path) -> None:
    plain = seeded(Net, LAYERS)
    model, x = copy.deepcopy(plain), torch.randn(4, 8)
    compiled = torch.compile(model, backend="eager")
    assert same_bits(compiled(x), plain(x))
    hf_bigload.load_checkpoint_and_dispatch(model, save(plain, tmp_path), device_map={"": "disk"})
    assert same_bits(compiled(x), plain(x)) and same_bits(compiled(x), plain(x))
    assert hf_bigload.inspect(model).stats.bytes_read > nbytes(plain), "it streamed"
    detach(model)
    assert same_bits(compiled(x), plain(x)) and same_bits(model(x), plain(x))
    assert all(module._compiled_call_impl is None for module in model.modules())


@torch.no_grad()
def test_a_copy_of_a_compiled_model_is_a_model_of_its_own(tmp_path: Path) -> None:
    plain, x = seeded(Net, LAYERS), torch.randn(4, 8)
    model = by_method(streamed(plain, tmp_path, "half"), "eager")
    model(x)
    copied = copy.deepcopy(model)
    for parameter in copied.parameters():
        parameter.zero_()
    assert same_bits(torch.compile(copied, backend="eager")(x), torch.zeros(4, 3))
    assert same_bits(model(x), plain(x))


@torch.no_grad()
def test_what_was_compiled_goes_with_the_model(tmp_path: Path) -> None:
    model = from_disk(seeded(Net, LAYERS), tmp_path)
    torch.compile(model, backend="eager")(torch.randn(4, 8))
    before = len(compiling._own)
    assert before >= LAYERS
    del model
    gc.collect()
    assert len(compiling._own) <= before - LAYERS


@torch.no_grad()
@pytest.mark.parametrize("trace", ["export", "strict export", "fx"])
def test_tracing_gives_the_right_values_or_an_error(trace: str, tmp_path: Path) -> None:
    plain, x = seeded(Net, 3), torch.randn(4, 8)
    model = from_disk(plain, tmp_path)
    with contextlib.suppress(torch._dynamo.exc.Unsupported):
        if trace == "fx":
            traced: Any = torch.fx.symbolic_trace(model)
        else:
            traced = torch.export.export(model, (x,), strict=trace == "strict export").module()
        model(torch.randn(4, 8))  # slots have other weights now
        assert same_bits(traced(x), plain(x))
    assert same_bits(model(x), plain(x))
    assert_model_at_rest(model)


@torch.no_grad()
def test_fullgraph_is_refused_and_says_why(tmp_path: Path) -> None:
    model = from_disk(seeded(Net), tmp_path)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="do not ask for fullgraph=True"):
        torch.compile(model, backend="eager", fullgraph=True)(torch.randn(4, 8))
    assert_model_at_rest(model)


def test_a_model_that_is_not_compiled_imports_no_compiler(tmp_path: Path) -> None:
    save(nn.Sequential(nn.Linear(2, 2)), tmp_path)
    script = (
        "import sys, torch, hf_bigload; from torch import nn;"
        f"m = hf_bigload.load_checkpoint_and_dispatch(nn.Sequential(nn.Linear(2, 2)), {str(tmp_path)!r}, "
        "device_map={'': 'disk'}); m(torch.ones(1, 2)); assert hasattr(m[0], '_hf_hook') or hasattr(m, '_hf_hook');"
        "print('torch._dynamo' in sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"


class TestOnAccelerators:
    """The compiler's own tracing knows the simulated device; inductor, which would make its kernels, does not."""

    @staticmethod
    def load(plain: nn.Module, folder: Path, ram: float = 1.0) -> Any:
        budgets = {0: nbytes(plain) // 3, "cpu": int(nbytes(plain) * ram)}
        return from_disk(plain, folder, device_map="auto", max_memory=budgets)

    @pytest.mark.parametrize("ram", [1.0, 0.3], ids=["RAM", "disk"])
    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    def test_same_bits_same_gradients_and_compiled_once(self, ram: float, backend: str, tmp_path: Path) -> None:
        plain, x = seeded(Net, LAYERS), torch.randn(4, 8)
        with simdev.devices([1 << 20]):
            model = self.load(plain, tmp_path, ram)
            compiled = torch.compile(model, backend=backend)
            with torch.no_grad():
                assert same_bits(compiled(x), plain(x))
                graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
                assert same_bits(compiled(x), plain(x))
            assert graphs == LAYERS + 3 == torch._dynamo.utils.counters["stats"]["unique_graphs"]
            plain(x).square().sum().backward()
            compiled(x).square().sum().backward()
            for name, gradient in gradients(model).items():
                assert gradient is not None
                assert same_bits(gradient.cpu(), plain.get_parameter(name).grad), name
            assert_model_at_rest(model)

    @torch.no_grad()
    @pytest.mark.parametrize(
        "options",
        [
            {"mode": "reduce-overhead"},
            {"mode": "max-autotune"},
            {"options": {"triton.cudagraphs": True}},
            {"backend": "cudagraphs"},
        ],
        ids=str,
    )
    def test_cuda_graphs_are_refused_before_anything_is_compiled(self, options: Any, tmp_path: Path) -> None:
        plain, x = seeded(Net, 6), torch.randn(4, 8)
        with simdev.devices([1 << 20]):
            model = self.load(plain, tmp_path)
            with pytest.raises(OffloadedWeightError, match=r"(?s)stream to sim:0.*addresses.*mode='default'"):
                torch.compile(model, **options)(x)
            assert not torch._dynamo.utils.counters["stats"]["unique_graphs"]
            assert same_bits(torch.compile(model, backend="eager")(x), plain(x))
            assert_model_at_rest(model)

    @torch.no_grad()
    def test_cuda_graphs_as_a_setting_of_the_process_are_refused_too(self, tmp_path: Path) -> None:
        from torch._inductor import config

        with simdev.devices([1 << 20]):
            model = self.load(seeded(Net, 6), tmp_path)
            with config.patch({"triton.cudagraphs": True}), pytest.raises(OffloadedWeightError, match="CUDA graphs"):
                torch.compile(model)(torch.randn(4, 8))

    @torch.no_grad()
    def test_a_model_that_does_not_stream_is_not_refused(self, tmp_path: Path) -> None:
        """Spread over two devices it has hooks, and weights that stay where they are."""
        plain, x = seeded(Net, 6), torch.randn(4, 8)
        with simdev.devices([1 << 20, 1 << 20]):
            halves = {0: nbytes(plain) * 2 // 3, 1: nbytes(plain)}
            model = from_disk(plain, tmp_path, device_map="auto", max_memory=halves)
            assert not hf_bigload.inspect(model).plan.streams and hasattr(model, "_hf_hook")
            assert same_bits(torch.compile(model, backend="cudagraphs")(x), plain(x))


@torch.no_grad()
def test_inductor_agrees_with_inductor_on_the_plain_model(tmp_path: Path) -> None:
    plain, x = seeded(Net, 2), torch.randn(4, 8)
    model = from_disk(plain, tmp_path)
    expected = torch.compile(plain)(x)
    compiled = torch.compile(model, mode="reduce-overhead")  # CUDA graphs are nothing that a CPU has
    for _ in range(2):
        torch.testing.assert_close(compiled(x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["disk", "half"])
@pytest.mark.parametrize("make", [functools.partial(llama, 9), functools.partial(gpt2, 3), functools.partial(t5, 3)])
def test_inductor_agrees_on_language_models(make: Any, where: str, tmp_path: Path) -> None:
    plain, inputs = make()
    model = streamed(plain, tmp_path, where)
    with torch.no_grad():
        expected = torch.compile(plain)(**inputs).logits
        compiled = torch.compile(model)
        for _ in range(2):
            torch.testing.assert_close(compiled(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
    model.compile()
    options = {"input_ids": inputs["input_ids"], "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(**options), plain.generate(**options))


@pytest.mark.slow
@pytest.mark.parametrize("where", ["disk", "half"])
def test_inductor_gives_the_gradients_of_the_plain_model(where: str, tmp_path: Path) -> None:
    plain, x = seeded(Net, LAYERS), torch.randn(4, 8)
    model = streamed(plain, tmp_path, where)
    torch.compile(plain)(x).square().sum().backward()
    torch.compile(model)(x).square().sum().backward()
    expected = gradients(plain)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6)
    assert_model_at_rest(model)
