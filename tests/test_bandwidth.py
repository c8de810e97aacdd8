"""What the machine's bandwidths are measured by, kept under, and measured again for."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

import pytest
import torch

from hf_bigload import arithmetic, bandwidth, doctor, hardware
from hf_bigload.bandwidth import Bandwidths, Measurement, device_bandwidth, disk_bandwidth, known, measured
from hf_bigload.errors import SpillError
from hf_bigload.specs import CPU, Arithmetic, Speeds
from tests import simdev

MIB = 1 << 20
TABLE = Arithmetic({"float32": ((1.0, 1e-9), (4.0, 2e-9)), "": ((1.0, 3e-9),)})
FIGURES = Bandwidths(
    disk=1e9, direct=True, host_copy=5e9, to_device={"cuda:0": 2e10}, not_pinned=("cuda:1",), arithmetic={CPU: TABLE}
)


@pytest.fixture
def measurements(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders that were measured, by something that takes no time."""
    folders: list[str] = []

    def measure(folder: str) -> Bandwidths:
        os.makedirs(folder, exist_ok=True)
        folders.append(folder)
        return FIGURES

    monkeypatch.setattr(bandwidth, "measure", measure)
    return folders


# ---------------------------------------------------------------- measuring


def test_a_measurement_gives_rates_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "multiplying", lambda name: TABLE)  # takes seconds, and has a test of its own
    figures = bandwidth.measure(str(tmp_path / "cache"), disk_bytes=4 * MIB, memory_bytes=MIB)
    assert figures.disk > 0 and figures.host_copy > 0
    assert set(figures.to_device) == set(hardware.accelerator_names())
    assert list((tmp_path / "cache").iterdir()) == []


def test_arithmetic_is_measured_for_each_dtype_from_one_token_to_many() -> None:
    found = arithmetic.measure(torch.device(CPU), hidden=64, nbytes=MIB)
    curves = found.curves
    assert found.per_weight > 0 and found.per_value > 0
    assert {"float32", "bfloat16", "float16", ""} == set(curves)
    assert all(
        rows[0][0] == 1 and len(rows) > 3 and all(seconds > 0 for _, seconds in rows) for rows in curves.values()
    )


def test_seconds_are_read_off_the_table_and_in_proportion_where_it_ends() -> None:
    assert [TABLE.seconds("float32", 1e9, n) for n in (0.5, 1, 2, 4, 8)] == pytest.approx([0.5, 1, 4 / 3, 2, 4])
    assert TABLE.seconds("int8", 1e9, 2) == pytest.approx(6)


def test_predictions_divide_by_what_was_measured_here_else_by_round_figures(
    tmp_path: Path, measurements: list[str]
) -> None:
    folder = str(tmp_path)
    assert bandwidth.speeds("cuda:0", folder) == Speeds() and not Speeds().measured
    measured(folder)
    found = bandwidth.speeds("cuda:0", folder)
    assert (found.disk, found.bus, found.cpu, found.device) == (1e9, 2e10, TABLE, Speeds().device)
    assert bandwidth.speeds(CPU, folder).measured and not found.measured  # no table of that device is in these figures


def test_the_disk_is_read_whole_through_the_reader_that_streams(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []

    class Reader(bandwidth.Reader):
        def close(self) -> None:
            read.append(self.bytes_read)
            super().close()

    monkeypatch.setattr(bandwidth, "Reader", Reader)
    monkeypatch.setattr(bandwidth, "DISK_PIECE", 2 * MIB)
    disk_bandwidth(str(tmp_path), 5 * MIB)
    assert read == [5 * MIB]


def test_a_nearly_full_disk_is_measured_with_a_quarter_of_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    monkeypatch.setattr(hardware, "free_disk", lambda folder: 8 * MIB)
    monkeypatch.setattr(bandwidth, "_write", lambda fd, nbytes: [written.append(nbytes), os.truncate(fd, nbytes)])
    disk_bandwidth(str(tmp_path), 512 * MIB)
    assert written == [2 * MIB]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SpillError, match=f"{tmp_path}/file/cache could not be measured.*HF_BIGLOAD_CACHE"):
        disk_bandwidth(str(tmp_path / "file" / "cache"), MIB)


def test_a_device_is_measured_within_what_it_has_free() -> None:
    simdev.load()
    with simdev.devices([MIB], hide_others=True) as sim:
        rate, _pinned = device_bandwidth("sim:0", 64 * MIB)
        assert rate > 0
        assert sim.max_memory_allocated(0) <= MIB // 4


def test_arithmetic_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "DTYPES", ("float32", "bfloat16"))
    with simdev.devices([128 * MIB], hide_others=True) as sim:
        assert bandwidth.multiplying("sim:0").curves["float32"]
        assert MIB < sim.max_memory_allocated(0) <= 32 * MIB


def test_a_full_device_is_left_out_and_the_doctor_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_BIGLOAD_CACHE", str(tmp_path))
    monkeypatch.setattr(bandwidth, "measure", partial(bandwidth.measure, disk_bytes=MIB, memory_bytes=MIB))
    monkeypatch.setattr(arithmetic, "measure", lambda _device, *_sizes: TABLE)
    with simdev.devices([0, 128 * MIB], hide_others=True):
        found = doctor.examine()
    assert found.measurement is not None
    figures = found.measurement.bandwidths
    assert set(figures.to_device) == {"sim:1"} and set(figures.arithmetic) == {CPU, "sim:1"}
    assert [problem for problem in found.problems if problem.startswith("sim:0 could not be measured")]
    assert not [problem for problem in found.problems if problem.startswith("sim:1")]


# ---------------------------------------------------------------- keeping


def test_what_was_measured_is_known_from_then_on(tmp_path: Path, measurements: list[str]) -> None:
    assert known(str(tmp_path)) is None
    first = measured(str(tmp_path))
    assert first.bandwidths == FIGURES
    assert measured(str(tmp_path)) == known(str(tmp_path)) == first
    assert measurements == [str(tmp_path)]


def test_it_is_measured_again_when_asked(tmp_path: Path, measurements: list[str]) -> None:
    measured(str(tmp_path))
    measured(str(tmp_path), fresh=True)
    assert len(measurements) == 2


def test_the_cache_folder_is_the_default(
    tmp_path: Path, measurements: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_BIGLOAD_CACHE", str(tmp_path / "mine"))
    measured()
    assert measurements == [str(tmp_path / "mine")] and (tmp_path / "mine" / "machine.json").exists()


def test_another_machine_is_measured_for_itself_and_both_are_kept(
    tmp_path: Path, measurements: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured(str(tmp_path))
    monkeypatch.setattr(os, "cpu_count", lambda: 1234)
    assert known(str(tmp_path)) is None
    measured(str(tmp_path))
    monkeypatch.undo()
    assert known(str(tmp_path)) is not None
    assert len(json.loads((tmp_path / "machine.json").read_text())["machines"]) == 2


@pytest.mark.parametrize("content", ["", "[]", "{", '{"format": 0, "machines": {}}'])
def test_a_damaged_record_is_measured_again(content: str, tmp_path: Path, measurements: list[str]) -> None:
    (tmp_path / "machine.json").write_text(content)
    assert measured(str(tmp_path)).bandwidths == FIGURES
    assert measurements == [str(tmp_path)]


def test_a_record_with_other_fields_counts_as_none(tmp_path: Path, measurements: list[str]) -> None:
    measured(str(tmp_path))
    path = tmp_path / "machine.json"
    path.write_text(path.read_text().replace('"host_copy"', '"something_else"'))
    assert known(str(tmp_path)) is None


def test_a_measurement_that_cannot_be_kept_is_still_given(
    tmp_path: Path, measurements: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*paths: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    assert isinstance(measured(str(tmp_path)), Measurement)
    assert "could not be kept" in caplog.text
