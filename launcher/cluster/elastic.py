"""With which hosts a job goes on, once some are lost: spares first, then fewer, with the same global batch."""

from __future__ import annotations

from collections.abc import Sequence

from distui.core.config.check import check
from distui.core.config.schema import Config
from distui.launcher.cluster.gang import Member
from distui.launcher.cluster.hosts import Host


def problems_with(config: Config, counts: Sequence[int]) -> list[str]:
    """Return what keeps a job from training with hosts of so many ranks each."""
    smaller = config.model_copy(deep=True)
    smaller.cluster.hosts = ",".join(f"node{number}:{count}" for number, count in enumerate(counts))
    smaller.cluster.nodes, smaller.cluster.min_nodes, smaller.cluster.spare_nodes = len(counts), 0, 0
    return [f"{problem.what}: {problem.why}" for problem in check(smaller, None, sum(counts))]


MAX_LOSSES = 2
"""A host that was lost so often is not used again, where there is a spare."""


def take_spares(active: list[int], spares: list[int], members: Sequence[Member], hosts: Sequence[Host]) -> list[str]:
    """Put spares in the places of lost hosts, in place; return a line for each.

    A host whose agent alone was lost is used again, unless that has happened before.
    """
    told = []
    for place, node in enumerate(active):
        member = members[node]
        if member.stage != "lost" or (member.answers and not member.was_silent and member.losses < MAX_LOSSES):
            continue
        fit = (one for one in spares if members[one].here and hosts[one].num_ranks == hosts[node].num_ranks)
        if (chosen := next(fit, None)) is None:
            continue
        spares.remove(chosen)
        active[place], member.is_left_out = chosen, True
        left = f"{len(spares)} spare{'s' * (len(spares) != 1)} left"
        told.append(f"{hosts[chosen].name} takes the place of {hosts[node].name}; {left}")
    return told


def fitting(config: Config, counts: Sequence[int], least: int) -> int:
    """Return how many of the hosts that are left are taken, from the first on; 0 where no number will do."""
    return next((taken for taken in range(len(counts), least - 1, -1) if not problems_with(config, counts[:taken])), 0)


def too_few(config: Config, counts: Sequence[int], least: int) -> str:
    """Return why a job cannot go on with the hosts that are left."""
    if len(counts) < least:
        return f"{len(counts)} hosts are left, and cluster.min_nodes is {least}"
    return f"{len(counts)} hosts with {sum(counts)} ranks are left: {'; '.join(problems_with(config, counts))}"
