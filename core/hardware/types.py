"""What a machine is made of, as plain facts. Torch-free.

Every field that can be missing is `None` when it is not known, never 0 and never a guess: the screens show it as n/a.
Import these names from `distui.core.hardware.detect`.

Units: bytes, bytes/s in one direction, FLOP/s of dense multiplication, bits/s for network interfaces.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

GIB = 1 << 30

PCIE_LANE_RATES = {1: 0.25e9, 2: 0.5e9, 3: 0.985e9, 4: 1.969e9, 5: 3.938e9, 6: 7.563e9}
"""Bytes/s of one lane in one direction after line coding, by generation (PCI-SIG base specifications)."""

Scheduler = Literal["slurm", "kubernetes", "none"]


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU, or one MIG slice of it."""

    index: int
    name: str
    memory_total_bytes: int
    """What the driver reports, a little less than the number in the product's name."""
    memory_free_bytes: int | None = None
    compute_capability: tuple[int, int] | None = None
    peak_flops: Mapping[str, float] | None = None
    """Dense FLOP/s by dtype (`fp32`, `bf16`, `fp16`); a dtype that the GPU has no units for is absent."""
    memory_bandwidth: float | None = None
    nvlink_bandwidth: float | None = None
    """To all peers together, one direction; None where the GPU has no NVLink (or no NVML told)."""
    pcie_bandwidth: float | None = None
    pcie_generation: int | None = None
    pcie_width: int | None = None
    is_mig: bool = False
    numa_node: int | None = None
    facts_source: str = ""
    """Where peak_flops and bandwidths come from; empty when they are unknown."""


@dataclass(frozen=True, slots=True)
class NumaNode:
    """Processors and the memory that is near them."""

    index: int
    cpus: str
    """As the kernel lists them, such as 0-15,32-47."""
    memory_total_bytes: int | None = None
    memory_free_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Cpu:
    """The processors of one node, as far as this process may use them."""

    model: str
    num_cores_physical: int | None
    num_cores_logical: int
    num_cores_usable: int
    """Logical cores that affinity and the cgroup quota leave, at least 1."""
    num_numa_nodes: int | None = None
    peak_flops: Mapping[str, float] | None = None
    """Measured by `measure_cpu_flops` (all usable cores together), None until then."""
    memory_bandwidth: float | None = None
    """Copy rate, read plus written bytes, measured likewise."""
    numa_nodes: tuple[NumaNode, ...] = ()


@dataclass(frozen=True, slots=True)
class Disk:
    """A place for data, checkpoints or offload."""

    path: str
    free_bytes: int | None
    total_bytes: int | None = None
    file_system: str | None = None
    is_nvme: bool | None = None
    read_rate: float | None = None
    """Bytes/s, None until measured."""
    write_rate: float | None = None


@dataclass(frozen=True, slots=True)
class NetworkInterface:
    """A network interface other than loopback, or an InfiniBand port."""

    name: str
    speed_bits: float | None
    is_up: bool
    is_infiniband: bool = False


@dataclass(frozen=True, slots=True)
class Hardware:
    """A cluster of equal nodes, as found here (`detected`) or as asked for (`named`)."""

    name: str
    nodes: int
    gpus_per_node: tuple[Gpu, ...]
    cpu: Cpu | None
    memory_total_bytes: int | None
    """Host memory of one node; None on a named machine unless it was given."""
    memory_available_bytes: int | None
    """The least of what the kernel calls available and what the cgroup still allows."""
    memory_physical_bytes: int | None = None
    """What the kernel has, whatever a cgroup allows."""
    memory_limit_cgroup_bytes: int | None = None
    """What the cgroups allow; None where they set no limit."""
    cpu_limit_cgroup: float | None = None
    """Cores that the cgroups' quota allows; None where they set none."""
    disks: tuple[Disk, ...] = ()
    network: tuple[NetworkInterface, ...] = ()
    scheduler: Scheduler = "none"
    software: Mapping[str, str | None] = field(default_factory=dict)
    """Versions by name: python, torch, cuda (torch's), nccl, driver, driver_cuda, kernel, ...; None where absent."""
    source: Literal["detected", "named"] = "detected"
    node_bandwidth: float | None = None
    """Between nodes, bytes/s in one direction of one node; None where unknown."""
    node_bandwidth_source: str = ""
    rank_bandwidth: float | None = None
    """Between CPU ranks of a node, bytes/s, measured by `distui doctor --collectives`; None until then."""
    calibration: Mapping[str, Any] = field(default_factory=dict)
    """What `distui plan --calibrate` kept of this machine, by ranks a node; see distui.core.plan.measured."""
    gpu_topology: tuple[tuple[str, ...], ...] = ()
    """gpu_topology[i][j]: how GPU i reaches GPU j; empty where NVML did not tell."""

    @property
    def device_kind(self) -> Literal["cuda", "cpu"]:
        """What ranks compute on."""
        return "cuda" if self.gpus_per_node else "cpu"

    @property
    def ranks_per_node(self) -> int:
        """Ranks that `cluster.nproc = "auto"` starts on a node: the GPUs, or half of the physical cores."""
        if self.gpus_per_node:
            return len(self.gpus_per_node)
        if self.cpu is None:
            return 1
        cores = min(self.cpu.num_cores_physical or self.cpu.num_cores_usable, self.cpu.num_cores_usable)
        return max(1, cores // 2)

    @property
    def num_devices(self) -> int:
        """GPUs of the cluster; without any, the ranks that `auto` starts."""
        return self.nodes * self.ranks_per_node

    def memory_limit_bytes(self, ranks_per_node: int | None = None) -> int | None:
        """Return the device memory one rank may use: the smallest GPU's, or its share of the host's memory."""
        if self.gpus_per_node:
            return min(gpu.memory_total_bytes for gpu in self.gpus_per_node)
        if self.memory_available_bytes is None:
            return None
        return self.memory_available_bytes // max(1, ranks_per_node or self.ranks_per_node)

    def peak_flops(self, dtype: str, ranks_per_node: int | None = None) -> float | None:
        """Return one rank's FLOP/s in `dtype`: the slowest GPU's, or its share of the CPU's measured rate."""
        if self.gpus_per_node:
            rates = [gpu.peak_flops.get(dtype) if gpu.peak_flops else None for gpu in self.gpus_per_node]
            known = [rate for rate in rates if rate is not None]
            return min(known) if known and len(known) == len(rates) else None
        if self.cpu is None or self.cpu.peak_flops is None or dtype not in self.cpu.peak_flops:
            return None
        return self.cpu.peak_flops[dtype] / max(1, ranks_per_node or self.ranks_per_node)
