"""A fork in the middle of a read past the page cache: the read is over first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import os, sys, threading
import torch
from distui.core.sharding.homes import nvme
from distui.core.sharding.homes.home import flat_buffer

home = nvme.NvmeHome(sys.argv[1], lambda message: None, pinned=False)
cell = home.cell(4096, torch.float32)
values = flat_buffer(4096, torch.float32, torch.device("cpu"))
values.fill_(3.0)
cell.store(values).wait()
gate = threading.Event()
move = nvme.move_chunk

def slowly(handle, write, view, offset):
    gate.wait()
    move(handle, write, view, offset)

nvme.move_chunk = slowly
os.register_at_fork(before=gate.set)  # the last to be registered is called first
out = flat_buffer(4096, torch.float32, torch.device("cpu"))
transfer = cell.fetch(out)
child = os.fork()
if child == 0:
    os._exit(0 if transfer.over.is_set() and bool(out.eq(3.0).all()) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, "forked in the middle of the read"
transfer.wait()
"""


def test_a_fork_waits_for_reads_from_the_disk(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
