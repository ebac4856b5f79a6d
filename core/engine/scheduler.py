"""A learning-rate schedule that counts optimizer steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class PreparedScheduler:
    """Steps any torch scheduler once for each real optimizer step, whatever the number of ranks.

    `step()` does nothing while gradients accumulate, and after an optimizer step that an overflow skipped. Attributes
    that are not its own are the scheduler's.
    """

    def __init__(self, scheduler: Any, did_step: Callable[[], bool], sync_gradients: Callable[[], bool]) -> None:
        """`did_step` says whether the optimizer's last step was real, `sync_gradients` whether there was one now."""
        self.scheduler = scheduler
        self._did_step, self._sync_gradients = did_step, sync_gradients

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Step the schedule, if the optimizer did; arguments (such as a metric) go to the scheduler."""
        if self._sync_gradients() and self._did_step():
            self.scheduler.step(*args, **kwargs)

    def get_last_lr(self) -> list[float]:
        """Return the current learning rate of each parameter group."""
        return list(self.scheduler.get_last_lr())

    def state_dict(self) -> dict[str, Any]:
        """Return the scheduler's state."""
        return dict(self.scheduler.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Give the scheduler its state back."""
        self.scheduler.load_state_dict(state)

    def __getattr__(self, name: str) -> Any:
        if name == "scheduler":
            raise AttributeError(name)
        return getattr(self.scheduler, name)
