"""The way into the debugger of a rank: a Unix socket in the run's folder, over which a terminal is lent to it.

    rank       listens from its start, and accepts when it comes to a breakpoint
    attached   sends one byte with its stdin and stdout; gets one each time that the rank uses them; reads to the end

So line editing, completion and whatever else a debugger does with a terminal work as if the rank ran in it. The
folder and the socket are the user's alone, and each side checks who the other is.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from distui.core.errors import EXIT_OK, UserError
from distui.core.paths import RunFolder, own_folder, read_json
from distui.core.telemetry.harmless import harmless
from distui.launcher.job.console import terminal_kept

SOCKET = "debugger.sock"
_CREDENTIALS = struct.Struct("3i")
_ASK, _USED = b"?", b"!"


def listen(run: RunFolder) -> socket.socket:
    """Return the listening socket of the run's debugger, which only this user can open. Raises: OSError."""
    listening = socket.socket(socket.AF_UNIX)
    with own_folder(run.path) as folder:
        os.fchmod(listening.fileno(), 0o600)
        listening.bind(f"/proc/self/fd/{folder}/{SOCKET}")  # whole, the path may be longer than a socket's may be
    listening.listen()
    return listening


def _peer(connection: socket.socket) -> tuple[int, int]:
    """Return the process and the user at the other end."""
    pid, uid, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return pid, uid


class Lent:
    """A terminal that somebody who has attached lends to this rank: two descriptors, as long as the peer is there."""

    def __init__(self, connection: socket.socket, stdin: int, stdout: int) -> None:
        self._connection, self.stdin, self.stdout = connection, stdin, stdout

    def use(self) -> bool:
        """Say that it is used now; return whether it is still there."""
        try:
            self._connection.sendall(_USED)
        except OSError:
            return False
        return True

    def give_back(self) -> None:
        """Let the peer go."""
        for number in (self.stdin, self.stdout):
            os.close(number)
        self._connection.close()


def accept(listening: socket.socket) -> Lent:
    """Wait for somebody who attaches and is still there."""
    while True:
        connection, _ = listening.accept()
        with suppress(OSError):
            if _peer(connection)[1] == os.geteuid():
                _, numbers, _, _ = socket.recv_fds(connection, 1, 2)
                if len(numbers) == 2:
                    lent = Lent(connection, *numbers)
                    if lent.use():
                        return lent
                    lent.give_back()
        connection.close()


def attach(run: RunFolder) -> int:
    """Lend this terminal to the debugger of the run's `--debug-rank` until that rank ends or lets go of it.

    Raises: UserError where no rank of the run can be debugged.
    """
    spec = read_json(run.spec) or {}
    if (rank := spec.get("debug_rank")) is None:
        raise UserError(
            f"no rank of {run.run_id} can be debugged",
            "it was started without --debug-rank",
            "distui launch --debug-rank 0 script.py, with breakpoint() in the script",
        )
    if spec.get("debugger") == "debugpy":
        found = read_json(run.debugger)
        message = str(found["message"]) if found else f"rank {rank} has not come to breakpoint() yet"
        print(harmless(message), file=sys.stderr)
        return EXIT_OK
    line = socket.socket(socket.AF_UNIX)
    try:
        with own_folder(run.path) as folder:
            line.connect(f"/proc/self/fd/{folder}/{SOCKET}")
    except OSError as error:
        raise UserError(
            f"rank {rank} of {run.run_id} cannot be debugged from here",
            f"nobody answers at {run.path / SOCKET} ({error.strerror}): the rank is starting, has ended, or is on "
            "another node",
            f"distui status {run.run_id}, and distui attach {run.run_id} --debug on the rank's node while it runs",
        ) from error
    pid, uid = _peer(line)
    if uid != os.geteuid():
        raise UserError(f"user {uid} listens at {run.path / SOCKET}", "it should be you", "look at who can write there")
    suspending = signal.signal(signal.SIGTSTP, signal.SIG_IGN)  # the rank would read what is the shell's
    with line, terminal_kept():
        print(
            f"distui: rank {rank} (pid {pid}) has this terminal at its next breakpoint(); there, c goes on to the "
            "next, Ctrl-D goes on and leaves, q ends the rank; Ctrl-C stops it wherever it is",
            file=sys.stderr,
        )
        socket.send_fds(line, [_ASK], [0, 1])
        with _interrupts() as interrupted:
            _pass_on(line, interrupted, pid)
    signal.signal(signal.SIGTSTP, suspending)
    print(f"distui: rank {rank} is left", file=sys.stderr)
    return EXIT_OK


@contextmanager
def _interrupts() -> Iterator[socket.socket]:
    """Give what can be read from at each Ctrl-C. A KeyboardInterrupt could lose what has just been received."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    handler = signal.signal(signal.SIGINT, lambda *_: None)
    waker = signal.set_wakeup_fd(writer.fileno())
    try:
        with reader, writer:
            yield reader
    finally:
        signal.set_wakeup_fd(waker)
        signal.signal(signal.SIGINT, handler)


def _pass_on(line: socket.socket, interrupted: socket.socket, pid: int) -> None:
    """Pass each Ctrl-C on to the rank, until that lets go; one that comes before the rank has begun ends this."""
    used = False
    while True:
        ready, _, _ = select.select([line, interrupted], [], [])
        if line in ready:
            try:
                used = bool(line.recv(64))
            except ConnectionError:
                return
            if not used:
                return
        if interrupted in ready:
            interrupted.recv(64)
            if not used:
                return  # nothing has begun
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGINT)
