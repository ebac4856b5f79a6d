"""Accelerate's optimizer, around the engine's."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import torch

from distui.compat.accelerate.refusals import offered
from distui.compat.accelerate.state import GradientState
from distui.core.errors import UserError
from distui.core.sharding.optim.optim import ShardedOptimizer
from distui.core.sharding.optim.whole_states import lies_in_parts


class AcceleratedOptimizer(torch.optim.Optimizer):
    """Steps and clears gradients only when they are synchronised, as the engine's optimizer does by itself."""

    _is_accelerate_prepared = True

    def __init__(self, optimizer: Any, device_placement: bool = True, scaler: Any = None) -> None:
        """`optimizer` is what the engine prepared."""
        # Not Optimizer.__init__: groups and states are the engine's.
        self.optimizer, self.scaler, self.device_placement = optimizer, scaler, device_placement
        self.after_step: Any = None
        """Called when it has stepped: a schedule that follows it by itself."""
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
        """Return the optimizer's state, whole and in the parameters' shapes. Collective from stage 1 on."""
        state: dict[str, Any] = self.optimizer.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Give the optimizer its state back, or that of a plain optimizer. All ranks, alike."""
        self.optimizer.load_state_dict(state_dict)

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Forget the gradients, unless they accumulate."""
        self.optimizer.zero_grad(set_to_none=True if set_to_none is None else set_to_none)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step, unless gradients accumulate. Collective."""
        if self.gradient_factor != 1.0:
            self.optimizer.grad_factor *= self.gradient_factor
        self.optimizer.step(closure)
        if self.after_step is not None and GradientState().sync_gradients and not self.step_was_skipped:
            self.after_step()

    step.hooked = True  # type: ignore[attr-defined]  # else torch wraps it for all where one is unpickled

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
        # The optimizer as the script made it, with its states: shards are of this process.
        plain = getattr(self.optimizer, "inner", self.optimizer)
        if isinstance(self.optimizer, ShardedOptimizer):
            if lies_in_parts(self.optimizer):
                raise UserError(
                    f"a prepared {type(plain).__name__} cannot be pickled or copied from stage 1 on",
                    "a rank holds its part of the states, and one rank alone cannot ask the others for theirs",
                    "pickle optimizer.state_dict(), called on all ranks",
                )
            states = self.optimizer.state_dict()["state"]
            plain = copy.copy(plain)
            params = [param for group in plain.param_groups for param in group["params"]]
            plain.state = defaultdict(dict, {params[number]: state for number, state in states.items()})
        values = {name: value for name, value in self.__dict__.items() if not name.startswith("_")}
        return {**values, "optimizer": plain, "scaler": None, "after_step": None}


def __getattr__(name: str) -> Any:
    return offered("accelerate.optimizer", {}, name)
