"""Lays a checkpoint out for another number of ranks, in one process and without a model.

Any number of ranks loads any checkpoint, so nobody must do this to go on training. It is for tools that expect one file
a rank, and for reading faster: each of N ranks then finds what it needs in about one file.
"""

from __future__ import annotations

import shutil
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from distui.core.checkpoint import folder as folders
from distui.core.checkpoint.flat import FlatShard
from distui.core.errors import UserError


def reshard(source: Path, target: Path, num_ranks: int, stage: int | None = None) -> dict[str, Any]:
    """Write what is in `source` to `target` as `num_ranks` ranks would, bit for bit; return the new manifest's facts.

    Each kind of state (weights, each optimizer state) is cut into `num_ranks` equal parts, laid end to end. One rank's
    part is in memory at a time. `stage` is what the manifest then tells; None keeps it.

    Raises: UserError where `source` is no whole checkpoint, or there is something at `target`.
    """
    source = folders.find(source)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is there already", "nothing is overwritten", "name a new or an empty folder")
    manifest = folders.verify(source)
    working = folders.working_folder(target)
    shutil.rmtree(working, ignore_errors=True)
    working.mkdir(parents=True)
    try:
        return _write(source, target, working, manifest, num_ranks, stage)
    except BaseException:
        shutil.rmtree(working, ignore_errors=True)
        raise


def _write(
    source: Path, target: Path, working: Path, manifest: dict[str, Any], num_ranks: int, stage: int | None
) -> dict[str, Any]:
    saved = dcp.FileSystemReader(source).read_metadata().state_dict_metadata
    tensors = {key: meta for key, meta in saved.items() if isinstance(meta, TensorStorageMetadata)}
    ranges = _ranges({key: meta.size.numel() for key, meta in tensors.items() if len(meta.size) == 1}, num_ranks)
    writer = dcp.FileSystemWriter(working, sync_files=False)
    planners, plans = [], []
    for rank in range(num_ranks):
        # Sizes are enough to plan with: memory is only touched when a part is read.
        planner = dcp.DefaultSavePlanner()
        writer.reset(working)
        planner.set_up_planner(_items(tensors, ranges, rank), writer.storage_meta(), rank == 0)
        plans.append(writer.prepare_local_plan(planner.create_local_plan()))
        planners.append(planner)
    global_plans, metadata = planners[0].create_global_plan(plans)
    global_plans = writer.prepare_global_plan(global_plans)
    written = []
    for rank, planner in enumerate(planners):
        items = _items(tensors, ranges, rank)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch.distributed is disabled, unavailable or uninit.*")
            warnings.filterwarnings("ignore", message=".*TypedStorage is deprecated.*")
            dcp.load(dict(items), checkpoint_id=source, no_dist=True)
        planner.set_up_planner(items, writer.storage_meta(), rank == 0)
        written.append(writer.write_data(planner.finish_plan(global_plans[rank]), planner).wait())
        planner.set_up_planner({}, writer.storage_meta(), rank == 0)  # it would keep the part in memory
    writer.finish(metadata, written)
    for name in ["state.pt", *(f"rank{rank}.pt" for rank in range(num_ranks))]:
        # A rank that was not there before has no random state to go on from; it keeps its own.
        if (source / name).exists():
            shutil.copyfile(source / name, working / name)
    facts = {key: value for key, value in manifest.items() if key not in ("files", "format")}
    facts |= {"world_size": num_ranks, "zero_stage": manifest["zero_stage"] if stage is None else stage}
    folders.commit(target, folders.describe(working, sorted(path.name for path in working.iterdir())), facts)
    return facts


def _kind(key: str) -> str:
    prefix, _, name = key.partition(".")
    return f"{prefix}.{name.rpartition('.')[2]}" if prefix.startswith("optimizer") else prefix


def _ranges(sizes: dict[str, int], num_ranks: int) -> dict[str, list[tuple[int, int]]]:
    """Return for each tensor of so many elements the range of each rank."""
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


def _items(
    tensors: dict[str, TensorStorageMetadata], ranges: dict[str, list[tuple[int, int]]], rank: int
) -> dict[str, torch.Tensor]:
    """Return room for what `rank` writes; rank 0 writes what is not flat."""
    items: dict[str, torch.Tensor] = {}
    for key, meta in tensors.items():
        dtype = meta.properties.dtype
        if key in ranges:
            low, high = ranges[key][rank]
            if low < high:
                items[key] = FlatShard(torch.empty(high - low, dtype=dtype), low, meta.size.numel())
        elif rank == 0:
            items[key] = torch.empty(meta.size, dtype=dtype)
    return items
