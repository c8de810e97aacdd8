"""Start measuring processes, one for each figure, and read the disk's own speed around them."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from benchmarks.measure import evict, warm
from benchmarks.memory_cgroup import drop_caches, memory_group, run_limited
from benchmarks.raw_disk import CHUNK, Chunk, Mode, Reading, list_chunks, measure
from benchmarks.report import Row

T = TypeVar("T")

ROOT = Path(__file__).parents[1]
RAW = Mode(direct=True, threads=8)
RAW_BYTES = 256 << 20
"""Enough for half a second at 1 GB/s, and little beside the disk's burst budget."""
UNSTEADY = 0.2
"""The share by which the disk may change speed during a case that still counts."""
ATTEMPTS = 3
TAIL = 2000
KILLED = -9


class WorkerError(RuntimeError):
    """A measuring process ended without figures."""


class ResultsDifferError(RuntimeError):
    """Two ways to run the same model gave different bits: nothing that was measured counts."""


class NotRunError(RuntimeError):
    """There was no time, or nothing to compare with; nothing is wrong."""


@dataclass(frozen=True)
class Steady(Generic[T]):
    """What was measured while the disk gave `raw` bytes per second, before and after."""

    value: T
    raw: tuple[float, float]

    @property
    def bytes_per_second(self) -> float:
        return sum(self.raw) / 2

    @property
    def is_steady(self) -> bool:
        return max(self.raw) - min(self.raw) <= UNSTEADY * max(self.raw)

    @property
    def note(self) -> str:
        return f"raw {self.raw[0] / 1e9:.2f} and {self.raw[1] / 1e9:.2f} GB/s"


@dataclass
class Runner:
    """Runs measuring processes and counts what all of them read from disk.

    `environment` is theirs on top of this one's. `isolated`: memory limits are kept by cgroups, and "cold" means that
    the whole machine's page cache was dropped; otherwise limits are left out, and only the checkpoint's own pages are.
    """

    environment: Mapping[str, str]
    isolated: bool
    read_limit: int
    attempts: int = ATTEMPTS
    deadline: float | None = None
    """By `time.monotonic`: no process starts after it, and none runs on."""
    read_bytes: int = field(default=0, init=False)

    def run(self, module: str, *arguments: object, limit: int | None = None) -> dict[str, Any]:
        """The JSON line that `python -m benchmarks.MODULE ARGUMENTS` prints, run with `limit` bytes of memory if given.

        With a limit, the kernel's own figures come with it, as "cgroup".

        Raises:
            WorkerError: it failed, or the limit killed it.
            NotRunError: the deadline has passed, before or meanwhile.
        """
        left = None if self.deadline is None else self.deadline - time.monotonic()
        if left is not None and left <= 0:
            raise NotRunError("not run: the minutes were spent")
        command = [sys.executable, "-m", f"benchmarks.{module}", *map(str, arguments)]
        environment = worker_environment(self.environment)
        cgroup: dict[str, Any] = {}
        if limit is not None and self.isolated:
            result = run_limited(command, limit, environment, capture_output=True, timeout=left)
            exit_code, output = result.exit_code, result.output
            cgroup = {"cgroup": {name: value for name, value in vars(result).items() if name != "output"}}
        else:
            exit_code, output = _run(command, environment, left)
        if self.deadline is not None and exit_code == KILLED and time.monotonic() >= self.deadline:
            raise NotRunError("stopped: the minutes were spent")
        report = _report(command, exit_code, output) | cgroup
        self.read_bytes += report.get("disk_read_bytes", 0)
        return report

    def warm(self, files: Sequence[Path]) -> None:
        """Bring the files into the page cache."""
        self.read_bytes += warm(files)

    def chill(self, files: Sequence[Path]) -> None:
        """Take the files out of the page cache, and everything else with them where that is allowed."""
        if self.isolated:
            drop_caches()
        evict(files)

    def raw(self, files: Sequence[Path], phase: int = 0) -> float:
        """Bytes per second that eight threads read the files with, past the page cache; `phase` picks the sample."""
        reading = read_raw(list(sample(files, RAW_BYTES, phase)))
        self.read_bytes += reading.disk_bytes
        return reading.nbytes / reading.seconds

    def steady(self, files: Sequence[Path], work: Callable[[], T]) -> Steady[T]:
        """`work()` between two looks at the disk's speed, again if that moved; the last attempt counts as it is.

        A repetition that would read more than the run may is left out.
        """
        for attempt in range(self.attempts):
            before, at_start = self.raw(files, phase=2 * attempt), self.read_bytes
            measured = Steady(work(), (before, self.raw(files, phase=2 * attempt + 1)))
            cost = self.read_bytes - at_start
            if measured.is_steady or self.read_bytes + cost > self.read_limit:
                break
        return measured


def sample(files: Sequence[Path], limit: int, phase: int) -> Iterator[Chunk]:
    """Chunks of at most `limit` bytes in all (one at the least), spread evenly; other phases give other chunks."""
    chunks = list(list_chunks(files))
    step = -(-len(chunks) * CHUNK // limit)
    return iter(chunks[phase % step :: step])


def read_raw(chunks: Sequence[Chunk]) -> Reading:
    """Eight threads with O_DIRECT; buffered, from cold, where the filesystem has none."""
    try:
        return measure(RAW, chunks)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return measure(Mode(direct=False, threads=RAW.threads), chunks)


def worker_environment(more: Mapping[str, str]) -> dict[str, str]:
    """This process's environment without what slows a measurement down or asks a network, and with `more`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_BIGLOAD_")}
    path = os.pathsep.join(filter(None, (str(ROOT), kept.get("PYTHONPATH"))))
    return {**kept, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", **more}


def can_isolate() -> bool:
    """Whether memory cgroups can be made here, and the page cache dropped: root on Linux."""
    try:
        with memory_group(1 << 30):
            return os.access("/proc/sys/vm/drop_caches", os.W_OK)
    except OSError:
        return False


def judged(row: Row, measured: Steady[Any]) -> Row:
    """`row`, which does not count where the disk changed its speed meanwhile."""
    note = "; ".join(filter(None, [row.note, measured.note]))
    return replace(row, note=note, verdict=row.verdict if measured.is_steady else "unsettled")


def guarded(row: Row, rows: Callable[[], Iterable[Row]]) -> Iterator[tuple[Row, bool]]:
    """`rows()`, each with whether its results were right; a failure ends them with `row` saying so, and not the run."""
    print(f"{row.case} ...", file=sys.stderr, flush=True)
    try:
        for each in rows():
            print("   ", *filter(None, each.cells()), sep="  ", file=sys.stderr, flush=True)
            yield each, True
    except NotRunError as error:
        yield replace(row, verdict=str(error)), True
    except (ResultsDifferError, WorkerError) as error:
        verdict = "RESULTS DIFFER" if isinstance(error, ResultsDifferError) else "FAILED"
        print(f"{verdict}: {row.case}: {error}", file=sys.stderr, flush=True)
        yield replace(row, note=str(error).splitlines()[0], verdict=verdict), False


def _run(command: Sequence[str], environment: Mapping[str, str], timeout: float | None) -> tuple[int, str]:
    """Exit code and output; after `timeout` seconds it is killed."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    try:
        done = subprocess.run(command, env=environment, timeout=timeout, check=False, **pipes)
    except subprocess.TimeoutExpired:
        return KILLED, ""
    return done.returncode, done.stdout


def _report(command: Sequence[str], exit_code: int, output: str) -> dict[str, Any]:
    lines = [line for line in output.splitlines() if line.startswith('{"')]
    if exit_code or not lines:
        killed = " (killed: out of memory?)" if exit_code == KILLED else ""
        raise WorkerError(f"{' '.join(command[2:])} ended with {exit_code}{killed}:\n{output[-TAIL:]}")
    return json.loads(lines[-1])
