"""Finding this node's daemon, and starting one where there is none."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import select
import socket as sockets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distui.core.errors import DaemonUnavailable
from distui.core.paths import JOB_ENV, daemon_socket, runtime_dir, socket_path

CHECK_S = 2.0
BUSY_S = 10.0
"""A daemon that takes connections, but does not answer for so long, hangs; on a busy machine it answers late."""
START_S = 60.0
"""A daemon that has not ended is starting for at most so long."""
MAX_LOG_BYTES = 1 << 20
_TAIL_LINES = 5


def daemon_alive(patience_s: float = CHECK_S) -> bool:
    """Tell whether a daemon answers on this node's socket; where one listens, within `patience_s`."""
    socket = daemon_socket()
    with sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM) as probe:
        probe.settimeout(CHECK_S)
        try:
            probe.connect(os.fspath(socket))
        except OSError:
            return False  # nobody listens; found out without loading grpc
    return _serving(socket, patience_s)


def _serving(socket: Path, patience_s: float) -> bool:
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(f"unix:{socket}", options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=patience_s)
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def log_path() -> Path:
    """Return the log of the daemons that `ensure_daemon` starts."""
    return runtime_dir() / "daemon.log"


def ensure_daemon(timeout_s: float = START_S) -> Path:
    """Return the socket of this node's daemon, started in the background where none answers.

    Raises: DaemonUnavailable, with the end of its log, where it does not answer within `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    patience_s = min(BUSY_S, timeout_s)
    if daemon_alive(patience_s):
        return daemon_socket()
    with _starting(deadline):
        if not daemon_alive(patience_s):  # somebody else may have started it while we waited for the lock
            _start(deadline, timeout_s)
    return daemon_socket()


@contextmanager
def _starting(deadline: float) -> Iterator[None]:
    """Hold the lock of those who start a daemon."""
    descriptor = os.open(socket_path("daemon.start.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise DaemonUnavailable("another process has been starting the daemon for too long") from None
                time.sleep(0.02)  # a lock with a deadline: flock itself has none
        yield
    finally:
        os.close(descriptor)


def _start(deadline: float, timeout_s: float) -> None:
    path = log_path()
    if path.exists() and path.stat().st_size > MAX_LOG_BYTES:
        path.replace(path.with_suffix(".log.1"))
    reader, writer = os.pipe()
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "wb") as log:
            subprocess.run(
                [sys.executable, "-m", "distui.daemon", "--detach", "--ready-fd", str(writer)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[writer],
                cwd=runtime_dir(),
                env=_environment(),
                start_new_session=True,
                timeout=max(0.1, deadline - time.monotonic()),
                check=False,
            )
        os.close(writer)
        writer = -1
        poll = select.poll()
        poll.register(reader, select.POLLIN)
        ready = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
        if ready and os.read(reader, 1):
            return
        why = "it ended at once" if ready else f"it did not answer within {timeout_s:g} s"
        raise DaemonUnavailable(f"the daemon could not be started: {why}; {path} ends with:\n{_tail(path)}")
    except subprocess.TimeoutExpired as error:
        raise DaemonUnavailable(f"the daemon did not start within {timeout_s:g} s; see {path}") from error
    finally:
        os.close(reader)
        if writer >= 0:
            os.close(writer)


def _environment() -> dict[str, str]:
    """Return the daemon's environment: no part of any job, and no path relative to this process's folder."""
    environment = {key: value for key, value in os.environ.items() if key != JOB_ENV}
    for key in ("DISTUI_STATE_DIR", "DISTUI_RUNTIME_DIR"):
        if value := environment.get(key):
            environment[key] = os.path.abspath(value)
    paths = [os.path.abspath(path) for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    package = importlib.util.find_spec("distui")
    assert package is not None and package.origin is not None
    home = str(Path(package.origin).resolve().parents[1])
    if not home.endswith("-packages") and home not in paths:
        paths.append(home)  # a checkout that is not installed
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    return environment


def _tail(path: Path) -> str:
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:])
