"""With how many hosts a job goes on, once some are lost: the same global batch, and at least `cluster.min_nodes`."""

from __future__ import annotations

from collections.abc import Sequence

from distui.core.config.check import check
from distui.core.config.schema import Config


def problems_with(config: Config, counts: Sequence[int]) -> list[str]:
    """Return what keeps a job from training with hosts of so many ranks each."""
    smaller = config.model_copy(deep=True)
    smaller.cluster.hosts = ",".join(f"node{number}:{count}" for number, count in enumerate(counts))
    smaller.cluster.nodes, smaller.cluster.min_nodes = len(counts), 0
    return [f"{problem.what}: {problem.why}" for problem in check(smaller, None, sum(counts))]


def fitting(config: Config, counts: Sequence[int], least: int) -> int:
    """Return how many of the hosts that are left are taken, from the first on; 0 where no number will do."""
    return next((taken for taken in range(len(counts), least - 1, -1) if not problems_with(config, counts[:taken])), 0)


def too_few(config: Config, counts: Sequence[int], least: int) -> str:
    """Return why a job cannot go on with the hosts that are left."""
    if len(counts) < least:
        return f"{len(counts)} hosts are left, and cluster.min_nodes is {least}"
    return f"{len(counts)} hosts with {sum(counts)} ranks are left: {'; '.join(problems_with(config, counts))}"
