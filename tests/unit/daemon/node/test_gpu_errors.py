"""NVML's error counters, behind a fake library, into samples and Prometheus metrics."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from distui.core.paths import RunFolder
from distui.daemon.diagnosis.gpu_faults import device_note
from distui.daemon.diagnosis.observe import observe
from distui.daemon.diagnosis.verdicts import diagnose
from distui.daemon.node import hardware
from distui.daemon.runs.state import DAEMON, RunState
from distui.daemon.serve.live import LiveRun
from distui.daemon.serve.metrics import run_metrics
from distui.proto import telemetry_pb2 as pb


class NVMLError(Exception):
    pass


class FakeDriver:
    """Two GPUs; the second is of a kind that counts no errors at all."""

    NVMLError = NVMLError
    NVML_TEMPERATURE_GPU = 0

    def __init__(self) -> None:
        self.events: list[SimpleNamespace] = []
        self.uncorrected, self.nvlink = 1, 0

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
        return (7, self.uncorrected)[kind]

    def nvmlDeviceGetNvLinkState(self, handle: int, link: int) -> int:
        self._second_cannot(handle)
        return int(link < 2)

    def nvmlDeviceGetNvLinkErrorCounter(self, handle: int, link: int, counter: int) -> int:
        return 10 * link + counter + self.nvlink

    def nvmlDeviceGetPcieReplayCounter(self, handle: int) -> int:
        self._second_cannot(handle)
        return 3

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: int) -> int:
        self._second_cannot(handle)
        return 0x1 | 0x4 | 0x40

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return f"GPU-{handle}"

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


class Job:
    """A run of two ranks on the fake's GPUs, visible to CUDA in the other order, as its daemon knows it."""

    def __init__(self, folder: Path) -> None:
        self.state = RunState(RunFolder(folder))
        self._seq = 0
        for rank in range(2):
            started = pb.RankStarted(world_size=2, local_rank=rank, device=f"cuda:{rank}", device_uuid=str(1 - rank))
            self._hear(rank, pb.Record(rank_started=started))

    def _hear(self, rank: int, record: pb.Record, time_s: float = 0.0) -> None:
        self._seq += 1
        record.seq, record.time_s = self._seq, time_s
        source = pb.Source(rank=rank, node="elsewhere", incarnation=1)
        self.state.apply(pb.Batch(source=source, records=[record]))

    def sampled(self, sample: pb.HardwareSample, time_s: float) -> list[pb.Diagnosis]:
        self._hear(DAEMON, pb.Record(hardware=sample), time_s)
        ranks = observe(self.state, time_s)
        return [found for found in diagnose(self.state, ranks, time_s) if found.kind == "gpu_error"]


def test_an_xid_names_the_rank_on_that_gpu_and_what_to_do(driver: FakeDriver, tmp_path: Path) -> None:
    sampler, job = hardware.HardwareSampler(), Job(tmp_path)
    assert job.sampled(sampler.sample(), 10.0) == [], "what was counted before the run is not of the run"
    driver.events = [SimpleNamespace(device=0, eventData=45)]
    assert job.sampled(sampler.sample(), 11.0) == [], "the driver's word for a program that has ended"
    driver.events = [SimpleNamespace(device=0, eventData=79)]
    (found,) = job.sampled(sampler.sample(), 12.0)
    assert (list(found.ranks), found.since_s) == ([1], 1.0)
    assert "GPU 0 of elsewhere (rank 1): XID 79 (the GPU has fallen off the bus)" in found.message
    assert "dcgmi diag" in found.message
    driver.uncorrected = 3
    (found,) = job.sampled(sampler.sample(), 13.0)
    assert "XID 79" in found.message and "2 memory errors that ECC could not correct" in found.message
    assert job.sampled(sampler.sample(), 13.0 + 601.0) == [], "it has gone on without another"


def test_what_holds_a_gpu_down_stands_beside_slowness(driver: FakeDriver, tmp_path: Path) -> None:
    sampler, job = hardware.HardwareSampler(), Job(tmp_path)
    job.sampled(sampler.sample(), 10.0)
    driver.nvlink = 5
    job.sampled(sampler.sample(), 11.0)
    note = device_note(job.state, 1)
    assert note == "its GPU 0: its clocks are held down: thermal (hardware); 40 NVLink errors since the run began"
    assert device_note(job.state, 0) == ""
