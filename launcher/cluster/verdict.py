"""What a job on many hosts failed of: the first cause, never one of its victims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from distui.core.errors import EXIT_RANK_FAILED
from distui.core.paths import RunFolder
from distui.launcher.cluster.gang import Member
from distui.launcher.cluster.hosts import Host
from distui.launcher.job.outcome import HOST_LOST, Ending, Outcome, RankOutcome, judge

HEAD_START_S = 1.0
"""A host that is lost takes its peers' connections with it a moment before its loss is noticed."""


def rank_words(first: int, count: int) -> str:
    """Return `rank 3` or `ranks 2-3`."""
    return f"rank {first}" if count == 1 else f"ranks {first}-{first + count - 1}"


def first_cause(
    run: RunFolder,
    endings: Mapping[int, Ending],
    lost: Sequence[Member],
    places: Mapping[int, tuple[int, int]],
    began_s: float,
) -> Outcome:
    """Return the outcome of a failed attempt. `places` has each node's first rank and number of ranks.

    `began_s` is the wall-clock time at which the clock of `Member.lost_s` was 0.
    """
    world_size = sum(count for _, count in places.values())
    outcome = judge(run, "failed", EXIT_RANK_FAILED, "", endings, 0, world_size)
    gone = {first + number for member in lost for first, count in (places[member.node],) for number in range(count)}
    for rank in outcome.ranks:
        if rank.rank in gone and rank.rank not in endings:
            rank.error = HOST_LOST
    if not lost:
        return outcome
    first_lost = min(lost, key=lambda member: member.lost_s)
    lost_s = began_s + first_lost.lost_s - HEAD_START_S
    ending = endings.get(outcome.failed_rank) if outcome.failed_rank is not None else None
    if ending is not None and not outcome.is_victim and ending.time_s < lost_s and ending.rank not in gone:
        return outcome
    first, count = places[first_lost.node]
    words = f"{first_lost.host.name} (node {first_lost.node}, {rank_words(first, count)})"
    outcome.failed_rank, outcome.message = None, f"{words}: {first_lost.lost}"
    outcome.is_victim = False
    return outcome


def name_hosts(
    ranks: Sequence[RankOutcome],
    places: Mapping[int, tuple[int, int]],
    hosts: Sequence[Host],
    steps: Mapping[int, int],
) -> None:
    """Say of each rank where it ran, and to which step it came; as for `first_cause`, in the order of `ranks`."""
    for node, (first, count) in places.items():
        for rank in ranks[first : first + count]:
            rank.host, rank.step = hosts[node].name, steps.get(rank.rank)
