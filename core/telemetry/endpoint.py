"""Where a daemon answers: its Unix socket on this node, or TCP with TLS and a token."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from distui.core.errors import NotOwn, UserError
from distui.core.paths import read_own, state_dir, write_own
from distui.core.telemetry.harmless import harmless

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
        token = _read("token", token_file, "copy it from the node of the daemon, and name it with --token-file")
        if plaintext:
            refuse_plaintext(host)
            return cls(target, token.decode().strip())
        pem = _read("cert.pem", certificate_file, "copy it from the node of the daemon, and name it with --ca")
        return cls(target, token.decode().strip(), pem)

    def why(self, details: str) -> str:
        """Return what gRPC says of a daemon that does not answer, and what to do where its certificate is the cause."""
        said = harmless(details)
        if self.certificate is not None and "Hostname Verification" in said:
            host, _ = split_address(self.target)
            named = ", ".join(certificate_names(self.certificate)) or "other hosts"
            said += (
                f"; the daemon's certificate names {named}, and not {host}, which may be newer. Use one of these; or "
                "delete cert.pem and key.pem in the daemon's folder there, start it again, and copy the new cert.pem"
            )
        elif self.certificate is not None and "CERTIFICATE_VERIFY_FAILED" in said:
            said += "; what answers there has another certificate than --ca: copy cert.pem from the daemon's node again"
        return said

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


def certificate_names(pem: bytes) -> list[str]:
    """Return the hosts and addresses that the certificates in `pem` name."""
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=pem.decode(errors="replace"))
    names = [pair for found in context.get_ca_certs() for pair in found.get("subjectAltName", ())]
    return [str(pair[1]) for pair in names]


def read_secret(name: str) -> bytes:
    """Return a file of `secrets_dir`. Raises: UserError where it is not this user's own; OSError."""
    try:
        return read_own(secrets_dir() / name)
    except NotOwn as error:
        raise error.told() from error


def write_secret(name: str, text: str) -> None:
    """Write a file of `secrets_dir`, which only its owner can read. Raises: UserError; OSError."""
    secrets_dir().mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        write_own(secrets_dir() / name, text)
    except NotOwn as error:
        raise error.told() from error


def _read(name: str, chosen: Path | None, fix: str) -> bytes:
    try:
        return chosen.read_bytes() if chosen is not None else read_secret(name)
    except OSError as error:
        path = chosen or secrets_dir() / name
        what = "token" if name == "token" else "certificate"
        raise UserError(f"cannot read the daemon's {what} {path}", error.strerror or str(error), fix) from error
