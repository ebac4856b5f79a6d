"""Where distui keeps things: the state folder (runs), the runtime folder (sockets), and a run's own folder.

`DISTUI_STATE_DIR` and `DISTUI_RUNTIME_DIR` override the two roots. The runtime folder must be short, because a Unix
socket's path is limited to 107 bytes, and private, because whoever can open the socket can control the jobs.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from distui.core.errors import UserError

MAX_SOCKET_PATH_BYTES = 107


def state_dir() -> Path:
    """Return the folder of everything that outlives a reboot; it may not exist yet."""
    if override := os.environ.get("DISTUI_STATE_DIR"):
        return Path(override)
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "distui"


def default_runs_dir() -> Path:
    """Return the folder that holds one folder a run, unless `run.dir` says otherwise."""
    return state_dir() / "runs"


def runtime_dir() -> Path:
    """Return the folder of the sockets, created with mode 0700; refuse one that others may enter."""
    if override := os.environ.get("DISTUI_RUNTIME_DIR"):
        path = Path(override)
    elif base := os.environ.get("XDG_RUNTIME_DIR"):
        path = Path(base) / "distui"
    else:
        path = Path(tempfile.gettempdir()) / f"distui-{os.getuid()}"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.stat()
    except OSError as error:
        raise UserError(
            f"cannot use the runtime folder {path}",
            str(error),
            "set DISTUI_RUNTIME_DIR to a short path that you may write",
        ) from error
    if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise UserError(
            f"the runtime folder {path} is not private",
            f"owner {found.st_uid}, mode {stat.S_IMODE(found.st_mode):04o}; others could control your jobs",
            f"chmod 700 {path}, or set DISTUI_RUNTIME_DIR to a folder of your own",
        )
    return path


def socket_path(name: str) -> Path:
    """Return the path of the socket `name` in the runtime folder; refuse one the kernel would cut."""
    path = runtime_dir() / name
    if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
        raise UserError(
            f"the socket path {path} is too long",
            f"{len(os.fsencode(path))} bytes; the kernel takes {MAX_SOCKET_PATH_BYTES}",
            "set DISTUI_RUNTIME_DIR to a shorter path",
        )
    return path


def daemon_socket() -> Path:
    """Return the gRPC socket of this user's daemon on this node."""
    return socket_path("daemon.sock")


def control_socket() -> Path:
    """Return the ZeroMQ socket on which the daemon's control bus listens."""
    return socket_path("control.sock")


def new_run_id(name: str) -> str:
    """Return `<name>-<yyyymmdd-hhmmss>-<4 hex>`: sorts by start within a name, unique without a lock."""
    slug = re.sub(r"[^A-Za-z0-9_.]+", "-", name).strip("-.") or "run"
    return f"{slug[:40]}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The files of one run. Every writer and reader takes the names from here."""

    path: Path

    @property
    def run_id(self) -> str:
        """The run's identity is its folder's name."""
        return self.path.name

    @property
    def spec(self) -> Path:
        """run.json: what was asked for; the launcher writes it before any rank starts."""
        return self.path / "run.json"

    @property
    def outcome(self) -> Path:
        """outcome.json: how it ended; the launcher writes it last."""
        return self.path / "outcome.json"

    @property
    def config(self) -> Path:
        """config.toml: the resolved configuration, every key with its value."""
        return self.path / "config.toml"

    @property
    def logs(self) -> Path:
        """logs/: rank<R>.log, one file a rank with stdout and stderr, and launcher.log."""
        return self.path / "logs"

    @property
    def flops(self) -> Path:
        """flops.txt: FLOPs and forward time of every module, where `telemetry.profile_flops` asked for it."""
        return self.path / "flops.txt"

    @property
    def telemetry(self) -> Path:
        """telemetry/: the segmented log that the daemon appends to."""
        return self.path / "telemetry"

    @property
    def ledger(self) -> Path:
        """ledger/: rank<R>.bin, the memory-mapped collective ledger of each rank of this node."""
        return self.path / "ledger"

    @property
    def nccl(self) -> Path:
        """nccl/: rank<R>, what torch's flight recorder of NCCL dumped when a collective timed out."""
        return self.path / "nccl"

    @property
    def errors(self) -> Path:
        """errors/: rank<R>.json, the traceback of a rank that raised."""
        return self.path / "errors"

    def rank_log(self, rank: int) -> Path:
        """Return the log of global rank `rank`."""
        return self.logs / f"rank{rank}.log"

    def rank_error(self, rank: int) -> Path:
        """Return the error report of global rank `rank`."""
        return self.errors / f"rank{rank}.json"

    def rank_ledger(self, rank: int) -> Path:
        """Return the collective ledger of global rank `rank`."""
        return self.ledger / f"rank{rank}.bin"

    def create(self) -> None:
        """Make the folder (0700) and its subfolders."""
        self.path.mkdir(mode=0o700, parents=True)
        for folder in (self.logs, self.telemetry, self.ledger, self.errors, self.nccl):
            folder.mkdir()


JOB_ENV = "DISTUI_JOB"
"""Set for every rank: the run's folder. Unset means that the script runs alone."""


def current_run() -> RunFolder | None:
    """Return the folder of the run that this process is a rank of; None outside `distui launch`."""
    path = os.environ.get(JOB_ENV)
    return RunFolder(Path(path)) if path else None


def write_atomic(path: Path, text: str) -> None:
    """Replace `path` by `text`, so that a reader or a crash sees the old or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
