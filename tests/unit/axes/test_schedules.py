"""Schedules of a pipeline: every micro-batch once a stage, in an order that can be followed, at the published cost."""

from __future__ import annotations

import itertools
from collections import Counter, deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distui.core.axes.schedules import SCHEDULES, Table, course, num_chunks, split, stage_of, tables


@st.composite
def drawn(draw: st.DrawFn) -> tuple[str, int, int, int]:
    schedule, num_ranks = draw(st.sampled_from(SCHEDULES)), draw(st.integers(1, 6))
    num_micro, chunks = draw(st.integers(1, 14)), draw(st.integers(1, 3))
    return schedule, num_ranks, num_micro * num_ranks if schedule == "interleaved" else num_micro, chunks


def run_with_messages(schedule: str, found: list[Table], chunks: int) -> int:
    """Execute with receives that wait for the next message of their neighbour's stage; return the steps done."""
    num_ranks, last = len(found), len(found) * chunks - 1
    lines: dict[tuple[str, int], deque[int]] = {}
    at, done, moved = [0] * num_ranks, 0, True
    while moved:
        moved = False
        for rank, table in enumerate(found):
            while at[rank] < len(table):
                step = table[at[rank]]
                stage = stage_of(schedule, num_ranks, rank, step.chunk)
                first = 0 if step.kind == "F" else last
                if step.kind != "W" and stage != first:
                    line = lines.setdefault((step.kind, stage), deque())
                    if not line:
                        break
                    assert line.popleft() == step.micro  # one line a stage and direction: the order is the sender's
                if step.kind != "W" and stage != last - first:
                    following = stage + (1 if step.kind == "F" else -1)
                    lines.setdefault((step.kind, following), deque()).append(step.micro)
                at[rank], done, moved = at[rank] + 1, done + 1, True
    return done


@given(drawn())
def test_every_micro_batch_once_a_stage_without_a_deadlock(case: tuple[str, int, int, int]) -> None:
    schedule, num_ranks, num_micro, given_chunks = case
    found, chunks = tables(schedule, num_ranks, num_micro, given_chunks), num_chunks(schedule, given_chunks)
    stages = {stage_of(schedule, num_ranks, rank, chunk) for rank in range(num_ranks) for chunk in range(chunks)}
    assert stages == set(range(num_ranks * chunks))
    for table in found:
        kinds = "FBW" if schedule == "zbv" else "FB"
        wanted = Counter(itertools.product(kinds, range(num_micro), range(chunks)))
        assert Counter((step.kind, step.micro, step.chunk) for step in table) == wanted
        for micro, chunk in itertools.product(range(num_micro), range(chunks)):
            assert "".join(step.kind for step in table if (step.micro, step.chunk) == (micro, chunk)) == kinds
    assert run_with_messages(schedule, found, chunks) == sum(map(len, found))
    taken = course(schedule, found)
    assert 0 <= taken.bubble < 1
    for of_rank in taken.times:
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(of_rank))


@given(st.sampled_from(["gpipe", "1f1b", "interleaved"]), st.integers(1, 6), st.integers(1, 5), st.integers(1, 3))
def test_bubble_and_peak_are_those_of_the_formulas(schedule: str, p: int, times: int, given_chunks: int) -> None:
    m, v = p * times, num_chunks(schedule, given_chunks)
    found = course(schedule, tables(schedule, p, m, v))
    assert found.bubble == pytest.approx((p - 1) / (v * m + p - 1))
    held = {"gpipe": m, "1f1b": min(p, m), "interleaved": min((v + 1) * p - 1, v * m) / v}
    assert found.peak == held[schedule]


@pytest.mark.parametrize(
    ("schedule", "p", "m", "bubble", "peak"),
    [
        ("1f1b", 4, 8, 0.273, 4),
        ("interleaved", 4, 8, 0.158, 5.5),
        ("zbv", 4, 8, 0.059, 4),
        ("interleaved", 4, 16, 0.086, 5.5),
        ("zbv", 4, 16, 0.030, 4),
        ("1f1b", 8, 32, 0.179, 8),
        ("interleaved", 8, 32, 0.099, 11.5),
        ("zbv", 8, 32, 0.035, 8),
    ],
)
def test_figures_of_torchs_own_tables(schedule: str, p: int, m: int, bubble: float, peak: float) -> None:
    found = course(schedule, tables(schedule, p, m))
    assert (round(found.bubble, 3), found.peak) == (bubble, peak)


def test_messages_lengthen_the_way_through() -> None:
    found = tables("gpipe", 4, 8)
    assert course("gpipe", found, message=0.5).end == course("gpipe", found).end + 2 * 3 * 0.5


def test_what_cannot_be_followed_is_said() -> None:
    found = tables("1f1b", 2, 4)
    found[1].reverse()
    with pytest.raises(ValueError, match="rank 0 waits for ever"):
        course("1f1b", found)
    with pytest.raises(ValueError, match="6 micro-batches on 4 ranks"):
        tables("interleaved", 4, 6)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=7), st.data(), st.integers(0, 20), st.integers(0, 20))
def test_split_is_the_best_of_all(costs: list[int], data: st.DataObject, front: int, back: int) -> None:
    num_stages = data.draw(st.integers(1, len(costs)))

    def worst(cuts: tuple[int, ...]) -> float:
        edges = (0, *cuts, len(costs))
        sums = [sum(costs[low:high]) for low, high in itertools.pairwise(edges)]
        sums[0], sums[-1] = sums[0] + front, sums[-1] + back
        return max(sums)

    found = split(costs, num_stages, front, back)
    assert [index for stage in found for index in stage] == list(range(len(costs)))
    best = min(worst(cuts) for cuts in itertools.combinations(range(1, len(costs)), num_stages - 1))
    assert worst(tuple(stage.stop for stage in found[:-1])) == best


def test_split_refuses_more_stages_than_blocks() -> None:
    with pytest.raises(ValueError, match="3 stages of 2 blocks"):
        split([1, 1], 3)
