"""A flat range of a parameter, as torch.distributed.checkpoint understands it.

A rank's shard holds an arbitrary range of a parameter's elements, which is no box of a matrix. So every parameter is
stored flattened to one dimension, where a range is a box, with its shape beside it; then torch.distributed.checkpoint
reads any range of what any ranks wrote.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import ReadItem, TensorWriteData, WriteItem, WriteItemType

from distui.core.offload.home import CellSlice


class FlatShard(torch.Tensor):
    """The elements [start, end) of a parameter of `numel` elements, which lie in `local` (1-D, same length)."""

    local: torch.Tensor
    start: int

    @staticmethod
    def __new__(cls, local: torch.Tensor, start: int, numel: int) -> FlatShard:
        shard: FlatShard = torch.Tensor._make_wrapper_subclass(
            cls, (numel,), dtype=local.dtype, device=local.device, requires_grad=False
        )
        shard.local, shard.start = local, start
        return shard

    def __init__(self, local: torch.Tensor, start: int, numel: int) -> None:
        super().__init__()

    @property
    def length(self) -> int:
        """Elements of the range."""
        return self.local.numel()

    @property
    def local_bytes(self) -> int:
        """Bytes of the range."""
        return self.length * self.dtype.itemsize

    def _chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size([self.start]), torch.Size([self.length]))

    def __create_write_items__(self, fqn: str, value: Any) -> list[WriteItem]:
        if not self.length:
            return []
        return [
            WriteItem(
                index=MetadataIndex(fqn, torch.Size([self.start])),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=self._chunk(),
                    properties=TensorProperties(dtype=self.dtype),
                    size=torch.Size([self.numel()]),
                ),
            )
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self._chunk()] if self.length else []

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        return self.local

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{type(self).__name__}([{self.start}, {self.start + self.length}) of {self.numel()})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"a FlatShard only travels through torch.distributed.checkpoint; {func} was called")


class CellShard(FlatShard):
    """A range of a parameter that rests in a cell; it is in memory only while it is written or read."""

    cell: CellSlice

    @staticmethod
    def __new__(cls, cell: CellSlice, start: int, numel: int) -> CellShard:
        shard: CellShard = torch.Tensor._make_wrapper_subclass(cls, (numel,), dtype=cell.dtype, requires_grad=False)
        shard.cell, shard.start = cell, start
        return shard

    def __init__(self, cell: CellSlice, start: int, numel: int) -> None:
        torch.Tensor.__init__(self)

    @property
    def length(self) -> int:
        """Elements of the range."""
        return self.cell.numel()

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        return self.cell.read()


class LoadPlanner(dcp.DefaultLoadPlanner):
    """Reads into memory and, for what rests elsewhere, brings it there."""

    def _cell(self, read_item: ReadItem) -> CellSlice | None:
        value = self.state_dict[read_item.dest_index.fqn]
        return value.cell if isinstance(value, CellShard) else None

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        """Return where an item is read into."""
        cell = self._cell(read_item)
        if cell is None:
            return super().resolve_tensor(read_item)
        return torch.empty(read_item.lengths, dtype=cell.dtype)

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Keep what was read."""
        cell = self._cell(read_item)
        if cell is not None:
            cell.write(read_item.dest_offsets[0], tensor)
