"""The parameters of a unit: laid out in one flat buffer, cut into shards, and reached wherever they rest."""

from __future__ import annotations

import torch
from torch import nn

from distui.core.offload.home import SHARD_MULTIPLE, Cell, Sequel, Transfer, Waitable, flat_buffer
from distui.core.offload.homes import Homes
from distui.core.sharding.layout import ALIGNMENT, FlatLayout, plan_layout
from distui.core.sharding.placement import Placement
from distui.core.sharding.transport import Transport


class UnitParameters:
    """One flat group of parameters of one dtype, all trainable or all frozen; `Unit` adds their gradients."""

    def __init__(
        self,
        name: str,
        named_params: list[tuple[str, nn.Parameter]],
        modules: list[nn.Module],
        is_root: bool,
        placement: Placement,
        gathers: Transport | None,
        homes: Homes | None,
    ) -> None:
        self.name, self.modules, self.is_root = name, modules, is_root
        self.placement, self.gathers, self.homes = placement, gathers, homes
        self.param_names = [param_name for param_name, _ in named_params]
        self.params = [param for _, param in named_params]
        first = self.params[0]
        self.trainable = first.requires_grad
        self.dtype = placement.compute_dtype or first.dtype
        self.device = first.device
        low_precision = self.dtype.itemsize < 4
        num_shards = placement.num_ranks if placement.shards_optimizer else 1
        multiple = SHARD_MULTIPLE if homes is not None else ALIGNMENT
        self.layout: FlatLayout = plan_layout([(n, p.shape) for n, p in named_params], num_shards, multiple)
        self.rank = placement.rank if num_shards > 1 else 0

        self.full: torch.Tensor | None = None
        self.shard: torch.Tensor
        self.master: torch.Tensor
        self.shard_cell: Cell | None = None
        self.master_cell: Cell | None = None
        self.has_master = low_precision and self.trainable
        """Whether the optimizer steps an fp32 copy; else it steps the parameters themselves."""
        self.shard_is_current = False
        """The step wrote the parameters beside their fp32 master: publishing them needs no conversion."""
        self._place_parameters()

        # Parameters in flight: the all-gather after a step (stage 1, 2) or before the unit runs (stage 3).
        self.gathering: Waitable | None = None
        self._arriving: tuple[Transfer, torch.Tensor] | None = None
        """The shard on its way from its home, ahead of its gather."""

    def _place_parameters(self) -> None:
        start, end = self.layout.shard(self.rank)
        aligned = self.homes is not None
        full = flat_buffer(self.layout.padded_numel, self.dtype, self.device, aligned)
        for param, span in zip(self.params, self.layout.spans, strict=True):
            full[span.offset : span.end].copy_(param.detach().reshape(-1))
        homes = self.homes
        if self.has_master:
            # The master keeps the precision that the script's own weights had.
            at_home = homes is not None and homes.masters is not None
            master = flat_buffer(end - start, torch.float32, self.device, aligned)
            for index, (param, span) in enumerate(zip(self.params, self.layout.spans, strict=True)):
                low, high = self.layout.owned(index, self.rank)
                if low < high:
                    at = span.offset + low - start
                    master[at : at + high - low].copy_(param.detach().reshape(-1)[low:high])
            if at_home:
                assert homes is not None and homes.masters is not None
                self.master_cell = homes.masters.cell(end - start, torch.float32)
                self.master_cell.store(master).wait()
            else:
                self.master = master
        if not self.placement.shards_parameters:
            self.shard = full[start:end]
            self.bind(full)
        elif homes is not None and homes.params is not None:
            self.shard_cell = homes.params.cell(end - start, self.dtype)
            self.shard_cell.store(full[start:end]).wait()
            for param in self.params:
                param.data = full.new_empty(0)  # until a slot is bound: the model need not be in memory twice
        else:
            self.shard = full[start:end].clone()
        if not self.has_master:
            self.master_cell = self.shard_cell
            if self.shard_cell is None:
                self.master = self.shard

    def bind(self, full: torch.Tensor) -> None:
        """Make every parameter a view of `full`; done once, so saved tensors stay right."""
        self.full = full
        for param, span in zip(self.params, self.layout.spans, strict=True):
            param.data = full[span.offset : span.end].view(span.shape)

    def publish(self, refresh: bool = True) -> None:
        """Bring weights that the optimizer stepped into the compute format and, in stage 1 and 2, to all ranks.

        Collective: all ranks. The gather is waited for by `finish_gather`. Without `refresh` the shard is new already.
        """
        if refresh and self.has_master and not self.shard_is_current:
            self.write_shard(self.read_master())
        self.shard_is_current = False
        if self.placement.shards_optimizer and not self.placement.shards_parameters and self.gathers is not None:
            assert self.full is not None
            self.gathering = self.gathers.all_gather(self.full, self.shard)

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

    # ---- stage 3 -------------------------------------------------------------------------------------------------

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

    def start_gather(self) -> None:
        """Start to fill the bound buffer with whole parameters. Collective: all ranks."""
        assert self.full is not None
        if self.shard_cell is None:
            assert self.gathers is not None
            self.gathering = self.gathers.gather_weights(self.full, self.shard)
        elif self.gathers is None:
            self.gathering = self.shard_cell.fetch(self.full)
        else:
            self.prefetch()
            homes = self.homes
            assert self._arriving is not None and homes is not None
            (transfer, buffer), self._arriving = self._arriving, None
            transfer.wait()
            self.gathering = Sequel(self.gathers.gather_weights(self.full, buffer), lambda: homes.give(buffer))

    def finish_gather(self) -> None:
        """Wait until the parameters are all here."""
        if self.gathering is not None:
            self.gathering.wait()
            self.gathering = None
