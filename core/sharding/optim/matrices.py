"""Optimizers that need whole matrices (Muon, Adafactor, Shampoo), on sharded states.

Each matrix has one owner among the ranks, which keeps its optimizer state. For a step the owner collects the matrix and
its gradient from the shards of all ranks, the user's optimizer steps it as in plain torch, and the new weights go back
to the shards. So states and work are divided over the ranks as under other optimizers, matrix by matrix.

Transient memory during the step, of the matrices that a rank owns (about 1/N of them): the gradient and, where they are
not on the rank anyway, the fp32 weights; twice, once as they arrive and once whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from distui.core.sharding.transport.transport import Transport
from distui.core.sharding.units.unit import Unit


@dataclass(slots=True)
class Matrix:
    """One parameter that is stepped whole by its owner."""

    unit: Unit
    index: int
    owner: int
    param: nn.Parameter
    """What the optimizer has; it holds memory during the step only, and only on the owner."""

    def piece(self, rank: int) -> tuple[int, int]:
        """Return the range of the matrix, in elements, that lies in the shard of `rank`."""
        return self.unit.layout.owned(self.index, rank)

    def numel_of(self, rank: int) -> int:
        """Return the elements in the shard of `rank`."""
        low, high = self.piece(rank)
        return high - low

    def own(self, flat: torch.Tensor) -> torch.Tensor:
        """Return this rank's piece in `flat`, a shard of the unit."""
        low, high = self.piece(self.unit.rank)
        at = self.unit.layout.spans[self.index].offset + low - self.unit.layout.shard(self.unit.rank)[0]
        return flat[at : at + high - low] if high > low else flat[:0]

    @property
    def is_here(self) -> bool:
        """Whether every rank has the whole fp32 weights anyway (stage 1 and 2)."""
        return self.unit.master is self.unit.shard and not self.unit.placement.shards_parameters


def assign_owners(sizes: list[int], num_ranks: int) -> list[int]:
    """Return an owner for each matrix so that ranks own about as many elements; the largest are given out first."""
    load = [0] * num_ranks
    owners = [0] * len(sizes)
    for position in sorted(range(len(sizes)), key=lambda position: (-sizes[position], position)):
        owner = min(range(num_ranks), key=lambda rank: (load[rank], rank))
        owners[position] = owner
        load[owner] += sizes[position]
    return owners


class WholeMatrices:
    """The matrices that one optimizer steps whole, in the same order on all ranks."""

    def __init__(self, places: list[tuple[Unit, int]], transport: Transport) -> None:
        self._transport = transport
        sizes = [unit.layout.spans[index].numel for unit, index in places]
        owners = assign_owners(sizes, transport.world_size)
        self.matrices: list[Matrix] = []
        for (unit, index), owner in zip(places, owners, strict=True):
            param = nn.Parameter(torch.empty(0, dtype=unit.master.dtype, device=unit.device))
            vars(param).update(vars(unit.params[index]))
            self.matrices.append(Matrix(unit, index, owner, param))
        self._kinds = sorted({matrix.unit.master.dtype for matrix in self.matrices}, key=str)

    def _of(self, owner: int, dtype: torch.dtype) -> list[Matrix]:
        return [matrix for matrix in self.matrices if matrix.owner == owner and matrix.unit.master.dtype == dtype]

    def collect(self) -> None:
        """Give each owner its matrices and their gradients, whole. Collective: all ranks."""
        for dtype in self._kinds:
            self._collect(dtype)

    def _collect(self, dtype: torch.dtype) -> None:
        rank, ranks = self._transport.rank, range(self._transport.world_size)
        mine = self._of(rank, dtype)
        pieces = []
        sizes_out, sizes_in = [], []
        for peer in ranks:
            theirs = self._of(peer, dtype)
            for matrix in theirs:
                assert matrix.unit.grad_shard is not None
                pieces.append(matrix.own(matrix.unit.grad_shard).to(dtype))
                if not matrix.is_here:
                    pieces.append(matrix.own(matrix.unit.master))
            sizes_out.append(sum(matrix.numel_of(rank) * (1 if matrix.is_here else 2) for matrix in theirs))
            sizes_in.append(sum(matrix.numel_of(peer) * (1 if matrix.is_here else 2) for matrix in mine))
        received = self._exchange(pieces, sizes_out, sizes_in, dtype)
        for matrix in mine:
            shape = matrix.unit.layout.spans[matrix.index].shape
            if matrix.is_here:
                assert matrix.unit.full is not None
                matrix.param.data = matrix.unit.views(matrix.unit.full)[matrix.index]
            else:
                matrix.param.data = torch.empty(shape, dtype=dtype, device=matrix.unit.device)
            matrix.param.grad = torch.empty(shape, dtype=dtype, device=matrix.unit.device)
        at = 0
        for peer in ranks:
            for matrix in mine:
                assert matrix.param.grad is not None
                low, high = matrix.piece(peer)
                wholes = [matrix.param.grad] if matrix.is_here else [matrix.param.grad, matrix.param.data]
                for whole in wholes:
                    whole.view(-1)[low:high] = received[at : at + high - low]
                    at += high - low
        for matrix in mine:
            if not matrix.unit.present[matrix.index]:
                matrix.param.grad = None

    def hand_back(self) -> None:
        """Bring what the owners stepped back to the shards, and free the whole tensors. Collective: all ranks."""
        rank, ranks = self._transport.rank, range(self._transport.world_size)
        for dtype in self._kinds:
            mine = self._of(rank, dtype)
            pieces, sizes_out, sizes_in = [], [], []
            for peer in ranks:
                for matrix in mine:
                    low, high = matrix.piece(peer)
                    pieces.append(matrix.param.detach().reshape(-1)[low:high])
                sizes_out.append(sum(matrix.numel_of(peer) for matrix in mine))
                sizes_in.append(sum(matrix.numel_of(rank) for matrix in self._of(peer, dtype)))
            received = self._exchange(pieces, sizes_out, sizes_in, dtype)
            at = 0
            for peer in ranks:
                for matrix in self._of(peer, dtype):
                    own = matrix.own(matrix.unit.master)
                    own.copy_(received[at : at + own.numel()])
                    at += own.numel()
            for matrix in mine:
                matrix.param.grad = None
                matrix.param.data = matrix.param.data.new_empty(0)

    def _exchange(
        self, pieces: list[torch.Tensor], sizes_out: list[int], sizes_in: list[int], dtype: torch.dtype
    ) -> torch.Tensor:
        device = self.matrices[0].unit.device
        sent = torch.cat(pieces) if pieces else torch.empty(0, dtype=dtype, device=device)
        received = torch.empty(sum(sizes_in), dtype=dtype, device=device)
        numel = sum(matrix.unit.layout.spans[matrix.index].numel for matrix in self.matrices)
        self._transport.all_to_all_uneven(received, sent, sizes_in, sizes_out, numel * dtype.itemsize).wait()
        return received
