"""A unit as its ranks keep it: laid out flat, cut into shards, and reached wherever a shard rests."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import nn

from distui.core.axes.cut import Cut
from distui.core.sharding.cuts import Cuts
from distui.core.sharding.homes.home import SHARD_MULTIPLE, Cell, Sequel, Transfer, Waitable, flat_buffer
from distui.core.sharding.homes.homes import Homes
from distui.core.sharding.start.initialise import make_real
from distui.core.sharding.start.start import Start
from distui.core.sharding.transport.transport import Transport
from distui.core.sharding.units.layout import ALIGNMENT, FlatLayout, plan_layout
from distui.core.sharding.units.placement import Placement


class Shards:
    """This rank's part of one flat group of parameters; `UnitParameters` adds the whole ones."""

    def __init__(
        self,
        name: str,
        named_params: list[tuple[str, nn.Parameter]],
        modules: list[nn.Module],
        is_root: bool,
        placement: Placement,
        gathers: Transport | None,
        homes: Homes | None,
        start: Start,
    ) -> None:
        self.name, self.modules, self.is_root = name, modules, is_root
        self.placement, self.gathers, self.homes = placement, gathers, homes
        self.param_names = [param_name for param_name, _ in named_params]
        self.params = [param for _, param in named_params]
        first = self.params[0]
        self.trainable = first.requires_grad
        compute_dtype = placement.compute_dtype if first.is_floating_point() else None
        self.dtype = compute_dtype or first.dtype
        self.device = start.device_for(self.params)
        num_shards = placement.num_ranks if placement.shards_optimizer else 1
        multiple = SHARD_MULTIPLE if homes is not None else ALIGNMENT
        self.layout: FlatLayout = plan_layout([(n, p.shape) for n, p in named_params], num_shards, multiple)
        self.rank = placement.rank if num_shards > 1 else 0
        self.shard: torch.Tensor
        self.master: torch.Tensor
        self.shard_cell: Cell | None = None
        self.master_cell: Cell | None = None
        self.has_master = self.dtype.itemsize < 4 and self.trainable
        """Whether the optimizer steps an fp32 copy; else it steps the parameters themselves."""
        self.shard_is_current = False
        """The step wrote the parameters beside their fp32 master: publishing them needs no conversion."""
        self._arriving: tuple[Transfer, torch.Tensor] | None = None
        """The shard on its way from its home, ahead of its gather."""
        self.cuts: Cuts | None = None
        """Which of the parameters are pieces of whole ones; None where no axis cuts any."""

    @cached_property
    def counted(self) -> frozenset[int] | None:
        """The parameters that this rank counts in a norm, where ranks of other axes hold copies; None for all."""
        cuts = self.cuts
        return None if cuts is None else frozenset(i for i, param in enumerate(self.params) if cuts.counts(param))

    def cut_of(self, index: int) -> Cut | None:
        """Return how a parameter is cut; None of a whole one."""
        return None if self.cuts is None else self.cuts.get(self.params[index])

    def _begin(self, start: Start) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Return the parameters as script or files have them: whole where they had to come so, and this rank's part.

        Collective: all ranks.
        """
        start.bring(self.params)
        if start.has_files_of(self.params):
            whole, part = None, start.read_part(self.params, self.layout, self.rank, self.device)
        else:
            whole = self._flat(self.layout.padded_numel, start.dtype_for(self.params))
            start.fill(self.params, whole, self.layout)
            low, high = self.layout.shard(self.rank)
            part = whole[low:high]
        for param in self.params:
            if param.is_meta:
                make_real(param, torch.empty(0, dtype=param.dtype, device=self.device))
        return whole, part

    def _flat(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        return flat_buffer(numel, dtype, self.device, self.homes is not None)

    def _keep_master(self, master: torch.Tensor) -> None:
        if self.homes is not None and self.homes.masters is not None:
            self.master_cell = self.homes.masters.cell(master.numel(), torch.float32)
            self.master_cell.store(master).wait()
        else:
            self.master = master

    def refresh_master(self) -> None:
        """Take the parameters, which somebody wrote, into the optimizer's copy."""
        if self.has_master:
            self.write_master(0, self.read_shard())

    def read_master(self) -> torch.Tensor:
        """Return this rank's shard as the optimizer steps it (frozen: as it is), from wherever it is."""
        if self.master_cell is None:
            return self.master
        return self.master_cell.read(0, self.master_cell.numel).to(self.device)

    def write_master(self, start: int, values: torch.Tensor) -> None:
        """Replace elements of that from `start` on."""
        if self.master_cell is None:
            self.master[start : start + values.numel()].copy_(values)
        else:
            self.master_cell.write(start, values)

    def read_shard(self) -> torch.Tensor:
        """Return this rank's shard in the compute format, from wherever it is."""
        if self.shard_cell is None:
            return self.shard
        return self.shard_cell.read(0, self.shard_cell.numel).to(self.device)

    def write_shard(self, values: torch.Tensor) -> None:
        """Replace this rank's shard in the compute format."""
        if self.shard_cell is None:
            self.shard.copy_(values)
        else:
            self.shard_cell.write(0, values)

    def gather_into(self, whole: torch.Tensor, shard: torch.Tensor) -> None:
        """Fill `whole` with every rank's `shard`. Collective: all ranks."""
        if self.layout.num_shards == 1 or self.gathers is None:
            whole.copy_(shard)
        else:
            self.gathers.all_gather(whole, shard).wait()

    def prefetch(self) -> None:
        """Start to bring the shard from its home, ahead of its gather; nothing where it is here or has no gather."""
        if self.shard_cell is not None and self.gathers is not None and self._arriving is None:
            assert self.homes is not None
            buffer = self.homes.take(self.shard_cell.numel, self.dtype)
            self._arriving = (self.shard_cell.fetch(buffer), buffer)

    def drop_prefetch(self) -> None:
        """Forget a shard that was brought ahead: it is about to change."""
        if self._arriving is not None:
            assert self.homes is not None
            (transfer, buffer), self._arriving = self._arriving, None
            transfer.wait()
            self.homes.give(buffer)

    def gather_beside(self, into: torch.Tensor) -> Waitable:
        """Start to fill `into` with whole parameters, for the peers' sake alone. Collective: all ranks."""
        if self.shard_cell is None:
            assert self.gathers is not None
            return self.gathers.gather_weights(into, self.shard)
        if self.gathers is None:
            return self.shard_cell.fetch(into)
        self.prefetch()
        homes = self.homes
        assert self._arriving is not None and homes is not None
        (transfer, buffer), self._arriving = self._arriving, None
        transfer.wait()
        return Sequel(self.gathers.gather_weights(into, buffer), lambda: homes.give(buffer))
