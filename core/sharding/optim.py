"""The user's own optimizer, stepping flat shards.

Its parameter groups keep their hyper-parameters and get new parameters: for each unit the contiguous ranges of this
rank's shard that belong to the group. So a step is a few fused calls on long flat tensors, learning-rate schedulers go
on working, and the optimizer's states are sharded because its parameters are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from distui.core.backends.optimizer import PreparedOptimizer, prefer_fused
from distui.core.errors import UserError
from distui.core.sharding.elementwise import why_not_elementwise
from distui.core.sharding.flat_adam import FlatAdam, why_not_flat
from distui.core.sharding.onebit_adam import OneBitAdam
from distui.core.sharding.schedule import Schedule
from distui.core.sharding.transport import Transport
from distui.core.sharding.unit import Unit
from distui.kernels.l2_norm import l2_norm


@dataclass(slots=True)
class FlatRun:
    """A contiguous range of one unit's shard, stepped as one parameter."""

    unit: Unit
    indices: tuple[int, ...]
    """The unit's parameters that lie in it."""
    start: int
    end: int
    param: nn.Parameter


class ShardedOptimizer(PreparedOptimizer):
    """What `engine.prepare(optimizer)` returns: steps the flat shards, then brings the weights to all ranks."""

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        schedule: Schedule,
        units: list[Unit],
        transport: Transport | None,
        state_bits: int = 32,
    ) -> None:
        super().__init__(inner)
        self._schedule, self._units, self._transport = schedule, units, transport
        self.onebit: OneBitAdam | None = None
        """Steps in the place of the inner optimizer once its variance is frozen (compression.gradients=onebit)."""
        self.runs: list[list[FlatRun]] = []
        self._place = {id(param): (unit, index) for unit in units for index, param in enumerate(unit.params)}
        self._rebind()
        self.flat = self._flat(state_bits)
        """Steps in the place of the inner optimizer, where a kernel does."""

    # ---- what the engine asks for --------------------------------------------------------------------------------

    def finish_gradients(self) -> None:
        """Return when the gradients of the step are reduced. Collective."""
        self._schedule.finish_gradients()

    def discard_gradients(self, set_to_none: bool) -> None:
        """Forget the gradients (no memory is written)."""
        self._schedule.discard_gradients()

    def apply(self, factor: float) -> None:
        """Step the shards, then start to bring the weights to all ranks. Collective: all ranks."""
        # What is still being gathered reads the shards that the step writes.
        self._schedule.finish_gathers()
        if self.onebit is not None and self.onebit.frozen:
            self._set_gradients(factor)
            self.onebit.step()
        elif self.flat is not None:
            self.flat.step(factor)
        else:
            self._set_gradients(factor)
            self.inner.step()
        self._schedule.publish()
        if self.onebit is not None:
            self.onebit.follow()

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's part of the states, for the same number of ranks; `save_state` writes what reshards."""
        return self.inner.state_dict() if self.flat is None else self.flat.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` of this rank returned."""
        self.inner.load_state_dict(state_dict)
        if self.flat is not None:
            self.flat.narrow()
        if self.onebit is not None:
            self.onebit.load_state_dict(None)

    # ---- shards --------------------------------------------------------------------------------------------------

    def _rebind(self) -> None:
        reason = why_not_elementwise(self.inner)
        sharded = bool(self._units) and self._units[0].placement.shards_optimizer
        if reason and (sharded or "closure" in reason):
            raise UserError(
                f"the optimizer {type(self.inner).__name__} cannot step sharded parameters",
                reason,
                "use strategy.zero_stage=0, or an element-wise optimizer such as torch.optim.AdamW(fused=True)",
            )
        states = dict(self.inner.state)
        groups_params = [list(group["params"]) for group in self.inner.param_groups]
        self.inner.state.clear()
        for group, params in zip(self.inner.param_groups, groups_params, strict=True):
            prefer_fused(group)
            by_unit: dict[int, list[int]] = {}
            unit_of = {}
            for param in params:
                if not param.requires_grad:
                    continue
                if id(param) not in self._place:
                    raise UserError(
                        "the optimizer has a parameter that the model does not have",
                        f"a tensor of shape {tuple(param.shape)} in one of its groups",
                        "build the optimizer from model.parameters() of the model that is prepared with it",
                    )
                unit, index = self._place[id(param)]
                unit_of[id(unit)] = unit
                by_unit.setdefault(id(unit), []).append(index)
            runs = []
            for unit_id, indices in by_unit.items():
                unit = unit_of[unit_id]
                if reason:  # replicated states: whole matrices can be given
                    runs += [self._whole(unit, index) for index in indices]
                    continue
                for start, end in unit.layout.runs(indices, unit.rank):
                    inside = tuple(
                        index
                        for index in indices
                        if unit.layout.spans[index].end > unit.layout.shard(unit.rank)[0] + start
                        and unit.layout.spans[index].offset < unit.layout.shard(unit.rank)[0] + end
                    )
                    param = nn.Parameter(unit.master[start:end])
                    runs.append(FlatRun(unit, inside, start, end, param))
            self.runs.append(runs)
            group["params"] = [run.param for run in runs]
            self._carry_states(states, params, runs)

    def _flat(self, state_bits: int) -> FlatAdam | None:
        if state_bits == 8:
            if reason := why_not_flat(self.inner):
                raise UserError(
                    f"optimizer.state_bits=8 does not work with {type(self.inner).__name__} as it is set",
                    reason,
                    "set optimizer.state_bits to 32, or use torch.optim.AdamW without these options",
                )
            wide = next((run.param for runs in self.runs for run in runs if run.param.dtype != torch.float32), None)
            if wide is not None:
                raise UserError(
                    f"optimizer.state_bits=8 does not work with parameters in {wide.dtype}",
                    f"{wide.numel()} of them have no fp32 master",
                    "build the model in float32 or a 16-bit format, or set optimizer.state_bits to 32",
                )
            return FlatAdam(self.inner, self.runs, 8)
        return FlatAdam(self.inner, self.runs, 32) if FlatAdam.serves(self.inner, self.runs) else None

    def state_of(self, run: FlatRun) -> dict[str, Any]:
        """Return a run's state as torch's optimizer has it, to be saved or, if it is not in 8 bits, loaded into."""
        if self.flat is not None:
            return self.flat.full_state(run)
        state: dict[str, Any] = self.inner.state.get(run.param, {})
        return state

    @staticmethod
    def _whole(unit: Unit, index: int) -> FlatRun:
        span = unit.layout.spans[index]
        param = nn.Parameter(unit.master[span.offset : span.end].view(span.shape))
        return FlatRun(unit, (index,), span.offset, span.end, param)

    def _carry_states(self, states: dict[Any, Any], params: list[Any], runs: list[FlatRun]) -> None:
        """Take over states that the optimizer had already (a resumed script)."""
        if not states:
            return
        for run in runs:
            owner_states = {index: states.get(param) for param, index in self._indices(params, run.unit)}
            present = [owner_states[index] for index in run.indices if owner_states.get(index)]
            if not present:
                continue
            flat_state: dict[str, Any] = {}
            base = run.unit.layout.shard(run.unit.rank)[0]
            for key, value in (present[0] or {}).items():
                if not (isinstance(value, torch.Tensor) and value.dim()):
                    flat_state[key] = value
                    continue
                flat = torch.zeros(run.end - run.start, dtype=value.dtype, device=value.device)
                for index in run.indices:
                    span = run.unit.layout.spans[index]
                    low = max(span.offset, base + run.start)
                    high = min(span.end, base + run.end)
                    source = owner_states[index]
                    if source and low < high:
                        part = source[key].reshape(-1)[low - span.offset : high - span.offset]
                        flat[low - base - run.start : high - base - run.start].copy_(part)
                flat_state[key] = flat.view(run.param.shape)
            self.inner.state[run.param] = flat_state

    def _indices(self, params: list[Any], unit: Unit) -> Iterable[tuple[Any, int]]:
        for param in params:
            place = self._place.get(id(param))
            if place is not None and place[0] is unit:
                yield param, place[1]

    def _set_gradients(self, factor: float) -> None:
        for unit in self._units:
            if unit.trainable and unit.grad_shard is not None and factor != 1.0:
                unit.grad_shard.mul_(factor)
        for runs in self.runs:
            for run in runs:
                assert run.unit.grad_shard is not None
                grad = run.unit.grad_shard[run.start : run.end].view(run.param.shape)
                run.param.grad = grad if grad.dtype == run.param.dtype else grad.to(run.param.dtype)

    def grad_norm(self, units_and_indices: dict[int, set[int]] | None, norm_type: float) -> torch.Tensor:
        """Return the norm of all gradients over all shards, times the factor of the next step.

        Collective: all ranks (one number travels). Shapes: a scalar, on the shards' device.
        """
        self._schedule.finish_gradients()
        parts = []
        for unit in self._units:
            if not unit.trainable or unit.grad_shard is None:
                continue
            if units_and_indices is None:
                pieces = [unit.grad_shard]
            else:
                wanted = units_and_indices.get(id(unit), set())
                pieces = [unit.grad_shard[start:end] for start, end in unit.layout.runs(wanted, unit.rank)]
            if norm_type == 2.0:
                parts += [l2_norm(piece) for piece in pieces]
            else:
                parts += [torch.linalg.vector_norm(piece, norm_type, dtype=torch.float32) for piece in pieces]
        device = self._units[0].device if self._units else torch.device("cpu")
        norms = torch.stack(parts) if parts else torch.zeros(1, device=device)
        if math.isinf(norm_type):
            total = norms.max()
            op = dist.ReduceOp.MAX
        else:
            total = norms.double().pow(norm_type).sum() if norms.device.type == "cpu" else norms.pow(norm_type).sum()
            op = dist.ReduceOp.SUM
        sharded = bool(self._units) and self._units[0].placement.shards_optimizer
        if self.onebit is not None and self.onebit.frozen:
            total = self.onebit.mean_norm(total, norm_type)
        elif sharded and self._transport is not None:
            self._transport.all_reduce(total, op=op).wait()
        if not math.isinf(norm_type):
            total = total.pow(1.0 / norm_type)
        return total.float() * abs(self.grad_factor)

    def scale_gradients(self, factor: float, units_and_indices: dict[int, set[int]] | None) -> None:
        """Multiply gradients by `factor`: all of them at the next step, in one pass with it, or some of them now."""
        if units_and_indices is None:
            self.grad_factor *= factor
            return
        for unit in self._units:
            if unit.grad_shard is not None:
                for start, end in unit.layout.runs(units_and_indices.get(id(unit), ()), unit.rank):
                    unit.grad_shard[start:end].mul_(factor)

    def clamp_gradients(self, limit: float) -> None:
        """Clamp every gradient element to [-limit, limit]."""
        self._schedule.finish_gradients()
        factor, self.grad_factor = self.grad_factor, 1.0
        if self.onebit is not None and self.onebit.frozen:  # a rank has its own gradient only, divided by the ranks
            limit *= self._units[0].inverse_ranks
        for unit in self._units:
            if unit.trainable and unit.grad_shard is not None:
                if factor != 1.0:
                    unit.grad_shard.mul_(factor)
                unit.grad_shard.clamp_(-limit, limit)

    def place_of(self, params: Iterable[torch.Tensor]) -> dict[int, set[int]] | None:
        """Return which parameters of which units are meant; None if all that are trainable."""
        wanted: dict[int, set[int]] = {}
        for param in params:
            place = self._place.get(id(param))
            if place is not None and place[0].trainable:
                wanted.setdefault(id(place[0]), set()).add(place[1])
        everything = all(len(wanted.get(id(unit), ())) == len(unit.params) for unit in self._units if unit.trainable)
        return None if everything else wanted
