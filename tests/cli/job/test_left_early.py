"""A rank that leaves the loop before the others is the first that the end of a launch names."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any

TRAINING = """
import os, torch
import torch.distributed as dist
dist.init_process_group("gloo")
for step in range(40):
    if dist.get_rank() == 1 and step == 20:
        break
    dist.all_reduce(torch.ones(8))
"""
Done = subprocess.CompletedProcess[str]


def test_who_left_early_comes_before_who_lost_it(home: Any, distui: Callable[..., Done]) -> None:
    home.script("leaves.py", TRAINING)
    done = distui("launch", "--nproc", "2", "leaves.py", DISTUI_TELEMETRY_ENABLED="true")
    assert done.returncode == 3
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors[0].startswith("error: rank 1 on ") and "ended" in errors[0] and "give all ranks as many" in errors[0]
    assert errors[1].startswith("error: rank 0 failed on ")
