"""Measure what no datasheet tells: the CPU's multiplication and copy rates, a disk's rates. Torch-free.

Only on request. Results are kept in calibration.json of the state folder, so that later plans have them.
"""

from __future__ import annotations

import json
import mmap
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from distui.core.errors import UserError
from distui.core.hardware.types import Cpu, Disk, Gpu
from distui.core.paths import state_dir, write_atomic

MATRIX_SIZE = 1536
COPY_BYTES = 256 << 20
DISK_BLOCK_BYTES = 8 << 20
DISK_TEST_BYTES = 256 << 20


def calibration_path() -> Path:
    """Return the file that keeps measurements of this machine."""
    return state_dir() / "calibration.json"


def load_calibration() -> dict[str, Any]:
    """Return the kept measurements; empty where there are none or the file cannot be read."""
    try:
        found = json.loads(calibration_path().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def save_calibration(**values: Any) -> None:
    """Add `values` to the kept measurements."""
    path = calibration_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(load_calibration() | values, indent=1))


def identity(cpu: Cpu) -> list[Any]:
    """Return what a kept measurement must agree with: the state folder may be shared, and the quota may change."""
    return [cpu.model, cpu.num_cores_usable]


def load_training(cpu: Cpu, gpus: Sequence[Gpu]) -> dict[str, Any]:
    """Return what `distui plan --calibrate` kept of this machine, by ranks a node; empty where it is another one."""
    kept = load_calibration().get("training")
    if not isinstance(kept, dict) or kept.get("machine") != [*identity(cpu), *(gpu.name for gpu in gpus)]:
        return {}
    runs = kept.get("runs")
    return runs if isinstance(runs, dict) else {}


def save_training(cpu: Cpu, gpus: Sequence[Gpu], num_ranks: int, measured: dict[str, Any]) -> None:
    """Keep a calibration with `num_ranks` ranks beside those with other numbers of them."""
    runs = load_training(cpu, gpus) | {str(num_ranks): measured}
    save_calibration(training={"machine": [*identity(cpu), *(gpu.name for gpu in gpus)], "runs": runs})


def measure_cpu_flops(cpu: Cpu, seconds: float = 0.5) -> dict[str, float]:
    """Measure fp32 multiplication with numpy's BLAS and memory copies, keep both, and return the FLOP/s by dtype.

    Only fp32 is measured: numpy has no 16-bit matrix multiplication, so those stay unknown.
    """
    import numpy as np

    generator = np.random.default_rng(0)
    left = generator.standard_normal((MATRIX_SIZE, MATRIX_SIZE), dtype=np.float32)
    right = generator.standard_normal((MATRIX_SIZE, MATRIX_SIZE), dtype=np.float32)
    out = np.empty_like(left)
    flops = 2.0 * MATRIX_SIZE**3 / _best(lambda: np.matmul(left, right, out=out), seconds)
    source = np.ones(COPY_BYTES // 8)
    target = np.zeros_like(source)
    bandwidth = 2.0 * COPY_BYTES / _best(lambda: np.copyto(target, source), seconds)
    rates = {"fp32": flops}
    save_calibration(cpu=identity(cpu), peak_flops=rates, memory_bandwidth=bandwidth, cpu_measured_s=time.time())
    return rates


def _best(work: Any, seconds: float) -> float:
    """Return the shortest of the runs of `work` that fit in `seconds`, after one that does not count."""
    work()
    best = float("inf")
    end = time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        work()
        now = time.perf_counter()
        best = min(best, now - start)
        if now >= end:
            return best


def measure_disk(folder: Path, num_bytes: int = DISK_TEST_BYTES) -> Disk:
    """Write and read back a file in `folder` past the page cache, keep the rates, and return the disk with them.

    Raises: UserError where the folder cannot be written or has too little room.
    """
    from distui.core.hardware.disks import rates_to_keep, read_disks

    found = read_disks([folder])
    if not folder.is_dir() or not found:
        raise UserError(f"cannot test the disk at {folder}", "there is no such folder", "give a folder that exists")
    disk = found[0]
    if disk.free_bytes is not None and disk.free_bytes < 2 * num_bytes:
        raise UserError(
            f"cannot test the disk at {folder}",
            f"{disk.free_bytes / 2**20:.0f} MiB are free, the test writes {num_bytes / 2**20:.0f} MiB",
            "free some room, or test another folder",
        )
    block = mmap.mmap(-1, DISK_BLOCK_BYTES)  # anonymous memory is page-aligned, as O_DIRECT demands
    try:
        with tempfile.NamedTemporaryFile(prefix=".distui-disk-", dir=folder) as file:
            block.write(os.urandom(1 << 20) * (DISK_BLOCK_BYTES >> 20))
            write_s = _stream(file.name, block, num_bytes, write=True)
            read_s = _stream(file.name, block, num_bytes, write=False)
    except OSError as error:
        raise UserError(f"cannot test the disk at {folder}", str(error), "give a folder that you may write") from error
    finally:
        block.close()
    disk = replace(disk, read_rate=num_bytes / read_s, write_rate=num_bytes / write_s)
    save_calibration(disks=rates_to_keep(load_calibration().get("disks"), disk))
    return disk


def _stream(path: str, block: mmap.mmap, num_bytes: int, *, write: bool) -> float:
    """Return the seconds that writing or reading `num_bytes` takes; O_DIRECT where the file system has it."""
    flags = os.O_WRONLY if write else os.O_RDONLY
    try:
        handle = os.open(path, flags | getattr(os, "O_DIRECT", 0))
    except OSError:  # tmpfs and some network file systems have no O_DIRECT
        handle = os.open(path, flags)
    try:
        if not write and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        for _ in range(num_bytes // DISK_BLOCK_BYTES):
            if write:
                os.write(handle, block)
            else:
                os.readv(handle, [block])
        if write:
            os.fsync(handle)
        return time.perf_counter() - start
    finally:
        os.close(handle)
