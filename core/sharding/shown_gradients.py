"""Stage 0: a rank has whole gradients, and plain code reads and changes them in `param.grad`."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch

from distui.core.sharding.residence import in_backward
from distui.core.sharding.units.guarded import GRAD
from distui.core.sharding.units.unit import Unit


class ShownGradients:
    """The part of a schedule that stands behind `param.grad`."""

    stage: int
    order: list[Unit]
    _open: bool
    _shown = False
    """Whether `param.grad` of every parameter is the reduced gradient."""
    is_seen = False
    """Whether the script has ever looked at `param.grad`, or assigned to it: a clipping may not wait for the step."""
    _assigned = False
    """Whether it assigned gradients since they were forgotten last."""
    before_look: Callable[[], None] = staticmethod(lambda: None)
    """Called before it does: what the step would multiply into the gradients is to be seen."""

    @property
    def has_shown(self) -> bool:
        """Whether reduced gradients are in `param.grad`."""
        return self._shown

    @property
    def is_open(self) -> bool:
        """Whether gradients have arrived since the last backward was over."""
        return self._open

    def end_backward(self) -> None:
        """Finish a backward."""
        raise NotImplementedError

    def show_gradients(self) -> None:
        """Stage 0: put the reduced gradients where plain code reads and changes them, in `param.grad`."""
        if self.stage > 0:
            return
        self._shown = True
        for unit in self.order:
            unit.finish_reduce()
            if unit.grad_full is not None and unit.grad_dtype == unit.dtype:
                for param, view, present in zip(unit.params, unit.views(unit.grad_full), unit.present, strict=True):
                    if present:
                        GRAD.__set__(param, view)

    @property
    def _only_assigned(self) -> bool:
        """Whether what is in `param.grad` is the script's own, and no backward of a part of the ranks' sum."""
        return self._assigned and not self._open

    def _gradient_reader(self, unit: Unit) -> Callable[..., torch.Tensor | None]:
        schedule_of, unit_of = weakref.ref(self), weakref.ref(unit)

        def read(index: int, assigns: bool = False) -> torch.Tensor | None:
            self, unit = schedule_of(), unit_of()
            assert self is not None and unit is not None
            self._assigned = self._assigned or assigns
            if not in_backward():
                self.is_seen = True
                self.before_look()
            if self._open and not in_backward():  # a plain `loss.backward()`, which nobody has finished
                self.end_backward()
                self.show_gradients()
            param = unit.params[index]
            grad = GRAD.__get__(param)
            if grad is None and self._shown and unit.grad_full is not None:
                # Reduced in another format than the parameter's: what the script sees is a copy, taken back later.
                grad = unit.views(unit.grad_full)[index].to(unit.dtype)
                GRAD.__set__(param, grad)
            return grad

        return read

    def _take_shown(self) -> None:
        """Take what the script assigned to `param.grad`, or wrote to a copy of it, into the flat gradients."""
        for unit in self.order:
            if unit.grad_full is None:
                continue
            grads = [GRAD.__get__(param) for param in unit.params]
            views = unit.views(unit.grad_full)
            if not unit.holds_gradient and any(grad is not None for grad in grads):  # assigned without a backward
                unit.holds_gradient = True
                for view, grad in zip(views, grads, strict=True):
                    if grad is None:
                        view.zero_()
            for param, view, grad in zip(unit.params, views, grads, strict=True):
                if grad is None or grad is view:
                    continue
                if grad.is_sparse:
                    grad = grad.to_dense()
                view.copy_(torch.where(grad == view.to(grad.dtype), view, grad.to(view.dtype)))
                GRAD.__set__(param, view if grad.dtype == view.dtype else grad)

    def show_again(self) -> None:
        """Have the copies that a script sees of gradients in another format follow a change of these."""
        for unit in self.order if self.is_seen else ():
            if unit.grad_full is not None and unit.grad_dtype != unit.dtype:
                for param, view in zip(unit.params, unit.views(unit.grad_full), strict=True):
                    if (grad := GRAD.__get__(param)) is not None:
                        grad.detach().copy_(view)

    def hide_gradients(self) -> None:
        """Before a backward: autograd must hand fresh gradients over, not add to the flat ones."""
        if not self._shown:
            return
        self._take_shown()
        self._shown = False
        for unit in self.order:
            for param in unit.params:
                GRAD.__set__(param, None)
