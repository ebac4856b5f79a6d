"""The daemon: one asyncio loop that serves gRPC on a Unix socket and looks after the runs.

                ranks ──Publish──> Intake ──> Runs ──> RunLog (disk)
                                               │ └───> RunState (memory)
watchers <──Watch, GetSnapshot── Monitor <─────┘
watchers ──Execute──> Control ──ZeroMQ──> ranks' side threads
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import signal
import time
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from distui.core.errors import UserError
from distui.core.paths import control_socket, daemon_socket
from distui.daemon.control import Control, ControlBus
from distui.daemon.hardware import HardwareSampler, open_gpu_driver
from distui.daemon.intake import Intake
from distui.daemon.monitor import Monitor
from distui.daemon.registry import Runs
from distui.proto import telemetry_pb2 as pb
from distui.proto import telemetry_pb2_grpc as rpc

REFRESH_S = 0.5
HARDWARE_S = 1.0
SYNC_S = 1.0
MAX_MESSAGE_BYTES = 16 << 20
_GRACE_S = 1.0
_SERVICES = ("Telemetry", "Monitor", "Control")
_log = logging.getLogger("distui.daemon")


class AlreadyRunning(UserError):
    """Another daemon of this user serves this node."""

    def __init__(self, socket: Path) -> None:
        super().__init__("a daemon is running already", f"it serves {socket}", "use it, or stop it first")

    def __reduce__(self) -> tuple[type[AlreadyRunning], tuple[Path]]:
        return type(self), (daemon_socket(),)


class Daemon:
    """Serves until a signal comes or it has been idle for `idle_s` (0: until a signal)."""

    def __init__(self, idle_s: float) -> None:
        self._idle_s = idle_s
        self._end = asyncio.Event()
        self._runs = Runs()
        self._monitor = Monitor(self._runs)
        self._socket = daemon_socket()

    async def run(self) -> None:
        """Serve. Raises: AlreadyRunning."""
        lock = _lock(self._socket)
        try:
            await self._serve()
        finally:
            os.close(lock)

    async def _serve(self) -> None:
        server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_send_message_length", 256 << 20),
                ("grpc.so_reuseport", 0),
            ]
        )
        bus = ControlBus(control_socket())
        rpc.add_TelemetryServicer_to_server(Intake(self._runs), server)
        rpc.add_MonitorServicer_to_server(self._monitor, server)
        rpc.add_ControlServicer_to_server(Control(self._runs, bus), server)
        health = HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(health, server)
        names = [pb.DESCRIPTOR.services_by_name[name].full_name for name in _SERVICES]
        reflection.enable_server_reflection(
            (*names, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name), server
        )

        self._socket.unlink(missing_ok=True)  # the lock is ours: whoever left it is gone
        before = os.umask(0o177)
        try:
            server.add_insecure_port(f"unix:{self._socket}")
            await server.start()
        finally:
            os.umask(before)
        for name in ("", *names):
            await health.set(name, health_pb2.HealthCheckResponse.SERVING)

        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end.set)
        duties = [bus.serve(), self._refresh(), self._sample(), self._sync()]
        tasks = [asyncio.create_task(duty) for duty in duties]
        for task in tasks:
            task.add_done_callback(self._ended)
        _log.info("pid %d serves %s", os.getpid(), self._socket)
        try:
            await self._end.wait()
        finally:
            self._socket.unlink(missing_ok=True)
            await server.stop(_GRACE_S)
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            self._runs.close()
            bus.close()
        _log.info("ended")
        for result in results:
            if isinstance(result, Exception):
                raise result

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("a bug ends the daemon", exc_info=error)
            self._end.set()

    async def _refresh(self) -> None:
        idle_since = time.monotonic()
        while True:
            self._runs.refresh()
            if self._runs.is_busy() or self._monitor.num_watchers:
                idle_since = time.monotonic()
            elif self._idle_s and time.monotonic() - idle_since >= self._idle_s:
                _log.info("idle for %.0f s", self._idle_s)
                self._end.set()
            await asyncio.sleep(min(REFRESH_S, self._idle_s / 2 if self._idle_s else REFRESH_S))

    async def _sample(self) -> None:
        sampler = HardwareSampler(await asyncio.to_thread(open_gpu_driver))
        while True:
            if self._runs.live():
                sample = await asyncio.to_thread(sampler.sample)
                self._runs.set_hardware(sample, time.time())
            await asyncio.sleep(HARDWARE_S)

    async def _sync(self) -> None:
        while True:
            await self._runs.wait_urgent(SYNC_S)
            await self._runs.sync()


def _lock(socket: Path) -> int:
    """Take the lock that one daemon a runtime folder holds; it goes with the process, however that ends."""
    descriptor = os.open(socket.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise AlreadyRunning(socket) from error
    return descriptor
