"""The order of samples in an epoch: the same on every rank, and for any number of ranks."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import BatchSampler, SequentialSampler

from distui.core.ranks import ops
from distui.core.ranks.process import ProcessState
from distui.core.ranks.random_states import RandomStates

GOLDEN_RATIO_64 = 0x9E3779B97F4A7C15
"""Spreads the seeds of epochs, so that (seed 1, epoch 0) is not (seed 0, epoch 1)."""


def epoch_seed(seed: int, epoch: int) -> int:
    """Return the generator's seed for an epoch; epoch 0 has `seed` itself."""
    return (seed + epoch * GOLDEN_RATIO_64) % 2**63


def call_set_epoch(value: Any, epoch: int) -> None:
    """Tell a sampler or data set, and the sampler inside a batch sampler, which epoch begins, if it wants to know."""
    if callable(set_epoch := getattr(value, "set_epoch", None)):
        set_epoch(epoch)
    if isinstance(value, BatchSampler):
        call_set_epoch(value.sampler, epoch)


def _draw(generator: torch.Generator) -> int:
    return int(torch.empty((), dtype=torch.int64).random_(generator=generator).item())


def _is_sized(value: Any) -> bool:
    try:
        len(value)
    except (TypeError, NotImplementedError):
        return False
    return True


class SampleOrder:
    """Draws what a sampler (or batch sampler) yields, so that all ranks get the same.

    - A sampler with no generator of its own is lent one, seeded by (seed, epoch). Its first epoch has the order of
      `DataLoader(..., generator=torch.Generator().manual_seed(seed))` in one process.
    - A sampler with the user's generator goes on drawing from it; rank 0's generator state goes to all ranks first.
    - Any other sampler with a length: rank 0 draws, and all ranks get its order. Without a length every rank draws
      for itself, and the user sees to it that they draw the same. In the middle of an epoch it is drawn once more
      with the global random states of the first time; what a sampler keeps of its own is not seen.
    """

    def __init__(self, sampler: Iterable[Any], generator: torch.Generator | None, seed: int, process: ProcessState):
        """`generator` is the data loader's, from which plain torch draws the seed of the workers."""
        self.sampler, self.seed = sampler, seed
        self._loader_generator, self._process = generator, process
        self._generator_state: torch.Tensor | None = None
        self._random: RandomStates | None = None
        """The global random states that the running epoch's order was drawn with, where that may matter."""
        self._again: RandomStates | None = None
        """Those to draw the next order with."""

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]

    def draw(self, epoch: int) -> tuple[Iterator[Any], int]:
        """Return the order of `epoch` and a seed for workers. Collective, unless distui seeds the sampler."""
        call_set_epoch(self.sampler, epoch)
        seed = epoch_seed(self.seed, epoch)
        sampler = self.sampler
        own = getattr(sampler, "generator", False)
        if own is None:
            lent = torch.Generator().manual_seed(seed)
            sampler = copy.copy(sampler)
            sampler.generator = lent  # type: ignore[attr-defined]
            # Plain torch draws the workers' seed from a loader's generator before the sampler draws its order.
            return iter(sampler), _draw(lent)
        if isinstance(own, torch.Generator):
            if self._process.use_distributed:
                own.set_state(ops.broadcast_object(own.get_state()))
            self._generator_state = own.get_state()
        elif self._loader_generator is not None:
            self._generator_state = self._loader_generator.get_state()
        if self._loader_generator is not None:
            seed = _draw(self._loader_generator)
        if self._same_anyway(own):
            return iter(sampler), seed
        now = RandomStates.take()
        again, self._again = self._again, None
        self._random = again if again is not None else now
        if again is None and not self._process.use_distributed:
            return iter(sampler), seed  # as it goes: a sampler may look at what is trained
        self._random.give_back()
        mine = list(sampler) if self._process.is_main_process else None
        if again is not None:
            now.give_back()
        return iter(ops.broadcast_object(mine)), seed

    def _same_anyway(self, own: Any) -> bool:
        return (
            isinstance(self.sampler, SequentialSampler)
            or isinstance(own, torch.Generator)
            or not _is_sized(self.sampler)
        )

    def state_dict(self, inside: bool) -> dict[str, Any]:
        """Return what the current epoch's order was drawn from, or with `inside` False, the next one's will be."""
        own = self._own_generator()
        state = own.get_state() if own is not None and not inside else self._generator_state
        random = self._random.state_dict() if self._random is not None and inside else None
        return {"seed": self.seed, "generator": state, "random": random}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Draw the next order from what `state` was."""
        self.seed = state["seed"]
        own = self._own_generator()
        if state["generator"] is not None and own is not None:
            own.set_state(state["generator"])
        self._again = RandomStates.of(state["random"]) if state.get("random") is not None else None

    def _own_generator(self) -> torch.Generator | None:
        own = getattr(self.sampler, "generator", None)
        return own if isinstance(own, torch.Generator) else self._loader_generator
