"""What the machine has, and what the user allows of it."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest
import torch

from hf_bigload import hardware
from hf_bigload.errors import DeviceMapError


@pytest.fixture
def no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "_has_accelerator", lambda: False)
    monkeypatch.setattr(hardware, "accelerator_names", list)


@pytest.fixture
def two_accelerators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "accelerator_names", lambda: ["cuda:0", "cuda:1"])
    monkeypatch.setattr(hardware, "accelerator_type", lambda default: "cuda")


@pytest.mark.usefixtures("two_accelerators")
class TestMaxMemory:
    def test_what_it_allows_is_followed_to_the_byte(self) -> None:
        probed = hardware.probe({0: "10GiB", 1: 123, "cpu": "10GB"})
        assert probed.devices == {"cuda:0": 10 * 2**30, "cuda:1": 123} and probed.ram == 10**10

    def test_a_device_it_does_not_name_is_not_used(self) -> None:
        probed = hardware.probe({1: 5})
        assert probed.devices == {"cuda:1": 5} and probed.ram == 0

    def test_disk_needs_no_limit(self) -> None:
        assert hardware.probe({"cpu": 5, "disk": "1TB"}).ram == 5

    @pytest.mark.parametrize("key", [2, "cuda:7", "tpu9"])
    def test_a_device_that_is_not_there_is_named_with_those_that_are(self, key: object) -> None:
        with pytest.raises(DeviceMapError, match=r"cuda:0, cuda:1, cpu, disk"):
            hardware.probe({key: 5})

    @pytest.mark.parametrize("size", ["much", -1, None])
    def test_a_size_that_is_none_is_named(self, size: object) -> None:
        with pytest.raises(DeviceMapError, match="max_memory"):
            hardware.probe({"cpu": size})


@pytest.mark.usefixtures("no_accelerator")
def test_without_max_memory_some_of_what_is_free_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "free_ram", lambda: 1000)
    assert hardware.probe().ram == 900 and hardware.probe().devices == {}


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


class TestContainers:
    def test_a_version_1_limit_counts_clean_file_pages_as_free(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write(
            tmp_path / "memory/job",
            memory__limit_in_bytes="4000",
            memory__usage_in_bytes="3000",
            memory__stat="total_inactive_file 1500\ntotal_active_file 500\n",
        )
        monkeypatch.setattr(hardware, "_CGROUP", tmp_path)
        monkeypatch.setattr(hardware, "_cgroups", lambda: [(1, "/job")])
        assert (4000, 1000) in hardware.container_limits()
        assert hardware.free_ram() == 3000

    def test_a_version_2_limit_above_this_group_counts_too(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stat = "inactive_file 0\nactive_file 0\n"
        write(tmp_path / "a", memory__max="5000", memory__current="1000", memory__stat=stat)
        write(tmp_path / "a/b", memory__max="max", memory__current="900", memory__stat=stat)
        monkeypatch.setattr(hardware, "_CGROUP", tmp_path)
        monkeypatch.setattr(hardware, "_cgroups", lambda: [(2, "/a/b")])
        assert hardware.free_ram() == 4000

    def test_the_least_of_all_nested_limits_counts_and_what_throttles_is_one(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stat = "inactive_file 0\nactive_file 0\n"
        write(tmp_path / "a", memory__max="max", memory__high="3000", memory__current="1000", memory__stat=stat)
        write(tmp_path / "a/b", memory__max="8000", memory__high="max", memory__current="900", memory__stat=stat)
        monkeypatch.setattr(hardware, "_CGROUP", tmp_path)
        monkeypatch.setattr(hardware, "_cgroups", lambda: [(2, "/a/b")])
        assert hardware.free_ram() == 2000

    @pytest.mark.parametrize("version", [1, 2])
    def test_what_others_in_the_container_hold_counts_and_dirty_pages_do_too(
        self, version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        limits = ("memory__limit_in_bytes", "memory__usage_in_bytes")
        limits = ("memory__max", "memory__current") if version == 2 else limits
        prefix, dirty = ("", "file_") if version == 2 else ("total_", "total_")
        stat = f"{prefix}inactive_file 400\n{prefix}active_file 300\n{dirty}dirty 100\n{dirty}writeback 50\n"
        folder = tmp_path / ("job" if version == 2 else "memory/job")
        write(folder, **{limits[0]: "4000", limits[1]: "3000", "memory__stat": stat})
        monkeypatch.setattr(hardware, "_CGROUP", tmp_path)
        monkeypatch.setattr(hardware, "_cgroups", lambda: [(version, "/job")])
        assert hardware.free_ram() == 4000 - (3000 - (400 + 300 - 100 - 50))

    def test_a_path_that_only_the_host_has_is_read_as_the_container_s_own_root(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write(tmp_path / "memory", memory__limit_in_bytes="500", memory__usage_in_bytes="100", memory__stat="")
        monkeypatch.setattr(hardware, "_CGROUP", tmp_path)
        monkeypatch.setattr(hardware, "_cgroups", lambda: [(1, "/docker/0123")])
        assert hardware.free_ram() == 400

    def test_no_container_is_no_limit(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(hardware, "_CGROUP", tmp_path)
        monkeypatch.setattr(hardware, "_cgroups", list)
        assert hardware.free_ram() > 0


@pytest.mark.usefixtures("two_accelerators")
def test_what_an_allocator_keeps_unused_is_free_and_what_others_hold_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda _device: (100, 1000))  # others hold the rest
    monkeypatch.setattr(torch.accelerator, "memory_reserved", lambda _device: 500)
    monkeypatch.setattr(torch.accelerator, "memory_allocated", lambda _device: 200)
    assert hardware.free_by_accelerator() == {"cuda:0": 400, "cuda:1": 400}
    assert hardware.probe().devices == {"cuda:0": 360, "cuda:1": 360}


@pytest.mark.usefixtures("no_accelerator")
def test_what_a_model_holds_already_is_its_own_to_use_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "free_ram", lambda: 1000)
    assert hardware.probe(held={"cpu": 500}).ram == 1350
    assert hardware.probe({"cpu": 70}, held={"cpu": 500}).ram == 70


class TestProcessMemory:
    def test_tells_anonymous_memory_from_clean_pages_of_files(self, tmp_path: Path) -> None:
        size = 8 << 20
        (tmp_path / "file").touch()
        os.truncate(tmp_path / "file", size)
        before = hardware.process_memory()
        if before is None:
            pytest.skip("this system has no /proc/self/smaps_rollup")
        with (tmp_path / "file").open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for at in range(0, size, mmap.PAGESIZE):
            memory[at] = 1 + mapped[at]
        after = hardware.process_memory()
        assert after is not None
        assert 0.9 * size <= after.anonymous - before.anonymous < 1.5 * size
        assert 0.9 * size <= after.clean_file_pages - before.clean_file_pages < 1.5 * size

    def test_is_unknown_where_the_system_does_not_tell(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(hardware, "_SMAPS", tmp_path / "none")
        assert hardware.process_memory() is None


class TestNames:
    @pytest.mark.usefixtures("two_accelerators")
    @pytest.mark.parametrize(("given", "name"), [(1, "cuda:1"), ("cuda:1", "cuda:1"), ("cpu", "cpu"), ("disk", "disk")])
    def test_each_device_has_one_name(self, given: object, name: str) -> None:
        assert hardware.device_name(given) == name

    @pytest.mark.usefixtures("two_accelerators")
    def test_maps_show_accelerators_by_number(self) -> None:
        assert [hardware.map_value(n) for n in ("cuda:1", "cpu", "disk")] == [1, "cpu", "disk"]

    @pytest.mark.usefixtures("no_accelerator")
    def test_what_is_no_device_is_refused(self) -> None:
        with pytest.raises(DeviceMapError, match="no accelerator: only 'cpu' and 'disk'"):
            hardware.device_name("gpu zero")
