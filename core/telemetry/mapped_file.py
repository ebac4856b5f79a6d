"""Memory-mapped files that replace older ones whole, once they are filled."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from distui.core.paths import open_own, remove_own


def map_new(path: Path | None, num_bytes: int) -> mmap.mmap:
    """Map a new file beside `path`, its blocks reserved, until `publish` gives it its name; None: memory only.

    Raises: OSError where the file cannot be made, a full disk included.
    """
    if path is None:
        return mmap.mmap(-1, num_bytes)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = open_own(_temporary(path), os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        # Reserved now: a store into a hole of a full disk would be a SIGBUS in the training thread.
        os.posix_fallocate(descriptor, 0, num_bytes)
        return mmap.mmap(descriptor, num_bytes, flags=mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))
    except OSError:
        remove_own(_temporary(path))
        raise
    finally:
        os.close(descriptor)


def publish(path: Path) -> None:
    """Give the file that `map_new` made the name `path`; who reads an older one goes on reading that."""
    os.replace(_temporary(path), path)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")
