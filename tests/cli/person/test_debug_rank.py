"""`--debug-rank`: a rank waits at its breakpoint() for whoever attaches from another terminal, and is not hung."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from tests.glance import wait_for_status

Done = subprocess.CompletedProcess[str]

STEPS = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
value = torch.tensor([dist.get_rank() + 1.0])
for step in range(3):
    breakpoint()
    dist.all_reduce(value)
    print("sum", step, value.item())
dist.destroy_process_group()
"""
SPINS = """
import os
breakpoint()
open("spins", "w").close()
while not os.path.exists("enough"):
    pass
print("let go")
"""


def started(home: Any, script: str, *arguments: str, **environ: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "distui", "launch", *arguments, script],
        cwd=home.path,
        env={"DISTUI_TELEMETRY_ENABLED": "false", **home.environ, **environ},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def told(process: subprocess.Popen[str], words: str) -> str:
    """Read stderr up to a line with these words."""
    assert process.stderr is not None
    for line in process.stderr:
        if words in line:
            return line
    raise AssertionError(f"{words!r} was not told")


def test_any_rank_is_debugged_from_another_terminal(home: Any, terminal: Any) -> None:
    home.script("steps.py", STEPS)
    job = started(home, "steps.py", "--nproc", "2", "--debug-rank", "1")
    line = 6 if sys.version_info >= (3, 13) else 7  # from 3.13 on pdb stops where it is called, and not behind it
    assert f"steps.py:{line}: distui attach steps-" in told(job, "rank 1 waits in a debugger at ")
    run = home.run_named("steps")
    found = (run.path / "debugger.sock").lstat()
    assert stat.S_ISSOCK(found.st_mode) and stat.S_IMODE(found.st_mode) == 0o600
    first = terminal(home, "attach", run.run_id, "--debug")
    first.until("(Pdb) ")
    first.type("p valu\t, step\n")  # completed: the terminal is the debugger's own
    assert "(tensor([2.]), 0)" in first.until("(Pdb) ")
    first.type("c\n")
    first.until("(Pdb) ")  # at the next one
    first.type("p step, value.item()\n")
    assert "(1, 3.0)" in first.until("(Pdb) ")
    first.type("\x04")
    first.until("rank 1 is left")
    assert first.end() == 0
    told(job, "rank 1 waits in a debugger at ")
    second = terminal(home, "attach", run.run_id, "--debug")
    second.until("(Pdb) ")
    second.type("value.fill_(0)\n")
    second.until("(Pdb) ")
    second.type("c\n")
    out, _ = job.communicate(timeout=120)
    assert job.returncode == 0 and out.splitlines() == ["sum 0 3.0", "sum 1 6.0", "sum 2 6.0"]
    assert second.end() == 0
    refused = home.run_named("steps")
    assert not refused.debugger.exists()


def test_ctrl_c_where_one_has_attached_stops_the_rank_wherever_it_is(home: Any, terminal: Any) -> None:
    os.mkfifo(home.path / "spins")
    home.script("spins.py", SPINS)
    job = started(home, "spins.py", "--nproc", "1", "--debug-rank", "0")
    told(job, "rank 0 waits")
    attached = terminal(home, "attach", home.run_named("spins").run_id, "--debug")
    attached.until("(Pdb) ")
    attached.type("c\n")
    open(home.path / "spins").close()  # it has come to its loop
    attached.type("\x03")
    attached.until("(Pdb) ")
    attached.type("!open('enough', 'w').close()\n")
    attached.until("(Pdb) ")
    attached.type("c\n")
    out, _ = job.communicate(timeout=120)
    assert job.returncode == 0 and out.endswith("let go\n") and attached.end() == 0


def test_what_cannot_be_debugged_is_refused(home: Any, distui: Callable[..., Done]) -> None:
    home.script("plain.py", "print(1)")
    done = distui("launch", "--nproc", "2", "--debug-rank", "5", "plain.py")
    assert done.returncode == 2 and "the job has ranks 0 to 1" in done.stderr and "--nproc 6" in done.stderr
    assert distui("launch", "--nproc", "1", "plain.py").returncode == 0
    done = distui("attach", home.run_named("plain").run_id, "--debug")
    assert done.returncode == 2 and "--debug-rank 0 script.py" in done.stderr
    assert distui("launch", "--nproc", "1", "--name", "ended", "--debug-rank", "0", "plain.py").returncode == 0
    done = distui("attach", home.run_named("ended").run_id, "--debug")
    assert done.returncode == 2 and "has ended" in done.stderr
    home.script("alone.py", "breakpoint()")
    run_id = distui("launch", "--detach", "--nproc", "1", "alone.py").stdout.strip()
    assert "rank 0, which has no terminal" in distui("logs", run_id, "-f").stderr
    assert "--debug-rank 0" in json.loads(home.run_named("alone").rank_error(0).read_text())["fix"]


def test_an_editor_attaches_to_a_rank(home: Any) -> None:
    pytest.importorskip("debugpy")
    home.script("edited.py", "breakpoint()\nprint('went on')\n")
    job = started(home, "edited.py", "--nproc", "1", "--debug-rank", "0", "--debugger", "debugpy")
    line = told(job, "rank 0 waits at edited.py:1")
    host, _, port = line.strip().rpartition(" ")[2].rpartition(":")
    with Editor(host, int(port)) as editor:
        stopped = editor.attach()
        assert stopped["source"]["path"].endswith("/edited.py") and stopped["line"] == 2
        editor.send("continue", threadId=editor.thread)
        out, _ = job.communicate(timeout=120)
    assert (job.returncode, out) == (0, "went on\n")


class Editor:
    """As much of an editor's end of the debug adapter protocol as it takes to stop, look and go on."""

    def __init__(self, host: str, port: int) -> None:
        import socket

        self._socket = socket.create_connection((host, port))
        self._file, self._seq, self.thread = self._socket.makefile("rb"), 0, 0

    def __enter__(self) -> Editor:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        self._socket.close()

    def send(self, command: str, **arguments: Any) -> None:
        self._seq += 1
        message = {"seq": self._seq, "type": "request", "command": command, "arguments": arguments}
        body = json.dumps(message).encode()
        self._socket.sendall(b"Content-Length: %d\r\n\r\n%s" % (len(body), body))

    def read(self, name: str) -> dict[str, Any]:
        """Return the next event, or answer to a command, of this name."""
        while True:
            size = 0
            while (line := self._file.readline().strip()) or not size:
                if line.lower().startswith(b"content-length:"):
                    size = int(line.partition(b":")[2])
            message = json.loads(self._file.read(size))
            if message.get("event", message.get("command")) == name:
                return dict(message.get("body") or {})

    def attach(self) -> dict[str, Any]:
        """Attach; return the innermost frame where it stops."""
        self.send("initialize", adapterID="test")
        self.read("initialize")
        self.send("attach", justMyCode=True)
        self.read("initialized")
        self.send("configurationDone")
        self.thread = self.read("stopped")["threadId"]
        self.send("stackTrace", threadId=self.thread)
        return dict(self.read("stackTrace")["stackFrames"][0])


def test_a_rank_in_a_debugger_is_neither_hung_nor_late(with_daemon: Any, terminal: Any) -> None:
    """The other rank waits for longer than a hang takes; the daemon knows why, and says so."""
    home = with_daemon
    many = "for warm in range(12):\n    dist.all_reduce(torch.ones(1))\n"  # past the time that a start is given
    home.script("watched.py", STEPS.replace("for step", f"{many}for step"))
    shown = terminal(home, "launch", "--no-tui", "--nproc", "2", "watched.py")
    shown.until("(Pdb) ")
    run = home.run_named("watched")
    found = wait_for_status(home.environ, lambda found: bool(found["ranks"] and found["ranks"][0]["busy"]), run.run_id)
    assert found["ranks"][0]["busy"] == "is in a debugger"
    assert found["diagnosis"] == [] and found["state"] != "stalled"
    for _ in range(3):
        shown.type("c\n")
    assert shown.end() == 0
