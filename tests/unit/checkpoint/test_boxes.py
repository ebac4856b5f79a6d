"""Checkpoints of cut tensors: whatever one layout wrote any other reads; boxes that are not the whole are refused."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distui.core.axes.cut import Cut, part_of
from distui.core.axes.tensors import take
from distui.core.checkpoint import folder as folders
from distui.core.checkpoint.files import write_file
from distui.core.checkpoint.flat import FlatShard
from distui.core.checkpoint.formats.opening import open_checkpoint
from distui.core.checkpoint.layout import INDEX, write_index, write_rank
from distui.core.checkpoint.reading import want
from distui.core.errors import UserError

Layout = tuple[str, int, int, int]
"""How tensor-parallel ranks cut (a kind), along which dimension, how many they are, and how many share each piece."""
LAYOUTS = st.tuples(
    st.sampled_from(["split", "packed", "heads", "flat"]), st.integers(0, 2), st.integers(1, 3), st.integers(1, 3)
)


def _shards(whole: torch.Tensor, layout: Layout) -> list[FlatShard]:
    """Return what each rank holds of `whole`, in the order of the ranks."""
    kind, dim, parts, num_shards = layout
    dim, shape, found = dim % whole.dim(), tuple(whole.shape), []
    for part in range(1 if kind == "flat" else parts):
        cut = None
        if kind != "flat":
            cut = Cut.split(shape, dim, parts, part, (2, shape[dim] - 2) if kind == "packed" else ())
        if kind == "heads":
            cut = Cut.heads(shape, dim, 1, parts, part)
        local = (whole if cut is None else take(whole, cut)).reshape(-1)
        for shard in range(num_shards):
            low, high = part_of(local.numel(), num_shards, shard)
            held = local[low:high] if cut is None or cut.is_owner else local[:0]
            found.append(FlatShard(held.clone(), low, whole.numel(), cut))
    return found


def _write(target: Path, shards: list[FlatShard]) -> None:
    data = folders.begin(target, 1, "0" * 8)
    parts = [write_rank(target / data, rank, {"model0.w": shard}, None, None) for rank, shard in enumerate(shards)]
    cut = {"format": folders.CUT_FORMAT} if shards[0].cut is not None else {}
    facts: dict[str, Any] = {"step": 1, "shapes": {}, "buffer_shapes": {}, "lineage": "0" * 8}
    folders.commit(target, data, write_index(target / data, parts), facts | cut)


@given(st.lists(st.integers(3, 7), min_size=1, max_size=3), LAYOUTS, LAYOUTS)
def test_any_cut_reads_what_any_other_wrote(shape: list[int], written: Layout, wanted: Layout) -> None:
    whole = torch.randn(shape)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "saved"
        _write(target, _shards(whole, written))
        checkpoint = open_checkpoint(target)
        assert torch.equal(checkpoint.tensor("model0.w"), whole.reshape(-1))
        for expected in _shards(whole, wanted):
            blank = FlatShard(torch.full_like(expected.local, torch.nan), expected.start, whole.numel(), expected.cut)
            if expected.cut is None and written[0] != "flat":
                blank = FlatShard(blank.local, expected.start, whole.numel())
            if expected.length:
                checkpoint.read([want("model0.w", blank)])
            assert torch.equal(blank.local, expected.local)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda chunks: chunks.pop(), "boxes that are not the whole"),
        (lambda chunks: chunks[0].__setitem__(2, chunks[1][2]), "boxes that are not the whole"),
        (lambda chunks: chunks[0].__setitem__(3, [99, 99]), "is not what distui writes"),
        (lambda chunks: chunks[0].__setitem__(1, 10**9), "is not what distui writes"),
    ],
)
def test_boxes_that_do_not_tile_are_refused(tmp_path: Path, change: Any, said: str) -> None:
    target = tmp_path / "saved"
    _write(target, _shards(torch.randn(4, 6), ("split", 1, 2, 1)))
    manifest = json.loads((target / "manifest.json").read_text())
    index = target / manifest["data"] / INDEX
    found = json.loads(index.read_text())
    change(found["tensors"]["model0.w"][2])
    index.unlink()
    manifest["files"][f"{manifest['data']}/{INDEX}"] = write_file(index, json.dumps(found).encode())
    (target / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=said):
        open_checkpoint(target)
