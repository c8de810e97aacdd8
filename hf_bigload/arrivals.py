"""Tensors that were promised to a model and whose bytes are still on their way, by several threads.

Where the page cache holds a file, its mapped pages are converted straight into the tensor. What has to come from the
disk comes by whole pages through a few small buffers, and what goes to an accelerator through pinned ones, so that
reading, converting and copying overlap, within a tensor and over many.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue

import torch

from .checkpoint.reader import PAGE, Reader, populate
from .errors import CheckpointError, human_bytes
from .pinned import HostBuffer, pinned_buffer
from .specs import TensorEntry

TASK = 16 * 1024 * 1024
"""Bytes of a file that one thread brings at a time."""

PIECE = 4 * 1024 * 1024
"""Bytes of a file, and of what they become, on their way at once for each thread."""

SERIAL = 32 * 1024 - 64
"""Elements that torch copies without threads of its own, of which there are enough here already. Whole vectors."""

CPU_DEVICE = torch.device("cpu")


class Arrivals:
    """Brings tensors from files; `staging` bounds the bytes that are on their way outside their tensors.

    `keeps_cache`: what is read from disk stays in the page cache, for the next load and for other processes. Otherwise
    reads go past it.
    """

    def __init__(self, reader: Reader, staging: int, keeps_cache: bool) -> None:
        self.reader, self.keeps_cache = reader, keeps_cache
        self.stopped = False
        self.cores = threading.BoundedSemaphore(torch.get_num_threads())
        self._under_way: deque[_Arrival] = deque()
        self._streams: dict[torch.device, torch.Stream] = {}
        self._stages: SimpleQueue[_Stage] = SimpleQueue()
        for _ in range(max(1, min(reader.threads, staging // _Stage.NBYTES))):
            self._stages.put(_Stage())

    def bring(self, name: str, entry: TensorEntry, source: torch.Tensor, target: torch.Tensor) -> None:
        """Start filling `target` (contiguous, on any device) with `source`, the mapped bytes of `entry`, converted.

        Its values may be used after `finish`.
        """
        flat = target.data.view(-1)  # .data: writes to it do not count as changes of the model's parameter
        stream = None if target.device.type == "cpu" else self._stream(target.device)
        step = max(1, TASK // source.element_size())
        tasks = [
            _Copying(self, entry, source.view(-1), flat, begin, min(begin + step, flat.numel()), stream)
            for begin in range(0, flat.numel(), step)
        ]
        self._under_way.append(_Arrival(name, entry, self.reader.submit(tasks)))

    def collect(self, wait: bool = False) -> int:
        """How many tensors are still on their way; with `wait`, after the oldest of them arrived.

        Raises:
            CheckpointError: one could not be read; names it.
        """
        if wait and self._under_way:
            self._under_way[0].check()
        while self._under_way and self._under_way[0].future.done():
            self._under_way.popleft().check()
        return len(self._under_way)

    def finish(self) -> None:
        """Wait until all have arrived, on their devices too.

        Raises:
            CheckpointError: see `collect`.
        """
        try:
            while self.collect(wait=True):
                pass
        except BaseException:
            self.abandon()
            raise
        self._settle()

    def abandon(self) -> None:
        """Stop what is under way, after an error or an interrupt, and wait until no thread writes any more."""
        self.stopped = True
        while self._under_way:
            self._under_way[0].future.exception()
            self._under_way.popleft()
        self._settle()

    def _settle(self) -> None:
        for device, stream in self._streams.items():
            torch.accelerator.current_stream(device).wait_stream(stream)
            stream.synchronize()

    def _stream(self, device: torch.device) -> torch.Stream:
        """Where copies are issued; it waits for what was under way in the memory that was just allocated."""
        stream = self._streams.get(device) or self._streams.setdefault(device, torch.Stream(device))
        stream.wait_stream(torch.accelerator.current_stream(device))
        return stream

    @contextmanager
    def stage(self) -> Iterator[_Stage]:
        stage = self._stages.get()
        try:
            yield stage
        finally:
            self._stages.put(stage)


@dataclass(frozen=True)
class _Arrival:
    name: str
    entry: TensorEntry
    future: Future[int]

    def check(self) -> None:
        try:
            self.future.result()
        except CheckpointError as error:
            raise type(error)(f"Tensor {self.name!r}: {error}") from error
        except OSError as error:
            raise CheckpointError(
                f"Tensor {self.name!r}: {self.entry.nbytes} bytes ({human_bytes(self.entry.nbytes)}) at "
                f"{self.entry.offset} of {self.entry.file} could not be read: {error}. Check the disk and load again."
            ) from error


@dataclass(frozen=True)
class _Copying:
    """A task: the elements [begin, end) of a tensor, from its file to where it rests."""

    arrivals: Arrivals
    entry: TensorEntry
    source: torch.Tensor
    target: torch.Tensor
    begin: int
    end: int
    stream: torch.Stream | None

    def __call__(self) -> int:
        reader, first = self.arrivals.reader, self._at(self.begin)
        cached = reader.is_cached(self.entry.file, first)
        if not cached and self.arrivals.keeps_cache:  # told all at once: read piece by piece, it took twice as long
            reader.announce(self.entry.file, first, self._at(self.end) - first)
        if cached and self.stream is None:
            with self.arrivals.cores:  # more threads than these would only take turns
                for begin, end in self._pieces():
                    target = self.target[begin:end]
                    populate(target.data_ptr(), target.nbytes)
                    convert(target, self.source[begin:end])
        else:
            with self.arrivals.stage() as stage:
                for begin, end in self._pieces():
                    self._through(stage, begin, end, cached)
        return (self.end - self.begin) * self.source.element_size()

    def _pieces(self) -> Iterator[tuple[int, int]]:
        step = PIECE // max(self.source.element_size(), self.target.element_size())
        for begin in range(self.begin, self.end, step):
            if self.arrivals.stopped:
                return
            yield begin, min(begin + step, self.end)

    def _at(self, element: int) -> int:
        return self.entry.offset + element * self.source.element_size()

    def _through(self, stage: _Stage, begin: int, end: int, cached: bool) -> None:
        target = self.target[begin:end]
        if self.stream is None:
            populate(target.data_ptr(), target.nbytes)
            convert(target, self._read(stage.plain, begin, end))
            return
        half = stage.half(self.target.device)
        half.wait()
        if cached or self.source.dtype != self.target.dtype:
            source = self.source[begin:end] if cached else self._read(stage.plain, begin, end)
            staged = half.memory.tensor[: target.nbytes].view(target.dtype)
            convert(staged, source)
        else:
            staged = self._read(half.memory, begin, end)
        half.send(staged, target, self.stream)

    def _read(self, memory: HostBuffer, begin: int, end: int) -> torch.Tensor:
        """Elements from disk, in a buffer, at the residue modulo PAGE that they have in the file."""
        first, last = self._at(begin), self._at(end)
        shift = first % PAGE
        pages = -(-(shift + last - first) // PAGE) * PAGE
        arrivals = self.arrivals
        with memoryview(memory.buffer) as view, view.cast("B") as flat, flat[:pages] as whole:
            arrivals.reader.read_here(self.entry.file, first - shift, whole, shift + last - first, arrivals.keeps_cache)
        return torch.frombuffer(memory.buffer, dtype=self.source.dtype, count=end - begin, offset=shift)


def convert(target: torch.Tensor, source: torch.Tensor) -> None:
    """`target.copy_(source)` for flat tensors on the CPU, on the calling thread alone."""
    torch._foreach_copy_(list(target.split(SERIAL)), list(source.split(SERIAL)))


class _Half:
    """One of the two pinned buffers that a thread fills in turn: what is in it may still be on its way to a device."""

    def __init__(self, device: torch.device) -> None:
        self.sent: torch.Event | None = None
        self.memory = pinned_buffer(PIECE + PAGE, device)

    def wait(self) -> None:
        if self.sent is not None:
            self.sent.synchronize()

    def __del__(self) -> None:  # whatever ended the load, no device reads from memory that is gone
        self.wait()

    def send(self, staged: torch.Tensor, target: torch.Tensor, stream: torch.Stream) -> None:
        before = torch.accelerator.current_stream(target.device)
        torch.accelerator.set_stream(stream)
        try:
            target.copy_(staged, non_blocking=True)
            self.sent = stream.record_event()
        finally:
            torch.accelerator.set_stream(before)


class _Stage:
    """Buffers of a few pieces that one task at a time has, made when they are needed."""

    NBYTES = 3 * (PIECE + PAGE)

    def __init__(self) -> None:
        self._turns: dict[torch.device, Iterator[_Half]] = {}

    @functools.cached_property
    def plain(self) -> HostBuffer:
        return pinned_buffer(PIECE + PAGE, CPU_DEVICE)

    def half(self, device: torch.device) -> _Half:
        if device not in self._turns:
            self._turns[device] = itertools.cycle([_Half(device), _Half(device)])
        return next(self._turns[device])
