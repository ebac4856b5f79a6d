"""What a host says of itself before any rank is started: versions, files, limits, interfaces. Without torch."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import resource
import shutil
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

MAX_BESIDE = 200
"""Modules beside the script that are compared too; a folder with more is somebody's collection."""
MAX_HASHED_BYTES = 8 << 20
SMALL_SHM_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Hello:
    """A host's facts; times are its own clock's."""

    host_name: str
    machine: str
    """The same for two agents that run on one machine."""
    python: str
    versions: dict[str, str]
    folder: str
    folder_there: bool
    hashes: dict[str, str]
    """Path -> sha256 of the script, the modules beside it and the config file; "" where it cannot be read."""
    optional: list[str] = field(default_factory=list)
    """Which of these a host may lack."""
    addresses: dict[str, list[str]] = field(default_factory=dict)
    """Interface -> its addresses."""
    num_gpus: int = 0
    num_cores: int = 1
    memory_bytes: int = 0
    problems: list[list[str]] = field(default_factory=list)
    """What keeps it from taking part: what, why, fix."""
    remarks: list[str] = field(default_factory=list)
    clock_s: float = 0.0
    address: str = ""
    """By which the other hosts reach it."""
    interface: str = ""
    keeps_at: str = ""
    """HOST:PORT where its agent keeps saves in memory for others; "" where none are kept."""
    shares_folder: bool = False
    """Whether the run's folder is the launching side's own, on a shared disk."""
    sees_checkpoints: bool = True
    """Whether it sees the launching side's folder of checkpoints, where there are to be any."""

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self)

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Hello:
        """Return the hello of plain data. Raises: TypeError, KeyError where it is none."""
        return cls(**{name: data[name] for name in cls.__dataclass_fields__ if name in data})


def files_of(target: Sequence[str], folder: Path, config: Path | None) -> tuple[list[str], list[str]]:
    """Return the files to compare, as absolute paths, and which of them a host may lack."""
    names = []
    if target and target[0] != "-m":
        script = folder / target[0]
        names.append(str(script))
        beside = sorted(path for path in script.parent.glob("*.py") if path != script)
        if len(beside) <= MAX_BESIDE:
            names += [str(path) for path in beside]
    found = config if config is not None else folder / "distui.toml"
    if found.is_file():
        names.append(str(found.absolute()))
    optional = [name for name in names if not target or target[0] == "-m" or name != str(folder / target[0])]
    return names, optional


def hash_of(path: str) -> str:
    """Return the file's sha256; "" where it cannot be read or is no source."""
    try:
        with open(path, "rb") as file:
            return hashlib.sha256(file.read(MAX_HASHED_BYTES)).hexdigest()
    except OSError:
        return ""


def gather(folder: str, files: Sequence[str], optional: Sequence[str]) -> Hello:
    """Return the facts of this host; `files` are compared with the launching side's."""
    return Hello(
        host_name=socket.gethostname(),
        machine=f"{_boot_id()} {socket.gethostname()}",
        python=sys.executable,
        versions=_versions(),
        folder=folder,
        folder_there=os.path.isdir(folder),
        hashes={path: hash_of(path) for path in files},
        optional=list(optional),
        addresses=addresses(),
        num_gpus=_num_gpus(),
        num_cores=max(1, psutil.cpu_count(logical=False) or 1),
        memory_bytes=psutil.virtual_memory().available,
        remarks=_remarks(),
        clock_s=time.time(),
    )


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _versions() -> dict[str, str]:
    from distui import __version__

    found = {"python": ".".join(platform.python_version_tuple()[:2]), "distui": __version__}
    try:
        found["torch"] = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        found["torch"] = ""
    return found


def _num_gpus() -> int:
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return len([one for one in chosen.split(",") if one.strip() not in ("", "-1")])
    from distui.core.hardware.detect import detect

    return len(detect().gpus_per_node)


def _remarks() -> list[str]:
    found = []
    try:
        shm = shutil.disk_usage("/dev/shm").total
        if shm < SMALL_SHM_BYTES:
            found.append(f"/dev/shm has {shm >> 20} MiB: loaders' workers may need more (docker run --shm-size=8g)")
    except OSError:
        found.append("there is no /dev/shm: loaders' workers need it")
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if locked != resource.RLIM_INFINITY and os.path.isdir("/dev/infiniband"):
        found.append(f"memlock is {locked >> 10} KiB: InfiniBand wants unlimited (docker run --ulimit memlock=-1)")
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if files < 4096:
        found.append(f"{files} open files at most (ulimit -n): many ranks and workers need more")
    return found


def addresses() -> dict[str, list[str]]:
    """Return the addresses of each interface of this machine, IPv4 first."""
    found: dict[str, list[str]] = {}
    for name, entries in psutil.net_if_addrs().items():
        four = [entry.address for entry in entries if entry.family == socket.AF_INET]
        six = [entry.address.partition("%")[0] for entry in entries if entry.family == socket.AF_INET6]
        if four or six:
            found[name] = four + six
    return found


def source_address(target: str) -> str:
    """Return the address of this machine from which packets to `target` leave; "" where no route leads there.

    Nothing is sent: the kernel's routing table answers, as for `ip route get`.
    """
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(target, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(where)
            return str(probe.getsockname()[0])
    except OSError:
        return ""


def interface_of(address: str, known: Mapping[str, Sequence[str]]) -> str:
    """Return the interface that has an address; "" where none has."""
    return next((name for name, found in known.items() if address in found), "")
