"""Bytes arrive where they were asked for, unchanged, or the error says why not; mapped tensors are private."""

from __future__ import annotations

import copy
import errno
import fcntl
import gc
import itertools
import mmap
import os
import pickle
import random
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_bigload.checkpoint import mapping, reader
from hf_bigload.checkpoint.index import build_index, stamp
from hf_bigload.checkpoint.mapping import MappedFiles, dirty_pages
from hf_bigload.checkpoint.reader import MERGE_GAP, PAGE, Extent, Layout, Reader, layout, page_buffer
from hf_bigload.errors import CheckpointChangedError, CheckpointError, CorruptShardError, MissingShardError
from hf_bigload.specs import TensorEntry

SIZE = 1_000_003
"""Bytes of the test file: no multiple of a page, so that its last page is cut short."""


@pytest.fixture(scope="module")
def content() -> bytes:
    return random.Random(0).randbytes(SIZE)


@pytest.fixture
def file(tmp_path: Path, content: bytes) -> str:
    path = tmp_path / "shard"
    path.write_bytes(content)
    return str(path)


@pytest.fixture
def small_chunks() -> Iterator[Reader]:
    """A reader that cuts even small extents into several reads."""
    made = Reader(threads=4, chunk=2 * PAGE)
    yield made
    made.close()


def entry(file: str, offset: int, nbytes: int, name: str = "t") -> TensorEntry:
    return TensorEntry(name, file, offset, nbytes, "uint8", (nbytes,))


def whole_pages(offset: int, nbytes: int) -> tuple[int, int]:
    return offset // PAGE * PAGE, -(-(offset + nbytes) // PAGE) * PAGE


def read_one(made: Reader, file: str, offset: int, nbytes: int) -> bytes:
    planned = layout([entry(file, offset, nbytes)])
    buffer = page_buffer(planned.nbytes)
    assert made.read(planned.extents, buffer).result(30) == nbytes
    at = planned.positions[0]
    return buffer[at : at + nbytes]


# ------------------------------------------------------------------------------------------------------------ layout


def random_entries(rng: random.Random) -> list[TensorEntry]:
    """Tensors of up to three files: neighbours, gaps of all sizes, ties, overlapping views, empty ones."""
    entries = []
    for file, position in itertools.product("abc"[: rng.randint(1, 3)], [0]):
        for _ in range(rng.randint(0, 12)):
            nbytes = rng.choice([0, 1, 7, 64, 4095, 4096, 4097, rng.randrange(200_000)])
            entries.append(entry(file, position, nbytes))
            step = rng.choice([nbytes, nbytes // 2, 0, nbytes + 1, nbytes + MERGE_GAP - 1, nbytes + MERGE_GAP + 5000])
            position += step
    rng.shuffle(entries)
    return entries


def check_layout(entries: list[TensorEntry], planned: Layout) -> None:
    pages = sorted(whole_pages(extent.at, extent.nbytes) for extent in planned.extents)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(pages)), "extents share a page"
    assert planned.nbytes == max((end for _, end in pages), default=0)
    assert all(extent.at % PAGE == extent.offset % PAGE for extent in planned.extents)
    for tensor, position in zip(entries, planned.positions, strict=True):
        if tensor.nbytes:
            assert any(
                extent.file == tensor.file
                and extent.offset <= tensor.offset
                and tensor.end <= extent.end
                and position - extent.at == tensor.offset - extent.offset
                for extent in planned.extents
            )


@pytest.mark.parametrize("seed", range(200))
def test_a_layout_holds_every_tensor_at_its_page_residue_and_no_two_extents_share_a_page(seed: int) -> None:
    entries = random_entries(random.Random(seed))
    planned = layout(entries)
    check_layout(entries, planned)
    slack = sum(2 * PAGE for _ in planned.extents)
    gaps = MERGE_GAP * len(entries)
    assert planned.nbytes <= sum(tensor.nbytes for tensor in entries) + slack + gaps


def test_neighbours_and_small_gaps_are_one_extent_and_large_gaps_are_not() -> None:
    near, far = 100 + MERGE_GAP - 1, 300 + 3 * MERGE_GAP
    planned = layout([entry("f", 0, 50), entry("f", 50, 50), entry("f", near, 10), entry("f", far, 5)])
    assert [(extent.offset, extent.nbytes) for extent in planned.extents] == [(0, near + 10), (far, 5)]


def test_tied_tensors_take_room_once() -> None:
    planned = layout([entry("f", 100, 9000, "embed"), entry("f", 100, 9000, "head")])
    assert planned.positions == (100, 100)
    assert planned == Layout(3 * PAGE, (100, 100), (Extent("f", 100, 9000, 100),))


def test_nothing_takes_no_room() -> None:
    assert layout([]) == Layout(0, (), ())
    assert layout([entry("f", 77, 0)]) == Layout(0, (0,), ())


def test_a_page_buffer_is_aligned_zeroed_and_of_the_size_asked_for() -> None:
    buffer = page_buffer(3 * PAGE)
    assert len(buffer) == 3 * PAGE
    assert buffer[:] == bytes(3 * PAGE)
    assert torch.frombuffer(buffer, dtype=torch.uint8).data_ptr() % PAGE == 0
    assert len(page_buffer(0)) == PAGE


@pytest.mark.parametrize(("content", "kept"), [(None, True), ("-1\n", True), ("9\n", False), ("", True)])
def test_a_virtual_machine_that_gives_huge_pages_back_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None, kept: bool
) -> None:
    if content is not None:
        (tmp_path / "order").write_text(content)
    monkeypatch.setattr(reader, "_PAGE_REPORTING", str(tmp_path / "order"))
    assert reader.huge_pages_are_kept.__wrapped__() is kept
    assert page_buffer(3 * PAGE, huge=kept)[:] == bytes(3 * PAGE)


# ----------------------------------------------------------------------------------------------- the same bytes


@pytest.mark.parametrize("seed", range(20))
def test_random_tensors_arrive_as_they_lie_in_the_files_and_no_other_page_is_touched(
    tmp_path: Path, content: bytes, small_chunks: Reader, seed: int
) -> None:
    rng = random.Random(seed)
    files = {name: str(tmp_path / name) for name in "abc"}
    entries = [
        entry(files[drawn.file], drawn.offset, drawn.nbytes)
        for drawn in random_entries(rng)
        if drawn.end <= SIZE
    ]  # fmt: skip
    for path in files.values():
        Path(path).write_bytes(content)
    planned = layout(entries)
    buffer = page_buffer(planned.nbytes + PAGE)
    buffer[:] = b"\xa5" * len(buffer)
    assert small_chunks.read(planned.extents, buffer).result(30) == sum(e.nbytes for e in planned.extents)
    for tensor, at in zip(entries, planned.positions, strict=True):
        assert buffer[at : at + tensor.nbytes] == content[tensor.offset : tensor.end]
    assert buffer[planned.nbytes :] == b"\xa5" * (len(buffer) - planned.nbytes)


@pytest.mark.parametrize("nbytes", [1, 3, PAGE, PAGE + 1, 3 * PAGE + 17])
def test_the_short_page_at_the_end_of_a_file_arrives(
    file: str, content: bytes, small_chunks: Reader, nbytes: int
) -> None:
    assert read_one(small_chunks, file, SIZE - nbytes, nbytes) == content[-nbytes:]


def test_no_extents_are_no_bytes(small_chunks: Reader) -> None:
    assert small_chunks.read([], page_buffer(0)).result(1) == 0


def test_bytes_read_counts_what_was_asked_for(file: str, small_chunks: Reader) -> None:
    read_one(small_chunks, file, 5, 20_000)
    read_one(small_chunks, file, 30_000, 7)
    assert small_chunks.bytes_read == 20_007


def test_many_threads_may_read_at_once(file: str, content: bytes, small_chunks: Reader) -> None:
    wrong: list[Any] = []

    def check(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(10):
            offset, nbytes = rng.randrange(SIZE - 50_000), rng.randrange(1, 50_000)
            if read_one(small_chunks, file, offset, nbytes) != content[offset : offset + nbytes]:
                wrong.append((offset, nbytes))

    threads = [threading.Thread(target=check, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# -------------------------------------------------------------------------------------------- past the page cache


class Preadv:
    """os.preadv with its calls counted by whether the file was open with O_DIRECT; `refuse` may raise."""

    def __init__(self, refuse: Callable[[bool], None] = lambda direct: None) -> None:
        self.preadv, self.refuse = os.preadv, refuse
        self.direct: list[bool] = []

    def __call__(self, fd: int, views: Any, offset: int) -> int:
        direct = bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)
        self.direct.append(direct)
        self.refuse(direct)
        return self.preadv(fd, views, offset)


def takes_direct_reads(path: str) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return False
    try:
        return os.preadv(fd, [page_buffer(PAGE)], 0) == PAGE
    except OSError:
        return False
    finally:
        os.close(fd)


needs_o_direct = pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="this system has no O_DIRECT")


@needs_o_direct
def test_reads_are_direct_where_the_filesystem_takes_them(
    file: str, content: bytes, small_chunks: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not takes_direct_reads(file):
        pytest.skip("no O_DIRECT on this filesystem")
    spy = Preadv()
    monkeypatch.setattr(os, "preadv", spy)
    assert read_one(small_chunks, file, 1, SIZE - 1) == content[1:]  # to the cut last page
    assert len(spy.direct) == -(-SIZE // (2 * PAGE))
    assert all(spy.direct)


def refuse_direct(direct: bool) -> None:
    if direct:
        raise OSError(errno.EINVAL, "Invalid argument")


def no_direct_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "preadv", Preadv(refuse_direct))


def no_direct_files(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = fcntl.fcntl

    def refuse(fd: int, command: int, flags: int = 0) -> int:
        if command == fcntl.F_SETFL and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return ask(fd, command, flags)

    monkeypatch.setattr(fcntl, "fcntl", refuse)


def no_o_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_O_DIRECT", 0)


def no_fadvise(monkeypatch: pytest.MonkeyPatch) -> None:
    no_o_direct(monkeypatch)
    monkeypatch.delattr(os, "posix_fadvise")


@needs_o_direct
@pytest.mark.parametrize("rung", [no_direct_reads, no_direct_files, no_o_direct, no_fadvise])
def test_a_filesystem_that_refuses_direct_reads_is_read_through_the_cache(
    file: str, content: bytes, small_chunks: Reader, monkeypatch: pytest.MonkeyPatch, rung: Callable[[Any], None]
) -> None:
    rung(monkeypatch)
    assert read_one(small_chunks, file, 1, SIZE - 1) == content[1:]
    assert read_one(small_chunks, file, 12_345, 6_789) == content[12_345 : 12_345 + 6_789]


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system has no posix_fadvise")
def test_buffered_reads_drop_the_pages_behind_them(
    file: str, small_chunks: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_o_direct(monkeypatch)
    dropped: list[tuple[int, int]] = []
    monkeypatch.setattr(
        os, "posix_fadvise", lambda fd, offset, nbytes, advice: dropped.append((offset, nbytes))
    )  # fmt: skip
    read_one(small_chunks, file, 0, 5 * PAGE)
    assert sorted(dropped) == [(0, 2 * PAGE), (2 * PAGE, 2 * PAGE), (4 * PAGE, PAGE)]


def test_a_read_that_returns_little_is_continued(
    file: str, content: bytes, small_chunks: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: preadv(fd, [views[0][:1000]], offset))
    assert read_one(small_chunks, file, 10, 20_000) == content[10:20_010]


# -------------------------------------------------------------------------------------------------------- failures


def fails_with(made: Reader, file: str, offset: int = 0, nbytes: int = 50_000) -> BaseException:
    planned = layout([entry(file, offset, nbytes)])
    error = made.read(planned.extents, page_buffer(planned.nbytes)).exception(30)
    assert error is not None
    return error


def test_a_missing_file_is_named(tmp_path: Path, small_chunks: Reader) -> None:
    error = fails_with(small_chunks, str(tmp_path / "gone"))
    assert isinstance(error, MissingShardError)
    assert "gone" in str(error)


def test_a_range_behind_the_end_of_the_file_is_named(file: str, small_chunks: Reader) -> None:
    error = fails_with(small_chunks, file, SIZE - 1000, 1001)
    assert isinstance(error, CorruptShardError)
    assert file in str(error)
    assert f"ends at byte {SIZE}" in str(error)


def replace_by_zeros(file: str) -> None:
    Path(file + ".new").write_bytes(bytes(SIZE))
    os.replace(file + ".new", file)


def test_an_indexed_file_that_was_replaced_is_refused(file: str) -> None:
    made = Reader(stamps={file: stamp(file)})
    replace_by_zeros(file)
    assert isinstance(fails_with(made, file), CheckpointChangedError)


def test_an_indexed_file_that_was_removed_is_refused(file: str) -> None:
    made = Reader(stamps={file: stamp(file)})
    os.unlink(file)
    assert isinstance(fails_with(made, file), CheckpointChangedError)


def test_an_open_file_is_not_exchanged_for_one_that_takes_its_path(file: str, content: bytes) -> None:
    made = Reader(stamps={file: stamp(file)})
    read_one(made, file, 0, 10)
    replace_by_zeros(file)
    assert read_one(made, file, 5000, 9000) == content[5000:14_000]


def test_an_indexed_file_that_is_written_to_while_open_is_refused(file: str) -> None:
    made = Reader(stamps={file: stamp(file)})
    read_one(made, file, 0, 10)
    with open(file, "r+b") as shard:
        shard.write(b"other")
    os.utime(file, ns=(1, 1))
    assert isinstance(fails_with(made, file), CheckpointChangedError)


def test_a_file_that_shrinks_while_open_has_changed(file: str, small_chunks: Reader) -> None:
    read_one(small_chunks, file, 0, 10)
    os.truncate(file, 20_000)
    error = fails_with(small_chunks, file, 0, 50_000)
    assert isinstance(error, CheckpointChangedError)
    assert f"from {SIZE} to 20000 bytes" in str(error)


def test_a_failing_disk_fails_the_read_and_only_that(
    file: str, content: bytes, small_chunks: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", fail)
        error = fails_with(small_chunks, file)
    assert isinstance(error, OSError)
    assert error.errno == errno.EIO
    assert read_one(small_chunks, file, 0, 100) == content[:100]


def test_nothing_is_written_to_the_buffer_once_its_future_is_done_with_an_error(
    file: str, small_chunks: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_may_go, preadv = threading.Event(), os.preadv

    def first_is_slow_second_fails(fd: int, views: Any, offset: int) -> int:
        if offset == 0:
            assert slow_may_go.wait(30)
        if offset == 2 * PAGE:
            raise OSError(errno.EIO, "Input/output error")
        return preadv(fd, views, offset)

    monkeypatch.setattr(os, "preadv", first_is_slow_second_fails)
    planned = layout([entry(file, 0, 50_000)])
    future = small_chunks.read(planned.extents, page_buffer(planned.nbytes))
    with pytest.raises(TimeoutError):
        future.result(0.05)  # the failure is known, but a thread is still reading
    slow_may_go.set()
    assert isinstance(future.exception(30), OSError)


@pytest.mark.parametrize(
    ("extent", "buffer", "says"),
    [
        (Extent("f", 10, 20, 11), page_buffer(PAGE), "another position in its page"),
        (Extent("f", 0, PAGE + 1, 0), page_buffer(PAGE), f"the buffer has {PAGE} bytes"),
        (Extent("f", 0, 10, PAGE), page_buffer(PAGE), f"the buffer has {PAGE} bytes"),
        (Extent("f", 0, 10, 0), memoryview(page_buffer(2 * PAGE))[1:], "multiple of 4096"),
        (Extent("f", 0, 10, 0), bytes(PAGE), "writable"),
        (Extent("f", 0, 10, 0), memoryview(page_buffer(2 * PAGE))[::2], "contiguous"),
    ],
)
def test_a_buffer_that_a_read_could_not_keep_to_is_refused(
    small_chunks: Reader, extent: Extent, buffer: Any, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        small_chunks.read([extent], buffer)


@pytest.mark.parametrize("arguments", [{"threads": 0}, {"chunk": 0}, {"chunk": PAGE + 1}])
def test_a_reader_without_threads_or_with_cut_pages_is_refused(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"threads=.*chunk="):
        Reader(**arguments)


# ------------------------------------------------------------------------------------------- tasks on the same threads


def test_tasks_run_on_the_threads_that_read_and_their_bytes_are_summed(small_chunks: Reader) -> None:
    names: list[str] = []
    tasks = [lambda n=n: names.append(threading.current_thread().name) or n for n in (3, 4, 5)]
    assert small_chunks.submit(tasks).result(30) == 12
    assert names == ["hf_bigload-reader"] * 3
    assert small_chunks.bytes_read == 12
    assert small_chunks.submit([]).result(1) == 0


def test_tasks_are_done_only_once_no_thread_works_on_any_and_the_first_error_is_told(small_chunks: Reader) -> None:
    failed, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    def slow() -> int:
        assert may_end.wait(30)
        ended.set()
        return 1

    def fails() -> int:
        failed.set()
        raise OSError(errno.EIO, "Input/output error")

    future = small_chunks.submit([slow, fails])
    assert failed.wait(30)
    with pytest.raises(TimeoutError):
        future.result(0.05)
    may_end.set()
    assert isinstance(future.exception(30), OSError)
    assert ended.is_set()


def test_what_comes_before_a_read_is_over_when_its_first_byte_is_written(file: str, content: bytes) -> None:
    made, buffer, may_write = Reader(threads=4, chunk=PAGE), page_buffer(10 * PAGE), threading.Event()
    future = made.read([Extent(file, 0, 10 * PAGE, 0)], buffer, before=lambda: may_write.wait(30))
    time.sleep(0.02)
    assert buffer[:] == bytes(10 * PAGE)
    may_write.set()
    assert future.result(30) == 10 * PAGE
    assert buffer[:] == content[: 10 * PAGE]


def test_an_error_before_a_read_fails_it_and_nothing_is_written(file: str, small_chunks: Reader) -> None:
    def refuse() -> None:
        raise RuntimeError("the device is gone")

    buffer = page_buffer(10 * PAGE)
    with pytest.raises(RuntimeError, match="the device is gone"):
        small_chunks.read([Extent(file, 0, 10 * PAGE, 0)], buffer, before=refuse).result(30)
    assert buffer[:] == bytes(10 * PAGE)


def test_a_closed_reader_takes_no_tasks() -> None:
    made = Reader()
    made.close()
    with pytest.raises(ValueError, match="closed"):
        made.submit([lambda: 1])


# ---------------------------------------------------------------------------------------------------- life and death


def open_descriptors(file: str) -> int:
    found = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            found += os.readlink(f"/proc/self/fd/{name}") == file
        except FileNotFoundError:  # the descriptor of the listing itself
            pass
    return found


needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="this system has no /proc")


@needs_proc
def test_a_file_is_opened_once_and_closed_with_the_reader(file: str) -> None:
    made = Reader(threads=2)
    for offset in (0, 5000, 9000):
        read_one(made, file, offset, 100)
    assert open_descriptors(file) == 1
    made.close()
    assert open_descriptors(file) == 0


def test_a_closed_reader_reads_no_more(file: str) -> None:
    made = Reader()
    made.close()
    made.close()
    with pytest.raises(ValueError, match="closed"):
        read_one(made, file, 0, 10)


def test_close_waits_for_the_reads_under_way(file: str, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv = os.preadv

    def slow(fd: int, views: Any, offset: int) -> int:
        time.sleep(0.01)
        return preadv(fd, views, offset)

    monkeypatch.setattr(os, "preadv", slow)
    made = Reader(threads=2, chunk=PAGE)
    planned = layout([entry(file, 0, 10 * PAGE)])
    buffer = page_buffer(planned.nbytes)
    future = made.read(planned.extents, buffer)
    made.close()
    assert future.done()
    assert buffer[:] == content[: 10 * PAGE]


def test_closing_from_a_callback_is_refused_instead_of_waiting_for_itself(
    file: str, small_chunks: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    callback_is_set, preadv = threading.Event(), os.preadv

    def wait(fd: int, views: Any, offset: int) -> int:
        assert callback_is_set.wait(30)
        return preadv(fd, views, offset)

    raised: SimpleQueue[BaseException | None] = SimpleQueue()

    def close(_: Any) -> None:
        try:
            small_chunks.close()
        except RuntimeError as error:
            raised.put(error)
        else:
            raised.put(None)

    monkeypatch.setattr(os, "preadv", wait)
    small_chunks.read([Extent(file, 0, 10, 0)], page_buffer(PAGE)).add_done_callback(close)
    callback_is_set.set()
    assert "callback" in str(raised.get(timeout=30))


@needs_proc
def test_a_reader_that_is_dropped_ends_its_threads_and_closes_its_files(file: str) -> None:
    made = Reader(threads=3)
    read_one(made, file, 0, 10)
    threads = made._pool.threads
    assert len(threads) == 3
    del made
    gc.collect()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert open_descriptors(file) == 0


def test_threads_are_daemons_and_begin_with_the_first_read(file: str) -> None:
    made = Reader(threads=2)
    assert made._pool.threads == []
    read_one(made, file, 0, 10)
    assert [thread.daemon for thread in made._pool.threads] == [True, True]


@pytest.mark.parametrize("nbytes", [100, SIZE + 1], ids=["delivered", "failed"])
def test_a_buffer_is_let_go_once_its_future_is_done(file: str, small_chunks: Reader, nbytes: int) -> None:
    gc.disable()
    try:
        planned = layout([entry(file, 0, nbytes)])
        buffer = page_buffer(planned.nbytes)
        gone = weakref.ref(buffer)
        future = small_chunks.read(planned.extents, buffer)
        future.exception(30)
        read_one(small_chunks, file, 0, 10)  # a thread of the pool is past the moment of reporting
        small_chunks.close()
        del buffer
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))])
def test_a_copy_is_a_new_reader_of_the_same_files(file: str, content: bytes, how: Callable[[Reader], Reader]) -> None:
    made = Reader(threads=2, chunk=PAGE, stamps={file: stamp(file)})
    read_one(made, file, 0, 10)
    copied = how(made)
    assert copied._pool.threads == []
    made.close()
    assert read_one(copied, file, 0, 5000) == content[:5000]
    os.utime(file, ns=(1, 1))
    assert isinstance(fails_with(copied, file), CheckpointChangedError)


def in_child(check: Callable[[], None]) -> int:
    """The exit status of a forked child that runs `check`; a child that hangs is ended."""
    pid = os.fork()
    if pid == 0:
        try:
            check()
        except BaseException:  # noqa: BLE001 - pytest must not go on in the child
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    return -9


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


@needs_fork
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_forked_child_reads_with_threads_of_its_own(file: str, content: bytes, small_chunks: Reader) -> None:
    read_one(small_chunks, file, 0, 10)

    def check() -> None:
        assert read_one(small_chunks, file, 100, 30_000) == content[100:30_100]

    assert in_child(check) == 0
    assert read_one(small_chunks, file, 0, 10) == content[:10]


@needs_fork
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_read_under_way_at_a_fork_ends_in_both_processes_each_in_its_own_buffer(
    file: str, content: bytes, small_chunks: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent, child_is_done, preadv = os.getpid(), threading.Event(), os.preadv

    def parent_waits(fd: int, views: Any, offset: int) -> int:
        assert os.getpid() != parent or child_is_done.wait(60)
        return preadv(fd, views, offset)

    monkeypatch.setattr(os, "preadv", parent_waits)
    planned = layout([entry(file, 0, 20_000)])
    buffer = page_buffer(planned.nbytes)
    future = small_chunks.read(planned.extents, buffer)

    def check() -> None:
        assert future.result(20) == 20_000
        assert buffer[:20_000] == content[:20_000]

    assert in_child(check) == 0
    assert buffer[:] == bytes(len(buffer)), "the child wrote into its parent's buffer"
    child_is_done.set()
    assert future.result(20) == 20_000
    assert buffer[:20_000] == content[:20_000]


@needs_fork
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_tasks_under_way_at_a_fork_are_repeated_in_the_child(small_chunks: Reader) -> None:
    parent, child_is_done = os.getpid(), threading.Event()

    def task() -> int:
        assert os.getpid() != parent or child_is_done.wait(60)
        return 7

    future = small_chunks.submit([task, task])

    def check() -> None:
        assert future.result(20) == 14

    assert in_child(check) == 0
    child_is_done.set()
    assert future.result(20) == 14


# --------------------------------------------------------------------------------------------------- mapped tensors


@pytest.fixture
def saved(tmp_path: Path) -> str:
    torch.manual_seed(0)
    tensors = {
        "large": torch.randn(300, 100),
        "brain": torch.randn(5000).bfloat16(),
        "odd": torch.arange(7, dtype=torch.int8),
        "mask": torch.tensor([True, False]),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
    }
    path = str(tmp_path / "model.safetensors")
    save_file(tensors, path)
    return path


def test_mapped_tensors_equal_a_plain_load_down_to_the_residue_of_their_address(saved: str) -> None:
    index = build_index([saved])
    files, plain = MappedFiles(index.stamps), load_file(saved)
    for name, expected in plain.items():
        tensor = files.tensor(index[name])
        assert tensor.dtype == expected.dtype
        assert tensor.equal(expected)
        if tensor.numel():
            assert tensor.data_ptr() % 64 == expected.data_ptr() % 64


def test_every_mapped_tensor_has_a_storage_of_its_own(saved: str) -> None:
    index = build_index([saved])
    files = MappedFiles(index.stamps)
    tensors = [files.tensor(index[name]) for name in index if index[name].nbytes]
    assert all(tensor.untyped_storage().data_ptr() == tensor.data_ptr() for tensor in tensors)
    assert [tensor.untyped_storage().nbytes() for tensor in tensors] == [tensor.nbytes for tensor in tensors]


def test_mapped_views_of_a_bin_keep_their_strides(tmp_path: Path) -> None:
    base = torch.arange(48.0).reshape(6, 8)
    views = {"t": base.t(), "window": base[1:4, 2:5], "rows": base[::2], "none": base[3:3]}
    torch.save(views, tmp_path / "model.bin")
    index = build_index([str(tmp_path / "model.bin")])
    files = MappedFiles(index.stamps)
    for name, view in views.items():
        assert files.tensor(index[name]).equal(view)


def test_a_tensor_at_an_odd_offset_is_mapped(tmp_path: Path) -> None:
    expected = torch.randn(1000)
    path = tmp_path / "file"
    path.write_bytes(b"abc" + expected.numpy().tobytes())
    tensor = MappedFiles().tensor(TensorEntry("t", str(path), 3, 4000, "float32", (1000,)))
    assert tensor.equal(expected)
    assert (tensor @ tensor).isclose(expected @ expected)


def test_a_write_reaches_neither_the_file_nor_another_load(saved: str) -> None:
    index, before = build_index([saved]), Path(saved).read_bytes()
    written, other = (MappedFiles(index.stamps).tensor(index["large"]) for _ in range(2))
    written.fill_(7)
    assert Path(saved).read_bytes() == before
    assert other.equal(load_file(saved)["large"])


def test_a_write_to_a_tied_tensor_reaches_the_other_name(saved: str) -> None:
    index = build_index([saved])
    files = MappedFiles(index.stamps)
    head, embed = files.tensor(index["large"]), files.tensor(index["large"])
    head[0, 0] = 42
    assert embed[0, 0] == 42


def test_a_mapping_lives_as_long_as_a_tensor_or_a_view_of_it(saved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    index, made, map_file = build_index([saved]), [], mmap.mmap

    def remember(*arguments: Any, **options: Any) -> mmap.mmap:
        mapped = map_file(*arguments, **options)
        made.append(weakref.ref(mapped))
        return mapped

    monkeypatch.setattr(mapping.mmap, "mmap", remember)
    view = MappedFiles(index.stamps).tensor(index["large"])[5:6]
    gc.collect()
    assert made[0]() is not None
    assert view.equal(load_file(saved)["large"][5:6])
    del view
    gc.collect()
    assert made[0]() is None


@needs_proc
def test_no_descriptor_stays_open_for_a_mapping(saved: str) -> None:
    index = build_index([saved])
    files = MappedFiles(index.stamps)
    files.tensor(index["large"])
    assert open_descriptors(saved) <= 1  # Python's mmap keeps a duplicate of its own


@pytest.mark.skipif(mapping._NORESERVE is None, reason="this system has no MAP_NORESERVE")
def test_a_file_larger_than_memory_is_mapped(tmp_path: Path) -> None:
    path, size = tmp_path / "large", 2**40
    path.touch()
    os.truncate(path, size)
    tensor = MappedFiles().tensor(TensorEntry("t", str(path), size - 8, 8, "uint8", (8,)))
    tensor[0] = 1
    assert tensor.tolist() == [1, 0, 0, 0, 0, 0, 0, 0]


def test_mapping_works_without_noreserve(saved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapping, "_NORESERVE", None)
    index, before = build_index([saved]), Path(saved).read_bytes()
    tensor = MappedFiles(index.stamps).tensor(index["large"])
    tensor.zero_()
    assert Path(saved).read_bytes() == before


def test_a_changed_or_removed_file_is_not_mapped(saved: str) -> None:
    index = build_index([saved])
    os.utime(saved, ns=(1, 1))
    with pytest.raises(CheckpointChangedError, match="its time of change"):
        MappedFiles(index.stamps).tensor(index["large"])
    os.unlink(saved)
    with pytest.raises(CheckpointChangedError, match="was removed"):
        MappedFiles(index.stamps).tensor(index["large"])
    with pytest.raises(MissingShardError, match=r"model\.safetensors is not in"):
        MappedFiles().tensor(index["large"])


def test_a_tensor_behind_the_end_of_its_file_is_named(file: str) -> None:
    with pytest.raises(CheckpointError, match=f"has {SIZE} bytes; tensor 't' needs those up to {SIZE + 1}"):
        MappedFiles().tensor(entry(file, SIZE - 4, 5))


def test_an_empty_file_cannot_be_mapped(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    with pytest.raises(CheckpointError, match="cannot be mapped"):
        MappedFiles().tensor(entry(str(tmp_path / "x"), 0, 1))


needs_pagemap = pytest.mark.skipif(not os.access("/proc/self/pagemap", os.R_OK), reason="no /proc/self/pagemap")


@needs_pagemap
def test_pages_are_dirty_once_written_and_not_when_only_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 16 * 64)  # 64 pages
    files = MappedFiles()
    first, last = entry(str(path), 100, 20 * PAGE), entry(str(path), 30 * PAGE, 20 * PAGE)
    touched, untouched = files.tensor(first), files.tensor(last)
    assert dirty_pages(touched) is False
    touched.sum()
    assert dirty_pages(touched) is False
    touched[15 * PAGE] = 1
    assert dirty_pages(touched) is True
    assert dirty_pages(untouched) is False


@needs_pagemap
@pytest.mark.parametrize("position", [0, -1])
def test_the_first_and_the_last_byte_of_a_tensor_count(tmp_path: Path, position: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(10 * PAGE))
    tensor = MappedFiles().tensor(entry(str(path), PAGE - 1, 3 * PAGE + 2))
    tensor[position] = 1
    assert dirty_pages(tensor) is True


@needs_pagemap
def test_a_tensor_without_elements_has_no_dirty_pages() -> None:
    assert dirty_pages(torch.empty(0)) is False


@pytest.mark.parametrize("content", [None, b"", bytes(8)])
def test_where_the_system_does_not_tell_dirty_pages_are_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    pagemap = tmp_path / "pagemap"
    if content is not None:
        pagemap.write_bytes(content)
    monkeypatch.setattr(mapping, "_PAGEMAP", str(pagemap))
    assert dirty_pages(torch.ones(5000)) is None
