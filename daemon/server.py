"""The daemon of a node: one event loop that serves telemetry, watchers and control on Unix sockets."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from distui.core.errors import UserError
from distui.core.paths import control_socket, daemon_socket, socket_path
from distui.daemon.control import Control, ControlBus
from distui.daemon.hardware import HardwareSampler
from distui.daemon.intake import MAX_BATCH_BYTES, Telemetry
from distui.daemon.live import LiveRuns
from distui.daemon.monitor import Monitor
from distui.proto import telemetry_pb2 as pb
from distui.proto import telemetry_pb2_grpc as rpc

TICK_S = 1.0
GRACE_S = 0.5
"""What open streams get when the daemon ends; ranks go on with the next daemon."""
SERVICES = ("distui.v1.Telemetry", "distui.v1.Monitor", "distui.v1.Control")

_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_BATCH_BYTES),
    ("grpc.max_send_message_length", -1),
    ("grpc.so_reuseport", 0),
]
_log = logging.getLogger("distui.daemon")


def claim_node(patience_s: float = 0.0) -> int:
    """Take the lock that one daemon a user and node holds; return its descriptor, to be kept open.

    Raises: UserError where another daemon has it, and does not end within `patience_s`.
    """
    path = socket_path("daemon.lock")
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError as error:
            if time.monotonic() < deadline:
                time.sleep(0.02)  # a lock with a deadline: flock itself has none
                continue
            pid = os.pread(descriptor, 32, 0).decode().strip()
            os.close(descriptor)
            raise UserError(
                "a daemon is running already", f"pid {pid} holds {path}", f"use it, or end it first: kill {pid}"
            ) from error
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


class Daemon:
    """Everything that one daemon process holds."""

    def __init__(self, idle_s: float) -> None:
        """End by itself after `idle_s` seconds in which nobody needs it; 0: never."""
        self._idle_s = idle_s
        self._runs = LiveRuns()
        self._ended = asyncio.Event()
        self._used_s = time.monotonic()

    def end(self) -> None:
        """Have `serve` return."""
        self._ended.set()

    async def serve(self, on_ready: Callable[[], None]) -> None:
        """Serve until `end` is called or nobody needs the daemon any more; `on_ready` is called when it answers."""
        socket, bus_socket = daemon_socket(), control_socket()
        for stale in (socket, bus_socket):  # nobody listens there: we hold the lock
            stale.unlink(missing_ok=True)
        bus = ControlBus(bus_socket)
        server = grpc.aio.server(options=_OPTIONS)
        rpc.add_TelemetryServicer_to_server(Telemetry(self._runs), server)
        rpc.add_MonitorServicer_to_server(Monitor(self._runs, self._use), server)
        rpc.add_ControlServicer_to_server(Control(self._runs, bus, self._use), server)
        status = health.aio.HealthServicer()  # type: ignore[attr-defined]
        health_pb2_grpc.add_HealthServicer_to_server(status, server)
        reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        server.add_insecure_port(f"unix:{socket}")
        await server.start()
        for used in (socket, bus_socket):
            os.chmod(used, 0o600)
        for service in ("", *SERVICES):
            await status.set(service, health_pb2.HealthCheckResponse.SERVING)
        tasks = [asyncio.create_task(work) for work in (bus.serve(), self._look_after())]
        for task in tasks:
            task.add_done_callback(self._task_ended)
        _log.info("serving on %s", socket)
        on_ready()
        try:
            await self._ended.wait()
        finally:
            _log.info("ending")
            await status.enter_graceful_shutdown()
            await server.stop(GRACE_S)
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            bus.close()
            await asyncio.to_thread(self._runs.close)
            for used in (socket, bus_socket):
                used.unlink(missing_ok=True)
        for result in results:
            if isinstance(result, Exception):
                raise result

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            self._ended.set()  # it never returns: it has failed, and `serve` raises what it raised

    def _use(self) -> None:
        self._used_s = time.monotonic()

    async def _look_after(self) -> None:
        """Once a second: sample the hardware, look after the runs, flush, and see whether anybody is there."""
        sampler = await asyncio.to_thread(HardwareSampler)
        next_s = time.monotonic()
        while True:
            next_s = max(next_s + TICK_S, time.monotonic())
            await asyncio.sleep(next_s - time.monotonic())
            live = [run for run in self._runs.runs.values() if run.alive()]
            if live:
                hardware = await asyncio.to_thread(sampler.sample)
                for run in live:
                    run.say(pb.Record(hardware=hardware))
            self._runs.tick()
            await asyncio.to_thread(self._runs.flush)
            if live or self._runs.num_watchers():
                self._use()
            elif self._idle_s and time.monotonic() - self._used_s >= self._idle_s:
                _log.info("nobody has needed the daemon for %g s", self._idle_s)
                self.end()


async def run_daemon(idle_s: float, on_ready: Callable[[Path], None]) -> None:
    """Serve on this node until SIGTERM, SIGINT or idleness; `on_ready` gets the socket when it answers."""
    daemon = Daemon(idle_s)
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, daemon.end)
    await daemon.serve(lambda: on_ready(daemon_socket()))
