"""Experts over ranks against one process: losses, norms and weights of five clipped steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from tests.dist.parallel import experts
from tests.dist.parallel.trainings import difference

if TYPE_CHECKING:
    from tests.dist.rank_pool import RunRanks

TOLERANCE = 1e-5
MODELS = ("mixtral", "qwen2-moe", "qwen3-moe", "deepseek", "olmoe", "gpt-oss")


def compare(run_ranks: RunRanks, num_ranks: int, cases: list[tuple[Any, ...]]) -> None:
    names = sorted({case[0] for case in cases})
    alone = dict(zip(names, run_ranks(experts.several, 1, [(name, 1, 0) for name in names])[0], strict=True))
    for found in run_ranks(experts.several, num_ranks, cases):
        for case, mine in zip(cases, found, strict=True):
            assert difference(mine, alone[case[0]]) < TOLERANCE, case


def test_two_ranks_that_share_the_experts_equal_one_process(run_ranks: RunRanks) -> None:
    compare(run_ranks, 2, [("mixtral", 2, 0), ("qwen2-moe", 2, 1), ("deepseek", 2, 2), ("gpt-oss", 2, 3)])


def test_two_pairs_equal_one_process(run_ranks: RunRanks) -> None:
    compare(run_ranks, 4, [("qwen3-moe", 2, 0), ("deepseek", 2, 1), ("olmoe", 2, 2), ("mixtral", 2, 3)])


@pytest.mark.matrix
@pytest.mark.parametrize(("num_ranks", "num_experts"), [(2, 2), (4, 2), (4, 4)])
def test_all_models_under_all_stages(run_ranks: RunRanks, num_ranks: int, num_experts: int) -> None:
    compare(run_ranks, num_ranks, [(name, num_experts, stage) for name in MODELS for stage in range(4)])
