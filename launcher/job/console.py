"""What rank 0 has of the launcher's own: its stdin, and a line on which it asks before it reads from a terminal.

Rank 0 asks so that its output, which the launcher copies from a log, is on the screen before it waits for an answer to
it; and a launcher in the background of its shell does not answer, so that the rank does not read what is the shell's.
"""

from __future__ import annotations

import os
import socket
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager, suppress

CONSOLE_ENV = "DISTUI_CONSOLE"
"""For the agent, the numbers of stdin and of the line; for rank 0, the number of the line; "" for none."""
_ASK, _SHOWN = b"?", b"!"


class Console:
    """The launcher's end."""

    def __init__(self, stdin: int) -> None:
        """`stdin` is the descriptor that rank 0 reads from."""
        self._stdin = os.dup(stdin)
        self._line, self._theirs = socket.socketpair()
        self._line.setblocking(False)
        self._is_asked = False

    def inherited(self) -> tuple[int, int]:
        """Return what the agent must inherit, in the order of `CONSOLE_ENV`."""
        return self._stdin, self._theirs.fileno()

    def given(self) -> None:
        """Close what the agent has inherited."""
        os.close(self._stdin)
        self._theirs.close()

    def asked(self) -> bool:
        """Return whether rank 0 waits for its output to be on the screen, and this process may have the terminal."""
        with suppress(BlockingIOError, ConnectionError):
            self._is_asked = bool(self._line.recv(64)) or self._is_asked
        return self._is_asked and in_foreground()

    def shown(self) -> None:
        """Say that all of rank 0's output is on the screen."""
        self._is_asked = False
        with suppress(OSError):  # it has ended
            self._line.sendall(_SHOWN)


class ConsoleLine:
    """Rank 0's end."""

    def __init__(self, number: int) -> None:
        self._line = socket.socket(fileno=number)
        self._line.set_inheritable(False)

    def wait_shown(self) -> None:
        """Wait until the output so far is on the screen, and the launcher has the terminal; or the launcher is gone."""
        with suppress(OSError):
            self._line.sendall(_ASK)
            self._line.recv(1)


def launchers_stdin() -> Console | None:
    """Return the console that this process's stdin makes; None where it has none."""
    try:
        return Console(0)
    except OSError:  # closed
        return None


def in_foreground() -> bool:
    """Return whether this process may read from its terminal; also where stdin is none of its own."""
    try:
        return os.tcgetpgrp(0) == os.getpgrp()
    except OSError:
        return True


@contextmanager
def terminal_kept() -> Iterator[None]:
    """Put the terminal back as it was at the end: whoever reads from it may be killed while it is set otherwise."""
    try:
        before = termios.tcgetattr(0)
    except (termios.error, OSError, ValueError):
        yield
        return
    try:
        yield
    finally:
        if in_foreground():  # else the kernel would stop us
            sys.stdout.flush()
            with suppress(termios.error):  # it is gone
                termios.tcsetattr(0, termios.TCSADRAIN, before)
