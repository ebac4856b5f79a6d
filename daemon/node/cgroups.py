"""What control groups (versions 1 and 2) let processes of this node have of processors and memory."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
LOOK_S = 1.0
WINDOW_S = 10.0
MIN_PERIODS = 20
"""Of 100 ms each, in which the group wanted a processor: in fewer a short burst shows as much as a limit."""
_UNLIMITED = 1 << 60


def _groups(pid: int, controller: str, root: Path, proc: Path) -> Iterator[Path]:
    """Yield the folders of a process's groups for `controller`, its own first, then those around it."""
    try:
        lines = (proc / str(pid) / "cgroup").read_text().splitlines()
    except OSError:
        return  # it has ended
    for line in lines:
        _, names, path = line.split(":", 2)
        if names and controller not in names.split(","):
            continue
        tops = [root / names, root / controller] if names else [root, root / "unified"]
        for top in tops:
            here = top / path.lstrip("/")
            for folder in (here, *here.parents):
                if folder.is_dir() and (folder == top or top in folder.parents):
                    yield folder
                if folder == top:
                    break


def _numbers(path: Path) -> dict[str, int]:
    try:
        fields = (line.split() for line in path.read_text().splitlines())
        return {one[0]: int(one[1]) for one in fields if len(one) == 2 and one[1].isdigit()}
    except OSError:
        return {}


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().split()[0]
    except (OSError, IndexError):
        return None
    return int(text) if text.isdigit() else None


def memory_left(pid: int, root: Path = ROOT, proc: Path = Path("/proc")) -> int | None:
    """Return how many bytes the groups of a process may still take; None where none is limited.

    File pages that the kernel would drop first do not count as taken.
    """
    left = []
    for folder in _groups(pid, "memory", root, proc):
        limit = _number(folder / "memory.max") or _number(folder / "memory.limit_in_bytes")
        used = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes")
        if limit is None or used is None or limit >= _UNLIMITED:
            continue
        stat = _numbers(folder / "memory.stat")
        left.append(max(0, limit - used + stat.get("total_inactive_file", stat.get("inactive_file", 0))))
    return min(left, default=None)


def _cores(folder: Path) -> float | None:
    """Return how many cores a group may use; None where it is not limited."""
    try:
        quota, period = (folder / "cpu.max").read_text().split()
    except (OSError, ValueError):
        found = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
        return found[0] / found[1] if found[0] and found[1] else None  # -1, no limit, is no number here
    return int(quota) / int(period) if quota.isdigit() else None


@dataclass(frozen=True, slots=True)
class Held:
    """A group whose processes wait for their next share of the processors."""

    pids: tuple[int, ...]
    cores: float
    share: float
    """Of the periods in which it ran, those in which it was held."""


@dataclass(slots=True)
class Throttling:
    """Looks at the groups of processes about once a second, and says which are held down most of the time."""

    root: Path = ROOT
    proc: Path = Path("/proc")
    _samples: dict[Path, deque[tuple[float, int, int]]] = field(default_factory=dict)
    _pids: dict[Path, set[int]] = field(default_factory=dict)
    _looked_s: float = -LOOK_S

    def look(self, pids: Iterable[int]) -> list[Held]:
        """Return the groups that were held in part of their periods, in the last seconds."""
        now_s = time.monotonic()
        if now_s - self._looked_s >= LOOK_S:
            self._looked_s = now_s
            self._pids = {}
            for pid in pids:
                for folder in _groups(pid, "cpu", self.root, self.proc):
                    self._pids.setdefault(folder, set()).add(pid)
            for folder in self._pids:
                stat = _numbers(folder / "cpu.stat")
                if not stat.get("nr_periods"):
                    continue  # without a limit nothing is counted
                samples = self._samples.setdefault(folder, deque())
                samples.append((now_s, stat["nr_periods"], stat.get("nr_throttled", 0)))
                while now_s - samples[0][0] > WINDOW_S:
                    samples.popleft()
            self._samples = {folder: one for folder, one in self._samples.items() if folder in self._pids}
        found = []
        for folder, samples in self._samples.items():
            periods, throttled = samples[-1][1] - samples[0][1], samples[-1][2] - samples[0][2]
            if periods >= MIN_PERIODS and throttled and (cores := _cores(folder)):
                found.append(Held(tuple(sorted(self._pids[folder])), cores, throttled / periods))
        return found
