"""Whose words come first and where: rank 0's stderr, the rank that failed first, and what a script leaves behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distui.launcher.node.streams import Marks, marks_of

BOTH = """
import logging, os, subprocess, sys, warnings
print("to stdout")
print("to stderr ü", file=sys.stderr)
logging.error("of a logger")
warnings.warn("of a warning")
os.write(1, b"from C\\n")
print("x" * 100_000, file=sys.stderr)
left = subprocess.Popen(["sleep", "600"], stdout=subprocess.DEVNULL)
raise_at_the_end = len(sys.argv) > 1
if raise_at_the_end:
    left.kill()
    raise ValueError("told on stderr")
"""
PEER = """
import os, socket, sys
# Rank 0 fails because its connection to rank 1 breaks; rank 1 is what is to blame.
name = "\\0" + os.environ["DISTUI_JOB"]
if os.environ["RANK"] == "0":
    server = socket.socket(socket.AF_UNIX)
    server.bind(name)
    server.listen()
    server.accept()[0].recv(1)
    raise RuntimeError("connection closed by peer")
while True:
    peer = socket.socket(socket.AF_UNIX)
    try:
        peer.connect(name)
        break
    except OSError:
        continue
raise KeyError("the cause")
"""
Done = subprocess.CompletedProcess[str]


def test_stderr_of_rank_0_is_stderr_and_its_log_has_both(home: Any, distui: Callable[..., Done]) -> None:
    home.script("both.py", BOTH)
    done = distui("launch", "--nproc", "1", "both.py", "raise")
    assert done.returncode == 3
    assert done.stdout == "to stdout\nfrom C\n"
    for told in ("to stderr ü", "ERROR:root:of a logger", "UserWarning: of a warning", "x" * 100_000, "told on stderr"):
        assert told in done.stderr
    log = home.run_named("both").rank_log(0).read_text(encoding="utf-8")
    assert log.startswith("to stdout\nto stderr ü\n") and log.index("of a warning") < log.index("from C")


def test_the_rank_that_failed_first_is_named_before_what_came_of_it(home: Any, distui: Callable[..., Done]) -> None:
    home.script("peer.py", PEER)
    done = distui("launch", "--nproc", "2", "peer.py")
    assert done.returncode == 3
    told, closed = done.stderr.index("rank 1 failed first: KeyError: 'the cause'"), done.stderr.find("closed by peer")
    assert closed == -1 or told < closed
    assert "error: rank 1 failed on" in done.stderr


def test_what_a_script_leaves_running_is_named(home: Any, distui: Callable[..., Done]) -> None:
    home.script("leaves.py", BOTH)
    done = distui("launch", "--nproc", "1", "leaves.py")
    assert done.returncode == 0
    found = re.search(r"distui: the script has left a process running, .*: pid (\d+) \(sleep 600\)", done.stderr)
    assert found is not None, done.stderr[-500:]
    os.kill(int(found[1]), signal.SIGKILL)


@pytest.mark.parametrize(("code", "status", "words"), [("", 0, "finished"), ("1 / 0", 3, "a rank failed")])
def test_a_run_s_folder_that_is_deleted_meanwhile_is_no_failure(
    home: Any, distui: Callable[..., Done], code: str, status: int, words: str
) -> None:
    home.script("cleans.py", f"import os, shutil\nshutil.rmtree(os.environ['DISTUI_JOB'])\n{code}\n")
    done = distui("launch", "--nproc", "1", "cleans.py")
    assert done.returncode == status and words in done.stderr and "is gone" in done.stderr
    assert "bug in distui" not in done.stderr


def test_marks_cut_a_log_wherever_it_is_read(tmp_path: Path) -> None:
    log = tmp_path / "rank0.log"
    marks_of(log).write_bytes(b"begun\n2 5\nbegun\n7 9\n")
    marks = Marks(log)
    assert marks.read()
    assert marks.cut(b"aaEE", 0) == [(False, b"aa"), (True, b"EE")]
    assert marks.cut(b"Ebb", 4) == [(True, b"E"), (False, b"bb")]
    with open(marks_of(log), "ab") as file:
        file.write(b"begun\n")
    assert not marks.read(), "what is being written has no place yet"
    assert marks.cut(b"EEc", 7) == [(True, b"EE"), (False, b"c")]
    marks.close()
