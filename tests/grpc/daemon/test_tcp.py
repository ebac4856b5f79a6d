"""The daemon beyond its node: TLS, token, what is refused, messages that are wrong, a head that others forward to."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket as sockets
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from distui.core.errors import DaemonUnavailable, UserError
from distui.core.telemetry.endpoint import Endpoint, secrets_dir, split_address
from distui.daemon import __main__ as daemon_main
from distui.launcher import cli
from distui.launcher.job.daemon_client import get_snapshot
from distui.proto import telemetry_pb2 as pb
from distui.proto import telemetry_pb2_grpc as rpc

if TYPE_CHECKING:
    from tests.grpc.simulated_ranks import Node, SimulatedRank

TIMEOUT_S = 120.0


@pytest.fixture
def ranks() -> type[SimulatedRank]:
    found: type[SimulatedRank] = sys.modules["tests.grpc.simulated_ranks"].SimulatedRank
    return found


def _address(node: Node, scheme: str) -> str:
    info = node.monitor.GetDaemonInfo(pb.DaemonInfoRequest(), timeout=TIMEOUT_S)
    return next(where.partition("://")[2] for where in info.addresses if where.startswith(scheme))


def _code(call: Callable[[], Iterable[object]]) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as error:
        list(call())
    return error.value.code()


def test_tls_and_token(node: Node, ranks: type[SimulatedRank], tmp_path: Path) -> None:
    node.start("--listen", "127.0.0.1:0")
    run = node.run()
    ranks(run, 0).started().steps(1, 3).publish()
    endpoint = Endpoint.tcp(_address(node, "tls"))
    assert get_snapshot(endpoint, run.run_id).ranks[0].step == 3
    for path in ("token", "key.pem"):
        assert (secrets_dir() / path).stat().st_mode & 0o077 == 0

    for token, words in (("x" * 43, "the token is wrong"), ("", "a token is needed")):
        with pytest.raises(UserError, match=words):
            get_snapshot(Endpoint(endpoint.target, token, endpoint.certificate), "")
    with endpoint.channel() as channel:
        watch = rpc.MonitorStub(channel).Watch
        assert _code(lambda: watch(pb.WatchRequest(), timeout=TIMEOUT_S)) is grpc.StatusCode.UNAUTHENTICATED
        check = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
        assert check.status == health_pb2.HealthCheckResponse.SERVING  # a probe needs no token
        # Read-only unless allowed: neither control nor telemetry.
        execute, publish = rpc.ControlStub(channel).Execute, rpc.TelemetryStub(channel).Publish
        request = pb.ControlRequest(run_id=run.run_id, verb="stop")
        refused = _code(lambda: execute(request, timeout=TIMEOUT_S, metadata=endpoint.metadata))
        assert refused is grpc.StatusCode.PERMISSION_DENIED
        refused = _code(lambda: publish(iter([pb.Batch()]), timeout=TIMEOUT_S, metadata=endpoint.metadata))
        assert refused is grpc.StatusCode.PERMISSION_DENIED

    stranger = _certificate(tmp_path, "20200101000000Z", "20900101000000Z")
    with pytest.raises(DaemonUnavailable):
        get_snapshot(Endpoint(endpoint.target, endpoint.token, stranger[0].read_bytes()), "", timeout_s=3)
    plaintext = Endpoint(endpoint.target, endpoint.token)
    with pytest.raises(DaemonUnavailable):
        get_snapshot(plaintext, "", timeout_s=3)


def test_status_of_another_node(node: Node, ranks: type[SimulatedRank], capsys: pytest.CaptureFixture[str]) -> None:
    node.start("--listen", "localhost:0", "--plaintext", "--allow-control")
    run = node.run()
    ranks(run, 0).started().steps(1, 3).publish()
    address = _address(node, "plaintext")
    assert cli.run(["status", address, "--plaintext", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["run"] == run.run_id
    assert cli.run(["status", address, "absent", "--plaintext"]) == 2
    assert cli.run(["status", address, "b:1", "--plaintext"]) == 2
    assert "--accept-runs" in capsys.readouterr().err
    assert cli.run(["status", "192.0.2.1:7270", "--plaintext"]) == 2
    assert "plaintext is refused on 192.0.2.1" in capsys.readouterr().err


def test_an_expired_certificate_is_refused(node: Node, tmp_path: Path) -> None:
    certificate, key = _certificate(tmp_path, "20200101000000Z", "20200201000000Z")
    node.start("--listen", "localhost:0", "--tls-cert", str(certificate), "--tls-key", str(key))
    endpoint = Endpoint.tcp(_address(node, "tls"), certificate_file=certificate)
    with pytest.raises(DaemonUnavailable):
        get_snapshot(endpoint, "", timeout_s=3)


def test_messages_that_are_wrong(node: Node, ranks: type[SimulatedRank]) -> None:
    node.start("--listen", "localhost:0", "--plaintext")
    run = node.run()
    ranks(run, 0).started().steps(1, 3).publish()
    address = _address(node, "plaintext")
    endpoint = Endpoint.tcp(address, plaintext=True)
    with endpoint.channel() as channel:
        get = rpc.MonitorStub(channel).GetSnapshot
        large = pb.SnapshotRequest(run_id="x" * (2 << 20))
        with pytest.raises(grpc.RpcError) as error:
            get(large, timeout=TIMEOUT_S, metadata=endpoint.metadata)
        assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        raw = channel.unary_unary("/distui.v1.Monitor/GetSnapshot", bytes, bytes)
        with pytest.raises(grpc.RpcError) as error:
            raw(b"\xff\xff\xff\xff", timeout=TIMEOUT_S, metadata=endpoint.metadata)
        assert "Error parsing message" in (error.value.details() or "")
    with sockets.create_connection(split_address(address), TIMEOUT_S) as noise:
        noise.sendall(os.urandom(4096))
        noise.shutdown(sockets.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):  # it may not have read all of it
            while noise.recv(4096):
                pass  # it says what it thinks of it, and hangs up
    assert get_snapshot(endpoint, run.run_id).ranks[0].step == 3  # and serves on


def test_a_watcher_that_does_not_read_holds_nobody_up(node: Node, ranks: type[SimulatedRank]) -> None:
    node.start()
    run = node.run(world_size=1)
    rank = ranks(run, 0, world_size=1).started().steps(1, 2000)
    rank.publish()
    stream = node.monitor.Watch(pb.WatchRequest(run_id=run.run_id, interval_s=0.05), timeout=TIMEOUT_S)
    next(stream)
    for first in range(2001, 12001, 500):
        assert rank.steps(first, first + 499).publish() == rank.seq
    node.wait(run, lambda snapshot: snapshot.ranks[0].step == 12000)
    stream.cancel()


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--listen", "0.0.0.0:0", "--plaintext"], "plaintext is refused on 0.0.0.0"),
        (["--listen", "nonsense"], "'nonsense' is no address"),
        (["--listen", "localhost:99999"], "'localhost:99999' is no address"),
        (["--listen", "localhost:0", "--tls-cert", "c.pem"], "TLS needs a certificate and its key"),
        (["--listen", "localhost:0", "--tls-cert", "c.pem", "--tls-key", "k.pem"], "cannot read c.pem"),
        (["--listen", "localhost:0", "--token-file", "short"], "the token in short is too short"),
        (["--listen", "localhost:0", "--token-file", "open"], "others can read the token open"),
        (["--listen", "192.0.2.1:7270"], "the daemon cannot listen on 192.0.2.1:7270"),
        (["--allow-control"], "--allow-control without --listen"),
        (["--forward", "head:7270", "--forward-token", "absent"], "cannot read the daemon's token absent"),
        (["--keep-days", "-1"], "--keep-days -1 is below 0"),
    ],
)
def test_refused_before_anything_starts(
    node: Node,
    arguments: list[str],
    what: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    umask = os.umask(0o077)
    try:
        Path("short").write_text("abc")
        Path("open").write_text("x" * 40)
        Path("open").chmod(0o644)
        assert daemon_main.main(arguments) == 2
    finally:
        os.umask(umask)
    first, why, fix = capsys.readouterr().err.strip().splitlines()[-3:]
    assert what in first and why.startswith("  why: ") and fix.startswith("  fix: ")


def test_a_head_shows_what_a_node_forwards_and_loses_nothing(
    node: Node, ranks: type[SimulatedRank], tmp_path: Path
) -> None:
    head = sys.modules["tests.grpc.simulated_ranks"]
    other = tmp_path / "head"
    (other / "r").mkdir(parents=True, mode=0o700)
    environment = {"DISTUI_STATE_DIR": str(other / "s"), "DISTUI_RUNTIME_DIR": f"/tmp/{node.folder.name}/h"}
    Path(environment["DISTUI_RUNTIME_DIR"]).mkdir(mode=0o700)
    process, port = _head(environment, "0")
    try:
        token, ca = other / "s" / "daemon" / "token", other / "s" / "daemon" / "cert.pem"
        forward = ["--forward", f"127.0.0.1:{port}", "--forward-token", str(token), "--forward-ca", str(ca)]
        node.start(*forward)
        run = node.run()
        ranks(run, -1).add(run_started=pb.RunStarted(name="train", world_size=2, strategy="ZeRO-3")).publish()
        first, second = ranks(run, 0).started(), ranks(run, 1).started()
        batches = [first.steps(1, 50).batch()]
        endpoint = Endpoint.tcp(f"127.0.0.1:{port}", token, ca)
        publish = _open_stream(head, [*batches, second.steps(1, 50).batch()])
        snapshot = _until(endpoint, run.run_id, 50)
        assert snapshot.run.strategy == "ZeRO-3" and snapshot.run.world_size == 2
        process.kill()
        process.wait()
        first.records.clear()
        second.records.clear()
        publish += _open_stream(head, [first.steps(51, 90).batch(), second.steps(51, 90).batch()])
        process, _ = _head(environment, str(port))
        assert _until(endpoint, run.run_id, 90).dropped == 0
        for call in publish:
            call.cancel()
        end = pb.RunFinished(state="finished")
        ranks(run, -1).add(run_finished=end).publish(close=True)
        deadline = time.monotonic() + TIMEOUT_S
        while (snapshot := get_snapshot(endpoint, run.run_id)).run.state != "finished":
            assert time.monotonic() < deadline, (snapshot, (node.folder / "daemon.log").read_text())
        folder = other / "s" / "runs" / run.run_id
        assert json.loads((folder / "outcome.json").read_text())["state"] == "finished"
    finally:
        process.kill()
        process.wait()


def _head(environment: dict[str, str], port: str) -> tuple[subprocess.Popen[bytes], int]:
    reader, writer = os.pipe()
    command = [sys.executable, "-m", "distui.daemon", "--listen", f"127.0.0.1:{port}", "--accept-runs"]
    process = subprocess.Popen(
        [*command, "--ready-fd", str(writer)],
        pass_fds=[writer],
        env={**os.environ, **environment},
        stderr=subprocess.DEVNULL,
        cwd="/",
    )
    os.close(writer)
    with open(reader) as ready:
        socket = ready.readline().strip()
    with Endpoint.unix(Path(socket)).channel() as channel:
        info = rpc.MonitorStub(channel).GetDaemonInfo(pb.DaemonInfoRequest(), timeout=TIMEOUT_S)
    address = next(where.partition("://")[2] for where in info.addresses if where.startswith("tls"))
    return process, split_address(address)[1]


def _open_stream(module: object, batches: list[pb.Batch]) -> list[grpc.Call]:
    """Publish each batch on a stream that stays open, as a living rank's does."""
    import threading

    calls = []
    for batch in batches:
        waiting = threading.Event()

        def requests(batch: pb.Batch = batch, waiting: threading.Event = waiting):
            yield batch
            waiting.wait(TIMEOUT_S)

        channel = module.channel()  # type: ignore[attr-defined]
        call = rpc.TelemetryStub(channel).Publish(requests(), timeout=TIMEOUT_S)
        next(call)
        calls.append(call)
    return calls


def _until(endpoint: Endpoint, run_id: str, step: int) -> pb.Snapshot:
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        try:
            snapshot = get_snapshot(endpoint, run_id)
            if len(snapshot.ranks) == 2 and all(rank.step == step for rank in snapshot.ranks):
                return snapshot
        except (UserError, DaemonUnavailable):
            snapshot = pb.Snapshot()  # the head does not know it yet
        assert time.monotonic() < deadline, snapshot


def _certificate(folder: Path, begins: str, ends: str) -> tuple[Path, Path]:
    """Make a certificate of localhost that is good from `begins` to `ends`."""
    key, request, certificate = folder / "k.pem", folder / "r.pem", folder / "c.pem"
    (folder / "index").write_text("")
    (folder / "serial").write_text("01\n")
    (folder / "ca.cnf").write_text(
        "[ca]\ndefault_ca=own\n[own]\n"
        f"dir={folder}\ndatabase={folder}/index\nserial={folder}/serial\nnew_certs_dir={folder}\ndefault_md=sha256\n"
        "policy=any\nx509_extensions=names\n[any]\ncommonName=supplied\n"
        "[names]\nsubjectAltName=DNS:localhost,IP:127.0.0.1\nbasicConstraints=CA:true\n"
    )
    new = ["openssl", "req", "-new", "-nodes", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    subprocess.run([*new, "-subj", "/CN=x", "-keyout", key, "-out", request], check=True, capture_output=True)
    sign = ["openssl", "ca", "-batch", "-selfsign", "-config", str(folder / "ca.cnf"), "-keyfile", str(key)]
    subprocess.run(
        [*sign, "-in", request, "-startdate", begins, "-enddate", ends, "-notext", "-out", certificate],
        check=True,
        capture_output=True,
    )
    return certificate, key


def test_the_daemon_ends_in_good_order_with_streams_open(node: Node) -> None:
    node.start("--listen", "localhost:0", "--plaintext", "--metrics", "127.0.0.1:0")
    assert node.kill(signal.SIGTERM) == 0
