"""Reads checkpoints, of this format and of the one before: ranges of tensors, and states; each part is checked."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distui.core.axes.cut import Box, Cut
from distui.core.checkpoint import folder as folders
from distui.core.checkpoint.files import Piece, damaged, read_file, read_pieces
from distui.core.checkpoint.flat import FlatShard
from distui.core.checkpoint.layout import COMMON, INDEX, Chunk, Entry, check_tiled, read_index, state_file
from distui.core.checkpoint.plain import read_plain
from distui.core.errors import UserError

_NONSENSE = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RuntimeError)
PutBox = Callable[[Box, torch.Tensor], None]
"""Takes elements, and the box, or the part of one, that they are."""
Put = Callable[[int, torch.Tensor], None]
"""Takes elements, and where they begin in what was asked for; they are only valid in the call."""


@dataclass(frozen=True, slots=True)
class Want:
    """Elements [start, start + numel) of a tensor of the checkpoint, and what takes them."""

    key: str
    start: int
    numel: int
    put: Put | None
    """None where it is only checked."""
    shape: tuple[int, ...] | None = None
    """The whole shape, where what is wanted is boxes of it; `start` and `numel` are then of a piece."""
    boxes: tuple[Box, ...] = ()
    put_box: PutBox | None = None


def want(key: str, item: torch.Tensor) -> Want:
    """Return what fills a `FlatShard` or a whole tensor."""
    if isinstance(item, FlatShard) and item.cut is not None:
        return Want(key, item.start, item.length, item.write, item.cut.shape, tuple(item.boxes), item.write_box)
    if isinstance(item, FlatShard):
        return Want(key, item.start, item.length, item.write)
    whole = item.detach()
    flat = whole.view(-1) if whole.is_contiguous() else None

    def put(at: int, values: torch.Tensor) -> None:
        target = flat if flat is not None else whole.reshape(-1)
        target[at : at + values.numel()].copy_(values)
        if flat is None:
            whole.copy_(target.view(whole.shape))

    return Want(key, 0, whole.numel(), put)


class Checkpoint:
    """A whole checkpoint of this format. What it holds is known at once; tensors are read when they are asked for."""

    def __init__(self, folder: Path, manifest: folders.Manifest) -> None:
        """Raises: UserError where the index is damaged, or is no index."""
        self.folder, self.manifest = folder, manifest
        try:
            self.entries: dict[str, Entry] = self._read_entries()
        except _NONSENSE as error:
            raise unreadable(folder, error) from error
        if wrong := check_tiled(self.entries):
            raise UserError(f"the checkpoint {folder} is damaged", "; ".join(wrong[:5]), "load an earlier checkpoint")

    # ---- what a format does on its own ---------------------------------------------------------------------------

    @property
    def _data(self) -> Path:
        return self.folder / str(self.manifest["data"])

    def _facts(self, name: str) -> dict[str, Any]:
        """Return the manifest's facts of a file that lies with the data."""
        found = self.manifest["files"].get(f"{self._data.name}/{name}")
        if found is None:
            raise damaged(self._data / name, "is not in the manifest")
        return dict(found)

    def _read_entries(self) -> dict[str, Entry]:
        prefix = f"{self._data.name}/"
        facts = {name.removeprefix(prefix): fact for name, fact in self.manifest["files"].items()}
        return read_index(read_file(self._data / INDEX, self._facts(INDEX)), facts)

    def common(self) -> dict[str, Any]:
        """Return what all ranks share. Raises UserError."""
        found = self._states(COMMON)
        return found if isinstance(found, dict) else {}

    def has_rank(self, rank: int) -> bool:
        """Return whether a rank of that number saved it."""
        return f"{self._data.name}/{state_file(rank)}" in self.manifest["files"]

    def own(self, rank: int) -> dict[str, Any]:
        """Return what rank `rank` alone had. Raises UserError."""
        found = self._states(state_file(rank))
        return found if isinstance(found, dict) else {}

    def _states(self, name: str) -> Any:
        path = self._data / name
        content = read_file(path, self._facts(name))
        try:
            found = json.loads(content)
            tree, file, places = found["tree"], str(found["file"]), found["places"]
        except _NONSENSE as error:
            raise unreadable(self.folder, error) from error

        def tensor(number: int) -> bytearray:
            offset, nbytes = places[number]
            content = bytearray()
            read_pieces(self._data / file, self._facts(file), [Piece(offset, nbytes, lambda at, b: content.extend(b))])
            return content

        return read_plain(tree, f"{path}", tensor)

    def _pieces(self, chunk: Chunk, entry: Entry, wants: list[Want]) -> list[Piece]:
        """Return which bytes of a chunk go where."""
        size = entry.dtype.itemsize
        pieces = []
        for wanted in wants:
            low, high = overlap(chunk, wanted)

            def put(at: int, part: memoryview, wanted: Want = wanted, low: int = low) -> None:
                values = torch.frombuffer(part, dtype=torch.uint8).view(entry.dtype)
                assert wanted.put is not None, "what is only checked is not read"
                wanted.put(low - wanted.start + at // size, values)

            pieces.append(Piece(chunk.offset + (low - chunk.start) * size, (high - low) * size, put))
        return pieces

    def _path(self, file: str) -> tuple[Path, dict[str, Any]]:
        return self._data / file, self._facts(file)

    @property
    def ranks_of_a_batch(self) -> int:
        """How many ranks shared a batch where it was saved; in earlier versions each had its own."""
        world = int(self.manifest["world_size"])
        return world // max(1, int(self.manifest.get("data_ranks", world)))

    # ---- tensors -------------------------------------------------------------------------------------------------

    def read(self, wants: Iterable[Want]) -> None:
        """Give every element to who wants it, compared with its checksums. Raises UserError."""
        by_key: dict[str, list[Want]] = defaultdict(list)
        for wanted in wants:
            by_key[wanted.key].append(wanted)
        by_file: dict[str, list[Piece]] = defaultdict(list)
        for key, of_key in by_key.items():
            entry = self.entries[key]
            for chunk in entry.chunks:
                if chunk.box is not None or any(wanted.boxes for wanted in of_key):
                    for part, inner in _in_boxes(chunk, entry, of_key):
                        pieces = self._pieces(part, entry, [inner])
                        cut = [Piece(piece.offset, piece.length) for piece in pieces]
                        by_file[chunk.file] += pieces if inner.put is not None else cut
                    continue
                needed = [wanted for wanted in of_key if overlap(chunk, wanted)[0] < overlap(chunk, wanted)[1]]
                if taken := [wanted for wanted in needed if wanted.put is not None]:
                    by_file[chunk.file] += self._pieces(chunk, entry, taken)
                if checked := [wanted for wanted in needed if wanted.put is None]:
                    pieces = self._pieces(chunk, entry, checked)
                    by_file[chunk.file] += [Piece(piece.offset, piece.length) for piece in pieces]
        for file, pieces in by_file.items():
            read_pieces(*self._path(file), pieces)

    def tensor(self, key: str) -> torch.Tensor:
        """Return a whole tensor, of the size that it is stored in. Raises UserError."""
        entry = self.entries[key]
        found = torch.empty(entry.size, dtype=entry.dtype)
        self.read([want(key, found)])
        return found


def _in_boxes(chunk: Chunk, entry: Entry, wants: list[Want]) -> Iterator[tuple[Chunk, Want]]:
    """Give what of a chunk is wanted, where one of them is no range of the whole: a range of the chunk at a time."""
    for wanted in wants:
        shape = wanted.shape or entry.shape
        assert shape is not None
        sources = [chunk.box] if chunk.box is not None else _range_boxes(shape, chunk.start, chunk.numel)
        targets = wanted.boxes or _range_boxes(shape, wanted.start, wanted.numel)
        for source, target in itertools.product(sources, targets):
            both = _common(source, target)
            if both is None:
                continue
            from_box, to_box = both
            span = 1 + sum((size - 1) * stride for size, stride in zip(from_box.size, from_box.strides, strict=True))
            yield chunk, Want(wanted.key, chunk.start + from_box.at, span, _gathering(wanted, from_box, to_box, span))


def _range_boxes(shape: tuple[int, ...], start: int, numel: int) -> list[Box]:
    """Return the boxes of a range of the flattened whole; their `at` counts from its beginning."""
    return list(Cut.whole(shape).boxes(start, start + numel))


def _common(source: Box, target: Box) -> tuple[Box, Box] | None:
    """Return what two boxes have in common, as a part of the one and of the other."""
    low = tuple(map(max, source.start, target.start))
    ends = (map(sum, zip(box.start, box.size, strict=True)) for box in (source, target))
    size = tuple(high - begin for high, begin in zip(map(min, *ends), low, strict=True))
    if any(length <= 0 for length in size):
        return None

    def part(box: Box) -> Box:
        steps = zip(low, box.start, box.strides, strict=True)
        return Box(low, size, box.at + sum((a - b) * stride for a, b, stride in steps), box.strides)

    return part(source), part(target)


def _gathering(wanted: Want, from_box: Box, to_box: Box, span: int) -> Put | None:
    """Return what collects `span` elements of a chunk and then writes those of a box; None where it is only checked."""
    if wanted.put is None:
        return None
    held: list[torch.Tensor] = []
    filled = 0

    def put(at: int, values: torch.Tensor) -> None:
        nonlocal filled
        if not held:
            held.append(torch.empty(span, dtype=values.dtype))
        held[0][at : at + values.numel()].copy_(values)
        filled += values.numel()
        if filled < span:
            return
        found = held.pop().as_strided(from_box.size, from_box.strides)
        if wanted.put_box is not None:
            wanted.put_box(to_box, found.contiguous())
            return
        for row, place in _rows(to_box):
            wanted.put(place, found[row])  # type: ignore[misc]

    return put


def _rows(box: Box) -> Iterator[tuple[tuple[int, ...], int]]:
    """Give each row of a box along the last dimension, and where it begins in a flat tensor of the box's strides."""
    for row in itertools.product(*(range(length) for length in box.size[:-1])):
        yield row, box.at + sum(index * stride for index, stride in zip(row, box.strides, strict=False))


def overlap(chunk: Chunk, wanted: Want) -> tuple[int, int]:
    """Return which elements of a tensor both have."""
    return max(chunk.start, wanted.start), min(chunk.start + chunk.numel, wanted.start + wanted.numel)


def unreadable(folder: Path, error: Exception) -> UserError:
    """Return the error for contents that distui does not write."""
    return UserError(
        f"the checkpoint {folder} cannot be read",
        f"it is not what distui writes ({type(error).__name__}: {error})",
        "load an earlier checkpoint",
    )
