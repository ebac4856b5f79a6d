"""The Monitor service: what watchers read."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib.metadata import PackageNotFoundError, version
from typing import TypeVar

import grpc
import psutil

from distui.core.errors import NotOwn, UserError
from distui.core.paths import RunFolder, open_own
from distui.daemon.runs.folders import FINAL_STATES, read_info
from distui.daemon.runs.snapshot import UNHEARD_S
from distui.daemon.runs.store import segment_files
from distui.daemon.serve.live import LiveRun, LiveRuns
from distui.proto import telemetry_pb2 as pb
from distui.proto import telemetry_pb2_grpc as rpc

INTERVAL_S = 0.5
MIN_INTERVAL_S = 0.05
MAX_POINTS = 2000
LOG_BYTES = 64 << 10
MAX_LOG_BYTES = 1 << 20
_log = logging.getLogger("distui.daemon")


_Found = TypeVar("_Found")


async def found(search: Awaitable[_Found], context: grpc.aio.ServicerContext) -> _Found:
    """Return the run or file that was asked for, or end the call with NOT_FOUND and the near names, or why."""
    try:
        return await search
    except UserError as error:
        await context.abort(grpc.StatusCode.NOT_FOUND, f"{error.what}: {error.why}; {error.fix}")
        raise  # not reached: abort raises
    except NotOwn as error:
        await context.abort(grpc.StatusCode.NOT_FOUND, f"{error.filename}: {error.strerror}")
        raise


class Monitor(rpc.MonitorServicer):
    """Serves runs from memory and, where they have ended long ago, from disk."""

    def __init__(self, runs: LiveRuns, on_use: Callable[[], None], addresses: list[str]) -> None:
        """Read `runs`; `on_use` is called whenever somebody asks. `addresses` are where the daemon answers."""
        self._runs, self._on_use, self._addresses = runs, on_use, addresses
        self._started_s = time.time()
        self._process = psutil.Process()

    async def ListRuns(self, request: pb.ListRunsRequest, context: grpc.aio.ServicerContext) -> pb.ListRunsResponse:
        """Return the runs, newest first."""
        self._on_use()
        folders = await asyncio.to_thread(self._runs.folders)
        chosen = folders[: request.limit] if request.limit else folders
        runs = []
        for folder in chosen:
            try:
                runs.append(await self._info(folder))
            except NotOwn as error:  # a part of it is not ours: nothing can be told of it, but of the others
                _log.warning("%s is left out: %s", folder.run_id, error)
        return pb.ListRunsResponse(runs=runs)

    async def _info(self, folder: RunFolder) -> pb.RunInfo:
        live = self._runs.runs.get(folder.path)
        if live is None:
            info = read_info(folder)
            if info.state in FINAL_STATES:
                return info
            if time.time() - info.started_s > UNHEARD_S and not segment_files(folder):
                info.state = "failed"
                return info
            live = await self._runs.open(folder)
        return live.snapshot().run

    async def GetSnapshot(self, request: pb.SnapshotRequest, context: grpc.aio.ServicerContext) -> pb.Snapshot:
        """Return a run as it is now."""
        self._on_use()
        live = await found(self._runs.find(request.run_id), context)
        return await self._drilled(live, request.node)

    async def _drilled(self, live: LiveRun, node: str) -> pb.Snapshot:
        """Return the run as it is now; of a job that is rolled up, with all ranks of `node` as its daemon has them."""
        whole = live.snapshot()
        if not node or live.state.many is None or self._runs.ask is None:
            return whole
        theirs = await self._runs.ask(live.run.run_id, node)
        return whole if theirs is None else drilled(whole, theirs)

    async def Watch(self, request: pb.WatchRequest, context: grpc.aio.ServicerContext) -> AsyncIterator[pb.Update]:
        """Yield what is kept of the run, then what is new at each interval, until it has ended."""
        self._on_use()
        live = await found(self._runs.find(request.run_id), context)
        interval_s = max(request.interval_s or INTERVAL_S, MIN_INTERVAL_S)
        state = live.state
        live.num_watchers += 1
        try:
            snapshot = await self._drilled(
                live, request.node
            )  # first: it sums up the last steps of a run that has ended
            update = pb.Update(
                snapshot=snapshot,
                steps=state.steps.history.all(request.max_points or MAX_POINTS),
                events=state.events.all(),
                metrics=state.metrics.all(request.max_points or MAX_POINTS),
                server_time_s=time.time(),
            )
            while True:
                marks = state.steps.history.head, state.events.head, state.metrics.head
                yield update
                if snapshot.run.state in FINAL_STATES:
                    return
                await asyncio.sleep(interval_s)
                snapshot = await self._drilled(live, request.node)
                update = pb.Update(
                    snapshot=snapshot,
                    steps=state.steps.history.after(marks[0]),
                    events=state.events.after(marks[1]),
                    metrics=state.metrics.after(marks[2]),
                    server_time_s=time.time(),
                )
        finally:
            live.num_watchers -= 1
            live.used_s = time.monotonic()
            self._on_use()

    async def ReadLog(self, request: pb.ReadLogRequest, context: grpc.aio.ServicerContext) -> pb.ReadLogResponse:
        """Return a piece of a log; nothing where it is not begun yet."""
        self._on_use()
        live = await found(self._runs.find(request.run_id), context)
        if request.rank < -1 or request.rank >= live.state.world_size():
            last = live.state.world_size() - 1
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT, f"no rank {request.rank}: ranks are 0 to {last}, -1 is the launcher"
            )
        return await found(asyncio.to_thread(read_log, live.run, request), context)

    async def GetDaemonInfo(self, request: pb.DaemonInfoRequest, context: grpc.aio.ServicerContext) -> pb.DaemonInfo:
        """Return what the daemon is and what it costs."""
        times = self._process.cpu_times()
        return pb.DaemonInfo(
            version=own_version(),
            pid=os.getpid(),
            started_s=self._started_s,
            cpu_s=times.user + times.system,
            rss_bytes=self._process.memory_info().rss,
            num_runs=len(self._runs.runs),
            num_watchers=self._runs.num_watchers(),
            addresses=self._addresses,
        )


def drilled(whole: pb.Snapshot, node: pb.Snapshot) -> pb.Snapshot:
    """Return a snapshot of many hosts in which one of them has all of its ranks, as its own daemon tells of them."""
    found = pb.Snapshot()
    found.CopyFrom(whole)
    theirs = {rank.rank for rank in node.ranks}
    kept = [rank for rank in found.ranks if rank.rank not in theirs]
    del found.ranks[:]
    found.ranks.extend(sorted([*kept, *node.ranks], key=lambda rank: rank.rank))
    found.collectives.extend(node.collectives)
    return found


def own_version() -> str:
    """Return distui's version; "unknown" where it runs without being installed."""
    try:
        return version("distui")
    except PackageNotFoundError:
        return "unknown"


def read_log(run: RunFolder, request: pb.ReadLogRequest) -> pb.ReadLogResponse:
    """Return a piece of a log; nothing where it is not begun yet. Raises: NotOwn; OSError."""
    path = run.logs / "launcher.log" if request.rank < 0 else run.rank_log(request.rank)
    try:
        with open(open_own(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = max(0, size + request.offset) if request.offset < 0 else min(request.offset, size)
            file.seek(start)
            data = file.read(min(request.max_bytes or LOG_BYTES, MAX_LOG_BYTES))
    except FileNotFoundError:
        return pb.ReadLogResponse()
    return pb.ReadLogResponse(data=data, next_offset=start + len(data), size=max(size, start + len(data)))
