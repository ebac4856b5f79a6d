"""From `distui setup` to the first training step, by keys in a real terminal. The tests' time limit is the minute."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from distui.core.config.settings import load

EXAMPLE = Path(__file__).parents[3] / "examples" / "train_bytes.py"
MAX_KEYS = 12


class Terminal:
    """A tmux server of its own with one screen of 80x24; counts the keys that are pressed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.num_keys = folder, 0
        self._tmux = ["tmux", "-S", str(folder / "tmux"), "-f", "/dev/null"]
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("DISTUI_", "TMUX"))}
        environ |= {"DISTUI_STATE_DIR": str(folder / "state"), "DISTUI_RUNTIME_DIR": str(folder / "rt")}
        self._environ = environ | {"TERM": "xterm-256color", "LC_ALL": "C.UTF-8"}

    def start(self, *command: str) -> None:
        """Run a command in the terminal."""
        size = ("-x", "80", "-y", "24", "-c", str(self.folder))
        self._call("new-session", "-d", *size, *command)

    def press(self, key: str) -> None:
        """Press one key, as tmux names it."""
        self.num_keys += 1
        self._call("send-keys", key)

    def wait_for(self, pattern: str) -> str:
        """Return the screen as soon as it shows the pattern; the test's time limit ends the wait."""
        while not re.search(pattern, screen := self._call("capture-pane", "-p"), re.MULTILINE):
            time.sleep(0.1)
        return screen

    def close(self) -> None:
        """End the terminal with what runs in it, and the daemon that it started."""
        processes = [psutil.Process(int(pid)) for pid in self._call("list-panes", "-F", "#{pane_pid}").split()]
        processes += [child for process in processes for child in process.children(recursive=True)]
        lock = self.folder / "rt" / "daemon.lock"
        if lock.exists() and psutil.pid_exists(int(lock.read_text())):
            processes.append(psutil.Process(int(lock.read_text())))
        self._call("kill-server")
        for process in processes:
            if process.is_running():
                process.terminate()
        _, alive = psutil.wait_procs(processes, 10)
        for process in alive:
            process.kill()

    def _call(self, *arguments: str) -> str:
        return subprocess.run(
            [*self._tmux, *arguments], env=self._environ, capture_output=True, text=True, check=True
        ).stdout


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    folder = Path(tempfile.mkdtemp(prefix="dt", dir="/tmp"))
    found = Terminal(folder)
    yield found
    found.close()
    shutil.rmtree(folder)


@pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is the terminal of this test")
def test_from_setup_to_the_first_step_in_a_minute_and_few_keys(terminal: Terminal) -> None:
    short = EXAMPLE.read_text(encoding="utf-8").replace("default=240", "default=3")
    (terminal.folder / "train.py").write_text(short, encoding="utf-8")
    terminal.start(sys.executable, "-m", "distui", "setup")
    terminal.wait_for(r"Scheduler|Memory +\d")
    for title in ("2 Model", "3 Strategy", "4 Cluster", "5 Review"):
        assert not (terminal.folder / "distui.toml").exists()
        terminal.press("Enter")
        terminal.wait_for(rf"─  {title}")
    terminal.press("Enter")
    assert "train" in terminal.wait_for(r"loss +\d+\.\d+")
    assert terminal.num_keys < MAX_KEYS
    assert load(terminal.folder / "distui.toml", {}, environ={}).config.cluster.nproc == "auto"
