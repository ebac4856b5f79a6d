"""How long telemetry is kept: by age and by size, the oldest goes first; logs, outcomes and checkpoints stay."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from distui.core.paths import RunFolder, list_own, remove_own
from distui.daemon.runs.store import segment_files

DAY_S = 86400.0
GIB = 1 << 30
_log = logging.getLogger("distui.daemon")


@dataclass(frozen=True, slots=True)
class Retention:
    """What may stay on the disk. 0 is no limit."""

    keep_s: float
    keep_bytes: int


@dataclass(slots=True)
class _Segment:
    path: Path
    size: int
    written_s: float


def prune(folders: Iterable[RunFolder], retention: Retention, now_s: float | None = None) -> int:
    """Delete telemetry that is too old or too much, and return the bytes that were freed.

    A run's first segment, which says what the run is, and its last, which is written to, go only by age and only once
    the run has ended.
    """
    now_s = time.time() if now_s is None else now_s
    ended: list[_Segment] = []
    middle: list[_Segment] = []
    total = 0
    for run in folders:
        try:
            segments = [_Segment(path, _on_disk(found), found.st_mtime) for path, found in segment_files(run).items()]
            over = run.outcome.name in list_own(run.path)
        except OSError as error:
            _log.warning("the telemetry of %s is not looked at: %s", run.run_id, error)
            continue
        total += sum(segment.size for segment in segments)
        if over:
            ended += segments
        else:
            middle += segments[1:-1]
    freed = 0
    for segment in sorted(ended, key=lambda segment: segment.written_s):
        old = retention.keep_s and now_s - segment.written_s > retention.keep_s
        if old or (retention.keep_bytes and total - freed > retention.keep_bytes):
            freed += _delete(segment)
    for segment in sorted(middle, key=lambda segment: segment.written_s):
        if retention.keep_bytes and total - freed > retention.keep_bytes:
            freed += _delete(segment)
    if freed:
        _log.info("deleted %.1f MiB of old telemetry", freed / (1 << 20))
    return freed


def _on_disk(found: os.stat_result) -> int:
    """Return what a file takes of the disk: one with holes says that it is larger."""
    return min(found.st_size, found.st_blocks * 512)


def _delete(segment: _Segment) -> int:
    try:
        remove_own(segment.path)
    except OSError as error:
        _log.warning("old telemetry stays: %s", error)
        return 0
    return segment.size
