"""Collectives between CPU ranks of one host that read each other's memory: one copy in place of a socket's two.

Linux lets a process read the memory of another of the same user (process_vm_readv, or cross memory attach). A rank
tells its peers by a short message where its buffer lies; a thread of each rank reads what it needs as soon as the
peers are ready, whatever their main threads do, and tells them when it has read, so that they may write again:

    all-gather      address ──>   read the peer's shard                              ──> done
    reduce-scatter  address ──>   read the peer's piece of my shard, add, repeat     ──> done
    sum             address ──>   as a reduce-scatter, then "summed" ──> as an all-gather ──> done

Messages go over the group's gloo connections, so that a rank that dies ends the wait of the others.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import queue
import secrets
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from distui.core.sharding.transport.profiling import hidden_from_profiler
from distui.core.telemetry.collectives import quiet

_TAG_ADDRESS, _TAG_SUMMED, _TAG_DONE = 7_011, 7_012, 7_013
_PR_SET_PTRACER = 0x59616D61
_PIECE_NUMEL = 1 << 15
"""Elements that are read and added at a time: they stay in the cache, and torch adds so few on one thread."""


OnEnd = Callable[[], None] | None
"""Called on the reading thread when this rank's part of a collective is over."""


class _Range(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("nbytes", ctypes.c_size_t))


def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    read = libc.process_vm_readv
    read.restype = ctypes.c_ssize_t
    read.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong]
    return libc


class Reading:
    """A collective in flight; like a Work of torch.distributed, `wait` returns when its result is there."""

    __slots__ = ("_ended", "_error", "_kept", "_on_end", "_peers_done", "_run")

    def __init__(self, run: Callable[[], None], peers_done: list[Any], kept: list[Any], on_end: OnEnd) -> None:
        self._run, self._peers_done, self._kept, self._on_end = run, peers_done, kept, on_end
        self._error: BaseException | None = None
        self._ended = threading.Event()

    def is_completed(self) -> bool:
        """Tell whether it has ended."""
        return self._ended.is_set()

    def execute(self) -> None:
        """Do this rank's part; on the reading thread."""
        run, self._run = self._run, lambda: None  # it holds the group
        try:
            run()
        except BaseException as error:  # noqa: BLE001  raised again by whoever waits
            self._error = error
        del run
        if self._on_end is not None:
            self._on_end()
        self._ended.set()

    def wait(self) -> None:
        """Return when this rank has read what it needs, and its peers what they need from it."""
        self._ended.wait()
        if self._error is not None:
            raise self._error
        for work in self._peers_done:
            work.wait()
        self._kept.clear()


def _serve(jobs: queue.SimpleQueue[Reading | None]) -> None:
    quiet.on = True  # what this thread sends are parts of collectives that are recorded
    while True:
        job = jobs.get()
        if job is None:
            return
        job.execute()
        del job  # or it would keep its buffers and the group until the next one


class PeerMemory:
    """The memory of the other ranks of one group, all on this host; a group has one, so messages keep one order."""

    def __init__(self, group: dist.ProcessGroup, pids: list[int], libc: Any) -> None:
        self._group, self._pids, self._libc = weakref.ref(group), pids, libc
        self._rank, self._size = dist.get_rank(group), len(pids)
        self._peers = [(self._rank + hop) % self._size for hop in range(1, self._size)]
        self._jobs: queue.SimpleQueue[Reading | None] = queue.SimpleQueue()
        threading.Thread(target=_serve, args=(self._jobs,), name="distui-peer-memory", daemon=True).start()
        weakref.finalize(self, self._jobs.put, None)

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> PeerMemory | None:
        """Return the group's peers, or None on all ranks if one cannot read another.

        Collective, the first time: all ranks of the group.
        """
        if group not in _of_group:
            _of_group[group] = cls._probe(group)
        return _of_group[group]

    @classmethod
    def _probe(cls, group: dist.ProcessGroup) -> PeerMemory | None:
        try:
            libc = _libc()
            # Where Yama guards processes: whoever started this one, and what else it started, may look.
            libc.prctl(_PR_SET_PTRACER, os.getppid(), 0, 0, 0)
        except (AttributeError, OSError):  # not Linux
            libc = None
        secret = torch.tensor([secrets.randbits(62)])
        mine = torch.tensor([os.getpid(), secret.data_ptr(), secret.item()])
        everyone = [torch.zeros_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(everyone, mine, group=group)
        facts = [[int(value) for value in one] for one in everyone]
        seen = torch.zeros(1, dtype=torch.int64)
        can_read = torch.tensor([int(libc is not None)])
        for pid, address, expected in facts if libc is not None else ():
            try:
                _read(libc, pid, address, seen)
            except OSError:
                seen.zero_()
            if seen.item() != expected:  # another host, container, or user
                can_read.zero_()
        dist.all_reduce(can_read, op=dist.ReduceOp.MIN, group=group)
        return cls(group, [pid for pid, _, _ in facts], libc) if can_read.item() else None

    @property
    def _members(self) -> dist.ProcessGroup:
        group = self._group()
        assert group is not None, "the process group is gone"
        return group

    def all_gather(self, full: torch.Tensor, shard: torch.Tensor, on_end: OnEnd = None) -> Reading:
        """Fill `full` with every rank's `shard`. Collective: all ranks of the group.

        Shapes: full [world_size * n], shard [n].
        """
        chunks = full.chunk(self._size)
        if chunks[self._rank].data_ptr() != shard.data_ptr():
            chunks[self._rank].copy_(shard)

        def run(addresses: list[int]) -> None:
            for peer, address in zip(self._peers, addresses, strict=True):
                _read(self._libc, self._pids[peer], address, chunks[peer])

        return self._start(shard, run, on_end)

    def reduce_scatter(
        self, full: torch.Tensor, shard: torch.Tensor, accumulate: bool, on_end: OnEnd = None
    ) -> Reading:
        """Sum `full` over the group and leave this rank's part in `shard`. Collective: all ranks of the group.

        Shapes: full [world_size * n], shard [n].
        """
        own = full.chunk(self._size)[self._rank]
        offset = own.data_ptr() - full.data_ptr()
        return self._start(full, lambda addresses: self._add(own, shard, addresses, offset, accumulate), on_end)

    def all_reduce(self, full: torch.Tensor, on_end: OnEnd = None) -> Reading:
        """Sum `full` over the group, in place, to the same bits on all ranks. Collective: all ranks of the group."""
        bounds = [full.numel() * rank // self._size for rank in range(self._size + 1)]
        chunks = [full[low:high] for low, high in itertools.pairwise(bounds)]
        offsets = [low * full.element_size() for low in bounds]
        summed = [torch.zeros(1, dtype=torch.uint8) for _ in self._peers]
        note, group = torch.zeros(1, dtype=torch.uint8), self._members
        with hidden_from_profiler():
            works = [group.recv([one], peer, _TAG_SUMMED) for one, peer in zip(summed, self._peers, strict=True)]

        def run(addresses: list[int]) -> None:
            own = chunks[self._rank]
            self._add(own, own, addresses, offsets[self._rank], False)
            sent = [group.send([note], peer, _TAG_SUMMED) for peer in self._peers]
            for peer, work, address in zip(self._peers, works, addresses, strict=True):
                work.wait()  # it has read its part here, and its own is summed
                _read(self._libc, self._pids[peer], address + offsets[peer], chunks[peer])
            for work in sent:
                work.wait()

        return self._start(full, run, on_end)

    def _add(self, own: torch.Tensor, into: torch.Tensor, addresses: list[int], offset: int, accumulate: bool) -> None:
        piece = torch.empty(min(_PIECE_NUMEL, own.numel()), dtype=own.dtype)
        for low in range(0, own.numel(), _PIECE_NUMEL):
            mine, sums = own[low : low + _PIECE_NUMEL], into[low : low + _PIECE_NUMEL]
            theirs = piece[: mine.numel()]
            if accumulate:
                sums.add_(mine)
            for hop, (peer, address) in enumerate(zip(self._peers, addresses, strict=True)):
                _read(self._libc, self._pids[peer], address + offset + low * own.element_size(), theirs)
                if hop == 0 and not accumulate:
                    torch.add(mine, theirs, out=sums)
                else:
                    sums.add_(theirs)

    def _start(self, source: torch.Tensor, run: Callable[[list[int]], None], on_end: OnEnd) -> Reading:
        group, peers = self._members, self._peers
        address = torch.tensor([source.data_ptr()])
        addresses = [torch.zeros(1, dtype=torch.int64) for _ in peers]
        notes = [torch.zeros(1, dtype=torch.uint8) for _ in range(self._size)]
        with hidden_from_profiler():
            came = [group.recv([one], peer, _TAG_ADDRESS) for one, peer in zip(addresses, peers, strict=True)]
            done = [group.recv([one], peer, _TAG_DONE) for one, peer in zip(notes, peers, strict=False)]
            sent = [group.send([address], peer, _TAG_ADDRESS) for peer in peers]

        def read() -> None:
            for work in came:
                work.wait()
            run([int(one) for one in addresses])
            told = [group.send([notes[-1]], peer, _TAG_DONE) for peer in peers]
            for work in (*sent, *told):
                work.wait()

        reading = Reading(read, done, [source, address, addresses, notes], on_end)
        self._jobs.put(reading)
        return reading


def _read(libc: Any, pid: int, address: int, into: torch.Tensor) -> None:
    """Fill `into` from the memory of process `pid` at `address`. Raises OSError."""
    at, left = into.data_ptr(), into.nbytes
    while left:
        here, there = _Range(at, left), _Range(address, left)
        count = libc.process_vm_readv(pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
        if count <= 0:
            error = ctypes.get_errno()
            raise OSError(error, f"reading {left} bytes of process {pid}: {os.strerror(error)}")
        at, address, left = at + count, address + count, left - count


_of_group: weakref.WeakKeyDictionary[dist.ProcessGroup, PeerMemory | None] = weakref.WeakKeyDictionary()
