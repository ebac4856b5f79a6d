"""When a unit's buffers are gathered, reduced and freed: module and gradient hooks around the user's own code.

All ranks must issue the same collectives in the same order, whatever the control flow of one rank. So reductions
follow one fixed order (last unit first): a unit whose gradients are complete waits until those before it are reduced.
Gathers (stage 3) follow the recorded order of the first forward; a unit that this rank skips is gathered all the same.
Reductions and gathers have a process group each, so that neither order depends on the other.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Container
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from distui.core.sharding.hooks import Hook
from distui.core.sharding.slots import SlotRing
from distui.core.sharding.unit import GradState, Unit


def in_backward() -> bool:
    """Tell whether autograd is running on this thread (a checkpointed forward is then a recomputation)."""
    return torch._C._current_graph_task_id() != -1


def _reduce_order(units: list[Unit], stage: int) -> list[Unit]:
    # Stage 3 reduces the root last: gathers of blocks must never wait behind a root gradient that one rank lacks.
    backwards = [unit for unit in reversed(units) if unit.trainable]
    if stage < 3:
        return backwards
    return [unit for unit in backwards if not unit.is_root] + [unit for unit in backwards if unit.is_root]


class Schedule:
    """The hooks of one model, and the order of its collectives."""

    def __init__(self, model: nn.Module, units: list[Unit], stage: int, num_ranks: int) -> None:
        self.model = model
        self.units = units
        self.stage = stage
        self.reduces_each_backward = stage >= 2
        self.sync = True
        """Whether the running backward is the last before the step; set by accumulate and no_sync."""
        self.order = _reduce_order(units, stage)
        self._next = 0
        self._open = False
        self._shown = False
        """Stage 0: whether `param.grad` of every parameter is the reduced gradient."""
        self._calls: dict[int, int] = defaultdict(int)
        """Forward calls of each unit's modules since the last step; a unit called twice is complete only at the end."""
        self._late: set[int] = set()
        self.slots = SlotRing(units) if stage >= 3 else None
        self._handles: list[Any] = []
        self._grad_hooks: dict[int, dict[int, Any]] = {}
        """Handles of the hooks on gradients, by unit and parameter."""
        self._root_units = [unit for unit in units if unit.is_root]
        self._gather_lazily = stage in (1, 2) and num_ranks > 1
        self._register()

    # ---- hooks ---------------------------------------------------------------------------------------------------

    def _register(self) -> None:
        blocks: dict[int, tuple[nn.Module, list[Unit]]] = {}
        for unit in self.units:
            for module in unit.modules:
                blocks.setdefault(id(module), (module, []))[1].append(unit)
            if unit.trainable:
                self._hook_all(unit)
        for module, units in blocks.values():
            self._handles.append(module.register_forward_pre_hook(Hook(self._before_block(units)), with_kwargs=True))
            if self.slots is not None:
                self._handles.append(module.register_forward_hook(Hook(self._after_block(units)), with_kwargs=True))
        if self.slots is not None or self._gather_lazily:
            for module, units in self._root_parts():
                self._handles.append(module.register_forward_pre_hook(Hook(self._before_root_part(units))))
        self._handles.append(self.model.register_forward_pre_hook(Hook(self._before_model), prepend=True))
        if self.slots is not None:
            self._handles.append(self.model.register_forward_hook(Hook(self._after_model)))

    def _root_parts(self) -> list[tuple[nn.Module, list[Unit]]]:
        unit_of = {id(param): unit for unit in self._root_units for param in unit.params}
        parts = []
        for module in self.model.modules():
            held = {id(unit_of[id(p)]): unit_of[id(p)] for p in module._parameters.values() if id(p) in unit_of}
            if held and module is not self.model:
                parts.append((module, list(held.values())))
        return parts

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
            if index not in hooks:
                hooks[index] = param.register_post_accumulate_grad_hook(self._grad_hook(unit, index))
        unit.collected, unit.came_last = (), None

    def _thin_hooks(self) -> None:
        # A Python call for each of many small parameters costs more than its gradient's copy. So once it is known
        # whose gradient comes last in a unit, that one tells for the small ones.
        for unit in self.order:
            if not unit.collected and unit.came_last is not None:
                unit.choose_collected()
                hooks = self._grad_hooks[id(unit)]
                for index in unit.collected:
                    hooks.pop(index).remove()

    def _before_model(self, module: nn.Module, args: Any) -> None:
        if self.slots is not None:
            self.slots.begin_forward(self._root_units)
        elif self._gather_lazily:
            for unit in self._root_units:
                unit.finish_gather()

    def _after_model(self, module: nn.Module, args: Any, output: Any) -> None:
        assert self.slots is not None
        if in_backward():
            return
        if self.slots.end_forward():
            # The first forward told the order in which blocks run; their gradients come the other way round.
            self.order = _reduce_order(self.slots.recorded_units(self.units), self.stage)
        if not torch.is_grad_enabled():
            return
        slots = self.slots
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                leaf.register_hook(lambda grad: slots.begin_backward(self._root_units))

    def _before_block(self, units: list[Unit]) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            recomputing = in_backward()
            if self.slots is not None:
                self.slots.enter(units, backward=recomputing)
            elif self._gather_lazily:
                for unit in units:
                    unit.finish_gather()
            if module.training and not recomputing:
                self._calls[id(module)] += 1
                if self._calls[id(module)] > 1:
                    self._late.update(id(unit) for unit in units)

        return hook

    def _before_root_part(self, units: list[Unit]) -> Callable[[nn.Module, Any], None]:
        # Somebody may call a part of the model without the model: model.encoder(x).
        def hook(module: nn.Module, args: Any) -> None:
            if self.slots is not None:
                self.slots.gather_roots(units)
            else:
                for unit in units:
                    unit.finish_gather()

        return hook

    def _after_block(self, units: list[Unit]) -> Callable[[nn.Module, Any, Any, Any], None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            assert self.slots is not None
            if not torch.is_grad_enabled():
                return
            for leaf in tree_leaves(output):
                if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                    leaf.register_hook(self._before_block_backward(units))

        return hook

    def _before_block_backward(self, units: list[Unit]) -> Callable[[torch.Tensor], None]:
        def hook(grad: torch.Tensor) -> None:
            assert self.slots is not None
            self._close_passed(units)
            self.slots.enter(units, backward=True)

        return hook

    def _close_passed(self, units: list[Unit]) -> None:
        # Stage 3: backward has left every unit in front of these in the order, so what is missing there is zero.
        for unit in self.order[self._next :]:
            if unit in units or id(unit) in self._late or unit.is_root:
                return
            if unit.state is GradState.FILLING:
                self._open = True
                unit.fill_missing()
                unit.state = GradState.READY
            self._launch_ready()

    def _grad_hook(self, unit: Unit, index: int) -> Callable[[torch.Tensor], None]:
        # Weakly: the garbage collector does not see what a parameter's hook holds, and would never free the engine.
        schedule_of, unit_of = weakref.ref(self), weakref.ref(unit)

        def hook(param: torch.Tensor) -> None:
            grad = param.grad
            param.grad = None
            self, unit = schedule_of(), unit_of()
            if grad is None or self is None or unit is None:
                return
            self._open = True
            if self._shown and unit.grad_full is not None and grad is unit.views(unit.grad_full)[index]:
                raise RuntimeError(
                    f"a second backward without engine.backward(loss) added to the reduced gradient of "
                    f"{unit.param_names[index]}; call engine.backward(loss) instead of loss.backward()"
                )
            complete = unit.accept(index, grad)
            if complete and (self.sync or self.reduces_each_backward):
                unit.state = GradState.READY
                self._launch_ready()

        return hook

    # ---- reductions ----------------------------------------------------------------------------------------------

    def _launch_ready(self) -> None:
        while self._next < len(self.order):
            unit = self.order[self._next]
            if unit.state is not GradState.READY or id(unit) in self._late:
                return
            unit.reduce()
            self._next += 1
            if self._next >= 2 and self.stage >= 1:
                # Two gradients in flight at most: the one that fills and the one that travels.
                self.order[self._next - 2].finish_reduce()

    def end_backward(self) -> None:
        """Finish a backward: units that are not complete take zeros for what is missing. Collective: all ranks.

        Whoever runs the backward calls it; `finish_gradients` does where nobody did.
        """
        if not self._shown:
            for unit in self.order:
                if unit.collect():
                    self._open = True
                    if unit.is_complete:  # right, but reduced later than it could: learn anew whose comes last
                        self._hook_all(unit)
        if not self._open:
            return
        if self.slots is not None:
            self.slots.end_backward()
        self._calls.clear()
        self._thin_hooks()
        if not (self.sync or self.reduces_each_backward):
            for unit in self.order:
                unit.next_micro_batch()
            self._open = False
            return
        self._late.clear()
        again = [unit for unit in self.order[: self._next] if unit.num_arrived and unit.state is GradState.FILLING]
        for unit in self.order[self._next :]:
            unit.reopen()
            unit.fill_missing()
            unit.state = GradState.READY
        self._launch_ready()
        for unit in again:
            unit.fill_missing()
            unit.reduce()
        if self.reduces_each_backward:
            for unit in self.order:
                unit.finish_reduce()
        self._next = 0
        self._open = False

    def finish_gradients(self) -> None:
        """Wait until every unit's gradient is summed over the ranks. Collective: all ranks."""
        self.end_backward()
        for unit in self.order:
            unit.finish_reduce()

    def discard_gradients(self, own: dict[int, set[int]] | None = None) -> None:
        """Forget all gradients, also those of a backward that an exception cut off.

        `own` are the parameters of one of several optimizers, by unit: after a whole backward only theirs go.
        """
        if own is not None and not self._open:
            for unit in self.order:
                if indices := own.get(id(unit)):
                    unit.forget(indices)
                    if self.stage == 0:
                        for index in indices:
                            unit.params[index].grad = None
            return
        self.hide_gradients()
        for unit in self.order:
            unit.discard_gradient()
        if self.slots is not None and self._open:
            self.slots.end_backward()
        self._calls.clear()
        self._late.clear()
        self._next = 0
        self._open = False

    def show_gradients(self) -> None:
        """Stage 0: put the reduced gradients where plain code reads and changes them, in `param.grad`."""
        if self.stage > 0:
            return
        self._shown = True
        for unit in self.order:
            unit.finish_reduce()
            if unit.grad_full is not None and unit.grad_dtype == unit.dtype:
                for param, view in zip(unit.params, unit.views(unit.grad_full), strict=True):
                    param.grad = view

    def hide_gradients(self) -> None:
        """Before a backward: autograd must hand fresh gradients over, not add to the flat ones."""
        if not self._shown:
            return
        self._shown = False
        for unit in self.order:
            for param in unit.params:
                param.grad = None

    # ---- parameters ----------------------------------------------------------------------------------------------

    def publish(self, stepped: Container[int] | None = None, refresh: bool = True) -> None:
        """After the optimizer: new weights to where forward reads them. Collective: all ranks.

        `stepped` are the identities of the units that it stepped; None are all. Without `refresh` the shards in the
        compute format are new already.
        """
        for unit in self.units:
            if unit.trainable and (stepped is None or id(unit) in stepped):
                unit.publish(refresh)
        if self.slots is not None:
            self.slots.invalidate()

    def finish_gathers(self) -> None:
        """Wait for all parameters in flight (stage 1, 2)."""
        for unit in self.units:
            unit.finish_gather()
