"""What is broken on a machine, or soon will be. Each check looks at one thing and says it in three lines."""

from __future__ import annotations

import importlib.metadata
import os
import re
import resource
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from distui.core.errors import UserError
from distui.core.hardware.detect import GIB, Hardware, NvmlReport
from distui.core.paths import daemon_socket, state_dir
from distui.launcher.doctor.findings import Finding, version_numbers
from distui.launcher.doctor.versions import BF16_CAPABILITY, check_fits

MIN_TORCH = (2, 10)
MIN_SHM_BYTES = GIB
MIN_ROOM_BYTES = GIB
MIN_OPEN_FILES = 4096
NVIDIA_VENDOR = "0x10de"


def examine(hardware: Hardware, nvml: NvmlReport, root: Path = Path("/")) -> list[Finding]:
    """Return every finding, errors first."""
    found = [
        *check_gpus(hardware, nvml, root),
        *check_versions(hardware),
        *check_fits(hardware),
        *check_folders(),
        *check_limits(hardware, root),
    ]
    return sorted(found, key=lambda finding: finding.level != "error")


def nvidia_devices(root: Path) -> int:
    """Return how many NVIDIA display or 3D controllers the PCI bus has, whether or not a driver is there."""
    count = 0
    for device in (root / "sys/bus/pci/devices").glob("*"):
        try:
            vendor = (device / "vendor").read_text().strip()
            kind = (device / "class").read_text().strip()
        except OSError:
            continue
        count += vendor == NVIDIA_VENDOR and kind.startswith("0x03")
    return count


def check_gpus(hardware: Hardware, nvml: NvmlReport, root: Path) -> Iterator[Finding]:
    """Find GPUs that cannot be used, or that somebody else uses."""
    present = nvidia_devices(root)
    if present and not nvml.gpus and os.environ.get("CUDA_VISIBLE_DEVICES", "x").strip():
        yield Finding(
            "error",
            f"{present} NVIDIA GPU{'s' if present > 1 else ''} on the PCI bus, but none can be used",
            nvml.error or "CUDA_VISIBLE_DEVICES leaves none",
            "install the NVIDIA driver; in a container, start it with --gpus all",
        )
    torch = hardware.software.get("torch") or ""
    if nvml.gpus and torch.endswith("+cpu"):
        yield Finding(
            "error",
            f"torch {torch} cannot use the {len(nvml.gpus)} GPUs",
            "it was built for CPUs only",
            "pip install torch from a CUDA index, such as https://download.pytorch.org/whl/cu130",
        )
    for gpu in nvml.gpus:
        if gpu.memory_free_bytes is not None and gpu.memory_free_bytes < 0.9 * gpu.memory_total_bytes:
            used = gpu.memory_total_bytes - gpu.memory_free_bytes
            yield Finding(
                "warning",
                f"GPU {gpu.index} is in use",
                f"{used / GIB:.1f} of {gpu.memory_total_bytes / GIB:.1f} GiB are taken, which plans count on",
                "see nvidia-smi; leave it out with CUDA_VISIBLE_DEVICES, or wait",
            )
    if len({gpu.name for gpu in nvml.gpus}) > 1:
        names = ", ".join(sorted({gpu.name for gpu in nvml.gpus}))
        yield Finding(
            "warning",
            "the GPUs differ",
            f"{names}: each step waits for the slowest",
            "choose equal ones by CUDA_VISIBLE_DEVICES",
        )
    shared = [gpu.index for gpu in nvml.gpus if gpu.is_mig]
    if len(shared) > 1:
        yield Finding(
            "warning",
            f"{len(shared)} MIG slices cannot work together",
            "CUDA shows a process one slice only, and NCCL does not connect slices (NVIDIA MIG user guide)",
            "train on one slice (CUDA_VISIBLE_DEVICES=MIG-...), or turn MIG off: nvidia-smi -mig 0",
        )
    half = [gpu.name for gpu in nvml.gpus if gpu.compute_capability and gpu.compute_capability < BF16_CAPABILITY]
    if half:
        yield Finding(
            "warning",
            f"{half[0]} does not compute in bf16",
            "that needs compute capability 8.0 or newer",
            "set precision.dtype to fp16 (with loss scaling) or fp32; plans for this machine do",
        )


def check_versions(hardware: Hardware) -> Iterator[Finding]:
    """Find packages that are missing or older than distui needs."""
    try:
        requirements = importlib.metadata.requires("distui") or []
    except importlib.metadata.PackageNotFoundError:
        requirements = [f"torch>={'.'.join(map(str, MIN_TORCH))}"]
    for requirement in requirements:
        match = re.fullmatch(r"([A-Za-z0-9_.-]+)\s*>=\s*([\d.]+)", requirement.strip())
        if match is None:  # an extra, or without a lower bound
            continue
        name, least = match.groups()
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(
                "error", f"{name} is not installed", f"distui needs {name}>={least}", f"pip install '{name}>={least}'"
            )
            continue
        if version_numbers(installed) < version_numbers(least):
            yield Finding(
                "error",
                f"{name} {installed} is too old",
                f"distui needs {name}>={least}",
                f"pip install '{name}>={least}'",
            )


def check_folders() -> Iterator[Finding]:
    """Find folders that cannot be used or are nearly full."""
    try:
        daemon_socket()
    except UserError as error:
        yield Finding("error", error.what, error.why, error.fix)
    for name, place in (("state folder", state_dir()), ("temporary folder", Path(tempfile.gettempdir()))):
        folder = place
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        if not os.access(folder, os.W_OK | os.X_OK):
            yield Finding(
                "error",
                f"the {name} {place} cannot be written",
                f"{folder} is not writable",
                "choose another: DISTUI_STATE_DIR, TMPDIR",
            )
            continue
        free = shutil.disk_usage(folder).free
        if free < MIN_ROOM_BYTES:
            yield Finding(
                "warning",
                f"little room in the {name} {place}",
                f"{free / GIB:.2f} GiB are free; runs and checkpoints need more",
                "free some room, or set DISTUI_STATE_DIR or TMPDIR to another disk",
            )


def check_limits(hardware: Hardware, root: Path) -> Iterator[Finding]:
    """Find limits of the system that stop jobs of several ranks."""
    shm = root / "dev/shm"
    if shm.is_dir():
        usage = shutil.disk_usage(shm)
        if usage.free < MIN_SHM_BYTES:
            yield Finding(
                "warning",
                f"/dev/shm is small: {usage.free / GIB:.2f} GiB free of {usage.total / GIB:.2f} GiB",
                "data loader workers and NCCL exchange tensors there, and die with a bus error when it is full",
                "in Docker start with --ipc=host or --shm-size=8g; else remount it larger",
            )
    else:
        yield Finding(
            "warning", "there is no /dev/shm", "data loader workers share tensors there", "mount a tmpfs at /dev/shm"
        )
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < MIN_OPEN_FILES:
        yield Finding(
            "warning",
            f"only {soft} open files are allowed",
            f"ranks, loaders and sockets of a large job need up to {MIN_OPEN_FILES}; the hard limit is {hard}",
            f"ulimit -n {min(hard, 65536) if hard != resource.RLIM_INFINITY else 65536}",
        )
    if any(port.is_infiniband for port in hardware.network):
        locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        if locked != resource.RLIM_INFINITY:
            yield Finding(
                "warning",
                f"locked memory is limited to {locked / 2**20:.0f} MiB",
                "InfiniBand registers its buffers as locked memory, and NCCL falls back or fails without",
                "ulimit -l unlimited (limits.conf: memlock)",
            )
    total, available = hardware.memory_total_bytes, hardware.memory_available_bytes
    if total and available is not None and available < 0.2 * total:
        yield Finding(
            "warning",
            f"little host memory: {available / GIB:.1f} of {total / GIB:.1f} GiB available",
            "other programs, or the cgroup's limit, take the rest",
            "end what is not needed, or raise the container's memory limit",
        )
