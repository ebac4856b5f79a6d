"""Writes a snapshot of the training to a folder: all ranks together, sealed and renamed by rank 0 at the end.

Nothing here touches the training: it may run on a thread of its own, and its collectives go over a group of their own.
"""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.storage import WriteResult

from distui.core.checkpoint import folder as folders
from distui.core.checkpoint import rotation
from distui.core.checkpoint.flat import FlatShard
from distui.core.errors import UserError


@dataclass(slots=True)
class Snapshot:
    """What one rank writes."""

    target: Path
    rank: int
    items: dict[str, torch.Tensor]
    random: bytes
    common: bytes
    """The states that all ranks share, serialised; rank 0 writes them."""
    facts: dict[str, object]
    keep: int | None
    """Newest checkpoints beside `target` that stay; None deletes nothing."""

    @property
    def nbytes(self) -> int:
        """Bytes that this rank writes, about."""
        items = self.items.values()
        tensors = sum(item.local_bytes if isinstance(item, FlatShard) else item.nbytes for item in items)
        return tensors + len(self.random) + len(self.common)


class _Failed(Exception):
    """A rank could not do its part; all ranks raise it."""


def write(snapshot: Snapshot, group: dist.ProcessGroup | None) -> None:
    """Write `snapshot` with the other ranks of `group`. Collective.

    Raises: UserError on every rank where one of them could not write; what was at the target stays.
    """
    working = folders.working_folder(snapshot.target)
    try:
        _write(snapshot, working, group)
    except _Failed as error:
        # Every rank has told how it went, so none is writing any more.
        if snapshot.rank == 0:
            shutil.rmtree(working, ignore_errors=True)
        raise _user_error(snapshot, str(error)) from None


def _write(snapshot: Snapshot, working: Path, group: dist.ProcessGroup | None) -> None:
    # The steps of torch.distributed.checkpoint.save, of which that makes four collectives by names that are looked up
    # in a registry: it would write half a checkpoint, and call it whole, where a script destroys the process groups
    # while a thread saves.
    main = snapshot.rank == 0
    planner = dcp.DefaultSavePlanner()
    writer = dcp.FileSystemWriter(working, sync_files=False)  # `describe` does that

    def make_folder() -> None:
        if main:
            shutil.rmtree(working, ignore_errors=True)
            working.mkdir(parents=True)

    def plan() -> dcp.SavePlan:
        writer.reset(working)
        planner.set_up_planner(snapshot.items, writer.storage_meta(), main)
        return writer.prepare_local_plan(planner.create_local_plan())

    def write_own() -> tuple[list[WriteResult], dict[str, dict[str, int]]]:
        own = {f"rank{snapshot.rank}.pt": snapshot.random}
        if main:
            own["state.pt"] = snapshot.common
        for name, content in own.items():
            (working / name).write_bytes(content)
        written = writer.write_data(planner.finish_plan(global_plans[snapshot.rank]), planner).wait()
        names = [*own, *(path.name for path in working.glob(f"__{snapshot.rank}_*.distcp"))]
        return written, folders.describe(working, names)

    def commit() -> None:
        if not main:
            return
        writer.finish(metadata, [written for written, _ in parts])
        files = {name: fact for _, described in parts for name, fact in described.items()}
        files |= folders.describe(working, [".metadata"])
        folders.commit(snapshot.target, files, snapshot.facts)
        if snapshot.keep is not None:
            rotation.keep_newest(snapshot.target.parent, snapshot.keep)

    _together(make_folder, group)
    plans = _together(plan, group)
    # Every rank comes to the same: that is less to wait for than rank 0's answer.
    global_plans, metadata = planner.create_global_plan(plans)
    global_plans = writer.prepare_global_plan(global_plans)
    parts = _together(write_own, group)
    _together(commit, group)


def _together(act: Callable[[], Any], group: dist.ProcessGroup | None) -> list[Any]:
    """Run `act`, and return what every rank's returned; raise on all ranks where one of them fails. Collective."""
    result: Any = None
    problem = ""
    bug: Exception | None = None
    try:
        result = act()
    except OSError as error:
        problem = str(error)
    except Exception as error:  # noqa: BLE001 - raised below, once the others know that nothing follows
        problem, bug = f"{type(error).__name__}: {error}", error
    outcomes = _exchange((result, problem), group)
    if bug is not None and not _is_write_error(bug):
        raise bug
    problems = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(outcomes) if text]
    if problems:
        raise _Failed("; ".join(problems))
    return [result for result, _ in outcomes]


def _is_write_error(error: Exception) -> bool:
    # torch.save's archive writer hides what the file system said.
    return isinstance(error, RuntimeError) and "PytorchStreamWriter" in str(error)


def _exchange(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """Return every rank's `value`, by rank. Collective.

    By the group's own methods: they work on when the groups are destroyed under a thread that saves.
    """
    if group is None:
        return [value]
    content = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(group.size())]
    group.allgather([sizes], [torch.tensor([content.numel()])]).wait()
    longest = int(max(size.item() for size in sizes))
    padded = torch.cat([content, torch.zeros(longest - content.numel(), dtype=torch.uint8)])
    contents = [torch.empty(longest, dtype=torch.uint8) for _ in sizes]
    group.allgather([contents], [padded]).wait()
    return [
        pickle.loads(content[: int(size.item())].numpy().tobytes())
        for content, size in zip(contents, sizes, strict=True)
    ]


def _user_error(snapshot: Snapshot, why: str) -> UserError:
    existing = next(path for path in (snapshot.target, *snapshot.target.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    return UserError(
        f"the checkpoint {snapshot.target} was not written",
        f"{why} (this rank writes {snapshot.nbytes:,} bytes; {free:,} are free at {existing})",
        "free space there, or choose another checkpoint.dir; earlier checkpoints are as they were",
    )
