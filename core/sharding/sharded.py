"""A model under ZeRO: its units, the hooks that move them, and full weights for whoever asks between steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from types import MappingProxyType
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn

from distui.core.axes.groups import beside
from distui.core.errors import UserError
from distui.core.sharding.cuts import Cuts, ExpertCuts, reads_all
from distui.core.sharding.homes.homes import Homes, Offload, agreed, open_homes
from distui.core.sharding.hooks import ClearingGradients, Hook
from distui.core.sharding.optim.optim import ShardedOptimizer
from distui.core.sharding.optim.prepared import PreparedOptimizer
from distui.core.sharding.refusals import refuse_one_queue, refuse_parameters
from distui.core.sharding.schedule import Schedule
from distui.core.sharding.start.start import Start
from distui.core.sharding.transport.agreement import Agreement, Place
from distui.core.sharding.transport.compression import Compression, make_transport, start_onebit
from distui.core.sharding.transport.replicas import Replicas
from distui.core.sharding.transport.transport import Transport
from distui.core.sharding.units.guarded import unwatch
from distui.core.sharding.units.partition import UnitSpec, partition, split_by_kind
from distui.core.sharding.units.placement import Placement
from distui.core.sharding.units.pool import BufferPool
from distui.core.sharding.units.unit import Unit
from distui.core.sharding.whole import WholeStates


class ShardedModel(WholeStates):
    """Lays a model out in flat buffers and hooks the collectives of its stage around it; nothing is wrapped."""

    def __init__(
        self,
        model: nn.Module,
        *,
        stage: int,
        group: dist.ProcessGroup | None,
        shares: tuple[dist.ProcessGroup | None, dist.ProcessGroup] | None = None,
        compute_dtype: torch.dtype | None = None,
        reduce_in_fp32: bool = True,
        offload: Offload | None = None,
        compression: Compression | None = None,
        zero_missing: bool = False,
        start: Start | None = None,
        optimizer_of: Mapping[int, int] = MappingProxyType({}),
        cuts: Cuts | None = None,
    ) -> None:
        """Prepare `model` in place, a unit at a time. Collective: all ranks of `group` (None: one rank).

        `shares` are those of `group` that share one copy of the states, and the copies of this rank; None: all share.
        `start` says where its numbers come from, and which device they go to; without it rank 0's own, where they are.
        `optimizer_of` says which of several optimizers steps a parameter, by its identity; `cuts` which parameters are
        pieces of whole ones that ranks outside of `group` have the rest of.

        Raises: UserError, on all ranks, where a home has no room or cannot be written.
        """
        start = Start(model, group) if start is None else start
        sharing, copies = (group, None) if shares is None else shares
        num_ranks, rank = _place_in(sharing)
        num_replicas, replica = _place_in(copies)
        refuse_parameters(model, num_ranks, stage)
        self.model, self.cuts = model, cuts
        self.compression = compression
        self.pool = BufferPool(aligned=offload is not None and offload.active)
        self.transport: Transport | None = None
        self.gathers: Transport | None = None
        self._group = group if num_ranks * num_replicas > 1 else None
        self.homes: Homes | None = None
        if offload is not None and offload.active:
            device = start.device_for(model.parameters())
            self.homes = agreed(
                lambda: open_homes(model, offload, stage, compute_dtype, num_ranks, device), self._group
            )
        self.placement = Placement(
            stage,
            rank,
            num_ranks,
            compute_dtype,
            reduce_in_fp32,
            moves_gradients=self.homes is not None and self.homes.gradients is not None,
            moves_parameters=self.homes is not None and self.homes.params is not None,
            replica=replica,
            num_replicas=num_replicas,
        )
        device = start.device_for(model.parameters())
        if sharing is not None and num_ranks > 1:
            self.transport, self.gathers = self._talk_over(sharing, "data_parallel", device)
        self._across = self._talk_to_copies(copies, "replicas")
        self.replicas: Replicas | None = None
        if self.transport is not None and self._across is not None:
            self.replicas = Replicas(self._across)
        experts = cuts.experts if cuts is not None else None
        self._of_experts = self.placement, self.transport, self.gathers
        if experts is not None:
            self._of_experts = self._share_of_experts(experts, device, copies)
        """How the states of experts that are cut over the ranks are shared, and over what."""
        self.frozen: list[tuple[str, nn.Parameter]] = []
        """Stages 0 to 2: parameters that are in no unit, because they were frozen when the model was prepared."""
        with cuts.watching(model) if cuts is not None else nullcontext():
            groups = self._build_units(start, optimizer_of)
        agreement = None
        if (agreeing := self._group if experts is None else experts.stage) is not None:
            agreement = Agreement(agreeing, "data_parallel_agreement", self.pool)
        # Whole units' momenta travel under onebit, so what has no gradient counts as zero.
        zero_missing = zero_missing or (compression is not None and compression.gradients == "onebit")
        self.schedule = Schedule(model, groups, self.placement.effective_stage, agreement, zero_missing)
        self.schedule.before_gradients = self._settle_clipping
        self.schedule.before_look = self._settle_factors
        self.schedule.waits_late = experts is not None and device.type == "cpu"
        self.optimizers: list[ShardedOptimizer] = []
        self._replacing = False
        """A state_dict is being taken whose parameters are replaced afterwards."""
        self._guards: list[Any] = []
        self._guard_reads()
        model.zero_grad = ClearingGradients(model, self._forget_gradients)  # type: ignore[method-assign]

    def _talk_over(self, group: dist.ProcessGroup, name: str, device: torch.device) -> tuple[Transport, Transport]:
        """Return what sums and what gathers over `group`. Collective: as `group` was made."""
        transport = make_transport(group, name, self.pool, self.compression)
        if not self.placement.shards_parameters:
            return transport, transport
        # Reductions and gathers have an order each; on one communicator they would need a common one.
        refuse_one_queue(device)
        second = beside(group)
        return transport, make_transport(second, f"{name}_gather", self.pool, self.compression, gradients=False)

    def _talk_to_copies(self, copies: dist.ProcessGroup | None, name: str) -> Transport | None:
        """Return what sums over ranks that hold the same, each on a node of its own as a rule. Collective."""
        form = None if self.compression is None else replace(self.compression, ranks_per_node=None)
        return None if copies is None else make_transport(copies, name, self.pool, form)

    def _share_of_experts(
        self, experts: ExpertCuts, device: torch.device, copies: dist.ProcessGroup | None
    ) -> tuple[Placement, Transport | None, Transport | None]:
        group = experts.copies
        num_ranks, rank = _place_in(group)
        # Their gradients are of all ranks' losses, whoever holds them.
        placement = replace(self.placement, rank=rank, num_ranks=num_ranks, num_of_losses=self.placement.num_averaged)
        if self.transport is None:  # where nothing else is in shards, tensor-parallel ranks hold copies of an expert
            placement = replace(placement, stage=0)
        if group is None and copies is not None:  # nobody near by has the same: copies alone do, and sum all of it
            placement = replace(placement, stage=0, rank=placement.replica, num_ranks=placement.num_replicas)
            placement = replace(placement, replica=0, num_replicas=1)
            return placement, self._talk_to_copies(beside(copies), "experts"), None
        return placement, *((None, None) if group is None else self._talk_over(group, "experts", device))

    def _is_expert(self, param: torch.Tensor) -> bool:
        return self.cuts is not None and self.cuts.is_expert(param)

    def placement_of(self, param: torch.Tensor) -> Placement:
        """Return how the states of `param` are shared."""
        return self._of_experts[0] if self._is_expert(param) else self.placement

    def _forget_gradients(self, set_to_none: bool) -> None:
        self.schedule.discard_gradients(keep_zeros=not set_to_none)
        for optimizer in self.optimizers:
            optimizer.grad_factor = optimizer.loss_scale = 1.0

    def _settle_clipping(self) -> None:
        for optimizer in self.optimizers:
            optimizer.settle_clipping()

    def _settle_factors(self) -> None:
        for optimizer in self.optimizers:
            if optimizer.grad_factor != 1.0:
                optimizer.settle_factor()

    def _build_units(self, start: Start, optimizer_of: Mapping[int, int]) -> list[list[Unit]]:
        groups = []
        specs = partition(self.model)
        for spec in specs if self.cuts is None else self.cuts.held(specs):
            units = []
            start.bring([param for _, param in spec.params])  # together: a block initialises all that it holds
            for _, trainable, params in split_by_kind(spec, optimizer_of, self._is_expert):
                if not trainable and not self.placement.shards_parameters:
                    self.frozen += params
                    continue
                units.append(self._start_unit(spec, params, start))
            if units:
                groups.append(units)
        held = {id(param) for units in groups for unit in units for param in unit.params}
        held |= self.cuts.elsewhere if self.cuts is not None else set()
        start.place([param for param in self.model.parameters() if id(param) not in held], self.placement.compute_dtype)
        return groups

    def _start_unit(self, spec: UnitSpec, params: list[tuple[str, nn.Parameter]], start: Start) -> Unit:
        def make() -> Unit:
            return self._unit(spec.name, params, spec.modules, spec.is_root, start)

        # A home may refuse on one rank alone.
        return make() if self.homes is None else agreed(make, self._group)

    def _unit(
        self, name: str, params: list[tuple[str, nn.Parameter]], modules: list[nn.Module], is_root: bool, start: Start
    ) -> Unit:
        placement, transport, gathers = self.placement, self.transport, self.gathers
        if is_expert := self._is_expert(params[0][1]):
            placement, transport, gathers = self._of_experts
        unit = Unit(name, params, modules, is_root, placement, self.pool, transport, gathers, self.homes, start)
        unit.replicas = self.replicas if placement.num_replicas > 1 else None
        unit.cuts = self.cuts if is_expert or self.cuts is None or self.cuts.group is not None else None
        return unit

    @reads_all
    def follow_requires_grad(self, also: Callable[[str, nn.Parameter], bool] = lambda name, param: False) -> None:
        """Make trainable what the script has unfrozen since, and what `also` says of. All ranks, alike."""
        schedule = self.schedule

        def wanted(name: str, param: nn.Parameter) -> bool:
            return param.requires_grad or also(name, param)

        with torch._C.DisableTorchFunctionSubclass():
            thawed = [(name, param) for name, param in self.frozen if wanted(name, param)]
            frozen = [unit for unit in schedule.units if not unit.trainable]
            stirred = [unit for unit in frozen if any(map(wanted, unit.param_names, unit.params))]
        if not thawed and not stirred:
            return
        new = []
        if thawed:
            gone = {id(param) for _, param in thawed}
            self.frozen = [(name, param) for name, param in self.frozen if id(param) not in gone]
            alone = Start(self.model)  # every rank has them already
            spec = UnitSpec(f"unfrozen.{len(schedule.units)}", is_root=True, params=thawed)
            for _, _, params in split_by_kind(spec, is_expert=self._is_expert):
                new.append(self._unit(spec.name, params, [], True, alone))
            schedule.units += new
        for unit in [*new, *stirred]:
            if not unit.trainable:
                unit.train()
        schedule.watch_gradients()
        for optimizer in self.optimizers:
            optimizer.take_in([*new, *stirred])

    def _guard_reads(self) -> None:
        follow = Hook(lambda module, args: self.follow_requires_grad())
        self._guards.append(self.model.register_forward_pre_hook(follow, prepend=True))
        if self.placement.shards_parameters or self.cuts is not None:
            # Both would need every parameter whole at once, on every rank.
            for module in self.model.modules():
                reads = Hook(self._need_whole("state_dict"), self._need_whole("deepcopy"))
                self._guards.append(module.register_state_dict_pre_hook(reads))
                writes = Hook(self._need_whole("load_state_dict"))
                self._guards.append(module.register_load_state_dict_pre_hook(writes))
            return
        self._guards.append(self.model.register_load_state_dict_post_hook(Hook(lambda *_: self.refresh_masters())))

    @property
    def _whole(self) -> bool:
        residence = self.schedule.residence
        return self._replacing or (self.cuts is None and (residence is None or residence.all_whole))

    def _need_whole(self, what: str) -> Callable[..., None]:
        def check(*_: Any) -> None:
            if self.cuts is not None and not self._whole:
                raise UserError(
                    f"{what} of a model that is cut over {self.cuts.num_ranks} {self.cuts.kind}",
                    "each rank holds pieces of its parameters",
                    "use engine.get_state_dict(model) or engine.load_state_dict(model, state), on all ranks",
                )
            if not self._whole:
                raise UserError(
                    f"{what} of a model whose parameters are sharded",
                    "at stage 3 a rank holds whole parameters only while their unit runs",
                    "use engine.get_state_dict(model) or engine.load_state_dict(model, state), "
                    "or do it inside `with engine.full_parameters(model):`",
                )

        return check

    @reads_all
    def prepare_optimizer(self, optimizer: torch.optim.Optimizer, state_bits: int = 32) -> ShardedOptimizer:
        """Rebind `optimizer` to this model's flat shards. Collective where parameters were unfrozen since."""
        self.follow_requires_grad()
        siblings = cast("list[PreparedOptimizer]", self.optimizers)
        if siblings and self.compression is not None and self.compression.gradients == "onebit":
            raise UserError(
                "compression.gradients=onebit with several optimizers of one model",
                "after the warm-up gradients stay on their ranks, and only one of the optimizers exchanges momenta",
                "give the model one Adam or AdamW, or set compression.gradients to int8 or fp8",
            )
        if self.homes is not None and state_bits != 32:
            raise UserError(
                f"optimizer.state_bits={state_bits} with offload",
                "offloaded states are stepped in 32 bits",
                "set optimizer.state_bits to 32, or offload.optimizer and offload.params to none",
            )

        def rebind() -> ShardedOptimizer:
            return ShardedOptimizer(
                optimizer, self.schedule, self.units, self.transport, siblings, state_bits, self.homes, self.cuts
            )

        with ExitStack() as ours:
            for unit in self.units:
                ours.enter_context(unit.own_references())
            prepared = rebind() if self.homes is None else agreed(rebind, self._group)
        prepared.follow_requires_grad = self.follow_requires_grad
        if self.compression is not None and self.compression.gradients == "onebit" and self.transport is not None:
            prepared.onebit = start_onebit(prepared, self.units, self.transport, self.pool, self.compression)
        return prepared

    @reads_all
    def remove(self) -> None:
        """Let go of the model: hooks, buffers, process group. Collective: all ranks.

        What is left is a plain model with its weights in the compute format; at stage 3, where a rank has but a part of
        them, its parameters are empty.
        """
        self.schedule.finish_gathers()
        self.schedule.discard_gradients()
        if self.schedule.residence is not None:
            self.schedule.residence.serve(Place.LET_GO)
            self.schedule.residence.invalidate()
        self.schedule.remove()
        for guard in self._guards:
            guard.remove()
        self._guards.clear()
        if isinstance(self.model.__dict__.get("zero_grad"), ClearingGradients):
            del self.model.zero_grad
        for unit in self.units:
            unit.let_go()
        unwatch(self.model.parameters())
        for transport, gathers in dict.fromkeys(((self.transport, self.gathers), self._of_experts[1:])):
            if gathers is not None and gathers is not transport and dist.is_initialized():
                dist.destroy_process_group(gathers.group)

    # ---- accounting ----------------------------------------------------------------------------------------------

    @property
    def transports(self) -> list[Transport]:
        """All that this model's collectives go through."""
        every = (self.transport, self.gathers, self._across, *self._of_experts[1:])
        found = {id(transport): transport for transport in every if transport is not None}
        return [inner for transport in found.values() for inner in (transport, *transport.hops)]

    @property
    def sent_bytes(self) -> int:
        """Bytes that this rank has sent for the model since the start."""
        return sum(transport.sent_bytes for transport in self.transports)

    @reads_all
    def memory_by_category(self) -> dict[str, int]:
        """Return this rank's bytes: parameters, gradients, optimizer_states, buffers (transient and the model's).

        Where states are offloaded also host and nvme: what rests there and is in none of the others.
        """
        seen: set[int] = set()

        def count(tensors: list[torch.Tensor | None]) -> int:
            total = 0
            for tensor in tensors:
                if tensor is None or tensor.untyped_storage().data_ptr() in seen:
                    continue
                seen.add(tensor.untyped_storage().data_ptr())
                total += tensor.untyped_storage().nbytes()
            return total

        sharded = self.placement.shards_parameters
        in_memory = [unit for unit in self.units if unit.shard_cell is None]
        parameters = count([unit.shard if sharded else unit.full for unit in in_memory])
        parameters += count([] if sharded else [param.data for param in self.model.parameters()])
        gradients = count(
            [unit.grad_shard if self.placement.shards_gradients else unit.grad_full for unit in self.units]
        )
        states = count([unit.master for unit in self.units if unit.trainable and unit.master_cell is None])
        for optimizer in self.optimizers:
            for state in optimizer.inner.state.values():
                states += count([value for value in state.values() if isinstance(value, torch.Tensor)])
            states += optimizer.onebit.allocated_bytes if optimizer.onebit is not None else 0
        buffers = self.pool.allocated_bytes + count([buffer.data for buffer in self.model.buffers()])
        report = {
            "parameters": parameters,
            "gradients": gradients,
            "optimizer_states": states,
            "buffers": buffers,
        }
        if self.homes is not None:
            streams = [optimizer.stream for optimizer in self.optimizers if optimizer.stream is not None]
            report["buffers"] += self.homes.buffer_bytes + sum(stream.frame_bytes for stream in streams)
            self.homes.account(report)
        return report


def _place_in(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """Return how many ranks `group` has, and which of them this is; None is one alone."""
    return (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
