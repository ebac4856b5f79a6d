"""Telemetry.Publish: takes the ranks' batches, keeps them, and says so."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from pathlib import Path

import grpc

from distui.core.errors import UserError
from distui.daemon.registry import Runs
from distui.daemon.state import DAEMON
from distui.daemon.store import StoreBusy
from distui.proto import telemetry_pb2 as pb
from distui.proto.telemetry_pb2_grpc import TelemetryServicer

_log = logging.getLogger("distui.daemon")
MAX_RANK = 1_000_000


class Intake(TelemetryServicer):  # type: ignore[misc]
    """Acknowledges a batch once it is in the run's file; a resent one is acknowledged and not kept twice."""

    def __init__(self, runs: Runs) -> None:
        self._runs = runs

    async def Publish(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.Batch], context: grpc.aio.ServicerContext[pb.Batch, pb.Ack]
    ) -> AsyncIterator[pb.Ack]:
        """Answer each batch with the sequence number up to which its source is kept."""
        async for batch in request_iterator:
            if problem := malformed(batch):
                _log.warning("a batch was refused: %s", problem)
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, problem)
            try:
                yield pb.Ack(seq=await self._runs.take(batch))
            except UserError as error:
                await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
            except StoreBusy as error:
                await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
            except OSError as error:
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"telemetry cannot be kept: {error}")


def malformed(batch: pb.Batch) -> str:
    """Return what is wrong with a batch; "" where nothing is."""
    folder = Path(batch.run_dir)
    if not batch.run_id or folder.name != batch.run_id or not folder.is_absolute() or ".." in folder.parts:
        return f"run_dir {batch.run_dir!r} is not the absolute path of a folder named run_id {batch.run_id!r}"
    if not DAEMON <= batch.source.rank <= MAX_RANK:
        return f"rank {batch.source.rank} is not within {DAEMON} to {MAX_RANK}"
    last = 0
    for record in batch.records:
        if record.seq <= last:
            return f"seq {record.seq} comes after {last}: they must ascend from 1"
        last = record.seq
    return ""
