"""The file systems that runs may use: room, kind, whether they lie on an NVMe disk, and kept rates. Torch-free."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from distui.core.hardware.types import Disk

ROOT = Path("/")


def read_disks(places: Iterable[Path], root: Path = ROOT, kept: object = None) -> tuple[Disk, ...]:
    """Return the file systems that hold `places` (the nearest folder that exists), each once.

    `kept`: what `keep_rates` kept by folder; a rate is valid for as long as its folder lies on a disk of that size.
    """
    rates = kept if isinstance(kept, Mapping) else {}
    places = [*places, *(Path(folder) for folder in rates)]
    disks: dict[int, Disk] = {}
    mounts = _mounts(root)
    for place in places:
        folder = place
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        try:
            device = folder.stat().st_dev
            usage = shutil.disk_usage(folder)
        except OSError:
            continue
        if device in disks:
            continue
        kind = mounts.get(f"{os.major(device)}:{os.minor(device)}")
        disks[device] = Disk(
            path=str(place),
            free_bytes=usage.free,
            total_bytes=usage.total,
            file_system=kind,
            is_nvme=_is_nvme(root, device),
        )
    for folder_name, row in rates.items():
        try:
            device = Path(folder_name).stat().st_dev
        except OSError:
            continue
        disk = disks.get(device)
        if disk is not None and isinstance(row, Mapping) and row.get("total_bytes") == disk.total_bytes:
            disks[device] = replace(disk, read_rate=row.get("read_rate"), write_rate=row.get("write_rate"))
    return tuple(disks.values())


def rates_to_keep(kept: object, disk: Disk) -> dict[str, Any]:
    """Return the measured rates by folder, with those of `disk`."""
    row = {"total_bytes": disk.total_bytes, "read_rate": disk.read_rate, "write_rate": disk.write_rate}
    return {**(kept if isinstance(kept, Mapping) else {}), str(Path(disk.path).resolve()): row}


def nvme_mounts(root: Path = ROOT) -> list[Path]:
    """Return where file systems of NVMe disks are mounted that this user may write."""
    found = []
    for line in (_read(root / "proc/self/mountinfo") or "").splitlines():
        fields = line.split()
        if len(fields) < 5 or not fields[2].replace(":", "").isdigit():
            continue
        major, minor = (int(part) for part in fields[2].split(":"))
        # The kernel writes a space in a path as \\040.
        folder = Path(re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[4]))
        if _is_nvme(root, os.makedev(major, minor)) and folder.is_dir() and os.access(folder, os.W_OK):
            found.append(folder)
    return found


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _mounts(root: Path) -> dict[str, str]:
    """Return the file system type by "major:minor"."""
    kinds = {}
    for line in (_read(root / "proc/self/mountinfo") or "").splitlines():
        left, _, right = line.partition(" - ")
        fields = left.split()
        if len(fields) > 2 and right:
            kinds[fields[2]] = right.split()[0]
    return kinds


def _is_nvme(root: Path, device: int) -> bool | None:
    """Tell whether the block device is an NVMe disk; None where there is none (overlay, tmpfs, network)."""
    link = root / "sys/dev/block" / f"{os.major(device)}:{os.minor(device)}"
    if os.major(device) == 0 or not link.exists():
        return None
    name = link.resolve()
    if name.name.startswith(("dm-", "md", "loop")):
        slaves = list((name / "slaves").glob("*"))
        return all(slave.name.startswith("nvme") for slave in slaves) if slaves else None
    return "nvme" in name.name or "nvme" in name.parent.name
