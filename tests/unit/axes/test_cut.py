"""A `Cut` against plain indexing: ranges of all ranks put together are the whole, each element once."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distui.core.axes.cut import Cut, flat_boxes, part_of
from distui.core.axes.tensors import put, take


@st.composite
def cuts(draw: st.DrawFn) -> list[Cut]:
    """Draw the cuts of all ranks of one axis, or two, over a random tensor."""
    shape = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    dim, parts = draw(st.integers(0, len(shape) - 1)), draw(st.integers(1, 4))
    packed = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    kind = draw(st.sampled_from(["plain", "packed", "heads", "whole", "twice"]))
    if kind == "whole":
        return [Cut.whole(shape, rank, parts) for rank in range(parts)]
    if kind == "heads":
        num_heads = draw(st.sampled_from([heads for heads in (1, 2, 4) if heads % parts == 0 or parts % heads == 0]))
        shape[dim] = num_heads * draw(st.integers(1, 3))
        return [Cut.heads(shape, dim, num_heads, parts, rank) for rank in range(parts)]
    if kind == "packed":
        shape[dim] = sum(packed)
        return [Cut.split(shape, dim, parts, rank, packed) for rank in range(parts)]
    found = [Cut.split(shape, dim, parts, rank) for rank in range(parts)]
    if kind == "twice" and len(shape) > 1:
        other = (dim + 1) % len(shape)
        halves = [part_of(shape[other], 2, half) for half in range(2)]
        return [cut.with_pieces(other, ((low, high - low),)) for cut in found for low, high in halves]
    return found


@given(cuts(), st.data())
def test_ranges_of_all_ranks_put_together_are_the_whole(ranks: list[Cut], data: st.DataObject) -> None:
    shape = ranks[0].shape
    whole = torch.arange(math.prod(shape)).view(shape)
    seen = torch.zeros_like(whole)
    again = torch.full_like(whole, -1)
    for cut in ranks:
        local = take(whole, cut)
        assert local.shape == cut.local_shape and local.numel() == cut.local_numel
        num_shards = data.draw(st.integers(1, 4))
        for shard in range(num_shards):  # as ZeRO cuts the flat local tensor
            low, high = part_of(cut.local_numel, num_shards, shard)
            flat = local.reshape(-1)[low:high].clone()
            numel = 0
            for box in cut.boxes(low, high):
                place = tuple(slice(begin, begin + length) for begin, length in zip(box.start, box.size, strict=True))
                values = flat.as_strided(box.size, box.strides, box.at)
                assert torch.equal(whole[place], values)
                again[place] = values
                seen[place] += cut.is_owner
                numel += box.numel
            assert numel == high - low
    assert torch.equal(again, whole) and bool((seen == 1).all())


@given(cuts())
def test_what_is_taken_can_be_put_back(ranks: list[Cut]) -> None:
    whole = torch.randn(ranks[0].shape)
    again = torch.full_like(whole, math.nan)
    for cut in ranks:
        put(take(whole, cut), cut, again)
    assert torch.equal(again, whole)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.data())
def test_a_flat_range_is_few_boxes(shape: list[int], data: st.DataObject) -> None:
    numel = math.prod(shape)
    low = data.draw(st.integers(0, numel))
    high = data.draw(st.integers(low, numel))
    found = list(flat_boxes(shape, low, high))
    assert len(found) <= 2 * len(shape) - 1
    whole = torch.arange(numel).view(shape)
    parts = [whole[tuple(map(slice, *box))].reshape(-1) for box in found]
    assert torch.cat([torch.arange(0), *parts]).tolist() == list(range(low, high))


def test_what_a_cut_says() -> None:
    fused = Cut.split((4, 24), 1, 2, 1, packed=(8, 8, 8))
    assert fused.pieces[1] == ((4, 4), (12, 4), (20, 4)) and fused.local_shape == (4, 12) and not fused.is_whole
    shared = [Cut.heads((8, 3), 0, 2, 4, rank) for rank in range(4)]
    assert [cut.pieces[0] for cut in shared] == [((0, 4),), ((0, 4),), ((4, 4),), ((4, 4),)]
    assert [cut.is_owner for cut in shared] == [True, False, True, False] and shared[0].num_copies == 2
    assert Cut.whole((3, 5), 1, 2).is_whole and Cut.split((5,), 0, 1, 0, packed=(2, 3)).is_whole
    assert [Cut.split((7,), 0, 3, rank).local_shape for rank in range(3)] == [(3,), (2,), (2,)]
    with pytest.raises(ValueError, match="3 heads of 12 elements on 2 ranks"):
        Cut.heads((12, 2), 0, 3, 2, 0)
    with pytest.raises(ValueError, match="are 5 in all, dimension 0 has 6"):
        Cut.split((6,), 0, 2, 0, packed=(2, 3))
