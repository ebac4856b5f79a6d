"""Starts the daemon where none answers. Import it late: it loads grpc."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # before grpc is imported

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from distui.core.errors import DaemonUnavailable
from distui.core.paths import JOB_ENV, daemon_socket, socket_path, state_dir

_OPTIONS = [
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 100),
]
_PROBE_S = 2.0
_TAIL_BYTES = 2000
_RANK_ENV = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


def channel(socket: Path) -> grpc.Channel:
    """Return a channel to the daemon on `socket`; close it."""
    return grpc.insecure_channel(f"unix:{socket}", options=_OPTIONS)


def daemon_alive() -> bool:
    """Tell whether a daemon of this user answers on this node."""
    return _answers(daemon_socket(), _PROBE_S, wait=False)


def ensure_daemon(timeout_s: float = 10) -> Path:
    """Return the socket of a daemon that answers; start one where none does.

    Raises: DaemonUnavailable, with the end of its log, where it does not come up within `timeout_s`.
    """
    socket = daemon_socket()
    if daemon_alive():
        return socket
    deadline = time.monotonic() + timeout_s
    with open(socket_path("spawn.lock"), "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two launches start one daemon
        if daemon_alive():
            return socket
        process = _start()
        while (left_s := deadline - time.monotonic()) > 0:
            # The health call waits for the socket itself; now and then see whether the process has given up.
            if _answers(socket, min(left_s, 0.5), wait=True):
                return socket
            if process.poll() is not None and not _answers(socket, min(left_s, 0.5), wait=True):
                break
    status = process.poll()
    ended = f"it ended with exit status {status}" if status is not None else f"it does not answer after {timeout_s:g} s"
    raise DaemonUnavailable(f"no daemon could be started: {ended}. The end of {_log_path()}:\n{_tail()}")


def _answers(socket: Path, timeout_s: float, wait: bool) -> bool:
    if not wait and not socket.exists():
        return False
    with channel(socket) as opened:
        try:
            reply = health_pb2_grpc.HealthStub(opened).Check(
                health_pb2.HealthCheckRequest(), timeout=timeout_s, wait_for_ready=wait
            )
        except grpc.RpcError:
            return False
    return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


def _start() -> subprocess.Popen[bytes]:
    environ = {name: value for name, value in os.environ.items() if name != JOB_ENV and name not in _RANK_ENV}
    state_dir().mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(_log_path(), "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "distui.daemon"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            env=environ,
            start_new_session=True,
        )


def _log_path() -> Path:
    return state_dir() / "daemon.log"


def _tail() -> str:
    try:
        return _log_path().read_bytes()[-_TAIL_BYTES:].decode(errors="replace")
    except OSError as error:
        return str(error)
