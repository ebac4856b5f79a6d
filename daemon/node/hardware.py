"""What this node's processors, memory, network and GPUs do. What cannot be read is absent, never 0."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import psutil

from distui.daemon.node.gpu_errors import GpuErrors
from distui.proto import telemetry_pb2 as pb

_log = logging.getLogger("distui.daemon")


class HardwareSampler:
    """Reads the node; make one and call `sample` about once a second."""

    def __init__(self) -> None:
        """Begin the first interval of CPU time, and look for GPUs."""
        psutil.cpu_percent(), psutil.cpu_times_percent()  # the first call only sets the start of the interval
        self._nvml, self._gpus = _open_nvml()
        self._errors = GpuErrors(self._nvml, self._gpus)

    def sample(self) -> pb.HardwareSample:
        """Return what the node does now; takes some milliseconds with GPUs."""
        self._errors.read_events()
        memory, network = psutil.virtual_memory(), psutil.net_io_counters()
        found = pb.HardwareSample(
            cpu_percent=psutil.cpu_percent(),
            cpu_nice_percent=getattr(psutil.cpu_times_percent(), "nice", 0.0),
            memory_used_bytes=memory.total - memory.available,
            memory_total_bytes=memory.total,
            gpus=[self._gpu(index, handle) for index, handle in self._gpus],
        )
        if network is not None:
            found.network_sent_bytes, found.network_received_bytes = network.bytes_sent, network.bytes_recv
        return found

    def _gpu(self, index: int, handle: Any) -> pb.Gpu:
        nvml = self._nvml
        name = self._ask(nvml.nvmlDeviceGetName, handle) or ""
        found = pb.Gpu(index=index, name=name.decode() if isinstance(name, bytes) else name)
        if uuid := self._ask(nvml.nvmlDeviceGetUUID, handle):
            found.uuid = uuid.decode() if isinstance(uuid, bytes) else uuid
        if (rates := self._ask(nvml.nvmlDeviceGetUtilizationRates, handle)) is not None:
            found.utilization_percent = rates.gpu
        if (memory := self._ask(nvml.nvmlDeviceGetMemoryInfo, handle)) is not None:
            found.memory_used_bytes, found.memory_total_bytes = int(memory.used), int(memory.total)
        if (power_mw := self._ask(nvml.nvmlDeviceGetPowerUsage, handle)) is not None:
            found.power_w = power_mw / 1000
        if (celsius := self._ask(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU)) is not None:
            found.temperature_c = celsius
        self._errors.fill(found, handle)
        return found

    def _ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return what NVML answers; None where this GPU or driver cannot tell."""
        try:
            return function(*arguments)
        except self._nvml.NVMLError:
            return None


def _open_nvml() -> tuple[Any, list[tuple[int, Any]]]:
    """Return NVML and the GPUs it sees; (None, []) where there is no NVIDIA driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
        return pynvml, [(index, pynvml.nvmlDeviceGetHandleByIndex(index)) for index in range(count)]
    except pynvml.NVMLError as error:
        _log.info("no GPUs are sampled: %s", error)
        return None, []
