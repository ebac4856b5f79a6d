"""Random programs at every stage on two ranks, against plain torch; Hypothesis draws them here, ranks get them as data.

A dozen of them, always the same, are part of every run. `pytest -m fuzz` draws hundreds of others. What failed once is
kept as an `@example`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import Phase, example, given, settings

from tests.dist.sharding.programs import Pass, Program, Step, compare_program, programs

if TYPE_CHECKING:
    from tests.dist.rank_pool import RankPool

NUM_RANKS = 2


def _on_ranks(program: Program) -> list[str]:
    return compare_program(program, NUM_RANKS)


def _check(pool: RankPool, program: Program) -> None:
    for told in pool.run(_on_ranks, NUM_RANKS, program, timeout_s=120.0):
        assert not told, "\n".join(told)


_TWO_BACKWARDS_WITHOUT_THE_BLOCKS = Program(("plain", "plain"), (Step((Pass(()), Pass(()))),))
_UNFROZEN_BY_ONE_RANK_BEFORE_ANOTHER = Program(
    ("plain", "plain", "plain"),
    (
        Step((Pass(((0, "call"),)),), alone=2),
        Step((Pass(((1, "raw"),), by_method=True),), trainable=(0, 1, 2), alone=2),
        Step((Pass(((1, "call"), (2, "call")), by_method=True),), trainable=(1, 2)),
    ),
    frozen=(1, 2),
)


@pytest.mark.timeout(300)
@example(program=_TWO_BACKWARDS_WITHOUT_THE_BLOCKS)
@example(program=_UNFROZEN_BY_ONE_RANK_BEFORE_ANOTHER)
@settings(max_examples=12, derandomize=True, database=None)
@given(program=programs())
def test_a_dozen_programs_are_as_plain_torch(rank_pool: RankPool, program: Program) -> None:
    _check(rank_pool, program)


@pytest.mark.fuzz
@pytest.mark.timeout(3600)
@settings(max_examples=400, phases=[phase for phase in Phase if phase is not Phase.explain])
@given(program=programs())
def test_hundreds_of_programs_are_as_plain_torch(rank_pool: RankPool, program: Program) -> None:
    _check(rank_pool, program)
