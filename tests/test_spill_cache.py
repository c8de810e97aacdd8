"""What one load converted the next one finds, bit by bit; what is damaged, changed or half written nobody believes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import hf_bigload
from hf_bigload import materialize
from hf_bigload.checkpoint import spill, spill_cache
from hf_bigload.checkpoint.index import stamp
from hf_bigload.checkpoint.mapping import MappedFiles
from hf_bigload.checkpoint.spill_cache import Slot, SpillCache, casts_folder, entries, remove
from hf_bigload.errors import DtypeError, SpillError
from hf_bigload.settings import from_environment
from hf_bigload.specs import DTYPE_BYTES, TensorEntry

MADE_BY = "torch 2"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the entries are."""
    monkeypatch.setenv("HF_BIGLOAD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "casts"


@pytest.fixture
def shard(tmp_path: Path) -> str:
    return new_shard(tmp_path / "model.safetensors")


def new_shard(path: Path) -> str:
    path.write_bytes(os.urandom(100))
    return str(path)


def load(*shards: str, made_by: str = MADE_BY) -> SpillCache:
    """The cache as one more load of these files has it."""
    return SpillCache({path: stamp(path) for path in shards}, made_by)


def slot(cache: SpillCache, shard: str, name: str = "w", dtype: str = "bfloat16") -> Slot:
    found = cache.slot(dtype, shard, name)
    assert found is not None
    return found


def write(
    cache: SpillCache, shard: str, tensor: torch.Tensor, name: str = "w", dtype: str = "bfloat16"
) -> TensorEntry | None:
    return slot(cache, shard, name, dtype).write(tensor, tuple(tensor.shape), None)


def keep(shard: str, tensor: torch.Tensor, name: str = "w", dtype: str = "bfloat16") -> str:
    """Have an entry with one more tensor; its name."""
    cache = load(shard)
    assert write(cache, shard, tensor, name, dtype) is not None
    cache.seal()
    return Path(slot(cache, shard, name, dtype).find().file).parent.name


def find(shard: str, name: str = "w", dtype: str = "bfloat16") -> torch.Tensor | None:
    """What the next load finds; a copy."""
    place = load(shard).slot(dtype, shard, name)
    entry = place.find() if place else None
    return None if entry is None else MappedFiles().tensor(entry).clone()


def files(folder: Path, pattern: str = "*") -> dict[str, tuple[int, int]]:
    """Name -> what would tell that a file was written to."""
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob(pattern) if p.is_file()}


def only(folder: Path, pattern: str) -> Path:
    (path,) = folder.rglob(pattern)
    return path


# ------------------------------------------------------------------------------------------------------------- reuse


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
def test_the_next_load_finds_every_dtype_bit_by_bit(dtype: str, shard: str) -> None:
    raw = torch.randint(0, 2 if dtype == "bool" else 256, (6 * DTYPE_BYTES[dtype],), dtype=torch.uint8)
    tensor = raw.view(getattr(torch, dtype)).reshape(2, 3)
    keep(shard, tensor)
    found = find(shard)
    assert found is not None and found.dtype == tensor.dtype
    assert found.view(torch.uint8).equal(tensor.view(torch.uint8))


@pytest.mark.parametrize(
    "tensor", [torch.tensor(2.5), torch.empty(0, 4), torch.randn(5, 3).T, torch.randn(2, 3, 4).permute(2, 0, 1)]
)
def test_shape_and_strides_come_back(tensor: torch.Tensor, shard: str) -> None:
    cache, flat = load(shard), tensor.as_strided((tensor.numel(),), (1,))
    stride = None if tensor.is_contiguous() else tensor.stride()
    assert slot(cache, shard).write(flat, tuple(tensor.shape), stride) is not None
    cache.seal()
    place = slot(load(shard), shard).find()
    assert place is not None
    found = MappedFiles().tensor(place)
    assert found.equal(tensor) and found.stride() == tensor.stride()


def test_the_residue_of_the_address_is_kept(shard: str) -> None:
    base = torch.zeros(256, dtype=torch.uint8)
    for start in (1, 8, 63):
        keep(shard, base[start : start + 100], f"w{start}")
        place = slot(load(shard), shard, f"w{start}").find()
        assert place is not None and place.offset % 64 == base[start:].data_ptr() % 64


def test_a_tensor_is_found_by_the_load_that_wrote_it_at_once_and_by_others_once_it_is_sealed(shard: str) -> None:
    cache, tensor = load(shard), torch.randn(1000)
    entry = write(cache, shard, tensor)
    assert entry is not None and slot(cache, shard).find() == entry
    assert MappedFiles().tensor(entry).equal(tensor)
    assert find(shard) is None
    cache.seal()
    assert find(shard).equal(tensor)
    assert MappedFiles().tensor(entry).equal(tensor)


def test_a_load_that_finds_everything_writes_nothing(cache: Path, shard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(100)
    keep(shard, tensor)
    before = files(cache, "*.*")
    monkeypatch.setattr(os, "pwrite", lambda *_: pytest.fail("wrote what is there"))
    again = load(shard)
    assert write(again, shard, tensor) == slot(again, shard).find()
    again.seal()
    assert files(cache, "*.*") == before


def test_what_is_missing_is_added_and_what_is_there_is_left_alone(cache: Path, shard: str) -> None:
    tensors = {name: torch.randn(1000) for name in "abc"}
    keep(shard, tensors["a"], "a")
    before = files(cache, "*.*")
    for name in "bc":
        keep(shard, tensors[name], name)
    assert before.items() <= files(cache, "*.*").items()
    assert len(list(cache.rglob("*.weights"))) == 3 and len(entries()) == 1
    assert all(find(shard, name).equal(tensor) for name, tensor in tensors.items())


def test_a_load_goes_on_writing_after_it_has_sealed(shard: str) -> None:
    cache, tensors = load(shard), {name: torch.randn(10) for name in "ab"}
    for name, tensor in tensors.items():
        write(cache, shard, tensor, name)
        cache.seal()
    assert all(find(shard, name).equal(tensor) for name, tensor in tensors.items())


def test_threads_of_one_load(shard: str) -> None:
    cache, tensors = load(shard), {f"w{i}": torch.full((500,), float(i)) for i in range(40)}

    def work(first: int) -> None:
        for i in range(first, 40, 8):
            assert write(cache, shard, tensors[f"w{i}"], f"w{i}") is not None

    threads = [threading.Thread(target=work, args=(first,)) for first in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cache.seal()
    assert all(find(shard, name).equal(tensor) for name, tensor in tensors.items())


# --------------------------------------------------------------------------------------------------------- identity


def test_each_dtype_has_its_own_entry(shard: str) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        keep(shard, torch.ones(4, dtype=dtype), dtype=str(dtype).removeprefix("torch."))
    assert find(shard, dtype="float16").dtype == torch.float16
    assert find(shard, dtype="float64") is None
    assert {info.dtype for info in entries() if info.nbytes} == {"bfloat16", "float16"}


def test_another_version_converts_anew(shard: str) -> None:
    keep(shard, torch.ones(4))
    assert slot(load(shard, made_by="torch 3"), shard).find() is None


def _rewritten(shard: Path) -> None:
    shard.write_bytes(os.urandom(100))


def _replaced(shard: Path) -> None:
    status = shard.stat()
    shard.with_suffix(".new").write_bytes(os.urandom(100))
    shard.with_suffix(".new").replace(shard)
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))


def _longer(shard: Path) -> None:
    status = shard.stat()
    shard.write_bytes(os.urandom(101))
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("change", [_rewritten, _replaced, _longer])
def test_a_checkpoint_that_changed_under_its_name_is_another(change: Callable[[Path], None], shard: str) -> None:
    keep(shard, torch.ones(4))
    change(Path(shard))
    assert find(shard) is None
    assert [info.stale for info in entries()].count(True) >= 1


def test_one_shard_more_is_another_checkpoint(shard: str, tmp_path: Path) -> None:
    other = new_shard(tmp_path / "other.safetensors")
    keep(shard, torch.ones(4))
    assert slot(load(shard, other), shard).find() is None


def test_tensors_of_one_name_in_two_shards_are_two(shard: str, tmp_path: Path) -> None:
    other = new_shard(tmp_path / "another.safetensors")
    cache = load(shard, other)
    write(cache, shard, torch.zeros(4))
    write(cache, other, torch.ones(4))
    cache.seal()
    again = load(other, shard)  # the order of the files says nothing
    for path, value in ((shard, 0), (other, 1)):
        assert MappedFiles().tensor(slot(again, path).find()).eq(value).all()


def test_links_to_one_file_are_one_checkpoint(shard: str, tmp_path: Path) -> None:
    """As the Hub's cache has them: a folder for each revision, and the content elsewhere."""
    links = [tmp_path / revision / "model.safetensors" for revision in ("one", "two")]
    for link in links:
        link.parent.mkdir()
        link.symlink_to(shard)
    keep(str(links[0]), torch.ones(4))
    assert find(str(links[1])).eq(1).all()
    assert len(entries()) == 1


def test_a_file_that_is_not_of_the_checkpoint_has_no_slot(shard: str, tmp_path: Path) -> None:
    other = new_shard(tmp_path / "other.safetensors")
    assert load(shard).slot("bfloat16", other, "w") is None
    assert SpillCache({}, MADE_BY).slot("bfloat16", shard, "w") is None
    assert SpillCache({}, MADE_BY).whole("bfloat16") is None


def test_a_shard_that_changes_while_it_is_converted_is_not_kept(cache: Path, shard: str) -> None:
    before, tensor = load(shard), torch.randn(100)
    entry = write(before, shard, tensor)
    _rewritten(Path(shard))
    before.seal()
    assert MappedFiles().tensor(entry).equal(tensor)  # this load goes on with what it has
    assert find(shard) is None and not list(cache.rglob("*.json"))
    del before, entry
    assert not list(cache.rglob("*.weights"))


# ---------------------------------------------------------------------------------------- a checkpoint as a whole


def test_a_whole_file_is_found_as_such(shard: str) -> None:
    cache = load(shard)
    for name in "ab":
        write(cache, shard, torch.ones(4), name)
    cache.seal(whole=True)
    assert set(load(shard).whole("bfloat16")) == {"a", "b"}


def test_a_part_of_a_file_is_no_whole(shard: str) -> None:
    cache = load(shard)
    write(cache, shard, torch.ones(4), "a")
    cache.seal()
    assert load(shard).whole("bfloat16") is None


def test_a_whole_that_lost_a_segment_is_none(cache: Path, shard: str) -> None:
    keep(shard, torch.ones(4), "a")
    lost = only(cache, "*.json")
    rest = load(shard)
    write(rest, shard, torch.ones(4), "b")
    rest.seal(whole=True)
    assert len(load(shard).whole("bfloat16")) == 2
    del rest
    lost.write_text("damaged")
    assert load(shard).whole("bfloat16") is None


def test_a_whole_of_which_the_cache_refused_some_is_none(shard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_BIGLOAD_CACHE_SIZE", "100KB")
    cache = load(shard)
    assert write(cache, shard, torch.ones(4), "a") is not None
    assert write(cache, shard, torch.ones(50_000), "b") is None
    cache.seal(whole=True)
    assert load(shard).whole("bfloat16") is None


# ------------------------------------------------------------------------------------------- several at one time


def test_of_two_loads_at_once_one_writes_and_the_other_goes_its_own_way(cache: Path, shard: str) -> None:
    first, second = load(shard), load(shard)
    assert write(first, shard, torch.ones(4)) is not None
    assert write(second, shard, torch.ones(4)) is None
    first.seal()
    second.seal()
    assert len(list(cache.rglob("*.weights"))) == 1
    assert find(shard).eq(1).all()


def test_who_writes_after_another_has_sealed_finds_that(cache: Path, shard: str) -> None:
    late = load(shard)
    assert slot(late, shard).find() is None
    keep(shard, torch.ones(4))
    assert MappedFiles().tensor(write(late, shard, torch.ones(4))).eq(1).all()
    late.seal()
    assert len(list(cache.rglob("*.weights"))) == 1


def test_a_load_that_is_given_up_leaves_nothing_and_the_next_may_write(cache: Path, shard: str) -> None:
    given_up = load(shard)
    write(given_up, shard, torch.ones(4))
    del given_up
    assert not list(cache.rglob("*.weights"))
    keep(shard, torch.ones(4))
    assert find(shard) is not None


WRITER = """
import os, signal, sys
import torch
from tests.test_spill_cache import load, write
cache = load(sys.argv[1])
print(write(cache, sys.argv[1], torch.ones(1000)).file, flush=True)
"""


def process(code: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER + code, *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


KILL = "os.kill(os.getpid(), signal.SIGKILL)"
BEFORE_THE_MANIFEST_IS_NAMED = f"os.rename = lambda *_: {KILL}\ncache.seal()"


@pytest.mark.parametrize("when", [KILL, BEFORE_THE_MANIFEST_IS_NAMED], ids=["writing", "sealing"])
def test_what_a_killed_writer_left_is_neither_believed_nor_kept(when: str, cache: Path, shard: str) -> None:
    killed = process(when, shard)
    left = Path(killed.communicate(timeout=120)[0].strip())
    assert killed.returncode == -signal.SIGKILL
    assert left.exists()
    assert find(shard) is None
    assert sorted(path.name for path in cache.rglob("*.*")) == []
    keep(shard, torch.ones(4))
    assert find(shard) is not None


def test_what_a_killed_writer_left_of_another_checkpoint_goes_too(cache: Path, shard: str, tmp_path: Path) -> None:
    killed = process(KILL, new_shard(tmp_path / "other.safetensors"))
    left = Path(killed.communicate(timeout=120)[0].strip())
    keep(shard, torch.ones(4))
    assert not left.parent.exists()
    assert len(entries()) == 1


def test_a_writer_in_another_process_is_not_waited_for_and_not_disturbed(cache: Path, shard: str) -> None:
    writing = process("sys.stdin.read(1); cache.seal()", shard)
    assert writing.stdout is not None and writing.stdin is not None
    file = Path(writing.stdout.readline().strip())
    mine = load(shard)
    assert write(mine, shard, torch.ones(1000)) is None
    assert not remove(file.parent.name)
    assert spill_cache.make_room(1) and file.exists()
    writing.communicate("\n", timeout=120)
    assert find(shard).eq(1).all()


def test_a_forked_child_neither_writes_nor_removes(cache: Path, shard: str) -> None:
    mine = load(shard)
    write(mine, shard, torch.ones(4), "a")
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = write(mine, shard, torch.ones(4), "b") is not None
            mine.seal()
            for entry in mine._entries.values():
                entry._segment.close()
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert not list(cache.rglob("*.json"))
    mine.seal()
    assert find(shard, "a").eq(1).all()


@pytest.mark.parametrize("kind", [fcntl.LOCK_EX, fcntl.LOCK_SH], ids=["before anything is held", "between two locks"])
def test_an_entry_that_is_removed_while_it_is_opened_is_made_again(
    kind: int, cache: Path, shard: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry, flock = cache / keep(shard, torch.ones(4)), spill_cache._flock

    def removed_first(fd: int, wanted: int) -> bool:
        if wanted == kind:
            monkeypatch.setattr(spill_cache, "_flock", flock)
            shutil.rmtree(entry)
        return flock(fd, wanted)

    monkeypatch.setattr(spill_cache, "_flock", removed_first)
    mine = load(shard)
    assert write(mine, shard, torch.ones(4)) is not None
    mine.seal()
    assert not remove(entry.name)
    assert find(shard).eq(1).all()


def test_entries_that_come_and_go_under_one_another(shard: str) -> None:
    """Removed whenever nobody uses it, an entry is there, whole, for each that does."""
    name, removed, wrong = keep(shard, torch.ones(1000)), [], []
    stop = threading.Event()

    def remove_it() -> None:
        while not stop.is_set():
            with contextlib.suppress(FileNotFoundError):
                removed.append(name) if remove(name) else None

    def use_it() -> None:
        for _ in range(2000):
            cache = load(shard)
            place = slot(cache, shard)
            entry = place.find() or place.write(torch.ones(1000), (1000,), None)
            if entry is not None and not MappedFiles().tensor(entry).eq(1).all():
                wrong.append(entry)
            cache.seal()
            del cache, place  # else the next is held before this one is let go of
            if len(removed) > 5:
                break

    with ThreadPoolExecutor() as pool:
        removing, using = pool.submit(remove_it), [pool.submit(use_it) for _ in range(2)]
        try:
            for each in using:
                each.result()
        finally:
            stop.set()
        removing.result()
    assert removed and not wrong


# ------------------------------------------------------------------------------------------------------------ damage


def _manifest_with(**changed: Any) -> Callable[[Path], None]:
    def damage(entry: Path) -> None:
        manifest = only(entry, "*.json")
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | changed))

    return damage


def _manifest_of(content: bytes) -> Callable[[Path], None]:
    return lambda entry: only(entry, "*.json").write_bytes(content) and None


def _weights(change: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda entry: change(only(entry, "*.weights"))


DAMAGE: dict[str, Callable[[Path], None]] = {
    "an empty manifest": _manifest_of(b""),
    "half a manifest": lambda entry: os.truncate(only(entry, "*.json"), only(entry, "*.json").stat().st_size // 2),
    "no text": _manifest_of(b"\xff\xfe\x00"),
    "no manifest": _manifest_of(b"[1, 2]"),
    "deeply nested": _manifest_of(b"[" * 100_000),
    "another format": _manifest_with(format=0),
    "another checkpoint": _manifest_with(sources=[["/model.safetensors", 100, 1, 1]]),
    "another dtype": _manifest_with(dtype="float16"),
    "no tensors": _manifest_with(tensors=None),
    "a row that is too short": _manifest_with(tensors=[[0, "w", 0, 16]]),
    "a tensor behind the end": _manifest_with(tensors=[[0, "w", 1 << 40, 16, "float32", [4], None]]),
    "a tensor before the beginning": _manifest_with(tensors=[[0, "w", -16, 16, "float32", [4], None]]),
    "a tensor of too few bytes": _manifest_with(tensors=[[0, "w", 0, 4, "float32", [4], None]]),
    "strides out of bounds": _manifest_with(tensors=[[0, "w", 0, 16, "float32", [4], [1000]]]),
    "an unknown dtype": _manifest_with(tensors=[[0, "w", 0, 16, "float12", [4], None]]),
    "a shape of words": _manifest_with(tensors=[[0, "w", 0, 16, "float32", ["four"], None]]),
    "truncated weights": _weights(lambda file: os.truncate(file, file.stat().st_size - 1)),
    "longer weights": _weights(lambda file: os.truncate(file, file.stat().st_size + 1)),
    "rewritten weights": _weights(lambda file: file.write_bytes(bytes(file.stat().st_size)) and None),
    "lost weights": _weights(os.unlink),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_what_is_damaged_is_not_used_and_is_replaced(
    damage: Callable[[Path], None], cache: Path, shard: str, caplog: pytest.LogCaptureFixture
) -> None:
    tensor = torch.randn(4)
    entry = cache / keep(shard, tensor)
    damage(entry)
    assert find(shard) is None
    assert caplog.records and str(entry) in caplog.text
    assert not list(entry.glob("*.*"))
    keep(shard, tensor)
    assert find(shard).equal(tensor)


def test_what_is_damaged_while_another_load_uses_the_entry_is_left_to_that(cache: Path, shard: str) -> None:
    tensor = torch.randn(4)
    entry = cache / keep(shard, tensor)
    using = load(shard)
    place = slot(using, shard).find()
    DAMAGE["half a manifest"](entry)
    keep(shard, tensor)
    assert MappedFiles().tensor(place).equal(tensor)
    assert find(shard).equal(tensor)


# -------------------------------------------------------------------------------------------------------------- room


def several(tmp_path: Path, count: int) -> list[str]:
    """Shards, each with an entry of about 40 KB, the first of them used longest ago."""
    shards = [new_shard(tmp_path / f"{i}.safetensors") for i in range(count)]
    for i, shard in enumerate(shards):
        name = keep(shard, torch.zeros(10_000))
        os.utime(Path(casts_folder()) / name / spill_cache.LOCK_NAME, (i, i))
    return shards


def kept(shards: list[str]) -> list[int]:
    """The numbers of those whose entry is there; counts as no use."""
    known = {info.checkpoint and Path(json.loads(m.read_text())["sources"][0][0]).name
             for info in entries() for m in (Path(casts_folder()) / info.name).glob("*.json")}  # fmt: skip
    return [i for i, shard in enumerate(shards) if Path(shard).name in known]


def test_the_entry_used_longest_ago_makes_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = several(tmp_path, 4)
    monkeypatch.setenv("HF_BIGLOAD_CACHE_SIZE", "180KB")
    assert find(shards[0]) is not None  # a use
    new = new_shard(tmp_path / "new.safetensors")
    keep(new, torch.zeros(10_000))
    assert kept([*shards, new]) == [0, 2, 3, 4]
    assert sum(info.nbytes for info in entries()) <= 180_000


def test_an_entry_in_use_is_never_what_makes_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = several(tmp_path, 3)
    using = [load(shard) for shard in shards]
    assert all(slot(cache, shard).find() for cache, shard in zip(using, shards, strict=True))
    monkeypatch.setenv("HF_BIGLOAD_CACHE_SIZE", "130KB")
    new = new_shard(tmp_path / "new.safetensors")
    assert write(load(new), new, torch.zeros(10_000)) is None
    assert kept(shards) == [0, 1, 2]
    del using[1]
    keep(new, torch.zeros(10_000))
    assert kept([*shards, new]) == [0, 2, 3]


def test_what_cannot_fit_removes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = several(tmp_path, 3)
    monkeypatch.setenv("HF_BIGLOAD_CACHE_SIZE", "150KB")
    assert write(load(shards[0]), shards[0], torch.zeros(100_000), "large") is None
    assert kept(shards) == [0, 1, 2]


def test_what_fitted_before_the_limit_was_met_is_kept(shard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_BIGLOAD_CACHE_SIZE", "100KB")
    cache = load(shard)
    took = [write(cache, shard, torch.zeros(8_000), f"w{i}") is not None for i in range(4)]
    cache.seal()
    assert took == [True, True, False, False]
    assert find(shard, "w1") is not None and find(shard, "w2") is None


def test_a_full_disk_makes_the_unused_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = several(tmp_path, 3)
    monkeypatch.setenv("HF_BIGLOAD_CACHE_SIZE", "1GB")
    free = [0, 100_000]  # what one entry frees is enough
    monkeypatch.setattr(spill_cache, "free_disk", lambda folder: free[0] if len(free) == 1 else free.pop(0))
    assert spill_cache.make_room(50_000) == 100_000
    assert kept(shards) == [1, 2]


def test_no_cache_at_all(cache: Path, shard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_BIGLOAD_CACHE_SIZE", "0")
    assert load(shard).slot("bfloat16", shard, "w") is None
    assert not cache.exists()


@pytest.mark.parametrize(("free", "limit"), [(10 * 1024**3, 5 * 1024**3), (1024**4, 100 * 1024**3)])
def test_by_default_at_most_half_of_a_disk_and_100_gib(free: int, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill_cache, "free_disk", lambda folder: free)
    assert spill_cache.size_limit() == limit


def test_a_limit_that_is_no_size_is_named() -> None:
    assert from_environment({"HF_BIGLOAD_CACHE_SIZE": "20GiB"}).cache_size == 20 * 1024**3
    with pytest.raises(ValueError, match="HF_BIGLOAD_CACHE_SIZE: 'lots' is not a size"):
        from_environment({"HF_BIGLOAD_CACHE_SIZE": "lots"})


# ---------------------------------------------------------------------------------------------- disks that refuse


def _fail(number: int) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_a_disk_that_fills_up_keeps_what_was_written(shard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = load(shard)
    write(cache, shard, torch.ones(4), "a")
    with monkeypatch.context() as patch:
        patch.setattr(spill.os, "pwrite", _fail(errno.ENOSPC))
        assert write(cache, shard, torch.ones(4), "b") is None
    assert write(cache, shard, torch.ones(4), "c") is None  # the rest of this load goes elsewhere
    cache.seal()
    assert find(shard, "a").eq(1).all()
    assert find(shard, "b") is None


def test_a_disk_that_loses_what_was_written_is_an_error(shard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = load(shard)
    write(cache, shard, torch.ones(4))
    with monkeypatch.context() as patch:
        patch.setattr(spill_cache.os, "fsync", _fail(errno.EIO))
        with pytest.raises(SpillError, match=r"Input/output error.*offload_folder="):
            cache.seal()
    assert find(shard) is None


def test_everything_is_on_the_disk_before_the_manifest_has_its_name(
    cache: Path, shard: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, fsync, rename = [], os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: done.append(Path(f"/proc/self/fd/{fd}").resolve()) or fsync(fd))
    monkeypatch.setattr(os, "rename", lambda old, new: done.append(f"rename to {Path(new).suffix}") or rename(old, new))
    entry = cache / keep(shard, torch.ones(4))
    weights, temporary, named, folder = done
    assert (weights.suffix, temporary.suffix, named, folder) == (".weights", ".tmp", "rename to .json", entry)


def test_a_manifest_that_cannot_be_written_costs_the_next_load_only(
    cache: Path, shard: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = load(shard)
    entry = write(mine, shard, torch.ones(4))
    with monkeypatch.context() as patch:
        patch.setattr(spill_cache.os, "rename", _fail(errno.ENOSPC))
        mine.seal()
    assert find(shard) is None
    assert MappedFiles().tensor(entry).eq(1).all()
    del mine
    keep(shard, torch.ones(4))
    assert len(list(cache.rglob("*.*"))) == 2  # a segment and its manifest


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_filesystem_without_locks_has_no_cache(number: int, shard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", _fail(number))
    assert load(shard).slot("bfloat16", shard, "w") is None


def test_a_file_where_the_cache_should_be(cache: Path, shard: str) -> None:
    cache.parent.mkdir()
    cache.write_text("somebody's")
    assert load(shard).slot("bfloat16", shard, "w") is None
    assert entries() == [] and cache.read_text() == "somebody's"


@pytest.fixture
def read_only(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Make every file system refuse to be written to, as a read-only mount does."""
    opened = os.open

    def open_(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, "Read-only file system")
        return opened(path, flags, *args, **kwargs)

    def start() -> None:
        monkeypatch.setattr(os, "open", open_)
        for name in ("mkdir", "unlink", "rename", "utime", "rmdir"):
            monkeypatch.setattr(os, name, _fail(errno.EROFS))

    return start


def test_a_read_only_cache_is_read(shard: str, read_only: Callable[[], None]) -> None:
    keep(shard, torch.ones(4))
    read_only()
    cache = load(shard)
    assert MappedFiles().tensor(slot(cache, shard).find()).eq(1).all()
    assert write(cache, shard, torch.ones(4), "another") is None
    cache.seal()
    assert len(entries()) == 1


def test_a_read_only_folder_without_a_cache(shard: str, read_only: Callable[[], None]) -> None:
    read_only()
    assert load(shard).slot("bfloat16", shard, "w") is None


def test_tensors_without_plain_bytes_are_refused_by_name(shard: str) -> None:
    with pytest.raises(DtypeError, match=r"'w' is of torch\.bits8"):
        write(load(shard), shard, torch.empty(4, dtype=torch.bits8))


# ----------------------------------------------------------------------------------------------------------- removal


def test_an_entry_in_use_is_not_removed(cache: Path, shard: str) -> None:
    name = keep(shard, torch.ones(4))
    using = load(shard)
    assert slot(using, shard).find() is not None
    assert [info.in_use for info in entries()] == [True]
    assert not remove(name)
    assert find(shard) is not None
    del using
    assert [info.in_use for info in entries()] == [False]
    assert remove(name)
    assert not list(cache.iterdir())


def test_an_entry_is_in_use_until_the_last_load_that_uses_it_is_gone(shard: str) -> None:
    name = keep(shard, torch.ones(4))
    using = [load(shard) for _ in range(3)]
    assert all(slot(cache, shard).find() for cache in using)
    for _ in range(3):
        assert not remove(name)
        del using[0]
    assert remove(name)


@pytest.mark.parametrize("name", ["", "..", "0123456789abcdef", "../outside", "*"])
def test_what_is_no_entry_is_not_removed(name: str, tmp_path: Path, shard: str) -> None:
    keep(shard, torch.ones(4))
    (tmp_path / "cache" / "outside").mkdir()
    with pytest.raises(FileNotFoundError):
        remove(name)
    assert find(shard) is not None


def test_what_somebody_else_put_into_the_cache_stays(cache: Path, shard: str) -> None:
    name = keep(shard, torch.ones(4))
    (cache / name / "mine.dat").write_text("keep")
    (cache / "notes.txt").write_text("keep")
    assert remove(name)
    assert sorted(path.name for path in cache.rglob("*")) == sorted(["notes.txt", name, "mine.dat"])


def test_entries_tell_what_they_are(shard: str) -> None:
    name = keep(shard, torch.ones(4))
    (info,) = entries()
    assert (info.name, info.checkpoint, info.dtype, info.made_by) == (
        name,
        str(Path(shard).parent),
        "bfloat16",
        MADE_BY,
    )
    assert info.nbytes >= 16 and not info.stale and not info.in_use
    os.unlink(shard)
    assert entries()[0].stale


def test_the_cache_is_for_the_user_alone(cache: Path, shard: str) -> None:
    entry = cache / keep(shard, torch.ones(4))
    assert all(path.stat().st_mode & 0o077 == 0 for path in (entry, *entry.iterdir()))


def test_an_entry_of_nothing_but_rubbish_is_stale(cache: Path, shard: str) -> None:
    entry = cache / keep(shard, torch.ones(4))
    only(entry, "*.json").write_text("rubbish")
    assert [(info.checkpoint, info.stale) for info in entries()] == [("", True)]
    shutil.rmtree(entry)
    entry.mkdir()
    assert [info.stale for info in entries()] == [True]


# ------------------------------------------------------------------------------------------------------ whole loads

LAYERS = 4


def new_net() -> torch.nn.Module:
    return torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(LAYERS))).eval()


@pytest.fixture
def net(tmp_path: Path) -> Path:
    """A checkpoint in fp32 that takes no library to load."""
    torch.manual_seed(0)
    save_file(new_net().state_dict(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def net_on_disk(checkpoint: Path | str) -> torch.nn.Module:
    with hf_bigload.init_empty_weights():
        empty = new_net()
    return hf_bigload.load_checkpoint_and_dispatch(empty, checkpoint, device_map={"": "disk"}, dtype=torch.bfloat16)


def computed_plainly(checkpoint: Path) -> torch.Tensor:
    plain = new_net()
    plain.load_state_dict(load_file(checkpoint))
    return computed(plain.to(torch.bfloat16))


def computed(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.linspace(-1, 1, 128, dtype=torch.bfloat16).view(2, 64)).float()


def weights(cache: Path) -> list[Path]:
    return list(cache.rglob("*.weights"))


def test_the_guides_functions_use_it_too(net: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert computed(net_on_disk(net)).equal(computed_plainly(net))
    assert len(weights(cache)) == 1
    monkeypatch.setattr(materialize, "_cast", lambda name, *_: pytest.fail(f"cast {name}"))
    assert computed(net_on_disk(net)).equal(computed_plainly(net))


LOADING = """
import os, signal, sys
from hf_bigload.checkpoint import spill
from tests.test_spill_cache import computed, net_on_disk
pwrite, written = os.pwrite, []
def counted(*args):
    written.append(args)
    if len(written) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return pwrite(*args)
spill.os.pwrite = counted
print("ready", flush=True)
sys.stdin.read(1)
print(computed(net_on_disk(sys.argv[1])).tolist())
"""


def loading(checkpoint: Path, killed_at_write: int = 0) -> subprocess.Popen[str]:
    """A process that loads on disk, in bf16, once it is told to; a killed one never gets to its `killed_at_write`th."""
    command = [sys.executable, "-c", LOADING, str(checkpoint), str(killed_at_write)]
    process = subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def test_a_load_after_one_that_was_killed_in_the_middle(net: Path, cache: Path) -> None:
    killed = loading(net, killed_at_write=5)
    killed.communicate("\n", timeout=120)
    assert killed.returncode == -signal.SIGKILL
    (left,) = weights(cache)
    for _ in range(2):
        assert computed(net_on_disk(net)).equal(computed_plainly(net))
    assert len(weights(cache)) == 1 and weights(cache) != [left]


def test_two_processes_at_once_write_one_copy(net: Path, cache: Path) -> None:
    both = [loading(net) for _ in range(2)]
    for process in both:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    said = [json.loads(process.communicate(timeout=120)[0]) for process in both]
    assert said == [computed_plainly(net).tolist()] * 2
    assert len(weights(cache)) == 1
    spilled = cache.parent / "spill"
    assert not spilled.exists() or not list(spilled.iterdir())
