"""The stack of a rank that cannot answer is asked for without its script noticing."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

from distui.core.paths import RunFolder
from distui.core.telemetry.stacks import known_stack, trace_frames, traced

PAUSES = """
import signal
import sys
from pathlib import Path
from distui.core.config.schema import TelemetrySection
from distui.core.paths import RunFolder
from distui.core.telemetry.source import open_source

source = open_source(0, 0, 1, RunFolder(Path(sys.argv[1])), TelemetrySection())
signal.signal(signal.SIGUSR1, lambda number, frame: None)

def rest():
    signal.pause()

rest()
print("on", flush=True)
source.close(0)
"""


def test_a_blocked_pause_is_not_ended_by_the_question_where_it_is(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run-1")
    run.create()
    environ = {**os.environ, "DISTUI_STATE_DIR": str(tmp_path), "DISTUI_RUNTIME_DIR": str(tmp_path / "r")}
    command = [sys.executable, "-c", PAUSES, str(run.path)]
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        until = time.monotonic() + 120
        while (known := known_stack(run, 0)) is None or "rest" not in known.frames[0]:
            assert time.monotonic() < until and process.poll() is None
        for _ in range(3):
            assert "rest" in trace_frames(traced(run, 0, process.pid, timeout_s=10.0))[0]
        assert not select.select([process.stdout], [], [], 0)[0]
        process.send_signal(signal.SIGUSR1)
        assert process.stdout.read() == b"on\n"
        assert process.wait(30) == 0
