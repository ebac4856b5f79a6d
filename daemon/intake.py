"""The Telemetry service: takes the batches of ranks and launchers, keeps them, acknowledges."""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc

from distui.core.paths import RunFolder, default_runs_dir, write_atomic
from distui.daemon.live import LiveRun, LiveRuns
from distui.daemon.runs import write_outcome
from distui.daemon.state import DAEMON, LAUNCHER
from distui.proto import telemetry_pb2 as pb
from distui.proto import telemetry_pb2_grpc as rpc

MAX_BATCH_BYTES = 8 << 20
CUT_S = 0.05
FLUSH_S_PER_SOURCE = 0.15
MAX_FLUSH_S = 2.5
"""A batch costs the daemon more than the records in it, so many sources are asked to send less often."""
MAX_RANKS = 1 << 16
"""More than any job has: a source that says otherwise is mistaken, and would cost memory by the rank."""


_STARTS = frozenset({"rank_started", "run_started"})


class Malformed(Exception):
    """A batch that cannot be taken, and why."""


class Telemetry(rpc.TelemetryServicer):
    """Serves Publish."""

    def __init__(self, runs: LiveRuns, folder_of: Callable[[pb.Batch], RunFolder] | None = None) -> None:
        """Keep batches in `runs`, in the folder that `folder_of` gives; without it, in that which they name."""
        self._runs, self._folder_of, self._forwarded = runs, folder_of or run_folder, folder_of is not None

    async def Publish(
        self, batches: AsyncIterator[pb.Batch], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.Ack]:
        """Acknowledge each batch once it is in the run's file; end with the source's stream."""
        live: LiveRun | None = None
        source, where = pb.Source(), ""
        try:
            async for batch in batches:
                try:
                    check(batch, forwarded=self._forwarded)
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
                if self._forwarded and live.state.told_final and not live.run.outcome.exists():
                    write_outcome(live.run, live.state.info)
                if weighty:
                    await asyncio.to_thread(live.flush)
                source = batch.source
                yield pb.Ack(seq=last, flush_s=min(MAX_FLUSH_S, FLUSH_S_PER_SOURCE * self._runs.num_publishers()))
            # The requests end also when the source is killed; then gRPC cancels this call a moment later.
            await asyncio.sleep(CUT_S)
            if live is not None and not context.cancelled():
                live.source_closed(source)
        finally:
            if live is not None:
                live.num_publishers -= 1


def check(batch: pb.Batch, *, forwarded: bool = False) -> None:
    """Raise Malformed unless the batch is what the contract says; a daemon's own records come only `forwarded`."""
    if not batch.run_id or not batch.run_dir:
        raise Malformed("a batch must name its run_id and run_dir")
    if not (DAEMON if forwarded else LAUNCHER) <= batch.source.rank < MAX_RANKS:
        raise Malformed(f"rank {batch.source.rank} is no rank and no launcher")
    if not batch.source.incarnation:
        raise Malformed("a source must give its incarnation")
    last = 0
    for record in batch.records:
        if record.seq <= last:
            raise Malformed(f"record {record.seq} follows record {last}: sequence numbers must ascend from 1")
        last = record.seq
        body = record.WhichOneof("body")
        if body in _STARTS and getattr(record, body).world_size > MAX_RANKS:
            raise Malformed(f"record {last}: a world of more than {MAX_RANKS} ranks")


def run_folder(batch: pb.Batch) -> RunFolder:
    """Return the folder that a batch names. Raises: Malformed where that is no run's folder of this user."""
    path = Path(batch.run_dir)
    if not path.is_absolute():
        raise Malformed(f"run_dir {batch.run_dir!r} is not absolute")
    try:
        path = path.resolve(strict=True)
        found = path.stat()
    except OSError as error:
        raise Malformed(f"run_dir {batch.run_dir!r}: {error}") from error
    if not path.is_dir() or found.st_uid != os.getuid():
        raise Malformed(f"run_dir {batch.run_dir!r} is not a folder of user {os.getuid()}")
    if path.name != batch.run_id:
        raise Malformed(f"run_dir {batch.run_dir!r} is not the folder of run {batch.run_id!r}")
    return RunFolder(path)


_RUN_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")


def folder_of_another_node(batch: pb.Batch, runs: LiveRuns) -> RunFolder:
    """Return where this node keeps a run that another node's daemon forwards; made at its first batch.

    Raises: Malformed where the run's id is none, or the folder cannot be made.
    """
    if not _RUN_ID.fullmatch(batch.run_id):
        raise Malformed(f"run_id {batch.run_id!r} is no name of a run")
    for live in runs.runs.values():
        if live.run.run_id == batch.run_id:
            return live.run
    run = RunFolder(default_runs_dir() / batch.run_id)
    try:
        if not run.path.exists():
            run.create()
        started = next((record for record in batch.records if record.WhichOneof("body") == "run_started"), None)
        if not run.spec.exists():
            spec: dict[str, object] = {"run_id": batch.run_id, "started_s": time.time()}
            if started is not None:
                spec["started_s"] = started.time_s
            write_atomic(run.spec, json.dumps(spec))
    except OSError as error:
        raise Malformed(f"the run cannot be kept in {run.path}: {error}") from error
    return RunFolder(run.path.resolve())
