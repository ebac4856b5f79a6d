"""This node's part of a run that is rolled up: a row a rank each second, and at once what has weight."""

from __future__ import annotations

import asyncio
import re
import time

from distui.core.paths import RunFolder
from distui.daemon.diagnosis.observe import observe, this_node
from distui.daemon.runs.batches import DAEMON
from distui.daemon.runs.store import read_batches
from distui.daemon.serve.live import WEIGHTY, LiveRun
from distui.daemon.tree.columns import roll_up
from distui.proto import rollup_pb2 as up
from distui.proto import telemetry_pb2 as pb

SENT = WEIGHTY | {"metrics"}
"""Records that go up as they are; all others are summed up in columns."""
ACROSS = frozenset(
    {"hang", "mismatch", "left_early", "data_stall", "straggler", "slow_link", "data_bound", "daemon_restarted"}
)
"""Verdicts that need all ranks: what a node says of them by its own ranks alone is not told."""
MAX_DIAGNOSES = 8


class Leaf:
    """One run on this node."""

    def __init__(self, live: LiveRun, name: str = "") -> None:
        """`name` is what the job calls this node, which else is called as its ranks call it."""
        self._live, self._name = live, name
        self._node = ""
        self._batches: list[pb.Batch] = []
        self.rolled_s = 0.0
        """When it was rolled up last. Units: monotonic seconds."""
        self._caught_up = False
        self._is_over = False
        live.on_batch = self._hear

    def _hear(self, batch: pb.Batch) -> None:
        if batch.source.rank != DAEMON:
            self._node = self._node or batch.source.node
        kept = [record for record in batch.records if _goes_up(record, batch.source.rank)]
        if kept or batch.last:
            told = pb.Batch(run_id=batch.run_id, run_dir=batch.run_dir, source=batch.source, records=kept)
            told.last = batch.last
            self._batches.append(told)

    @property
    def node(self) -> str:
        """What this node is called."""
        return self._name or self._node

    def snapshot(self) -> pb.Snapshot:
        """Return all that is known of it here."""
        found = pb.Snapshot()
        found.CopyFrom(self._live.snapshot())
        for rank in found.ranks:
            rank.node = self.node
        return found

    def over(self) -> bool:
        """Tell whether it has ended here, and that was told."""
        return self._is_over

    async def roll(self, ahead_s: float) -> up.RollUp:
        """Return what is to be told now; `ahead_s` is how far the parent's clock is ahead of this one."""
        live, self.rolled_s = self._live, time.monotonic()
        if not self._caught_up:
            self._caught_up = True
            since, self._batches = self._batches, []
            for batch in await asyncio.to_thread(lambda: list(read_batches(live.run))):
                self._hear(batch)
            self._batches += since
        self._is_over = live.ended() and not live.num_publishers
        now_s, state = time.time(), live.state
        seen = observe(state, now_s)
        if not self._node and seen:
            self._node = seen[0].node
        node, ranks, names = roll_up([(state.ranks[one.rank], one) for one in seen if one.node == self._node], now_s)
        node.node, node.time_s, node.skew_s = self.node, now_s + ahead_s, ahead_s
        if self._node in state.nodes:
            node.hardware.CopyFrom(state.nodes[self._node].hardware)
        told = [found for found in live.snapshot().diagnosis if found.kind not in ACROSS]
        node.diagnosis.extend(told[:MAX_DIAGNOSES])
        batches, self._batches = self._batches, []
        return up.RollUp(run_id=live.run.run_id, nodes=[node], ranks=ranks, names=names, batches=batches)


def own_part(run: RunFolder, name: str) -> RunFolder:
    """Return a run's folder with a log of telemetry for one node, beside that of the head."""
    return RunFolder(run.path, re.sub(r"[^A-Za-z0-9_.-]", "_", name or this_node()))


def _goes_up(record: pb.Record, rank: int) -> bool:
    body = record.WhichOneof("body")
    if body not in SENT:
        return False
    return not (rank == DAEMON and body == "event" and record.event.kind.removesuffix("_over") in ACROSS)
