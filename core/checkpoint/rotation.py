"""Which checkpoints of a folder stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distui.core.checkpoint import folder as folders
from distui.core.checkpoint.folder import MANIFEST, PREFIX
from distui.core.errors import UserError


def checkpoints(folder: Path) -> list[Path]:
    """Return the whole checkpoints in `folder`, by the time at which they were saved, oldest first."""
    return [path for path, _ in _dated(folder)]


def _dated(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    found = []
    for path in folder.glob(f"{PREFIX}*/{MANIFEST}"):
        try:
            manifest = folders.read_manifest(path.parent)
            # Format 1 did not say when it was saved; the file does.
            found.append((float(manifest.get("saved_at_s", path.stat().st_mtime)), path.parent, manifest))
        except (UserError, OSError, TypeError, ValueError):  # no checkpoint of ours, or gone by now
            continue
    found.sort(key=lambda entry: (entry[0], entry[1].name))
    return [(path, manifest) for _, path, manifest in found]


def keep_newest(folder: Path, count: int, lineage: str) -> list[Path]:
    """Remove the checkpoints of `lineage` in `folder` but its newest `count`, and what crashes left of it.

    Returns the checkpoints that were removed. A lineage is a run with the runs that went on from its checkpoints. Those
    of others stay, whatever their steps; so do files that no save wrote. No save of the lineage may be in flight.
    """
    old = [path for path, manifest in _dated(folder) if manifest.get("lineage") == lineage][:-count]
    for path in old:
        folders.remove(path)
    for path in folder.glob(f"{PREFIX}*"):
        if folders.is_unfinished(path, lineage):
            folders.remove(path)
    for path in folder.glob(folders.half_written(folder / f"{PREFIX}*").name):
        folders.remove_half_written(path)
    return old
