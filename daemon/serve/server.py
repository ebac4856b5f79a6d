"""The daemon of a node: one event loop that serves telemetry, watchers and control on Unix sockets."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from distui.core.errors import UserError
from distui.core.paths import control_socket, daemon_socket, socket_path
from distui.core.telemetry.endpoint import Endpoint
from distui.daemon.diagnosis.nccl_ras import RasWatch
from distui.daemon.node.hardware import HardwareSampler
from distui.daemon.node.processes import raise_file_limit
from distui.daemon.runs.retention import Retention, prune
from distui.daemon.serve.control import Control, ControlBus
from distui.daemon.serve.forward import Forwarder
from distui.daemon.serve.intake import MAX_BATCH_BYTES, Telemetry, folder_of_another_node, run_folder
from distui.daemon.serve.live import LiveRuns
from distui.daemon.serve.metrics import MetricsServer, RunsCollector
from distui.daemon.serve.monitor import Monitor
from distui.daemon.serve.security import MAX_REQUEST_BYTES, Gate, TcpOptions, caller_options
from distui.daemon.serve.service_manager import notify, watchdog_s
from distui.daemon.tree.leaf import own_part
from distui.daemon.tree.relay import Relay
from distui.proto import rollup_pb2_grpc
from distui.proto import telemetry_pb2 as pb
from distui.proto import telemetry_pb2_grpc as rpc

TICK_S = 1.0
PRUNE_EVERY_S = 600.0
GRACE_S = 0.5
"""What open streams get when the daemon ends; ranks go on with the next daemon."""
SERVICES = ("distui.v1.Telemetry", "distui.v1.Monitor", "distui.v1.Control", "distui.v1.Federation")

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


@dataclass(frozen=True, slots=True)
class DaemonOptions:
    """What a daemon is asked to do."""

    idle_s: float
    """It ends by itself after so long in which nobody needs it; 0: never."""
    retention: Retention
    tcp: TcpOptions | None = None
    metrics: TcpOptions | None = None
    head: Endpoint | None = None
    """The daemon to which this one's runs are forwarded."""
    parent: Endpoint | None = None
    """The daemon to which this one rolls its runs up, in a job on many nodes."""
    node_name: str = ""
    """What the job calls this node; else it is the host's own name."""
    hold_fd: int | None = None
    """It ends once the other end of this pipe is closed."""


class Daemon:
    """Everything that one daemon process holds."""

    def __init__(self, options: DaemonOptions) -> None:
        self._options = options
        self._runs = LiveRuns()
        self._relay = Relay(self._runs, options.parent, options.node_name)
        self._runs.ask = self._relay.ask
        self._addresses: list[str] = []
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
        name = self._options.node_name
        keep = (lambda batch: own_part(run_folder(batch), name)) if self._options.parent is not None else run_folder
        rpc.add_TelemetryServicer_to_server(Telemetry(self._runs, keep, forwarded=False), server)
        rpc.add_MonitorServicer_to_server(Monitor(self._runs, self._use, self._addresses), server)
        rpc.add_ControlServicer_to_server(Control(self._runs, bus, self._use), server)
        rollup_pb2_grpc.add_FederationServicer_to_server(self._relay, server)
        status = health.aio.HealthServicer()  # type: ignore[attr-defined]
        health_pb2_grpc.add_HealthServicer_to_server(status, server)
        reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        server.add_insecure_port(f"unix:{socket}")
        self._addresses.append(f"unix:{socket}")
        servers = [server]
        metrics = None
        try:
            if self._options.tcp is not None:
                servers.append(self._tcp_server(self._options.tcp, bus, status))
            if self._options.metrics is not None:
                metrics = self._metrics_server(self._options.metrics)
        except UserError:
            bus.close()
            raise
        for each in servers:
            await each.start()
        for used in (socket, bus_socket):
            os.chmod(used, 0o600)
        for service in ("", *SERVICES):
            await status.set(service, health_pb2.HealthCheckResponse.SERVING)
        work = [bus.serve(), self._look_after(), self._ask_nccl(), self._relay.serve()]
        if self._options.head is not None:
            work.append(Forwarder(self._runs, self._options.head).serve())
        tasks = [asyncio.create_task(each) for each in work]
        for task in tasks:
            task.add_done_callback(self._task_ended)
        _log.info("serving on %s", socket)
        if (hold := self._options.hold_fd) is not None:
            asyncio.get_running_loop().add_reader(hold, self.end)  # nothing is ever written: it has ended
        on_ready()
        notify("READY=1")
        try:
            await self._ended.wait()
        finally:
            _log.info("ending")
            notify("STOPPING=1")
            await status.enter_graceful_shutdown()
            await asyncio.gather(*(each.stop(GRACE_S) for each in servers))
            if metrics is not None:
                await asyncio.to_thread(metrics.close)
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

    def _tcp_server(self, tcp: TcpOptions, bus: ControlBus, status: health_pb2_grpc.HealthServicer) -> grpc.aio.Server:
        """Return the server beyond this node: the same services, behind the token. Raises: UserError."""
        largest = MAX_BATCH_BYTES if tcp.accept else MAX_REQUEST_BYTES
        options = [("grpc.max_receive_message_length", largest), *_OPTIONS[1:], *caller_options()]
        server = grpc.aio.server(options=options, interceptors=[Gate(tcp)])
        rpc.add_TelemetryServicer_to_server(
            Telemetry(self._runs, lambda batch: folder_of_another_node(batch, self._runs), forwarded=True), server
        )
        rpc.add_MonitorServicer_to_server(Monitor(self._runs, self._use, self._addresses), server)
        rpc.add_ControlServicer_to_server(Control(self._runs, bus, self._use), server)
        rollup_pb2_grpc.add_FederationServicer_to_server(self._relay, server)
        health_pb2_grpc.add_HealthServicer_to_server(status, server)
        reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        credentials = tcp.credentials()
        try:
            if credentials is None:
                port = server.add_insecure_port(tcp.address)
            else:
                port = server.add_secure_port(tcp.address, credentials)
        except RuntimeError as error:
            raise _cannot_listen(tcp, str(error)) from error
        form = "plaintext" if credentials is None else "tls"
        self._addresses.append(f"{form}://{replace(tcp, port=port).address}")
        _log.info("listening on %s", self._addresses[-1])
        return server

    def _metrics_server(self, tcp: TcpOptions) -> MetricsServer:
        try:
            metrics = MetricsServer(tcp, RunsCollector(self._runs, asyncio.get_running_loop()))
        except OSError as error:
            raise _cannot_listen(tcp, error.strerror or str(error)) from error
        scheme = "http" if tcp.certificate is None else "https"
        self._addresses.append(f"{scheme}://{replace(tcp, port=metrics.port).address}/metrics")
        readers = "" if tcp.token else "; every user of this node can read them: --metrics-token asks for the token"
        _log.info("metrics on %s%s", self._addresses[-1], readers)
        return metrics

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            self._ended.set()  # it never returns: it has failed, and `serve` raises what it raised

    def _use(self) -> None:
        self._used_s = time.monotonic()

    async def _ask_nccl(self) -> None:
        """Once a second, but beside all else, for an answer may take long: see whether NCCL is to be asked."""
        ras = RasWatch()
        while True:
            await asyncio.sleep(TICK_S)
            await ras.look(list(self._runs.runs.values()))

    async def _look_after(self) -> None:
        """Once a second: sample the hardware, look after the runs, flush, and see whether anybody is there."""
        sampler = await asyncio.to_thread(HardwareSampler)
        next_s = time.monotonic()
        next_prune_s = next_s
        beat_s, next_beat_s = watchdog_s(), next_s
        while True:
            next_s = max(next_s + TICK_S, time.monotonic())
            await asyncio.sleep(next_s - time.monotonic())
            live = [run for run in self._runs.runs.values() if run.alive()]
            if live:
                hardware = await asyncio.to_thread(sampler.sample)
                for run in live:
                    if run.state.many is None:  # its nodes tell of theirs
                        run.say(pb.Record(hardware=hardware))
            self._runs.tick()
            await asyncio.to_thread(self._runs.flush)
            if beat_s is not None and time.monotonic() >= next_beat_s:
                next_beat_s = time.monotonic() + beat_s / 2
                notify("WATCHDOG=1")
            if time.monotonic() >= next_prune_s:
                next_prune_s = time.monotonic() + PRUNE_EVERY_S
                await asyncio.to_thread(lambda: prune(self._runs.folders(), self._options.retention))
            if live or self._runs.num_watchers():
                self._use()
            elif self._options.idle_s and time.monotonic() - self._used_s >= self._options.idle_s:
                _log.info("nobody has needed the daemon for %g s", self._options.idle_s)
                self.end()


def _cannot_listen(tcp: TcpOptions, why: str) -> UserError:
    return UserError(f"the daemon cannot listen on {tcp.address}", why, "name an address of this node and a free port")


async def run_daemon(options: DaemonOptions, on_ready: Callable[[Path], None]) -> None:
    """Serve on this node until SIGTERM, SIGINT or idleness; `on_ready` gets the socket when it answers."""
    raise_file_limit()
    daemon = Daemon(options)
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, daemon.end)
    await daemon.serve(lambda: on_ready(daemon_socket()))
