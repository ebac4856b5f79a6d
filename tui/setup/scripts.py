"""Find the training scripts near the config file, to offer them for `write and launch`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

MAX_FILES = 200
MAX_BYTES = 1 << 18
ENGINE_USE = re.compile(rb"^\s*(?:import distui\b|from distui\b)", re.MULTILINE)
ENGINE_CALL = re.compile(rb"\b(?:Engine|Accelerator)\(|\bdeepspeed\.initialize\(")


def find_scripts(folder: Path) -> list[str]:
    """Return the Python files of `folder` and its `examples/` that make an engine, relative to `folder`."""
    found = []
    for path in islice(_python_files(folder), MAX_FILES):
        try:
            with open(path, "rb") as file:
                text = file.read(MAX_BYTES)
        except OSError:  # unreadable: not one that could be launched
            continue
        if ENGINE_USE.search(text) and ENGINE_CALL.search(text):
            found.append(str(path.relative_to(folder)))
    return found


def _python_files(folder: Path) -> Iterator[Path]:
    yield from sorted(folder.glob("*.py"))
    yield from sorted((folder / "examples").glob("*.py"))
