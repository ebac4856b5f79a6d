"""Whether a process of this node is at work: CPU time and I/O, also its children's, and what it waits for."""

from __future__ import annotations

import os
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from distui.daemon.node.connections import carried

WINDOW_S = 2.5
"""What a process did in this time counts as what it does."""
MIN_WINDOW_S = 0.2
BUSY_CORES = 0.3
"""A rank that waits costs a few hundredths of a core: its side threads."""
BUSY_BYTES_S = 1 << 20
BUSY_CARRIED_S = 64 << 10
"""Over the network: an upload is slower than a disk, and what stores and heartbeats send is far less."""
RUNNABLE_SHARE = 0.6
MIN_LOOKS = 3
_FORGET_S = 60.0
_SLEEPS = ("nanosleep", "wait_woken", "wait_data")
"""The kernel's names for what `sleep` and `recv` wait in; none of telemetry's, gloo's or gRPC's threads does."""


@dataclass(frozen=True, slots=True)
class _Sample:
    time_s: float
    cpu_s: float
    num_bytes: int
    carried: dict[int, int]
    runnable: bool
    num_children: int


@dataclass(frozen=True, slots=True)
class Activity:
    """What a process and its children did of late."""

    cores: float
    bytes_s: float
    carried_s: float
    """By TCP connections."""
    runnable: bool
    """Whether it would run if it got a core, or waits for a disk, nearly whenever it is looked at."""
    num_children: int
    waits_in: str
    """The kernel's name for what the main thread waits in; "" where it runs, or that is not told."""

    @property
    def moves_data(self) -> bool:
        """Whether it reads or writes, sends or receives."""
        return self.bytes_s > BUSY_BYTES_S or self.carried_s > BUSY_CARRIED_S

    @property
    def busy(self) -> bool:
        """Whether it is at work, as the kernel sees it."""
        return self.cores > BUSY_CORES or self.runnable or self.moves_data

    @property
    def waits_for_child(self) -> bool:
        """Whether the main thread waits for a child process to end."""
        return self.num_children > 0 and self.waits_in == "do_wait"

    @property
    def waits_for_lock(self) -> bool:
        """Whether the main thread waits for another thread."""
        return "futex" in self.waits_in

    def text(self) -> str:
        """Return `97% of a core, 80 MiB/s, 2 children`."""
        words = [f"{self.cores:.0%} of a core"]
        words += [f"{self.bytes_s / 2**20:,.0f} MiB/s of files"] * (self.bytes_s > BUSY_BYTES_S)
        words += [f"{self.carried_s / 2**20:,.1f} MiB/s of network"] * (self.carried_s > BUSY_CARRIED_S)
        words += [f"{self.num_children} child process{'es' * (self.num_children > 1)}"] * bool(self.num_children)
        return ", ".join(words)


_samples: dict[tuple[int, float], deque[_Sample]] = {}


def note(pid: int, began_s: float) -> None:
    """Take a sample of a process, so that a later `activity` need not wait for one."""
    _look(pid, began_s)


def activity(pid: int, began_s: float) -> Activity | None:
    """Return what a process has done of late; None where it is gone. Waits a little where it was not noted before."""
    samples = _look(pid, began_s)
    if samples is not None and len(samples) < 2:
        time.sleep(MIN_WINDOW_S)
        samples = _look(pid, began_s)
    if samples is None:
        return None
    first, last = samples[0], samples[-1]
    lasted_s = max(last.time_s - first.time_s, MIN_WINDOW_S)
    runnable = len(samples) >= MIN_LOOKS and sum(one.runnable for one in samples) > RUNNABLE_SHARE * len(samples)
    return Activity(
        max(0.0, last.cpu_s - first.cpu_s) / lasted_s,
        max(0, last.num_bytes - first.num_bytes) / lasted_s,
        sum(now - first.carried.get(inode, 0) for inode, now in last.carried.items()) / lasted_s,
        runnable,
        last.num_children,
        _read(Path(f"/proc/{pid}/wchan")).strip("0\n"),
    )


def waits_for_time_or_peer(pid: int) -> bool:
    """Tell whether another thread than the main one, or a child, sleeps for a time, or waits for somebody's answer."""
    waits = (
        _read(Path(f"/proc/{one}/task/{task}/wchan"))
        for one in (pid, *(_children(pid) or ()))
        for task in _tasks(one)
        if task != str(pid)
    )
    return any(part in wait for wait in waits for part in _SLEEPS)


def _look(pid: int, began_s: float) -> deque[_Sample] | None:
    now_s = time.monotonic()
    for key in [key for key, samples in _samples.items() if now_s - samples[-1].time_s > _FORGET_S]:
        del _samples[key]
    samples = _samples.setdefault((pid, began_s), deque())
    if samples and now_s - samples[-1].time_s < MIN_WINDOW_S:
        return samples  # watchers ask many times a second, and a look is not free
    children = _children(pid)
    if children is None:
        del _samples[pid, began_s]
        return None
    cpu_s, num_bytes, runnable = 0.0, 0, False
    for one in (pid, *children):
        cpu_s += _cpu_s(one)
        num_bytes += _num_bytes(one)
        runnable |= one != os.getpid() and _runnable(one)  # of whoever looks it says nothing that it runs
    samples.append(_Sample(now_s, cpu_s, num_bytes, carried([pid, *children]), runnable, len(children)))
    while len(samples) > 2 and now_s - samples[1].time_s >= WINDOW_S:
        samples.popleft()
    if now_s - samples[0].time_s > 2 * WINDOW_S:  # nobody has looked for long: what was then is not what is now
        samples.popleft()
    return samples


def _children(pid: int) -> list[int] | None:
    """Return all descendants of a process but this one; None where it is gone."""
    found: list[int] = []
    at = -1
    while at < len(found):
        parent = pid if at < 0 else found[at]
        try:
            tasks = os.listdir(f"/proc/{parent}/task")
        except OSError:
            if at < 0:
                return None
            tasks = []
        for task in tasks:
            found += map(int, _read(Path(f"/proc/{parent}/task/{task}/children")).split())
        at += 1
    return [one for one in found if one != os.getpid()]


def _cpu_s(pid: int) -> float:
    """Return the CPU time of a process and of its children that have ended."""
    fields = _read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK") if len(fields) > 14 else 0.0


def _num_bytes(pid: int) -> int:
    counts = dict(line.split(": ") for line in _read(Path(f"/proc/{pid}/io")).splitlines())
    return max(
        int(counts.get("rchar", 0)) + int(counts.get("wchar", 0)),
        int(counts.get("read_bytes", 0)) + int(counts.get("write_bytes", 0)),
    )


def _runnable(pid: int) -> bool:
    stats = (_read(Path(f"/proc/{pid}/task/{task}/stat")) for task in _tasks(pid))
    return any(stat.rpartition(")")[2].split()[:1] in (["R"], ["D"]) for stat in stats)


def _tasks(pid: int) -> list[str]:
    try:
        return os.listdir(f"/proc/{pid}/task")
    except OSError:
        return []  # it has ended


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""  # it has ended, or is not this user's
