"""What of a model's states is sharded."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Placement:
    """What of a model's states is sharded, over how many ranks, and in which formats."""

    stage: int
    rank: int
    num_ranks: int
    compute_dtype: torch.dtype | None
    """Format of the parameters; None leaves each as it is."""
    reduce_in_fp32: bool
    moves_gradients: bool = False
    """Whether reduced gradients have another home than the device: then one rank alone does as several do."""
    moves_parameters: bool = False
    replica: int = 0
    """Which of the `num_replicas` groups of `num_ranks` this rank is in; each shares one copy of the states."""
    num_replicas: int = 1
    num_of_losses: int = 0
    """Ranks over whose losses gradients are averaged; 0 are all that hold them, copies too."""

    @property
    def num_averaged(self) -> int:
        """Ranks over whose losses gradients are averaged."""
        return self.num_of_losses or self.num_ranks * self.num_replicas

    @property
    def part(self) -> tuple[int, int]:
        """Which of how many ranks that hold the states, in shards and copies, this is."""
        return self.replica * self.num_ranks + self.rank, self.num_ranks * self.num_replicas

    @property
    def shards_optimizer(self) -> bool:
        return self.stage >= 1 and self.num_ranks > 1

    @property
    def shards_gradients(self) -> bool:
        return self.stage >= 2 and (self.num_ranks > 1 or self.moves_gradients or self.moves_parameters)

    @property
    def shards_parameters(self) -> bool:
        return self.stage >= 3 and (self.num_ranks > 1 or self.moves_parameters)

    @property
    def effective_stage(self) -> int:
        """The stage that the schedule runs: one rank with everything on its device has nothing to shard."""
        return 3 if self.shards_parameters else 2 if self.shards_gradients else 1 if self.shards_optimizer else 0
