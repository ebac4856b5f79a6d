"""A checkpoint's folder: written beside its place, sealed by a manifest of checksums, then renamed into place.

A crash at any moment leaves the last good checkpoint: until the rename it is untouched, and between the two renames it
waits as `<name>.old`, where `find` looks.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from pathlib import Path

from distui.core.errors import UserError
from distui.core.paths import write_atomic

MANIFEST = "manifest.json"
PREFIX = "step_"
"""How the folders of automatic checkpoints begin; the step follows, with zeros that make names sort."""
FORMAT = 1
_BLOCK_BYTES = 1 << 20


def working_folder(target: Path) -> Path:
    """Return where the checkpoint is written before it is whole."""
    return target.with_name(f".{target.name}.writing")


def _old(target: Path) -> Path:
    return target.with_name(f"{target.name}.old")


def checksum(path: Path) -> int:
    """Return the CRC-32 of a file."""
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            crc = zlib.crc32(block, crc)
    return crc


def describe(folder: Path, names: list[str]) -> dict[str, dict[str, int]]:
    """Return size and checksum of the files `names`, and see that they are on the disk."""
    found = {}
    for name in names:
        path = folder / name
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        found[name] = {"bytes": path.stat().st_size, "crc32": checksum(path)}
    return found


def commit(target: Path, files: dict[str, dict[str, int]], facts: dict[str, object]) -> None:
    """Seal the working folder with its manifest and put it in the place of `target`; one rank calls it."""
    folder = working_folder(target)
    write_atomic(folder / MANIFEST, json.dumps({"format": FORMAT, **facts, "files": files}, indent=1))
    if target.exists():
        shutil.rmtree(_old(target), ignore_errors=True)
        os.rename(target, _old(target))
    os.rename(folder, target)
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    shutil.rmtree(_old(target), ignore_errors=True)


def find(target: Path) -> Path:
    """Return the folder to read for `target`.

    Raises: UserError where there is none, or none that is whole.
    """
    for folder in (target, _old(target)):
        if (folder / MANIFEST).is_file():
            return folder
    if target.exists():
        why, fix = f"it has no {MANIFEST}, so it was never finished", "load an earlier checkpoint"
    else:
        beside = sorted(path.parent.name for path in target.parent.glob(f"*/{MANIFEST}"))
        why = "there is no such folder" + (f"; beside it are {', '.join(beside[:8])}" if beside else "")
        fix = "give the folder that save_state wrote"
    raise UserError(f"{target} is not a checkpoint", why, fix)


def verify(folder: Path) -> dict[str, object]:
    """Read the manifest and compare every file with it.

    Raises: UserError that names the damaged files.
    """
    manifest = json.loads((folder / MANIFEST).read_text())
    damaged = []
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            damaged.append(f"{name} is missing")
        elif path.stat().st_size != expected["bytes"]:
            damaged.append(f"{name} has {path.stat().st_size:,} bytes instead of {expected['bytes']:,}")
        elif checksum(path) != expected["crc32"]:
            damaged.append(f"{name} has other contents than were written")
    if damaged:
        raise UserError(f"the checkpoint {folder} is damaged", "; ".join(damaged), "load an earlier checkpoint")
    return dict(manifest)
