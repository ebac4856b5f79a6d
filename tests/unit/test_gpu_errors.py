"""NVML's error counters, behind a fake library, into samples and Prometheus metrics."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from distui.daemon import hardware
from distui.daemon.live import LiveRun
from distui.daemon.metrics import run_metrics
from distui.proto import telemetry_pb2 as pb


class NVMLError(Exception):
    pass


class FakeDriver:
    """Two GPUs; the second is of a kind that counts no errors at all."""

    NVMLError = NVMLError
    NVML_TEMPERATURE_GPU = 0

    def __init__(self) -> None:
        self.events: list[SimpleNamespace] = []

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetIndex(self, handle: int) -> int:
        return handle

    def nvmlEventSetCreate(self) -> str:
        return "events"

    def nvmlDeviceRegisterEvents(self, handle: int, kinds: int, events: str) -> None:
        assert (kinds, events) == (8, "events")
        self._second_cannot(handle)

    def nvmlEventSetWait(self, events: str, timeout_ms: int) -> SimpleNamespace:
        assert timeout_ms == 0
        if not self.events:
            raise NVMLError("Timeout")
        return self.events.pop(0)

    def nvmlDeviceGetTotalEccErrors(self, handle: int, kind: int, counter: int) -> int:
        self._second_cannot(handle)
        return (7, 1)[kind]

    def nvmlDeviceGetNvLinkState(self, handle: int, link: int) -> int:
        self._second_cannot(handle)
        return int(link < 2)

    def nvmlDeviceGetNvLinkErrorCounter(self, handle: int, link: int, counter: int) -> int:
        return 10 * link + counter

    def nvmlDeviceGetPcieReplayCounter(self, handle: int) -> int:
        self._second_cannot(handle)
        return 3

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: int) -> int:
        self._second_cannot(handle)
        return 0x1 | 0x4 | 0x40

    def nvmlDeviceGetName(self, handle: int) -> bytes:
        return b"some GPU"

    def __getattr__(self, name: str) -> Any:
        def fail(*arguments: Any) -> Any:
            raise NVMLError("Not Supported")

        if name.startswith("nvml"):
            return fail
        raise AttributeError(name)

    def _second_cannot(self, handle: int) -> None:
        if handle:
            raise NVMLError("Not Supported")


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    fake = FakeDriver()
    gpus = [(index, fake.nvmlDeviceGetHandleByIndex(index)) for index in range(2)]
    monkeypatch.setattr(hardware, "_open_nvml", lambda: (fake, gpus))
    return fake


def test_errors_are_counted_and_what_is_not_counted_stays_unset(driver: FakeDriver) -> None:
    sampler = hardware.HardwareSampler()
    first, second = sampler.sample().gpus
    assert (first.ecc_corrected, first.ecc_uncorrected, first.pcie_replays) == (7, 1, 3)
    assert first.nvlink_errors == sum(range(4)) + sum(range(10, 14))
    assert list(first.throttle_reasons) == ["power cap", "thermal (hardware)"]
    assert (first.HasField("xid_errors"), first.xid_errors, first.HasField("last_xid")) == (True, 0, False)
    fields = ("ecc_corrected", "ecc_uncorrected", "nvlink_errors", "pcie_replays", "xid_errors", "last_xid")
    assert not any(second.HasField(field) for field in fields)
    driver.events = [SimpleNamespace(device=0, eventData=code) for code in (79, 48)]
    first = sampler.sample().gpus[0]
    assert (first.xid_errors, first.last_xid) == (2, 48)
    assert sampler.sample().gpus[0].xid_errors == 2


def test_prometheus_has_a_counter_for_each_kind_of_error(driver: FakeDriver) -> None:
    node = pb.NodeState(node="a", hardware=hardware.HardwareSampler().sample())
    snapshot = pb.Snapshot(run=pb.RunInfo(run_id="r"), nodes=[node])
    state = SimpleNamespace(steps=SimpleNamespace(history=SimpleNamespace(last=lambda: None)))
    live = cast(LiveRun, SimpleNamespace(state=state, snapshot=lambda: snapshot))
    samples = {
        (sample.name, sample.labels.get("reason", "")): sample.value
        for metric in run_metrics([live])
        for sample in metric.samples
        if sample.name.startswith("distui_gpu")
    }
    assert samples["distui_gpu_ecc_uncorrected_total", ""] == 1
    assert samples["distui_gpu_xid_errors_total", ""] == 0
    assert samples["distui_gpu_throttled", "power cap"] == 1
