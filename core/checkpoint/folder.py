"""A checkpoint's folder: which files in it are ours, and how a new checkpoint takes the place of an old one.

<folder>/manifest.json                  facts, and size and checksums of every file; what is in it names the data below
<folder>/distui-<step>-<lineage>-<hex>/ the data of one save (see `layout`)

A save writes a data folder of a name that was never there, and its manifest in it, all of it to the disk; then one
rename puts the manifest in the place of the old one; only then the old data go. So at every instant the folder holds a
whole checkpoint, the old or the new. No file that a save did not write is ever changed or removed: others may lie
beside the manifest, and inside the data folders too.

Format 1 (before) kept its files beside the manifest, and put a whole new folder in the place of the old one. It is
read; when it is saved over, its files go like other old data.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any

from distui.core.checkpoint.files import check_file
from distui.core.errors import UserError

MANIFEST = "manifest.json"
PREFIX = "step_"
"""How the folders of automatic checkpoints begin; the step follows, with zeros that make names sort."""
FORMAT, CUT_FORMAT = 2, 3
"""What is written, and what of tensors that parallelism has cut, which earlier versions do not read."""
_DATA = re.compile(r"distui-[0-9]{8,}-([0-9a-f]{8})-[0-9a-f]{8}")
_OWN = re.compile(r"rank[0-9]+\.(bin|json)|(index|common|manifest)\.json")
_OWN_1 = re.compile(r"__[0-9]+_[0-9]+\.distcp|\.metadata|state\.pt|rank[0-9]+\.pt|manifest\.json")
_LINEAGE = re.compile("[0-9a-f]{8,}")
_FILE = re.compile(rf"({_DATA.pattern}/)?(?!\.\.?$)[A-Za-z0-9_.-]+")
Manifest = dict[str, Any]


def old_folder(target: Path) -> Path:
    """Return where a crash of format 1 left the checkpoint that was at `target`."""
    return target.with_name(f"{target.name}.old")


def half_written(target: Path) -> Path:
    """Return where a crash of format 1 left what it was writing."""
    return target.with_name(f".{target.name}.writing")


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest in `folder`, after a look at everything in it that leads to other files.

    Raises: UserError where it is none of ours, or of a format that is not known.
    """
    path = folder / MANIFEST
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        ours = isinstance(found["format"], int) and isinstance(found["step"], int) and isinstance(found["files"], dict)
        ours = ours and all(_FILE.fullmatch(name) and _is_fact(fact) for name, fact in found["files"].items())
        ours = ours and all(_are_shapes(found[key]) for key in ("shapes", "buffer_shapes"))
        ours = ours and (found["format"] == 1 or bool(_DATA.fullmatch(found["data"])))
        ours = ours and bool(_LINEAGE.fullmatch(found.get("lineage", "0" * 8)))
        ours = ours and isinstance(found.get("saved_at_s", 0.0), (int, float))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise _foreign(path, f"{type(error).__name__}: {error}") from error
    if not ours:
        raise _foreign(path, "it has not the keys that distui writes, or names of files that lead elsewhere")
    if found["format"] not in (1, FORMAT, CUT_FORMAT):
        raise UserError(
            f"{folder} is of a newer distui",
            f"its format is {found['format']}, this one reads 1 to {CUT_FORMAT}",
            "upgrade distui",
        )
    return dict(found)


def _foreign(path: Path, why: str) -> UserError:
    return UserError(f"{path} is no manifest of a checkpoint", why, "move it away, or name another folder")


def _is_number(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_fact(fact: Any) -> bool:
    sums = fact["crc32"]
    if isinstance(sums, list):
        return _is_number(fact["bytes"]) and _is_number(fact["block_bytes"] - 1) and all(map(_is_number, sums))
    return _is_number(fact["bytes"]) and _is_number(sums)


def _are_shapes(shapes: Any) -> bool:
    return isinstance(shapes, dict) and all(all(map(_is_number, shape)) for shape in shapes.values())


# ---- writing ---------------------------------------------------------------------------------------------------------


def begin(target: Path, step: int, lineage: str) -> str:
    """Make a data folder in `target` for a checkpoint of `step`, and return its name; one rank calls it.

    Raises: UserError where a file of somebody else is in the way; OSError.
    """
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is no folder", "a checkpoint is a folder", "name another one")
    if os.path.lexists(target / MANIFEST):
        read_manifest(target)
    name = f"distui-{step:08d}-{lineage[:8]}-{secrets.token_hex(4)}"
    (target / name).mkdir(parents=True)
    return name


def commit(target: Path, data: str, files: dict[str, Any], facts: dict[str, object]) -> None:
    """Put the data folder `data`, whose files are on the disk, in the place of what `target` holds; one rank calls it.

    `files` are the facts of the data folder's files, by name.
    """
    old = read_manifest(target) if os.path.lexists(target / MANIFEST) else None
    named = {f"{data}/{name}": fact for name, fact in files.items()}
    sealed = target / data / MANIFEST
    with open(sealed, "x", encoding="utf-8") as file:
        json.dump({"format": FORMAT, **facts, "data": data, "files": named}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    _sync(target / data)
    os.replace(sealed, target / MANIFEST)
    _sync(target)
    _sync(target.parent)
    _clear(target, data, old)
    remove(old_folder(target))


def abandon(target: Path, data: str, made: bool) -> None:
    """Remove what a save that failed has written, with `target` itself where the save `made` it."""
    if os.path.lexists(target / MANIFEST) and read_manifest(target).get("data") == data:
        return  # it failed after it was in place
    _drop_data(target / data)
    if made:
        with suppress(OSError):  # it holds what others put there
            target.rmdir()


def remove(folder: Path) -> None:
    """Remove the checkpoint in `folder`, whole or not, and the folder if nothing else is in it."""
    if not folder.is_dir() or folder.is_symlink():
        return
    try:
        manifest = read_manifest(folder)
    except (UserError, OSError):  # none, or none of ours: then only names tell
        manifest = None
    if manifest is not None:
        # First: what is half removed must not look whole.
        (folder / MANIFEST).unlink()
        _sync(folder)
    _clear(folder, None, manifest)
    with suppress(OSError):  # it holds what others put there
        folder.rmdir()


def is_unfinished(folder: Path, lineage: str) -> bool:
    """Return whether a save of `lineage` began in `folder`, and no save has ever ended there."""
    if os.path.lexists(folder / MANIFEST) or not folder.is_dir():
        return False
    names = [_DATA.fullmatch(path.name) for path in folder.iterdir()]
    return any(name is not None and name[1] == lineage[:8] for name in names)


def remove_half_written(folder: Path) -> None:
    """Remove what a crash of format 1 left: such a folder had our files only, and no manifest."""
    _drop(folder, _OWN_1)


def _clear(target: Path, keep: str | None, old: Manifest | None) -> None:
    """Remove all data in `target` but those of `keep`: of the manifest `old`, and what crashes left."""
    for path in target.iterdir():
        if path.name != keep and _DATA.fullmatch(path.name):
            _drop_data(path)
    if old is not None and old["format"] == 1:
        for name in old["files"]:
            if _OWN_1.fullmatch(name):
                _unlink(target / name)


def _drop_data(folder: Path) -> None:
    _drop(folder, _OWN)


def _drop(folder: Path, own: re.Pattern[str]) -> None:
    if not folder.is_dir() or folder.is_symlink():
        return
    for path in folder.iterdir():
        if own.fullmatch(path.name):
            _unlink(path)
    with suppress(OSError):  # it holds what others put there
        folder.rmdir()


def _unlink(path: Path) -> None:
    # A link is nobody's of ours. What cannot be removed does no harm: no manifest names it.
    if path.is_file() and not path.is_symlink():
        with suppress(OSError):
            path.unlink()


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- reading ---------------------------------------------------------------------------------------------------------


def find(target: Path) -> Path:
    """Return the folder to read for `target`.

    Raises: UserError where there is none, or none that is whole.
    """
    for folder in (target, old_folder(target)):
        if (folder / MANIFEST).is_file():
            return folder
    if target.exists():
        why, fix = f"it has no {MANIFEST}, so it was never finished", "load an earlier checkpoint"
    else:
        beside = sorted(path.parent.name for path in target.parent.glob(f"*/{MANIFEST}"))
        why = "there is no such folder" + (f"; beside it are {', '.join(beside[:8])}" if beside else "")
        fix = "give the folder that save_state wrote"
    raise UserError(f"{target} is not a checkpoint", why, fix)


def verify(folder: Path) -> Manifest:
    """Read the manifest and compare every file with it.

    Raises: UserError that names the damaged files.
    """
    manifest = read_manifest(folder)
    wrong = []
    for name, fact in manifest["files"].items():
        try:
            check_file(folder / name, fact)
        except UserError as error:
            wrong.append(error.why)
    if wrong:
        raise UserError(f"the checkpoint {folder} is damaged", "; ".join(wrong), "load an earlier checkpoint")
    return manifest
