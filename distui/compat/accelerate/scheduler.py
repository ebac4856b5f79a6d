"""Accelerate's scheduler: it steps once a data rank, unless batches are split."""

from __future__ import annotations

from typing import Any

from distui.compat.accelerate.state import AcceleratorState, GradientState


class AcceleratedScheduler:
    """Steps a scheduler when its optimizers stepped.

    A schedule counts the batches of one process, so it moves on by as many steps as there are ranks with batches of
    their own, and by one with `split_batches`. (`distui.Engine` moves it on by one a step.)
    """

    _is_accelerate_prepared = True

    def __init__(
        self, scheduler: Any, optimizers: Any, step_with_optimizer: bool = True, split_batches: bool = False
    ) -> None:
        self.scheduler = scheduler
        self.optimizers = list(optimizers) if isinstance(optimizers, (list, tuple)) else [optimizers]
        self.step_with_optimizer, self.split_batches = step_with_optimizer, split_batches
        self.gradient_state = GradientState()

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Step, if the optimizers did."""
        if not self.step_with_optimizer:
            self.scheduler.step(*args, **kwargs)
            return
        if not self.gradient_state.sync_gradients:
            if self.gradient_state.adjust_scheduler and hasattr(self.scheduler, "_step_count"):
                self.scheduler._step_count += 1
            return
        if any(optimizer.step_was_skipped for optimizer in self.optimizers):
            return
        for _ in range(1 if self.split_batches else AcceleratorState().num_data_ranks):
            total = getattr(self.scheduler, "total_steps", None)
            if total is None or self.scheduler._step_count <= total:
                self.scheduler.step(*args, **kwargs)

    def get_last_lr(self) -> Any:
        """Return the current learning rates."""
        return self.scheduler.get_last_lr()

    def get_lr(self) -> Any:
        """Return the scheduler's own computation of the learning rates."""
        return self.scheduler.get_lr()

    def print_lr(self, *args: Any, **kwargs: Any) -> Any:
        """Print the learning rates."""
        return self.scheduler.print_lr(*args, **kwargs)

    def state_dict(self) -> dict[str, Any]:
        """Return the scheduler's state."""
        return dict(self.scheduler.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Give the scheduler its state back."""
        self.scheduler.load_state_dict(state_dict)
