"""A flat range of a parameter: what a rank holds of it, and what a checkpoint keeps.

A rank's shard holds an arbitrary range of a parameter's elements, which is no box of a matrix. So every parameter is
stored flattened to one dimension, with its shape beside it, and any ranks read any ranges of what any ranks wrote.
Where parallelism has cut the parameter itself, the range is one of the rank's piece, and boxes of the whole say which.
"""

from __future__ import annotations

from typing import Any

import torch

from distui.core.axes.cut import Box, Cut
from distui.core.sharding.homes.home import CellSlice


class FlatShard(torch.Tensor):
    """The elements [start, end) of a parameter of `numel` elements, which lie in `local` (1-D, same length).

    With `cut` they are elements of the piece that it describes; `numel` is the whole parameter's all the same.
    """

    local: torch.Tensor
    start: int
    cut: Cut | None

    @staticmethod
    def __new__(cls, local: torch.Tensor, start: int, numel: int, cut: Cut | None = None) -> FlatShard:
        shard: FlatShard = torch.Tensor._make_wrapper_subclass(
            cls, (numel,), dtype=local.dtype, device=local.device, requires_grad=False
        )
        shard.local, shard.start, shard.cut = local, start, cut
        return shard

    def __init__(self, local: torch.Tensor, start: int, numel: int, cut: Cut | None = None) -> None:
        super().__init__()

    @property
    def boxes(self) -> list[Box]:
        """The boxes of the whole that the range of a piece is."""
        assert self.cut is not None
        return list(self.cut.boxes(self.start, self.start + self.length))

    @property
    def length(self) -> int:
        """Elements of the range."""
        return self.local.numel()

    @property
    def local_bytes(self) -> int:
        """Bytes of the range."""
        return self.length * self.dtype.itemsize

    def read(self) -> torch.Tensor:
        """Return the range's elements; of what rests elsewhere a copy."""
        return self.local

    def read_box(self, box: Box) -> torch.Tensor:
        """Return the elements of one of `boxes`, or of a part of it, in the order of the whole."""
        values = self.read()
        return values.as_strided(box.size, box.strides, values.storage_offset() + box.at).contiguous()

    @torch.no_grad()
    def write_box(self, box: Box, values: torch.Tensor) -> None:
        """Replace the elements of a box, or of a part of one."""
        local = self.local
        local.as_strided(box.size, box.strides, local.storage_offset() + box.at).copy_(values.view(box.size))

    @torch.no_grad()
    def write(self, at: int, values: torch.Tensor) -> None:
        """Replace elements of the range from `at` on, in whatever format they come."""
        self.local[at : at + values.numel()].copy_(values)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{type(self).__name__}([{self.start}, {self.start + self.length}) of {self.numel()})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"a FlatShard only travels through checkpoints; {func} was called")


class CellShard(FlatShard):
    """A range of a parameter that rests in a cell; it is in memory only while it is written or read."""

    cell: CellSlice

    @staticmethod
    def __new__(cls, cell: CellSlice, start: int, numel: int, cut: Cut | None = None) -> CellShard:
        shard: CellShard = torch.Tensor._make_wrapper_subclass(cls, (numel,), dtype=cell.dtype, requires_grad=False)
        shard.cell, shard.start, shard.cut = cell, start, cut
        return shard

    def __init__(self, cell: CellSlice, start: int, numel: int, cut: Cut | None = None) -> None:
        torch.Tensor.__init__(self)

    @property
    def length(self) -> int:
        """Elements of the range."""
        return self.cell.numel()

    def read(self) -> torch.Tensor:
        """Return a copy of the range's elements."""
        return self.cell.read()

    def write(self, at: int, values: torch.Tensor) -> None:
        """Replace elements of the range from `at` on."""
        self.cell.write(at, values.to(self.dtype))

    def write_box(self, box: Box, values: torch.Tensor) -> None:
        """Replace the elements of a box: the cell is read and written as a whole, since it knows ranges only."""
        local = self.cell.read()
        local.as_strided(box.size, box.strides, local.storage_offset() + box.at).copy_(values.view(box.size))
        self.cell.write(0, local)
