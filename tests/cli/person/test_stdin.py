"""A person at a job: rank 0 has the stdin of the launcher, and `breakpoint()` stops one rank, which is not hung."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

ASKS = """
import os, sys
if os.environ["RANK"] == "0":
    print("to be seen first")
    answer = input("go on? ")
    print("answered", answer, "then", sys.stdin.read().split())
else:
    try:
        input()
    except EOFError:
        open("other.txt", "w").write("no stdin")
"""
STOPS = """
import os
import torch
import torch.distributed as dist
dist.init_process_group("gloo")
rank = dist.get_rank()
value = torch.tensor([rank + 1.0])
print("to be seen first")
breakpoint()
dist.all_reduce(value)
print("sum", value.item())
dist.destroy_process_group()
"""


def test_a_pipe_into_the_launcher_reaches_rank_0_alone(home: Any) -> None:
    home.script("asks.py", ASKS)
    done = subprocess.run(
        [sys.executable, "-m", "distui", "launch", "--no-tui", "--nproc", "2", "asks.py"],
        cwd=home.path,
        env={"DISTUI_TELEMETRY_ENABLED": "false", **home.environ},
        input="yes\nmore\nlines\n",
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "to be seen first\ngo on? answered yes then ['more', 'lines']\n"
    assert (home.path / "other.txt").read_text() == "no stdin"


def test_a_terminal_asks_after_what_was_printed_and_answers(home: Any, terminal: Any) -> None:
    home.script("asks.py", ASKS)
    shown = terminal(home, "launch", "--no-tui", "--nproc", "1", "asks.py", DISTUI_TELEMETRY_ENABLED="false")
    assert "to be seen first" in shown.until("go on? ")
    shown.type("certainly\n\x04")
    shown.until("answered certainly then []")
    assert shown.end() == 0


def test_a_breakpoint_of_several_ranks_stops_rank_0_at_the_terminal(home: Any, terminal: Any) -> None:
    home.script("stops.py", STOPS)
    shown = terminal(home, "launch", "--no-tui", "--nproc", "2", "stops.py", DISTUI_TELEMETRY_ENABLED="false")
    assert "to be seen first" in shown.until("(Pdb) ")
    shown.type("p 'value', value.item()\n")
    assert "('value', 1.0)" in shown.until("(Pdb) ")
    shown.type("p valu\t.add_(10)\n")  # completed: the terminal is the debugger's own
    assert "tensor([11.])" in shown.until("(Pdb) ")
    shown.type("c\n")
    shown.until("sum 13.0")
    assert shown.end() == 0
    (run,) = [run for run in home.runs() if run.run_id.startswith("stops-")]
    assert "rank 1 passes over breakpoint() at stops.py:9: rank 0 is the one that stops" in run.rank_log(1).read_text()
