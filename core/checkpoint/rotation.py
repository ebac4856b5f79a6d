"""Which checkpoints of a folder stay."""

from __future__ import annotations

import shutil
from pathlib import Path

from distui.core.checkpoint.folder import MANIFEST, PREFIX, working_folder


def checkpoints(folder: Path) -> list[Path]:
    """Return the whole checkpoints in `folder`, oldest first."""
    found = [path.parent for path in folder.glob(f"{PREFIX}*/{MANIFEST}")]
    return sorted(found, key=lambda path: path.name)


def keep_newest(folder: Path, count: int) -> list[Path]:
    """Delete all whole checkpoints but the newest `count`, and what crashes left; returns the deleted checkpoints.

    No save into `folder` may be in flight.
    """
    old = checkpoints(folder)[:-count]
    for path in old:
        # Renamed first: what is half deleted must not look whole.
        path.rename(working_folder(path))
    for path in folder.glob(working_folder(folder / f"{PREFIX}*").name):
        shutil.rmtree(path)
    return old
