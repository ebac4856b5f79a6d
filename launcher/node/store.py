"""Who serves the store in which the ranks of one node meet: rank 0, which has torch anyway, or else the agent.

Rank 0 asks the agent over a line of its own when it has imported torch. Where it does not, since its script starts the
training as a process of its own, somebody waits at the socket in vain: then the agent imports torch and serves. A rank
0 that serves stays, with its work done, until the other ranks have ended, as torchrun's store does.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
from contextlib import suppress
from typing import Any

STORE_ENV = "DISTUI_STORE"
"""In rank 0's environment: the numbers of the listening socket and of the line to the agent."""
PATIENCE_S = 2.0
"""For so long somebody may wait at the socket before the agent serves."""
_ASK, _YES, _NO = b"?", b"y", b"n"


def serve(listening: socket.socket) -> Any:
    """Return a store on the socket, which is the store's from now on; a thread of C++ serves it until it is dropped."""
    from torch.distributed import TCPStore

    address, port, *_ = listening.getsockname()
    if address in ("0.0.0.0", "::"):
        address = "127.0.0.1"
    taken = listening.detach()
    return TCPStore(address, port, is_master=True, wait_for_workers=False, master_listen_fd=taken)


class Standby(threading.Thread):
    """A thread of the agent that lets rank 0 serve, and serves itself where nobody else does."""

    def __init__(self, listening: socket.socket) -> None:
        super().__init__(name="store", daemon=True)
        self._listening = listening
        self._line, self._theirs = socket.socketpair()
        self._served: Any = None

    def inherited(self) -> tuple[int, int]:
        """Return what rank 0 must inherit, in the order of `STORE_ENV`."""
        return self._listening.fileno(), self._theirs.fileno()

    def run(self) -> None:
        """Wait until somebody serves; rank 0 must have been started."""
        self._theirs.close()
        either = select.poll()
        either.register(self._line, select.POLLIN)
        either.register(self._listening, select.POLLIN)
        asked = select.poll()
        asked.register(self._line, select.POLLIN)
        either.poll()
        if asked.poll(PATIENCE_S * 1000) and self._line.recv(1) == _ASK:
            self._listening.close()  # before the answer: a store that dies with rank 0 must refuse, not keep waiting
            self._answer(_YES)
            return
        # Rank 0 has ended, or does not ask. Nothing is imported before somebody comes.
        waiting = select.poll()
        waiting.register(self._listening, select.POLLIN)
        waiting.poll()
        self._served = serve(self._listening)
        while self._line.recv(1) == _ASK:
            self._answer(_NO)

    def _answer(self, answer: bytes) -> None:
        with suppress(OSError):  # rank 0 has ended, or the others have: nobody is left who would need it
            self._line.sendall(answer)

    def close(self) -> None:
        """Give up the line; a store that is served goes on."""
        self._line.close()

    def release(self) -> None:
        """Let rank 0 go: the others have ended."""
        with suppress(OSError):  # it has gone already
            self._line.shutdown(socket.SHUT_WR)


class RankStore:
    """Rank 0's side of the line."""

    def __init__(self, numbers: str) -> None:
        """`numbers` are those of `STORE_ENV`."""
        listening, line = (int(number) for number in numbers.split(","))
        self._listening, self._line = socket.socket(fileno=listening), socket.socket(fileno=line)
        for inherited in (self._listening, self._line):
            inherited.set_inheritable(False)
        self._served: Any = None

    def serve(self) -> None:
        """Serve the store, unless the agent does; torch has been imported."""
        self._line.sendall(_ASK)
        if self._line.recv(1) == _NO:
            self._listening.close()
        else:
            self._served = serve(self._listening)

    def outlive_others(self, status: int) -> None:
        """Wait until the other ranks have ended, if they may need the store; a signal ends it with `status`."""
        if self._served is None:
            return
        for signum in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(signum, lambda number, frame: os._exit(status))
        self.wait()

    def wait(self) -> None:
        """Wait until the agent lets this rank go."""
        while self._line.recv(1):
            continue

    def close(self) -> None:
        """Give the sockets up; a store that is served goes on."""
        self._line.close()
        self._listening.close()
