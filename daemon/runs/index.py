"""All runs of this user, newest first, kept from one look to the next: most of thousands never change."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from distui.core.paths import RunFolder, is_run_id
from distui.daemon.runs.folders import check_run, started_s

SETTLED_NS = 1_000_000_000
"""A folder that has changed so lately may change again without a later time."""


@dataclass(slots=True)
class _Parent:
    mtime_ns: int = -1
    runs: dict[str, float] = field(default_factory=dict)
    """Name -> when it was started."""
    others: dict[str, int] = field(default_factory=dict)
    """What was no run of ours when it last changed, at this time: one that is being made is, soon."""


class RunIndex:
    """The runs in some folders. Only new ones are looked into; what an old one holds is checked as it is opened."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._parents: dict[Path, _Parent] = {}
        self._sorted: list[RunFolder] = []

    def folders(self, parents: Iterable[Path]) -> list[RunFolder]:
        """Return the runs of this user in these folders, newest first."""
        with self._lock:
            wanted = set(parents)
            changed = wanted != set(self._parents)
            self._parents = {path: self._parents.get(path) or _Parent() for path in wanted}
            for path, parent in self._parents.items():
                changed |= _refresh(path, parent)
            if changed:
                found = [
                    (started, name, path)
                    for path, parent in self._parents.items()
                    for name, started in parent.runs.items()
                ]
                self._sorted = [RunFolder(path / name) for _, name, path in sorted(found, reverse=True)]
            return self._sorted

    def has(self, path: Path) -> bool:
        """Tell whether a run was among the last that `folders` returned."""
        return (parent := self._parents.get(path.parent)) is not None and path.name in parent.runs


def _refresh(path: Path, parent: _Parent) -> bool:
    """Look at what may have changed in a folder; tell whether its runs have."""
    before = dict(parent.runs) if parent.others or parent.mtime_ns < 0 else None
    num_runs = len(parent.runs)
    try:
        mtime_ns = path.stat().st_mtime_ns
        names = set(os.listdir(path)) if mtime_ns != parent.mtime_ns else None
    except OSError:
        mtime_ns, names = -1, set()  # there is none yet
    if names is not None:
        parent.mtime_ns = mtime_ns if time.time_ns() - mtime_ns > SETTLED_NS else -1
        before = before if before is not None else dict(parent.runs)
        parent.runs = {name: started for name, started in parent.runs.items() if name in names}
        parent.others = {
            name: parent.others.get(name, -1) for name in names if is_run_id(name) and name not in parent.runs
        }
    for name, known_ns in list(parent.others.items()):
        run = RunFolder(path / name)
        try:
            if (at_ns := run.path.lstat().st_mtime_ns) == known_ns:
                continue
            parent.others[name] = at_ns if time.time_ns() - at_ns > SETTLED_NS else -1
            check_run(run)
        except OSError:
            continue
        parent.runs[name] = started_s(run)
        del parent.others[name]
    return len(parent.runs) != num_runs or (before is not None and before != parent.runs)
