"""Starts this node's daemon again while a job runs, should it die: ranks then send it what it has not acknowledged."""

from __future__ import annotations

import os
import socket as sockets
import sys
import threading
from pathlib import Path
from types import TracebackType

CHECK_EVERY_S = 2.0
LAST_RETRY_S = 30.0


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
        from distui.daemon.node.spawn import ensure_daemon

        wait_s = CHECK_EVERY_S
        while not self._ended.wait(wait_s):
            if self._listens():
                wait_s = CHECK_EVERY_S
                continue
            try:
                ensure_daemon()
            except DaemonUnavailable as error:
                if wait_s == CHECK_EVERY_S:
                    print(f"distui: no daemon, and none can be started; tried again: {error}", file=sys.stderr)
                wait_s = min(2 * wait_s, LAST_RETRY_S)

    def _listens(self) -> bool:
        assert self._socket is not None
        with sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM) as probe:
            probe.settimeout(CHECK_EVERY_S)
            try:
                probe.connect(os.fspath(self._socket))
            except OSError:
                return False
        return True
