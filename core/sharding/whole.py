"""Whole weights and gradients of a sharded model, for whoever asks between steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from distui.core.errors import UserError
from distui.core.sharding.cuts import Cuts, reads_all
from distui.core.sharding.schedule import Schedule
from distui.core.sharding.start.weight_files import WeightFiles
from distui.core.sharding.transport.agreement import Place
from distui.core.sharding.units.placement import Placement
from distui.core.sharding.units.unit import Unit


class WholeStates:
    """The part of `ShardedModel` that gathers everything: state dicts, `full_parameters`, gradients by name."""

    model: nn.Module
    schedule: Schedule
    placement: Placement
    cuts: Cuts | None
    _replacing: bool

    @property
    def units(self) -> list[Unit]:
        """All units, in registration order."""
        return self.schedule.units

    @contextmanager
    def full_parameters(self, writeback: bool = False) -> Iterator[nn.Module]:
        """Give the model with every parameter whole and up to date; with `writeback` keep what is written to them.

        Collective: all ranks, for entering and leaving. With `writeback` all ranks must write the same.
        """
        self.schedule.take_writes()
        residence = self.schedule.residence
        if residence is None:  # or a model without parameters
            yield self.model
            if writeback:
                self.refresh_masters()
            return
        residence.settle()
        residence.release_all()
        residence.all_whole = True
        sharded = [unit for unit in self.units if unit.placement.shards_parameters]
        for unit in sharded:
            whole = torch.zeros(unit.layout.padded_numel, dtype=unit.dtype, device=unit.device)
            unit.gather_into(whole, unit.read_shard())
            unit.place(whole)
        try:
            yield self.model
        finally:
            residence.all_whole = False
            for unit in sharded:
                if writeback and unit.full is not None:
                    start, end = unit.layout.shard(unit.rank)
                    unit.write_shard(unit.full[start:end])
                unit.release()
            if writeback:
                self.refresh_masters()

    @contextmanager
    def gradients(self) -> Iterator[dict[str, torch.Tensor]]:
        """Give the whole gradients by name, averaged over the ranks; changes to them are kept. Collective: all ranks.

        Parameters that have no gradient are left out. All ranks must change them alike.
        """
        if self.cuts is not None and self.cuts.elsewhere:
            raise UserError(
                "engine.gradients of a pipelined model",
                f"each of {self.cuts.num_ranks} stages has the gradients of its own blocks",
                "clip with engine.clip_grad_norm_ or clip_grad_value_, or set strategy.pipeline_parallel to 1",
            )
        self.schedule.finish_gradients()
        if self.schedule.residence is not None:
            self.schedule.residence.serve(Place.MET)
        found: dict[str, torch.Tensor] = {}
        wholes: list[tuple[Unit, torch.Tensor]] = []
        pieces: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for unit in self.schedule.order:
            if not unit.has_gradient:
                continue
            with unit.gradient() as shard:
                whole = torch.zeros(unit.layout.padded_numel, dtype=shard.dtype, device=shard.device)
                unit.gather_into(whole, shard)
            wholes.append((unit, whole))
            for index, (name, span) in enumerate(zip(unit.param_names, unit.layout.spans, strict=True)):
                if unit.present[index]:
                    found[name] = whole[span.offset : span.end].view(span.shape)
                    if self.cuts is not None and self.cuts.get(unit.params[index]) is not None:
                        pieces[name] = unit.params[index], found[name]
                        found[name] = self.cuts.assemble(*pieces[name])
        kept = dict(found)
        yield found
        for name, grad in found.items():
            if name not in kept:
                raise UserError(
                    f"{name} has no gradient that could be replaced",
                    f"{len(kept)} parameters have one in this step",
                    "assign only names that engine.gradients gave",
                )
            if grad is not kept[name]:
                kept[name].copy_(grad)
        for name, (param, piece) in pieces.items():
            assert self.cuts is not None
            piece.copy_(self.cuts.take(param, kept[name]))
        for unit, whole in wholes:
            start, end = unit.layout.shard(unit.rank)
            with unit.gradient(writes=True) as shard:
                shard.copy_(whole[start:end])

    def refresh_masters(self) -> None:
        """Take weights that somebody wrote between steps into the optimizer's fp32 copies."""
        for unit in self.units:
            if unit.trainable:
                unit.refresh_master()

    @reads_all
    def full_state_dict(self, to_cpu: bool = True, only_rank_0: bool = False) -> dict[str, Any]:
        """Return the model's whole state, as plain torch would save it. Collective: all ranks.

        fp32 masters stand for the parameters that have them. With `only_rank_0` the others get an empty dict.
        """
        keep = not only_rank_0 or self.placement.part[0] == 0
        whole: dict[int, torch.Tensor] = {}
        self.schedule.take_writes()
        for unit in self.units:
            source = unit.read_master()
            if unit.layout.num_shards == 1 or unit.gathers is None:
                flat = source
            else:
                flat = torch.zeros(unit.layout.padded_numel, dtype=source.dtype, device=source.device)
                unit.gathers.all_gather(flat, source).wait()
            if keep or self.cuts is not None:
                for param, span in zip(unit.params, unit.layout.spans, strict=True):
                    piece = flat[span.offset : span.end].view(span.shape)
                    whole[id(param)] = piece.cpu().clone() if to_cpu and self.cuts is None else piece.clone()
        if self.cuts is not None:
            # In the model's order, which is that of all ranks; frozen ones of stages 0 to 2 are in no unit.
            for tensor in [*nn.Module.parameters(self.model), *self.model.buffers()]:
                if self.cuts.get(tensor) is not None or id(tensor) in whole:
                    piece = self.cuts.assemble(tensor, whole.get(id(tensor), tensor.detach()))
                    whole[id(tensor)] = piece.cpu() if to_cpu else piece
        if not keep:
            return {}
        params = dict(self.model.named_parameters(remove_duplicate=False))
        with self._placeholders():
            state = self.model.state_dict(keep_vars=True)
        for name, value in state.items():
            key = params.get(name, value)
            if id(key) in whole:
                state[name] = whole[id(key)]
            elif isinstance(value, torch.Tensor):
                state[name] = value.detach().cpu().clone() if to_cpu else value.detach()
        return state

    @contextmanager
    def _placeholders(self) -> Iterator[None]:
        """Let a state_dict be taken whose parameters are going to be replaced."""
        before, self._replacing = self._replacing, True
        try:
            yield
        finally:
            self._replacing = before

    @reads_all
    def load_full_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> Any:
        """Take a whole state, as `full_state_dict` or plain torch gives it. Collective: all ranks, each with `state`.

        Masters take the precision of `state`.
        """
        if self.cuts is not None:
            state = self.cuts.taken(self.model, state)
        with self.full_parameters(), self._placeholders() if self.cuts is not None else nullcontext():
            missing_and_unexpected = self.model.load_state_dict(state, strict=strict)
            params = dict(self.model.named_parameters(remove_duplicate=False))
            named = {id(param): state[name] for name, param in params.items() if name in state}
            for unit in self.units:
                assert unit.full is not None
                start, end = unit.layout.shard(unit.rank)
                unit.write_shard(unit.full[start:end])
                if not unit.has_master:
                    continue
                for index, param in enumerate(unit.params):
                    low, high = unit.layout.owned(index, unit.rank)
                    if low < high and id(param) in named:
                        at = unit.layout.spans[index].offset + low - start
                        unit.write_master(at, named[id(param)].reshape(-1)[low:high])
        return missing_and_unexpected

    @reads_all
    def load_files(self, files: WeightFiles) -> None:
        """Take what `files` have of the model into shards and masters; each rank reads its own.

        Publishing the units brings it to the whole parameters.
        """
        self.schedule.take_writes()
        with torch.no_grad():
            for unit in self.units:
                base, _ = unit.layout.shard(unit.rank)
                shard = unit.read_shard().clone()
                master = unit.read_master().clone() if unit.has_master else None
                for index, (param, span) in enumerate(zip(unit.params, unit.layout.spans, strict=True)):
                    low, high = unit.layout.owned(index, unit.rank)
                    if low < high and files.has(param):
                        at = span.offset + low - base
                        values = files.read(param, low, high)
                        shard[at : at + high - low].copy_(values)
                        if master is not None:
                            master[at : at + high - low].copy_(values)
                unit.write_shard(shard)
                if master is not None:
                    unit.write_master(0, master)
            held = {id(param) for unit in self.units for param in unit.params}
            for tensor in [*nn.Module.parameters(self.model), *self.model.buffers()]:
                elsewhere = self.cuts is not None and id(tensor) in self.cuts.elsewhere
                if id(tensor) not in held and not elsewhere and files.has(tensor):
                    tensor.copy_(files.read(tensor).view(tensor.shape))
