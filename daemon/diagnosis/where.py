"""Stacks in a verdict: which frame is the user's, and how a process that holds its interpreter's lock is asked."""

from __future__ import annotations

import sysconfig
import time

from distui.core.paths import RunFolder
from distui.core.telemetry.stacks import trace_frames, traced

NUM_FRAMES = 4
ASK_AGAIN_S = 30.0
_NOT_OWN = ("/torch/", "/distui/", "/site-packages/", "<frozen", sysconfig.get_paths()["stdlib"])
_asked: dict[tuple[str, int, int], tuple[float, tuple[str, ...]]] = {}


def own_place(frames: tuple[str, ...]) -> str:
    """Return the innermost frame of the user's own code, `train.py:31 load`; the innermost where none is."""
    for frame in frames:
        if not any(part in frame for part in _NOT_OWN):
            return _short(frame)
    return _short(frames[0]) if frames else "n/a"


def text_of(frames: tuple[str, ...]) -> str:
    """Return a stack in one line: the innermost frame, and the user's own frames below it."""
    frames = tuple(frame for frame in frames if "/distui/core/telemetry/collectives.py" not in frame) or frames
    own = [frame for frame in frames if not any(part in frame for part in _NOT_OWN)]
    shown = own if frames[0] in own else [frames[0], *own]
    more = f" < {len(shown) - NUM_FRAMES} more" if len(shown) > NUM_FRAMES else ""
    return " < ".join(_short(frame) for frame in shown[:NUM_FRAMES]) + more


def traced_frames(run: RunFolder, rank: int, pid: int, incarnation: int, now_s: float) -> tuple[str, ...]:
    """Return the main thread's frames from the signal handler of a process; asked for once in a while."""
    key = (str(run.path), rank, incarnation)
    asked_s, frames = _asked.get(key, (0.0, ()))
    if time.monotonic() - asked_s > ASK_AGAIN_S or not asked_s:
        frames = trace_frames(traced(run, rank, pid, timeout_s=0.3))
        _asked[key] = (time.monotonic(), frames)
    return frames


def _short(frame: str) -> str:
    place, _, function = frame.rpartition(" ")
    return f"{place.rpartition('/')[2]} in {function}"
