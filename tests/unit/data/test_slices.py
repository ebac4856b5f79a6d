"""The index arithmetic: every sample once, one global order for any number of ranks, exact remainders."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from distui.core.data.slices import Slice, mark_last, num_slices, rank_slices

SIZES = {
    "num_samples": st.integers(0, 70),
    "micro_size": st.integers(1, 7),
    "num_ranks": st.integers(1, 6),
    "drop_last": st.booleans(),
}


def _by_rank(order: Sequence[int], micro_size: int, num_ranks: int, drop_last: bool) -> list[list[Slice[int]]]:
    return [list(rank_slices(order, micro_size, num_ranks, rank, drop_last)) for rank in range(num_ranks)]


def _global_batches(slices: list[list[Slice[int]]]) -> list[list[int]]:
    """Join the ranks' parts of each micro-batch and cut its repeats, as gather_for_metrics does."""
    return [[item for part in parts for item in part.items][: parts[0].num_real] for parts in zip(*slices, strict=True)]


@given(**SIZES)
def test_any_number_of_ranks_sees_the_batches_of_one_process(
    num_samples: int, micro_size: int, num_ranks: int, drop_last: bool
) -> None:
    order = list(range(1000, 1000 + num_samples))
    many = _by_rank(order, micro_size, num_ranks, drop_last)
    (alone,) = _by_rank(order, micro_size * num_ranks, 1, drop_last)
    assert _global_batches(many) == [part.items for part in alone]
    assert all(part.num_repeats == 0 for part in alone), "one process needs no evening out"


@given(**SIZES)
def test_every_sample_comes_exactly_once(num_samples: int, micro_size: int, num_ranks: int, drop_last: bool) -> None:
    slices = _by_rank(range(num_samples), micro_size, num_ranks, drop_last)
    seen = [item for batch in _global_batches(slices) for item in batch]
    kept = num_samples - num_samples % (micro_size * num_ranks) if drop_last else num_samples
    assert seen == list(range(kept))


@given(**SIZES)
def test_ranks_have_equal_counts_and_shapes_and_few_repeats(
    num_samples: int, micro_size: int, num_ranks: int, drop_last: bool
) -> None:
    slices = _by_rank(range(num_samples), micro_size, num_ranks, drop_last)
    assert {len(of_rank) for of_rank in slices} == {num_slices(num_samples, micro_size, num_ranks, drop_last)}
    for parts in zip(*slices, strict=True):
        assert len({len(part.items) for part in parts}) == 1
        assert len({(part.num_real, part.num_repeats) for part in parts}) == 1
        whole = [item for part in parts for item in part.items]
        repeats = whole[parts[0].num_real :]
        assert len(repeats) == parts[0].num_repeats < num_ranks
        assert repeats == [index % num_samples for index in range(len(repeats))], "they come from the order's start"


@given(st.lists(st.lists(st.integers(), min_size=1, max_size=4), max_size=12), st.integers(1, 4))
def test_whole_batches_go_round_the_ranks(batches: list[list[int]], num_ranks: int) -> None:
    slices = [list(rank_slices(batches, 1, num_ranks, rank, weight=len)) for rank in range(num_ranks)]
    rows = list(zip(*slices, strict=True))
    seen = [item for parts in rows for item in [i for part in parts for i in part.items[0]][: parts[0].num_real]]
    assert seen == [item for batch in batches for item in batch]


@given(st.lists(st.integers()))
def test_mark_last_marks_the_last_only(values: list[int]) -> None:
    marked = list(mark_last(values))
    assert [value for value, _ in marked] == values
    assert [is_last for _, is_last in marked] == [False] * (len(values) - 1) + [True] * bool(values)
