"""Accelerate's mixin of loaders."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from distui.compat.accelerate.state import GradientState


class DataLoaderStateMixin:
    """What tells `GradientState` where a loader stands; for loaders of a script's own, too."""

    gradient_state: GradientState
    dataset: Any
    end_of_dataloader = False
    remainder = -1

    def reset(self) -> None:
        """Forget the last iteration."""
        self.end_of_dataloader, self.remainder = False, -1

    def begin(self) -> None:
        """Say that an iteration begins."""
        self.reset()
        with suppress(TypeError, AttributeError):  # a stream without a length
            if not getattr(self, "_drop_last", False):
                total = getattr(self, "total_dataset_length", None)
                self.remainder = (len(self.dataset) if total is None else total) % (self.total_batch_size or 1)  # type: ignore[attr-defined]
        self.gradient_state._add_dataloader(self)

    def end(self) -> None:
        """Say that the iteration is over."""
        self.gradient_state._remove_dataloader(self)
