"""What `engine.prepare(optimizer)` returns on every backend: the user's optimizer and the engine's seams in it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch

from distui.core.errors import UserError


class PreparedOptimizer(torch.optim.Optimizer):
    """Steps what its backend trains, by the user's own optimizer `inner`; the engine decides when.

    A backend implements `finish_gradients`, `discard_gradients`, `apply`, `grad_norm`, `scale_gradients` and
    `clamp_gradients`; the rest is torch's interface, and is the same everywhere.
    """

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        # Not Optimizer.__init__: parameters, groups and states are the inner optimizer's.
        self.inner = inner
        self.step_was_skipped = False
        self.grad_factor = 1.0
        """Multiplied into the gradients at the next step: clipping and loss scaling, each without a pass of its own."""
        self.step_allowed: Callable[[], bool] = lambda: True
        """False while gradients accumulate: `step` and `zero_grad` then do nothing."""
        self.before_step: Callable[[Any], None] = lambda _: None
        self.after_step: Callable[[Any], None] = lambda _: None
        self.skip_next = False
        """Set before a step that must not happen (fp16 overflow, on all ranks alike)."""
        self.loss_scale = 1.0
        """The loss scale that `grad_factor` takes out already."""
        self.siblings: list[PreparedOptimizer] = [self]
        """The optimizers of the same model, with this one: a step is over when all of them have stepped."""

    # ---- what a backend does -------------------------------------------------------------------------------------

    @abstractmethod
    def finish_gradients(self) -> None:
        """Return when all gradients of the step are there. Collective."""

    @abstractmethod
    def discard_gradients(self, set_to_none: bool) -> None:
        """Forget the gradients."""

    @abstractmethod
    def apply(self, factor: float) -> None:
        """Step with the gradients times `factor`. Collective."""

    def skip(self) -> None:
        """Leave out a step; nothing to do where `zero_grad` is enough."""

    @abstractmethod
    def grad_norm(self, place: Any, norm_type: float) -> torch.Tensor:
        """Return the norm of the gradients at `place` (None: all) over all ranks, times `grad_factor`. Collective."""

    @abstractmethod
    def scale_gradients(self, factor: float, place: Any) -> None:
        """Multiply the gradients at `place` (None: all, and then at the next step, in one pass with it)."""

    @abstractmethod
    def clamp_gradients(self, limit: float) -> None:
        """Clamp every gradient element to [-limit, limit]."""

    @abstractmethod
    def place_of(self, params: Iterable[torch.Tensor]) -> Any:
        """Return what `grad_norm` and `scale_gradients` take for `params`; None if all that are trainable."""

    # ---- the torch interface -------------------------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's groups; `params` are what the backend steps."""
        return self.inner.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.inner.param_groups = groups

    @property
    def state(self) -> Any:
        """The inner optimizer's states."""
        return self.inner.state

    @state.setter
    def state(self, state: Any) -> None:
        self.inner.state = state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The inner optimizer's default hyper-parameters."""
        return self.inner.defaults

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's part of the states, for the same number of ranks; `save_state` writes what reshards."""
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` of this rank returned."""
        self.inner.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: what is sharded and reduced is laid out when the model is prepared."""
        raise UserError(
            "a parameter group cannot be added after prepare",
            "the buffers of gradients and shards are laid out already",
            "add every group before engine.prepare(model, optimizer)",
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients; nothing while they accumulate."""
        if self.step_allowed():
            self.discard_gradients(set_to_none)
            self.grad_factor = self.loss_scale = 1.0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step on all ranks alike. Collective: all ranks.

        Nothing while gradients accumulate. Sets `step_was_skipped` where an overflow forbade the step.
        """
        if closure is not None:
            raise UserError(
                "optimizer.step(closure) is not supported",
                "a closure runs the model again inside the step",
                "call engine.backward(loss) and then optimizer.step()",
            )
        if not self.step_allowed():
            return
        self.finish_gradients()
        self.before_step(self)
        factor, self.grad_factor, self.loss_scale = self.grad_factor, 1.0, 1.0
        self.step_was_skipped, self.skip_next = self.skip_next, False
        if self.step_was_skipped:
            self.skip()
        else:
            self.apply(factor)
        self.after_step(self)

    def train(self) -> None:
        """Put the inner optimizer into training mode, where it has one (schedule-free optimizers)."""
        if callable(getattr(self.inner, "train", None)):
            self.inner.train()  # type: ignore[attr-defined]

    def eval(self) -> None:
        """Put the inner optimizer into evaluation mode, where it has one."""
        if callable(getattr(self.inner, "eval", None)):
            self.inner.eval()  # type: ignore[attr-defined]


def unscale(optimizer: PreparedOptimizer, loss_scale: float) -> None:
    """Take the loss scale out of the gradients at the next step, once."""
    # Another model's step may have changed the scale since this was called last.
    optimizer.grad_factor *= optimizer.loss_scale / loss_scale
    optimizer.loss_scale = loss_scale


def prefer_fused(group: dict[str, Any]) -> None:
    """Let torch's optimizers take their fused kernels, which read and write each state once, where nobody chose."""
    if group.get("fused", False) is None and group.get("foreach") is None:
        group["fused"] = not (group.get("differentiable") or group.get("capturable"))
