"""The states that the fullest rank holds in a layout are those that the planner counts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.dist.parallel.plan import planned

if TYPE_CHECKING:
    from tests.dist.rank_pool import RunRanks

AXES = ("tensor_parallel", "pipeline_parallel", "context_parallel", "expert_parallel", "zero_stage")
FEW: list[tuple[str, tuple[int, ...]]] = [
    ("llama", (4, 1, 1, 1, 0)),  # fewer heads of keys than ranks
    ("llama", (1, 2, 1, 1, 3)),
    ("mixtral", (2, 1, 1, 4, 1)),
    ("mixtral", (2, 2, 1, 2, 0)),
]
MORE: list[tuple[str, tuple[int, ...]]] = [
    ("llama", (2, 1, 1, 1, 1)),
    ("llama", (1, 4, 1, 1, 0)),
    ("llama", (2, 2, 1, 1, 0)),
    ("llama", (2, 1, 2, 1, 2)),
    ("mixtral", (1, 1, 1, 2, 1)),
    ("mixtral", (2, 1, 1, 2, 0)),
    ("mixtral", (4, 1, 1, 2, 0)),
    ("mixtral", (1, 2, 1, 2, 2)),
]


@pytest.mark.parametrize("layouts", [FEW, pytest.param(MORE, marks=pytest.mark.matrix)])
def test_states_of_the_fullest_rank_are_within_8_percent(
    run_ranks: RunRanks, layouts: list[tuple[str, tuple[int, ...]]]
) -> None:
    cases = [(kind, dict(zip(AXES, sizes, strict=True))) for kind, sizes in layouts]
    of_ranks = run_ranks(planned.states, 4, cases)
    for number, case in enumerate(cases):
        for category in ("parameters", "gradients", "optimizer_states"):
            said = of_ranks[0][number][0][category]
            held = max(found[number][1][category] for found in of_ranks)
            assert said == pytest.approx(held, rel=0.08), (case, category)
