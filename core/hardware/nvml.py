"""The one place that talks to NVML (through pynvml). No GPU, no driver or an old library: fewer facts, never an error.

Tests hand a fake module to `read_nvml`; everything else goes through its result.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from distui.core.hardware.known import gpu_facts
from distui.core.hardware.types import PCIE_LANE_RATES, Gpu

NVLINK_RATES = {6: 20e9, 7: 25e9, 8: 25e9, 9: 25e9, 10: 50e9}
"""Bytes/s of one link in one direction, by compute capability's major number (NVIDIA architecture white papers)."""

TOPOLOGY_WORDS = {
    0: "same board",
    10: "PCIe switch",
    20: "PCIe switches",
    30: "host bridge",
    40: "NUMA node",
    50: "system",
}
"""nvmlGpuTopologyLevel_t in words: what the way between two GPUs crosses at most."""

MAX_NVLINKS = 18


@dataclass(frozen=True, slots=True)
class NvmlReport:
    """What NVML told: the GPUs that this process may use, and versions; `error` says why there are none."""

    gpus: tuple[Gpu, ...] = ()
    driver: str | None = None
    driver_cuda: str | None = None
    topology: tuple[tuple[str, ...], ...] = ()
    """topology[i][j]: how GPU i reaches GPU j: "NVLink x12", "PCIe switch", ...; "self" on the diagonal."""
    error: str = ""


def read_nvml(nvml: Any = None, environ: Mapping[str, str] | None = None) -> NvmlReport:
    """Return the GPUs that NVML sees and CUDA_VISIBLE_DEVICES leaves."""
    if nvml is None:
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError as error:
            return NvmlReport(error=f"pynvml cannot be imported: {error}")
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return NvmlReport(error=f"NVML does not start: {error}")
    try:
        return _read(nvml, os.environ if environ is None else environ)
    except nvml.NVMLError as error:
        return NvmlReport(error=f"NVML failed: {error}")
    finally:
        nvml.nvmlShutdown()


def _ask(nvml: Any, function: str, *args: Any) -> Any:
    """Return what NVML answers, or None where this device, driver or library cannot tell."""
    ask = getattr(nvml, function, None)
    if ask is None:
        return None
    try:
        return ask(*args)
    except nvml.NVMLError:
        return None


def _text(value: Any) -> str | None:
    return value.decode() if isinstance(value, bytes) else value


def _read(nvml: Any, environ: Mapping[str, str]) -> NvmlReport:
    handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    uuids = [_text(_ask(nvml, "nvmlDeviceGetUUID", handle)) or "" for handle in handles]
    chosen = _visible(uuids, environ.get("CUDA_VISIBLE_DEVICES"))
    gpus = []
    for index in chosen:
        gpus += _read_gpu(nvml, index, handles[index])
    cuda = _ask(nvml, "nvmlSystemGetCudaDriverVersion")
    return NvmlReport(
        gpus=tuple(gpus),
        driver=_text(_ask(nvml, "nvmlSystemGetDriverVersion")),
        driver_cuda=f"{cuda // 1000}.{cuda % 1000 // 10}" if cuda else None,
        topology=_topology(nvml, [handles[index] for index in chosen]),
        error="" if handles else "NVML sees no GPU",
    )


def _visible(uuids: list[str], setting: str | None) -> list[int]:
    """Return the indices that CUDA_VISIBLE_DEVICES leaves; like CUDA, stop at the first entry that names no GPU."""
    if setting is None:
        return list(range(len(uuids)))
    chosen: list[int] = []
    for entry in (part.strip() for part in setting.split(",")):
        if entry.isdigit() and int(entry) < len(uuids):
            index = int(entry)
        else:
            matches = [index for index, uuid in enumerate(uuids) if entry and uuid.startswith(entry)]
            if len(matches) != 1:
                break
            index = matches[0]
        if index not in chosen:
            chosen.append(index)
    return chosen


def _read_gpu(nvml: Any, index: int, handle: Any) -> list[Gpu]:
    """Return the GPU, or its MIG slices where MIG is on."""
    mode = _ask(nvml, "nvmlDeviceGetMigMode", handle)
    gpu = _describe(nvml, index, handle)
    if gpu is None:
        return []
    if not mode or mode[0] != 1:
        return [gpu]
    slices = []
    for place in range(_ask(nvml, "nvmlDeviceGetMaxMigDeviceCount", handle) or 0):
        slice_handle = _ask(nvml, "nvmlDeviceGetMigDeviceHandleByIndex", handle, place)
        memory = slice_handle and _ask(nvml, "nvmlDeviceGetMemoryInfo", slice_handle)
        if memory:
            # A slice has a part of the whole GPU's units, and NVML does not tell its rates: unknown, not the whole's.
            slices.append(
                Gpu(
                    index=index,
                    name=f"{gpu.name} MIG {place}",
                    memory_total_bytes=memory.total,
                    memory_free_bytes=memory.free,
                    compute_capability=gpu.compute_capability,
                    pcie_bandwidth=gpu.pcie_bandwidth,
                    pcie_generation=gpu.pcie_generation,
                    pcie_width=gpu.pcie_width,
                    numa_node=gpu.numa_node,
                    is_mig=True,
                )
            )
    return slices


def _describe(nvml: Any, index: int, handle: Any) -> Gpu | None:
    memory = _ask(nvml, "nvmlDeviceGetMemoryInfo", handle)
    if memory is None:
        return None
    name = _text(_ask(nvml, "nvmlDeviceGetName", handle)) or "NVIDIA GPU"
    capability = _ask(nvml, "nvmlDeviceGetCudaComputeCapability", handle)
    generation = _ask(nvml, "nvmlDeviceGetMaxPcieLinkGeneration", handle)
    width = _ask(nvml, "nvmlDeviceGetMaxPcieLinkWidth", handle)
    lane = PCIE_LANE_RATES.get(generation or 0)
    node = _ask(nvml, "nvmlDeviceGetNumaNodeId", handle)
    gpu = Gpu(
        index=index,
        name=name,
        memory_total_bytes=memory.total,
        memory_free_bytes=memory.free,
        compute_capability=tuple(capability) if capability else None,
        nvlink_bandwidth=_nvlink_bandwidth(nvml, handle, capability),
        pcie_bandwidth=lane * width if lane and width else None,
        pcie_generation=generation,
        pcie_width=width,
        numa_node=node if node is not None and node >= 0 else None,
    )
    facts = gpu_facts(name)
    if facts is None:
        return gpu
    return replace(gpu, peak_flops=facts.peak_flops, memory_bandwidth=facts.memory_bandwidth, facts_source=facts.source)


def _nvlink_bandwidth(nvml: Any, handle: Any, capability: tuple[int, int] | None) -> float | None:
    rate = NVLINK_RATES.get(capability[0]) if capability else None
    active = sum(_ask(nvml, "nvmlDeviceGetNvLinkState", handle, link) == 1 for link in range(MAX_NVLINKS))
    return active * rate if rate and active else None


def _topology(nvml: Any, handles: list[Any]) -> tuple[tuple[str, ...], ...]:
    def way(first: Any, second: Any) -> str:
        if first is second:
            return "self"
        # NVML_P2P_CAPS_INDEX_NVLINK is 2, NVML_P2P_STATUS_OK is 0.
        if _ask(nvml, "nvmlDeviceGetP2PStatus", first, second, 2) == 0:
            links = sum(_ask(nvml, "nvmlDeviceGetNvLinkState", first, link) == 1 for link in range(MAX_NVLINKS))
            if links:
                return f"NVLink x{links}"
        level = _ask(nvml, "nvmlDeviceGetTopologyCommonAncestor", first, second)
        return TOPOLOGY_WORDS.get(level, "n/a") if level is not None else "n/a"

    return tuple(tuple(way(first, second) for second in handles) for first in handles)
