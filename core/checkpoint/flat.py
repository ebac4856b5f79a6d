"""A flat range of a parameter, as torch.distributed.checkpoint understands it.

A rank's shard holds an arbitrary range of a parameter's elements, which is no box of a matrix. So every parameter is
stored flattened to one dimension, where a range is a box, with its shape beside it; then torch.distributed.checkpoint
reads any range of what any ranks wrote.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


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

    def _chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size([self.start]), torch.Size([self.local.numel()]))

    def __create_write_items__(self, fqn: str, value: Any) -> list[WriteItem]:
        if not self.local.numel():
            return []
        return [
            WriteItem(
                index=MetadataIndex(fqn, torch.Size([self.start])),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=self._chunk(),
                    properties=TensorProperties.create_from_tensor(self.local),
                    size=torch.Size([self.numel()]),
                ),
            )
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self._chunk()] if self.local.numel() else []

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        return self.local

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"FlatShard([{self.start}, {self.start + self.local.numel()}) of {self.numel()})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"a FlatShard only travels through torch.distributed.checkpoint; {func} was called")
