"""What keeps states from being shared in groups of data-parallel ranks (`strategy.shard_size`). Torch-free."""

from __future__ import annotations

from collections.abc import Iterator

from distui.core.config.schema import Config
from distui.core.errors import Problem


def shard_problems(config: Config) -> Iterator[Problem]:
    """Yield what keeps states from being shared in groups."""
    strategy = config.strategy
    size = strategy.shard_size
    if not size or strategy.backend != "native":  # refused with the backend
        return
    if strategy.zero_stage == 0:
        yield Problem(
            "strategy.shard_size",
            f"shard_size={size} with zero_stage=0",
            "at stage 0 every rank holds all states, and there is nothing to share",
            "set strategy.zero_stage to 1, 2 or 3, or strategy.shard_size to 0",
        )
    if size * strategy.context_parallel == 1:
        yield Problem(
            "strategy.shard_size",
            "shard_size=1",
            f"a group of one rank holds all states, as without sharding, and zero_stage={strategy.zero_stage}",
            "set strategy.zero_stage to 0, or strategy.shard_size to 2 or more",
        )


def group_problems(size: int, num_ranks: int) -> Iterator[Problem]:
    """Yield what keeps `num_ranks` data-parallel ranks from sharing states in groups of `size`; 0 is all of them."""
    if size and num_ranks % size:
        yield Problem(
            "strategy.shard_size",
            f"shard_size={size} does not divide the {num_ranks} data-parallel ranks",
            f"groups of {size} hold a copy of the states each; "
            f"{num_ranks} = {num_ranks // size} x {size} + {num_ranks % size}",
            f"set strategy.shard_size to one of {divisors(num_ranks)}, or to 0, which shares among all",
        )


def divisors(number: int) -> str:
    """Return the numbers that divide `number`, for a fix."""
    return ", ".join(str(size) for size in range(1, number + 1) if number % size == 0)
