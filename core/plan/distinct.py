"""Which of many ranked plans are worth a line: not those that a simpler one beats in both speed and memory."""

from __future__ import annotations

from collections.abc import Iterable

from distui.core.plan.types import Plan

NEARLY = 1.02
"""Two percent of memory are no reason to choose the slower and more complicated plan."""


def complexity(plan: Plan) -> int:
    """Return how many things beyond plain data parallelism a plan asks for."""
    axes = (plan.tensor_parallel, plan.pipeline_parallel, plan.context_parallel, plan.expert_parallel)
    homes = plan.offload_homes.values()
    beside = (plan.compression != "none") + (plan.shard_size > 0)
    return sum(size > 1 for size in axes) + sum(home != "none" for home in homes) + beside


def beats(better: Plan, plan: Plan) -> bool:
    """Tell whether `better` is simpler, can run where `plan` can, and is not behind it in speed or memory."""
    if complexity(better) >= complexity(plan) or better.available < plan.available:
        return False
    if better.world_size > plan.world_size or better.backend != plan.backend:
        return False
    if better.memory_per_rank_bytes > NEARLY * plan.memory_per_rank_bytes:
        return False
    return plan.tokens_per_s is None or (better.tokens_per_s or 0.0) >= plan.tokens_per_s


def distinct(plans: Iterable[Plan]) -> list[Plan]:
    """Return the plans that no other of them beats, in their order."""
    plans = list(plans)
    return [plan for plan in plans if not any(beats(other, plan) for other in plans)]
