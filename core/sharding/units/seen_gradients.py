"""What a script sees as `param.grad`, and what becomes of what it assigns there."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import nn

from distui.core.errors import UserError
from distui.core.sharding.units.guarded import DATA, GRAD
from distui.core.sharding.units.layout import FlatLayout
from distui.core.sharding.units.placement import Placement


class SeenGradients:
    """The part of a unit that stands behind `param.grad`."""

    params: list[nn.Parameter]
    param_names: list[str]
    placement: Placement
    present: bytearray
    zeroed: bytearray
    show_gradient: Callable[..., torch.Tensor | None] | None
    grad_full: torch.Tensor | None
    layout: FlatLayout
    holds_gradient: bool
    shard_holds_gradient: bool
    rank: int
    _forgotten: set[int]

    @property
    def has_gradient(self) -> bool:
        """Whether there is a sum over the ranks."""
        raise NotImplementedError

    def finish_reduce(self) -> None:
        """Wait for the sum."""

    def discard_gradient(self) -> None:
        """Forget all gradients."""

    def gradient(self, writes: bool = False) -> AbstractContextManager[torch.Tensor]:
        """Give this rank's shard of the gradient."""
        raise NotImplementedError

    def forget(self, indices: set[int]) -> None:
        """Forget the gradients of some parameters; the others' stay until their own optimizer forgets them."""
        self.finish_reduce()
        self._forgotten |= indices
        for index in indices:
            self.present[index] = 0
        if len(self._forgotten) == len(self.params):
            self.discard_gradient()
        elif self.has_gradient:
            with self.gradient(writes=True) as grad:
                for start, end in self.layout.runs(indices, self.rank):
                    grad[start:end].zero_()

    def hold_zeros(self, indices: bytearray) -> None:
        """Have a gradient of zeros where `indices` are 1; what there is of others stays."""
        if any(indices) and not self.has_gradient:
            if self.placement.shards_gradients:
                with self.gradient(writes=True) as grad:
                    grad.zero_()
                self.shard_holds_gradient = True
            else:
                assert self.grad_full is not None
                self.grad_full.zero_()
                self.holds_gradient = True
        self.present = bytearray(map(max, self.present, indices))

    def read_gradient(self, index: int) -> torch.Tensor | None:
        """Return `param.grad`. Raises: UserError where this rank does not hold the whole of it."""
        if self.show_gradient is not None:
            shown = self.show_gradient(index)
            if self.present[index]:
                return shown
        if not self.present[index]:
            grad = GRAD.__get__(self.params[index])
            if grad is None and self.zeroed[index]:
                if self.show_gradient is None:
                    raise self._no_whole_gradient(index, "read")
                with torch.no_grad():
                    grad = torch.zeros_like(DATA.__get__(self.params[index]))
                GRAD.__set__(self.params[index], grad)
            return grad
        raise self._no_whole_gradient(index, "read")

    def write_gradient(self, index: int, value: torch.Tensor | None) -> None:
        """Take what the script assigned to `param.grad`. Raises: UserError where no rank holds the whole of it."""
        if value is None:
            if self.present[index]:
                self.forget({index})
            self.zeroed[index] = 0
            GRAD.__set__(self.params[index], None)
        elif self.show_gradient is not None:
            self.show_gradient(
                index, assigns=True
            )  # what there is ends first, and what is assigned is stepped as it is
            GRAD.__set__(self.params[index], value)
            self.present[index] = 1
        else:
            raise self._no_whole_gradient(index, "assigned")

    def _no_whole_gradient(self, index: int, what: str) -> UserError:
        return UserError(
            f"{self.param_names[index]}.grad cannot be {what} at zero_stage={self.placement.stage}",
            f"of its gradient each of {self.placement.num_ranks} ranks holds a part",
            "use `with engine.gradients(model) as grads:`, a dict by name of whole gradients whose changes are kept, "
            "or engine.clip_grad_norm_(model.parameters(), max_norm)",
        )
