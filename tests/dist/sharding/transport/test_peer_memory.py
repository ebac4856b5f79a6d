"""Collectives through the peers' memory against torch's own, and what happens where it cannot be read."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from distui.core.sharding.transport import peer_memory
from distui.core.sharding.transport.peer_memory import PeerMemory
from distui.core.sharding.transport.transport import Transport
from distui.core.sharding.units.pool import BufferPool

if TYPE_CHECKING:
    from tests.dist.rank_pool import RunRanks


def _threads() -> int:
    return sum(thread.name == "distui-peer-memory" for thread in threading.enumerate())


def _collectives() -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    group = dist.new_group(list(range(ranks)))
    assert group is not None
    others = set(threading.enumerate())
    before = _threads()
    transport = Transport(group, "test", BufferPool())
    transport.min_read_bytes = 0
    pending, expected, found = [], [], []
    # All in flight at once, over the sizes at which the reading thread's pieces begin and end.
    for size in (1, 7, (1 << 15) - 1, 1 << 15, (1 << 16) + 5):
        for dtype in (torch.float32, torch.bfloat16):
            each = [
                torch.randn(size * ranks, generator=torch.Generator().manual_seed(r)).to(dtype) for r in range(ranks)
            ]
            order = [(rank + hop) % ranks for hop in range(ranks)]
            mine = [one.view(ranks, size)[rank] for one in (each[r] for r in order)]
            total = mine[0] + mine[1]
            for more in mine[2:]:
                total += more
            shard = torch.full((size,), 2.0, dtype=dtype)
            added = 2.0 + mine[0]
            for more in mine[1:]:
                added += more
            inside, whole = each[rank].clone(), each[rank][: size * ranks - 1].clone()
            gathered = torch.empty(size * ranks, dtype=dtype)
            pending += [
                transport.reduce_scatter(each[rank].clone(), shard, accumulate=True),
                transport.reduce_scatter(inside, inside.view(ranks, size)[rank]),
                transport.sum_gradient(whole),
                transport.gather_weights(gathered, torch.full((size,), float(rank), dtype=dtype)),
            ]
            found.append((shard, inside.view(ranks, size)[rank], whole, gathered))
            numbers = torch.arange(ranks, dtype=dtype).repeat_interleave(size)
            expected.append((added, total, torch.stack(each).sum(0)[: whole.numel()], numbers))
    for one in pending:
        one.wait()
        one.wait()
    for sums, exact in zip(found, expected, strict=True):
        for index, (have, want) in enumerate(zip(sums, exact, strict=True)):
            if index == 2:
                torch.testing.assert_close(have, want, rtol=2e-2 if have.dtype == torch.bfloat16 else 1e-5, atol=2e-2)
                same = have.float()
                dist.broadcast(same, 0)
                assert torch.equal(same, have.float()), "all ranks hold the same bits"
            else:
                assert torch.equal(have, want)
    assert len([one for one in set(threading.enumerate()) - others if one.name == "distui-peer-memory"]) == 1
    dist.destroy_process_group(group)
    del transport, group, pending, one
    for thread in set(threading.enumerate()) - others:
        if thread.name == "distui-peer-memory":
            thread.join(120)
    assert _threads() <= before, "earlier tests' threads may end meanwhile, and none is new"


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_sums_and_gathers_are_exact_and_leave_no_thread(run_ranks: RunRanks, num_ranks: int) -> None:
    run_ranks(_collectives, num_ranks)


def _one_cannot_read() -> None:
    def refused(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    group = dist.new_group([0, 1])
    assert group is not None
    with mock.patch.object(peer_memory, "_read", refused if dist.get_rank() == 1 else peer_memory._read):
        assert PeerMemory.of(group) is None
    transport = Transport(group, "test", BufferPool())
    transport.min_read_bytes = 0
    numbers = torch.arange(10.0)
    transport.sum_gradient(numbers).wait()
    assert torch.equal(numbers, torch.arange(10.0) * 2)
    dist.destroy_process_group(group)


def test_all_take_sockets_where_one_may_not_read(run_ranks: RunRanks) -> None:
    run_ranks(_one_cannot_read, 2)


def _gone() -> str:
    group = dist.new_group([0, 1])
    assert group is not None
    memory = PeerMemory.of(group)
    assert memory is not None
    tensor = torch.zeros(8)
    gone = mock.Mock(side_effect=ProcessLookupError(3, "No such process"))
    with mock.patch.object(peer_memory, "_read", gone), pytest.raises(ProcessLookupError, match="No such process"):
        memory.all_reduce(tensor).wait()
    dist.destroy_process_group(group)
    return "raised"


def test_what_fails_on_the_reading_thread_is_raised_where_it_is_waited_for(run_ranks: RunRanks) -> None:
    assert run_ranks(_gone, 2) == ["raised", "raised"]


def _profiled(min_read_bytes: int) -> tuple[set[str], list[float]]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    group = dist.group.WORLD
    assert group is not None
    transport = Transport(group, "test", BufferPool())
    transport.min_read_bytes = min_read_bytes
    full, spent = torch.empty(1000 * ranks), torch.full((1000 * ranks,), float(rank))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        transport.reduce_scatter(spent, spent.view(ranks, -1)[rank]).wait()
        pending = transport.all_gather(full, torch.full((1000,), float(rank)))
    pending.wait()  # after the end, as weights are that were on their way between two steps
    return {event.name for event in profile.events()}, full[::1000].tolist()


@pytest.mark.parametrize("min_read_bytes", [0, 1 << 60], ids=["memory", "sockets"])
def test_a_profile_may_end_while_weights_are_on_their_way(run_ranks: RunRanks, min_read_bytes: int) -> None:
    for names, full in run_ranks(_profiled, 2, min_read_bytes):
        assert full == [0.0, 1.0]
        # Sends and receives that end after the profile would write into what it has freed.
        assert "distui: wait for test" in names and not {name for name in names if "recv" in name or "send" in name}
