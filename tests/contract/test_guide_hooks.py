"""Hooks: around a module's forward, found under the documented attribute names, gone without a trace."""

from __future__ import annotations

import copy
import inspect
import pickle
import subprocess
import sys

import pytest
import torch
from torch import fx, nn

from hf_bigload.hooks import ModelHook, SequentialHook, add_hook_to_module, remove_hook_from_module


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.second = nn.Linear(4, 5)

    def forward(self, x):
        return self.second(self.norm(self.first(x)))


class AddOne(ModelHook):
    def pre_forward(self, module, *args, **kwargs):
        return (args[0] + 1, *args[1:]), kwargs


class Double(ModelHook):
    def post_forward(self, module, output):
        return output * 2


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def x():
    return torch.arange(6.0).reshape(2, 3)


def recording(engine, log, name="hook"):
    class Recording(engine.ModelHook):
        def init_hook(self, module):
            log.append(f"{name} init")
            return module

        def pre_forward(self, module, *args, **kwargs):
            log.append(f"{name} pre")
            return args, kwargs

        def post_forward(self, module, output):
            log.append(f"{name} post")
            return output

        def detach_hook(self, module):
            log.append(f"{name} detach")
            return module

    return Recording()


# ------------------------------------------------------------------------------------------------------ both engines


def test_a_hooked_module_is_the_same_to_its_callers(engine, net, x):
    expected = net(x)
    hook = engine.ModelHook()
    assert engine.add_hook_to_module(net, hook) is net
    assert net._hf_hook is hook
    assert net.forward.__name__ == "forward"
    assert list(inspect.signature(net.forward).parameters) == ["x"]
    assert torch.equal(net(x), expected)


def test_removing_a_hook_leaves_no_attribute(engine, net, x):
    expected = net(x)
    engine.add_hook_to_module(net, engine.ModelHook())
    assert engine.remove_hook_from_module(net) is net
    assert not hasattr(net, "_hf_hook")
    assert not hasattr(net, "_old_forward")
    assert net.forward.__func__ is Net.forward
    assert torch.equal(net(x), expected)


def test_a_module_without_a_hook_can_have_it_removed(engine, net):
    engine.remove_hook_from_module(net, recurse=True)
    assert not hasattr(net, "_hf_hook")


def test_removal_reaches_below_only_if_asked(engine, net):
    for module in (net, net.first):
        engine.add_hook_to_module(module, engine.ModelHook())
    engine.remove_hook_from_module(net)
    assert hasattr(net.first, "_hf_hook")
    engine.remove_hook_from_module(net, recurse=True)
    assert not hasattr(net.first, "_hf_hook")


def test_remove_hook_from_submodules_reaches_everything(engine, net):
    for module in net.modules():
        engine.add_hook_to_module(module, engine.ModelHook())
    engine.remove_hook_from_submodules(net)
    assert not any(hasattr(module, "_hf_hook") for module in net.modules())


def test_a_hook_sees_inputs_and_output(engine, net, x):
    log = []
    engine.add_hook_to_module(net, recording(engine, log))
    net(x)
    engine.remove_hook_from_module(net)
    assert log == ["hook init", "hook pre", "hook post", "hook detach"]


def test_a_hook_changes_what_goes_in_and_out(engine, net, x):
    expected = 2 * net(x + 1)
    engine.add_hook_to_module(net, AddOne())
    engine.add_hook_to_module(net, Double(), append=True)
    assert len(net._hf_hook.hooks) == 2
    assert torch.equal(net(x), expected)


def test_a_new_hook_takes_the_place_of_the_old_one(engine, net, x):
    expected = net(x + 1)
    for _ in range(2):
        engine.add_hook_to_module(net, AddOne())
    assert torch.equal(net(x), expected)


def test_no_grad_hooks_run_the_forward_without_autograd(engine, net, x):
    hook = engine.ModelHook()
    hook.no_grad = True
    engine.add_hook_to_module(net, hook)
    assert not net(x).requires_grad


def test_appending_without_a_hook_is_adding(engine, net):
    hook = engine.ModelHook()
    engine.add_hook_to_module(net, hook, append=True)
    assert net._hf_hook is hook


def test_a_copy_has_a_forward_of_its_own(engine, net, x):
    engine.add_hook_to_module(net, AddOne())
    copied = copy.deepcopy(net)
    expected = net(x)
    with torch.no_grad():
        net.second.weight.zero_()
    assert torch.equal(copied(x), expected)


def test_a_graph_module_can_be_edited_after_its_hook_is_gone(engine, net, x):
    graph = fx.symbolic_trace(net)
    engine.add_hook_to_module(graph, engine.ModelHook())
    engine.remove_hook_from_module(graph)
    _negate(graph)
    assert torch.equal(graph(x), -net(x))


def test_cpu_offload_runs_the_model_where_it_was_asked_to(engine, net, x):
    hook = engine.CpuOffload(execution_device="cpu")
    expected = net(x)
    engine.add_hook_to_module(net, hook)
    user = engine.UserCpuOffloadHook(net, hook)
    assert torch.equal(net(x), expected)
    user.offload()
    assert {parameter.device.type for parameter in net.parameters()} == {"cpu"}
    user.remove()
    assert not hasattr(net, "_hf_hook")


def test_cpu_offload_moves_model_and_inputs(engine):
    linear = engine.add_hook_to_module(nn.Linear(2, 2), engine.CpuOffload(execution_device="meta"))
    assert linear(torch.ones(1, 2)).is_meta
    assert linear.weight.is_meta


def test_layerwise_casting_rests_low_and_computes_high(engine):
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    engine.attach_layerwise_casting_hooks(model, torch.bfloat16, torch.float32)
    assert [module.weight.dtype for module in model] == [torch.bfloat16, torch.float32, torch.bfloat16]
    assert model(torch.ones(1, 4)).dtype == torch.float32
    assert model[0].weight.dtype == torch.bfloat16


def test_layerwise_casting_skips_by_name_and_class(engine):
    model = nn.ModuleDict({"keep": nn.Linear(2, 2), "cast": nn.Linear(2, 2), "conv": nn.Conv1d(1, 1, 1)})
    engine.attach_layerwise_casting_hooks(
        model,
        torch.bfloat16,
        torch.float32,
        skip_modules_pattern=("^ke",),
        skip_modules_classes=(nn.Conv1d,),
    )
    assert {name: module.weight.dtype for name, module in model.items()} == {
        "keep": torch.float32,
        "cast": torch.bfloat16,
        "conv": torch.float32,
    }


@pytest.mark.parametrize("hook", [AddOne(), SequentialHook(AddOne(), Double())], ids=["one", "two"])
def test_a_hooked_module_compiles(engine, net, x, hook):
    engine.add_hook_to_module(net, hook)
    expected = net(x)
    assert torch.equal(torch.compile(net, backend="eager")(x), expected)


# -------------------------------------------------------------------------------------------------- ours alone, and why


def test_run_is_the_whole_call(net, x):
    """The guide's hooks are two steps, and a forward that raises never reaches the second."""
    log = []

    class Lease(ModelHook):
        def run(self, module, forward, args, kwargs):
            log.append("enter")
            try:
                return forward(*args, **kwargs)
            finally:
                log.append("leave")

    add_hook_to_module(net, Lease())
    net(x)
    with pytest.raises(RuntimeError):
        net(torch.ones(2, 7))
    assert log == ["enter", "leave"] * 2


def test_hooks_nest_like_context_managers(ours, net, x):
    """Accelerate calls the later steps in the order of the first ones, so an outer hook ends before an inner one."""
    log = []
    add_hook_to_module(net, recording(ours, log, "outer"))
    add_hook_to_module(net, recording(ours, log, "inner"), append=True)
    net(x)
    assert log == ["outer init", "inner init", "outer pre", "inner pre", "inner post", "outer post"]


def test_steps_of_a_sequence_nest_for_callers_who_take_them_one_by_one(ours, net):
    log = []
    sequence = SequentialHook(recording(ours, log, "outer"), recording(ours, log, "inner"))
    sequence.pre_forward(net)
    sequence.post_forward(net, None)
    assert log == ["outer pre", "inner pre", "inner post", "outer post"]


def test_no_grad_of_one_hook_counts_for_the_sequence(net, x):
    """Accelerate forgets a hook's `no_grad` as soon as a second hook is appended."""
    hook = ModelHook()
    hook.no_grad = True
    add_hook_to_module(net, hook)
    add_hook_to_module(net, ModelHook(), append=True)
    assert net._hf_hook.no_grad
    assert not net(x).requires_grad


def test_a_replaced_hook_is_detached(ours, net):
    """Accelerate forgets it, and with it the weights that only it could bring back."""
    log = []
    add_hook_to_module(net, recording(ours, log))
    add_hook_to_module(net, ModelHook())
    assert log == ["hook init", "hook detach"]


def test_a_hook_that_cannot_be_attached_leaves_the_module_working(net, x):
    class Broken(ModelHook):
        def init_hook(self, module):
            raise MemoryError

    with pytest.raises(MemoryError):
        add_hook_to_module(net, Broken())
    assert not hasattr(net, "_hf_hook")
    assert not hasattr(net, "_old_forward")
    assert net(x).shape == (2, 5)


def test_hooks_of_the_other_engine_work_here(net, x, theirs):
    expected = net(x)
    hook = theirs.AlignDevicesHook(execution_device="cpu", offload=True)
    add_hook_to_module(net.first, hook)
    add_hook_to_module(net.first, ModelHook(), append=True)
    assert net.first.weight.is_meta
    assert torch.equal(net(x), expected)
    remove_hook_from_module(net, recurse=True)
    assert torch.equal(net(x), expected)


def test_hooks_of_ours_work_there(net, x, theirs):
    expected = 2 * net(x + 1)
    theirs.add_hook_to_module(net, SequentialHook(AddOne(), Double()))
    assert torch.equal(net(x), expected)


def test_a_hooked_module_pickles(net, x):
    """Accelerate's forward is a local function, which pickle refuses."""
    add_hook_to_module(net, AddOne())
    restored = pickle.loads(pickle.dumps(net))
    expected = net(x)
    with torch.no_grad():
        net.second.weight.zero_()
    assert torch.equal(restored(x), expected)


def test_a_keyword_named_module_reaches_the_forward():
    """Accelerate's own first argument has that name."""

    class Wrapper(nn.Module):
        def forward(self, x, module=None):
            return module(x)

    wrapper = add_hook_to_module(Wrapper(), ModelHook())
    assert wrapper(torch.ones(1), module=torch.neg) == -1


def test_a_forward_set_on_the_instance_is_restored(net, x):
    net.forward = lambda x: x
    add_hook_to_module(net, AddOne())
    assert torch.equal(net(x), x + 1)
    remove_hook_from_module(net)
    assert net(x) is x


def test_a_forward_of_the_class_leaves_nothing_on_the_instance(net):
    """Accelerate leaves the bound method there, and a class that is patched later is not followed."""
    remove_hook_from_module(add_hook_to_module(net, ModelHook()))
    assert "forward" not in vars(net)


def test_a_graph_module_is_hooked_and_edited_at_once(net, x):
    """Accelerate loses the hook when the graph is recompiled."""
    expected = -net(x + 1)
    graph = fx.symbolic_trace(net)
    add_hook_to_module(graph, AddOne())
    _negate(graph)
    assert torch.equal(graph(x), expected)


def test_cpu_offload_moves_inputs_also_when_the_model_is_there_already(ours):
    """Accelerate moves them only on the first call."""
    linear = add_hook_to_module(nn.Linear(2, 2), ours.CpuOffload(execution_device="meta"))
    for _ in range(2):
        assert linear(torch.ones(1, 2)).is_meta


def test_cpu_offload_of_a_module_without_parameters(ours):
    """Accelerate looks at the first parameter and fails."""
    relu = add_hook_to_module(nn.ReLU(), ours.CpuOffload(execution_device="cpu"))
    assert relu(torch.tensor([-1.0])) == 0


@pytest.mark.parametrize(("resting_on", "calls"), [("meta", 1), ("cpu", 0)])
def test_cpu_offload_sends_the_previous_model_back_unless_it_is_there(ours, resting_on, calls):
    class Previous(ours.UserCpuOffloadHook):
        offloads = 0

        def offload(self):
            self.offloads += 1

    previous = Previous(nn.Linear(2, 2, device=resting_on), ModelHook())
    following = add_hook_to_module(nn.Linear(2, 2), ours.CpuOffload("cpu", prev_module_hook=previous))
    following(torch.ones(1, 2))
    assert previous.offloads == calls


def test_layerwise_casting_takes_one_pattern_as_text(ours):
    """Accelerate reads a text letter by letter."""
    model = nn.ModuleDict({"keep": nn.Linear(2, 2), "pk": nn.Linear(2, 2)})
    ours.attach_layerwise_casting_hooks(model, torch.bfloat16, torch.float32, skip_modules_pattern="keep")
    assert model["keep"].weight.dtype == torch.float32
    assert model["pk"].weight.dtype == torch.bfloat16


def test_layerwise_casting_goes_back_to_rest_after_an_error(ours):
    """Accelerate leaves the weights in the dtype they compute in."""
    model = nn.Sequential(nn.Linear(4, 4))
    ours.attach_layerwise_casting_hooks(model, torch.bfloat16, torch.float32)
    with pytest.raises(RuntimeError):
        model(torch.ones(1, 3))
    assert model[0].weight.dtype == torch.bfloat16


def test_a_process_that_never_compiles_never_imports_the_compiler():
    script = (
        "import sys, torch; from torch import nn; from hf_bigload.hooks import CpuOffload, add_hook_to_module;"
        "add_hook_to_module(nn.Linear(2, 2), CpuOffload('cpu'))(torch.ones(1, 2));"
        "print('torch._dynamo' in sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"


def _negate(graph: fx.GraphModule) -> None:
    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    with graph.graph.inserting_before(output):
        output.args = (graph.graph.call_function(torch.neg, output.args),)
    graph.recompile()
