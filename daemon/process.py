"""Is the process that spoke still there? Told by its pid and its time of start, so a recycled pid is not taken for it."""

from __future__ import annotations

import os
from functools import lru_cache
from typing import NamedTuple

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_SLACK_S = 2.0
"""The boot time that /proc gives is whole seconds, and a stepped clock moves it."""


class ProcessSight(NamedTuple):
    """What /proc says of a pid: the state letter (T is stopped, Z a zombie) and the start in clock ticks since boot."""

    state: str
    start_ticks: int


def look(pid: int) -> ProcessSight | None:
    """Return what /proc says of `pid`; None where there is no such process, or it has ended and waits to be reaped."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    if len(fields) < 20 or fields[0] in "ZX":
        return None
    return ProcessSight(fields[0], int(fields[19]))


def find(pid: int, spoke_s: float, start_ticks: int | None = None) -> ProcessSight | None:
    """Return the process `pid` if it is the one that spoke at Unix time `spoke_s`, and not a later one of that pid.

    `start_ticks` is the start that was seen before, where it was.
    """
    sight = look(pid) if pid else None
    if sight is None:
        return None
    if start_ticks is not None:
        return sight if sight.start_ticks == start_ticks else None
    return sight if _boot_s() + sight.start_ticks / _TICKS_PER_S <= spoke_s + _SLACK_S else None


@lru_cache(maxsize=1)
def _boot_s() -> float:
    with open("/proc/stat", encoding="ascii") as file:
        return next(float(line.split()[1]) for line in file if line.startswith("btime"))
