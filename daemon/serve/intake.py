"""The Telemetry service: takes the batches of ranks and launchers, keeps them, acknowledges."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc

from distui.core.paths import RunFolder, default_runs_dir, is_run_id, list_own, own_folder, write_own
from distui.daemon.runs.batches import Malformed, check
from distui.daemon.runs.folders import write_outcome
from distui.daemon.serve.live import LiveRun, LiveRuns
from distui.proto import telemetry_pb2 as pb
from distui.proto import telemetry_pb2_grpc as rpc

MAX_BATCH_BYTES = 8 << 20
FLUSH_S_PER_SOURCE = 0.2
MAX_FLUSH_S = 2.5
"""A batch costs the daemon more than the records in it, so many sources are asked to send less often."""


class Telemetry(rpc.TelemetryServicer):
    """Serves Publish."""

    def __init__(self, runs: LiveRuns, folder_of: Callable[[pb.Batch], RunFolder], *, forwarded: bool) -> None:
        """Keep batches in `runs`, in the folder that `folder_of` gives; `forwarded` are those of other daemons."""
        self._runs, self._folder_of, self._forwarded = runs, folder_of, forwarded

    async def Publish(
        self, batches: AsyncIterator[pb.Batch], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.Ack]:
        """Acknowledge each batch once it is in the run's file; end with the source's stream."""
        live: LiveRun | None = None
        where = ""
        try:
            async for batch in batches:
                try:
                    check(batch, forwarded=self._forwarded)
                    if not is_run_id(batch.run_id) or not batch.run_dir:
                        raise Malformed(f"a batch must name its run_id and run_dir: {batch.run_id!r} is no name of one")
                    if live is None or batch.run_dir != where:
                        folder = self._folder_of(batch)
                        if live is not None:
                            live.num_publishers -= 1
                            live = None
                        live, where = await self._runs.open(folder), batch.run_dir
                        live.num_publishers += 1
                except Malformed as error:
                    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
                last = batch.records[-1].seq if batch.records else live.state.kept_seq(batch.source)
                weighty = live.keep(batch)
                if self._forwarded and live.state.told_final and live.run.outcome.name not in list_own(live.run.path):
                    write_outcome(live.run, live.state.info)
                if weighty:
                    await asyncio.to_thread(live.flush)
                yield pb.Ack(seq=last, flush_s=min(MAX_FLUSH_S, FLUSH_S_PER_SOURCE * self._runs.num_publishers()))
        finally:
            if live is not None:
                live.num_publishers -= 1


def run_folder(batch: pb.Batch) -> RunFolder:
    """Return the folder that a batch names. Raises: Malformed where that is no run's folder of this user."""
    path = Path(batch.run_dir)
    if not path.is_absolute():
        raise Malformed(f"run_dir {batch.run_dir!r} is not absolute")
    try:
        path = path.resolve(strict=True)
        with own_folder(path):
            pass
    except OSError as error:
        raise Malformed(f"run_dir {batch.run_dir!r}: {error}") from error
    if path.name != batch.run_id:
        raise Malformed(f"run_dir {batch.run_dir!r} is not the folder of run {batch.run_id!r}")
    return RunFolder(path)


def folder_of_another_node(batch: pb.Batch, runs: LiveRuns) -> RunFolder:
    """Return where this node keeps a run that another node's daemon forwards; made at its first batch.

    Raises: Malformed where the folder cannot be made, or is not this user's own.
    """
    for live in runs.runs.values():
        if live.run.run_id == batch.run_id:
            return live.run
    run = RunFolder(default_runs_dir() / batch.run_id)
    try:
        with contextlib.suppress(FileExistsError):
            run.create()
        started = next((record for record in batch.records if record.WhichOneof("body") == "run_started"), None)
        if run.spec.name not in list_own(run.path):
            spec: dict[str, object] = {"run_id": batch.run_id, "started_s": time.time()}
            if started is not None:
                spec["started_s"] = started.time_s
            write_own(run.spec, json.dumps(spec))
    except OSError as error:
        raise Malformed(f"the run cannot be kept in {run.path}: {error}") from error
    return RunFolder(run.path.resolve())
