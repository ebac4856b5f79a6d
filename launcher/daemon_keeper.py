"""Starts this node's daemon again while a job runs, should it die: ranks then send it what it has not acknowledged."""

from __future__ import annotations

import os
import socket as sockets
import sys
import threading
from pathlib import Path
from types import TracebackType

CHECK_EVERY_S = 2.0


class DaemonKeeper:
    """A context in which a thread looks after the daemon at `socket`; None looks after nothing."""

    def __init__(self, socket: Path | None) -> None:
        self._socket = socket
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="daemon keeper", daemon=True)

    def __enter__(self) -> DaemonKeeper:
        if self._socket is not None:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ended.set()
        if self._socket is not None:
            self._thread.join(CHECK_EVERY_S)

    def _keep(self) -> None:
        from distui.core.errors import DaemonUnavailable
        from distui.daemon.spawn import ensure_daemon

        while not self._ended.wait(CHECK_EVERY_S):
            if self._listens():
                continue
            try:
                ensure_daemon()
            except DaemonUnavailable as error:
                print(f"distui: the daemon died and cannot be started again: {error}", file=sys.stderr, flush=True)
                return

    def _listens(self) -> bool:
        assert self._socket is not None
        with sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM) as probe:
            probe.settimeout(CHECK_EVERY_S)
            try:
                probe.connect(os.fspath(self._socket))
            except OSError:
                return False
        return True
