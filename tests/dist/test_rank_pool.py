"""The shared fixture itself: results by rank, exceptions, hangs, fresh groups."""

from __future__ import annotations

import dataclasses
import os
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist

from distui.core.sharding.units import partition

if TYPE_CHECKING:
    from tests.dist.rank_pool import RunRanks


@dataclasses.dataclass
class Answer:
    rank: int
    total: torch.Tensor


def _sum_of_ranks(scale: float) -> Answer:
    total = torch.tensor([float(dist.get_rank())])
    dist.all_reduce(total)
    return Answer(int(os.environ["RANK"]), total * scale)


def _alone() -> tuple[bool, str]:
    return dist.is_initialized(), os.environ["WORLD_SIZE"]


def _one_raises() -> None:
    if dist.get_rank() == 1:
        raise KeyError("of rank 1")
    dist.barrier()


def _one_stays_away() -> None:
    if dist.get_rank() == 0:
        dist.barrier()
    threading.Event().wait()


def _one_dies() -> None:
    if dist.get_rank() == 1:
        os._exit(7)
    dist.barrier()


def _constant(value: int | None) -> int:
    if value is not None:
        partition.SMALL_UNIT_NUMEL = value
    return partition.SMALL_UNIT_NUMEL


@pytest.mark.parametrize("world_size", [2, 3])
def test_each_ranks_result_comes_back(run_ranks: RunRanks, world_size: int) -> None:
    answers = run_ranks(_sum_of_ranks, world_size, 2.0)
    assert [answer.rank for answer in answers] == list(range(world_size))
    assert all(answer.total.item() == world_size * (world_size - 1) for answer in answers)


def test_one_rank_has_no_group(run_ranks: RunRanks) -> None:
    assert run_ranks(_alone, 1) == [(False, "1")]


def test_a_constant_that_a_call_sets_is_as_before_in_the_next(run_ranks: RunRanks) -> None:
    assert run_ranks(_constant, 1, 3) == [3]
    assert run_ranks(_constant, 2, None) == [partition.SMALL_UNIT_NUMEL] * 2


def test_an_exception_comes_back_with_its_traceback(run_ranks: RunRanks) -> None:
    with pytest.raises(KeyError, match="of rank 1") as caught:
        run_ranks(_one_raises, 2)
    assert "_one_raises" in str(caught.value.__cause__)
    assert len(run_ranks(_sum_of_ranks, 2, 1.0)) == 2, "a failure must leave a pool that works"


def test_a_hang_is_killed_and_shows_its_stacks(run_ranks: RunRanks) -> None:
    timeout = sys.modules["tests.dist.rank_pool"].RankTimeout
    with pytest.raises(timeout, match="_one_stays_away"):
        run_ranks(_one_stays_away, 2, timeout_s=1.5)


def test_a_dead_rank_is_named(run_ranks: RunRanks) -> None:
    with pytest.raises(ChildProcessError, match="rank 1 died with status 7"):
        run_ranks(_one_dies, 2)


def _pid() -> int:
    return os.getpid()


def _not_found_at_first(folder: str) -> int:
    began = Path(folder) / f"began.{dist.get_rank()}"
    if not began.exists():
        began.touch()
        raise ConnectionAbortedError("as where the ranks do not find each other")
    return os.getpid()


def test_ranks_that_do_not_find_each_other_are_started_anew(run_ranks: RunRanks, tmp_path: Path) -> None:
    before = run_ranks(_pid, 2)
    assert set(run_ranks(_not_found_at_first, 2, str(tmp_path))).isdisjoint(before)
