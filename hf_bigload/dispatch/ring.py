"""The buffers that streamed weights land in: page-aligned host memory, or bytes on a device.

Each device has one ring: memory that is allocated once, as large as the plan says, of which blocks get slots.
A slot is never written to while anything still looks at what it held. Leases say when that may end; a view that
outlives its lease (a module kept it, autograd did) keeps its bytes, and the ring does without them.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch.utils.dlpack import from_dlpack, to_dlpack

from ..checkpoint.reader import PAGE, page_buffer
from ..errors import human_bytes
from ..pinned import ALIGNMENT, pinned_buffer

_MAX_PARTS = 256
"""Places in a ring that views are remembered of."""

POISON = os.environ.get("HF_BIGLOAD_POISON") == "1"
"""Tests overwrite released slots with NaN, so that a use after release shows."""


class Look(NamedTuple):
    """What a tensor looks like in a slot: `nbytes` bytes from `position` on."""

    position: int
    dtype: torch.dtype
    shape: torch.Size | tuple[int, ...]
    stride: tuple[int, ...]
    nbytes: int


class Memory(ABC):
    """Bytes that slots are cut from, and what is known of them: which are taken, and who used the others last."""

    grain: ClassVar[int]
    """Slots begin and end at multiples of this."""
    address: int

    def __init__(self, nbytes: int) -> None:
        self.nbytes = self.rounded(nbytes)
        self.taken: dict[int, int] = {}
        """Start -> end."""
        self.last_uses: list[tuple[int, int, torch.Event]] = []
        """(start, end, event): copies or kernels that may still be under way on bytes that are free again."""

    @classmethod
    def rounded(cls, nbytes: int) -> int:
        return -(-max(nbytes, 1) // cls.grain) * cls.grain

    @abstractmethod
    def slot(self, start: int, nbytes: int) -> Slot:
        """A slot of the bytes from `start` on."""

    def place(self, nbytes: int) -> Slot | None:
        """A slot of `nbytes` free bytes, if there are as many in one piece.

        At an end of the memory if possible: of two slots in turn each gets an end of its own, so that any two blocks
        fit which together are no larger than the memory.
        """
        gaps = [(start, end) for start, end in self.gaps() if end - start >= nbytes]
        if not gaps:
            return None
        first, last = gaps[0], gaps[-1]
        at_the_end = first[0] > 0 and last[1] == self.nbytes
        start = last[1] - nbytes if at_the_end else first[0]
        self.taken[start] = start + nbytes
        return self.slot(start, nbytes)

    def gaps(self) -> Iterator[tuple[int, int]]:
        """(start, end) of what is free, in order."""
        at = 0
        for start in sorted(self.taken):
            if start > at:
                yield at, start
            at = self.taken[start]
        if at < self.nbytes:
            yield at, self.nbytes

    def events_over(self, start: int, end: int) -> list[torch.Event]:
        """Of the uses of these bytes so far. They are forgotten here: whoever asks waits for them, and comes after."""
        if not self.last_uses:
            return []
        events, others = [], []
        for first, last, event in self.last_uses:
            if first < end and start < last:
                events.append(event)
            rest = ((first, min(last, start)), (max(first, end), last))
            others += [(f, t, event) for f, t in rest if f < t]
        self.last_uses = others
        return events


class Slot(ABC):
    """Some bytes of a memory, and tensors of them."""

    def __init__(self, memory: Memory, start: int, nbytes: int) -> None:
        self.memory, self.start, self.capacity = memory, start, nbytes
        self.events = memory.events_over(start, start + nbytes)
        """What may still be under way on these bytes: to be waited for before the first of them is written."""
        self.is_written = False
        """Whether somebody may be writing to it now, or about to: it is not lent again before that has ended."""

    address: int

    @abstractmethod
    def views(self, key: object, looks: Sequence[Look]) -> list[torch.Tensor]:
        """A tensor of the slot's bytes for each look. `key` stands for these looks, whatever slot they are asked of."""

    @abstractmethod
    def is_viewed(self) -> bool:
        """Whether a tensor that `views` made, or a view of one, is still alive."""

    @abstractmethod
    def poison(self) -> None:
        """Make every float in the slot NaN."""

    @abstractmethod
    def _is_on(self, device: torch.device) -> bool: ...

    def covers(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` looks at this slot's bytes."""
        return self._is_on(tensor.device) and self.address <= address_of(tensor) < self.address + self.capacity

    def used(self, event: torch.Event | None) -> None:
        """Whoever gets these bytes next has to wait for `event`."""
        if event is not None:
            self.memory.last_uses.append((self.start, self.start + self.capacity, event))

    def unused(self) -> None:
        """Called when the slot is given back: what nobody has waited for yet is left to whoever gets the bytes next."""
        for event in self.events:
            self.used(event)

    def joined(self) -> None:
        """Called before a thread uses what the slot was filled with."""
        return

    def left(self) -> None:
        """Called by each thread when it leaves."""
        return

    def follow(self) -> None:
        """Let what the calling thread does next come after all that others who have left did."""
        return

    def forsaken(self) -> None:
        """Called when the last view that outlived its lease is gone: until then, anybody may have used it."""
        return


class HostMemory(Memory):
    """Anonymous pages: what O_DIRECT reads into, what a CPU computes from, and, pinned, what an accelerator copies."""

    grain = PAGE

    def __init__(self, nbytes: int, serves: torch.device | None = None) -> None:
        super().__init__(nbytes)
        self.buffer: Any = page_buffer(self.nbytes) if serves is None else pinned_buffer(self.nbytes, serves).buffer
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.buffer))

    def __del__(self) -> None:  # no device reads from memory that is gone
        for _, _, event in self.last_uses:
            event.synchronize()

    def slot(self, start: int, nbytes: int) -> HostSlot:
        return HostSlot(self, start, nbytes)


class HostSlot(Slot):
    """Bytes of host memory. Each view has a storage of its own, as tensors of a plain load have."""

    memory: HostMemory

    def __init__(self, memory: HostMemory, start: int, nbytes: int) -> None:
        super().__init__(memory, start, nbytes)
        self.address = memory.address + start
        self._storages: list[torch.UntypedStorage] = []

    @property
    def buffer(self) -> memoryview:
        """The slot's bytes, to be read into."""
        return memoryview(self.memory.buffer)[self.start : self.start + self.capacity]

    def views(self, key: object, looks: Sequence[Look]) -> list[torch.Tensor]:
        return [self.view(*look) for look in looks]

    def view(
        self,
        position: int,
        dtype: torch.dtype,
        shape: torch.Size | tuple[int, ...],
        stride: tuple[int, ...],
        nbytes: int,
    ) -> torch.Tensor:
        if nbytes == 0:
            return torch.empty(shape, dtype=dtype)
        count, offset = nbytes // dtype.itemsize, self.start + position
        flat = torch.frombuffer(self.memory.buffer, dtype=dtype, count=count, offset=offset)
        self._storages.append(flat.untyped_storage())
        return flat.as_strided(shape, stride)

    def is_viewed(self) -> bool:
        return any(_holders(storage) > 1 for storage in self._storages)

    def poison(self) -> None:
        if self.memory.last_uses:
            return  # a device may still copy from here, and to wait for it would hide that somebody else does not
        whole = torch.frombuffer(self.memory.buffer, dtype=torch.uint8, count=self.capacity, offset=self.start)
        whole.fill_(0xFF)

    def wait_for_copies(self) -> None:
        """Block until no copy out of these bytes, of those that were under way when the slot was taken, still runs."""
        for event in self.events:
            event.synchronize()
        self.events = []

    def _is_on(self, device: torch.device) -> bool:
        return device.type == "cpu"


class DeviceMemory(Memory):
    """Bytes on an accelerator.

    Raises:
        torch.OutOfMemoryError: the device has no room; says how much was needed and how much is free.
    """

    grain = ALIGNMENT

    def __init__(self, nbytes: int, device: torch.device, streams: tuple[torch.Stream, ...] = ()) -> None:
        super().__init__(nbytes)
        self.bytes = _device_bytes(self.nbytes, device)
        self.address = self.bytes.data_ptr()
        self._parts: dict[tuple[int, int], _Part] = {}
        current = torch.accelerator.current_stream(device)
        self.streams = {current}
        for stream in streams:
            self.shared_with(stream)
        # What the allocator gave may still be in use by the stream that freed it, which is the current one
        self.last_uses.append((0, self.nbytes, current.record_event()))

    def shared_with(self, stream: torch.Stream) -> None:
        """Have the allocator wait for `stream`, too, before it lends the memory again."""
        if stream not in self.streams:
            self.bytes.record_stream(stream)
            self.streams.add(stream)

    def slot(self, start: int, nbytes: int) -> DeviceSlot:
        return DeviceSlot(self, start, nbytes)

    def part(self, start: int, nbytes: int) -> _Part:
        """Made once: blocks come to the same places again and again."""
        if len(self._parts) > _MAX_PARTS:
            self._parts.clear()
        found = self._parts.get((start, nbytes))
        return found or self._parts.setdefault((start, nbytes), _Part(self.bytes[start : start + nbytes]))


class _Part:
    """Some bytes on a device with a storage of their own, whose holders can be counted."""

    def __init__(self, view: torch.Tensor) -> None:
        self.bytes = from_dlpack(to_dlpack(view))
        self._storage = self.bytes.untyped_storage()
        self._typed: dict[torch.dtype, torch.Tensor] = {}
        self._views: weakref.WeakKeyDictionary[Any, list[torch.Tensor]] = weakref.WeakKeyDictionary()
        self._unviewed = _holders(self._storage)

    def typed(self, dtype: torch.dtype) -> torch.Tensor:
        """All of it, as elements of `dtype`."""
        typed = self._typed.get(dtype)
        if typed is None:
            whole = self.bytes.numel() // dtype.itemsize * dtype.itemsize
            typed = self._typed[dtype] = self.bytes[:whole].view(dtype)
        return typed

    def views(self, key: object, looks: Sequence[Look]) -> list[torch.Tensor]:
        """A tensor for each look; made once for each `key`, as every call of torch costs more than all else here."""
        views = self._views.get(key)
        if views is None:
            elements = ((self.typed(look.dtype), look) for look in looks)
            views = [e.as_strided(look.shape, look.stride, look.position // e.element_size()) for e, look in elements]
            self._views[key] = views
        return list(views)

    def is_viewed(self) -> bool:
        """Whether anybody else has such a view, or a view of one."""
        own = len(self._typed) + sum(map(len, self._views.values()))
        return _holders(self._storage) > self._unviewed + own


class DeviceSlot(Slot):
    """Bytes on an accelerator, which streams use one after the other: events say who has to wait for whom."""

    memory: DeviceMemory

    def __init__(self, memory: DeviceMemory, start: int, nbytes: int) -> None:
        super().__init__(memory, start, nbytes)
        self.device = memory.bytes.device
        self.address = memory.address + start
        self._part = memory.part(start, nbytes)
        self.bytes = self._part.bytes
        self.filled_by: torch.Event | None = None

    def views(self, key: object, looks: Sequence[Look]) -> list[torch.Tensor]:
        return self._part.views(key, looks)

    def is_viewed(self) -> bool:
        return self._part.is_viewed()

    def poison(self) -> None:
        self.follow()
        self.bytes.fill_(0xFF)
        self.left()

    def wait_on(self, stream: torch.Stream) -> None:
        """Let `stream` come after all that was under way on these bytes when the slot was taken."""
        for event in self.events:
            stream.wait_event(event)
        self.events = []

    def filled(self, stream: torch.Stream) -> None:
        """Called when the copies that fill the slot were issued on `stream`."""
        self.filled_by = stream.record_event()
        self.used(self.filled_by)  # also where nobody ever joins

    def joined(self) -> None:
        if self.filled_by is not None:
            self._stream().wait_event(self.filled_by)

    def left(self) -> None:
        self.used(self._stream().record_event())

    def follow(self) -> None:
        stream = self._stream()
        for event in self.memory.events_over(self.start, self.start + self.capacity):
            stream.wait_event(event)
        self.left()

    def forsaken(self) -> None:
        for stream in (self._stream(), *self.memory.streams):
            self.used(stream.record_event())

    def _stream(self) -> torch.Stream:
        """The current one, which uses the memory from now on."""
        stream = torch.accelerator.current_stream(self.device.index)  # told a device, it takes twice as long
        self.memory.shared_with(stream)
        return stream

    def _is_on(self, device: torch.device) -> bool:
        return device == self.device


class Ring:
    """The slots of one device: cut from one memory of `limit` bytes, which is made when the first is taken.

    What does not fit has memory of its own, for as long as it is lent: a block inside a block, a second thread.
    With `serves`, the ring is host memory from which that device copies.
    """

    def __init__(self, device: torch.device, limit: int, serves: torch.device | None = None) -> None:
        self.device, self.limit, self.serves = device, limit, serves
        self.peak = 0
        self.make_room: Callable[[], bool] = lambda: False
        """Called where a slot is needed and none is free: gives one back that was taken ahead, and says if it did."""
        self.streams: tuple[torch.Stream, ...] = ()
        """Streams that use the memory besides the one that is current when it is allocated."""
        self._memory: Memory | None = None
        self._lent: weakref.WeakSet[Slot] = weakref.WeakSet()  # one that an interrupt lost on its way is gone
        self._escaped: list[Slot] = []
        self._alive: weakref.WeakSet[Memory] = weakref.WeakSet()
        self._lock = threading.RLock()

    @property
    def held(self) -> int:
        """Bytes of the ring's memory and of what is lent beside it."""
        memories = {slot.memory for slot in (*self._lent, *self._escaped)} | {self._memory} - {None}
        return sum(memory.nbytes for memory in memories if memory is not None)

    def take(self, nbytes: int, lasting: bool = False) -> Slot:
        """A slot of at least `nbytes` bytes that nobody else has, until `give`.

        `lasting`: it stays while other blocks come and go, and so has memory of its own.

        Raises:
            torch.OutOfMemoryError: the device has no room for it.
        """
        slot = None if lasting else self._place(nbytes)
        while slot is None and not lasting and self.make_room():
            slot = self._place(nbytes)
        if slot is None:
            with self._lock:
                slot = (None if lasting else self._renewed(nbytes)) or self._alone(nbytes)
        return slot

    def take_ahead(self, nbytes: int) -> Slot | None:
        """A slot as from `take`, if there is room for it in the ring now."""
        try:
            return self._place(nbytes)
        except torch.OutOfMemoryError:
            return None

    def fits(self, nbytes: int) -> bool:
        """Whether `take_ahead` would find a slot now."""
        with self._lock:
            if self._memory is None or self._escaped:
                return True  # perhaps
            return any(end - start >= nbytes for start, end in self._memory.gaps())

    def give(self, slot: Slot) -> None:
        """Return a slot that the ring lent. Repeating it does no harm."""
        with self._lock:
            if slot not in self._lent:
                return
            if slot.is_viewed():
                self._escaped.append(slot)
            elif not slot.is_written:  # else it is lost
                self._free(slot)
            self._lent.discard(slot)

    def lose(self, slot: Slot) -> None:
        """Never lend these bytes again."""
        with self._lock:
            self._lent.discard(slot)

    def close(self) -> None:
        """Give the memory back as soon as nothing that is lent looks at it."""
        with self._lock:
            self._memory = None
            self._escaped.clear()

    def after_fork(self) -> None:
        """In a child: whoever held the lock lives on in the parent only."""
        self._lock = threading.RLock()

    def _place(self, nbytes: int) -> Slot | None:
        """A slot in the ring, if there is room."""
        with self._lock:
            if self._memory is not None and self._is_lost(self._memory):
                self._memory = None
            if self._memory is None:
                if nbytes > self.limit:
                    return None
                self._memory = self._make(self.limit)
            slot = self._memory.place(self._memory.rounded(nbytes))
            if slot is None and self._collect():
                slot = self._memory.place(self._memory.rounded(nbytes))
            return slot if slot is None else self._lend(slot)

    def _is_lost(self, memory: Memory) -> bool:
        """Whether all that is taken of a memory was lost by interrupts."""
        return bool(memory.taken) and not self._lent and not self._escaped

    def _renewed(self, nbytes: int) -> Slot | None:
        """A slot in a new ring where what somebody kept, or an interrupt lost, blocks the old one."""
        if self._memory is None or nbytes > self.limit:
            return None
        lent = {slot.start for slot in self._lent if slot.memory is self._memory}
        if lent == set(self._memory.taken):
            return None
        self._memory = None
        return self._place(nbytes)

    def _alone(self, nbytes: int) -> Slot:
        memory = self._make(nbytes)
        slot = memory.place(memory.rounded(nbytes))
        assert slot is not None
        return self._lend(slot)

    def _lend(self, slot: Slot) -> Slot:
        self._lent.add(slot)
        return slot

    def _collect(self) -> bool:
        """Free what escaped and is looked at no more; whether there was any."""
        gone = [slot for slot in self._escaped if not slot.is_viewed()]
        self._escaped = [slot for slot in self._escaped if slot not in gone]
        for slot in gone:
            slot.forsaken()
            self._free(slot)
        return bool(gone)

    def _free(self, slot: Slot) -> None:
        slot.unused()
        if POISON:
            with torch._C._DisableFuncTorch():
                slot.poison()
        slot.memory.taken.pop(slot.start, None)

    def _make(self, nbytes: int) -> Memory:
        if self.device.type == "cpu":
            memory: Memory = HostMemory(nbytes, self.serves)
        else:
            memory = DeviceMemory(nbytes, self.device, self.streams)
        self._alive.add(memory)
        self.peak = max(self.peak, self.held + memory.nbytes)
        return memory


def address_of(tensor: torch.Tensor) -> int:
    """Where a tensor's first element lies; 0 for one without plain memory of its own (sparse, wrapped, empty)."""
    try:
        return tensor.data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0


def span_bytes(tensor: torch.Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _holders(storage: torch.UntypedStorage) -> int:
    """How many tensors and Python objects keep a storage alive, `storage` itself among them."""
    return torch._C._storage_Use_Count(storage._cdata)


def _device_bytes(nbytes: int, device: torch.device) -> torch.Tensor:
    try:
        return torch.empty(nbytes, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError as error:
        free, total = torch.accelerator.get_memory_info(device)
        raise torch.OutOfMemoryError(
            f"{device} has no room for the weights of the block that runs next: they need {human_bytes(nbytes)}, and "
            f"{human_bytes(free)} of {human_bytes(total)} are free beside what the model computes. Use a smaller batch "
            f"or context, or give the weights less of {device} with max_memory."
        ) from error
