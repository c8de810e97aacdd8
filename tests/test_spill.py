"""Spilled tensors come back bit by bit, a full disk loses nothing, and what was written is removed again."""

from __future__ import annotations

import errno
import gc
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_bigload.checkpoint import mapping, spill
from hf_bigload.checkpoint.mapping import MappedFiles
from hf_bigload.checkpoint.reader import Reader, layout, page_buffer
from hf_bigload.checkpoint.spill import SpillFolder, cache_root
from hf_bigload.errors import DtypeError, SpillError
from hf_bigload.specs import DTYPE_BYTES, TensorEntry


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_BIGLOAD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def mapped(entry: TensorEntry) -> torch.Tensor:
    return MappedFiles().tensor(entry)


def below(folder: Path) -> list[str]:
    """Every file and folder below, by name."""
    return sorted(path.name for path in folder.rglob("*"))


# ----------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
def test_every_dtype_comes_back_bit_by_bit(dtype: str) -> None:
    raw = torch.randint(0, 2 if dtype == "bool" else 256, (6 * DTYPE_BYTES[dtype],), dtype=torch.uint8)
    tensor = raw.view(getattr(torch, dtype)).reshape(2, 3)
    folder = SpillFolder()
    entry = folder.write(tensor, "layer.weight")
    assert (entry.name, entry.dtype, entry.shape, entry.stride) == ("layer.weight", dtype, (2, 3), None)
    back = mapped(entry)
    assert back.dtype == tensor.dtype
    assert back.view(torch.uint8).equal(tensor.view(torch.uint8))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(2.5),
        torch.empty(0, 4),
        torch.nn.Parameter(torch.ones(3)),
        torch.arange(10)[3:7],
        torch.tensor([1 + 2j]).conj(),
    ],
    ids=["scalar", "empty", "parameter", "slice", "conjugate"],
)
def test_every_kind_of_tensor_comes_back(tensor: torch.Tensor) -> None:
    folder = SpillFolder()
    assert mapped(folder.write(tensor)).equal(tensor.detach())


def test_many_tensors_lie_apart(cache: Path) -> None:
    folder = SpillFolder()
    tensors = [torch.randn(size) for size in (1, 1000, 3, 77, 5000, 16)]
    entries = [folder.write(tensor) for tensor in tensors]
    pages = [(entry.offset // 4096, (entry.end - 1) // 4096) for entry in entries]
    assert all(before[1] < after[0] for before, after in itertools.pairwise(pages))
    assert all(mapped(entry).equal(tensor) for entry, tensor in zip(entries, tensors, strict=True))
    assert len({entry.file for entry in entries}) == 1
    assert folder.nbytes == entries[-1].end


def test_what_is_appended_shows_in_a_mapping_that_was_already_written_to() -> None:
    folder, files = SpillFolder(), MappedFiles()
    first = files.tensor(folder.write(torch.ones(10)))
    first.zero_()
    second = torch.randn(10)
    assert files.tensor(folder.write(second)).equal(second)
    assert first.eq(0).all()


def test_the_disk_holds_what_was_written_and_no_more() -> None:
    folder = SpillFolder()
    file = [folder.write(torch.ones(10_000)) for _ in range(10)][-1].file
    with open(file, "rb") as written:
        os.fsync(written.fileno())
    assert os.stat(file).st_blocks * 512 <= 10 * 10_000 * 4 + 11 * 4096


def test_a_mapping_is_made_again_only_when_the_file_has_outgrown_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill, "GROWTH_BYTES", 4096)
    made, files, folder = [], MappedFiles(), SpillFolder()
    map_privately = mapping._map_privately
    monkeypatch.setattr(mapping, "_map_privately", lambda *a: made.append(a) or map_privately(*a))
    tensors = [torch.randn(1000) for _ in range(100)]
    assert all(files.tensor(folder.write(tensor)).equal(tensor) for tensor in tensors)
    assert len(made) <= 8  # 100 pages, doubling


def test_a_filesystem_that_grows_no_file_ahead_is_written_to_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, length: int) -> None:
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr(os, "ftruncate", refuse)
    folder, files, tensors = SpillFolder(), MappedFiles(), [torch.randn(1000) for _ in range(3)]
    assert all(files.tensor(folder.write(tensor)).equal(tensor) for tensor in tensors)


def test_a_tensor_larger_than_a_chunk_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill, "CHUNK_BYTES", 1000)
    folder, tensor = SpillFolder(), torch.randn(3333)
    assert mapped(folder.write(tensor)).equal(tensor)


def test_the_offset_keeps_the_residue_of_the_tensors_address() -> None:
    folder, base = SpillFolder(), torch.zeros(256, dtype=torch.uint8)
    for start in (0, 1, 8, 63, 5):
        tensor = base[start : start + 100]
        assert folder.write(tensor).offset % 64 == tensor.data_ptr() % 64


@pytest.mark.parametrize("phase", [0, 8, 40, 63])
def test_a_residue_that_is_given_is_kept(phase: int) -> None:
    folder = SpillFolder()
    for size in (3, 100):
        assert folder.write(torch.ones(size), phase=phase).offset % 64 == phase


def test_spilled_tensors_are_read_as_any_other_while_more_are_written() -> None:
    folder, reader, tensors = SpillFolder(), Reader(threads=2), [torch.randn(3000) for _ in range(3)]
    for tensor in tensors:
        planned = layout([folder.write(tensor)])
        buffer = page_buffer(planned.nbytes)
        reader.read(planned.extents, buffer).result(30)
        assert torch.frombuffer(buffer, dtype=tensor.dtype, count=3000, offset=planned.positions[0]).equal(tensor)
    reader.close()


def test_threads_do_not_write_over_each_other() -> None:
    folder, written = SpillFolder(), []

    def write(value: int) -> None:
        written.extend((value, folder.write(torch.full((500,), float(value)))) for _ in range(10))

    threads = [threading.Thread(target=write, args=(value,)) for value in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(written) == 80
    assert all(mapped(entry).eq(value).all() for value, entry in written)


def test_tensors_that_are_not_plain_bytes_on_the_cpu_are_refused_by_name() -> None:
    folder = SpillFolder()
    with pytest.raises(ValueError, match=r"'w' on cpu must be contiguous"):
        folder.write(torch.ones(3, 4).t(), "w")
    with pytest.raises(ValueError, match=r"'w' on meta must be"):
        folder.write(torch.ones(3, device="meta"), "w")
    with pytest.raises(DtypeError, match=r"'w' is of torch\.bits8"):
        folder.write(torch.empty(4, dtype=torch.bits8), "w")


# ------------------------------------------------------------------------------------------------------- full disks


def told_what_to_do(error: BaseException, folder: SpillFolder, name: str) -> bool:
    return all(said in str(error) for said in (name, folder.path, "bytes", "are free", "offload_folder=", "dtype"))


def test_too_little_room_is_found_before_anything_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = SpillFolder()
    folder.write(torch.ones(10))
    free = os.statvfs_result((4096, 4096, 0, 0, 2, 0, 0, 0, 0, 255))  # two blocks
    monkeypatch.setattr(os, "fstatvfs", lambda fd: free)
    monkeypatch.setattr(os, "pwrite", lambda *_: pytest.fail("wrote to a disk without room"))
    folder.reserve(8192)
    with pytest.raises(SpillError) as caught:
        folder.reserve(8193, "model.safetensors")
    assert told_what_to_do(caught.value, folder, "model.safetensors needs 8193 bytes")
    assert "8192 bytes (8.00 KiB) are free" in str(caught.value)
    with pytest.raises(SpillError) as caught:
        folder.write(torch.ones(5000), "layers.0.weight")
    assert told_what_to_do(caught.value, folder, "tensor 'layers.0.weight' needs")


class Interrupt(BaseException):
    pass


@pytest.mark.parametrize(
    ("stop", "raised"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), SpillError),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), SpillError),
        (OSError(errno.EIO, "Input/output error"), SpillError),
        (Interrupt(), Interrupt),
    ],
    ids=["full", "quota", "broken", "interrupted"],
)
def test_a_tensor_that_was_half_written_is_taken_back_and_the_rest_stays(
    monkeypatch: pytest.MonkeyPatch, stop: BaseException, raised: type[BaseException]
) -> None:
    folder, first, pwrite = SpillFolder(), torch.randn(1000), os.pwrite
    kept = folder.write(first)
    monkeypatch.setattr(spill, "CHUNK_BYTES", 1000)

    def stop_at_the_third(fd: int, data: Any, offset: int) -> int:
        if offset >= 4096 + 2000:
            raise stop
        return pwrite(fd, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", stop_at_the_third)
        with pytest.raises(raised) as caught:
            folder.write(torch.randn(1000), "layers.0.weight")
    if raised is SpillError:
        assert told_what_to_do(caught.value, folder, "tensor 'layers.0.weight' needs 4000 bytes")
    assert folder.nbytes == kept.end
    assert Path(kept.file).read_bytes()[kept.end :].strip(b"\0") == b""
    again = torch.randn(1000)
    assert mapped(folder.write(again)).equal(again)
    assert mapped(kept).equal(first)


def test_a_write_that_takes_little_is_continued(monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:7], offset))
    folder, tensor = SpillFolder(), torch.randn(50)
    assert mapped(folder.write(tensor)).equal(tensor)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], capture_output=True)
    except FileNotFoundError:
        pytest.skip("no mount here")
    if made.returncode:
        pytest.skip("mounting is not allowed here")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_disk_that_is_really_full_loses_nothing(tiny_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, first = SpillFolder(tiny_disk), torch.randn(100_000)
    entry = folder.write(first)
    with pytest.raises(SpillError, match="offload_folder="):
        folder.write(torch.randn(200_000), "too large")
    monkeypatch.setattr(folder, "reserve", lambda *_: None)  # as if another process had filled it in the meantime
    with pytest.raises(SpillError, match="No space left on device"):
        folder.write(torch.randn(200_000), "too large")
    small = torch.randn(1000)
    assert mapped(folder.write(small)).equal(small)
    assert mapped(entry).equal(first)


# ---------------------------------------------------------------------------------------------- whose folder it is


def test_without_a_folder_the_cache_is_used(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Path(SpillFolder().path).parent == cache / "spill"
    monkeypatch.delenv("HF_BIGLOAD_CACHE")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_root() == "/home/somebody/.cache/hf_bigload"


def test_a_users_folder_is_used_and_made_if_need_be(tmp_path: Path, cache: Path) -> None:
    wanted = tmp_path / "new" / "offload"
    entry = SpillFolder(wanted).write(torch.ones(1))
    assert Path(entry.file).is_relative_to(wanted)
    assert not cache.exists()


def test_two_models_share_a_folder_without_touching_each_other(tmp_path: Path) -> None:
    one, other = SpillFolder(tmp_path), SpillFolder(tmp_path)
    entries = one.write(torch.ones(100)), other.write(torch.zeros(100))
    assert mapped(entries[0]).eq(1).all()
    one.close()
    assert mapped(entries[1]).eq(0).all()


def test_the_spilled_weights_are_for_the_user_alone() -> None:
    folder = SpillFolder()
    assert os.stat(folder.path).st_mode & 0o077 == 0
    assert os.stat(folder.write(torch.ones(1)).file).st_mode & 0o077 == 0


@pytest.mark.parametrize("how", ["a file", "below a file"])
def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, how: str) -> None:
    (tmp_path / "taken").touch()
    wanted = tmp_path / "taken" if how == "a file" else tmp_path / "taken" / "sub"
    with pytest.raises(SpillError, match=rf"{wanted} cannot take offloaded weights.*offload_folder="):
        SpillFolder(wanted)


# -------------------------------------------------------------------------------------------------------- removal


def close(folder: SpillFolder) -> None:
    folder.close()


def collect(folder: SpillFolder) -> None:
    del folder
    gc.collect()


@pytest.mark.parametrize("how", [close, collect])
def test_what_was_written_is_removed_and_nothing_else(tmp_path: Path, how: Callable[[SpillFolder], None]) -> None:
    folders = [SpillFolder(tmp_path)]
    (tmp_path / "mine.dat").write_text("keep")
    folders[0].write(torch.ones(100))
    descriptors = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else None
    how(folders.pop())
    assert below(tmp_path) == ["mine.dat"]
    if descriptors is not None:
        assert len(os.listdir("/proc/self/fd")) == descriptors - 2  # the file and the lock


def test_a_file_that_somebody_put_into_our_subfolder_is_kept(tmp_path: Path) -> None:
    folder = SpillFolder(tmp_path)
    (Path(folder.path) / "mine.dat").write_text("keep")
    folder.close()
    assert below(tmp_path) == sorted([Path(folder.path).name, "mine.dat"])


def test_a_closed_or_removed_folder_is_not_written_to() -> None:
    closed, removed = SpillFolder(), SpillFolder()
    closed.close()
    closed.close()
    os.unlink(Path(removed.path) / spill.SPILL_NAME)
    for folder in (closed, removed):
        with pytest.raises(SpillError, match="tensor 'w' cannot be written"):
            folder.write(torch.ones(1), "w")
        with pytest.raises(SpillError, match="closed, removed"):
            folder.reserve(1)


PROCESS = """
import os, signal, sys
import torch
from hf_bigload.checkpoint.spill import SpillFolder
folder = SpillFolder()
print(folder.write(torch.ones(100)).file, flush=True)
"""


def run(code: str) -> tuple[str, int]:
    done = subprocess.run([sys.executable, "-c", PROCESS + code], stdout=subprocess.PIPE, text=True, timeout=120)
    return done.stdout.split()[0], done.returncode


def test_a_process_that_exits_removes_its_files(cache: Path) -> None:
    file, status = run("")
    assert status == 0
    assert not os.path.exists(file)
    assert below(cache / "spill") == []


def test_what_a_killed_process_left_is_removed_by_the_next(cache: Path) -> None:
    file, status = run("os.kill(os.getpid(), signal.SIGKILL)")
    assert status == -signal.SIGKILL
    assert os.path.exists(file)
    folder = SpillFolder()
    assert below(cache / "spill") == sorted([Path(folder.path).name, spill.SPILL_NAME])


def test_a_forked_childs_exit_leaves_its_parents_files(cache: Path) -> None:
    code = """
if os.fork() == 0:
    try:
        folder.write(torch.ones(1), "w")
    except OSError as error:
        assert "another process" in str(error)
        sys.exit(7)
    sys.exit(8)
status = os.waitstatus_to_exitcode(os.wait()[1])
os._exit(status if os.path.exists(folder.path) else 9)
"""
    assert run(code)[1] == 7


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def subfolder(parent: Path, name: str) -> Path:
    made = parent / name
    made.mkdir(parents=True)
    (made / spill.SPILL_NAME).write_bytes(b"weights")
    return made


def test_only_what_a_dead_process_of_this_host_left_is_removed(cache: Path) -> None:
    parent, host, dead = cache / "spill", socket.gethostname(), dead_pid()
    stale = subfolder(parent, f"hf_bigload-{host}-{dead}-abc")
    kept = [
        subfolder(parent, f"hf_bigload-{host}-{os.getppid()}-abc"),  # alive
        subfolder(parent, f"hf_bigload-{host}.elsewhere-{dead}-abc"),
        subfolder(parent, f"hf_bigload-{host}-abc"),
        subfolder(parent, "somebody's"),
    ]
    (parent / f"hf_bigload-{host}-{dead}-file").write_text("no folder")
    (parent / f"hf_bigload-{host}-{dead}-link").symlink_to(kept[-1])
    folder = SpillFolder()
    assert not stale.exists()
    assert all((path / spill.SPILL_NAME).exists() for path in kept)
    assert len(list(parent.iterdir())) == len([*kept, "file", "link", folder.path])


def test_a_subfolder_that_is_held_is_alive_whatever_its_process_number_says(cache: Path) -> None:
    held = subfolder(cache / "spill", f"hf_bigload-{socket.gethostname()}-{dead_pid()}-abc")
    lock = spill._hold(str(held))
    assert lock is not None
    SpillFolder()
    assert held.exists()  # its process is one of another container
    os.close(lock)
    SpillFolder()
    assert not held.exists()
