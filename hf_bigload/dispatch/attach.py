"""Make a placed model run: a hook on each block that needs one, and guards on what moves the whole model."""

from __future__ import annotations

import contextlib
import copy
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import DoesNotFitError, human_bytes
from ..hardware import free_by_accelerator, free_ram, torch_device
from ..module_tensors import as_device, copy_in_phase, iter_hooks
from ..specs import CPU, DISK, Plan
from .compiling import compile_apart, compile_together, compiled_inside
from .executor import CPU_DEVICE, Executor, Scope, Stats, unwatch, watch
from .hooks import Forward, ModelHook, SequentialHook, add_hook_to_module, remove_hook_from_module
from .moving import find_device, send_to_device
from .prefetch import Recipe
from .rescue import Rescue, install, uninstall

ATTRIBUTE = "_hf_bigload"
"""Where a dispatched model keeps its `Attachment`."""

_MOVERS = ("to", "cpu", "cuda", "xpu", "mps", "npu", "mlu")
_CASTS = {"half": torch.float16, "float": torch.float32, "double": torch.float64, "bfloat16": torch.bfloat16}


@dataclass(eq=False)
class Attachment:
    """What makes a model run over its plan: kept on the model, copied with it."""

    plan: Plan
    executor: Executor
    keep_alive: tuple[Any, ...] = ()
    """What the weights at rest depend on (a folder of converted copies, say)."""

    @property
    def stats(self) -> Stats:
        return self.executor.machine.stats

    def __deepcopy__(self, memo: dict[int, Any]) -> Attachment:
        return Attachment(self.plan, copy.deepcopy(self.executor, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing, ()  # a pickled model is unpickled as a plain one


def _nothing() -> None:
    return None


def attachment_of(model: nn.Module) -> Attachment | None:
    """The attachment of a dispatched model, or None."""
    return model.__dict__.get(ATTRIBUTE)


_resident: weakref.WeakKeyDictionary[nn.Module, Plan] = weakref.WeakKeyDictionary()
"""Plans of models that rest whole on one device: these are plain modules, and carry nothing of ours."""


def resident_plan(model: nn.Module) -> Plan | None:
    """The plan of a model that was placed whole on one device and is still there, or None."""
    plan = _resident.get(model)
    there = plan is not None and all(p.device == torch_device(plan.main_device) for p in model.parameters())
    return plan if there else None


@contextlib.contextmanager
def map_hidden(model: nn.Module) -> Iterator[None]:
    """Within the context a dispatched model has no `hf_device_map`, for libraries that take any for Accelerate's."""
    device_map = model.__dict__.pop("hf_device_map", None)
    try:
        yield
    finally:
        if device_map is not None:
            model.hf_device_map = device_map


class AlignDevicesHook(ModelHook):
    """Runs a module where the plan says: weights come, inputs come, and what was borrowed goes back.

    The name is the one libraries look for; the attributes they read are `execution_device`, `offload`, `io_same_device`
    and `skip_keys`.
    """

    def __init__(
        self,
        executor: Executor | None = None,
        device: torch.device = CPU_DEVICE,
        whole: bool | None = None,
        at_home: bool = False,
        moves: bool = False,
        skip_keys: Sequence[str] = (),
        offload: bool = False,
        io_same_device: bool = True,
        returns_to: torch.device | None = None,
        name: str = "",
        execution_device: torch.device | None = None,
    ) -> None:
        self.executor, self.device, self.name = executor, device, name
        self.execution_device = device if execution_device is None else execution_device
        """Where a caller should make inputs, and gets outputs back: of a model as a whole, its plan's main device."""
        self.recipe: Recipe | None = None
        self._module: weakref.ref[nn.Module] | None = None
        self.whole = whole
        """True: leases everything below the module. False: only its own tensors. None: leases nothing."""
        self.at_home, self.moves, self.offload = at_home, moves, offload
        self.skip_keys = list(skip_keys)
        self.io_same_device = io_same_device
        """Outputs go back to the device of the inputs."""
        self.returns_to = returns_to
        """Else they go to the device of the module that calls this one, which goes on computing with them."""

    @property
    def runs_on(self) -> torch.device:
        return CPU_DEVICE if self.at_home else self.device

    def __repr__(self) -> str:
        return f"AlignDevicesHook(execution_device={self.execution_device}, offload={self.offload})"

    def __reduce__(self) -> tuple[Any, ...]:
        return ModelHook, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> AlignDevicesHook:
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__.update(self.__dict__, executor=copy.deepcopy(self.executor, memo), recipe=None)
        return copied

    def init_hook(self, module: nn.Module) -> nn.Module:
        if self.executor is None:
            return module
        for owner in self._owners(module) if self.executor.watching else ():
            watch(owner, self.executor, self.runs_on)
        if self.whole is not None:
            _forget_homes(module)
            module.register_state_dict_post_hook(_give_homes)
        return module

    def detach_hook(self, module: nn.Module) -> nn.Module:
        for owner in self._owners(module):
            unwatch(owner)
        _forget_homes(module)
        return module

    def _owners(self, module: nn.Module) -> Iterable[nn.Module]:
        return module.modules() if self.whole else (module,)

    @compiled_inside
    def run(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if self.executor is None:
            return forward(*args, **kwargs)
        outputs_to = self._outputs_to(args, kwargs)
        scope = Scope(self.executor, self.runs_on, self._lasts(module), self.name)
        prefetcher = self.executor.prefetcher if self._is_stop(module) else None
        try:
            ahead = None if prefetcher is None else prefetcher.enter(self)
            scope.enter(self._weights(module), self.at_home, ahead)
            if prefetcher is not None and ahead is None:  # else all went out when the last block was left
                prefetcher.go_on()
            if self.moves:
                args = send_to_device(args, self.runs_on)
                kwargs = send_to_device(kwargs, self.runs_on, skip_keys=self.skip_keys)
            if self.moves and self.at_home:
                args = tuple(self._here(arg) for arg in args)
                kwargs = {name: self._here(arg) for name, arg in kwargs.items()}
            recorder = self.executor.machine.recorder
            if recorder is not None and self.whole is not None:
                forward = recorder.computing(forward, self.name, self.runs_on)
            with scope.guard():
                output = scope.keep(forward(*args, **kwargs))
        except BaseException:
            self.executor.prefetcher.forget()
            raise
        finally:
            try:
                scope.leave()
            except BaseException:
                scope.leave()  # what interrupted the release must not prevent it
                raise
        if prefetcher is not None:
            prefetcher.go_on()
        return output if outputs_to is None else send_to_device(output, outputs_to, skip_keys=self.skip_keys)

    def _lasts(self, module: nn.Module) -> bool:
        """Whether other blocks come and go while this one is entered."""
        return not self.whole and bool(module._modules)

    def _is_stop(self, module: nn.Module) -> bool:
        """Whether this is one of the blocks whose weights are sent ahead."""
        if not self.offload or self._lasts(module):
            return False
        if self._module is None or self._module() is not module:  # a copy
            self._module = weakref.ref(module)
        return True

    def weights(self) -> list[torch.Tensor]:
        """What a call of the module would lease now."""
        module = None if self._module is None else self._module()
        return [] if module is None else self._weights(module)

    def _here(self, argument: Any) -> Any:
        """A device that the caller names as its own, for tensors to be made on, is here where the weights rest."""
        return self.runs_on if isinstance(argument, torch.device) else argument

    @contextlib.contextmanager
    def align(self, module: nn.Module, device: Any = None) -> Iterator[None]:
        """Within the context, the weights this hook leases are on `device` (by default where the module runs).

        What is written to them is kept.

        Raises:
            OffloadedWeightError: a forward that has not ended uses them on another device.
        """
        if self.executor is None or self.whole is None:
            yield
            return
        scope = Scope(self.executor, self.device if device is None else as_device(device))
        try:
            self.executor.lease(scope, self._weights(module))
            yield
        finally:
            scope.leave()

    def _weights(self, module: nn.Module) -> list[torch.Tensor]:
        if self.executor is None or self.whole is None:
            return []
        return self.executor.tensors(module, self.whole, self.runs_on)

    def _outputs_to(self, args: Any, kwargs: Any) -> torch.device | None:
        """To the inputs' device for the model as a whole, to the caller's for all else.

        The caller may add what a block returns to what it has (a residual, a skip connection). Its device is known from
        the plan, not from who happens to call: a block that a checkpoint runs again does as it did within the model.
        """
        if not self.moves or self.executor is None:
            return None
        return find_device([args, kwargs]) if self.io_same_device else self.returns_to


def attach(
    model: nn.Module,
    plan: Plan,
    executor: Executor,
    skip_keys: Sequence[str] = (),
    keep_alive: tuple[Any, ...] = (),
    force_hooks: bool = False,
    rescue: Rescue | None = None,
) -> nn.Module:
    """Hook every block of `model` that does not simply run where it is, and remember the plan on the model.

    A model that rests whole on one device gets no hooks (unless `force_hooks`): it is a plain module. With `rescue`, a
    model that computes on an accelerator gets a wrapper around it as a whole, for when memory runs out there.
    """
    model.hf_device_map = dict(plan.device_map)  # type: ignore[assignment]
    if len(plan.devices) == 1 and not plan.streams and not force_hooks:
        _resident[model] = plan
        if rescue is not None:
            install(model, rescue)
        return model
    moves = force_hooks or any(device not in (CPU, DISK) for device in plan.devices)
    hook = functools.partial(AlignDevicesHook, executor, moves=moves, skip_keys=skip_keys)
    executor.name_of = functools.partial(_name_in, weakref.ref(model))
    devices = _devices(model, plan)
    _hook_blocks(model, plan, executor, hook, devices if moves else {})
    if moves:
        _hook_containers(model, plan, hook, devices)
    setattr(model, ATTRIBUTE, Attachment(plan, executor, keep_alive))
    _guard(model)
    if rescue is not None:
        install(model, rescue)
    return model


def watch_added(model: nn.Module) -> None:
    """Notice reads of weights that came to a dispatched model since: an adapter around a block of one leaf, say.

    What is inside a block is leased with it; what is not is brought to whoever reads it.
    """
    attachment = attachment_of(model)
    if attachment is None or not attachment.executor.watching:
        return
    runs_on = {"": torch_device(attachment.plan.main_device)}
    for name, module in model.named_modules():
        hook = next((h for h in iter_hooks(module) if isinstance(h, AlignDevicesHook)), None)
        runs_on[name] = runs_on[name.rpartition(".")[0]] if hook is None else hook.runs_on
        watch(module, attachment.executor, runs_on[name])


def _devices(model: nn.Module, plan: Plan) -> dict[str, torch.device]:
    """Where each block and each module above one runs: the latter with its first block, whose inputs it makes."""
    devices: dict[str, torch.device] = {}
    for placement in plan.placements:
        path = placement.block.name
        while path:
            path = path.rpartition(".")[0]
            if type(model.get_submodule(path)).forward is not nn.Module.forward:
                devices.setdefault(path, torch_device(placement.device))
    return devices | {p.block.name: torch_device(p.device) for p in plan.placements}


def _caller(path: str, devices: Mapping[str, torch.device]) -> torch.device | None:
    """The device of the module that calls the one at `path`."""
    while path:
        path = path.rpartition(".")[0]
        if path in devices:
            return devices[path]
    return None


def _hook_blocks(
    model: nn.Module, plan: Plan, executor: Executor, hook: Any, devices: Mapping[str, torch.device]
) -> None:
    streamed = {t.name for p in plan.placements for t in p.block.tensors if p.home_of(t.name) != p.device}
    stops = []
    for placement in plan.placements:
        leases = bool(placement.streamed_bytes) or any(name in streamed for name in placement.block.borrows)
        if not (devices or leases or placement.at_home):
            compile_apart(model.get_submodule(placement.block.name))
            continue
        block_hook = hook(
            device=torch_device(placement.device),
            whole=placement.block.whole,
            at_home=placement.at_home,
            offload=leases,
            io_same_device=not placement.block.name,
            returns_to=_caller(placement.block.name, devices),
            name=placement.block.name,
            execution_device=None if placement.block.name else torch_device(plan.main_device),
        )
        module = model.get_submodule(placement.block.name)
        add_hook_to_module(module, block_hook, append=True)
        if block_hook._is_stop(module):
            stops.append(block_hook)
    executor.prefetcher.expect(stops)


def _hook_containers(model: nn.Module, plan: Plan, hook: Any, devices: Mapping[str, torch.device]) -> None:
    blocks = {p.block.name for p in plan.placements}
    for path, device in devices.items():
        if path not in blocks:
            main = None if path else torch_device(plan.main_device)
            returns_to = _caller(path, devices)
            container = hook(device=device, io_same_device=not path, returns_to=returns_to, execution_device=main)
            add_hook_to_module(model.get_submodule(path), container, append=True)


def _name_in(model: weakref.ref[nn.Module], tensor: torch.Tensor) -> str:
    """What a weight is called, for errors."""
    root = model()
    names = () if root is None else (*root.named_parameters(), *root.named_buffers())
    return next((f"weight {name!r}" for name, each in names if each is tensor), "a weight")


# ---------------------------------------------------------------- moving a dispatched model


def _guard(model: nn.Module) -> None:
    """`model.to(...)` and its kin act on a dispatched model as on a resident one, or refuse before anything moves."""
    for name in (*_MOVERS, *_CASTS):
        if hasattr(type(model), name):
            model.__dict__[name] = functools.partial(_move, model, name)


def _unguard(model: nn.Module) -> None:
    for name in (*_MOVERS, *_CASTS):
        model.__dict__.pop(name, None)


def _give_homes(module: nn.Module, state_dict: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """A state dict holds weights at rest, never a slot that another thread's forward is using."""
    hook = next((h for h in iter_hooks(module) if isinstance(h, AlignDevicesHook) and h.whole is not None), None)
    if hook is None or hook.executor is None:
        return
    recurse = bool(hook.whole)
    buffers = module.named_buffers(recurse=recurse, remove_duplicate=False)
    for name, tensor in (*module.named_parameters(recurse=recurse, remove_duplicate=False), *buffers):
        given = state_dict.get(prefix + name)
        if isinstance(given, torch.Tensor) and not isinstance(given, nn.Parameter):
            home = hook.executor.home(tensor)
            if given.data_ptr() != home.data_ptr():
                state_dict[prefix + name] = home


def _forget_homes(module: nn.Module) -> None:
    for key in [key for key, hook in module._state_dict_hooks.items() if hook is _give_homes]:
        del module._state_dict_hooks[key]


def _move(model: nn.Module, method: str, *args: Any, **kwargs: Any) -> nn.Module:
    original = getattr(type(model), method).__get__(model)
    if attachment_of(model) is None:
        return original(*args, **kwargs)
    device = _target(method, args, kwargs)
    if device is not None:
        settle(model, device)
    elif method in _CASTS or method == "to":
        _check_cast(model, _CASTS[method] if method in _CASTS else torch._C._nn._parse_to(*args, **kwargs)[1])
    return original(*args, **kwargs)


def _check_cast(model: nn.Module, dtype: torch.dtype | None) -> None:
    """What rests in a file and is cast comes to memory: refuse what would not fit, before anything is cast."""
    attachment = attachment_of(model)
    if dtype is None or attachment is None:
        return
    coming = [p for p in model.parameters() if p in attachment.executor.on_disk and p.is_floating_point()]
    check_room([p for p in coming if p.dtype != dtype], CPU_DEVICE, dtype)


def _target(method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.device | None:
    if method == "to":
        return torch._C._nn._parse_to(*args, **kwargs)[0]
    if method == CPU:
        return CPU_DEVICE
    if method in _CASTS:
        return None
    index = args[0] if args else kwargs.get("device")
    return torch.device(index) if isinstance(index, torch.device | str) else torch.device(method, index or 0)


def settle(model: nn.Module, device: torch.device) -> None:
    """Bring all of a dispatched model to `device` and take its hooks off: a plain resident model from then on.

    Raises:
        DoesNotFitError: the device has too little free memory; nothing was moved.
    """
    attachment = attachment_of(model)
    assert attachment is not None
    torch.empty(0, device=device)  # raises, with nothing moved yet, if torch has no such device
    executor, coming = attachment.executor, incoming(model, device)
    check_room(coming, device)
    detach(model)
    with torch.inference_mode(False), torch.no_grad():
        for tensor in coming:
            home = executor.home(tensor)
            on_cpu = device.type == "cpu" == home.device.type
            tensor.data = copy_in_phase(home) if on_cpu else home.to(device, copy=True)
    model.__dict__.pop("hf_device_map", None)  # a plain model, which may be moved on


def incoming(model: nn.Module, device: torch.device) -> list[torch.Tensor]:
    """The tensors of a dispatched model that would have to be brought to `device` for it to be whole there."""
    attachment = attachment_of(model)
    assert attachment is not None
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    executor = attachment.executor
    return [t for t in tensors.values() if executor.home(t).device != device or t in executor.on_disk]


def check_room(coming: Sequence[torch.Tensor], device: torch.device, dtype: torch.dtype | None = None) -> None:
    """Raise DoesNotFitError unless `device` has room for `coming` (as `dtype`) beside what it holds."""
    needed = sum(t.numel() * (dtype or t.dtype).itemsize for t in coming)
    free = free_ram() if device.type == "cpu" else free_by_accelerator().get(str(device), needed)
    if needed > free:
        largest = max(t.numel() * t.element_size() for t in coming)
        raise DoesNotFitError(
            f"The model cannot move to {device}{f' as {dtype}' if dtype else ''}: {human_bytes(needed)} of weights "
            f"would have to come (the largest has {human_bytes(largest)}), and {human_bytes(free)} are free there. "
            "Nothing was moved. Keep the model offloaded, or load it in a smaller dtype."
        )


def detach(model: nn.Module) -> None:
    """Take the hooks off and forget the plan. Weights stay where they rest, and stay readable."""
    uninstall(model)
    attachment = attachment_of(model)
    if attachment is None:
        return
    _unhook(model, lambda hook: isinstance(hook, AlignDevicesHook))
    attachment.executor.forget()
    attachment.executor.close()


def suspend(model: nn.Module) -> Executor | None:
    """Take the hooks of the blocks off and give the rings back, for another plan to be attached.

    Nothing else ends: the executor that is returned still knows what rests in files, and its reader has them open.
    """
    uninstall(model)
    _resident.pop(model, None)
    attachment = attachment_of(model)
    if attachment is None:
        return None
    _unhook(model, lambda hook: isinstance(hook, AlignDevicesHook) and hook.executor is not None)
    attachment.executor.prefetcher.close()
    attachment.executor.machine.close_rings()
    return attachment.executor


def _unhook(model: nn.Module, is_ours: Callable[[ModelHook], bool]) -> None:
    for module in model.modules():
        _remove_hooks(module, is_ours)
        unwatch(module)
        compile_together(module)
    _unguard(model)
    del model.__dict__[ATTRIBUTE]


def _remove_hooks(module: nn.Module, is_ours: Callable[[ModelHook], bool]) -> None:
    """Remove the dispatch's hooks, and keep those that people added themselves."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        return
    hooks = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    theirs = [h for h in hooks if not is_ours(h)]
    if len(theirs) == len(hooks):
        return
    remove_hook_from_module(module)
    for kept in theirs:
        add_hook_to_module(module, kept, append=True)
