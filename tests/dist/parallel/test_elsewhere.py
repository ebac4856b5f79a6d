"""What a rank does not have of a model, and a script reads as if it had: an error, and never a part taken for all."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.dist.parallel import elsewhere

if TYPE_CHECKING:
    from tests.dist.rank_pool import RunRanks


def test_parameters_of_other_stages_are_read_by_nobody(run_ranks: RunRanks) -> None:
    for rank, told in enumerate(run_ranks(elsewhere.stages_read, 2)):
        assert told.pop("afterwards") == "nothing"
        for kind, found in told.items():
            assert f"another stage than this rank's, stage {rank} of 2" in found, (kind, found)
            assert ("of blocks." if rank == 0 else "of embedding.weight") in found, (kind, found)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_experts_over_ranks_are_read_by_their_own_forward_alone(run_ranks: RunRanks, stage: int) -> None:
    for told in run_ranks(elsewhere.experts_read, 2, stage):
        assert told.pop("others") == "nothing"
        for kind, found in told.items():
            assert "of layers.0.experts." in found, (kind, found)
            assert "each of 2 ranks has its share of the experts" in found, (kind, found)


def test_a_rank_that_evaluates_alone_is_told_with_those_that_train(run_ranks: RunRanks) -> None:
    for told in run_ranks(elsewhere.one_evaluates_alone, 2):
        assert "ranks that share experts came to different places of the model" in told
        assert "rank 0 at layers.0.experts without gradients; rank 1 at layers.0.experts with gradients" in told


@pytest.mark.parametrize(("schedule", "train"), [("1f1b", True), ("zbv", True), ("1f1b", False)])
def test_what_blocks_of_other_stages_leave_is_not_what_was_there_before(
    run_ranks: RunRanks, schedule: str, train: bool
) -> None:
    ranks = run_ranks(elsewhere.left_behind, 2, schedule, train)
    last = 0 if schedule == "zbv" else 1
    for kind in ranks[0]:
        told = [found[kind] for found in ranks]
        if kind == "given":
            assert any("puts something into a list that it is given" in one for one in told), told
            assert "nothing" not in told
        elif kind in ("script: first", "some: first", "some: aux that is"):  # rank 0 has the first block
            assert told[0] == "nothing" and "was read on a rank that does not run it" in told[1], (kind, told)
        elif kind == "script: last":
            assert told[last] == "nothing" and "was read on a rank that does not run it" in told[1 - last], told
        else:
            assert all("was read on a rank that does not run it" in one for one in told), (kind, told)


def test_truth_values_of_an_embedding_elsewhere_are_no_zeros(run_ranks: RunRanks) -> None:
    for told in run_ranks(elsewhere.masks, 2):
        assert told.pop("shape") < 1e-6
        for way, found in told.items():
            assert "on another stage" in found or "the first loss of Masked in a pipeline is NaN" in found, (way, found)
