"""What the kernel says of a process of this node."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

RUNNING, STOPPED, DEAD = "running", "stopped", "dead"
_SLACK_S = 2.0
"""Boot time and clock are known to about a second."""


def process_state(pid: int, began_s: float) -> str:
    """Return `running`, `stopped` (by a signal or a debugger) or `dead`.

    A process that started after `began_s` (Unix seconds) has taken over the pid of the one that is meant: `dead`.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return DEAD
    fields = stat.rpartition(")")[2].split()  # the name before may hold blanks
    state, started_ticks = fields[0], int(fields[19])
    if began_s and _boot_s() + started_ticks / os.sysconf("SC_CLK_TCK") > began_s + _SLACK_S:
        return DEAD
    if state in "ZXx":
        return DEAD
    return STOPPED if state in "Tt" else RUNNING


@lru_cache(maxsize=1)
def _boot_s() -> float:
    for line in Path("/proc/stat").read_text(encoding="utf-8").splitlines():
        if line.startswith("btime "):
            return float(line.split()[1])
    return 0.0
