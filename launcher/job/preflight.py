"""What must hold on this node before anything is started: every problem is told before the first rank exists."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path

from distui.core.config.schema import Config
from distui.core.errors import UserError
from distui.core.hardware.detect import Hardware

MIN_FREE_BYTES = 64 << 20
"""Logs, ledgers and telemetry of a short run."""

MEMORY_PER_RANK_BYTES = 250 << 20
"""What Python with torch takes before the model: 220 MiB with torch 2.13 on the CPU."""

MIN_PYTHON = (3, 10)


def check_target(target: Sequence[str], cwd: Path) -> None:
    """Refuse a script that cannot be read, and a module that is not there; neither is run.

    Raises:
        UserError: what is wrong with the target.
    """
    if target[0] == "-m":
        if len(target) < 2:
            raise UserError("no module is named", "-m takes the name of a module", "distui launch -m package.module")
        _check_module(target[1], cwd)
    else:
        _check_script(Path(target[0]), cwd)


def check_debugger(config: Config, rank: int | None, debugger: str) -> None:
    """Refuse to debug a rank that there will not be, or by what is not installed.

    Raises: UserError.
    """
    assert isinstance(config.cluster.nproc, int)
    world_size = config.cluster.world_size()
    if rank is not None and not 0 <= rank < world_size:
        there = f"the job has ranks 0 to {world_size - 1}" if world_size > 1 else "the job has rank 0 alone"
        fix = f"--debug-rank 0{f' to {world_size - 1}' if world_size > 1 else ''}, or more ranks: --nproc {rank + 1}"
        raise UserError(f"--debug-rank {rank} is no rank", there, fix)
    if debugger == "debugpy" and rank is None:
        raise UserError("--debugger debugpy needs a rank", "an editor attaches to one rank", "add --debug-rank 0")
    if importlib.util.find_spec(debugger) is None:
        fix = f"pip install {debugger}, or --debugger pdb, which comes with Python"
        raise UserError(f"--debugger {debugger} cannot be used", "it is not installed here", fix)


def _check_script(script: Path, cwd: Path) -> None:
    path = cwd / script
    if not path.exists():
        import difflib

        folder = path.parent
        names = sorted(entry.name for entry in folder.glob("*.py")) if folder.is_dir() else []
        near = difflib.get_close_matches(path.name, names, n=1)
        there = f"{folder} has {', '.join(names[:5]) or 'no .py file'}" if folder.is_dir() else f"{folder} is not there"
        fix = f"write {script.with_name(near[0])}" if near else "give the path of the training script"
        raise UserError(f"the script {script} does not exist", there, fix)
    if path.is_dir():
        raise UserError(f"{script} is a folder", "a script or a module is run", "name the script in it, or use -m")
    try:
        with open(path, "rb") as file:
            file.read(1)
    except OSError as error:
        raise UserError(f"the script {script} cannot be read", str(error), f"chmod u+r {script}") from error


def _find(name: str, path: Sequence[str] | None) -> ModuleSpec | None:
    for finder in sys.meta_path:
        found = finder.find_spec(name, path)
        if found is not None:
            return found
    return None


def _check_module(name: str, cwd: Path) -> None:
    """Look a module up part by part: the import system's own find_spec would import the packages on the way."""
    path: list[str] | None = None
    saved = list(sys.path)
    sys.path.insert(0, str(cwd))
    try:
        parts = name.split(".")
        for count in range(1, len(parts) + 1):
            part = ".".join(parts[:count])
            spec = _find(part, path)
            if spec is None:
                raise UserError(
                    f"there is no module {name}",
                    f"{part} is neither in {cwd} nor installed for {sys.executable}",
                    f"for a file, write its path instead: {'/'.join(parts)}.py",
                )
            locations = spec.submodule_search_locations
            if locations is None and count < len(parts):
                raise UserError(f"there is no module {name}", f"{part} is no package", f"write -m {part}")
            path = list(locations) if locations is not None else None
        if path is not None and _find(f"{name}.__main__", path) is None:
            raise UserError(
                f"{name} is a package that cannot be run",
                f"{path[0] if path else name} has no __main__.py",
                f"name one of its modules: -m {name}.<module>",
            )
    finally:
        sys.path[:] = saved


def check_port(config: Config) -> None:
    """Refuse a port that is taken on the node that must open it.

    Raises:
        UserError: the port cannot be opened.
    """
    cluster = config.cluster
    if cluster.master_port == 0 or cluster.node_rank != 0:
        return
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", cluster.master_port))
        except OSError as error:
            one = " (0 takes a free one)" if cluster.nodes == 1 else " on every node"
            raise UserError(
                f"port {cluster.master_port} cannot be opened",
                f"{os.strerror(error.errno or 0)}; ranks must meet there (cluster.master_port)",
                f"end what uses it, or choose another port: --master-port{one}",
            ) from error


def check_runs_dir(runs_dir: Path) -> None:
    """Refuse a folder of runs that cannot be made, written, or has too little space; make it.

    Raises:
        UserError: with the folder and the numbers.
    """
    fix = "set run.dir to a folder that you may write, for example --set run.dir=./runs"
    try:
        runs_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder of runs {runs_dir} cannot be made", str(error), fix) from error
    if not os.access(runs_dir, os.W_OK | os.X_OK):
        raise UserError(
            f"the folder of runs {runs_dir} is not writable",
            f"uid {os.getuid()} may not write into it (mode {runs_dir.stat().st_mode & 0o777:03o})",
            fix,
        )
    free = shutil.disk_usage(runs_dir).free
    if free < MIN_FREE_BYTES:
        raise UserError(
            f"too little disk space for a run in {runs_dir}",
            f"{free / 2**20:.1f} MiB free; logs and telemetry need at least {MIN_FREE_BYTES >> 20} MiB",
            "free some space, or set run.dir to a folder on another disk",
        )


def check_node(config: Config, hardware: Hardware) -> None:
    """Refuse what this node's Python and memory cannot carry.

    Raises:
        UserError: with the numbers.
    """
    if sys.version_info < MIN_PYTHON:
        raise UserError(
            f"Python {sys.version.split()[0]} is too old",
            f"distui and torch need {'.'.join(map(str, MIN_PYTHON))} or newer",
            "install distui into a newer Python",
        )
    if _find("torch", None) is None:
        raise UserError("torch is not installed", f"{sys.executable} does not find it", "pip install torch")
    nproc, available = config.cluster.nproc, hardware.memory_available_bytes
    assert isinstance(nproc, int)
    needed = nproc * MEMORY_PER_RANK_BYTES
    if available is not None and needed > available:
        raise UserError(
            f"too little memory for {nproc} ranks on this node",
            f"{nproc} x {MEMORY_PER_RANK_BYTES >> 20} MiB = {needed / 2**30:.1f} GiB for Python and torch alone; "
            f"{available / 2**30:.1f} GiB is available",
            f"--nproc {max(1, available // MEMORY_PER_RANK_BYTES)} or fewer",
        )
