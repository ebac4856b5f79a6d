"""What the hardware does in a second: datasheets, NCCL's own numbers, or what a calibration measured. Torch-free.

Units: bytes/s, FLOP/s, seconds.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from distui.core.hardware.detect import Hardware
from distui.core.plan.measured import Measured

LINK_EFFICIENCY = 0.77
"""NCCL's achieved share of a link's datasheet rate: 230 of 300 GB/s for large messages on 8 A100 (nccl-tests)."""

NCCL_BASE_S = 8.4e-6
NVLINK_HOP_S, PCIE_HOP_S, NETWORK_HOP_S = 3.4e-6, 5.7e-6, 14e-6
"""Latency of a ring collective and of each hop, Simple protocol (NCCL, src/graph/tuning.cc)."""

CPU_EFFICIENCY = 0.5
"""Share of the measured matrix rate that a training step reaches on a CPU; an assumption."""

EFFICIENCY_BY_WIDTH = ((1024, 0.30), (2048, 0.40), (4096, 0.50))
"""Achieved share of the peak by hidden size (over the root of the tensor-parallel ranks), between these linear in log2.
Source: Megatron-LM, arXiv 2104.04473, table 1: 44-52% on A100 from hidden size 2304 up; below that an assumption."""

HOPPER_FACTOR = 0.8
"""Faster units wait more for memory: Llama 3 reached 38-43% of the peak on H100 (arXiv 2407.21783, table 4)."""

HOST_STEP_BANDWIDTH = 109e9
HOST_STEP_SOURCE = "ZeRO-Offload, arXiv 2101.06840, table 4; not measured: distui doctor --measure"
"""Bytes/s of a node whose host updates an optimizer, where it was not measured: 10 billion parameters of Adam in 2.57 s
at 28 bytes each (CPU-Adam on a DGX-2's two Xeon 8168)."""


@dataclass(frozen=True, slots=True)
class Rates:
    """What the hardware does in a second, None where unknown."""

    device_kind: str
    ranks_per_node: int
    nodes: int
    peak_flops: float | None
    is_hopper_or_later: bool
    memory_bandwidth: float | None
    intra_bandwidth: float | None
    intra_hop_s: float
    intra_name: str
    node_bandwidth: float | None
    pcie_bandwidth: float | None
    nvme_read: float | None
    nvme_write: float | None
    measured: Measured | None = None
    """What a calibration on this machine gave, None where there was none for so many ranks."""
    host_bandwidth: float = HOST_STEP_BANDWIDTH
    """Of a whole node's host memory, where optimizers are updated that rest there."""
    host_source: str = HOST_STEP_SOURCE

    @property
    def baseline_bytes(self) -> int | None:
        """Memory of a CPU rank beyond its tensors, None where not measured."""
        return self.measured.baseline_bytes if self.measured and self.device_kind == "cpu" else None


def rates_of(hardware: Hardware, dtype: str, ranks_per_node: int) -> Rates:
    """Return the rates of one rank of `hardware` that computes in `dtype`."""
    gpus = hardware.gpus_per_node
    measured = Measured.of(hardware.calibration, ranks_per_node)
    cpu_memory = hardware.cpu.memory_bandwidth if hardware.cpu else None
    measured_disks = [disk for disk in hardware.disks if disk.read_rate and disk.write_rate]
    nvme = max(measured_disks, key=lambda disk: (disk.is_nvme is True, disk.read_rate), default=None)
    if gpus:
        nvlinks = [gpu.nvlink_bandwidth for gpu in gpus]
        links = [gpu.pcie_bandwidth for gpu in gpus]
        pcie = min(link for link in links if link) if all(links) else None
        nvlink = min(link for link in nvlinks if link) if all(nvlinks) else None
        memory = [gpu.memory_bandwidth for gpu in gpus]
        capability = min(gpu.compute_capability or (0, 0) for gpu in gpus)
        return Rates(
            device_kind="cuda",
            ranks_per_node=ranks_per_node,
            nodes=hardware.nodes,
            peak_flops=hardware.peak_flops(dtype),
            is_hopper_or_later=capability >= (9, 0) or capability == (0, 0),
            memory_bandwidth=min(rate for rate in memory if rate) if all(memory) else None,
            intra_bandwidth=nvlink or pcie,
            intra_hop_s=NVLINK_HOP_S if nvlink else PCIE_HOP_S,
            intra_name="NVLink" if nvlink else "PCIe",
            node_bandwidth=hardware.node_bandwidth,
            pcie_bandwidth=pcie,
            nvme_read=nvme.read_rate if nvme else None,
            nvme_write=nvme.write_rate if nvme else None,
            measured=measured,
            host_bandwidth=cpu_memory or HOST_STEP_BANDWIDTH,
            host_source="measured by distui doctor" if cpu_memory else HOST_STEP_SOURCE,
        )
    return Rates(
        device_kind="cpu",
        ranks_per_node=ranks_per_node,
        nodes=hardware.nodes,
        peak_flops=hardware.peak_flops(dtype, ranks_per_node),
        is_hopper_or_later=False,
        memory_bandwidth=cpu_memory / ranks_per_node if cpu_memory else None,
        intra_bandwidth=hardware.rank_bandwidth,
        intra_hop_s=0.0,
        intra_name="memory of the host",
        node_bandwidth=hardware.node_bandwidth,
        pcie_bandwidth=None,
        nvme_read=nvme.read_rate if nvme else None,
        nvme_write=nvme.write_rate if nvme else None,
        measured=measured,
    )


def efficiency(rates: Rates, width: float) -> float:
    """Return the achieved share of the peak for matrices of this width."""
    if rates.device_kind == "cpu":
        return CPU_EFFICIENCY
    points = EFFICIENCY_BY_WIDTH
    place = math.log2(max(1.0, width))
    found = points[-1][1]
    if width <= points[0][0]:
        found = max(0.05, points[0][1] + (place - math.log2(points[0][0])) * 0.1)
    else:
        for (low, low_value), (high, high_value) in itertools.pairwise(points):
            if low <= width <= high:
                share = (place - math.log2(low)) / (math.log2(high) - math.log2(low))
                found = low_value + share * (high_value - low_value)
                break
    return found * (HOPPER_FACTOR if rates.is_hopper_or_later else 1.0)


def link(rates: Rates, group_size: int, span: int) -> tuple[float | None, float]:
    """Return beta (bytes/s) and alpha (s) of a ring over `group_size` ranks that take each `span`-th rank of the job.

    Ranks are placed node by node. A group that leaves its node shares the node's network with the other groups.
    """
    per_node = max(1, rates.ranks_per_node // span)
    if group_size <= per_node:
        beta = rates.intra_bandwidth * LINK_EFFICIENCY if rates.intra_bandwidth else None
        if rates.device_kind == "cpu":
            gathered = rates.measured.collectives.get("all_gather") if rates.measured else None
            beta = gathered[1] if gathered else rates.intra_bandwidth  # measured, so nothing is to be taken off
        return beta, NCCL_BASE_S + (group_size - 1) * rates.intra_hop_s
    nodes = -(-group_size // per_node)
    # NCCL crosses many nodes along trees (and PAT since 2.23), so hops grow with the logarithm.
    alpha = NCCL_BASE_S + (per_node - 1) * rates.intra_hop_s + math.ceil(math.log2(nodes)) * NETWORK_HOP_S
    if rates.node_bandwidth is None or (per_node > 1 and rates.intra_bandwidth is None):
        return None, alpha
    groups = min(span, rates.ranks_per_node)
    beta = rates.node_bandwidth * LINK_EFFICIENCY / groups
    if per_node > 1 and rates.intra_bandwidth is not None:
        beta = min(beta, rates.intra_bandwidth * LINK_EFFICIENCY)
    return beta, alpha


def missing_link(rates: Rates, between_nodes: bool) -> str:
    """Return which bandwidth is unknown, and how to get it."""
    if between_nodes and rates.node_bandwidth is None:
        return "bandwidth between nodes (give --network-gbits)"
    if rates.device_kind == "cpu":
        return "bandwidth between ranks (not measured: distui plan --calibrate)"
    return "bandwidth between GPUs (NVML does not tell)"


def home_rates(home: str, rates: Rates) -> tuple[float | None, float | None, str]:
    """Return bytes/s from and to the home for one rank, and what to say where they are unknown."""
    if home == "cpu":
        rate = rates.pcie_bandwidth * LINK_EFFICIENCY if rates.pcie_bandwidth else None
        return rate, rate, "PCIe rate of the GPUs (NVML does not tell)"
    read = rates.nvme_read / rates.ranks_per_node if rates.nvme_read else None
    write = rates.nvme_write / rates.ranks_per_node if rates.nvme_write else None
    return read, write, "rate of the NVMe disk (not measured: distui doctor --disk PATH)"
