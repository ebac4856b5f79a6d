"""Writes a snapshot of the training to a folder: all ranks together, put in place by rank 0 at the end.

Nothing here touches the training: it may run on a thread of its own, and its collectives go over a group of their own.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from distui.core.checkpoint import folder as folders
from distui.core.checkpoint import rotation
from distui.core.checkpoint.flat import FlatShard
from distui.core.checkpoint.layout import write_index, write_rank
from distui.core.checkpoint.plain import Plain
from distui.core.checkpoint.together import Failed, together
from distui.core.errors import UserError

SMALL_BYTES = 4096
"""Up to here a tensor that several ranks hold whole is written by each of them: cheaper than to agree on one."""


@dataclass(slots=True)
class Snapshot:
    """What one rank writes."""

    target: Path
    rank: int
    items: Mapping[str, Any]
    """By key: ranges of tensors, whole ones, and numbers."""
    own: Plain
    """States of this rank alone."""
    common: Plain | None
    """The states that all ranks share; rank 0 writes them."""
    facts: dict[str, Any]
    keep: int | None
    """Newest checkpoints of this run beside `target` that stay; None removes nothing."""
    in_memory: bool = False
    on_disk: bool = True

    @property
    def nbytes(self) -> int:
        """Bytes that this rank writes, about."""
        tensors = [item for item in self.items.values() if isinstance(item, torch.Tensor)]
        return sum(item.local_bytes if isinstance(item, FlatShard) else item.nbytes for item in tensors)

    def large(self) -> list[str]:
        """Return the whole tensors of which one rank's copy is enough."""
        return sorted(
            key
            for key, item in self.items.items()
            if isinstance(item, torch.Tensor) and not isinstance(item, FlatShard) and item.nbytes > SMALL_BYTES
        )

    def items_of(self, begun: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return what this rank writes; `begun` has, by rank, what of `large` each holds."""
        owner: dict[str, int] = {}
        for rank, found in enumerate(begun):
            for key in found["large"]:
                owner.setdefault(key, rank)
        return {key: item for key, item in self.items.items() if owner.get(key, self.rank) == self.rank}


def form_of(parts: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Return what the manifest must say of the format of what the ranks wrote."""
    is_cut = any(len(chunk) > 6 for part in parts for chunk in part["chunks"])
    return {"format": folders.CUT_FORMAT} if is_cut else {}


def write(snapshot: Snapshot, group: dist.ProcessGroup | None) -> None:
    """Write `snapshot` with the other ranks of `group`. Collective.

    Raises: UserError on every rank where one of them could not write; what was at the target stays.
    """
    target, main = snapshot.target, snapshot.rank == 0
    made = not target.exists()
    lineage = str(snapshot.facts["lineage"])
    data = ""

    def begin() -> dict[str, Any]:
        data = folders.begin(target, snapshot.facts["step"], lineage) if main else ""
        return {"data": data, "large": snapshot.large()}

    def write_own() -> dict[str, Any]:
        if not (target / data).is_dir():
            raise UserError(
                f"rank {snapshot.rank} does not see the folder that rank 0 has made",
                f"{target / data} is not there",
                "save to a folder that all nodes share, by the same path on all ranks",
            )
        items = snapshot.items_of(begun)
        return write_rank(target / data, snapshot.rank, items, snapshot.own, snapshot.common if main else None)

    def commit() -> None:
        if main:
            folders.commit(target, data, write_index(target / data, parts), snapshot.facts | form_of(parts))
            if snapshot.keep is not None:
                rotation.keep_newest(target.parent, snapshot.keep, lineage)

    try:
        begun = together(begin, group)
        data = begun[0]["data"]
        parts = together(write_own, group)
        together(commit, group)
    except Exception as error:
        # Every rank has told how it went, so none is writing any more.
        if main and data:
            folders.abandon(target, data, made)
        if isinstance(error, Failed):
            raise _user_error(snapshot, str(error)) from None
        raise


def _user_error(snapshot: Snapshot, why: str) -> UserError:
    existing = next(path for path in (snapshot.target, *snapshot.target.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    return UserError(
        f"the checkpoint {snapshot.target} was not written",
        f"{why} (this rank writes {snapshot.nbytes:,} bytes; {free:,} are free at {existing})",
        "free space there, or choose another checkpoint.dir; earlier checkpoints are as they were",
    )
