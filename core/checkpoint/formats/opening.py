"""Opens a checkpoint of whatever format it is."""

from __future__ import annotations

from pathlib import Path

from distui.core.checkpoint import folder as folders
from distui.core.checkpoint.formats.format1 import Checkpoint1
from distui.core.checkpoint.memory import MemoryCheckpoint, folder_in_memory
from distui.core.checkpoint.reading import Checkpoint


def open_checkpoint(target: Path) -> Checkpoint:
    """Return the checkpoint at `target`, of whatever format it is.

    Raises: UserError where there is none, or what it says of itself is damaged; tensors are checked when they are read.
    """
    source = folders.find(target)
    manifest = folders.read_manifest(source)
    if source == folder_in_memory():
        return MemoryCheckpoint(source, manifest)
    if manifest["format"] == 1:
        return Checkpoint1(source, manifest)
    return Checkpoint(source, manifest)
