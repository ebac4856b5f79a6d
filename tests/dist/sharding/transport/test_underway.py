"""What a script drops while it travels neither stops what comes after, nor writes to memory that is another's."""

from __future__ import annotations

import gc
import weakref
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist

from distui.core.sharding.transport.transport import Transport
from distui.core.sharding.transport.underway import Underway
from distui.core.sharding.units.pool import BufferPool

if TYPE_CHECKING:
    from tests.dist.rank_pool import RunRanks

KINDS = ("all_gather", "reduce_scatter", "all_to_all", "sum_gradient")


def _dropped(kind: str, numel: int) -> None:
    rank = dist.get_rank()
    group = dist.new_group([0, 1], timeout=timedelta(seconds=10))
    assert group is not None
    transport, store = Transport(group, "test", BufferPool()), dist.distributed_c10d._get_default_store()
    transport.sum_gradient(torch.zeros(2 * numel)).wait()  # whether ranks can read each other is known from here on
    full, shard = torch.full((2 * numel,), float(rank + 1)), torch.full((numel,), float(rank + 1))

    def begin() -> object:
        if kind == "sum_gradient":
            return transport.sum_gradient(full)
        if kind == "all_to_all":
            return transport.all_to_all(torch.empty(2, numel), full.view(2, numel))
        return getattr(transport, kind)(full, shard)

    if rank == 0:
        begin()  # and nobody keeps it
        gc.collect()
        store.set("dropped", "")
    else:
        store.wait(["dropped"])
        begin()
        gc.collect()
    told = torch.ones(3)
    dist.all_reduce(told, group=group)
    assert told.tolist() == [2.0] * 3
    again = torch.zeros(2 * numel)
    next_one = Transport(group, "test", BufferPool())
    next_one.all_gather(again, torch.full((numel,), float(rank + 5))).wait()
    assert again[0] == 5.0 and again[-1] == 6.0
    assert not Underway.of(group)._held, "the memory of what was dropped is free"
    gone = weakref.ref(group)
    dist.destroy_process_group(group)
    del transport, next_one, group, begin
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("numel", [5, 1 << 16], ids=["messages", "memory"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_dropped_under_way_stops_nothing(run_ranks: RunRanks, kind: str, numel: int) -> None:
    run_ranks(_dropped, 2, kind, numel)
