"""Lays a checkpoint out for another number of ranks, in one process and without a model.

Any number of ranks loads any checkpoint, so nobody must do this to go on training. It is for tools that expect one file
a rank, and for reading faster: each of N ranks then finds what it needs in about one file.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from distui.core.checkpoint import folder as folders
from distui.core.checkpoint.flat import FlatShard
from distui.core.checkpoint.formats.opening import open_checkpoint
from distui.core.checkpoint.layout import Entry, write_index, write_rank
from distui.core.checkpoint.plain import Plain
from distui.core.checkpoint.reading import want
from distui.core.errors import UserError


def reshard(source: Path, target: Path, num_ranks: int, stage: int | None = None) -> dict[str, Any]:
    """Write what is in `source` to `target` as `num_ranks` ranks would, bit for bit; return the new manifest's facts.

    Each kind of state (weights, each optimizer state) is cut into `num_ranks` equal parts, laid end to end. One rank's
    part is in memory at a time. `stage` is what the manifest then tells; None keeps it.

    Raises: UserError where `source` is no whole checkpoint, or there is something at `target`.
    """
    checkpoint = open_checkpoint(source)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is there already", "nothing is overwritten", "name a new or an empty folder")
    manifest = folders.verify(checkpoint.folder)
    facts = {key: value for key, value in manifest.items() if key not in ("files", "format", "data")}
    facts |= {"world_size": num_ranks, "data_ranks": num_ranks}
    facts |= {"zero_stage": manifest["zero_stage"] if stage is None else stage}
    made = not target.exists()
    data = folders.begin(target, manifest["step"], str(manifest.get("lineage", "0" * 8)))
    try:
        ranges = _ranges(checkpoint.entries, num_ranks)
        common = Plain(checkpoint.common(), "the common state")
        parts = []
        for rank in range(num_ranks):
            items = _items(checkpoint.entries, ranges, rank)
            tensors = {key: item for key, item in items.items() if isinstance(item, torch.Tensor)}
            checkpoint.read(want(key, item) for key, item in tensors.items())
            # A rank that was not there before has no random state to go on from; it keeps its own.
            before = rank * checkpoint.ranks_of_a_batch
            own = Plain(checkpoint.own(before), f"rank {before}'s state") if checkpoint.has_rank(before) else None
            parts.append(write_rank(target / data, rank, items, own, common if rank == 0 else None))
        files = write_index(target / data, parts)
        folders.commit(target, data, files, facts)
    except BaseException:
        folders.abandon(target, data, made)
        raise
    return {**facts, "bytes": sum(fact["bytes"] for fact in files.values())}


def _kind(key: str) -> str:
    prefix, _, name = key.partition(".")
    return f"{prefix}.{name.rpartition('.')[2]}" if prefix.startswith("optimizer") else prefix


def _ranges(entries: dict[str, Entry], num_ranks: int) -> dict[str, list[tuple[int, int]]]:
    """Return for each flattened tensor the range of each rank."""
    sizes = {key: entry.size.numel() for key, entry in entries.items() if len(entry.size) == 1}
    kinds: dict[str, list[str]] = defaultdict(list)
    for key in sizes:
        kinds[_kind(key)].append(key)
    ranges: dict[str, list[tuple[int, int]]] = {}
    for keys in kinds.values():
        total, at = sum(sizes[key] for key in keys), 0
        for key in keys:
            cuts = [min(max(total * rank // num_ranks - at, 0), sizes[key]) for rank in range(num_ranks + 1)]
            ranges[key] = [(cuts[rank], cuts[rank + 1]) for rank in range(num_ranks)]
            at += sizes[key]
    return ranges


def _items(entries: dict[str, Entry], ranges: dict[str, list[tuple[int, int]]], rank: int) -> dict[str, Any]:
    """Return room for what `rank` writes; rank 0 writes what is not flat."""
    items: dict[str, Any] = {}
    for key, entry in entries.items():
        if key in ranges:
            low, high = ranges[key][rank]
            if low < high:
                items[key] = FlatShard(torch.empty(high - low, dtype=entry.dtype), low, entry.size.numel())
        elif rank == 0:
            items[key] = entry.number if entry.number is not None else torch.empty(entry.size, dtype=entry.dtype)
    return items
