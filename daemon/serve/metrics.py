"""Prometheus: `/metrics` over HTTP, one scrape a snapshot of every run that is in memory.

Labels name run, node, rank and GPU; never a step or a sequence number, which would make a series each.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import math
import socket as sockets
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from socketserver import ThreadingMixIn
from typing import Any, Literal
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import psutil
from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric

from distui.daemon.runs.state import RunState
from distui.daemon.serve.live import LiveRun, LiveRuns
from distui.daemon.serve.monitor import own_version
from distui.daemon.serve.security import TcpOptions
from distui.proto import telemetry_pb2 as pb

SCRAPE_TIMEOUT_S = 5.0
CALL_S = 10.0
"""From a caller's connection to the end of its answer, the TLS handshake and the header included."""
MAX_CALLERS = 32
MAX_OF_ONE_ADDRESS = 8
_log = logging.getLogger("distui.daemon")

_RANK = ["run", "node", "rank"]
_PHASES = ("data_wait", "forward", "backward", "exposed_comm", "optimizer")


class RunsCollector:
    """Reads the runs on the daemon's loop, whenever Prometheus asks on its own thread."""

    def __init__(self, runs: LiveRuns, loop: asyncio.AbstractEventLoop) -> None:
        self._runs, self._loop, self._process = runs, loop, psutil.Process()

    def collect(self) -> Iterable[Metric]:
        """Yield all metrics as they are now."""
        return asyncio.run_coroutine_threadsafe(self._on_loop(), self._loop).result(SCRAPE_TIMEOUT_S)

    async def _on_loop(self) -> list[Metric]:
        return [*self._own(), *run_metrics([live for live in self._runs.runs.values() if not live.ended()])]

    def _own(self) -> Iterator[Metric]:
        times = self._process.cpu_times()
        build = InfoMetricFamily("distui_build", "Version of distui.")
        build.add_metric([], {"version": own_version()})
        yield build
        yield CounterMetricFamily("distui_daemon_cpu_seconds", "CPU time of the daemon.", times.user + times.system)
        rss = self._process.memory_info().rss
        yield GaugeMetricFamily("distui_daemon_resident_bytes", "Resident memory of the daemon.", rss)
        yield GaugeMetricFamily("distui_daemon_watchers", "Watchers of all runs.", self._runs.num_watchers())


def run_metrics(runs: list[LiveRun]) -> Iterator[Metric]:
    """Yield what is known of runs; what is not available has no sample."""
    snapshots = [(live.state, live.snapshot()) for live in runs]
    info = InfoMetricFamily("distui_run", "A run that has not ended.", labels=["run"])
    dropped = CounterMetricFamily("distui_records_dropped", "Telemetry records lost.", labels=["run"])
    diagnoses = GaugeMetricFamily("distui_diagnoses", "What is wrong just now.", labels=["run", "kind"])
    stalled = GaugeMetricFamily(
        "distui_collective_stalled_seconds", "How long a collective has waited for ranks.", labels=["run", "group"]
    )
    for _, snapshot in snapshots:
        run = snapshot.run
        labels = {"state": run.state, "strategy": run.strategy, "name": run.name}
        info.add_metric([run.run_id], labels)
        dropped.add_metric([run.run_id], snapshot.dropped)
        for kind in sorted({found.kind for found in snapshot.diagnosis}):
            diagnoses.add_metric([run.run_id, kind], sum(found.kind == kind for found in snapshot.diagnosis))
        for found in snapshot.diagnosis:
            if found.kind == "hang" and found.group:
                stalled.add_metric([run.run_id, found.group], found.since_s)
    yield from (info, dropped, diagnoses, stalled)
    yield from _step_metrics(snapshots)
    yield from _rank_metrics(snapshots)
    yield from _gpu_metrics(snapshots)


def _step_metrics(snapshots: list[tuple[RunState, pb.Snapshot]]) -> Iterator[Metric]:
    gauges = {
        "step_s": GaugeMetricFamily("distui_step_seconds", "Time of the last step, mean of ranks.", labels=["run"]),
        "tokens_per_s": GaugeMetricFamily("distui_tokens_per_second", "Tokens of all ranks.", labels=["run"]),
        "samples_per_s": GaugeMetricFamily("distui_samples_per_second", "Samples of all ranks.", labels=["run"]),
        "loss": GaugeMetricFamily("distui_loss", "Loss of the last step.", labels=["run"]),
        "grad_norm": GaugeMetricFamily("distui_gradient_norm", "Global norm before clipping.", labels=["run"]),
        "mfu": GaugeMetricFamily("distui_mfu_ratio", "Model FLOPs over the devices' peak.", labels=["run"]),
    }
    phases = GaugeMetricFamily("distui_step_phase_seconds", "Parts of the last step.", labels=["run", "phase"])
    steps = CounterMetricFamily("distui_steps", "Optimizer steps of all ranks.", labels=["run"])
    for state, snapshot in snapshots:
        run_id, last = snapshot.run.run_id, state.steps.history.last()
        if last is None:
            continue
        steps.add_metric([run_id], last.step)
        for name, gauge in gauges.items():
            if name in ("step_s", "tokens_per_s", "samples_per_s") or last.HasField(name):
                gauge.add_metric([run_id], getattr(last, name))
        for phase in _PHASES:
            phases.add_metric([run_id, phase], getattr(last, f"{phase}_s"))
    yield from (*gauges.values(), phases, steps)


def _rank_metrics(snapshots: list[tuple[RunState, pb.Snapshot]]) -> Iterator[Metric]:
    up = GaugeMetricFamily("distui_rank_up", "1 unless the rank is dead.", labels=[*_RANK, "state"])
    step_s = GaugeMetricFamily("distui_rank_step_seconds", "Mean of a rank's last 20 steps.", labels=_RANK)
    allocated = GaugeMetricFamily("distui_memory_allocated_bytes", "Memory that a rank holds.", labels=_RANK)
    category = GaugeMetricFamily("distui_memory_bytes", "Memory by category.", labels=[*_RANK, "category"])
    for _, snapshot in snapshots:
        for rank in snapshot.ranks:
            labels = [snapshot.run.run_id, rank.node, str(rank.rank)]
            up.add_metric([*labels, rank.state], float(rank.state != "dead"))
            if rank.HasField("step_s"):
                step_s.add_metric(labels, rank.step_s)
            if rank.HasField("memory_bytes"):
                allocated.add_metric(labels, rank.memory_bytes)
            for name, num_bytes in sorted(rank.memory.by_category_bytes.items()):
                category.add_metric([*labels, name], num_bytes)
    yield from (up, step_s, allocated, category)


_GPU = {
    "utilization_percent": ("distui_gpu_utilization_percent", "Busy time of a GPU."),
    "memory_used_bytes": ("distui_gpu_memory_used_bytes", "Memory in use on a GPU."),
    "memory_total_bytes": ("distui_gpu_memory_total_bytes", "Memory of a GPU."),
    "power_w": ("distui_gpu_power_watts", "Power that a GPU draws."),
    "temperature_c": ("distui_gpu_temperature_celsius", "Temperature of a GPU."),
}

_GpuError = Literal["ecc_corrected", "ecc_uncorrected", "nvlink_errors", "pcie_replays", "xid_errors"]
_GPU_ERRORS: dict[_GpuError, tuple[str, str]] = {
    "ecc_corrected": ("distui_gpu_ecc_corrected", "Memory errors that were corrected."),
    "ecc_uncorrected": ("distui_gpu_ecc_uncorrected", "Memory errors that were not corrected."),
    "nvlink_errors": ("distui_gpu_nvlink_errors", "Replays, recoveries and checksum errors of all NVLinks."),
    "pcie_replays": ("distui_gpu_pcie_replays", "PCIe packets sent again."),
    "xid_errors": ("distui_gpu_xid_errors", "XID errors since the daemon began to watch."),
}


def _gpu_metrics(snapshots: list[tuple[RunState, pb.Snapshot]]) -> Iterator[Metric]:
    nodes = {state.node: state for _, snapshot in snapshots for state in snapshot.nodes if state.HasField("hardware")}
    for field, (name, words) in _GPU.items():
        gauge = GaugeMetricFamily(name, words, labels=["node", "gpu"])
        for node, state in sorted(nodes.items()):
            for gpu in state.hardware.gpus:
                if gpu.HasField(field):
                    gauge.add_metric([node, str(gpu.index)], getattr(gpu, field))
        yield gauge
    for field, (name, words) in _GPU_ERRORS.items():
        counter = CounterMetricFamily(name, words, labels=["node", "gpu"])
        for node, state in sorted(nodes.items()):
            for gpu in state.hardware.gpus:
                if gpu.HasField(field):
                    counter.add_metric([node, str(gpu.index)], getattr(gpu, field))
        yield counter
    throttled = GaugeMetricFamily(
        "distui_gpu_throttled", "1 while the clocks are held down, by reason.", labels=["node", "gpu", "reason"]
    )
    for node, state in sorted(nodes.items()):
        for gpu in state.hardware.gpus:
            for reason in gpu.throttle_reasons:
                throttled.add_metric([node, str(gpu.index), reason], 1.0)
    yield throttled


class _Server(ThreadingMixIn, WSGIServer):
    """Serves each caller on a thread; whoever is silent, slow, or one too many is hung up on."""

    daemon_threads = True
    request_queue_size = 128
    tls: ssl.SSLContext | None = None

    def __init__(self, *arguments: Any) -> None:
        self._open: dict[sockets.socket, tuple[str, float]] = {}
        self._changing = threading.Lock()
        super().__init__(*arguments)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Tell whether there is room for one more, in all and of this caller's address."""
        with self._changing:
            callers = [caller for caller, _ in self._open.values()]
            return len(callers) < MAX_CALLERS and callers.count(client_address[0]) < MAX_OF_ONE_ADDRESS

    def process_request(self, request: Any, client_address: Any) -> None:
        """Begin a thread, with a deadline for all that it does: the handshake, the header, the answer."""
        if self.tls is not None:
            request = self.tls.wrap_socket(request, server_side=True, do_handshake_on_connect=False)
        with self._changing:
            self._open[request] = (client_address[0], time.monotonic() + CALL_S)
        super().process_request(request, client_address)

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Answer one call, on its thread."""
        if isinstance(request, ssl.SSLSocket):
            request.do_handshake()
        super().finish_request(request, client_address)

    def close_request(self, request: Any) -> None:
        """Close a connection."""
        with self._changing:
            self._open.pop(request, None)
        super().close_request(request)

    def service_actions(self) -> None:
        """Hang up on whoever has had its time; called twice a second."""
        self.hang_up(time.monotonic())

    def hang_up(self, deadline_s: float) -> None:
        """End the calls whose time is over by then: their threads find their connection closed."""
        with self._changing:
            for request in [one for one, (_, until_s) in self._open.items() if until_s <= deadline_s]:
                with contextlib.suppress(OSError):  # it hung up itself
                    sockets.socket.shutdown(request, sockets.SHUT_RDWR)  # not TLS's own, which would wait

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Note that a caller went away, or did not speak TLS."""
        _log.debug("metrics: %s: %s", client_address, sys.exc_info()[1])


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        _log.debug(format, *args)


class MetricsServer:
    """Serves `/metrics` on a thread of its own, to whoever brings the token; to all where the options have none."""

    def __init__(self, options: TcpOptions, collector: RunsCollector) -> None:
        """Listen at once. Raises: OSError."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(collector)
        app = make_wsgi_app(registry)
        if options.token:
            app = _with_token(app, options.token)
        self._server = make_server(options.host, options.port, app, server_class=_Server, handler_class=_Quiet)
        if options.certificate is not None:
            self._server.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            _load_chain(self._server.tls, options)
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return int(self._server.server_port)

    def close(self) -> None:
        """Hang up on everybody and end the thread."""
        self._server.shutdown()
        self._server.hang_up(math.inf)
        self._server.server_close()


def _load_chain(context: ssl.SSLContext, options: TcpOptions) -> None:
    import tempfile

    # ssl reads only files.
    with tempfile.NamedTemporaryFile(suffix=".pem") as file:
        file.write((options.key or b"") + b"\n" + (options.certificate or b""))
        file.flush()
        context.load_cert_chain(file.name)


def _with_token(app: Callable[..., Any], token: str) -> Callable[..., Any]:
    expected = f"Bearer {token}".encode()

    def guarded(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        if hmac.compare_digest(str(environ.get("HTTP_AUTHORIZATION", "")).encode(), expected):
            return app(environ, start_response)
        start_response("401 Unauthorized", [("WWW-Authenticate", "Bearer"), ("Content-Type", "text/plain")])
        return [b"a token is needed: authorization: Bearer ...\n"]

    return guarded
