"""Accelerate's optimizer, around the engine's."""

from __future__ import annotations

from typing import Any

import torch


class AcceleratedOptimizer(torch.optim.Optimizer):
    """Steps and clears gradients only when they are synchronised, as the engine's optimizer does by itself."""

    def __init__(self, optimizer: Any, device_placement: bool = True, scaler: Any = None) -> None:
        """`optimizer` is what the engine prepared."""
        # Not Optimizer.__init__: groups and states are the engine's.
        self.optimizer, self.scaler, self.device_placement = optimizer, scaler, device_placement
        self.gradient_factor = 1.0
        """What a local gradient is multiplied by: under LocalSGD it was divided by the number of ranks."""

    @property
    def state(self) -> Any:
        """The optimizer's states."""
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups; `params` are flat shards."""
        groups: list[dict[str, Any]] = self.optimizer.param_groups
        return groups

    @param_groups.setter
    def param_groups(self, param_groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = param_groups

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The default hyper-parameters."""
        defaults: dict[str, Any] = self.optimizer.defaults
        return defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, where the engine can."""
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state."""
        state: dict[str, Any] = self.optimizer.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Give the optimizer its state back."""
        self.optimizer.load_state_dict(state_dict)

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Forget the gradients, unless they accumulate."""
        self.optimizer.zero_grad(set_to_none=True if set_to_none is None else set_to_none)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step, unless gradients accumulate. Collective."""
        if self.gradient_factor != 1.0:
            self.optimizer.grad_factor *= self.gradient_factor
        self.optimizer.step(closure)

    def train(self) -> None:
        """Put a schedule-free optimizer into training mode."""
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()

    def eval(self) -> None:
        """Put a schedule-free optimizer into evaluation mode."""
        if callable(getattr(self.optimizer, "eval", None)):
            self.optimizer.eval()

    @property
    def step_was_skipped(self) -> bool:
        """Whether the last step was skipped by an overflow."""
        return bool(getattr(self.optimizer, "step_was_skipped", False))

    def __getstate__(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer, "scaler": self.scaler, "device_placement": self.device_placement}
