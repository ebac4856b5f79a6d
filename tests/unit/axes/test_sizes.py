"""The order of ranks: every group holds what it should, and each rank is in one group of a kind."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distui.core.axes.sizes import AXES, GROUPS, AxisSizes
from distui.core.config.schema import StrategySection

SIZES = st.builds(AxisSizes, *(st.integers(1, 3) for _ in AXES))
FOLDS = SIZES.flatmap(
    lambda sizes: st.sampled_from(
        [
            replace(sizes, ep=ep, replicas=copies)
            for copies in range(1, 4)
            for ep in range(1, 28)
            if sizes.dp % copies == 0 and sizes.dp * sizes.cp * sizes.tp // copies % ep == 0
        ]
    )
)


@given(SIZES)
def test_each_rank_is_in_one_group_of_a_kind_whose_members_differ_along_it_alone(sizes: AxisSizes) -> None:
    for kind, axes in GROUPS.items():
        groups = sizes.groups(kind)
        assert sorted(rank for ranks in groups for rank in ranks) == list(range(sizes.world))
        for ranks in groups:
            assert len(ranks) == sizes.size(axes) and ranks == sorted(ranks)
            assert all(sizes.peers(rank, axes) == ranks for rank in ranks)
            for axis in AXES:
                assert len({sizes.place(rank)[axis] for rank in ranks}) == (getattr(sizes, axis) if axis in axes else 1)
    assert all(sizes.rank_at(sizes.place(rank)) == rank for rank in range(sizes.world))


def test_tensor_parallel_ranks_are_neighbours() -> None:
    sizes = AxisSizes.of(StrategySection(tensor_parallel=2, pipeline_parallel=2), 8)
    assert sizes == AxisSizes(pp=2, dp=2, cp=1, tp=2) and sizes.has_model_axes
    assert sizes.groups("tp") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert sizes.groups("shard") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert sizes.peers(3, GROUPS["model"]) == [2, 3, 6, 7] and sizes.place(6) == {"pp": 1, "dp": 1, "cp": 0, "tp": 0}
    assert not AxisSizes.of(StrategySection(), 3).has_model_axes
    with pytest.raises(ValueError, match="1 x 1 x 2 does not divide 3 ranks"):
        AxisSizes.of(StrategySection(tensor_parallel=2), 3)


@given(FOLDS)
def test_expert_ranks_divide_the_ranks_that_share_states(sizes: AxisSizes) -> None:
    numbers = {"ep": sizes.ep, "expert_shard": sizes.sharing * sizes.tp // sizes.ep, "shard": sizes.sharing}
    numbers["expert_pieces"] = sizes.ep * sizes.pp
    for kind, num in (numbers | {"replica": sizes.replicas}).items():
        groups = sizes.groups(kind)
        assert sorted(rank for ranks in groups for rank in ranks) == list(range(sizes.world))
        assert all(len(ranks) == num for ranks in groups)
    for rank in range(sizes.world):
        experts, copies = sizes.of_kind(rank, "ep"), sizes.of_kind(rank, "expert_shard")
        assert set(experts) & set(copies) == {rank}
        sharing = {other for expert in experts for other in sizes.of_kind(expert, "expert_shard")}
        assert sharing == {o for other in sizes.of_kind(rank, "tp") for o in sizes.of_kind(other, "shard")}
        pieces = sizes.of_kind(rank, "expert_pieces")
        assert {sizes.of_kind(other, "ep").index(other) for other in pieces} == set(range(sizes.ep))
        copies = sizes.of_kind(rank, "replica")
        assert len({sizes.of_kind(other, "shard").index(other) for other in copies}) == 1
        everybody = {other for copy in copies for other in sizes.of_kind(copy, "shard")}
        assert everybody == set(sizes.of_kind(rank, "average"))
        assert {sizes.of_kind(other, "ep").index(other) for other in copies} == {experts.index(rank)}


def test_neighbours_share_a_copy_of_the_states() -> None:
    sizes = AxisSizes.of(StrategySection(zero_stage=2, shard_size=2, tensor_parallel=2), 8)
    assert sizes.replicas == 2 and sizes.groups("shard") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert sizes.groups("replica") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    with pytest.raises(ValueError, match="shard_size = 3 does not divide dp = 4"):
        AxisSizes.of(StrategySection(shard_size=3), 4)


def test_neighbours_have_different_experts() -> None:
    sizes = AxisSizes.of(StrategySection(expert_parallel=2), 4)
    assert sizes.groups("ep") == [[0, 1], [2, 3]] and sizes.groups("expert_shard") == [[0, 2], [1, 3]]
    assert not sizes.has_model_axes
    with pytest.raises(ValueError, match="ep = 3 not 4 x 1 x 1"):
        AxisSizes.of(StrategySection(expert_parallel=3), 4)


def test_tensor_parallel_ranks_have_different_experts_first() -> None:
    sizes = AxisSizes.of(StrategySection(expert_parallel=4, tensor_parallel=2, pipeline_parallel=2), 16)
    assert sizes.groups("ep") == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert sizes.groups("expert_shard")[:4] == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert sizes.of_kind(5, "expert_pieces") == [4, 5, 6, 7, 12, 13, 14, 15]
