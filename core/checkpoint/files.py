"""Files of raw tensors, with a checksum of every block, so that whoever reads a part can check just that part."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from distui.core.errors import UserError

BLOCK_BYTES = 16 << 20
ALIGNMENT = 64
"""Tensors begin at multiples of it, so that no element lies in two blocks."""
_OTHER = "has other contents than were written"
Facts = dict[str, Any]
"""What the manifest keeps of a file: bytes, and crc32, or the crc32 of each block of `block_bytes`."""


def new_file(path: Path) -> BinaryIO:
    """Open a file that is not there yet, for writing."""
    return open(path, "xb", buffering=1 << 20)


Opened = Callable[[Path], BinaryIO]
"""Opens a new file to write to, which need not be on a disk."""


class SummedFile:
    """Writes a new file, and knows its checksums without reading it again."""

    def __init__(self, path: Path, opened: Opened = new_file) -> None:
        self.path, self.size = path, 0
        self._file = opened(path)
        self._sums: list[int] = []
        self._sum = 0

    def write(self, data: Any) -> None:
        """Append bytes."""
        view = memoryview(data).cast("B")
        self._file.write(view)
        while len(view):
            room = BLOCK_BYTES - self.size % BLOCK_BYTES
            part, view = view[:room], view[room:]
            self._sum = zlib.crc32(part, self._sum)
            self.size += len(part)
            if self.size % BLOCK_BYTES == 0:
                self._sums.append(self._sum)
                self._sum = 0

    def write_tensor(self, tensor: torch.Tensor) -> int:
        """Append a tensor's elements, and return where they begin."""
        if padding := -self.size % ALIGNMENT:
            self.write(bytes(padding))
        start = self.size
        flat = tensor.detach().to("cpu").contiguous().reshape(-1)
        if flat.numel():
            self.write(flat.view(torch.uint8).numpy().data)
        return start

    def finish(self) -> Facts:
        """See that everything is on the disk, and return the file's facts."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        if self.size % BLOCK_BYTES or not self._sums:
            self._sums.append(self._sum)
        return {"bytes": self.size, "block_bytes": BLOCK_BYTES, "crc32": self._sums}

    def close(self) -> None:
        """Close the file, however far it got."""
        self._file.close()


def write_file(path: Path, content: bytes, opened: Opened = new_file) -> Facts:
    """Write a new small file to the disk, and return its facts."""
    file = SummedFile(path, opened)
    try:
        file.write(content)
        return file.finish()
    finally:
        file.close()


@dataclass(slots=True)
class Piece:
    """Bytes [offset, offset + length) of a file, and what takes them, piece by piece; nothing takes what is checked."""

    offset: int
    length: int
    put: Callable[[int, memoryview], None] | None = None
    """Called with where in these bytes a part begins, and the part; only valid in the call."""


def read_pieces(path: Path, facts: Mapping[str, Any], pieces: Iterable[Piece]) -> None:
    """Read pieces of a file, each block of it once and only where a piece needs it, and check those blocks.

    Format 1 kept one sum a file: such a file is read whole first.

    Raises: UserError for a file that is missing or other than was written.
    """
    size, block_bytes, sums = _shape(path, facts)
    if not path.is_file():
        raise damaged(path, "is missing")
    ordered = sorted(pieces, key=lambda piece: piece.offset)
    held, block = -1, memoryview(b"")
    try:
        with open(path, "rb", buffering=0) as file:
            found = os.fstat(file.fileno()).st_size
            if found != size:
                raise damaged(path, f"has {found:,} bytes instead of {size:,}")
            if isinstance(facts["crc32"], int) and _sum_of(file) != facts["crc32"]:
                raise damaged(path, _OTHER)
            buffer = bytearray(min(block_bytes, size))
            for piece in ordered:
                end = piece.offset + piece.length
                if piece.offset < 0 or piece.length < 0 or end > size:
                    raise damaged(path, f"ends at byte {size:,}, before {end:,}")
                at = piece.offset
                while at < end:
                    number = at // block_bytes
                    begin = number * block_bytes
                    if number != held:
                        block = memoryview(buffer)[: min(block_bytes, size - begin)]
                        file.seek(begin)
                        _fill(file, block)
                        if sums and zlib.crc32(block) != sums[number]:
                            raise damaged(path, _OTHER)
                        held = number
                    until = min(end, begin + len(block))
                    if piece.put is not None:
                        piece.put(at - piece.offset, block[at - begin : until - begin])
                    at = until
    except OSError as error:
        raise damaged(path, f"cannot be read: {error.strerror or error}") from error


def check_file(path: Path, facts: Mapping[str, Any]) -> None:
    """Read a whole file and compare it with its facts. Raises UserError."""
    read_pieces(path, facts, [Piece(0, _shape(path, facts)[0])])


def read_file(path: Path, facts: Mapping[str, Any]) -> bytes:
    """Return a whole file, checked. Raises UserError."""
    content = bytearray()

    def put(at: int, part: memoryview) -> None:
        content.extend(part)

    read_pieces(path, facts, [Piece(0, _shape(path, facts)[0], put)])
    return bytes(content)


def damaged(path: Path, how: str) -> UserError:
    """Return the error for a file of a checkpoint."""
    return UserError(f"the checkpoint {path.parent} is damaged", f"{path.name} {how}", "load an earlier checkpoint")


def _shape(path: Path, facts: Mapping[str, Any]) -> tuple[int, int, list[int]]:
    size, sums = facts["bytes"], facts["crc32"]
    if isinstance(sums, int):
        return size, BLOCK_BYTES, []
    if len(sums) != max(-(-size // facts["block_bytes"]), 1):
        raise damaged(path, f"has {len(sums)} checksums for {size:,} bytes")
    return size, facts["block_bytes"], sums


def _sum_of(file: Any) -> int:
    crc = 0
    while block := file.read(BLOCK_BYTES):
        crc = zlib.crc32(block, crc)
    return crc


def _fill(file: Any, block: memoryview) -> None:
    filled = 0
    while filled < len(block):
        count = file.readinto(block[filled:])
        if not count:
            raise OSError(f"it ends {len(block) - filled:,} bytes early")
        filled += count
