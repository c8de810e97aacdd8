"""Run a command inside a memory cgroup of its own, page cache counted, and say what it used.

    python -m benchmarks.memory_cgroup --limit 12GiB --drop-caches -- python script.py

Needs root on Linux. The group is a child of the caller's own, so every limit that already held still holds. Pages
that other processes had cached before are charged to them, not to the command: drop the caches for a cold run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

UNITS = {"": 1, "B": 1}
UNITS |= {f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", start=1)}
UNITS |= {f"{prefix}IB": 1024**power for power, prefix in enumerate("KMGT", start=1)}
SAMPLE_SECONDS = 0.05
REMOVE_SECONDS = 5.0


def parse_bytes(text: str) -> int:
    """Bytes of "12GiB" (binary), "8GB" (decimal) or "4096"; raises ValueError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in UNITS:
        raise ValueError(f"{text!r} is not a size in bytes: write it like 12GiB, 8GB or 4096")
    return int(float(match[1]) * UNITS[match[2].upper()])


@dataclass(frozen=True)
class Layout:
    """What one version of the kernel interface calls its files; `anon` and `cache` are keys of memory.stat.

    `no_swap` is the file that a 0 keeps the group's pages in memory through. (Not v1's memory-and-swap limit: it
    would be met first, and the kernel would count nothing in `limit_hits`.)
    """

    limit: str
    no_swap: str
    peak: str
    limit_hits: tuple[str, str]
    oom_kills: tuple[str, str]
    anon: str
    cache: str


V1 = Layout(
    limit="memory.limit_in_bytes",
    no_swap="memory.swappiness",
    peak="memory.max_usage_in_bytes",
    limit_hits=("memory.failcnt", ""),
    oom_kills=("memory.oom_control", "oom_kill"),
    anon="total_rss",
    cache="total_cache",
)
V2 = Layout(
    limit="memory.max",
    no_swap="memory.swap.max",
    peak="memory.peak",
    limit_hits=("memory.events", "max"),
    oom_kills=("memory.events", "oom_kill"),
    anon="anon",
    cache="file",
)


@dataclass(frozen=True)
class Result:
    """What a limited run did. Sizes are bytes.

    `exit_code` is negative for a signal (-9 with `oom_kills` > 0: the limit killed it). `peak_bytes` is the kernel's
    own figure; `peak_anon_bytes` and `peak_cache_bytes` are sampled and need not coincide. `failcnt` counts how
    often the limit was met: reclaimed page cache counts too, so it alone is no failure.
    """

    exit_code: int
    seconds: float
    limit_bytes: int
    peak_bytes: int
    failcnt: int
    oom_kills: int
    peak_anon_bytes: int
    peak_cache_bytes: int
    output: str = ""
    """stdout and stderr together, when captured."""


def _own_group(version: int) -> str:
    """The path of this process's group in the memory hierarchy (v1) or in the unified one (v2)."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if ("memory" in controllers.split(",")) if version == 1 else not controllers:
            return path.lstrip("/")
    return ""


def find_parent(root: Path = Path("/sys/fs/cgroup")) -> tuple[Path, Layout]:
    """The folder to make a group in, and the names its files have.

    Raises OSError where no memory controller is mounted.
    """
    if (root / "memory" / V1.limit).exists():
        own = root / "memory" / _own_group(1)
        return (own if own.is_dir() else root / "memory"), V1
    controllers = root / "cgroup.controllers"
    if controllers.exists() and "memory" in controllers.read_text().split():
        # A v2 group that holds processes may not have children with controllers; its parent already does.
        own = root / _own_group(2)
        return (own.parent if own.is_dir() and own != root else root), V2
    raise OSError(f"no memory controller under {root}: run on Linux with memory cgroups, as root")


@dataclass
class MemoryGroup:
    """One group's folder and its figures."""

    path: Path
    layout: Layout
    peak_anon: int = field(default=0, init=False)
    peak_cache: int = field(default=0, init=False)

    def read(self, file: str, key: str = "") -> int:
        """A file's single number, or the number beside `key`; 0 where this kernel does not keep the figure."""
        path = self.path / file
        if not path.exists():
            return 0
        words = path.read_text().split()
        if not key:
            return int(words[0])
        return int(words[words.index(key) + 1]) if key in words else 0

    def set_limit(self, limit_bytes: int) -> None:
        (self.path / self.layout.limit).write_text(str(limit_bytes))
        no_swap = self.path / self.layout.no_swap
        if no_swap.exists():
            no_swap.write_text("0")

    def sample(self) -> None:
        self.peak_anon = max(self.peak_anon, self.read("memory.stat", self.layout.anon))
        self.peak_cache = max(self.peak_cache, self.read("memory.stat", self.layout.cache))

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Sample from another thread until the block ends."""
        done = threading.Event()

        def run() -> None:
            while not done.wait(SAMPLE_SECONDS):
                self.sample()

        thread = threading.Thread(target=run, name="memory-sampler", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self.sample()

    def remove(self) -> None:
        """Remove the group; a process that was just reaped may hold it for a moment.

        Raises OSError, naming them, when processes of the command are still alive in it: they are left alone.
        """
        deadline = time.monotonic() + REMOVE_SECONDS
        while True:
            try:
                return self.path.rmdir()
            except OSError as error:
                if time.monotonic() > deadline:
                    left = (self.path / "cgroup.procs").read_text().split()
                    raise OSError(
                        f"{self.path} could not be removed: processes {left} that the command started are still in it. "
                        "End them, then rmdir the folder."
                    ) from error
                time.sleep(0.05)


@contextmanager
def memory_group(limit_bytes: int) -> Iterator[MemoryGroup]:
    """A new group with the limit set, removed at the end. Raises PermissionError without root."""
    parent, layout = find_parent()
    group = MemoryGroup(parent / f"benchmark-{os.getpid()}-{time.monotonic_ns()}", layout)
    try:
        group.path.mkdir()
    except PermissionError as error:
        raise PermissionError(f"{group.path}: a memory cgroup needs root; run this benchmark as root") from error
    try:
        group.set_limit(limit_bytes)
        yield group
    finally:
        group.remove()


def run_limited(
    cmd: Sequence[str],
    limit_bytes: int,
    env: Mapping[str, str] | None = None,
    *,
    capture_output: bool = False,
    timeout: float | None = None,
) -> Result:
    """Run `cmd` with at most `limit_bytes` of memory, page cache included, and wait for it.

    `env` is the whole environment of the command; None inherits it. After `timeout` seconds the command itself is
    killed (exit code -9). Raises OSError or PermissionError where a memory cgroup cannot be made.
    """
    with memory_group(limit_bytes) as group:
        # The shell enters the group and becomes the command, so that every page of the command is counted.
        enter = ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', str(group.path / "cgroup.procs"), *cmd]
        stream = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True} if capture_output else {}
        started = time.perf_counter()
        process = subprocess.Popen(enter, env=env, **stream)  # type: ignore[call-overload]
        with group.sampling():
            output = _wait(process, timeout)
        seconds = time.perf_counter() - started
        return Result(
            exit_code=process.returncode,
            seconds=round(seconds, 3),
            limit_bytes=limit_bytes,
            peak_bytes=group.read(group.layout.peak),
            failcnt=group.read(*group.layout.limit_hits),
            oom_kills=group.read(*group.layout.oom_kills),
            peak_anon_bytes=group.peak_anon,
            peak_cache_bytes=group.peak_cache,
            output=output,
        )


def _wait(process: subprocess.Popen[str], timeout: float | None) -> str:
    """The captured output; the process has ended on return, whatever happened."""
    try:
        return process.communicate(timeout=timeout)[0] or ""
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate()[0] or ""
    except BaseException:
        process.kill()
        process.wait()
        raise


def drop_caches() -> None:
    """Write dirty pages out and empty the machine's page cache, for every process on it. Needs root on Linux."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run a command inside a memory cgroup of its own.")
    parser.add_argument("--limit", type=parse_bytes, required=True, help="bytes, page cache counted: 12GiB, 8GB, 4096")
    parser.add_argument("--drop-caches", action="store_true", help="empty the machine's page cache first")
    parser.add_argument("--timeout", type=float, help="seconds after which the command is killed")
    parser.add_argument("command", nargs="+", help="after --")
    options = parser.parse_args(argv)
    if options.drop_caches:
        drop_caches()
    result = run_limited(options.command, options.limit, timeout=options.timeout)
    figures = asdict(result)
    del figures["output"]
    print(json.dumps(figures), file=sys.stderr)
    return result.exit_code if result.exit_code >= 0 else 128 - result.exit_code


if __name__ == "__main__":
    sys.exit(main())
