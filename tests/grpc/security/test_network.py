"""Callers who bring no token: silent ones, slow ones, a thousand idle ones; what they see; how the daemon ends."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket as sockets
import ssl
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from distui.core.errors import DaemonUnavailable
from distui.core.telemetry.endpoint import Endpoint, certificate_names, secrets_dir, split_address
from distui.daemon.serve import security
from distui.launcher import cli
from distui.launcher.job.daemon_client import get_snapshot
from distui.proto import telemetry_pb2 as pb
from tests.grpc.security.hostile import Stranger

if TYPE_CHECKING:
    from tests.grpc.simulated_ranks import Node

TIMEOUT_S = 120.0
FEW_FILES = 300


def _address(node: Node, scheme: str) -> tuple[str, int]:
    """Return where the daemon answers; 127.0.0.1 where that is everywhere."""
    info = node.monitor.GetDaemonInfo(pb.DaemonInfoRequest(), timeout=TIMEOUT_S)
    found = next(where.partition("://")[2] for where in info.addresses if where.startswith(f"{scheme}://"))
    host, port = split_address(found.removesuffix("/metrics"))
    return ("127.0.0.1" if host == "0.0.0.0" else host), port


def _scrape(node: Node, token: bool = True) -> bytes:
    host, port = _address(node, "https")
    context = ssl.create_default_context(cafile=str(secrets_dir() / "cert.pem"))
    secret = (secrets_dir() / "token").read_text().strip()
    headers = {"Authorization": f"Bearer {secret}"} if token else {}
    request = urllib.request.Request(f"https://{host}:{port}/metrics", headers=headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT_S, context=context) as answer:
        data: bytes = answer.read()
    return data


@pytest.fixture
def idle() -> Iterator[ExitStack]:
    """Give a stack for connections that stay open until the test's end."""
    with ExitStack() as stack:
        yield stack


def _connect(idle: ExitStack, address: tuple[str, int], number: int) -> list[sockets.socket]:
    return [idle.enter_context(sockets.create_connection(address, TIMEOUT_S)) for _ in range(number)]


def test_silent_and_slow_callers_hold_up_neither_scrapes_nor_the_end(node: Node, idle: ExitStack) -> None:
    node.start("--metrics", "0.0.0.0:0")
    address = _address(node, "https")
    _connect(idle, address, 2)  # say nothing: the handshake waits
    half = _connect(idle, address, 1)[0]
    half.sendall(b"\x16\x03\x01")  # the beginning of a handshake
    context = ssl.create_default_context(cafile=str(secrets_dir() / "cert.pem"))
    slow = idle.enter_context(context.wrap_socket(_connect(idle, address, 1)[0], server_hostname="127.0.0.1"))
    slow.sendall(b"GET /metrics HTTP/1.1\r\nX-Slow: ")
    assert b"distui_build_info" in _scrape(node)
    assert node.kill(signal.SIGTERM) == 0


def test_whoever_does_not_come_to_the_point_is_hung_up_on(node: Node, idle: ExitStack) -> None:
    node.start("--metrics", "127.0.0.1:0", "--listen", "127.0.0.1:0")
    silent = [_connect(idle, _address(node, scheme), 1)[0] for scheme in ("http", "tls")]
    trickling = _connect(idle, _address(node, "http"), 1)[0]
    trickling.sendall(b"GET /metrics HTTP/1.1\r\n")
    trickling.settimeout(0.5)
    with pytest.raises(ConnectionError):
        while True:  # a header that never ends; each byte comes in time
            trickling.sendall(b"x")
            with contextlib.suppress(TimeoutError):
                if not trickling.recv(4096):
                    raise ConnectionResetError
    for caller in silent:
        while caller.recv(4096):  # gRPC says its settings first
            pass


def test_a_thousand_idle_callers_leave_room_for_this_user(
    node: Node, idle: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit of open files is low and cannot be raised, so only the caps help."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nulimit -n {FEW_FILES}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    idle.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", str(python))
        node.start("--listen", "127.0.0.1:0", "--metrics", "0.0.0.0:0")
    ranks = sys.modules["tests.grpc.simulated_ranks"]
    for scheme in ("tls", "https"):
        _connect(idle, _address(node, scheme), 500)
    assert node.daemon is not None
    assert len(os.listdir(f"/proc/{node.daemon.pid}/fd")) < FEW_FILES // 2
    run = node.run("mine", world_size=8)
    for rank in range(8):
        ranks.SimulatedRank(run, rank, world_size=8).started().steps(1, 2).publish()
    assert [rank.step for rank in node.snapshot(run).ranks] == [2] * 8
    assert node.kill(signal.SIGTERM) == 0


def test_the_limit_of_open_files_is_raised(node: Node) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(hard, 1 << 16)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
    try:
        daemon = node.start()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE) == (wanted, hard)


def test_without_a_token_only_health_is_told_and_only_once(node: Node) -> None:
    node.start("--listen", "127.0.0.1:0")
    host, port = _address(node, "tls")
    endpoint = Endpoint(f"{host}:{port}", "", (secrets_dir() / "cert.pem").read_bytes())
    with endpoint.channel() as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        assert stub.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S).status
        with pytest.raises(grpc.RpcError) as error:
            next(stub.Watch(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S))  # would hold a stream open
        assert error.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_every_user_reads_metrics_on_loopback_unless_the_token_is_asked_for(node: Node, stranger: Stranger) -> None:
    node.folder.chmod(0o755)
    read = 'exec 3<>/dev/tcp/127.0.0.1/"$1"; printf "GET /metrics HTTP/1.0\\r\\n\\r\\n" >&3; cat <&3 >"$2"'
    out = node.folder / "read"
    for arguments, status in (((), "200 OK"), (("--metrics-token",), "401 Unauthorized")):
        node.start("--metrics", "127.0.0.1:0", *arguments)
        out.write_text("")
        out.chmod(0o666)
        stranger.does(f'bash -c \'{read}\' sh "$1" "$2"', str(_address(node, "http")[1]), out)
        assert out.read_text().partition("\n")[0].strip().endswith(status)
        told = (node.folder / "daemon.log").read_text()
        assert ("every user of this node can read them" in told) and node.kill(signal.SIGTERM) == 0
        (node.folder / "daemon.log").write_text("every user of this node can read them" * bool(not arguments))


def test_sockets_and_secrets_are_closed_to_a_stranger(node: Node, stranger: Stranger) -> None:
    node.folder.chmod(0o755)
    node.start("--listen", "127.0.0.1:0")
    runtime = node.folder / "r"
    for path in (runtime, runtime / "daemon.sock", secrets_dir() / "token", secrets_dir() / "key.pem"):
        with pytest.raises(subprocess.CalledProcessError):
            stranger.does('exec 2>/dev/null; cat "$1" || ls "$1/"', path)
    assert stat.S_IMODE(runtime.stat().st_mode) == 0o700


def _certificate(*names: str) -> None:
    """Make a certificate as the daemon does, of a node that has only these names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(security, "_own_names", lambda: {name: "IP" if name[0].isdigit() else "DNS" for name in names})
        security.own_certificate()


def test_a_certificate_without_the_address_says_so_on_both_sides(
    node: Node, capsys: pytest.CaptureFixture[str]
) -> None:
    _certificate("old-name", "192.0.2.7")
    assert certificate_names((secrets_dir() / "cert.pem").read_bytes()) == ["old-name", "192.0.2.7"]
    node.start("--listen", "127.0.0.1:0")
    told = (node.folder / "daemon.log").read_text()
    assert "does not name" in told and "127.0.0.1" in told and "copy the new certificate" in told
    host, port = _address(node, "tls")
    endpoint = Endpoint.tcp(f"{host}:{port}")
    with pytest.raises(
        DaemonUnavailable, match=r"names old-name, 192\.0\.2\.7, and not 127\.0\.0\.1.*delete cert\.pem"
    ):
        get_snapshot(endpoint, "")
    assert cli.run(["status", f"{host}:{port}"]) == 1
    assert "names old-name, 192.0.2.7, and not 127.0.0.1" in capsys.readouterr().err


def test_another_daemons_certificate_says_so(node: Node) -> None:
    node.start("--listen", "127.0.0.1:0")
    host, port = _address(node, "tls")
    for name in ("cert.pem", "key.pem"):
        (secrets_dir() / name).unlink()
    _certificate("127.0.0.1")
    with pytest.raises(DaemonUnavailable, match=r"has another certificate than --ca: copy cert\.pem"):
        get_snapshot(Endpoint.tcp(f"{host}:{port}"), "")


def test_a_certificate_that_names_everything_is_left_alone(node: Node) -> None:
    node.start("--listen", "127.0.0.1:0")
    made = (secrets_dir() / "cert.pem").read_bytes()
    node.kill(signal.SIGTERM)
    node.start("--listen", "127.0.0.1:0")
    assert (secrets_dir() / "cert.pem").read_bytes() == made
    assert "does not name" not in (node.folder / "daemon.log").read_text()
    assert json.dumps(certificate_names(made)).count("127.0.0.1") == 1
