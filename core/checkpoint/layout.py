"""Where a checkpoint's tensors lie in its files.

rank<R>.bin   what rank R wrote: the elements of its ranges, one range after another, and its larger states
rank<R>.json  the states of rank R alone (see `plain`), and where their tensors lie in rank<R>.bin
common.json   the states that all ranks share, likewise, in rank 0's file
index.json    of every tensor the format, the size, and the ranges of it: in which file, where, from which element on

Of what parallelism had cut, the ranges are boxes of the whole (format 3): where each begins, its size, the whole shape.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from distui.core.axes.cut import Box, row_strides
from distui.core.checkpoint.files import Facts, Opened, SummedFile, new_file, write_file
from distui.core.checkpoint.flat import FlatShard
from distui.core.checkpoint.plain import DTYPES, Plain
from distui.core.errors import UserError

INDEX, COMMON = "index.json", "common.json"
Number = bool | int | float


def data_file(rank: int) -> str:
    """Return the name of a rank's file of tensors."""
    return f"rank{rank:05d}.bin"


def state_file(rank: int) -> str:
    """Return the name of a rank's file of its own states."""
    return f"rank{rank:05d}.json"


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some elements of a tensor, flattened: where they lie, and which they are."""

    file: str
    offset: int
    """Byte in the file."""
    start: int
    numel: int
    nbytes: int
    box: Box | None = None
    """Where the elements lie in the whole, if they are no range of it; `start` is then 0."""


@dataclass(slots=True)
class Entry:
    """A tensor of a checkpoint; a parameter or what has its shape is flattened. Or, with `number`, no tensor at all."""

    size: torch.Size
    dtype: torch.dtype
    chunks: list[Chunk] = field(default_factory=list)
    shape: tuple[int, ...] | None = None
    """The whole shape, where the ranges are boxes."""
    number: Number | None = None
    value: float | None = None
    """What a tensor without dimensions holds, where that was read."""

    def take_value(self, at: int, values: torch.Tensor) -> None:
        """Keep what was read of a tensor without dimensions."""
        self.value = float(values)


Items = Mapping[str, Any]
"""What a rank writes by key: `FlatShard`s, whole tensors, and numbers."""


def write_rank(
    folder: Path, rank: int, items: Items, own: Plain | None, common: Plain | None, opened: Opened = new_file
) -> dict[str, Any]:
    """Write a rank's files, and return what of them the index and the manifest must know, as JSON."""
    chunks, numbers, facts = [], {}, {}
    file = SummedFile(folder / data_file(rank), opened)
    try:
        for key, item in items.items():
            if not isinstance(item, torch.Tensor):
                numbers[key] = item
                continue
            is_flat = isinstance(item, FlatShard)
            values = item.read() if isinstance(item, FlatShard) else item
            if not values.numel() and is_flat:
                continue
            dtype = str(item.dtype).removeprefix("torch.")
            if dtype not in DTYPES:
                raise UserError(f"{key} cannot be saved", f"its elements are {dtype}", "convert it before saving")
            if isinstance(item, FlatShard) and item.cut is not None:
                for box in item.boxes:
                    offset = file.write_tensor(item.read_box(box).view(-1))
                    chunks.append([key, dtype, list(item.shape), offset, box.start, box.size, item.cut.shape])
                continue
            start = item.start if isinstance(item, FlatShard) else 0
            chunks.append([key, dtype, list(item.shape), file.write_tensor(values), start, values.numel()])
        for name, plain in ((state_file(rank), own), (COMMON, common)):
            if plain is not None:
                places = [[file.write_tensor(tensor), tensor.numel()] for tensor in plain.tensors]
                content = {"tree": plain.tree, "file": data_file(rank), "places": places}
                facts[name] = write_file(folder / name, json.dumps(content, allow_nan=False).encode(), opened)
        facts[data_file(rank)] = file.finish()
    finally:
        file.close()
    return {"rank": rank, "chunks": chunks, "numbers": numbers, "files": facts}


def write_index(folder: Path, parts: list[dict[str, Any]], opened: Opened = new_file) -> dict[str, Facts]:
    """Write the index of what all ranks wrote, and return the facts of all files. One rank calls it.

    Of a tensor that several ranks wrote whole the first one's counts.
    """
    tensors: dict[str, list[Any]] = {}
    numbers: dict[str, Number] = {}
    facts: dict[str, Facts] = {}
    for part in parts:
        numbers = part["numbers"] | numbers
        facts |= part["files"]
        for key, dtype, shape, offset, start, numel, *whole in part["chunks"]:
            entry = tensors.setdefault(key, [dtype, shape, [], *whole])
            if entry[0] != dtype or entry[1] != shape or entry[3:] != whole:
                raise UserError(
                    f"{key} is not the same on all ranks",
                    f"{dtype} of {shape} on rank {part['rank']}, {entry[0]} of {entry[1]} before it",
                    "build and prepare the same objects on all ranks",
                )
            if whole or not any(known[2] == start for known in entry[2][-1:] + entry[2][:1]):
                entry[2].append([data_file(part["rank"]), offset, start, numel])
    content = json.dumps({"tensors": tensors, "numbers": numbers}).encode()
    return {**facts, INDEX: write_file(folder / INDEX, content, opened)}


def read_index(content: bytes, facts: Mapping[str, Facts]) -> dict[str, Entry]:
    """Return the entries of an index; `facts` are of the files that it may name.

    Raises: ValueError, TypeError, KeyError for what `write_index` does not write; `check_tiled` looks at the ranges.
    """
    found = json.loads(content)
    entries: dict[str, Entry] = {}
    for key, (name, shape, chunks, *whole) in found["tensors"].items():
        entry = Entry(torch.Size(shape), DTYPES[name])
        if whole:
            entry.shape = tuple(map(int, whole[0]))
            entry.chunks = [_box_chunk(chunk, entry, key, facts) for chunk in chunks]
        for file, offset, start, numel in () if whole else chunks:
            nbytes = numel * entry.dtype.itemsize
            if offset < 0 or numel < 0 or offset + nbytes > facts[file]["bytes"]:
                raise ValueError(f"{key} would lie at byte {offset} of {file}")
            entry.chunks.append(Chunk(file, offset, start, numel, nbytes))
        entries[key] = entry
    for key, value in found["numbers"].items():
        if not isinstance(value, (int, float)):
            raise TypeError(f"{key} is {value!r}")
        entries[key] = Entry(torch.Size(()), torch.float64, number=value)
    return entries


def _box_chunk(chunk: list[Any], entry: Entry, key: str, facts: Mapping[str, Facts]) -> Chunk:
    """Return a box of an index. Raises: ValueError for one that is not in the tensor, or not in its file."""
    file, offset, start, size = chunk
    start, size, shape = tuple(map(int, start)), tuple(map(int, size)), entry.shape
    assert shape is not None
    inside = len(start) == len(size) == len(shape) and all(
        begin >= 0 and length > 0 and begin + length <= whole
        for begin, length, whole in zip(start, size, shape, strict=True)
    )
    box = Box(start, size, 0, row_strides(size))
    nbytes = box.numel * entry.dtype.itemsize
    if not inside or offset < 0 or offset + nbytes > facts[file]["bytes"]:
        raise ValueError(f"{key} would have a box at {start} of {size}, at byte {offset} of {file}")
    return Chunk(file, offset, 0, box.numel, nbytes, box)


def _boxes_tile(entry: Entry) -> bool:
    """Tell whether boxes are all of a tensor: as many elements, and no two have one in common."""
    boxes = sorted((chunk.box for chunk in entry.chunks if chunk.box is not None), key=lambda box: box.start)
    total = math.prod(entry.shape or ())
    if total != entry.size.numel() or sum(box.numel for box in boxes) != total:
        return False
    active: list[Box] = []
    for box in boxes:
        active = [other for other in active if other.start[:1] and other.start[0] + other.size[0] > box.start[0]]
        for other in active:
            pairs = zip(box.start, box.size, other.start, other.size, strict=True)
            if all(a < b + n and b < a + m for a, m, b, n in pairs):
                return False
        active.append(box)
    return True


def check_tiled(entries: Mapping[str, Entry]) -> list[str]:
    """Put every tensor's ranges in order; return what is wrong with those that are not whole."""
    wrong = []
    for key, entry in entries.items():
        if entry.number is not None:
            continue
        if entry.shape is not None:
            if not _boxes_tile(entry):
                wrong.append(f"{key} has boxes that are not the whole of its {math.prod(entry.size):,} elements")
            continue
        entry.chunks.sort(key=lambda chunk: chunk.start)
        at = 0
        for chunk in entry.chunks:
            if chunk.start != at:
                break
            at += chunk.numel
        if at != math.prod(entry.size) or any(length < 0 for length in entry.size):
            wrong.append(f"{key} has its first {at:,} of {math.prod(entry.size):,} elements")
    return wrong
