"""NVML behind its boundary: a fake library in the place of pynvml."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from distui.core.hardware.detect import GIB
from distui.core.hardware.host import detect_host
from distui.core.hardware.nvml import read_nvml
from distui.launcher.doctor import versions as doctor_versions
from distui.launcher.doctor.checks import check_gpus
from distui.launcher.doctor.versions import Fit, check_fits, fits


class NVMLError(Exception):
    pass


class FakeNvml:
    """Two A100 joined by NVLink; `broken` names functions that this driver does not support."""

    NVMLError = NVMLError

    def __init__(
        self,
        num_gpus: int = 2,
        broken: tuple[str, ...] = (),
        mig: bool = False,
        driver: str = "580.95.05",
        capability: tuple[int, int] = (8, 0),
    ) -> None:
        self.num_gpus, self.broken, self.mig, self.driver, self.capability = num_gpus, broken, mig, driver, capability
        self.shut_down = 0

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("nvml") and name in object.__getattribute__(self, "broken"):

            def fail(*args: Any) -> Any:
                raise NVMLError("Not Supported")

            return fail
        return object.__getattribute__(self, name)

    def nvmlInit(self) -> None:
        pass

    def nvmlShutdown(self) -> None:
        self.shut_down += 1

    def nvmlDeviceGetCount(self) -> int:
        return self.num_gpus

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return f"gpu{index}"

    def nvmlDeviceGetUUID(self, handle: str) -> str:
        return f"GPU-{handle[-1]}aaa"

    def nvmlDeviceGetName(self, handle: str) -> bytes:
        return b"NVIDIA A100-SXM4-40GB"

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:
        size = 10 * GIB if handle.startswith("mig") else 40 * GIB
        return SimpleNamespace(total=size, free=size - GIB)

    def nvmlDeviceGetCudaComputeCapability(self, handle: str) -> tuple[int, int]:
        return self.capability

    def nvmlDeviceGetMaxPcieLinkGeneration(self, handle: str) -> int:
        return 4

    def nvmlDeviceGetMaxPcieLinkWidth(self, handle: str) -> int:
        return 16

    def nvmlDeviceGetNvLinkState(self, handle: str, link: int) -> int:
        if link >= 12:
            raise NVMLError("Invalid Argument")
        return 1

    def nvmlDeviceGetMigMode(self, handle: str) -> list[int]:
        return [1, 1] if self.mig else [0, 0]

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: str) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: str, place: int) -> str:
        if place >= 2:
            raise NVMLError("Not Found")
        return f"mig{place}"

    def nvmlDeviceGetP2PStatus(self, first: str, second: str, index: int) -> int:
        return 0

    def nvmlDeviceGetTopologyCommonAncestor(self, first: str, second: str) -> int:
        return 30

    def nvmlSystemGetDriverVersion(self) -> str:
        return self.driver

    def nvmlSystemGetCudaDriverVersion(self) -> int:
        return 13020


def test_everything_that_nvml_tells() -> None:
    nvml = FakeNvml()
    report = read_nvml(nvml, {})
    assert (report.driver, report.driver_cuda, report.error) == ("580.95.05", "13.2", "")
    assert [gpu.index for gpu in report.gpus] == [0, 1]
    gpu = report.gpus[0]
    assert gpu.memory_free_bytes == 39 * GIB
    assert gpu.compute_capability == (8, 0)
    assert gpu.nvlink_bandwidth == 12 * 25e9
    assert gpu.pcie_bandwidth == pytest.approx(31.5e9, rel=0.01)
    assert gpu.peak_flops is not None and gpu.peak_flops["bf16"] == 312e12
    assert report.topology == (("self", "NVLink x12"), ("NVLink x12", "self"))
    assert nvml.shut_down == 1


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("1", [1]),
        ("1,0", [1, 0]),
        ("", []),
        ("0,9,1", [0]),
        ("GPU-1", [1]),
        ("-1", []),
        ("NoDevFiles", []),
        ("0,0", [0]),
    ],
)
def test_cuda_visible_devices_is_read_as_cuda_reads_it(setting: str, expected: list[int]) -> None:
    report = read_nvml(FakeNvml(), {"CUDA_VISIBLE_DEVICES": setting})
    assert [gpu.index for gpu in report.gpus] == expected


def test_what_a_driver_cannot_tell_is_none() -> None:
    unsupported = (
        "nvmlDeviceGetMaxPcieLinkGeneration",
        "nvmlDeviceGetNvLinkState",
        "nvmlDeviceGetCudaComputeCapability",
        "nvmlDeviceGetMigMode",
        "nvmlDeviceGetUUID",
        "nvmlDeviceGetP2PStatus",
        "nvmlDeviceGetTopologyCommonAncestor",
        "nvmlSystemGetCudaDriverVersion",
        "nvmlSystemGetDriverVersion",
    )
    report = read_nvml(FakeNvml(broken=unsupported), {})
    gpu = report.gpus[0]
    assert (gpu.pcie_bandwidth, gpu.nvlink_bandwidth, gpu.compute_capability) == (None, None, None)
    assert (report.driver, report.driver_cuda) == (None, None)
    assert report.topology[0][1] == "n/a"


def test_without_nvlink_the_way_is_pcie() -> None:
    report = read_nvml(FakeNvml(broken=("nvmlDeviceGetNvLinkState",)), {})
    assert report.topology[0][1] == "host bridge"


def test_a_mig_slice_has_its_own_memory_and_no_made_up_rates() -> None:
    report = read_nvml(FakeNvml(num_gpus=1, mig=True), {})
    assert [gpu.memory_total_bytes for gpu in report.gpus] == [10 * GIB, 10 * GIB]
    assert all(gpu.is_mig and gpu.peak_flops is None and gpu.memory_bandwidth is None for gpu in report.gpus)


def test_no_driver_is_told_and_not_raised() -> None:
    report = read_nvml(FakeNvml(broken=("nvmlInit",)), {})
    assert report.gpus == () and "NVML does not start" in report.error


def test_a_driver_that_breaks_midway_is_told_and_closed() -> None:
    nvml = FakeNvml(broken=("nvmlDeviceGetCount",))
    report = read_nvml(nvml, {})
    assert report.gpus == () and "Not Supported" in report.error
    assert nvml.shut_down == 1


def test_no_gpu_is_told() -> None:
    assert read_nvml(FakeNvml(num_gpus=0), {}).error == "NVML sees no GPU"


def together(nvml: FakeNvml, **software: str | None) -> tuple[str, list[Fit]]:
    """Return what doctor finds wrong, and all pairs, on a machine with this driver and these packages."""
    report = read_nvml(nvml, {})
    found = detect_host(report)
    versions = {"torch": "2.13.0+cu130", "cuda": "13.0", "nccl": "2.28.9", "nccl_cuda": "13"} | software
    hardware = replace(found, software={**found.software, **versions})
    findings = [*check_fits(hardware), *check_gpus(hardware, report, Path("/"))]
    assert all(finding.why and finding.fix for finding in findings)
    return "; ".join(f"{finding.level}: {finding.what}: {finding.why}" for finding in findings), fits(hardware)


@pytest.fixture
def own_torch(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What torch asks for, in a list that a test may fill."""
    wanted: list[str] = []
    monkeypatch.setattr(doctor_versions.importlib.metadata, "requires", lambda name: wanted)
    return wanted


def test_what_fits_together_is_said_with_its_rule(own_torch: list[str]) -> None:
    wrong, pairs = together(FakeNvml())
    assert wrong == ""
    assert [(fit.parts, fit.fits) for fit in pairs] == [
        ("driver 580.95.05 and CUDA 13.0", True),
        ("NVIDIA A100-SXM4-40GB and CUDA 13.0", True),
        ("NCCL 2.28.9 (for CUDA 13) and CUDA 13.0", True),
        ("torch 2.13.0+cu130 and its 0 packages", True),
    ]
    assert "580.65.06 or newer" in pairs[0].why


@pytest.mark.parametrize(
    ("nvml", "software", "expected"),
    [
        (FakeNvml(driver="570.86.15"), {}, "driver 570.86.15 and CUDA 13.0 do not go together"),
        (FakeNvml(driver="525.60.13"), {"cuda": "12.9", "nccl_cuda": "12"}, ""),
        (FakeNvml(driver="520.61.05"), {"cuda": "12.9", "nccl_cuda": "12"}, "525.60.13 or newer"),
        (FakeNvml(capability=(7, 0)), {}, "CUDA 13 has dropped what is older than 7.5"),
        (FakeNvml(capability=(7, 0)), {}, "warning: NVIDIA A100-SXM4-40GB does not compute in bf16"),
        (FakeNvml(capability=(10, 0)), {"cuda": "12.6", "nccl_cuda": "12"}, "capability 10.0 needs CUDA 12.8"),
        (FakeNvml(), {"nccl_cuda": "12"}, "NCCL 2.28.9 (for CUDA 12) and CUDA 13.0 do not go together"),
        (FakeNvml(num_gpus=1, mig=True), {}, "warning: 2 MIG slices cannot work together"),
        (FakeNvml(), {"torch": "2.13.0+cpu", "cuda": None, "nccl": None}, "2.13.0+cpu cannot use the 2 GPUs"),
    ],
)
def test_what_does_not_fit_together_is_found(
    nvml: FakeNvml, software: dict[str, str | None], expected: str, own_torch: list[str]
) -> None:
    wrong, _ = together(nvml, **software)
    assert expected in wrong and (expected or not wrong)


def test_what_the_driver_does_not_tell_fits_neither_way(own_torch: list[str]) -> None:
    unsupported = ("nvmlSystemGetDriverVersion", "nvmlSystemGetCudaDriverVersion", "nvmlDeviceGetCudaComputeCapability")
    wrong, pairs = together(FakeNvml(broken=unsupported))
    assert wrong == ""
    assert [fit.fits for fit in pairs][:2] == [None, None]


def test_torchs_own_pins_are_compared_with_what_is_installed(own_torch: list[str]) -> None:
    own_torch += ["psutil>=1", "click<1", "no-such-package==3", 'pytest<1; extra == "dev"', "not a requirement!"]
    wrong, _ = together(FakeNvml())
    assert "torch 2.13.0+cu130 and click<1 do not go together" in wrong
    assert "no-such-package==3" in wrong and "installed is none" in wrong
    assert "pytest" not in wrong and "psutil" not in wrong
