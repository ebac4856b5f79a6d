"""Offsets of flat buffers, by property."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from distui.core.sharding.units.layout import ALIGNMENT, FlatLayout, plan_layout

SHAPES = st.lists(st.lists(st.integers(1, 40), max_size=3).map(tuple), min_size=1, max_size=12)


def _layout(shapes: list[tuple[int, ...]], num_shards: int) -> FlatLayout:
    return plan_layout([(f"p{index}", shape) for index, shape in enumerate(shapes)], num_shards)


@given(SHAPES, st.integers(1, 9))
def test_parameters_do_not_overlap_and_shards_cover_everything(shapes: list[tuple[int, ...]], num_shards: int) -> None:
    layout = _layout(shapes, num_shards)
    end = 0
    for span in layout.spans:
        assert span.offset >= end and span.offset % ALIGNMENT == 0
        end = span.end
    assert layout.padded_numel >= end
    assert layout.shard_numel * num_shards == layout.padded_numel
    assert layout.shard(num_shards - 1)[1] == layout.padded_numel


@given(SHAPES, st.integers(1, 9))
def test_every_element_has_one_owner(shapes: list[tuple[int, ...]], num_shards: int) -> None:
    layout = _layout(shapes, num_shards)
    for index, span in enumerate(layout.spans):
        parts = [layout.owned(index, rank) for rank in range(num_shards)]
        owned = [element for low, high in parts for element in range(low, high)]
        assert owned == list(range(span.numel))


@given(SHAPES, st.integers(1, 5), st.data())
def test_runs_hold_the_wanted_elements_and_only_padding_beside(
    shapes: list[tuple[int, ...]], num_shards: int, data: st.DataObject
) -> None:
    layout = _layout(shapes, num_shards)
    wanted = data.draw(st.sets(st.integers(0, len(shapes) - 1)))
    owner = {}
    for index, span in enumerate(layout.spans):
        owner.update(dict.fromkeys(range(span.offset, span.end), index))
    covered: set[int] = set()
    for rank in range(num_shards):
        base, end = layout.shard(rank)
        for low, high in layout.runs(wanted, rank):
            assert 0 <= low < high <= end - base
            elements = range(base + low, base + high)
            assert covered.isdisjoint(elements)
            covered.update(elements)
    assert {element for element, index in owner.items() if index in wanted} <= covered
    assert all(owner.get(element, next(iter(wanted), None)) in wanted for element in covered)
