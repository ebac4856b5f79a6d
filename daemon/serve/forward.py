"""Federation: a node's daemon sends its runs on to a head daemon, so that one dashboard shows the cluster.

The run's log on disk is the queue: what the head has not acknowledged is read again, so neither daemon's crash loses
anything, and a head that is away costs no memory.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path

import grpc

from distui.core.telemetry.endpoint import Endpoint
from distui.daemon.runs.store import LogTail, Position
from distui.daemon.runs.unsent import unsent_batches
from distui.daemon.serve.live import LiveRun, LiveRuns
from distui.proto import telemetry_pb2 as pb
from distui.proto import telemetry_pb2_grpc as rpc

LOOK_S = 0.5
FIRST_RETRY_S = 0.5
LAST_RETRY_S = 30.0
_log = logging.getLogger("distui.daemon")


class Forwarder:
    """Sends every run that has publishers on this node to the head. Used on one event loop."""

    def __init__(self, runs: LiveRuns, head: Endpoint) -> None:
        self._runs, self._head = runs, head
        self._tasks: dict[Path, asyncio.Task[None]] = {}

    async def serve(self) -> None:
        """Look for runs until cancelled."""
        try:
            while True:
                for path, live in list(self._runs.runs.items()):
                    task = self._tasks.get(path)
                    if (task is None or task.done()) and live.num_publishers:
                        self._tasks[path] = asyncio.create_task(self._send_run(live))
                await asyncio.sleep(LOOK_S)
        finally:
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _send_run(self, live: LiveRun) -> None:
        """Send one run until it has ended and all of it has arrived."""
        retry_s, kept = FIRST_RETRY_S, Position()
        while True:
            sent: deque[Position] = deque()
            try:
                async with self._head.aio_channel() as channel:
                    batches = self._batches(live, kept, sent)
                    call = rpc.TelemetryStub(channel).Publish(batches, metadata=self._head.metadata)
                    async for _ in call:  # one acknowledgement a batch, in their order
                        kept, retry_s = sent.popleft(), FIRST_RETRY_S
                return
            except grpc.aio.AioRpcError as error:
                why = self._head.why(error.details() or error.code().name)
                _log.warning("%s: the head %s: %s", live.run.run_id, self._head.target, why)
            await asyncio.sleep(retry_s)
            retry_s = min(2 * retry_s, LAST_RETRY_S)

    async def _batches(self, live: LiveRun, start: Position, sent: deque[Position]) -> AsyncIterator[pb.Batch]:
        """Yield what the log holds behind `start` until the run has ended, and note in `sent` where each ends.

        What ranks could not send comes last; all of it again after a reconnect, for the head knows what it has.
        """
        tail, kept = LogTail(live.run, start), start
        while True:
            found = await asyncio.to_thread(tail.read)
            for kept, batch in found:
                sent.append(kept)
                yield batch
            if not found:
                if live.ended() and not live.num_publishers:
                    for batch in await asyncio.to_thread(unsent_batches, live.run):
                        sent.append(kept)
                        yield batch
                    return
                await asyncio.sleep(LOOK_S)
