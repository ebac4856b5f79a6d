"""Read this node: processors, memory and its cgroup limit, disks, network, scheduler, versions. Torch-free.

Nothing here raises where a file, a tool or a permission is missing: the fact is None.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import psutil

from distui.core.hardware.disks import nvme_mounts, read_disks
from distui.core.hardware.measure import identity, load_calibration, load_training
from distui.core.hardware.nvml import NvmlReport
from distui.core.hardware.types import Cpu, Hardware, NetworkInterface, NumaNode, Scheduler
from distui.core.paths import state_dir

ROOT = Path("/")


def detect_host(nvml: NvmlReport, nodes: int = 1) -> Hardware:
    """Return this node's hardware with the GPUs of `nvml`."""
    memory = psutil.virtual_memory()
    left = cgroup_memory_left(ROOT)
    limit = cgroup_memory_limit(ROOT)
    cpu = read_cpu(ROOT)
    network = read_network(ROOT)
    gpus = nvml.gpus
    kinds = sorted({gpu.name for gpu in gpus})
    name = f"{len(gpus)}x{' + '.join(kinds)}" if gpus else f"{cpu.model}, {cpu.num_cores_usable} cores"
    bandwidth, bandwidth_source = _node_bandwidth(network)
    measured = load_calibration()
    return Hardware(
        name=name if nodes == 1 else f"{nodes} x {name}",
        nodes=nodes,
        gpus_per_node=gpus,
        cpu=cpu,
        memory_total_bytes=min(memory.total, limit) if limit is not None else memory.total,
        memory_available_bytes=min(memory.available, left) if left is not None else memory.available,
        memory_physical_bytes=memory.total,
        memory_limit_cgroup_bytes=limit,
        cpu_limit_cgroup=cgroup_cpu_quota(ROOT),
        disks=read_disks(
            [Path.cwd(), state_dir(), Path(tempfile.gettempdir()), *nvme_mounts(ROOT)], ROOT, measured.get("disks")
        ),
        network=network,
        scheduler=find_scheduler(os.environ),
        software=read_software(nvml),
        source="detected",
        node_bandwidth=bandwidth,
        node_bandwidth_source=bandwidth_source,
        rank_bandwidth=measured.get("rank_bandwidth") if measured.get("rank_bandwidth_cpu") == identity(cpu) else None,
        calibration=load_training(cpu, gpus),
        gpu_topology=nvml.topology,
    )


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and re.fullmatch(r"-?\d+", text) else None


# ---- cgroups -----------------------------------------------------------------------------------------------


def _cgroup_folders(root: Path, controller: str) -> Iterable[tuple[Path, int]]:
    """Yield this process's cgroup folders for `controller`, innermost first, with the version (1 or 2).

    In a container the path of /proc/self/cgroup may not be mounted; the mount's root then is the container's own group.
    """
    mount = root / "sys/fs/cgroup"
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        if number == "0" and not controllers:
            base, version = mount, 2
        elif controller in controllers.split(","):
            base, version = mount / controller, 1
        else:
            continue
        relative = Path(path.lstrip("/"))
        for folder in [base / relative, *(base / parent for parent in relative.parents)]:
            if folder.is_dir():
                yield folder, version


def cgroup_memory_limit(root: Path = ROOT) -> int | None:
    """Return the least memory limit of this process's cgroups in bytes, None where there is none."""
    limits = [limit for limit, _ in _cgroup_memory(root)]
    return min(limits, default=None)


def cgroup_memory_left(root: Path = ROOT) -> int | None:
    """Return the memory that the cgroups still allow, page cache that can be dropped counted as free."""
    return min((max(0, limit - used) for limit, used in _cgroup_memory(root)), default=None)


def _cgroup_memory(root: Path) -> Iterable[tuple[int, int]]:
    for folder, version in _cgroup_folders(root, "memory"):
        limit = _number(_read(folder / ("memory.max" if version == 2 else "memory.limit_in_bytes")))
        used = _number(_read(folder / ("memory.current" if version == 2 else "memory.usage_in_bytes")))
        # Version 1 writes "no limit" as a number near 2**63.
        if limit is None or used is None or limit >= 1 << 60:
            continue
        key = "inactive_file" if version == 2 else "total_inactive_file"
        match = re.search(rf"^{key} (\d+)$", _read(folder / "memory.stat") or "", re.MULTILINE)
        yield limit, max(0, used - (int(match[1]) if match else 0))


def cgroup_cpu_quota(root: Path = ROOT) -> float | None:
    """Return the cores that the cgroups' CPU quota allows, None where there is none."""
    quotas = []
    for folder, version in _cgroup_folders(root, "cpu"):
        if version == 2:
            parts = (_read(folder / "cpu.max") or "").split()
            quota, period = (_number(parts[0]), _number(parts[1])) if len(parts) == 2 else (None, None)
        else:
            quota, period = (_number(_read(folder / f"cpu.cfs_{part}_us")) for part in ("quota", "period"))
        if quota and period and quota > 0:
            quotas.append(quota / period)
    return min(quotas, default=None)


# ---- processors and network --- ----------------------------------------------------------------------------


def read_cpu(root: Path = ROOT) -> Cpu:
    """Return the processors as this process may use them."""
    match = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", _read(root / "proc/cpuinfo") or "", re.MULTILINE)
    model = match[1].strip() if match else platform.processor() or platform.machine()
    logical = psutil.cpu_count() or 1
    usable = float(len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else float(logical)
    quota = cgroup_cpu_quota(root)
    nodes = read_numa(root)
    cpu = Cpu(
        model=model,
        num_cores_physical=psutil.cpu_count(logical=False),
        num_cores_logical=logical,
        num_cores_usable=max(1, int(min(usable, quota) if quota else usable)),
        num_numa_nodes=len(nodes) or None,
        numa_nodes=nodes,
    )
    measured = load_calibration()
    if measured.get("cpu") != identity(cpu):
        return cpu
    return replace(cpu, peak_flops=measured.get("peak_flops"), memory_bandwidth=measured.get("memory_bandwidth"))


def read_numa(root: Path = ROOT) -> tuple[NumaNode, ...]:
    """Return the NUMA nodes with their processors and memory; empty where the kernel shows none."""
    found = []
    for folder in (root / "sys/devices/system/node").glob("node[0-9]*"):
        sizes = dict(re.findall(r"(Mem\w+):\s+(\d+) kB", _read(folder / "meminfo") or ""))
        total, free = (int(sizes[name]) * 1024 if name in sizes else None for name in ("MemTotal", "MemFree"))
        found.append(NumaNode(int(folder.name[4:]), _read(folder / "cpulist") or "", total, free))
    return tuple(sorted(found, key=lambda node: node.index))


def read_network(root: Path = ROOT) -> tuple[NetworkInterface, ...]:
    """Return the interfaces other than loopback, and InfiniBand ports, fastest first."""
    found = []
    try:
        stats = psutil.net_if_stats()
    except (OSError, RuntimeError):
        stats = {}
    for name, stat in stats.items():
        if name != "lo":
            # The kernel gives 0 (or 65535 for virtual ones) where it does not know.
            speed = stat.speed * 1e6 if 0 < stat.speed < 4_000_000 and stat.speed != 65535 else None
            found.append(NetworkInterface(name, speed, bool(stat.isup)))
    for port in sorted((root / "sys/class/infiniband").glob("*/ports/*")):
        match = re.match(r"([\d.]+) Gb/sec", _read(port / "rate") or "")
        name = f"{port.parent.parent.name}:{port.name}"
        active = "ACTIVE" in (_read(port / "state") or "")
        found.append(NetworkInterface(name, float(match[1]) * 1e9 if match else None, active, is_infiniband=True))
    return tuple(sorted(found, key=lambda interface: (-(interface.speed_bits or 0.0), interface.name)))


def _node_bandwidth(network: Iterable[NetworkInterface]) -> tuple[float | None, str]:
    """Return the bytes/s of the network that ranks would use between nodes, and what says so."""
    up = [interface for interface in network if interface.is_up and interface.speed_bits]
    ports = [interface for interface in up if interface.is_infiniband]
    if ports:
        names = ", ".join(port.name for port in ports)
        return sum(port.speed_bits or 0.0 for port in ports) / 8, f"InfiniBand ports that are active: {names}"
    if up and up[0].speed_bits:
        return up[0].speed_bits / 8, f"fastest interface that is up: {up[0].name}"
    return None, ""


# ---- scheduler and versions --------------------------------------------------------------------------------


def find_scheduler(environ: Mapping[str, str]) -> Scheduler:
    """Return what starts jobs here."""
    if "SLURM_JOB_ID" in environ or shutil.which("sbatch"):
        return "slurm"
    return "kubernetes" if "KUBERNETES_SERVICE_HOST" in environ else "none"


def version_of(*distributions: str) -> str | None:
    """Return the installed version of the first of `distributions` that is there, without importing it."""
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def read_software(nvml: NvmlReport) -> dict[str, str | None]:
    """Return versions by name; None where a part is not installed."""
    torch = version_of("torch")
    build = re.search(r"\+(.+)$", torch or "")
    local = build[1] if build else ""
    cuda = f"{local[2:-1]}.{local[-1]}" if re.fullmatch(r"cu\d{3}", local) else None
    runtime = version_of("nvidia-cuda-runtime", "nvidia-cuda-runtime-cu13", "nvidia-cuda-runtime-cu12")
    if cuda is None and local != "cpu" and runtime:
        cuda = ".".join(runtime.split(".")[:2])
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "kernel": platform.release(),
        "torch": torch,
        "cuda": cuda,
        "nccl": version_of("nvidia-nccl-cu13", "nvidia-nccl-cu12"),
        "nccl_cuda": next((major for major in ("13", "12") if version_of(f"nvidia-nccl-cu{major}")), None),
        "triton": version_of("triton"),
        "driver": nvml.driver,
        "driver_cuda": nvml.driver_cuda,
        "distui": version_of("distui"),
    }
