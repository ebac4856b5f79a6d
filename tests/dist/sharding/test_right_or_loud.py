"""Whatever a script does with its model, the result is plain torch's on the whole batch, at every stage."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.dist.sharding import (
    kinds_of_blocks,
    kinds_of_changes,
    kinds_of_models,
    kinds_of_optimizers,
    kinds_of_saving,
    kinds_of_several,
    kinds_of_steps,
)
from tests.dist.sharding.trainings import KINDS, STAGES, Result, compare_kinds, problems, run_kind

if TYPE_CHECKING:
    from tests.dist.rank_pool import RunRanks

FILES = (
    kinds_of_blocks,
    kinds_of_changes,
    kinds_of_models,
    kinds_of_optimizers,
    kinds_of_saving,
    kinds_of_several,
    kinds_of_steps,
)


def _compare(names: list[str], num_ranks: int, stage: int, joined: bool = False) -> list[str]:
    return compare_kinds(names, num_ranks, stage, joined)


def _in_bf16(names: list[str], stage: int) -> dict[str, tuple[Result, Result]]:
    return {name: run_kind(name, 2, stage, "bf16") for name in names}


@pytest.mark.timeout(240)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.__name__.rpartition(".")[2])
def test_every_kind_is_as_plain_torch(run_ranks: RunRanks, file: object, stage: int) -> None:
    names = _names(file, stage)
    # Stages 1 and 2 differ in their gradients only: each kind is here under one of them.
    _all_as_plain_torch(run_ranks, names[stage % 2 :: 2] if stage in (1, 2) else names, stage)


@pytest.mark.matrix
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.__name__.rpartition(".")[2])
def test_every_kind_under_the_other_one(run_ranks: RunRanks, file: object, stage: int) -> None:
    _all_as_plain_torch(run_ranks, _names(file, stage)[(stage + 1) % 2 :: 2], stage)


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "file",
    [file if file is kinds_of_blocks else pytest.param(file, marks=pytest.mark.matrix) for file in FILES],
    ids=lambda file: file.__name__.rpartition(".")[2],
)
def test_blocks_that_share_a_unit_are_as_plain_torch(run_ranks: RunRanks, file: object) -> None:
    """At stage 3 a block shows its own parameters there, not its neighbours'."""
    _all_as_plain_torch(run_ranks, _names(file, 3), 3, joined=True)


def _names(file: object, stage: int) -> list[str]:
    names = [name for name, each in KINDS.items() if stage in each.stages and vars(file).get(name) is each.train]
    assert names
    return names


def _all_as_plain_torch(run_ranks: RunRanks, names: list[str], stage: int, joined: bool = False) -> None:
    for told in run_ranks(_compare, 2, names, 2, stage, joined, timeout_s=200.0):
        assert not told, "\n".join(told)


@pytest.mark.timeout(240)
def test_kinds_on_three_ranks(run_ranks: RunRanks) -> None:
    """What depends on how many ranks take part, and how their parts are cut."""
    names = ["each_rank_its_own_way", "idle_experts_from_the_first_step", "trained_in_turn", "written_in_place"]
    names += ["one_rank_reads_and_evaluates_alone", "missing_gradients_are_none", "nested_checkpoints"]
    for told in run_ranks(_compare, 3, names, 3, 3, timeout_s=200.0):
        assert not told, "\n".join(told)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("stage", STAGES)
def test_kinds_in_bf16_are_as_on_one_process(run_ranks: RunRanks, stage: int) -> None:
    names = [name for name, each in KINDS.items() if each.in_bf16 and stage in each.stages]
    (alone,) = run_ranks(_in_bf16, 1, names, stage, timeout_s=200.0)
    for found in run_ranks(_in_bf16, 2, names, stage, timeout_s=200.0):
        # Two halves of a batch are rounded apart, each to 8 bits.
        told = [line for name in names for line in problems(name, *alone[name], found[name][1], share=0.05)]  # type: ignore[call-arg, misc]
        assert not told, "\n".join(told)
