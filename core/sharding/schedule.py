"""When gradients are reduced and parameters gathered: module and gradient hooks around the user's own code.

All ranks must issue the same collectives in the same order, whatever the control flow of one rank.

    stages 0 to 2   reductions follow one fixed order (last unit first): a unit whose gradients are complete waits for
                    those before it. Gathers after a step are started by all ranks in one order, and waited for alone
    stage 3         reductions as above, but for a sum a rank waits only when every rank has begun it; what is gathered
                    next is agreed on (`residence`)

At the end of a backward that reduces, ranks agree which parameters have a gradient at all. One that has none on any
rank is None for the optimizer, as in plain torch; one that others have counts as zero where it did not come.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from distui.core.ranks import streams
from distui.core.sharding.hooks import Hook
from distui.core.sharding.refusals import refuse_tracing
from distui.core.sharding.residence import Residence
from distui.core.sharding.shown_gradients import ShownGradients
from distui.core.sharding.transport.agreement import Agreement, Place
from distui.core.sharding.units.block import Block
from distui.core.sharding.units.guarded import GRAD
from distui.core.sharding.units.states import GradState
from distui.core.sharding.units.unit import Unit


class Schedule(ShownGradients):
    """The hooks of one model, and the order of its collectives."""

    def __init__(
        self, model: nn.Module, groups: list[list[Unit]], stage: int, agreement: Agreement | None, zero_missing: bool
    ) -> None:
        """`groups` are units of the same modules; with `zero_missing` a gradient that did not come counts as zero."""
        self.model = model
        self.units = [unit for units in groups for unit in units]
        self.stage = stage
        self.reduces_each_backward = stage >= 2
        self.sync = True
        """Whether the running backward is the last before the step; set by accumulate and no_sync."""
        self._agreement, self._zero_missing = agreement, zero_missing
        self._line = streams.line_of(self.units[0].device, self._keep_small) if self.units else None
        """On a GPU: autograd calls hooks in the streams of the forward, and a script may make any stream current."""
        self.order: list[Unit] = []
        self._next, self._open, self.num_steps = 0, False, 0
        """How often optimizers of this model have stepped: ranks whose backward passes meet have the same."""
        self.before_gradients: Callable[[], None] = lambda: None
        """Called before the first gradient of a backward is added to what there is."""
        # Whether gradients are zero rather than None, and whether no backward has said so since.
        self._has_zeros = self._owes_zeros = self._keeps_local = False
        """Stages 0 and 1: the last backward ran without `sync`; a step or a clipping has them reduced first."""
        self._handles: list[Any] = []
        self._grad_hooks: dict[int, dict[int, Any]] = {}
        """Handles of the hooks on gradients, by unit and parameter."""
        self.residence: Residence | None = None
        self.waits_late = False
        """Whether a rank that waits for a sum in the midst of a backward may keep others waiting, for tokens."""
        if stage >= 3 and self.units:  # a loss that was prepared as a model has nothing to gather
            # Experts that one rank alone has are whole on it.
            groups = [own for units in groups if (own := [unit for unit in units if unit.placement.shards_parameters])]
            pool = self.units[0].pool
            self.residence = Residence(groups, agreement, pool, self._which_were_sent, self._finish_sent, self._line)
        self._register(groups)

    # ---- hooks ---------------------------------------------------------------------------------------------------

    def _register(self, groups: list[list[Unit]]) -> None:
        self.watch_gradients()
        for group, units in enumerate(groups):
            for module in units[0].modules:
                if self.residence is not None:
                    self._enter_with(Block(module, group, units), module)
                elif self.stage > 0:
                    before = Hook(lambda module, args, units=units: self._finish_gathers(units))
                    self._handles.append(module.register_forward_pre_hook(before, prepend=True))
        self._handles.append(self.model.register_forward_pre_hook(Hook(self.before_model), prepend=True))
        if self.residence is not None:
            after = Hook(lambda module, args, output: self.after_model())
            self._handles.append(self.model.register_forward_hook(after))

    def _enter_with(self, block: Block, module: nn.Module) -> None:
        enter, leave = self.residence.enter, self.residence.leave  # type: ignore[union-attr]
        before = Hook(lambda module, args: enter(block))
        after = Hook(lambda module, args, output: leave(block))
        self._handles.append(module.register_forward_pre_hook(before, prepend=True))
        self._handles.append(module.register_forward_hook(after, always_call=True))

    def before_model(self, module: nn.Module, args: Any) -> None:
        """Bring what is not in blocks here."""
        if self.residence is not None:
            self.residence.hold_roots()
        else:
            self._finish_gathers([unit for unit in self.units if unit.is_root])

    def after_model(self) -> None:
        """Stage 3: serve other ranks until they, too, are through."""
        if self.residence is not None and not self.residence.all_whole:
            self.residence.serve(Place.FORWARD_END)

    def _finish_gathers(self, units: list[Unit]) -> None:
        if self.stage > 0:
            refuse_tracing()
        for unit in units:
            unit.finish_gather()

    def watch_gradients(self) -> None:
        """Have the gradients of every unit that is trainable by now told of; the order follows."""
        self.order = [unit for unit in reversed(self.units) if unit.trainable]
        for unit in self.order:
            if self.stage == 0:
                unit.show_gradient = self._gradient_reader(unit)
            if id(unit) not in self._grad_hooks:
                self._hook_all(unit)

    def remove(self) -> None:
        """Take all hooks off the model."""
        for hooks in self._grad_hooks.values():
            self._handles += hooks.values()
        self._grad_hooks.clear()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook_all(self, unit: Unit) -> None:
        hooks = self._grad_hooks.setdefault(id(unit), {})
        for index, param in enumerate(unit.params):
            if index not in hooks and param.requires_grad:
                hooks[index] = torch.Tensor.register_post_accumulate_grad_hook(param, self._grad_hook(unit, index))
        unit.collected, unit.came_last = (), None

    def expect_gradients(self) -> None:
        """Before a backward: count with the parameters that are trainable now."""
        for unit in self.order:
            if unit.expect():
                self._hook_all(unit)

    def _thin_hooks(self) -> None:
        # A Python call for each of many small parameters costs more than its gradient's copy. So once it is known
        # whose gradient comes last in a unit, that one tells for the small ones.
        # On a device with streams each gradient tells for itself, since only its own hook runs in its stream.
        for unit in self.order if self._line is None else ():
            if not unit.collected and unit.came_last is not None:
                unit.choose_collected()
                hooks = self._grad_hooks[id(unit)]
                for index in unit.collected:
                    if index in hooks:
                        hooks.pop(index).remove()

    def _grad_hook(self, unit: Unit, index: int) -> Callable[[torch.Tensor], None]:
        # Weakly: the garbage collector does not see what a parameter's hook holds, and would never free the engine.
        schedule_of, unit_of = weakref.ref(self), weakref.ref(unit)

        def hook(param: torch.Tensor) -> None:
            with torch._C.DisableTorchFunctionSubclass():
                grad = GRAD.__get__(param)
                GRAD.__set__(param, None)
            self, unit = schedule_of(), unit_of()
            if grad is None or self is None or unit is None:
                return
            if self._line is not None:
                self._line.join()
            if not self._open:
                self.open()
            if self._shown and unit.grad_full is not None and grad is unit.views(unit.grad_full)[index]:
                raise RuntimeError(
                    f"a second backward without engine.backward(loss) added to the reduced gradient of "
                    f"{unit.param_names[index]}; call engine.backward(loss) instead of loss.backward()"
                )
            if self._waits_by_agreement:
                self._make_room(unit)
            complete = unit.accept(index, grad)
            if complete and (self.sync or self.reduces_each_backward):
                unit.gradients.do("complete")
                self._launch_ready()

        return hook

    # ---- reductions ----------------------------------------------------------------------------------------------

    def _launch_ready(self) -> None:
        while self._next < len(self.order):
            unit = self.order[self._next]
            if unit.gradients.state is not GradState.READY:
                return
            unit.reduce(self.sync)
            self._next += 1
            if self._next >= 2 and self.stage >= 1 and not self._waits_by_agreement:
                # Two gradients in flight: the one that fills and the one that travels.
                for before in self.order[0 if self.waits_late else self._next - 2 : self._next - 1]:
                    before.finish_reduce(only_done=self.waits_late)

    def _keep_small(self) -> None:
        for unit in self.order:
            unit.keep_small()

    @property
    def _waits_by_agreement(self) -> bool:
        """Stage 3: a rank that waited for a sum here might keep others waiting for parameters, who lack its part."""
        return self.residence is not None and self._agreement is not None

    def _make_room(self, unit: Unit) -> None:
        """Stage 3: before a third gradient buffer is taken, free one that travels, if all ranks have begun its sum."""
        travelling = [other for other in self.order if other.gradients.state is GradState.REDUCING]
        if unit in travelling or (unit.grad_full is None and len(travelling) >= 2):
            self.residence.meet()  # type: ignore[union-attr]

    def _which_were_sent(self) -> list[bool]:
        """Stage 3: of each unit, whether this rank has begun its gradients' sum."""
        return [unit.was_sent for unit in self.units]  # frozen ones too: a rank unfreezes them before another

    def _finish_sent(self, indices: list[int]) -> None:
        """Stage 3: wait for sums that every rank has begun, so that their buffers are free again."""
        for index in indices:
            unit = self.units[index]
            if unit.gradients.state is GradState.REDUCING:
                unit.finish_reduce()

    def end_backward(self) -> None:
        """Finish a backward: units that are not complete take zeros for what is missing. Collective: all ranks.

        Whoever runs the backward calls it; `finish_gradients` does where nobody did.
        """
        if self._line is not None:
            self._line.join()
        if not (self._shown or self._only_assigned):
            for unit in self.order:
                if unit.collect():
                    self._open = True
                    if unit.is_complete:  # right, but reduced later than it could: learn anew whose comes last
                        self._hook_all(unit)
        if not self._open:
            return
        self._thin_hooks()
        if self.sync or self.reduces_each_backward:
            self._reduce_rest()
        else:
            for unit in self.order:
                unit.next_micro_batch()
            self._keeps_local = True
        self._open = False

    def _reduce_rest(self) -> None:
        self._keeps_local = False
        if self.residence is not None:
            self.residence.serve(Place.BACKWARD_END)
        for unit in self.order:
            if not unit.was_sent:
                # A backward before this one, in the same step, may have reduced it (stages 0 and 1).
                unit.finish_reduce()
                unit.reopen()
                unit.complete()
        self._launch_ready()
        for unit in self._agree_on_gradients():
            unit.finish_reduce()
            unit.reopen()
            unit.complete()
            unit.reduce(self.sync)
        for unit in self.order:
            if self.reduces_each_backward:
                unit.finish_reduce()
            unit.was_sent = False
        self._next = 0

    def _agree_on_gradients(self) -> list[Unit]:
        """Take over which parameters have a gradient on any rank; return the units that some rank must reduce again.

        Those have been filled once more since: by a second backward inside this one, a reentrant checkpoint's.
        """
        flags = bytearray(unit.is_filled_again for unit in self.order)
        self._owes_zeros = False
        for unit in self.order:
            flags += bytearray(map(max, unit.present, unit.zeroed)) if self._has_zeros else unit.present
        filled, found = self._on_any_rank(flags)
        for unit, present in zip(self.order, found, strict=True):
            unit.present = bytearray(param.requires_grad for param in unit.params) if self._zero_missing else present
        return [unit for unit, again in zip(self.order, filled, strict=True) if again]

    def _on_any_rank(self, flags: bytearray) -> tuple[bytearray, list[bytearray]]:
        """Return which of `flags`, a unit's each and then a parameter's each, some rank has. Collective: all ranks."""
        if self._agreement is not None:
            flags = self._agreement.union(flags, self.num_steps)
        ends = list(itertools.accumulate((len(unit.params) for unit in self.order), initial=len(self.order)))
        return flags[: ends[0]], [flags[start:end] for start, end in itertools.pairwise(ends)]

    def weigh(self, factor: float) -> None:
        """Multiply by `factor` what arrives from now on."""
        for unit in self.order:
            unit.share = unit.inverse_ranks * factor

    def reduce_kept(self) -> None:
        """Reduce what backward passes without `sync` have kept on this rank (stages 0 and 1). Collective."""
        self.end_backward()
        if not self.reduces_each_backward:
            before, self.sync = self.sync, True
            self.open()
            self.end_backward()
            self.sync = before

    def finish_gradients(self) -> None:
        """Wait until every unit's gradient is summed over the ranks. Collective: all ranks."""
        self.end_backward()
        if self._keeps_local and self.sync:
            self.reduce_kept()
        for unit in self.order:
            unit.finish_gradient()
        if self._owes_zeros:
            self._step_zeros()
        if self._shown or self.is_seen:
            self._take_shown()

    def _step_zeros(self) -> None:
        """Have gradients that are zero, and that no backward has brought since, stepped as they are."""
        self._owes_zeros = False
        if self.residence is not None:
            self.residence.serve(Place.BACKWARD_END)
        _, found = self._on_any_rank(bytearray(len(self.order)) + bytearray().join(unit.zeroed for unit in self.order))
        for unit, indices in zip(self.order, found, strict=True):
            unit.hold_zeros(indices)

    def open(self) -> None:
        """Before a backward of which it is known that it is this model's, whatever of it gets a gradient here."""
        self.before_gradients()
        self._open = True
        self.expect_gradients()

    def discard_gradients(self, own: dict[int, set[int]] | None = None, keep_zeros: bool = False) -> None:
        """Forget all gradients, also those of a backward that an exception cut off.

        `own` are the parameters of one of several optimizers, by unit: after a whole backward only theirs go. With
        `keep_zeros` those that there were are zero from now on, and stepped, as after `zero_grad(set_to_none=False)`.
        """
        self._keep_zeros(own, keep_zeros)
        if own is not None and not self._open:
            for unit in self.order:
                if indices := own.get(id(unit)):
                    unit.forget(indices)
                    if self.stage == 0:
                        for index in indices:
                            GRAD.__set__(unit.params[index], None)
            return
        if self.residence is not None:
            self.residence.end_round()
        self._shown = self._assigned = False
        for unit in self.order:
            for param in unit.params if self.stage == 0 else ():
                GRAD.__set__(param, None)
            unit.discard_gradient()
        self._next = 0
        self._open = self._keeps_local = False

    def _keep_zeros(self, own: dict[int, set[int]] | None, keep_zeros: bool) -> None:
        if not (keep_zeros or self._has_zeros):
            return
        for unit in self.order:
            for index in range(len(unit.params)) if own is None else own.get(id(unit), ()):
                unit.zeroed[index] = keep_zeros and (unit.zeroed[index] or unit.present[index])
        # What another optimizer forgets takes nothing from those that this one is still to step.
        self._owes_zeros = keep_zeros or (self._owes_zeros and own is not None)
        self._has_zeros = keep_zeros or any(any(unit.zeroed) for unit in self.order)

    # ---- parameters ----------------------------------------------------------------------------------------------

    def take_writes(self) -> None:
        """Before a step: take what the script wrote to parameters into what is stepped. Collective: all ranks."""
        if self.residence is not None and not self.residence.all_whole:
            self.residence.serve(Place.MET)
        for unit in self.units:
            unit.finish_gather()
            unit.take_writes()

    def publish(self, stepped: Mapping[int, Iterable[int]] | None = None, refresh: bool = True) -> None:
        """After the optimizer: new weights to where forward reads them. Collective: all ranks.

        `stepped` are the parameters that it steps, by the identity of their unit; None are all. Without `refresh` the
        shards in the compute format are new already.
        """
        changed = []
        for unit in self.units:
            if unit.trainable and (stepped is None or id(unit) in stepped):
                own = range(len(unit.params)) if stepped is None else stepped[id(unit)]
                present = [index for index in own if unit.present[index]]
                changed += [unit] if present else []
                if not unit.placement.shards_parameters:
                    unit.count_step(present)
                unit.publish(refresh)
        if self.residence is not None:
            self.residence.invalidate(changed)

    def finish_gathers(self) -> None:
        """Wait for all parameters in flight (stage 1, 2)."""
        if self.residence is None:
            self._finish_gathers(self.units)
