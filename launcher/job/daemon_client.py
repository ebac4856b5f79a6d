"""The launcher's blocking calls to the daemon. Import it late: it loads grpc."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # before grpc loads: this process starts others

import grpc

from distui.core.errors import DaemonUnavailable, UserError
from distui.core.paths import RunFolder, check_run_id
from distui.core.telemetry.endpoint import Endpoint
from distui.core.telemetry.harmless import harmless, make_harmless
from distui.proto import telemetry_pb2 as pb
from distui.proto import telemetry_pb2_grpc as rpc

CALL_TIMEOUT_S = 5.0
REFUSALS = frozenset({grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.PERMISSION_DENIED})


@contextmanager
def channel_to(daemon: Path | Endpoint) -> Iterator[grpc.Channel]:
    """Open a channel to a daemon, by its socket or wherever it answers, for the block.

    Raises:
        UserError: the daemon does not know the run, or refuses the request.
        DaemonUnavailable: it does not answer.
    """
    with _endpoint(daemon).channel() as channel:
        try:
            yield channel
        except grpc.RpcError as error:
            code, details = error.code(), harmless(error.details() or "")
            if code in REFUSALS:
                raise UserError("the daemon refused the request", details, "distui status names the runs") from error
            if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
                fix = "bring the token of that daemon with --token-file, or ask whoever runs it"
                raise UserError("the daemon does not let you in", details, fix) from error
            raise DaemonUnavailable(f"{code.name}: {_endpoint(daemon).why(details)}") from error


def _endpoint(daemon: Path | Endpoint) -> Endpoint:
    return Endpoint.unix(daemon) if isinstance(daemon, Path) else daemon


def publish(socket: Path, batch: pb.Batch, timeout_s: float = 2.0) -> int:
    """Send one batch and return the sequence number that the daemon acknowledged."""
    with channel_to(socket) as channel:
        acked = 0
        for ack in rpc.TelemetryStub(channel).Publish(iter([batch]), timeout=timeout_s, wait_for_ready=True):
            acked = max(acked, ack.seq)
        return acked


def get_snapshot(
    daemon: Path | Endpoint, run_id: str, timeout_s: float = CALL_TIMEOUT_S, node: str = ""
) -> pb.Snapshot:
    """Return the daemon's view of a run, "" being the newest; with all ranks of `node`, where it has too many."""
    request, metadata = pb.SnapshotRequest(run_id=run_id, node=node), _endpoint(daemon).metadata
    with channel_to(daemon) as channel:
        snapshot: pb.Snapshot = rpc.MonitorStub(channel).GetSnapshot(request, timeout=timeout_s, metadata=metadata)
        make_harmless(snapshot)
        check_run_id(snapshot.run.run_id)  # it names files and arguments from here on
        return snapshot


def snapshot_of(run: RunFolder, node: str = "") -> pb.Snapshot:
    """Return a run's snapshot: the daemon's where one is alive and knows the run, else what is on disk."""
    from distui.core.paths import daemon_socket
    from distui.daemon.node.spawn import daemon_alive
    from distui.daemon.runs.snapshot import read_snapshot

    if daemon_alive():
        try:
            snapshot = get_snapshot(daemon_socket(), run.run_id, node=node)
            if Path(snapshot.run.run_dir) == run.path.resolve():
                return snapshot
        except (DaemonUnavailable, UserError):
            return read_snapshot(run)  # it ended meanwhile, or keeps another folder of runs
    return read_snapshot(run)  # also where the daemon knows another run of this name


def execute(
    daemon: Path | Endpoint, run_id: str, verb: str, arguments: Mapping[str, str], deadline_s: float
) -> Iterator[pb.ControlReply]:
    """Have the daemon act on a run and yield what each rank answers."""
    request = pb.ControlRequest(run_id=run_id, verb=verb, arguments=dict(arguments), deadline_s=deadline_s)
    metadata = _endpoint(daemon).metadata
    with channel_to(daemon) as channel:
        calls = rpc.ControlStub(channel).Execute(request, timeout=deadline_s + CALL_TIMEOUT_S, metadata=metadata)
        for reply in calls:
            make_harmless(reply)
            yield reply
