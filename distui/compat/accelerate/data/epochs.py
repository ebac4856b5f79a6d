"""Where a prepared loader stands."""

from __future__ import annotations

from typing import Any

import torch

from distui.core.ranks.random_states import RandomStates


class Epochs:
    """Where a loader stands; the views that `skip_first_batches` makes share it."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration
        self.num_batches = self.num_used = 0
        """Handed out in the running epoch, with those that were skipped; 0 between epochs."""
        self.resume_batches = 0
        self.generator_state: torch.Tensor | None = None
        """Of the running epoch's beginning."""
        self.random_before: RandomStates | None = None
        """The random states before the batch after the one in hand was read, which is read ahead."""
        self.resume_random: RandomStates | None = None
        """Those to read the next epoch's first batch with."""
        self.torchdata: dict[str, Any] = {}
        """torchdata's state of where the script is, of a stateful loader; what is read ahead is not in it."""
        self.resume_torchdata: dict[str, Any] = {}
        """What the next epoch begins with."""
