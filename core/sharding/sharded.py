"""A model under ZeRO: its units, the hooks that move them, and full weights for whoever asks between steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn

from distui.core.backends.optimizer import PreparedOptimizer
from distui.core.errors import UserError
from distui.core.offload.homes import Homes, Offload, agreed, open_homes
from distui.core.sharding.alike import start_alike
from distui.core.sharding.compression import Compression, make_transport, start_onebit
from distui.core.sharding.hooks import ClearingGradients, Hook, WaitingParameters
from distui.core.sharding.optim import ShardedOptimizer
from distui.core.sharding.partition import partition, split_by_kind
from distui.core.sharding.placement import Placement
from distui.core.sharding.pool import BufferPool
from distui.core.sharding.schedule import Schedule
from distui.core.sharding.transport import Transport
from distui.core.sharding.unit import Unit


class ShardedModel:
    """Lays a model out in flat buffers and hooks the collectives of its stage around it; nothing is wrapped."""

    def __init__(
        self,
        model: nn.Module,
        *,
        stage: int,
        group: dist.ProcessGroup | None,
        compute_dtype: torch.dtype | None = None,
        reduce_in_fp32: bool = True,
        offload: Offload | None = None,
        compression: Compression | None = None,
    ) -> None:
        """Prepare `model` in place. Collective: all ranks of `group` (None: one rank).

        Raises: UserError, on all ranks, where a home has no room or cannot be written.
        """
        if any(isinstance(param, nn.parameter.UninitializedParameter) for param in model.parameters()):
            raise UserError(
                "the model has lazy parameters that are not initialised",
                "their shapes are not known before the first forward",
                "run one forward before engine.prepare(model)",
            )
        num_ranks = dist.get_world_size(group) if group is not None else 1
        rank = dist.get_rank(group) if group is not None else 0
        self.model = model
        self.compression = compression
        self.pool = BufferPool(aligned=offload is not None and offload.active)
        self.transport: Transport | None = None
        self.gathers: Transport | None = None
        self._group = group if num_ranks > 1 else None
        self.homes: Homes | None = None
        if offload is not None and offload.active:
            self.homes = agreed(lambda: open_homes(model, offload, stage, compute_dtype, num_ranks), self._group)
        self.placement = Placement(
            stage,
            rank,
            num_ranks,
            compute_dtype,
            reduce_in_fp32,
            moves_gradients=self.homes is not None and self.homes.gradients is not None,
            moves_parameters=self.homes is not None and self.homes.params is not None,
        )
        if group is not None and num_ranks > 1:
            self.transport = make_transport(group, "data_parallel", self.pool, compression)
            self.gathers = self.transport
            if self.placement.shards_parameters:
                # Reductions and gathers have an order each; on one communicator they would need a common one.
                second = dist.new_group(dist.get_process_group_ranks(group))
                assert second is not None
                self.gathers = make_transport(second, "data_parallel_gather", self.pool, compression, gradients=False)
            start_alike(model, group)
        self.units = self._build_units() if self.homes is None else agreed(self._build_units, self._group)
        self.schedule = Schedule(model, self.units, self.placement.effective_stage, num_ranks)
        self.optimizers: list[ShardedOptimizer] = []
        self._whole = False
        """Stage 3: whether every parameter is whole just now."""
        self._guards: list[Any] = []
        self._guard_reads()
        model.zero_grad = ClearingGradients(model, self._forget_gradients)  # type: ignore[method-assign]

    def _forget_gradients(self) -> None:
        self.schedule.discard_gradients()
        for optimizer in self.optimizers:
            optimizer.grad_factor = optimizer.loss_scale = 1.0

    def _build_units(self) -> list[Unit]:
        units = []
        for spec in partition(self.model):
            for dtype, trainable, params in split_by_kind(spec):
                if not trainable and not self.placement.shards_parameters:
                    compute = self.placement.compute_dtype or dtype
                    for _, param in params:
                        param.data = param.data.to(compute)
                    continue
                units.append(
                    Unit(
                        spec.name,
                        params,
                        spec.modules,
                        spec.is_root,
                        self.placement,
                        self.pool,
                        self.transport,
                        self.gathers,
                        self.homes,
                    )
                )
        return units

    def _guard_reads(self) -> None:
        if self.placement.shards_parameters:
            # Outside of `full_parameters` a parameter's memory is a slot that units take turns on.
            for module in self.model.modules():
                reads = Hook(self._need_whole("state_dict"), self._need_whole("deepcopy"))
                self._guards.append(module.register_state_dict_pre_hook(reads))
                writes = Hook(self._need_whole("load_state_dict"))
                self._guards.append(module.register_load_state_dict_pre_hook(writes))
            return
        # Weights may be on their way after a step (stage 1, 2): whoever lists them between steps waits for them.
        if self.placement.shards_optimizer:
            wait = self.schedule.finish_gathers
            self.model.named_parameters = WaitingParameters(self.model, wait)  # type: ignore[method-assign]
            self._guards.append(self.model.register_state_dict_pre_hook(Hook(lambda *_: wait())))
            self._guards.append(self.model.register_load_state_dict_pre_hook(Hook(lambda *_: wait())))
        self._guards.append(self.model.register_load_state_dict_post_hook(Hook(lambda *_: self.refresh_masters())))

    def _need_whole(self, what: str) -> Callable[..., None]:
        def check(*_: Any) -> None:
            if not self._whole:
                raise UserError(
                    f"{what} of a model whose parameters are sharded",
                    "at stage 3 a rank holds whole parameters only while their unit runs",
                    "use engine.get_state_dict(model) or engine.load_state_dict(model, state), "
                    "or do it inside `with engine.full_parameters(model):`",
                )

        return check

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer, state_bits: int = 32) -> ShardedOptimizer:
        """Rebind `optimizer` to this model's flat shards."""
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
                optimizer, self.schedule, self.units, self.transport, siblings, state_bits, self.homes
            )

        prepared = rebind() if self.homes is None else agreed(rebind, self._group)
        if self.compression is not None and self.compression.gradients == "onebit" and self.transport is not None:
            prepared.onebit = start_onebit(prepared, self.units, self.transport, self.pool, self.compression)
        return prepared

    def remove(self) -> None:
        """Let go of the model: hooks, buffers, process group. Collective: all ranks.

        What is left is a plain model with its weights in the compute format; at stage 3, where a rank has but a part of
        them, its parameters are empty.
        """
        self.schedule.finish_gathers()
        self.schedule.discard_gradients()
        self.schedule.remove()
        for guard in self._guards:
            guard.remove()
        self._guards.clear()
        if isinstance(self.model.__dict__.get("named_parameters"), WaitingParameters):
            del self.model.named_parameters
        if isinstance(self.model.__dict__.get("zero_grad"), ClearingGradients):
            del self.model.zero_grad
        if self.placement.shards_parameters:
            for unit in self.units:
                for param in unit.params:
                    param.data = param.data.new_empty(0)
        if self.gathers is not None and self.gathers is not self.transport and dist.is_initialized():
            dist.destroy_process_group(self.gathers.group)

    # ---- full weights --------------------------------------------------------------------------------------------

    @contextmanager
    def full_parameters(self, writeback: bool = False) -> Iterator[nn.Module]:
        """Give the model with every parameter whole and up to date; with `writeback` keep what is written to them.

        Collective: all ranks, for entering and leaving. With `writeback` all ranks must write the same.
        """
        self.schedule.finish_gathers()
        if not self.placement.shards_parameters:
            yield self.model
            if writeback:
                self.refresh_masters()
            return
        slots = []
        for unit in self.units:
            assert unit.full is not None
            slots.append(unit.full)
            whole = torch.zeros_like(unit.full)
            unit.gather_into(whole, unit.read_shard())
            unit.bind(whole)
        self._whole = True
        try:
            yield self.model
        finally:
            self._whole = False
            for unit, slot in zip(self.units, slots, strict=True):
                if writeback and unit.full is not None:
                    start, end = unit.layout.shard(unit.rank)
                    unit.write_shard(unit.full[start:end])
                unit.bind(slot)
            if writeback:
                self.refresh_masters()
                assert self.schedule.slots is not None
                self.schedule.slots.invalidate()

    def refresh_masters(self) -> None:
        """Take weights that somebody wrote between steps into the optimizer's fp32 copies."""
        for unit in self.units:
            if unit.trainable:
                unit.refresh_master()

    def full_state_dict(self, to_cpu: bool = True, only_rank_0: bool = False) -> dict[str, Any]:
        """Return the model's whole state, as plain torch would save it. Collective: all ranks.

        fp32 masters stand for the parameters that have them. With `only_rank_0` the others get an empty dict.
        """
        keep = not only_rank_0 or self.placement.rank == 0
        place = {id(param): (unit, index) for unit in self.units for index, param in enumerate(unit.params)}
        whole: dict[int, torch.Tensor] = {}
        self.schedule.finish_gathers()
        for unit in self.units:
            source = unit.read_master()
            if unit.layout.num_shards == 1 or unit.gathers is None:
                flat = source
            else:
                flat = torch.zeros(unit.layout.padded_numel, dtype=source.dtype, device=source.device)
                unit.gathers.all_gather(flat, source).wait()
            if keep:
                for param, span in zip(unit.params, unit.layout.spans, strict=True):
                    piece = flat[span.offset : span.end].view(span.shape)
                    whole[id(param)] = piece.cpu().clone() if to_cpu else piece.clone()
        if not keep:
            return {}
        params = dict(self.model.named_parameters(remove_duplicate=False))
        before, self._whole = self._whole, True  # the parameters in it are replaced
        try:
            state = self.model.state_dict()
        finally:
            self._whole = before
        for name, value in state.items():
            if name in params and id(params[name]) in place:
                state[name] = whole[id(params[name])]
            elif isinstance(value, torch.Tensor) and to_cpu:
                state[name] = value.detach().cpu().clone()
        return state

    def load_full_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> Any:
        """Take a whole state, as `full_state_dict` or plain torch gives it. Collective: all ranks, each with `state`.

        Masters take the precision of `state`.
        """
        with self.full_parameters():
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
        if self.schedule.slots is not None:
            self.schedule.slots.invalidate()
        return missing_and_unexpected

    # ---- accounting ----------------------------------------------------------------------------------------------

    @property
    def transports(self) -> list[Transport]:
        """All that this model's collectives go through."""
        found = {id(transport): transport for transport in (self.transport, self.gathers) if transport is not None}
        return [inner for transport in found.values() for inner in (transport, *transport.hops)]

    @property
    def sent_bytes(self) -> int:
        """Bytes that this rank has sent for the model since the start."""
        return sum(transport.sent_bytes for transport in self.transports)

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
        slots = self.schedule.slots.allocated_bytes if self.schedule.slots is not None else 0
        buffers = slots + self.pool.allocated_bytes + count([buffer.data for buffer in self.model.buffers()])
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
