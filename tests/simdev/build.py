"""Compiles the simulator once per source, torch version and Python ABI, into a folder of the user's cache."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

SOURCE_FOLDER = Path(__file__).parent / "csrc"
TORCH_FOLDER = Path(torch.__file__).parent
LIBRARY_NAME = "libsim.so"


def library() -> Path:
    """The compiled library, built on the first call (about half a minute on two cores).

    Safe with several processes: one builds, the others wait for it.

    Raises:
        RuntimeError: there is no C++ compiler, or it rejects the sources.
    """
    built = cache_folder() / build_key() / LIBRARY_NAME
    if built.exists():
        return built
    with _locked(cache_folder() / f"{build_key()}.lock"):
        if not built.exists():
            _build(built)
    return built


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/hf_bigload-simdev`, or the same under `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_bigload-simdev"


def build_key() -> str:
    """What the library depends on, as a folder name: torch's version, Python's ABI and a hash of sources and flags."""
    digest = hashlib.sha256(" ".join(_compile_flags()).encode())
    for source in sorted(SOURCE_FOLDER.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return f"torch-{torch.__version__}-{sysconfig.get_config_var('SOABI')}-{digest.hexdigest()[:16]}"


def compiler() -> str:
    """The path of `$CXX`, else of g++.

    Raises:
        RuntimeError: it is not installed.
    """
    name = os.environ.get("CXX") or "g++"
    path = shutil.which(name)
    if path is None:
        raise RuntimeError(
            f"the simulated accelerator is compiled on first use, and there is no C++ compiler {name!r} on PATH: "
            "install g++ 11 or newer (Debian and Ubuntu: apt install g++; Fedora: dnf install gcc-c++), "
            "or name another compiler in CXX"
        )
    return path


def _compile_flags() -> list[str]:
    include = TORCH_FOLDER / "include"
    abi = int(torch.compiled_with_cxx11_abi())
    return [
        *("-std=c++20", "-O1", "-fPIC", "-Wall", f"-D_GLIBCXX_USE_CXX11_ABI={abi}"),
        *("-isystem", str(include), "-isystem", str(include / "torch" / "csrc" / "api" / "include")),
    ]


def _link_flags() -> list[str]:
    # No rpath: whoever loads the library has imported torch, and the loader finds these by name in the process.
    return ["-shared", f"-L{TORCH_FOLDER / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]


def _build(target: Path) -> None:
    """Compile in a scratch folder beside the target and rename: a library that exists is complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        sources = sorted(SOURCE_FOLDER.glob("*.cpp"))
        objects = [Path(scratch, source.stem + ".o") for source in sources]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_compile, sources, objects))
        linked = Path(scratch, LIBRARY_NAME)
        _run([compiler(), *map(str, objects), "-o", str(linked), *_link_flags()])
        linked.replace(target)


def _compile(source: Path, target: Path) -> None:
    _run([compiler(), *_compile_flags(), "-c", str(source), "-o", str(target)])


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"the simulated accelerator does not compile against torch {torch.__version__}; "
            f"this command failed with status {done.returncode}:\n{' '.join(command)}\n{done.stderr}"
        )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed, also by a crash
        yield
