"""What `torch.compile` sees of a hooked model: each block's own forward, and nothing of the hook around it.

A hook is a border. The compiler ends its graph there and is switched off, so that it traces neither the moves of
weights nor the bookkeeping behind them; around the block's own forward it is switched on again, as it was. To the graph
of a block its weights are inputs: at which address they arrive does not matter.

The compiler keeps what it compiled with the code object of a function, and gives up on one after a few versions. The
blocks of a model run the same code, so each gets a copy of its own to be entered by.

Nothing here imports the compiler: that takes seconds, and most processes never compile.
"""

from __future__ import annotations

import functools
import sys
import types
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torch._C._dynamo import eval_frame

from ..errors import OffloadedWeightError
from ..module_tensors import iter_hooks

Forward = Callable[..., Any]
FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])

BORDER = "weights come and go around this module, so its graph is its own; do not ask for fullgraph=True"
"""Why the compiler's graph ends here, for its messages."""

_CPU = torch.device("cpu")

_switch: Callable[[Any], Any] = eval_frame.set_eval_frame
"""Sets this thread's compiler (None: none) and returns the one before."""


def skipped(function: FunctionT) -> FunctionT:
    """`function`, whose own lines the compiler neither traces nor compiles; what it calls, it may."""
    code = function.__code__
    if hasattr(eval_frame, "skip_code"):  # older torch
        eval_frame.skip_code(code)
    else:
        action = eval_frame._FrameAction
        eval_frame.set_code_exec_strategy(code, eval_frame._FrameExecStrategy(action.SKIP, action.DEFAULT))
    return function


def _border(function: FunctionT) -> FunctionT:
    skipped(function)
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    function._torchdynamo_disable_msg = BORDER  # type: ignore[attr-defined]
    return function


def untraced(function: Forward) -> Forward:
    """`function`, left alone by `torch.compile` with all that it calls."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        compiler = _switch(None)
        try:
            return function(*args, **kwargs)
        finally:
            _switch(compiler)

    return _border(call)


def compiled_inside(run: Forward) -> Forward:
    """`run` of a hook, left alone by `torch.compile`, except for the `forward` that it is given.

    `run` then raises `OffloadedWeightError` where the compiler would make CUDA graphs of weights that stream.
    """

    @functools.wraps(run)
    def call(hook: Any, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        compiler = _switch(None)
        if compiler is None:
            return run(hook, module, forward, args, kwargs)
        try:
            if _makes_cuda_graphs(compiler):
                _refuse_if_streaming(module)
            return run(hook, module, functools.partial(_compiled, compiler, module, forward), args, kwargs)
        finally:
            _switch(compiler)

    return _border(call)


@dataclass(frozen=True)
class _Own:
    """What a block has to itself, for the compiler to keep its graphs with."""

    enter: Forward
    region: int | None
    """For the code that it shares with others, which is compiled where a graph breaks inside the block."""


_own: weakref.WeakKeyDictionary[nn.Module, _Own] = weakref.WeakKeyDictionary()


def _compiled(compiler: Any, module: nn.Module, forward: Forward, /, *args: Any, **kwargs: Any) -> Any:
    """`forward` with the compiler switched on."""
    own = _own.get(module) or _own.setdefault(module, _Own(_copied(_enter), _new_region()))
    region = None if own.region is None else eval_frame.set_eval_frame_isolate_recompiles_id(own.region)
    _switch(compiler)
    try:
        return own.enter(module, forward, args, kwargs)
    finally:
        _switch(None)
        if region is not None:
            eval_frame.set_eval_frame_isolate_recompiles_id(region)


class _Apart(functools.partial):
    """The call of a module that has no hook, by code of its own."""


def compile_apart(module: nn.Module) -> None:
    """Let `torch.compile`, when it comes to `module`, not count it with the others that run the same code.

    For a block without a hook among blocks that have one: what calls them all is not compiled, so each counts alone.
    """
    if module._compiled_call_impl is None:
        module._compiled_call_impl = _Apart(_copied(_call), module)


def compile_together(module: nn.Module) -> None:
    """Undo `compile_apart`."""
    if isinstance(module._compiled_call_impl, _Apart):
        del module._compiled_call_impl


def _call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return module._call_impl(*args, **kwargs)


def _enter(module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return forward(*args, **kwargs)


def _copied(function: Any) -> Forward:
    return types.FunctionType(function.__code__.replace(), function.__globals__)


def _new_region() -> int | None:
    """A number that no other `isolate_recompiles` has, where torch knows that option."""
    regions = getattr(sys.modules.get("torch._dynamo.eval_frame"), "_next_isolate_recompiles_id", None)
    return None if regions is None else next(regions)


def _refuse_if_streaming(module: nn.Module) -> None:
    """Before anything below `module` is compiled. On the CPU the compiler leaves CUDA graphs out by itself."""
    for name, block in module.named_modules():
        for hook in iter_hooks(block):
            if getattr(hook, "offload", False) and getattr(hook, "runs_on", _CPU).type != "cpu":
                raise OffloadedWeightError(
                    f"torch.compile was asked for CUDA graphs, and the weights of {name or 'this module'} "
                    f"({type(block).__name__}) stream to {hook.runs_on}: a CUDA graph only works with the addresses it "
                    "was recorded with, and streamed weights arrive at others each time. Compile with mode='default' "
                    "or mode='max-autotune-no-cudagraphs', or give the model a plan without offload (a larger "
                    "max_memory)."
                )


def _makes_cuda_graphs(compiler: Any) -> bool:
    """By the mode, the options, the backend, or the setting for the whole process."""
    backend = compiler
    while hasattr(backend, "_torchdynamo_orig_backend"):
        backend = backend._torchdynamo_orig_backend
    name = getattr(backend, "compiler_name", None)
    if name != "inductor":
        return name == "cudagraphs"
    from torch._inductor import config

    return getattr(backend, "config", {}).get("triton.cudagraphs", config.triton.cudagraphs)
