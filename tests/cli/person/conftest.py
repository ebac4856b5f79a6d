"""`distui` on a terminal that a test types on."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest


class Terminal:
    """`distui` on a terminal of its own."""

    def __init__(self, home: Any, *arguments: str, **environ: str) -> None:
        self.ours, theirs = os.openpty()
        self.seen = ""
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
            self.seen += os.read(self.ours, 65536).decode()
        read, _, self.seen = self.seen.partition(words)
        return read

    def type(self, line: str) -> None:
        """Type."""
        os.write(self.ours, line.encode())

    def end(self) -> int:
        """Read to the end; return the exit status."""
        while True:
            try:
                self.seen += os.read(self.ours, 65536).decode()
            except OSError:
                break
        os.close(self.ours)
        return self.process.wait(120)


@pytest.fixture
def terminal(home: Any) -> type[Terminal]:
    """Give the class; it starts `distui` with arguments and variables of the environment."""
    return Terminal
