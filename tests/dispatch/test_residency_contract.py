"""What every residency promises, wherever a weight rests: one suite, run for each tier and each way out of it.

A new tier joins by a line in `TIERS`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_bigload.checkpoint.index import stamp
from hf_bigload.checkpoint.mapping import MappedFiles
from hf_bigload.checkpoint.reader import Reader
from hf_bigload.dispatch.executor import Executor, Machine
from hf_bigload.dispatch.residency import DeviceResident, DiskResident, HostResident, Residency, resting
from hf_bigload.dispatch.ring import span_bytes
from hf_bigload.errors import CheckpointChangedError, CheckpointError
from hf_bigload.materialize import _in_storage_order
from hf_bigload.specs import TensorEntry
from tests import simdev

from . import assert_at_rest, leased, same_bits

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn)


@dataclass
class Tier:
    """Weights at rest in one tier, and an executor that knows them."""

    name: str
    folder: Path
    target: torch.device
    files: int = 0
    executor: Executor = field(default_factory=lambda: Executor(Machine(Reader(), {}), watching=True))

    def rest(self, *values: torch.Tensor) -> list[nn.Parameter]:
        """Parameters with these values."""
        if self.name == "disk":
            return self._on_disk(values)
        device = {"host": "cpu", "device": "sim:1"}[self.name]
        return [nn.Parameter(_moved(value, device), requires_grad=False) for value in values]

    def _on_disk(self, values: tuple[torch.Tensor, ...]) -> list[nn.Parameter]:
        path, content, entries = self.folder / f"{self.files}.bin", bytearray(b"head" * 13), []
        self.files += 1
        for i, value in enumerate(values):
            flat, stride = (value, None) if value.is_contiguous() else _in_storage_order(value)
            data = flat.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
            content += b"\0" * (-len(content) % value.element_size())
            dtype = str(value.dtype).removeprefix("torch.")
            entries.append(TensorEntry(str(i), str(path), len(content), len(data), dtype, tuple(value.shape), stride))
            content += data
        path.write_bytes(content)
        stamps = {str(path): stamp(str(path))}
        self.executor.machine.reader = Reader(stamps=stamps)
        mapped = MappedFiles(stamps)
        found = []
        for entry in entries:
            home = mapped.tensor(entry)
            parameter = nn.Parameter(home, requires_grad=False)
            self.executor.on_disk[parameter] = DiskResident(entry, home, parameter)
            found.append(parameter)
        return found

    def residency(self, parameter: nn.Parameter) -> Residency:
        return self.executor._residency(parameter, None)

    def fetched(self, parameter: torch.Tensor) -> torch.Tensor:
        """What a block sees as the weight, copied while it is inside."""
        with leased(self.executor, [parameter], self.target):
            assert parameter.device == self.target
            return parameter.detach().clone()


def _moved(value: torch.Tensor, device: str) -> torch.Tensor:
    count = span_bytes(value) // value.element_size()
    return value.as_strided((count,), (1,)).to(device, copy=True).as_strided(value.shape, value.stride())


TIERS = (("host", "sim:0"), ("device", "sim:0"), ("device", "cpu"), ("disk", "cpu"), ("disk", "sim:0"))
KINDS: dict[str, type[Residency]] = {"host": HostResident, "device": DeviceResident, "disk": DiskResident}


@pytest.fixture(params=TIERS, ids=[f"{name} to {target}" for name, target in TIERS])
def tier(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Tier]:
    name, target = request.param
    with simdev.devices([None, None]):
        yield Tier(name, tmp_path, torch.device(target))


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    """With them, a weight that comes to another device is handed out as a stand-in: see `test_autograd`."""
    with torch.no_grad():
        yield


@pytest.fixture
def disk(tmp_path: Path) -> Tier:
    return Tier("disk", tmp_path, torch.device("cpu"))


def some(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    nbytes = torch.empty(shape, dtype=dtype).numel() * dtype.itemsize
    raw = torch.randint(0, 2 if dtype == torch.bool else 120, (nbytes,), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


class TestComing:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_a_weight_comes_with_every_bit(self, tier: Tier, dtype: torch.dtype) -> None:
        value = some(5, 7, dtype=dtype)
        (weight,) = tier.rest(value)
        assert type(tier.residency(weight)) is KINDS[tier.name]
        assert same_bits(tier.fetched(weight), value)

    def test_many_of_different_dtypes_come_together(self, tier: Tier) -> None:
        values = [some(3, i + 1, dtype=dtype, seed=i) for i, dtype in enumerate(DTYPES)]
        weights = tier.rest(*values)
        with leased(tier.executor, [*weights], tier.target):
            assert all(same_bits(w, v) for w, v in zip(weights, values, strict=True))
        assert tier.executor.machine.stats.fetches == 1

    @pytest.mark.parametrize(
        "layout",
        [
            lambda t: t.t(),
            lambda t: t.reshape(2, 3, 4).permute(2, 0, 1),
            lambda t: t[:, 1:3],
            lambda t: t[::2],
            lambda t: t[:, :1].expand(6, 4),
        ],
        ids=["transposed", "permuted", "columns", "every second row", "expanded"],
    )
    def test_strides_are_kept(self, tier: Tier, layout: Callable[[torch.Tensor], torch.Tensor]) -> None:
        (weight,) = tier.rest(layout(some(6, 4)))
        value, stride = weight.detach().cpu().clone(), weight.stride()
        with leased(tier.executor, [weight], tier.target):
            assert weight.stride() == stride and same_bits(weight, value)

    @pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,)], ids=str)
    def test_scalars_and_empty_weights_come_beside_others(self, tier: Tier, shape: tuple[int, ...]) -> None:
        values = [some(4), some(*shape), some(4, seed=1)]
        weights = tier.rest(*values)
        with leased(tier.executor, [*weights], tier.target):
            assert all(w.device == tier.target and same_bits(w, v) for w, v in zip(weights, values, strict=True))
        assert all(same_bits(w, v) for w, v in zip(weights, values, strict=True))

    def test_a_tied_weight_comes_once(self, tier: Tier) -> None:
        (weight,) = tier.rest(some(64, 64))
        with leased(tier.executor, [weight, weight], tier.target) as scope:
            assert sum(len(fetch.items) for fetch in scope.fetches) == 1
        stats = tier.executor.machine.stats
        assert max(stats.bytes_read, stats.bytes_copied) == 64 * 64 * 4

    def test_addresses_are_what_kernels_expect(self, tier: Tier) -> None:
        weights = tier.rest(*(some(n, seed=n) for n in (3, 5, 17, 1)))
        homes = [weight.data_ptr() for weight in weights]
        with leased(tier.executor, [*weights], tier.target):
            if tier.name == "disk" and tier.target.type == "cpu":  # as in a plain load, which maps the file
                assert [w.data_ptr() % 64 for w in weights] == [home % 64 for home in homes]
            else:  # as from an allocator
                assert all((w.data_ptr() - weights[0].data_ptr()) % 512 == 0 for w in weights)

    def test_nothing_comes_as_an_inference_tensor(self, tier: Tier) -> None:
        value = some(4)
        (weight,) = tier.rest(value)
        with torch.inference_mode():
            assert same_bits(tier.fetched(weight), value)
        assert not weight.is_inference() and not weight.data.is_inference()
        assert same_bits(tier.fetched(weight), value)


class TestGoingHome:
    def test_the_weight_rests_again_where_it_was(self, tier: Tier) -> None:
        value = some(4)
        (weight,) = tier.rest(value)
        home, version = weight.data_ptr(), weight._version
        tier.fetched(weight)
        assert weight.data_ptr() == home and weight._version == version and same_bits(weight, value)
        assert_at_rest(tier.executor, weight)

    def test_what_is_written_in_place_meanwhile_is_kept(self, tier: Tier) -> None:
        (weight,) = tier.rest(some(4))
        with leased(tier.executor, [weight], tier.target), torch.no_grad():
            weight.fill_(7)
        assert (weight.cpu() == 7).all()
        assert (tier.fetched(weight).cpu() == 7).all()

    def test_new_data_that_is_set_meanwhile_is_kept(self, tier: Tier) -> None:
        (weight,) = tier.rest(some(4))
        with leased(tier.executor, [weight], tier.target):
            weight.data = torch.full((4,), 7.0, device=tier.target)
        assert (weight.cpu() == 7).all()
        assert (tier.fetched(weight).cpu() == 7).all()

    @pytest.mark.parametrize("view", [lambda t: t.t(), lambda t: t[1:]], ids=["transposed", "a part"])
    def test_another_view_of_what_came_is_kept_as_a_copy(
        self, tier: Tier, view: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        value = some(4, 4)
        (weight,) = tier.rest(value)
        with leased(tier.executor, [weight], tier.target):
            weight.data = view(weight.data)
        tier.fetched(tier.rest(some(4, 4, seed=1))[0])  # the slot has another weight's bytes now
        assert same_bits(weight, view(value))
        assert_at_rest(tier.executor, weight)


class TestAnUntouchedHomeIsTheTruth:
    """A home that was written to or replaced is what comes next time."""

    def test_written_in_place(self, tier: Tier) -> None:
        (weight,) = tier.rest(some(4))
        tier.fetched(weight)
        with torch.no_grad():
            weight.mul_(2)
        assert same_bits(tier.fetched(weight), 2 * some(4))

    def test_written_in_inference_mode(self, tier: Tier) -> None:
        (weight,) = tier.rest(some(4))
        with torch.inference_mode():
            weight.mul_(2)
        assert same_bits(tier.fetched(weight), 2 * some(4))

    def test_written_through_data(self, tier: Tier) -> None:
        (weight,) = tier.rest(some(4))
        tier.fetched(weight)
        weight.data.mul_(2)
        assert same_bits(tier.fetched(weight), 2 * some(4))

    def test_written_through_numpy(self, tier: Tier) -> None:
        if tier.name == "device":
            pytest.skip("numpy does not see a device's memory")
        (weight,) = tier.rest(some(4))
        weight.detach().numpy()[:] = 7
        assert (tier.fetched(weight).cpu() == 7).all()

    def test_replaced_data(self, tier: Tier) -> None:
        (weight,) = tier.rest(some(4))
        tier.fetched(weight)
        weight.data = some(5, seed=1).to(weight.device)
        assert same_bits(tier.fetched(weight), some(5, seed=1))

    def test_another_view_of_the_same_bytes(self, tier: Tier) -> None:
        (weight,) = tier.rest(some(4, 4))
        weight.data = weight.data.t()
        assert same_bits(tier.fetched(weight), some(4, 4).t())

    def test_moved_into_shared_memory(self, tier: Tier) -> None:
        (weight,) = tier.rest(some(4))
        if weight.device.type == "cpu":
            weight.share_memory_()
        assert same_bits(tier.fetched(weight), some(4))

    def test_a_parameter_that_took_the_place_of_another(self, tier: Tier) -> None:
        module = nn.Module()
        module.weight = tier.rest(some(4))[0]
        tier.fetched(module.weight)
        module.weight = tier.rest(some(5, seed=1))[0]
        (weight,) = tier.executor.tensors(module, True, tier.target)
        assert same_bits(tier.fetched(weight), some(5, seed=1))

    def test_a_neighbour_in_the_file_that_is_not_written_stays_right(self, tier: Tier) -> None:
        one, other = tier.rest(some(4), some(4, seed=1))
        one.data.fill_(7)
        assert same_bits(tier.fetched(other), some(4, seed=1))


class TestFilesThatChange:
    """A file that is no longer the one that was loaded is refused, or goes on being read as it was."""

    def assert_old_or_refused(self, disk: Tier, weight: nn.Parameter, value: torch.Tensor) -> None:
        try:
            assert same_bits(disk.fetched(weight), value)
        except CheckpointError as error:
            assert isinstance(error, CheckpointChangedError) and str(disk.folder) in str(error)
        assert_at_rest(disk.executor, weight)

    @pytest.mark.parametrize("used", [False, True], ids=["before it is read", "after it was read"])
    def test_another_file_under_the_path(self, disk: Tier, used: bool) -> None:
        (weight,) = disk.rest(some(64))
        path = next(disk.folder.iterdir())
        if used:
            disk.fetched(weight)
        (disk.folder / "new").write_bytes(bytes(path.stat().st_size))
        os.replace(disk.folder / "new", path)
        self.assert_old_or_refused(disk, weight, some(64))
        if used:
            assert same_bits(disk.fetched(weight), some(64))

    @pytest.mark.parametrize("used", [False, True], ids=["before it is read", "after it was read"])
    def test_a_file_that_was_written_to(self, disk: Tier, used: bool) -> None:
        (weight,) = disk.rest(some(64))
        path = next(disk.folder.iterdir())
        if used:
            disk.fetched(weight)
        path.write_bytes(bytes(path.stat().st_size))
        with pytest.raises(CheckpointChangedError):
            disk.fetched(weight)
        assert_at_rest(disk.executor, weight)

    @pytest.mark.parametrize("used", [False, True], ids=["before it is read", "after it was read"])
    def test_a_file_that_was_truncated(self, disk: Tier, used: bool) -> None:
        (weight,) = disk.rest(some(64))
        if used:
            disk.fetched(weight)
        os.truncate(next(disk.folder.iterdir()), 60)
        with pytest.raises(CheckpointChangedError, match="bin"):
            disk.fetched(weight)
        assert_at_rest(disk.executor, weight)

    def test_a_file_that_vanished(self, disk: Tier) -> None:
        (weight,) = disk.rest(some(64))
        disk.fetched(weight)
        next(disk.folder.iterdir()).unlink()
        assert same_bits(disk.fetched(weight), some(64))


def test_a_tensor_of_which_nothing_is_known_rests_in_memory() -> None:
    tensor = torch.ones(3)
    assert type(resting(tensor)) is HostResident
    assert resting(tensor).home.data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize(
    ("tensor", "nbytes"),
    [(torch.ones(3, 4), 48), (torch.ones(3, 4)[:, :2], 40), (torch.ones(()), 4), (torch.ones(0), 0)],
)
def test_the_span_of_a_tensor_ends_with_its_last_element(tensor: torch.Tensor, nbytes: int) -> None:
    assert span_bytes(tensor) == nbytes
