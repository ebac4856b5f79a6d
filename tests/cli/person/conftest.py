"""`distui` on a terminal that a test types on."""

from __future__ import annotations

import codecs
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest


class Terminal:
    """`distui` on a terminal of its own."""

    def __init__(self, home: Any, *arguments: str, **environ: str) -> None:
        self.ours, theirs = os.openpty()
        self.seen = ""
        # A read may end within a character.
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        command = [sys.executable, "-c", "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
                   "from distui.launcher.cli import main; main()", *arguments]  # fmt: skip
        self.process = subprocess.Popen(
            command,
            cwd=home.path,
            env={"TERM": "xterm", **home.environ, **environ},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)

    def until(self, words: str) -> str:
        """Read until `words` have come after what was read before; return all up to them."""
        while words not in self.seen:
            self.seen += self._decode(os.read(self.ours, 65536))
        read, _, self.seen = self.seen.partition(words)
        return read

    def type(self, line: str) -> None:
        """Type."""
        os.write(self.ours, line.encode())

    def end(self) -> int:
        """Read to the end; return the exit status."""
        while True:
            try:
                self.seen += self._decode(os.read(self.ours, 65536))
            except OSError:
                break
        return self.process.wait(120)

    def close(self) -> None:
        """Close the terminal, as one closes a window; what still runs on it is ended."""
        os.close(self.ours)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    """Start `distui` with arguments and variables of the environment on a terminal that is closed after the test."""
    opened: list[Terminal] = []

    def start(home: Any, *arguments: str, **environ: str) -> Terminal:
        opened.append(Terminal(home, *arguments, **environ))
        return opened[-1]

    yield start
    for each in opened:
        each.close()
