"""Nodes that are made up: each sends what a node's daemon would of its ranks, over a stream of its own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

from distui.core.telemetry.endpoint import Endpoint
from distui.daemon.diagnosis.observe import RUNNING, Observed
from distui.daemon.runs.state import RankRecord
from distui.daemon.tree.columns import roll_up
from distui.proto import rollup_pb2 as up
from distui.proto import rollup_pb2_grpc as rpc
from distui.proto import telemetry_pb2 as pb

RUN = "federation-1"
STEP_S = 0.5


class Fleet:
    """All nodes of a job that steps every half second; one rank may be slow, and all others wait for it."""

    def __init__(self, num_nodes: int, num_ranks: int, sick: int = -1) -> None:
        self.num_nodes, self.num_ranks, self.sick = num_nodes, num_ranks, sick
        self.began_s = time.time()
        self.halted: dict[int, float] = {}
        """Ranks that have stopped entering collectives, and since when; the others wait for them."""

    def ranks(self, node: int, now_s: float) -> list[tuple[RankRecord, Observed]]:
        """Return what the daemon of a node knows of its ranks."""
        found = []
        held_s = min(self.halted.values(), default=now_s)
        step = int((held_s - self.began_s) / STEP_S) + 1
        for rank in range(node * self.num_ranks, (node + 1) * self.num_ranks):
            is_slow = node == self.sick and rank % self.num_ranks == 0
            own_s = STEP_S * (0.9 if is_slow else 0.6)
            record = RankRecord(rank, f"node{node}", 1000 + rank, 1, last_seen_s=now_s)
            record.last_step = pb.Step(step=step, step_s=STEP_S, exposed_comm_s=STEP_S - own_s, total_steps=100_000)
            record.memory = pb.Memory(allocated_bytes=60 << 30, device_total_bytes=80 << 30)
            record.loss = 2.0
            record.recent.append((STEP_S, 4096, 8))
            record.last_parts.append((step, (0.0, own_s / 3, own_s / 2, own_s / 6)))
            seen = Observed(rank, record.node, record.pid, RUNNING, step, "backward", now_s - 0.1)
            seen.last_seq = {"data_parallel": 20 * step, f"tp[{rank // 2 * 2},{rank // 2 * 2 + 1}]": 4 * step}
            found.append((record, seen))
        return found

    def roll(self, node: int, number: int, ahead_s: float = 0.0) -> up.RollUp:
        """Return a node's message."""
        now_s = time.time()
        rolled, columns, names = roll_up(self.ranks(node, now_s), now_s)
        rolled.node, rolled.time_s = f"node{node}", now_s + ahead_s
        rolled.hardware.CopyFrom(
            pb.HardwareSample(cpu_percent=40, memory_used_bytes=1 << 38, memory_total_bytes=1 << 40)
        )
        told = names if number == 1 else {}
        return up.RollUp(run_id=RUN, number=number, sent_s=now_s, nodes=[rolled], ranks=columns, names=told)

    async def serve(self, folder: Path, fan_in: int) -> None:
        """Roll up once a second, each node at a moment of its own, until the process is ended."""

        async def one(node: int) -> None:
            async def messages() -> AsyncIterator[up.RollUp]:
                number, next_s = 0, time.monotonic() + node / self.num_nodes
                while True:
                    await asyncio.sleep(max(0.0, next_s - time.monotonic()))
                    next_s += 1.0
                    number += 1
                    yield self.roll(node, number)

            async with Endpoint.unix(folder / f"relay{node // fan_in}.sock").aio_channel() as channel:
                async for _ in rpc.FederationStub(channel).Up(messages()):
                    continue

        tasks = [asyncio.create_task(one(node)) for node in range(self.num_nodes)]
        print("ready", flush=True)
        await asyncio.gather(*tasks)
