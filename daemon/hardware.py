"""Samples this node: processors, memory, network by psutil, GPUs by NVML where there are any."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol

import psutil

from distui.proto import telemetry_pb2 as pb

_log = logging.getLogger("distui.daemon")


class GpuDriver(Protocol):
    """Where GPU readings come from; a test puts its own here."""

    def sample(self) -> list[pb.Gpu]:
        """Return a reading of each GPU; a value that the driver does not give is absent."""


class NvmlDriver:
    """Reads NVIDIA GPUs."""

    def __init__(self, nvml: Any) -> None:
        """Take the initialised pynvml module."""
        self._nvml = nvml
        self._handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        self._names = [_text(nvml.nvmlDeviceGetName(handle)) for handle in self._handles]

    def sample(self) -> list[pb.Gpu]:
        """Return a reading of each GPU."""
        return [self._gpu(index, handle) for index, handle in enumerate(self._handles)]

    def _gpu(self, index: int, handle: Any) -> pb.Gpu:
        nvml = self._nvml
        gpu = pb.Gpu(index=index, name=self._names[index])
        if (utilization := self._read(nvml.nvmlDeviceGetUtilizationRates, handle)) is not None:
            gpu.utilization_percent = utilization.gpu
        if (memory := self._read(nvml.nvmlDeviceGetMemoryInfo, handle)) is not None:
            gpu.memory_used_bytes, gpu.memory_total_bytes = memory.used, memory.total
        if (power_mw := self._read(nvml.nvmlDeviceGetPowerUsage, handle)) is not None:
            gpu.power_w = power_mw / 1000
        if (celsius := self._read(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU)) is not None:
            gpu.temperature_c = celsius
        return gpu

    def _read(self, query: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return query(*arguments)
        except self._nvml.NVMLError:
            return None  # this GPU does not tell; shown as n/a


def open_gpu_driver() -> GpuDriver | None:
    """Return the driver of this node's GPUs; None where there are none."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        return NvmlDriver(pynvml)
    except pynvml.NVMLError as error:
        _log.info("no NVIDIA GPUs: %s", error)
        return None


class HardwareSampler:
    """Takes one sample after the other; the processors' load is that since the one before."""

    def __init__(self, gpus: GpuDriver | None) -> None:
        self._gpus = gpus
        psutil.cpu_percent(None)

    def sample(self) -> pb.HardwareSample:
        """Return a sample of now."""
        memory = psutil.virtual_memory()
        sample = pb.HardwareSample(
            cpu_percent=psutil.cpu_percent(None),
            memory_used_bytes=memory.total - memory.available,
            memory_total_bytes=memory.total,
            gpus=self._gpus.sample() if self._gpus is not None else [],
        )
        if (network := psutil.net_io_counters()) is not None:
            sample.network_sent_bytes, sample.network_received_bytes = network.bytes_sent, network.bytes_recv
        return sample


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
