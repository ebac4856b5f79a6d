"""Where distui keeps things: the state folder (runs), the runtime folder (sockets), and a run's own folder.

`DISTUI_STATE_DIR` and `DISTUI_RUNTIME_DIR` override the two roots. The runtime folder must be short, because a Unix
socket's path is limited to 107 bytes, and private, because whoever can open the socket can control the jobs.

A run's files are opened by `open_own` and what stands on it, and by nothing else. The folder of runs may be shared with
strangers, so a run counts only if its folder, subfolder and file are this user's own; they are looked at by descriptor,
one from the other, so that what was checked is what is used.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distui.core.errors import NotOwn, UserError

MAX_SOCKET_PATH_BYTES = 107
MAX_READ_BYTES = 16 << 20
"""Of a run's file that is read whole: what is larger was not written by us."""


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
        link, found, parent = path.lstat(), path.stat(), path.parent.stat()
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
    exchangeable = parent.st_mode & 0o002 and not parent.st_mode & stat.S_ISVTX
    if link.st_uid not in (0, os.getuid()) or exchangeable:
        raise UserError(
            f"others can put another folder in the place of the runtime folder {path}",
            f"all may rename what is in {path.parent}" if exchangeable else f"it is a link of user {link.st_uid}",
            "set DISTUI_RUNTIME_DIR to a folder of your own",
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
    node: str = ""
    """Whose log of telemetry, where each node keeps its own; the head's has no name."""

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
    def ending(self) -> Path:
        """Why the agent has begun to end the ranks: a signal to stop, or those that had ended badly."""
        return self.path / "ending.json"

    @property
    def preempt(self) -> Path:
        """There once the ranks are to save at a step that they agree on, and to end with 75."""
        return self.path / "preempt"

    @property
    def restarts(self) -> Path:
        """restarts.json: how often the job was started again, when, and why."""
        return self.path / "restarts.json"

    @property
    def notices(self) -> Path:
        """notices.log: what the supervisor has to say to whoever started the job, a line each."""
        return self.logs / "notices.log"

    @property
    def config(self) -> Path:
        """config.toml: the resolved configuration, every key with its value."""
        return self.path / "config.toml"

    @property
    def debugger(self) -> Path:
        """debugger.json: the rank that waits for somebody to attach to its debugger (`debugger.sock`, beside)."""
        return self.path / "debugger.json"

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
        return self.path / "telemetry" / self.node

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

    def unsent(self, rank: int, incarnation: int) -> Path:
        """Return the file of what a rank recorded and no daemon has taken; it is there only where there is any."""
        return self.path / "telemetry" / f"rank{rank}-{incarnation}.unsent"

    def create(self) -> None:
        """Make the folder (0700) and its subfolders."""
        self.path.mkdir(mode=0o700, parents=True)
        for folder in (self.logs, self.telemetry, self.ledger, self.errors, self.nccl):
            folder.mkdir()


JOB_ENV = "DISTUI_JOB"
MEMORY_ENV = "DISTUI_MEMORY"
"""In a rank's environment: the socket of the agent that keeps its saves in memory."""
MEMORY_FOLDER_ENV = "DISTUI_MEMORY_FOLDER"
"""In a rank's environment: where that agent shows the save that this attempt may go on from."""
"""Set for every rank: the run's folder. Unset means that the script runs alone."""


def current_run() -> RunFolder | None:
    """Return the folder of the run that this process is a rank of; None outside `distui launch`."""
    path = os.environ.get(JOB_ENV)
    return RunFolder(Path(path)) if path else None


def write_atomic(path: Path, text: str) -> None:
    """Replace `path` by `text`, so that a reader or a crash sees the old or the new, never a part."""
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _replace(folder, path.name, text, 0o666)
    finally:
        os.close(folder)


def _replace(folder: int, name: str, text: str, mode: int) -> None:
    temporary = f".{name}.{secrets.token_hex(4)}.tmp"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(temporary, flags, mode, dir_fd=folder), "w", encoding="utf-8") as file:
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
        except OSError:
            os.unlink(temporary, dir_fd=folder)
            raise


_RUN_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")


def is_run_id(name: str) -> bool:
    """Tell whether `name` may be a run's: letters, digits, `_`, `.` and `-`, never a path."""
    return _RUN_ID.fullmatch(name) is not None


def check_run_id(name: str) -> str:
    """Return `name`. Raises: UserError where it can be no run's."""
    if not is_run_id(name):
        raise UserError(
            f"{name!r} is no run's name",
            "a run is named by letters, digits, '_', '.' and '-', at most 128 of them, and never by a path",
            "distui status names the newest run; a folder is written with a slash: ./folder",
        )
    return name


SUBFOLDERS = frozenset({"logs", "telemetry", "ledger", "errors", "nccl"})
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
"""A link is not followed; a FIFO is not waited for."""


@contextmanager
def own_folder(path: Path) -> Iterator[int]:
    """Give the descriptor of a run's folder, or of one of its `SUBFOLDERS`, that is this user's own.

    Nobody else may be able to write in it: who can may put a hard link there. Raises: NotOwn; OSError.
    """
    top = path.parent if path.name in SUBFOLDERS else path
    descriptor = _own_folder(top, top, None, reachable=True)
    try:
        if path is not top:
            outer, reachable = descriptor, bool(os.fstat(descriptor).st_mode & 0o011)
            try:
                descriptor = _own_folder(path, path.name, outer, reachable=reachable)
            finally:
                if descriptor != outer:
                    os.close(outer)
        yield descriptor
    finally:
        os.close(descriptor)


def _own_folder(path: Path, name: Path | str, inside: int | None, *, reachable: bool) -> int:
    try:
        descriptor = os.open(name, _FOLDER, dir_fd=inside)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise NotOwn(path, "it is a link or no folder") from error
        raise
    found = os.fstat(descriptor)
    why = ""
    if found.st_uid != os.geteuid():
        why = f"it belongs to user {found.st_uid}, and this is user {os.geteuid()}"
    elif reachable and found.st_mode & 0o022:
        why = f"others may write in it (mode {stat.S_IMODE(found.st_mode):04o}): chmod go-w it"
    if why:
        os.close(descriptor)
        raise NotOwn(path, why)
    return descriptor


def open_own(path: Path, flags: int = os.O_RDONLY) -> int:
    """Return a descriptor of a run's file, a plain one of this user in folders of this user; a new one has mode 0600.

    To be written to, it must have no second name. Raises: NotOwn; OSError.
    """
    with own_folder(path.parent) as folder:
        return _open_in(folder, path, flags)


def _open_in(folder: int, path: Path, flags: int) -> int:
    try:
        descriptor = os.open(path.name, flags & ~os.O_TRUNC | _FILE, 0o600, dir_fd=folder)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise NotOwn(path, "it is no plain file") from error
        raise
    found = os.fstat(descriptor)
    writes = flags & os.O_ACCMODE != os.O_RDONLY
    if (why := _foreign(found)) or (writes and found.st_nlink > 1):
        os.close(descriptor)
        raise NotOwn(path, why or f"it has {found.st_nlink} names, so writing to it would change another file")
    if flags & os.O_TRUNC:
        os.ftruncate(descriptor, 0)
    return descriptor


def _foreign(found: os.stat_result) -> str:
    if not stat.S_ISREG(found.st_mode):
        return "it is no plain file"
    if found.st_uid != os.geteuid():
        return f"it belongs to user {found.st_uid}, and this is user {os.geteuid()}"
    return ""


def read_own(path: Path, limit_bytes: int = MAX_READ_BYTES) -> bytes:
    """Return all that a run's file holds. Raises: NotOwn; OSError, also where it holds more than the limit."""
    with open(open_own(path), "rb") as file:
        data = file.read(limit_bytes + 1)
    if len(data) > limit_bytes:
        raise OSError(errno.EFBIG, f"it has more than {limit_bytes:,} bytes", os.fspath(path))
    return data


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the object that a run's file holds; None where there is no such file of ours, or it holds none."""
    try:
        found = json.loads(read_own(path))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def write_own(path: Path, text: str) -> None:
    """Replace a run's file as `write_atomic` does. Raises: NotOwn; OSError."""
    with own_folder(path.parent) as folder:
        _replace(folder, path.name, text, 0o600)


def list_own(folder: Path) -> dict[str, os.stat_result]:
    """Return the plain files of this user in a run's folder or subfolder, by name; none where there is no folder.

    Raises: NotOwn; OSError.
    """
    found = {}
    try:
        with own_folder(folder) as descriptor:
            for name in os.listdir(descriptor):
                try:
                    one = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
                except FileNotFoundError:
                    continue  # deleted meanwhile
                if not _foreign(one):
                    found[name] = one
    except FileNotFoundError:
        return {}
    return found


def remove_own(path: Path) -> None:
    """Delete a run's file. Raises: NotOwn; OSError."""
    with own_folder(path.parent) as folder:
        os.unlink(path.name, dir_fd=folder)
