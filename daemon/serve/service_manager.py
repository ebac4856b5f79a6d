"""What systemd wants to hear: that the daemon is ready, alive, ending (sd_notify's protocol, without libsystemd)."""

from __future__ import annotations

import os
import socket as sockets
from collections.abc import Mapping


def notify(words: str, environ: Mapping[str, str] = os.environ) -> bool:
    """Send `READY=1`, `WATCHDOG=1`, `STOPPING=1` or the like; False where no service manager listens."""
    address = environ.get("NOTIFY_SOCKET")
    if not address:
        return False
    if address.startswith("@"):  # Linux's abstract sockets
        address = "\0" + address[1:]
    with sockets.socket(sockets.AF_UNIX, sockets.SOCK_DGRAM | sockets.SOCK_CLOEXEC) as sender:
        sender.connect(address)
        sender.send(words.encode())
    return True


def watchdog_s(environ: Mapping[str, str] = os.environ) -> float | None:
    """Return how often the service manager wants a sign of life, with a margin; None where it wants none."""
    microseconds = environ.get("WATCHDOG_USEC", "")
    meant = environ.get("WATCHDOG_PID") in (None, "", str(os.getpid()))
    return int(microseconds) / 2e6 if microseconds.isdigit() and meant else None
