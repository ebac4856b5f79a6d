"""Reads checkpoints of format 1, which torch.distributed.checkpoint wrote, and imports nothing that their pickles name.

<folder>/*.distcp, .metadata  the tensors, each as torch.save writes it, and a pickle that says where they lie
<folder>/state.pt             what all ranks share; rank<R>.pt what rank R alone had (torch.save, read by weights_only)
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch

from distui.core.checkpoint.files import Piece, damaged, read_file
from distui.core.checkpoint.layout import Chunk, Entry
from distui.core.checkpoint.plain import DTYPES
from distui.core.checkpoint.reading import Checkpoint, Want, overlap, unreadable


class _Record:
    """Stands for every object of the metadata; it only holds what its attributes were."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.values = state


_RECORDS = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in [
        "Metadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    ]
} | {("torch.distributed.checkpoint.filesystem", "_StorageInfo"), ("torch.serialization", "_get_layout")}
_RECORDS |= {("pathlib", name) for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")}
_RECORDS |= {("pathlib._local", name) for name in ("PosixPath", "WindowsPath")}


class _MetadataUnpickler(pickle.Unpickler):
    """Makes records, tuples and names of formats. Nothing of a file's choosing is imported or called."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a name. Raises: pickle.UnpicklingError for one that no metadata has."""
        if (module, name) in _RECORDS:
            return _Record
        if (module, name) == ("torch", "Size"):
            return tuple
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        raise pickle.UnpicklingError(f"it names {module}.{name}")


class Checkpoint1(Checkpoint):
    """A checkpoint of format 1."""

    def _facts(self, name: str) -> dict[str, Any]:
        found = self.manifest["files"].get(name)
        if found is None:
            raise damaged(self.folder / name, "is not in the manifest")
        return dict(found)

    def _path(self, file: str) -> tuple[Path, dict[str, Any]]:
        return self.folder / file, self._facts(file)

    def _read_entries(self) -> dict[str, Entry]:
        content = read_file(*self._path(".metadata"))
        try:
            found = _MetadataUnpickler(io.BytesIO(content)).load()
        except (pickle.UnpicklingError, EOFError) as error:
            raise unreadable(self.folder, error) from error
        entries = {
            key: Entry(torch.Size(meta.size), meta.properties.values[0])
            for key, meta in found.state_dict_metadata.items()
            if hasattr(meta, "properties")
        }
        for meta in entries.values():
            if not isinstance(meta.dtype, torch.dtype):
                raise TypeError(f"{meta.dtype!r} is no format")
        chunks = {
            (key, tuple(chunk.offsets)): chunk.sizes
            for key in entries
            for chunk in found.state_dict_metadata[key].chunks
        }
        for index, info in found.storage_data.items():
            place = (index.fqn, tuple(index.offset))
            if index.fqn not in entries:
                continue
            sizes = torch.Size(chunks[place])
            if len(sizes) > 1 and sizes != entries[index.fqn].size:
                raise ValueError(f"{index.fqn} is cut in more than one dimension")
            start = place[1][0] if len(sizes) == 1 else 0
            chunk = Chunk(info.relative_path, int(info.offset), start, sizes.numel(), int(info.length))
            if chunk.file not in self.manifest["files"]:
                raise ValueError(f"{index.fqn} would lie in {chunk.file}")
            entries[index.fqn].chunks.append(chunk)
        return entries

    def _pieces(self, chunk: Chunk, entry: Entry, wants: list[Want]) -> list[Piece]:
        """Return the bytes of a chunk, a tensor as torch.save writes it, which must be there whole to be read."""
        content = bytearray()

        def put(at: int, part: memoryview) -> None:
            content.extend(part)
            if len(content) < chunk.nbytes:
                return
            values = self._load(bytes(content), chunk.file)
            content.clear()
            if not isinstance(values, torch.Tensor) or values.dtype != entry.dtype or values.numel() != chunk.numel:
                raise damaged(self.folder / chunk.file, f"has another tensor at byte {chunk.offset:,}")
            for wanted in wants:
                low, high = overlap(chunk, wanted)
                assert wanted.put is not None, "what is only checked is not read"
                wanted.put(low - wanted.start, values.reshape(-1)[low - chunk.start : high - chunk.start])

        return [Piece(chunk.offset, chunk.nbytes, put)]

    def _load(self, content: bytes, name: str) -> Any:
        try:
            return torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
            raise unreadable(self.folder / name, error) from error

    def _states(self, name: str) -> Any:
        return self._load(read_file(*self._path(name)), name)

    def common(self) -> dict[str, Any]:
        """Return what all ranks share."""
        return dict(self._states("state.pt"))

    def has_rank(self, rank: int) -> bool:
        """Return whether a rank of that number saved it."""
        return f"rank{rank}.pt" in self.manifest["files"]

    def own(self, rank: int) -> dict[str, Any]:
        """Return what rank `rank` alone had."""
        return dict(self._states(f"rank{rank}.pt"))
