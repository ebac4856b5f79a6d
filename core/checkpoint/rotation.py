"""Which checkpoints of a folder stay."""

from __future__ import annotations

import shutil
from pathlib import Path

from distui.core.checkpoint.folder import MANIFEST


def checkpoints(folder: Path) -> list[Path]:
    """Return the whole checkpoints in `folder`, oldest first."""
    found = [path.parent for path in folder.glob(f"step_*/{MANIFEST}")]
    return sorted(found, key=lambda path: path.name)


def keep_newest(folder: Path, count: int) -> list[Path]:
    """Delete all whole checkpoints but the newest `count`; returns what was deleted."""
    old = checkpoints(folder)[:-count]
    for path in old:
        # The manifest goes first: what is half deleted must not look whole.
        (path / MANIFEST).unlink()
        shutil.rmtree(path)
    return old
