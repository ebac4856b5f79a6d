"""Monitor: what watchers read."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from importlib.metadata import version
from typing import Any, NoReturn

import grpc
import psutil

from distui.core.errors import UserError
from distui.daemon.registry import KeptRun, Runs
from distui.proto import telemetry_pb2 as pb
from distui.proto.telemetry_pb2_grpc import MonitorServicer

MAX_LOG_BYTES = 1 << 20
DEFAULT_LOG_BYTES = 65536
_MIN_INTERVAL_S = 0.05
_DEFAULT_INTERVAL_S = 0.5

Context = grpc.aio.ServicerContext[Any, Any]


class Monitor(MonitorServicer):  # type: ignore[misc]
    """Serves runs from memory, and those that have ended from disk."""

    def __init__(self, runs: Runs) -> None:
        self._runs = runs
        self._process = psutil.Process()
        self._started_s = time.time()
        self.num_watchers = 0

    async def ListRuns(self, request: pb.ListRunsRequest, context: Context) -> pb.ListRunsResponse:  # noqa: N802
        """Return the runs kept on this node, newest first."""
        folders = self._runs.folders()
        response = pb.ListRunsResponse()
        for folder in folders[: request.limit or None]:
            response.runs.append((await self._runs.load(folder)).state.info)
        return response

    async def GetSnapshot(self, request: pb.SnapshotRequest, context: Context) -> pb.Snapshot:  # noqa: N802
        """Return one run's snapshot."""
        kept = await self._find(request.run_id, context)
        return kept.current()

    async def Watch(  # noqa: N802
        self, request: pb.WatchRequest, context: Context
    ) -> AsyncIterator[pb.Update]:
        """Send all of the run, then what is new at each interval, until it has ended.

        An update is built when the one before has been taken, so a slow watcher costs nothing.
        """
        kept = await self._find(request.run_id, context)
        interval_s = max(request.interval_s or _DEFAULT_INTERVAL_S, _MIN_INTERVAL_S)
        self.num_watchers += 1
        try:
            state = kept.state
            steps = state.history.thinned(request.max_points)
            events, metrics = state.events.after(0), state.metrics.after(0)
            while True:
                cursor = (state.history.serial, state.events.serial, state.metrics.serial)
                final = state.is_final()
                yield pb.Update(
                    snapshot=kept.current(), steps=steps, events=events, metrics=metrics, server_time_s=time.time()
                )
                if final:
                    return
                await asyncio.sleep(interval_s)
                if kept.state is not state:  # read again from disk: begin anew
                    state, cursor = kept.state, (0, 0, 0)
                steps = state.history.after(cursor[0])
                events, metrics = state.events.after(cursor[1]), state.metrics.after(cursor[2])
        finally:
            self.num_watchers -= 1

    async def ReadLog(self, request: pb.ReadLogRequest, context: Context) -> pb.ReadLogResponse:  # noqa: N802
        """Return a piece of a rank's log, or of the launcher's (-1); empty where there is none yet."""
        kept = await self._find(request.run_id, context)
        if request.rank < -1:
            await _abort(
                context, grpc.StatusCode.INVALID_ARGUMENT, f"rank {request.rank} has no log; -1 is the launcher"
            )
        path = kept.folder.logs / "launcher.log" if request.rank < 0 else kept.folder.rank_log(request.rank)
        num_bytes = min(request.max_bytes or DEFAULT_LOG_BYTES, MAX_LOG_BYTES)
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                start = request.offset if request.offset >= 0 else max(0, size + request.offset)
                file.seek(min(start, size))
                data = file.read(num_bytes)
        except FileNotFoundError:
            return pb.ReadLogResponse()
        except OSError as error:
            await _abort(context, grpc.StatusCode.UNAVAILABLE, f"{path}: {error}")
        return pb.ReadLogResponse(data=data, next_offset=min(start, size) + len(data), size=size)

    async def GetDaemonInfo(self, request: pb.DaemonInfoRequest, context: Context) -> pb.DaemonInfo:  # noqa: N802
        """Return what the daemon itself costs."""
        times = self._process.cpu_times()
        return pb.DaemonInfo(
            version=version("distui"),
            pid=os.getpid(),
            started_s=self._started_s,
            cpu_s=times.user + times.system,
            rss_bytes=self._process.memory_info().rss,
            num_runs=len(self._runs),
            num_watchers=self.num_watchers,
        )

    async def _find(self, run_id: str, context: Context) -> KeptRun:
        try:
            return await self._runs.find(run_id)
        except UserError as error:
            await _abort(context, grpc.StatusCode.NOT_FOUND, f"{error}; {error.fix}")


async def _abort(context: Context, code: grpc.StatusCode, details: str) -> NoReturn:
    await context.abort(code, details)
    raise AssertionError("abort raises")
