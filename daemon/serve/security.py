"""TCP with TLS and a token: the daemon's certificate, its token, and who may call what."""

from __future__ import annotations

import hmac
import ipaddress
import logging
import os
import resource
import secrets
import shutil
import socket as sockets
import subprocess
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil

from distui.core.errors import NotOwn, UserError
from distui.core.paths import list_own
from distui.core.telemetry.endpoint import (
    certificate_names,
    read_secret,
    refuse_plaintext,
    secrets_dir,
    split_address,
    write_secret,
)

CERTIFICATE_DAYS = 825
RENEW_S = 7 * 86400
MAX_REQUEST_BYTES = 1 << 20
"""Of one message that comes over TCP: watchers ask for little. A head daemon takes whole batches."""
OPEN_METHODS = ("/grpc.health.v1.Health/Check",)
"""What needs no token: whether the daemon serves is what load balancers and probes ask. `Watch` would stay open."""
HANDSHAKE_MS, IDLE_MS = 10_000, 60_000
MAX_STREAMS = 128
MAX_CALLERS = 1024
"""Connections over TCP at most, and never more than `CALLERS_SHARE` of the files that may be open."""
CALLERS_SHARE = 0.25
_log = logging.getLogger("distui.daemon")


def caller_options(callers: int = MAX_CALLERS, streams: int = MAX_STREAMS) -> list[tuple[str, int]]:
    """Return a gRPC server's options for TCP, where whoever has no token may connect: what is silent is hung up on.

    At most so many `callers`, and `streams` of each.
    """
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return [
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),  # of TLS, and until the caller's HTTP/2 settings have come
        ("grpc.max_connection_idle_ms", IDLE_MS),
        ("grpc.max_concurrent_streams", streams),
        ("grpc.max_allowed_incoming_connections", min(callers, int(files * CALLERS_SHARE))),
    ]


@dataclass(frozen=True, slots=True)
class TcpOptions:
    """How the daemon listens beyond its Unix socket."""

    host: str
    port: int
    token: str
    """What a caller must bring; "": nothing, which only metrics on loopback may say."""
    certificate: bytes | None
    """PEM chain; None: plaintext, on loopback only."""
    key: bytes | None
    control: bool
    """Whether jobs may be acted on; else it is read-only."""
    accept: bool
    """Whether other daemons may forward their runs to this one."""

    @property
    def address(self) -> str:
        """host:port as gRPC has it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def credentials(self) -> grpc.ServerCredentials | None:
        """Return the server's TLS; None for plaintext."""
        if self.certificate is None or self.key is None:
            return None
        return grpc.ssl_server_credentials([(self.key, self.certificate)])


def tcp_options(
    listen: str,
    *,
    token_file: Path | None = None,
    certificate_file: Path | None = None,
    key_file: Path | None = None,
    plaintext: bool = False,
    control: bool = False,
    accept: bool = False,
) -> TcpOptions:
    """Return how to listen on `host:port`; a token and a certificate that are not named are made, once.

    Raises: UserError for a wrong address, plaintext beyond loopback, or files that cannot be read.
    """
    host, port = split_address(listen)
    token = _token(token_file)
    if plaintext:
        refuse_plaintext(host)
        return TcpOptions(host, port, token, None, None, control, accept)
    if (certificate_file is None) != (key_file is None):
        raise UserError(
            "TLS needs a certificate and its key",
            f"only {'--tls-cert' if certificate_file else '--tls-key'} is given",
            "give both --tls-cert and --tls-key, or neither: then the daemon makes its own",
        )
    if certificate_file is None or key_file is None:
        certificate_file, key_file = own_certificate()
    try:
        certificate, key = certificate_file.read_bytes(), key_file.read_bytes()
    except OSError as error:
        raise UserError(
            f"cannot read {error.filename}", error.strerror or str(error), "name readable PEM files"
        ) from error
    if b"BEGIN CERTIFICATE" not in certificate or b"PRIVATE KEY" not in key:
        bad = certificate_file if b"BEGIN CERTIFICATE" not in certificate else key_file
        raise UserError(f"{bad} holds no PEM", "its BEGIN line is missing", "name a PEM certificate and its key")
    return TcpOptions(host, port, token, certificate, key, control, accept)


def _token(path: Path | None) -> str:
    own = path is None
    path = path or secrets_dir() / "token"
    try:
        if own and not path.exists():
            write_secret("token", secrets.token_urlsafe(32) + "\n")
        token = (read_secret("token").decode() if own else path.read_text()).strip()
        mode = path.stat().st_mode & 0o777
    except OSError as error:
        raise UserError(
            f"cannot read the token {path}", error.strerror or str(error), "name a readable file"
        ) from error
    if mode & 0o077:
        raise UserError(f"others can read the token {path}", f"its mode is {mode:04o}", f"chmod 600 {path}")
    if len(token) < 16:
        raise UserError(
            f"the token in {path} is too short",
            f"it has {len(token)} characters, and could be guessed",
            f"write 16 or more at random: openssl rand -hex 16 > {path}",
        )
    return token


def own_certificate() -> tuple[Path, Path]:
    """Return certificate and key of this daemon, made by the openssl command where there are none yet.

    It names every address of this node. Raises: UserError without openssl.
    """
    folder = secrets_dir()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    certificate, key = folder / "cert.pem", folder / "key.pem"
    try:
        known = list_own(folder)
    except NotOwn as error:
        raise error.told() from error
    openssl = shutil.which("openssl")
    made = certificate.name in known and key.name in known
    if made and (openssl is None or _fresh(openssl, certificate)):
        named = certificate_names(certificate.read_bytes())
        # Link-local ones come and go with containers, and nobody calls a daemon by them.
        if new := [name for name in _own_names() if name not in named and not name.startswith("FE80:")]:
            _log.warning(
                "the certificate does not name %s, which this node has had only since: who calls it so is refused. "
                "To have them named, delete %s and %s, start the daemon again, and copy the new certificate to whoever "
                "watches",
                ", ".join(new),
                certificate,
                key,
            )
        return certificate, key
    if openssl is None:
        raise UserError(
            "no certificate can be made",
            "the openssl command is not installed",
            "install openssl, or name your own files with --tls-cert and --tls-key",
        )
    names = [f"{kind}:{name}" for name, kind in _own_names().items()]
    wanted = {
        "-newkey": "ec",
        "-pkeyopt": "ec_paramgen_curve:prime256v1",
        "-days": str(CERTIFICATE_DAYS),
        "-subj": "/CN=distui daemon",
        "-addext": f"subjectAltName={','.join(names)}",
        "-keyout": os.fspath(key),
        "-out": os.fspath(certificate),
    }
    done = subprocess.run(
        [openssl, "req", "-x509", "-nodes", *(word for pair in wanted.items() for word in pair)],
        capture_output=True,
        text=True,
        umask=0o077,
        check=False,
    )
    if done.returncode:
        why = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise UserError("openssl could not make a certificate", why[0], "name your own with --tls-cert and --tls-key")
    return certificate, key


def _own_names() -> dict[str, str]:
    """Return what this node can be called by, as a certificate writes it, and whether it is a name or an address."""
    names = dict.fromkeys((sockets.gethostname(), sockets.getfqdn(), "localhost"), "DNS")
    for addresses in psutil.net_if_addrs().values():
        for found in addresses:
            if found.family == sockets.AF_INET:
                names[found.address] = "IP"
            elif found.family == sockets.AF_INET6:
                names[_exploded(found.address)] = "IP"
    return names


def _exploded(address: str) -> str:
    """Return an IPv6 address as Python's ssl tells those of a certificate: `0:0:0:0:0:0:0:1`."""
    words = ipaddress.IPv6Address(address.partition("%")[0]).exploded.split(":")
    return ":".join(f"{int(word, 16):X}" for word in words)


def _fresh(openssl: str, certificate: Path) -> bool:
    """Tell whether a certificate of ours is good for some days more."""
    arguments = [openssl, "x509", "-checkend", str(RENEW_S), "-noout", "-in", os.fspath(certificate)]
    return subprocess.run(arguments, capture_output=True, check=False).returncode == 0


class Gate(grpc.aio.ServerInterceptor):
    """Lets in who brings the token, to what is allowed over TCP."""

    def __init__(self, options: TcpOptions) -> None:
        self._expected = f"Bearer {options.token}".encode()
        self._refused = {
            "/distui.v1.Control/": None if options.control else "control is not allowed: start it with --allow-control",
            "/distui.v1.Telemetry/": None if options.accept else "it takes no runs: start it with --accept-runs",
            "/distui.v1.Federation/": None if options.accept else "it takes no runs: start it with --accept-runs",
        }

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """Return the method's own handler, or one that refuses the call."""
        handler = await continuation(details)
        if handler is None or details.method in OPEN_METHODS:
            return handler
        brought = str(dict(details.invocation_metadata or ()).get("authorization", ""))
        if not hmac.compare_digest(brought.encode(), self._expected):
            why = "the token is wrong" if brought else "a token is needed: authorization: Bearer ..."
            return _refusal(handler, grpc.StatusCode.UNAUTHENTICATED, why)
        for prefix, why_not in self._refused.items():
            if why_not and details.method.startswith(prefix):
                return _refusal(handler, grpc.StatusCode.PERMISSION_DENIED, f"this daemon is read-only here; {why_not}")
        return handler


def _refusal(handler: grpc.RpcMethodHandler, code: grpc.StatusCode, why: str) -> grpc.RpcMethodHandler:
    """Return a handler of the same form that ends each call with `code`."""

    async def refuse(request: Any, context: grpc.aio.ServicerContext) -> Any:
        await context.abort(code, why)

    async def refuse_streaming(request: Any, context: grpc.aio.ServicerContext) -> Any:
        await context.abort(code, why)
        yield  # not reached; it makes this a stream of answers

    forms = {
        (False, False): (grpc.unary_unary_rpc_method_handler, refuse),
        (True, False): (grpc.stream_unary_rpc_method_handler, refuse),
        (False, True): (grpc.unary_stream_rpc_method_handler, refuse_streaming),
        (True, True): (grpc.stream_stream_rpc_method_handler, refuse_streaming),
    }
    make, refusing = forms[bool(handler.request_streaming), bool(handler.response_streaming)]
    return make(refusing, handler.request_deserializer, handler.response_serializer)
