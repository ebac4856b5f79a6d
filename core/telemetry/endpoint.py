"""Where a daemon answers: its Unix socket on this node, or TCP with TLS and a token."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from distui.core.errors import UserError
from distui.core.paths import state_dir

if TYPE_CHECKING:
    import grpc

DEFAULT_PORT = 7270
MAX_RECEIVE_BYTES = 256 << 20


def secrets_dir() -> Path:
    """Return the folder of the daemon's token and certificate; on a cluster with one home it is the same everywhere."""
    return state_dir() / "daemon"


def split_address(text: str, default_port: int | None = None) -> tuple[str, int]:
    """Return host and port of `host:port`, `[v6]:port`, or `host` where there is a default port.

    Raises: UserError.
    """
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):
        host, port = text, "" if default_port is None else str(default_port)
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdigit() or not 0 <= int(port) <= 65535:
        raise UserError(
            f"{text!r} is no address",
            "a host and a port from 0 to 65535 are needed",
            f"write it as node7:{DEFAULT_PORT}, 10.0.0.7:{DEFAULT_PORT} or [fe80::1]:{DEFAULT_PORT}",
        )
    return host, int(port)


def is_loopback(host: str) -> bool:
    """Tell whether an address is one that only this node can reach."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What a client needs to know of a daemon."""

    target: str
    """As gRPC has it: `unix:/run/.../daemon.sock` or `host:port`."""
    token: str = ""
    certificate: bytes | None = None
    """What the daemon's certificate must be, or be signed by (PEM); None: plaintext."""

    @classmethod
    def unix(cls, socket: Path) -> Endpoint:
        """Return the endpoint of a socket that only its owner can open."""
        return cls(f"unix:{socket}")

    @classmethod
    def tcp(
        cls, address: str, token_file: Path | None = None, certificate_file: Path | None = None, plaintext: bool = False
    ) -> Endpoint:
        """Return the endpoint of `host:port`; files that are not given are those of `secrets_dir`.

        Raises: UserError where a file is missing, or plaintext would leave this node.
        """
        host, port = split_address(address, DEFAULT_PORT)
        target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        token_path = token_file or secrets_dir() / "token"
        token = _read(token_path, "token", "copy it from the node of the daemon, and name it with --token-file")
        if plaintext:
            refuse_plaintext(host)
            return cls(target, token.decode().strip())
        path = certificate_file or secrets_dir() / "cert.pem"
        pem = _read(path, "certificate", "copy it from the node of the daemon, and name it with --ca")
        return cls(target, token.decode().strip(), pem)

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What every call must bring along."""
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()

    def channel(self, options: list[tuple[str, int]] | None = None) -> grpc.Channel:
        """Open a blocking channel."""
        import grpc

        chosen = [*_OPTIONS, *(options or [])]
        if self.certificate is None:
            return grpc.insecure_channel(self.target, options=chosen)
        return grpc.secure_channel(self.target, grpc.ssl_channel_credentials(self.certificate), options=chosen)

    def aio_channel(self, options: list[tuple[str, int]] | None = None) -> grpc.aio.Channel:
        """Open a channel for the running event loop."""
        import grpc

        chosen = [*_OPTIONS, *(options or [])]
        if self.certificate is None:
            return grpc.aio.insecure_channel(self.target, options=chosen)
        return grpc.aio.secure_channel(self.target, grpc.ssl_channel_credentials(self.certificate), options=chosen)


_OPTIONS = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", MAX_RECEIVE_BYTES)]


def refuse_plaintext(host: str) -> None:
    """Raise UserError unless `host` is one that only this node can reach."""
    if not is_loopback(host):
        raise UserError(
            f"plaintext is refused on {host}",
            "the token and the run's logs would travel readable over the network",
            "leave --plaintext out: the daemon makes a certificate; or listen on 127.0.0.1 behind a tunnel of yours",
        )


def _read(path: Path, what: str, fix: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the daemon's {what} {path}", error.strerror or str(error), fix) from error


def private_file(path: Path, text: str) -> None:
    """Write a file that only its owner can read."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
