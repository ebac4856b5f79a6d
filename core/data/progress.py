"""Where a loader stands, and who hears of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from distui.core.data.workers import State
from distui.core.ranks.random_states import RandomStates


@dataclass(eq=False, slots=True)
class Progress:
    """Where a loader stands; the views that `skip_first_batches` makes share it."""

    next_epoch: int = 0
    epoch: int = -1
    num_batches: int = 0
    """Handed out in this epoch, with those that were skipped; 0 between epochs."""
    resume_batches: int = 0
    """To be skipped when the next epoch begins."""
    end_of_dataloader: bool = False
    remainder: int = -1
    num_begun: int = 0
    """Batches that were skipped at the beginning of this iteration."""
    num_used: int = 0
    """Batches that a backward has followed, with those that were skipped."""
    random_before: RandomStates | None = None
    """The random states before the batch in hand was read."""
    worker_states: dict[int, State] = field(default_factory=dict)
    """By worker, the random states that it left with the last batch that the script got."""
    replaced: tuple[int, State | None] = (0, None)
    """The worker of the batch in hand, and what it had left before."""
    starts_workers: bool = False
    """The workers' states were loaded: the next ones begin with them."""
    is_moved: bool = False
    """A state was loaded while the script is in the loop: its next batch is of the new position."""
    until_epoch: int | None = None
    """The epoch to go on in, where a script that was started again has still to come to it."""

    @property
    def is_unused(self) -> bool:
        """Whether the batch in hand is still to be trained with; in a loop without backward only the first one may."""
        trains = self.num_used > self.num_begun or self.num_batches == self.num_begun + 1
        return trains and self.num_batches > self.num_used


class Watch(Protocol):
    """Hears where the script is in its loops over loaders."""

    def fetching(self, loader: Any) -> None:
        """The script wants a batch."""

    def handed(self, loader: Any) -> None:
        """The script has got a batch."""

    def exhausted(self, loader: Any) -> None:
        """The script goes on after its loop."""

    def left(self, loader: Any) -> None:
        """The script is in the loop no more, however it left."""

    def passes_over(self, loader: Any) -> bool:
        """Tell whether this loop is one that was trained before the script was started again."""
        ...


class NoWatch:
    """Nobody hears of it, and nobody knows of a backward: what is handed out counts as used."""

    def fetching(self, loader: Any) -> None:
        """Nothing."""

    def handed(self, loader: Any) -> None:
        """Count the batch as used."""
        loader.num_used = loader.num_batches

    def exhausted(self, loader: Any) -> None:
        """Nothing."""

    def left(self, loader: Any) -> None:
        """Nothing."""

    def passes_over(self, loader: Any) -> bool:
        """No."""
        return False
