"""NVML behind its boundary: a fake library in the place of pynvml."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from distui.core.hardware import GIB
from distui.core.hardware_nvml import read_nvml


class NVMLError(Exception):
    pass


class FakeNvml:
    """Two A100 joined by NVLink; `broken` names functions that this driver does not support."""

    NVMLError = NVMLError

    def __init__(self, num_gpus: int = 2, broken: tuple[str, ...] = (), mig: bool = False) -> None:
        self.num_gpus, self.broken, self.mig = num_gpus, broken, mig
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
        return 8, 0

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
        return "580.95.05"

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
