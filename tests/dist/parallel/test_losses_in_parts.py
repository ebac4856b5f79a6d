"""Losses by tiles of tokens and by parts of the vocabulary against whole logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests.dist.parallel import losses_in_parts as parts
from tests.dist.parallel.pipelines import trainings
from tests.dist.parallel.trainings import VOCAB, difference

from distui.core.errors import UserError

if TYPE_CHECKING:
    from tests.dist.rank_pool import RunRanks

ON_TWO: list[tuple[Any, ...]] = [("llama", 2, 0, 0), ("llama-tied", 2, 3, 0), ("llama", 2, 1, 4), ("qwen3", 2, 0, 0)]


def _check(found: list[Any], whole: list[Any], is_spread: bool) -> None:
    for kind, mine, expected in zip((*parts.KINDS, "evaluated"), found, whole, strict=True):
        assert mine[:2] == pytest.approx(expected[:2], rel=1e-5, abs=1e-6, nan_ok=True), kind
    assert all((mine[2] is None) is is_spread for mine in found[:-1])
    assert found[-1][2] == [2, 9, VOCAB], "in evaluation logits are whole"


@pytest.mark.parametrize("name", ["llama", "gpt2", "llama-tied"])
@pytest.mark.parametrize("tile", [1, 4])
def test_tiles_give_what_whole_logits_give(name: str, tile: int) -> None:
    whole = parts.steps(name, 1, 0, 0)
    _check(parts.steps(name, 1, 0, tile), whole, True)
    assert all(logits is not None for _, _, logits in whole)


def test_parts_of_the_vocabulary_give_what_whole_logits_give(run_ranks: RunRanks) -> None:
    alone = {case[0]: parts.steps(case[0], 1, 0, 0) for case in ON_TWO}
    for of_rank in run_ranks(parts.several, 2, ON_TWO):
        for case, found in zip(ON_TWO, of_rank, strict=True):
            _check(found, alone[case[0]], True)


def test_logits_are_gathered_for_who_reads_them(run_ranks: RunRanks) -> None:
    whole = parts.steps("llama", 1, 0, 0)
    for found in run_ranks(parts.gathered, 2, "llama"):
        _check(found, whole, False)
        for (_, _, mine), (_, _, expected) in zip(found[:-1], whole[:-1], strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


def test_trainings_in_tiles_equal_one_process(run_ranks: RunRanks) -> None:
    tiles = {"activation_checkpointing": {"loss_tile": 3, "mlp_tile": 5, "mode": "full"}}
    alone = parts.train("llama", 1, 0, {})
    for found in run_ranks(parts.train, 2, "llama", 1, 3, tiles):
        assert difference(found, alone) < 1e-5


@pytest.mark.matrix
@pytest.mark.parametrize("strategy", [{"context_parallel": 2}, {}])
def test_trainings_in_tiles_beside_other_axes(run_ranks: RunRanks, strategy: dict[str, int]) -> None:
    tiles: dict[str, Any] = {"activation_checkpointing": {"loss_tile": 3, "mlp_tile": 3}, "strategy": strategy}
    alone = parts.train("llama", 1, 0, {})
    for found in run_ranks(parts.train, 2, "llama", 1 if strategy else 2, 1, tiles):
        assert difference(found, alone) < 1e-5


@pytest.mark.matrix
@pytest.mark.parametrize("stage", [1, 3])
def test_pipelines_in_tiles(run_ranks: RunRanks, stage: int) -> None:
    tiles = {"activation_checkpointing": {"loss_tile": 3, "mlp_tile": 3}}
    (alone,) = run_ranks(trainings, 1, [("llama", 1, 0)])[0]
    for found in run_ranks(trainings, 2, [("llama", 2, stage, tiles), ("llama-tied", 2, stage, tiles)]):
        assert difference(found[0], alone) < 1e-5


def test_a_label_that_is_no_token_is_told(run_ranks: RunRanks) -> None:
    assert all(f"not below {VOCAB}" in told for told in run_ranks(parts.wrong, 2, 2))


@pytest.mark.parametrize(
    ("name", "tile", "told"),
    [
        ("encoder", "loss_tile", "it is none of transformers' models"),
        ("t5", "loss_tile", "its loss is not transformers' ForCausalLMLoss"),
        ("encoder", "mlp_tile", "found no feed-forward in Encoder"),
    ],
)
def test_what_has_no_tiles_is_refused(name: str, tile: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        parts.train(name, 1, 0, {"activation_checkpointing": {tile: 4}})
