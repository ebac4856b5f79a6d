"""`distui doctor`: what is here, what is broken, what is measured."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from distui.core.errors import UserError
from distui.core.hardware.detect import GIB, Gpu, Hardware, NvmlReport, detect
from distui.core.hardware.measure import load_calibration
from distui.launcher.cli import run
from distui.launcher.doctor import checks as doctor_checks
from distui.launcher.doctor.checks import check_folders, check_gpus, check_limits, check_versions, examine
from distui.launcher.doctor.findings import Finding, version_numbers
from distui.launcher.probes import collectives


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    runtime = tempfile.mkdtemp(prefix="dt", dir="/tmp")
    monkeypatch.setenv("DISTUI_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("DISTUI_RUNTIME_DIR", runtime)
    yield
    shutil.rmtree(runtime, ignore_errors=True)


@pytest.fixture
def here() -> Hardware:
    return detect()


def gpu(**facts: object) -> Gpu:
    values: dict[str, object] = {"index": 0, "name": "NVIDIA A100-SXM4-40GB", "memory_total_bytes": 40 * GIB}
    return Gpu(**(values | facts))  # type: ignore[arg-type]


def words(findings: object) -> str:
    assert isinstance(findings, list)
    assert all(isinstance(finding, Finding) and finding.why and finding.fix for finding in findings)
    return "; ".join(f"{finding.level}: {finding.what}" for finding in findings)


def test_json_has_the_hardware_and_the_findings(capsys: pytest.CaptureFixture[str]) -> None:
    status = run(["doctor", "--json"])
    document = json.loads(capsys.readouterr().out)
    assert set(document) == {"hardware", "fits_together", "findings"}
    assert document["hardware"]["cpu"]["num_cores_usable"] >= 1
    assert document["hardware"]["software"]["python"]
    broken = any(finding["level"] == "error" for finding in document["findings"])
    assert status == (2 if broken else 0)


def test_the_report_shows_na_for_what_is_not_measured(capsys: pytest.CaptureFixture[str]) -> None:
    run(["doctor"])
    out = capsys.readouterr().out
    assert "not measured: --measure" in out
    assert "read n/a" in out
    assert "scheduler" in out


def test_a_gpu_without_a_driver_is_an_error(here: Hardware, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    device = tmp_path / "sys/bus/pci/devices/0000:00:01.0"
    device.mkdir(parents=True)
    (device / "vendor").write_text("0x10de\n")
    (device / "class").write_text("0x030200\n")
    found = list(check_gpus(here, NvmlReport(error="NVML does not start: Driver Not Loaded"), tmp_path))
    assert words(found) == "error: 1 NVIDIA GPU on the PCI bus, but none can be used"
    assert "Driver Not Loaded" in found[0].why
    (device / "class").write_text("0x020000\n")
    assert list(check_gpus(here, NvmlReport(), tmp_path)) == [], "a network card of the same maker is no GPU"


def test_a_torch_that_cannot_use_the_gpus_is_an_error(here: Hardware, tmp_path: Path) -> None:
    software = dict(here.software) | {"torch": "2.13.0+cpu"}
    found = list(check_gpus(replace(here, software=software), NvmlReport(gpus=(gpu(),)), tmp_path))
    assert "torch 2.13.0+cpu cannot use the 1 GPUs" in words(found)


def test_a_gpu_in_use_and_unequal_gpus_are_warned_of(here: Hardware, tmp_path: Path) -> None:
    software = dict(here.software) | {"torch": "2.13.0+cu130"}
    gpus = (gpu(memory_free_bytes=10 * GIB), gpu(index=1, name="Tesla T4", memory_free_bytes=40 * GIB))
    found = words(list(check_gpus(replace(here, software=software), NvmlReport(gpus=gpus), tmp_path)))
    assert "warning: GPU 0 is in use" in found and "GPU 1" not in found
    assert "the GPUs differ" in found


def test_old_and_missing_packages_are_errors(here: Hardware, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = ["torch>=2.10", "textual>=99.0", "no-such-package>=1.0", "pytest>=8; extra == 'dev'"]
    monkeypatch.setattr(doctor_checks.importlib.metadata, "requires", lambda name: needed)
    found = words(list(check_versions(here)))
    assert "textual" in found and "is too old" in found
    assert "no-such-package is not installed" in found
    assert "torch" not in found and "pytest" not in found


def test_versions_are_compared_as_numbers() -> None:
    assert version_numbers("2.13.0+cpu") == (2, 13, 0)
    assert version_numbers("2.9.1rc2") < version_numbers("2.10")


def test_a_full_disk_and_a_small_shm_are_warned_of(here: Hardware, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(doctor_checks.shutil, "disk_usage", lambda path: usage(64 << 20, 0, 64 << 20))
    assert "little room in the state folder" in words(list(check_folders()))
    assert "/dev/shm is small: 0.06 GiB" in words(list(check_limits(here, Path("/"))))


def test_no_shm_and_few_open_files_are_warned_of(
    here: Hardware, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_checks.resource, "getrlimit", lambda which: (256, 512))
    found = words(list(check_limits(here, tmp_path)))
    assert "there is no /dev/shm" in found and "only 256 open files" in found


def test_a_runtime_folder_that_others_may_enter_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o755)
    monkeypatch.setenv("DISTUI_RUNTIME_DIR", str(shared))
    assert "is not private" in words(list(check_folders()))


def test_errors_come_before_warnings(here: Hardware, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_checks, "check_folders", lambda: iter([Finding("warning", "w", "w", "w")]))
    monkeypatch.setattr(doctor_checks, "check_versions", lambda hardware: iter([Finding("error", "e", "e", "e")]))
    levels = [finding.level for finding in examine(here, NvmlReport())]
    assert levels == sorted(levels, key=lambda level: level != "error") and levels[0] == "error"


def test_the_disk_is_measured_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(["doctor", "--disk", str(tmp_path), "--json"])
    first = json.loads(capsys.readouterr().out)["hardware"]["disks"][0]
    assert first["path"] == str(tmp_path) and first["read_rate"] > 0 and first["write_rate"] > 0
    kept = [disk for disk in detect().disks if disk.read_rate == first["read_rate"]]
    assert len(kept) == 1 and kept[0].total_bytes == first["total_bytes"], "later plans must know the rate"


def test_a_missing_disk_folder_is_the_users_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--disk", "/no/such/folder"]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_collectives_are_measured_between_real_ranks(here: Hardware) -> None:
    rows = collectives.measure_collectives(2, sizes=[1 << 12, 1 << 16])
    assert {(row["op"], row["bytes"]) for row in rows} == {
        (op, size) for op in ("all_reduce", "all_gather", "reduce_scatter") for size in (1 << 12, 1 << 16)
    }
    assert all(row["seconds"] > 0 and row["bus_bandwidth"] > 0 and row["world_size"] == 2 for row in rows)
    assert here.cpu is not None
    if rows[0]["backend"] == "gloo":
        kept = collectives.keep_rank_bandwidth(rows, here.cpu)
        assert kept == load_calibration()["rank_bandwidth"]
        assert detect().rank_bandwidth == kept


def test_a_rank_that_fails_is_named_with_its_last_words() -> None:
    with pytest.raises(UserError) as caught:
        collectives.measure_collectives(2, sizes=[1 << 55])
    assert "ended with status 1" in caught.value.what
    assert caught.value.why


def test_one_rank_has_nobody_to_send_to() -> None:
    with pytest.raises(UserError, match="nobody"):
        collectives.measure_collectives(1)


def test_nproc_alone_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--nproc", "2"]) == 2
    assert "--collectives" in capsys.readouterr().err
