"""Device maps, module name -> device: sizing a model, budgeting devices, inferring a map, reading and checking one.

A key covers its module and everything below it, and the longest key that covers a name decides, cut at dots:
"layers.1" says nothing about "layers.10". Devices are accelerator indices, "mps", "cpu" and "disk". Sizes are bytes.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter, defaultdict, deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from . import hardware
from .errors import DeviceMapError
from .module_tensors import Device, as_dtype, find_tied_parameters, get_non_persistent_buffers, named_module_tensors
from .settings import normalize_max_memory, parse_size
from .specs import CPU, DISK

logger = logging.getLogger(__name__)

MapValue = int | str
DeviceMap = dict[str, Any]
MaxMemory = Mapping[int | str, int | str]
Dtype = str | torch.dtype
ModuleSizes = dict[str, int]
Classes = str | Collection[str] | None

convert_file_size_to_int = parse_size
"""The name that Accelerate documents."""

PACKED_DTYPE_BYTES = {"int2": 1 / 4, "int4": 1 / 2, "fp8": 1}
"""Bytes of one weight in formats that quantisers name and torch has no dtype for."""


# ------------------------------------------------------------------------------------------------------------- sizes


def dtype_byte_size(dtype: Any) -> int | float:
    """Bytes that one element of `dtype` takes; a fraction for the packed formats "int4" and "int2".

    `dtype` is torch's, its name, or an enumeration member whose value is the name. Raises ValueError for another.
    """
    named = getattr(dtype, "value", dtype)
    if isinstance(named, str) and named in PACKED_DTYPE_BYTES:
        return PACKED_DTYPE_BYTES[named]
    return as_dtype(named).itemsize


def compute_module_sizes(
    model: nn.Module,
    dtype: Dtype | None = None,
    special_dtypes: Mapping[str, Dtype] | None = None,
    buffers_only: bool = False,
) -> ModuleSizes:
    """Bytes of every module and tensor of `model` by name, "" being the whole; 0 for names it does not have.

    A tied parameter counts once, under its first name. `dtype` is what floating tensors are cast to when loaded,
    `special_dtypes` what single tensors are.
    """
    special = {name: dtype_byte_size(each) for name, each in (special_dtypes or {}).items()}
    cast_size = None if dtype is None else dtype_byte_size(dtype)
    sizes: ModuleSizes = defaultdict(int)
    for name, tensor in model.named_buffers() if buffers_only else named_module_tensors(model, recurse=True):
        size = int(tensor.numel() * special.get(name, _loaded_item_size(tensor, cast_size)))
        for prefix in _prefixes(name):
            sizes[prefix] += size
    return sizes


def _loaded_item_size(tensor: torch.Tensor, cast_size: int | float | None) -> int | float:
    """Bytes per element once loaded. Integers are not cast; nor are one-byte floats, which only quantisers use."""
    if cast_size is None or not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor.dtype.itemsize
    return min(cast_size, 1) if tensor.dtype.itemsize == 1 else cast_size


def compute_module_total_buffer_size(
    model: nn.Module, dtype: Dtype | None = None, special_dtypes: Mapping[str, Dtype] | None = None
) -> int:
    """Bytes of all buffers of `model`, as `compute_module_sizes` counts them."""
    return compute_module_sizes(model, dtype, special_dtypes, buffers_only=True).get("", 0)


def get_module_leaves(module_sizes: Mapping[str, Any]) -> list[str]:
    """The names that no other name lies below; "" is none of them."""
    parents = {name.rpartition(".")[0] for name in module_sizes}
    return [name for name in module_sizes if name and name not in parents]


def get_max_layer_size(
    modules: Iterable[tuple[str, nn.Module | torch.Tensor]],
    module_sizes: Mapping[str, int],
    no_split_module_classes: Classes,
) -> tuple[int, list[str]]:
    """The size of the largest layer of these modules, and the names of all layers that large.

    A layer is a tensor, a module without children, or one whose class is not to be split.
    """
    classes = _class_names(no_split_module_classes)
    largest = 0
    names: list[str] = []
    pending = list(modules)[::-1]
    while pending:
        name, module = pending.pop()
        children = _splittable_children(module, classes)
        if children:
            pending.extend((f"{name}.{child_name}", child) for child_name, child in reversed(children))
            continue
        size = module_sizes.get(name, 0)
        if size > largest:
            largest, names = size, []
        if size == largest:
            names.append(name)
    return largest, names


def calculate_maximum_sizes(model: nn.Module) -> tuple[int, tuple[int, list[str]]]:
    """Bytes of the whole model, and of its largest layer with its names (see `get_max_layer_size`)."""
    sizes = compute_module_sizes(model)
    own: list[tuple[str, Any]] = [*named_module_tensors(model), *model.named_children()]
    return sizes.get("", 0), get_max_layer_size(own, sizes, getattr(model, "_no_split_modules", None))


def _splittable_children(module: Any, no_split: Collection[str]) -> list[tuple[str, nn.Module]]:
    if not isinstance(module, nn.Module) or type(module).__name__ in no_split:
        return []
    return list(module.named_children())


def _class_names(classes: Classes) -> frozenset[str]:
    return frozenset((classes,) if isinstance(classes, str) else classes or ())


def _prefixes(name: str) -> Iterator[str]:
    """`name`, every module it lies in, and "" last."""
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""


# ----------------------------------------------------------------------------------------------------------- budgets


def get_max_memory(max_memory: MaxMemory | None = None) -> dict[MapValue, int]:
    """Budgets in bytes by device, accelerators first, then "mps", "cpu" and "disk".

    Without `max_memory`: what is free now. On "mps", which shares the RAM, there is no budget for "cpu" besides.

    Raises:
        DeviceMapError: a key that is no device, or a value that is no size.
    """
    if max_memory is None:
        free: dict[MapValue, int] = {
            hardware.map_value(name): size for name, size in hardware.free_by_accelerator().items()
        }
        return free if "mps" in free else {**free, CPU: hardware.free_ram()}
    budgets = normalize_max_memory(max_memory)
    indices = sorted(key for key in budgets if isinstance(key, int))
    _warn_of_absent(indices)
    return {key: budgets[key] for key in (*indices, "mps", CPU, DISK) if key in budgets}


def _warn_of_absent(indices: Sequence[int]) -> None:
    present = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    absent = [index for index in indices if index >= present]
    if absent:
        logger.warning("max_memory has budgets for accelerators %s; this machine has %d of them.", absent, present)


def get_balanced_memory(
    model: nn.Module,
    max_memory: MaxMemory | None = None,
    no_split_module_classes: Classes = None,
    dtype: Dtype | None = None,
    special_dtypes: Mapping[str, Dtype] | None = None,
    low_zero: bool = False,
) -> dict[MapValue, int]:
    """`max_memory` for `infer_auto_device_map`, cut so that the model spreads evenly over the accelerators.

    Each but the last may hold an equal share and a margin of a quarter more than one block, so that the last is not
    left with too much. `low_zero` leaves the first accelerator what the others cannot hold. A single accelerator
    keeps its budget; a tenth less where it was not given but measured.
    """
    budgets = get_max_memory(max_memory)
    accelerators = [key for key, size in budgets.items() if key not in (CPU, DISK) and size > 0]
    if not accelerators:
        return budgets
    first, count = accelerators[0], len(accelerators)
    if count == 1:
        if max_memory is None and first != "mps":
            budgets[first] = int(budgets[first] * (1 - hardware.HEADROOM))
        return budgets
    sizes = compute_module_sizes(model, dtype, special_dtypes)
    margin = int(1.25 * max(_block_size(model, sizes, _class_names(no_split_module_classes)), _mean_layer_size(sizes)))
    share = sizes.get("", 0) // (count - 1 if low_zero else count) + margin
    for key in accelerators[1 if low_zero else 0 : -1]:
        budgets[key] = min(share, budgets[key])
    if low_zero:
        others = sum(budgets[key] for key in accelerators[1:])
        budgets[first] = min(max(0, sizes.get("", 0) - others), budgets[first])
    return budgets


def _block_size(model: nn.Module, sizes: Mapping[str, int], no_split: Collection[str]) -> int:
    """The largest of the no-split classes, each by its first module."""
    first: dict[str, int] = {}
    for name, module in model.named_modules() if no_split else ():
        if name and type(module).__name__ in no_split and name in sizes:
            first.setdefault(type(module).__name__, sizes[name])
    return max(first.values(), default=0)


def _mean_layer_size(sizes: Mapping[str, int]) -> int:
    tensors = set(get_module_leaves(sizes))
    modules = {name: size for name, size in sizes.items() if name not in tensors}
    layers = get_module_leaves(modules)
    return sum(modules[name] for name in layers) // max(len(layers), 1)


# -------------------------------------------------------------------------------------------------- inferring a map


def infer_auto_device_map(
    model: nn.Module,
    max_memory: MaxMemory | None = None,
    no_split_module_classes: Classes = None,
    dtype: Dtype | None = None,
    special_dtypes: Mapping[str, Dtype] | None = None,
    verbose: bool = False,
    clean_result: bool = True,
    offload_buffers: bool = False,
    fallback_allocation: bool = False,
) -> DeviceMap:
    """A device map that fills the accelerators in order, then the CPU, then the disk, in module order.

    No budget is exceeded. Room is left on the first accelerator for the largest layer that rests elsewhere, and on
    the CPU for the largest that rests on disk, as far as such a layer can fit there at all. Classes in
    `no_split_module_classes` stay whole, tied parameters stay together. A module that is larger than a whole device
    goes to a later one, and those that follow it may still go here. The model may be on meta.

    Args:
        max_memory: budgets by device, "10GiB" or bytes; what is free now if not given.
        dtype, special_dtypes: what the weights, or single ones by name, are cast to when loaded.
        verbose: print each decision.
        clean_result: group modules of one device under their parent's name.
        offload_buffers: buffers of offloaded modules are offloaded too, and so need no room on an accelerator.
        fallback_allocation: before a device is left empty, look for the first later module that fits it.
    """
    budgets = get_max_memory(max_memory)
    sizes = compute_module_sizes(model, dtype, special_dtypes)
    tree = _Tree(model, sizes, _class_names(no_split_module_classes))
    allocation = _Allocation(tree, budgets, fallback_allocation, verbose)
    allocation.run()
    if not offload_buffers:
        _warn_of_homeless_buffers(allocation, compute_module_sizes(model, dtype, special_dtypes, buffers_only=True))
    device_map: DeviceMap = {node.name: node.device for node in allocation.placed}
    return clean_device_map(device_map) if clean_result else device_map


@dataclass(eq=False, slots=True)
class _Node:
    """A module or tensor that a map may name. Without `children` it is a layer: placed whole.

    The layers below it are those at `first` <= position < `end`. `ties` are groups of nodes sharing a parameter, with
    a member elsewhere.
    """

    name: str
    size: int
    parent: _Node | None
    children: list[_Node] = field(default_factory=list)
    first: int = 0
    end: int = 0
    ties: list[list[_Node]] = field(default_factory=list)
    is_split: bool = False
    device: MapValue | None = None

    def lineage(self) -> Iterator[_Node]:
        """The node, its parent, and so on up to the root."""
        node: _Node | None = self
        while node is not None:
            yield node
            node = node.parent

    def element(self) -> _Node:
        """The node that stands for this one now: the highest above it (or itself) that is not split."""
        return [node for node in self.lineage() if not node.is_split][-1]


class _Tree:
    """The modules of a model down to its layers, with their sizes and ties."""

    def __init__(self, model: nn.Module, sizes: Mapping[str, int], no_split: Collection[str]) -> None:
        self.layers: list[_Node] = []
        self._nodes: dict[str, _Node] = {}
        self._sizes = sizes
        self._no_split = no_split
        self.root = self._grow("", model, None)
        self.root.is_split = True
        for names in find_tied_parameters(model):
            self._tie([self._node_of(name) for name in names])

    def _grow(self, name: str, owner: nn.Module | torch.Tensor, parent: _Node | None) -> _Node:
        node = self._nodes[name] = _Node(name, self._sizes.get(name, 0), parent, first=len(self.layers))
        prefix = f"{name}." if name else ""
        for child_name, child in self._parts(owner, is_root=parent is None):
            node.children.append(self._grow(prefix + child_name, child, node))
        if not node.children:
            self.layers.append(node)
        node.end = len(self.layers)
        return node

    def _parts(self, owner: nn.Module | torch.Tensor, is_root: bool) -> Iterable[tuple[str, Any]]:
        """What a module is split into: its own parameters, its children, its own buffers."""
        if not isinstance(owner, nn.Module):
            return ()
        has_children = any(child is not None for child in owner._modules.values())
        if not is_root and (type(owner).__name__ in self._no_split or not has_children):
            return ()
        members = (*owner._parameters.items(), *owner._modules.items(), *owner._buffers.items())
        return ((name, member) for name, member in members if member is not None)

    def _node_of(self, tensor_name: str) -> _Node:
        return next(self._nodes[prefix] for prefix in _prefixes(tensor_name) if prefix in self._nodes)

    def _tie(self, members: list[_Node]) -> None:
        inside = Counter(node for member in members for node in member.lineage())
        for node, count in inside.items():
            if count < len(members):
                node.ties.append(members)


class _LargestLayer:
    """The largest layer outside a range, of those not placed yet and not larger than `limit`: a tree of maxima."""

    def __init__(self, layers: Sequence[_Node], limit: int) -> None:
        self._count = len(layers)
        sizes = [0 if layer.device is not None or layer.size > limit else layer.size for layer in layers]
        self._maxima = [0] * self._count + sizes
        for at in range(self._count - 1, 0, -1):
            self._maxima[at] = max(self._maxima[2 * at], self._maxima[2 * at + 1])

    def forget(self, first: int, end: int) -> None:
        for at in range(first + self._count, end + self._count):
            self._maxima[at] = 0
            while at > 1:
                at //= 2
                self._maxima[at] = max(self._maxima[2 * at], self._maxima[2 * at + 1])

    def outside(self, first: int, end: int) -> int:
        return max(self._within(0, first), self._within(end, self._count))

    def _within(self, first: int, end: int) -> int:
        largest, low, high = 0, first + self._count, end + self._count
        while low < high:
            if low % 2:
                largest, low = max(largest, self._maxima[low]), low + 1
            if high % 2:
                high -= 1
                largest = max(largest, self._maxima[high])
            low, high = low // 2, high // 2
        return largest


class _Allocation:
    """One pass over the modules in order: place the next on the current device, split it, or go to the next device."""

    def __init__(self, tree: _Tree, budgets: Mapping[MapValue, int], fallback: bool, verbose: bool) -> None:
        self.placed: list[_Node] = []
        self.budgets = dict(budgets)
        self.accelerators = [device for device in budgets if device not in (CPU, DISK)]
        self.taken: dict[MapValue, int] = dict.fromkeys([*budgets, DISK], 0)
        """Bytes placed on each device, and on those left behind the room that was kept for a streamed layer."""
        self._tree = tree
        self._queue = deque(tree.root.children)
        self._too_large: list[_Node] = []
        self._weightless: list[_Node] = []
        self._fallback = fallback
        self._verbose = verbose
        self._devices = deque(device for device in self.taken if device != DISK)
        self._enter_next_device()

    def run(self) -> None:
        while (node := self._next()) is not None:
            self._treat(node)
        self._put(self._weightless)

    def _treat(self, node: _Node) -> None:
        together = self._tied_with(node)
        size = sum(each.size for each in together)
        room = self._room_besides(node)
        if size == 0 and self.taken[self._device] == 0:
            self._weightless.append(node)  # goes where the next one with weights goes
            return
        if size <= room:
            self._place(together)
            return
        if self._splits_tied(node, together[1:], room) or self._splits(node) or self._falls_back(node, size):
            return
        if self._can_never_be_here(together):
            self._say(f"{node.name} ({size} bytes) is larger than {self._device}: left for a later device")
            self._too_large.append(node)
        else:
            self.taken[self._device] += self._reserve(node)
            self._queue.appendleft(node)
            self._enter_next_device()

    def _next(self) -> _Node | None:
        """The next module that has no device, the split ones replaced by their parts."""
        while self._queue or self._too_large:
            if not self._queue:
                self._enter_next_device()
            node = self._queue.popleft()
            if node.is_split:
                self._queue.extendleft(reversed(node.children))
            elif node.device is None:
                return node
        return None

    def _enter_next_device(self) -> None:
        self._device: MapValue = self._devices.popleft() if self._devices else DISK
        self._queue.extendleft(reversed(self._too_large))
        self._too_large.clear()
        streams = self._device in self.accelerators[:1] or (self._device == CPU and "mps" not in self.accelerators)
        self._streamed = _LargestLayer(self._tree.layers, self.budgets[self._device]) if streams else None

    def _reserve(self, node: _Node) -> int:
        """Bytes to keep free here for a layer that will be streamed through this device, `node` being placed."""
        return 0 if self._streamed is None else self._streamed.outside(node.first, node.end)

    def _room_besides(self, node: _Node) -> int | float:
        if self._device == DISK:
            return float("inf")
        return self.budgets[self._device] - self.taken[self._device] - self._reserve(node)

    def _tied_with(self, node: _Node) -> list[_Node]:
        """`node`, and everything that must go where it goes."""
        together = [node]
        found = {node}
        for each in together:
            for other in (member.element() for group in each.ties for member in group):
                if other not in found:
                    found.add(other)
                    together.append(other)
        return together

    def _place(self, nodes: Sequence[_Node]) -> None:
        self._put(self._weightless)
        self._weightless.clear()
        self._put(nodes)

    def _put(self, nodes: Sequence[_Node]) -> None:
        for node in nodes:
            self._say(f"{node.name} ({node.size} bytes) goes to {self._device}")
            self.taken[self._device] += node.size
            self.placed.append(node)
            for each in (node, *self._tree.layers[node.first : node.end]):
                each.device = self._device
            if self._streamed is not None:
                self._streamed.forget(node.first, node.end)

    def _can_never_be_here(self, together: Sequence[_Node]) -> bool:
        """Whether the first of these, with the least of the others that could come along, exceeds the whole budget."""
        least = sum(each.size for each in together[1:] if not each.children)
        return together[0].size + least > self.budgets[self._device]

    def _splits_tied(self, node: _Node, tied: Sequence[_Node], room: int | float) -> bool:
        """Where `node` alone would fit: split the first of its tied modules that can be, to bring less along."""
        other = next((each for each in tied if each.children), None) if node.size <= room else None
        if other is None:
            return False
        other.is_split = True
        self._queue.appendleft(node)
        return True

    def _splits(self, node: _Node) -> bool:
        if not node.children:
            return False
        node.is_split = True
        self._queue.appendleft(node)
        return True

    def _falls_back(self, node: _Node, size: int) -> bool:
        """Where this device would stay empty, and it is wished: let the first later module that fits go before."""
        if not self._fallback or self.taken[self._device] > 0:
            return False
        limit = self.budgets[self._device] - max(self._reserve(node), size)
        found = next(
            (each for each in self._later() if 0 < each.size <= limit and self._singles_out(each, limit)), None
        )
        if found is None:
            return False
        self._queue.extendleft((node, found))
        return True

    def _singles_out(self, node: _Node, limit: int) -> bool:
        """Split what `node` lies in, if it then fits into `limit` bytes with what is tied to it."""
        wholes = [above for above in node.lineage() if above is not node and not above.is_split]
        for above in wholes:
            above.is_split = True
        fits = sum(each.size for each in self._tied_with(node)) <= limit
        for above in wholes:
            above.is_split = fits
        return fits

    def _later(self) -> Iterator[_Node]:
        """Every module and part of a module in the queue, in order, a whole before its parts."""
        pending = list(self._queue)[::-1]
        while pending:
            node = pending.pop()
            if node.device is None:
                if not node.is_split:
                    yield node
                pending.extend(reversed(node.children))

    def _say(self, text: str) -> None:
        if self._verbose:
            print(text)


def _warn_of_homeless_buffers(allocation: _Allocation, buffer_sizes: Mapping[str, int]) -> None:
    """Buffers of offloaded modules stay on the accelerator: say so where none has the room."""
    offloaded = sum(buffer_sizes.get(node.name, 0) for node in allocation.placed if node.device in (CPU, DISK))
    rooms = [allocation.budgets[device] - allocation.taken[device] for device in allocation.accelerators]
    if rooms and offloaded > max(0, *rooms):
        warnings.warn(
            f"the offloaded modules have {offloaded} bytes of buffers, and no accelerator has that room left. "
            "If memory runs out, offload them too: offload_buffers=True.",
            stacklevel=3,
        )


# ------------------------------------------------------------------------------------------ reading and checking one


def clean_device_map(device_map: DeviceMap, module_name: str = "") -> DeviceMap:
    """Group modules that share a device under their parent's name, in place, below `module_name`; returns the map.

    A parent that has a device of its own, another one, keeps it.
    """
    prefix = f"{module_name}." if module_name else ""
    below = [key for key in device_map if key.startswith(prefix)]
    grouped = dict(_grouped(module_name, {key: device_map[key] for key in below}, device_map))
    for key in below:
        del device_map[key]
    device_map.update(grouped)
    return device_map


def _grouped(name: str, below: Mapping[str, Any], device_map: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    devices = set(below.values())
    own = {device_map[name]} if name in device_map else set()
    if len(below) > 1 and len(devices | own) == 1:
        yield name, devices.pop()
        return
    prefix = f"{name}." if name else ""
    children: dict[str, dict[str, Any]] = {}
    for key, device in below.items():
        child = prefix + key[len(prefix) :].partition(".")[0]
        members = children.setdefault(child, {})
        if key == child:
            yield key, device
        else:
            members[key] = device
    for child, members in children.items():
        yield from _grouped(child, members, device_map)


def check_device_map(model: nn.Module, device_map: Mapping[str, Any]) -> None:
    """Check that `device_map` gives every tensor of the state dict of `model` a device.

    Warns of keys that name nothing in the model. Raises `DeviceMapError`, a ValueError, naming what has no device.
    """
    tensors = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    skipped = get_non_persistent_buffers(model, recurse=True, fqns=True)
    tensors += [name for name, _ in model.named_buffers(remove_duplicate=False) if name not in skipped]
    known = {*tensors, *skipped, *(name for name, _ in model.named_modules(remove_duplicate=False))}
    unknown = [key for key in device_map if key and key not in known]
    if unknown:
        warnings.warn(f"keys of the device map that name no module of the model: {unknown}", UserWarning, stacklevel=2)
    missing = missing_from(device_map, tensors)
    if missing:
        raise DeviceMapError(
            f"the device map gives no device to {', '.join(missing)}: add these, a module they lie in, or '' for all."
        )


def check_tied_parameters_on_same_device(tied_params: Iterable[Sequence[str]], device_map: Mapping[str, Any]) -> None:
    """Warn of tied parameters that `device_map` puts on different devices, where they would be loaded twice."""
    for names in tied_params:
        devices = {name: resolve(device_map, name) for name in names}
        if len(set(devices.values())) > 1:
            logger.warning(
                "Tied parameters are on different devices: %s. Give their modules one device, or use 'auto'.",
                devices,
            )


def resolve(device_map: Mapping[str, Any], name: str) -> Any:
    """The device that the map gives to the module or tensor `name`: that of the longest key that covers it.

    Raises `DeviceMapError` where no key does.
    """
    for prefix in _prefixes(name):
        if prefix in device_map:
            return device_map[prefix]
    raise DeviceMapError(f"the device map gives no device to {name!r}: add it, a module it lies in, or '' for all.")


def missing_from(device_map: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Those of `names` that no key of the map covers."""
    return [name for name in names if not any(prefix in device_map for prefix in _prefixes(name))]


def normalize_devices(device_map: Mapping[str, Device]) -> dict[str, MapValue]:
    """The map with each device as device maps show it: an accelerator's index, "mps", "cpu" or "disk".

    Raises `DeviceMapError` naming every key whose device this machine does not have, and the devices it has.
    """
    known = [*hardware.accelerator_names(), CPU, DISK]
    names = {key: _name_or_none(device) for key, device in device_map.items()}
    wrong = {key: device_map[key] for key, name in names.items() if name not in known}
    if wrong:
        raise DeviceMapError(f"no such device: {wrong}. This machine has {', '.join(known)}.")
    return {key: hardware.map_value(name) for key, name in names.items() if name is not None}


def _name_or_none(device: Device) -> str | None:
    try:
        return hardware.device_name(device)
    except DeviceMapError:
        return None
