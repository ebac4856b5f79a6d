"""The user's own optimizer, stepping flat shards.

Its parameter groups keep their hyper-parameters and get new parameters: for each unit the contiguous ranges of this
rank's shard that belong to the group. So a step is a few fused calls on long flat tensors, learning-rate schedulers go
on working, and the optimizer's states are sharded because its parameters are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from distui.core.backends.optimizer import PreparedOptimizer, prefer_fused
from distui.core.errors import UserError
from distui.core.offload.homes import Homes
from distui.core.offload.step import UnitStream
from distui.core.sharding.elementwise import Sight, sight_of
from distui.core.sharding.flat_adam import FlatAdam, why_not_flat
from distui.core.sharding.matrices import WholeMatrices
from distui.core.sharding.onebit_adam import OneBitAdam
from distui.core.sharding.runs import FlatRun, flat_runs, whole_run
from distui.core.sharding.schedule import Schedule
from distui.core.sharding.transport import Transport
from distui.core.sharding.unit import Unit
from distui.kernels.l2_norm import l2_norm


class ShardedOptimizer(PreparedOptimizer):
    """What `engine.prepare(optimizer)` returns: steps the flat shards, then brings the weights to all ranks."""

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        schedule: Schedule,
        units: list[Unit],
        transport: Transport | None,
        siblings: list[PreparedOptimizer],
        state_bits: int = 32,
        homes: Homes | None = None,
    ) -> None:
        """`siblings` are the optimizers of the same model; this one joins them."""
        super().__init__(inner)
        self._schedule, self._units, self._transport = schedule, units, transport
        self.onebit: OneBitAdam | None = None
        """Steps in the place of the inner optimizer once its variance is frozen (compression.gradients=onebit)."""
        self.runs: list[list[FlatRun]] = []
        self._place = {id(param): (unit, index) for unit in units for index, param in enumerate(unit.params)}
        self._homes = homes
        self._own: dict[int, set[int]] = {}
        """Which parameters of which units are in this optimizer."""
        self._matrices: WholeMatrices | None = None
        self._rebind()
        self.stream = UnitStream(inner, self.runs, homes) if homes is not None else None
        """Steps unit by unit, where states have other homes than the device."""
        self.flat = self._flat(state_bits) if homes is None else None
        """Steps in the place of the inner optimizer, where a kernel does."""
        siblings.append(self)
        self.siblings = siblings

    # ---- what the engine asks for --------------------------------------------------------------------------------

    def finish_gradients(self) -> None:
        """Return when the gradients of the step are reduced. Collective."""
        self._schedule.finish_gradients()

    def discard_gradients(self, set_to_none: bool) -> None:
        """Forget the gradients: no memory is written, but for units that are stepped by several optimizers."""
        self._schedule.discard_gradients(self._own if len(self.siblings) > 1 else None)

    def apply(self, factor: float) -> None:
        """Step the shards, then start to bring the weights to all ranks. Collective: all ranks."""
        # What is still being gathered reads the shards that the step writes.
        self._schedule.finish_gathers()
        if self.stream is not None:
            self.stream.step(factor)
        elif self.onebit is not None and self.onebit.frozen:
            self._set_gradients(factor)
            if next(self._gradients(), None) is not None:
                self.onebit.step()
        elif self.flat is not None:
            self.flat.step(factor)
        else:
            self._set_gradients(factor)
            if self._matrices is not None:
                self._matrices.collect()
            self.inner.step()
            if self._matrices is not None:
                self._matrices.hand_back()
            self._drop_gradients()
        self._schedule.publish(self._own, refresh=self.stream is None)
        if self.onebit is not None:
            self.onebit.follow()

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's part of the states, for the same number of ranks; `save_state` writes what reshards."""
        if self.flat is not None:
            return self.flat.state_dict()
        if self.stream is None:
            return self.inner.state_dict()
        with self.stream.states_in_memory():
            found = self.inner.state_dict()
            # The optimizer's own dicts are in it, which lose again what is in memory only here.
            return {**found, "state": {key: dict(state) for key, state in found["state"].items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` of this rank returned."""
        self.inner.load_state_dict(state_dict)
        if self.flat is not None:
            self.flat.narrow()
        if self.onebit is not None:
            self.onebit.load_state_dict(None)
        if self.stream is not None:
            self.stream.stash()

    def state_of(self, run: FlatRun) -> dict[str, Any]:
        """Return a run's state as torch's optimizer has it, to be saved or, if it is not in 8 bits, loaded into.

        What is not in memory is there as the range of the cell in which it rests.
        """
        if self.flat is not None:
            return self.flat.full_state(run)
        state: dict[str, Any] = self.inner.state.get(run.param, {})
        return state | self.stream.states_of(run) if self.stream is not None else state

    def make_state(self, run: FlatRun, key: str, size: torch.Size, dtype: torch.dtype) -> None:
        """Make room for a state that a checkpoint has and the optimizer, not having stepped, lacks."""
        state = self.inner.state[run.param]
        if key in state or (self.stream is not None and key in self.stream.states_of(run)):
            return
        if self.stream is None or size != run.shape or not self.stream.make_state(run, key, dtype):
            # A number is on the CPU, where torch's optimizers keep it unless told otherwise.
            state[key] = torch.zeros(size, dtype=dtype, device=run.param.device if size else None)

    # ---- shards --------------------------------------------------------------------------------------------------

    def _rebind(self) -> None:
        sights = [sight_of(self.inner, group) for group in self.inner.param_groups]
        sharded = bool(self._units) and self._units[0].placement.shards_optimizer
        self._refuse(sights, sharded)
        states = dict(self.inner.state)
        groups_params = [list(group["params"]) for group in self.inner.param_groups]
        self.inner.state.clear()
        groups_places = [self._places(params) for params in groups_params]
        owned = self._take_matrices(groups_places, sights) if sharded else {}
        for group, params, places, sight in zip(
            self.inner.param_groups, groups_params, groups_places, sights, strict=True
        ):
            prefer_fused(group)
            if sight.flat:
                runs = flat_runs(places, self._homes)
            elif sharded:
                runs = [owned[id(unit), index] for unit, index in places if (id(unit), index) in owned]
            else:  # replicated states: whole matrices can be given as they are
                runs = [whole_run(unit, index, self._homes) for unit, index in places]
            self.runs.append(runs)
            group["params"] = [run.param for run in runs]
            self._carry_states(states, params, runs)

    def _refuse(self, sights: list[Sight], sharded: bool) -> None:
        for sight in sights:
            reason = sight.why_never or (sight.why_not_whole if sharded else "")
            if reason:
                fix = "use an element-wise optimizer such as torch.optim.AdamW(fused=True), or torch.optim.Muon"
                raise UserError(
                    f"the optimizer {type(self.inner).__name__} cannot step sharded parameters",
                    "; ".join(part for part in (sight.why_not_flat, reason) if part),
                    fix if sight.why_never else f"use strategy.zero_stage=0, or {fix.removeprefix('use ')}",
                )

    def _places(self, params: list[Any]) -> list[tuple[Unit, int]]:
        places = []
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
            self._own.setdefault(id(unit), set()).add(index)
            places.append((unit, index))
        return places

    def _take_matrices(
        self, groups_places: list[list[tuple[Unit, int]]], sights: list[Sight]
    ) -> dict[tuple[int, int], FlatRun]:
        """Give every matrix an owner; returns what this rank owns, by unit and index."""
        wanted = [
            place for places, sight in zip(groups_places, sights, strict=True) if not sight.flat for place in places
        ]
        if not wanted:
            return {}
        if self._homes is not None:
            raise UserError(
                f"the optimizer {type(self.inner).__name__} with offload on several ranks",
                f"{len(wanted)} parameters are stepped as whole matrices, which are collected on the device",
                "set offload.optimizer and offload.params to none, or use an element-wise optimizer such as AdamW",
            )
        assert self._transport is not None
        self._matrices = WholeMatrices(wanted, self._transport)
        return {
            (id(matrix.unit), matrix.index): FlatRun(
                matrix.unit,
                (matrix.index,),
                0,
                matrix.unit.layout.spans[matrix.index].numel,
                matrix.param,
                matrix.unit.layout.spans[matrix.index].shape,
                is_owned=True,
            )
            for matrix in self._matrices.matrices
            if matrix.owner == self._transport.rank
        }

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
            is_whole = run.is_owned or len(run.shape) != 1
            for key, value in (present[0] or {}).items():
                if not (isinstance(value, torch.Tensor) and value.dim()) or is_whole:
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
                flat_state[key] = flat.view(run.shape)
            self.inner.state[run.param] = flat_state

    def _indices(self, params: list[Any], unit: Unit) -> Iterable[tuple[Any, int]]:
        for param in params:
            place = self._place.get(id(param))
            if place is not None and place[0] is unit:
                yield param, place[1]

    def _gradients(self) -> Iterator[torch.Tensor]:
        """Yield this rank's shards of the gradients that the optimizer steps; what is written to them stays."""
        for unit in self._units:
            own = self._own.get(id(unit))
            if not own or not unit.has_gradient:
                continue
            with unit.gradient(writes=True) as shard:
                if len(self.siblings) == 1:
                    yield shard
                else:
                    yield from (shard[start:end] for start, end in unit.layout.runs(own, unit.rank))

    def _set_gradients(self, factor: float) -> None:
        if factor != 1.0:
            for grad in self._gradients():
                grad.mul_(factor)
        for runs in self.runs:
            for run in runs:
                if run.is_owned or not run.unit.has_gradient:
                    continue
                assert run.unit.grad_shard is not None
                grad = run.unit.grad_shard[run.start : run.end].view(run.param.shape)
                run.param.grad = grad if grad.dtype == run.param.dtype else grad.to(run.param.dtype)

    def _drop_gradients(self) -> None:
        # A converted gradient would stay as long as the parameter, and one that was forgotten would be stepped again.
        for runs in self.runs:
            for run in runs:
                run.param.grad = None

    def grad_norm(self, units_and_indices: dict[int, set[int]] | None, norm_type: float) -> torch.Tensor:
        """Return the norm of all gradients over all shards, times the factor of the next step.

        Collective: all ranks (one number travels). Shapes: a scalar, on the shards' device.
        """
        self._schedule.finish_gradients()
        parts = []
        for unit in self._units:
            if not unit.trainable or not unit.has_gradient:
                continue
            if units_and_indices is None and norm_type == 2.0 and unit.stored_norm is not None:
                parts.append(unit.stored_norm)
                continue
            ranges = [(0, unit.layout.shard_numel)]
            if units_and_indices is not None:
                ranges = unit.layout.runs(units_and_indices.get(id(unit), ()), unit.rank)
            if not ranges:
                continue
            with unit.gradient() as grad:
                pieces = [grad[start:end] for start, end in ranges]
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
            runs = unit.layout.runs(units_and_indices.get(id(unit), ()), unit.rank) if unit.trainable else []
            if runs:
                with unit.gradient(writes=True) as grad:
                    for start, end in runs:
                        grad[start:end].mul_(factor)

    def clamp_gradients(self, limit: float) -> None:
        """Clamp every gradient element to [-limit, limit]."""
        self._schedule.finish_gradients()
        factor, self.grad_factor = self.grad_factor, 1.0
        if self.onebit is not None and self.onebit.frozen:  # a rank has its own gradient only, divided by the ranks
            limit *= self._units[0].inverse_ranks
        for grad in self._gradients():
            if factor != 1.0:
                grad.mul_(factor)
            grad.clamp_(-limit, limit)

    def place_of(self, params: Iterable[torch.Tensor]) -> dict[int, set[int]] | None:
        """Return which parameters of which units are meant; None if all that are trainable."""
        wanted: dict[int, set[int]] = {}
        for param in params:
            place = self._place.get(id(param))
            if place is not None and place[0].trainable:
                wanted.setdefault(id(place[0]), set()).add(place[1])
        everything = all(len(wanted.get(id(unit), ())) == len(unit.params) for unit in self._units if unit.trainable)
        return None if everything else wanted
