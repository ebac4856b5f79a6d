"""Real text that every machine has: the source of Python's standard library."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path
from typing import Literal

import torch
from torch.utils.data import Dataset

MAX_BYTES = 4 * 2**20
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
VALIDATION_EVERY = 20


def read_stdlib(max_bytes: int = MAX_BYTES, folder: Path | None = None) -> bytes:
    """Return the first `max_bytes` of the library's .py files, joined in the order of their paths."""
    root = folder or Path(sysconfig.get_paths()["stdlib"])
    paths: list[Path] = []
    for parent, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        paths += [Path(parent, name) for name in files if name.endswith(".py")]
    text = bytearray()
    for path in sorted(paths, key=lambda path: path.relative_to(root).as_posix()):
        text += path.read_bytes()
        if len(text) >= max_bytes:
            break
    return bytes(text[:max_bytes])


class StdlibText(Dataset[dict[str, torch.Tensor]]):
    """Windows of `context` bytes with the bytes that follow each; every 20th window is kept for validation."""

    def __init__(
        self,
        context: int = 128,
        split: Literal["train", "validation"] = "train",
        max_bytes: int = MAX_BYTES,
        folder: Path | None = None,
    ) -> None:
        self.context = context
        self._text = torch.frombuffer(bytearray(read_stdlib(max_bytes, folder)), dtype=torch.uint8)
        windows = range((len(self._text) - 1) // context)
        self._windows = [window for window in windows if (window % VALIDATION_EVERY == 0) == (split == "validation")]

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        begin = self._windows[index] * self.context
        window = self._text[begin : begin + self.context + 1].long()
        return {"input_ids": window[:-1], "labels": window[1:]}
