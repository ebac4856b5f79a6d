"""The user's own optimizer, stepping flat shards.

Its parameter groups keep their hyper-parameters and get new parameters: for each unit the contiguous ranges of this
rank's shard that belong to the group. So a step is a few fused calls on long flat tensors, learning-rate schedulers go
on working, and the optimizer's states are sharded because its parameters are.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

import torch

from distui.core.errors import UserError
from distui.core.sharding.cuts import Cuts
from distui.core.sharding.homes.homes import Homes
from distui.core.sharding.homes.step import UnitStream
from distui.core.sharding.optim.elementwise import Sight, sight_of
from distui.core.sharding.optim.flat_adam import FlatAdam
from distui.core.sharding.optim.groups import Places, of_nobody, refuse_changed_groups, refuse_cut
from distui.core.sharding.optim.growth import add_group, late_runs
from distui.core.sharding.optim.matrices import WholeMatrices
from distui.core.sharding.optim.norms import check_whole_gradients, gradient_norm
from distui.core.sharding.optim.onebit_adam import OneBitAdam
from distui.core.sharding.optim.prepared import PreparedOptimizer, prefer_fused, unfused_momentum
from distui.core.sharding.optim.runs import (
    FlatRun,
    alike_in_numbers,
    carry_states,
    flat_runs,
    piece_of_state,
    split_run,
    whole_run,
)
from distui.core.sharding.optim.states_seen import StatesSeen
from distui.core.sharding.optim.whole_states import load_whole, whole_state_dict
from distui.core.sharding.schedule import Schedule
from distui.core.sharding.transport.transport import Transport
from distui.core.sharding.units.unit import Unit


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
        cuts: Cuts | None = None,
    ) -> None:
        """`siblings` are the optimizers of the same model; this one joins them."""
        super().__init__(inner)
        self._schedule, self.units, self.transport, self.cuts = schedule, units, transport, cuts
        self.onebit: OneBitAdam | None = None
        """Steps in the place of the inner optimizer once its variance is frozen (compression.gradients=onebit)."""
        self.runs: list[list[FlatRun]] = []
        self.given: list[list[Any]] = []
        """The parameters of each group, as the script gave them; `given` and `runs` belong together."""
        self.place = {id(param): (unit, index) for unit in units for index, param in enumerate(unit.params)}
        self._homes = homes
        self.own: dict[int, set[int]] = {}
        """Which parameters of which units are in this optimizer."""
        self.follow_requires_grad: Callable[[], None] = lambda: None
        """Takes into units what the script has unfrozen since."""
        self.matrices: WholeMatrices | None = None
        """What is stepped whole by the rank that owns it."""
        self._rebind()
        with self._runs_in_groups():
            self.stream = UnitStream(inner, self.runs, homes) if homes is not None else None
            """Steps unit by unit, where states have other homes than the device."""
            self.flat = FlatAdam.of(inner, self.runs, state_bits) if homes is None else None
            """Steps in the place of the inner optimizer, where a kernel does."""
        siblings.append(self)
        self.siblings = siblings

    # ---- what the engine asks for --------------------------------------------------------------------------------

    def finish_gradients(self) -> None:
        """Return when the gradients of the step are reduced. Collective."""
        self._schedule.finish_gradients()

    def discard_gradients(self, set_to_none: bool) -> None:
        """Forget the gradients: no memory is written, but for units of which another or no optimizer has a part."""
        self._schedule.discard_gradients(None if self._has_all else self.own, keep_zeros=not set_to_none)

    @property
    def _has_all(self) -> bool:
        return all(len(self.own.get(id(unit), ())) == len(unit.params) for unit in self.units if unit.trainable)

    def apply(self, factor: float) -> None:
        """Step the shards, then start to bring the weights to all ranks. Collective: all ranks."""
        # What is still being gathered reads the shards that the step writes.
        self._schedule.take_writes()
        check_whole_gradients(self, self._schedule.num_steps)
        self.split_runs(lambda run: run.present)  # what has no gradient is not stepped
        with self._runs_in_groups():
            self._step(factor)
        self._schedule.publish(self.own, refresh=self.stream is None)
        self._schedule.num_steps += 1
        if self.onebit is not None:
            self.onebit.follow()

    def _step(self, factor: float) -> None:
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
            if self.matrices is not None:
                self.matrices.collect()
            groups = self.inner.param_groups
            try:
                # A rank may have nothing of a small group, of which some optimizers make nothing.
                self.inner.param_groups = [group for group in groups if group["params"]]
                if self.inner.param_groups:
                    with unfused_momentum(self.inner):
                        self.inner.step()
            finally:
                self.inner.param_groups = groups
            if self.matrices is not None:
                self.matrices.hand_back()
            self._drop_gradients()

    @contextlib.contextmanager
    def _runs_in_groups(self) -> Iterator[None]:
        """Let the inner optimizer's groups hold what it steps; at other times a script finds there what it gave."""
        refuse_changed_groups(self.inner, self.given)
        for group, runs in zip(self.inner.param_groups, self.runs, strict=True):
            group["params"] = [run.param for run in runs]
        try:
            yield
        finally:
            for group, params in zip(self.inner.param_groups, self.given, strict=True):
                group["params"] = list(params)

    @property
    def state(self) -> Any:
        """The inner optimizer's states: by what it steps, and by the model's parameters where a rank has them whole."""
        return StatesSeen(self)

    @state.setter
    def state(self, state: Any) -> None:
        self.inner.state = state

    def state_dict(self) -> dict[str, Any]:
        """Return the states as plain torch does, whole and in the parameters' shapes.

        Collective from stage 1 on: all ranks, each of which then holds all of it on the CPU; `save_state` does not.
        """
        return whole_state_dict(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what `state_dict` returned at any stage, or a plain optimizer's, each rank its part of it."""
        with self._runs_in_groups():
            load_whole(self, state_dict)
        if self.stream is not None:
            self.stream.forget()
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
        sharded = any(unit.placement.shards_optimizer for unit in self.units)
        self._refuse(sights, sharded)
        if self.cuts is not None:
            refuse_cut(self.inner, sights, self.cuts)
        states = dict(self.inner.state)
        groups_params = [list(group["params"]) for group in self.inner.param_groups]
        self.inner.state.clear()
        groups_places = [self.places_of(params) for params in groups_params]
        owned = self._take_matrices(groups_places, sights) if sharded else {}
        for group, params, places, sight in zip(
            self.inner.param_groups, groups_params, groups_places, sights, strict=True
        ):
            prefer_fused(group)
            if sight.flat:
                runs = [
                    run for alike in alike_in_numbers(places, states).values() for run in flat_runs(alike, self._homes)
                ]
            elif sharded:
                runs = [owned[id(unit), index] for unit, index in places if (id(unit), index) in owned]
            else:  # replicated states: whole matrices can be given as they are
                runs = [whole_run(unit, index, self._homes) for unit, index in places]
            self.runs.append(runs)
            carry_states(self.inner, self.place, states, params, runs)
        self.given = groups_params

    def take_in(self, units: list[Unit]) -> None:
        """Step parameters of this optimizer that were frozen when it was prepared; `units` hold them now."""
        for unit in units:
            self.place.update({id(param): (unit, index) for index, param in enumerate(unit.params)})
        for position, (group, params) in enumerate(zip(self.inner.param_groups, self.given, strict=True)):
            mine = [self.place[id(param)] for param in params if id(param) in self.place]
            places = [(unit, index) for unit, index in mine if any(unit is other for other in units)]
            self.runs[position] += late_runs(self, group, places, "unfrozen")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Step more parameters of the model from the next step on. All ranks, alike."""
        self.follow_requires_grad()
        add_group(self, param_group)

    def split_runs(self, alike: Callable[[FlatRun], Sequence[Hashable]]) -> None:
        """Cut runs into parameters that are `alike`, each with its piece of the states and its own count of steps."""
        for runs in self.runs:
            parts: list[FlatRun] = []
            for run in runs:
                pieces = split_run(run, alike(run))
                if len(pieces) > 1:
                    state = self.inner.state.pop(run.param, {})
                    if self.flat is not None:
                        state = self.flat.full_state_of(state)
                    for piece in pieces if state else ():
                        self.inner.state[piece.param] = piece_of_state(run, piece, state)
                    if self.stream is not None:
                        self.stream.split(run, pieces)
                parts += pieces
            runs[:] = parts

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

    def places_of(self, params: list[Any]) -> list[tuple[Unit, int]]:
        places = []
        for param in params:
            if id(param) not in self.place or not self.place[id(param)][0].trainable:
                if not param.requires_grad or not param.numel():  # frozen, or another pipeline stage's
                    continue
                raise UserError(
                    "the optimizer has a parameter that the model does not have",
                    f"a tensor of shape {tuple(param.shape)} in one of its groups",
                    "build the optimizer from model.parameters() of the model that is prepared with it",
                )
            unit, index = self.place[id(param)]
            self.own.setdefault(id(unit), set()).add(index)
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
        assert self.transport is not None
        self.matrices = WholeMatrices(wanted, self.transport)
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
            for matrix in self.matrices.matrices
            if matrix.owner == self.transport.rank
        }

    def _gradients(self, place: Places | None = None, of: Places | None = None) -> Iterator[torch.Tensor]:
        """Yield this rank's shards of gradients at `place` that it steps, or `of` others; what is written stays."""
        for unit in self.units:
            own = (self.own if of is None else of).get(id(unit), set())
            own = own if place is None else own & place.get(id(unit), set())
            if not own or not unit.has_gradient:
                continue
            with unit.gradient(writes=True) as shard:
                if len(own) == len(unit.params):
                    yield shard
                else:
                    yield from (shard[start:end] for start, end in unit.layout.runs(own, unit.rank))

    def _set_gradients(self, factor: float) -> None:
        if factor != 1.0:
            for grad in self._gradients():
                grad.mul_(factor)
        for runs in self.runs:
            for run in runs:
                if run.is_owned or not run.has_gradient:
                    continue
                assert run.unit.grad_shard is not None
                grad = run.unit.grad_shard[run.start : run.end].view(run.param.shape)
                run.param.grad = grad if grad.dtype == run.param.dtype else grad.to(run.param.dtype)

    def _drop_gradients(self) -> None:
        # A converted gradient would stay as long as the parameter, and one that was forgotten would be stepped again.
        for runs in self.runs:
            for run in runs:
                run.param.grad = None

    def grad_norm(self, units_and_indices: Places | None, norm_type: float) -> torch.Tensor:
        """Return the norm of all gradients over all shards, times the factor of the next step.

        Collective: all ranks (one number travels). Shapes: a scalar, on the shards' device.
        """
        self._schedule.finish_gradients()
        return gradient_norm(self, units_and_indices, norm_type)

    def scale_gradients(self, factor: float, units_and_indices: Places | None) -> None:
        """Multiply gradients by `factor`: all of them at the next step, in one pass with it, or some of them now."""
        if units_and_indices is None:
            self.grad_factor *= factor
            if self._schedule.is_seen:
                self.settle_factor()
            units_and_indices = of_nobody(self)
        for grad in self._gradients(of=units_and_indices):
            grad.mul_(factor)
        self._schedule.show_again()

    def settle_factor(self) -> None:
        """Multiply what the next step would into the gradients now, for whoever looks at them."""
        self._schedule.finish_gradients()
        factor, self.grad_factor = self.grad_factor, 1.0
        if factor != 1.0:
            for grad in self._gradients():
                grad.mul_(factor)
            self._schedule.show_again()

    def settle_clipping(self) -> None:
        """Apply a clipping that waits for the step now: what comes to the gradients next is not clipped by it."""
        self.grad_factor, self.loss_scale = self.grad_factor * self.loss_scale, 1.0
        if self.grad_factor != 1.0:
            self.settle_factor()

    def clamp_gradients(self, limit: float, place: Places | None = None) -> None:
        """Clamp every gradient element at `place` (None: all) to [-limit, limit]."""
        self.settle_factor()
        if self.onebit is not None and self.onebit.frozen:  # a rank has its own gradient only, divided by the ranks
            limit *= self.units[0].inverse_ranks
        for grad in itertools.chain(self._gradients(place), self._gradients(place, of_nobody(self))):
            grad.clamp_(-limit, limit)
        self._schedule.show_again()

    def place_of(self, params: Iterable[torch.Tensor]) -> Places | None:
        """Return which parameters of which units are meant; None if all that are trainable."""
        wanted: dict[int, set[int]] = {}
        for param in params:
            place = self.place.get(id(param))
            if place is not None and place[0].trainable:
                wanted.setdefault(id(place[0]), set()).add(place[1])
        everything = all(len(wanted.get(id(unit), ())) == len(unit.params) for unit in self.units if unit.trainable)
        return None if everything else wanted
