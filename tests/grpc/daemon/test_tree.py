"""A tree of real daemons: a node's ranks are rolled up through another's daemon to the head, and asked for by name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest

from distui.core.telemetry.endpoint import Endpoint
from distui.proto import rollup_pb2 as up
from distui.proto import rollup_pb2_grpc
from distui.proto import telemetry_pb2 as pb
from distui.proto import telemetry_pb2_grpc as rpc

if TYPE_CHECKING:
    from tests.grpc.simulated_ranks import Node, SimulatedRank


class Below:
    """A daemon that rolls up to another, with folders of its own."""

    def __init__(self, name: str, parent: Endpoint, *arguments: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="dt", dir="/tmp"))
        (self.folder / "r").mkdir(mode=0o700)
        reader, writer = os.pipe()
        held, self.hold = os.pipe()
        words = ["--node-name", name, "--ready-fd", str(writer), "--hold-fd", str(held), "--idle-s", "0", *arguments]
        if parent.certificate is not None:
            for file, data in (("token", parent.token.encode()), ("pem", parent.certificate)):
                (self.folder / file).write_bytes(data)
                (self.folder / file).chmod(0o600)
            words += ["--forward-token", str(self.folder / "token"), "--forward-ca", str(self.folder / "pem")]
        environ = {
            **os.environ,
            "DISTUI_STATE_DIR": str(self.folder / "s"),
            "DISTUI_RUNTIME_DIR": str(self.folder / "r"),
        }
        command = [sys.executable, "-m", "distui.daemon", "--roll-up", parent.target, *words]
        self.process = subprocess.Popen(command, env=environ, pass_fds=[writer, held], stderr=subprocess.DEVNULL)
        os.close(writer)
        os.close(held)
        with open(reader, "rb") as ready:
            assert ready.readline()

    @property
    def socket(self) -> Path:
        return self.folder / "r" / "daemon.sock"

    def listens(self) -> Endpoint:
        """Return where it serves those below."""
        with grpc.insecure_channel(f"unix:{self.socket}") as channel:
            info = rpc.MonitorStub(channel).GetDaemonInfo(pb.DaemonInfoRequest(), timeout=60.0)
        address = next(one.removeprefix("tls://") for one in info.addresses if one.startswith("tls://"))
        secrets = self.folder / "s" / "daemon"
        return Endpoint(address, (secrets / "token").read_text().strip(), (secrets / "cert.pem").read_bytes())

    def close(self) -> None:
        """End it as its agent's death does."""
        os.close(self.hold)
        assert self.process.wait(60) == 0
        shutil.rmtree(self.folder)


@pytest.fixture
def tree(node: Node) -> Iterator[tuple[Below, Below]]:
    """Give a relay under the head, and a daemon under that."""
    node.start("--idle-s", "0")
    relay = Below("gpu0", Endpoint.unix(node.folder / "r" / "daemon.sock"), "--listen", "127.0.0.1:0", "--accept-runs")
    leaf = Below("gpu1", relay.listens())
    yield relay, leaf
    leaf.close()
    relay.close()


def test_ranks_of_two_nodes_are_one_run_at_the_head(node: Node, tree: tuple[Below, Below]) -> None:
    run = node.run(world_size=2)
    made: type[SimulatedRank] = sys.modules["tests.grpc.simulated_ranks"].SimulatedRank
    ranks = [made(run, number).started().steps(1, 5, loss=2.0) for number in (0, 1)]
    for rank in ranks:
        rank.add(event=pb.Event(level=pb.Event.WARNING, kind="overflow", message=f"of rank {rank.source.rank}"))
    channels = [grpc.insecure_channel(f"unix:{below.socket}") for below in tree]
    held = [_hold(channel, rank) for channel, rank in zip(channels, ranks, strict=True)]
    try:
        found = node.wait(run, lambda snapshot: len(snapshot.hosts) == 2 and snapshot.step == 5)
        assert {(rank.rank, rank.node, rank.step) for rank in found.ranks} == {(0, "gpu0", 5), (1, "gpu1", 5)}
        assert {host.node: host.num_ranks for host in found.hosts} == {"gpu0": 1, "gpu1": 1}
        assert all(abs(time.time() - one.last_seen_s) < 30 for one in found.nodes)
        # Events come as they are, steps are summed up; the raw ones lie in a log of each node's own.
        update = next(iter(node.monitor.Watch(pb.WatchRequest(run_id=run.run_id), timeout=60)))
        assert {one.event.message for one in update.events if one.event.kind == "overflow"} == {
            "of rank 0",
            "of rank 1",
        }
        assert sorted(path.name for path in run.telemetry.iterdir() if path.is_dir()) == ["gpu0", "gpu1"]
        # What the head does not have is asked for, through the relay.
        assert not found.ranks[1].HasField("memory") and found.ranks[1].last_step.tokens == 0
        request = pb.SnapshotRequest(run_id=run.run_id, node="gpu1")
        whole = node.monitor.GetSnapshot(request, timeout=60)
        assert next(rank for rank in whole.ranks if rank.rank == 1).last_step.tokens == 100
    finally:
        for call, channel in zip(held, channels, strict=True):
            call.cancel()
            channel.close()


def _hold(channel: grpc.Channel, rank: SimulatedRank) -> grpc.Call:
    """Publish, and keep the stream open as a living rank does."""
    from itertools import chain
    from threading import Event

    def never() -> Iterator[pb.Batch]:
        Event().wait(120)
        yield pb.Batch()

    call = rpc.TelemetryStub(channel).Publish(chain([rank.batch()], never()))
    next(call)
    return call


def test_who_has_no_token_rolls_nothing_up(node: Node, tree: tuple[Below, Below]) -> None:
    known = tree[0].listens()
    for stranger in (
        Endpoint(known.target, "", known.certificate),
        Endpoint(known.target, "x" * 32, known.certificate),
    ):
        with stranger.channel() as channel:
            call = rollup_pb2_grpc.FederationStub(channel).Up(iter([up.RollUp(run_id="x")]), metadata=stranger.metadata)
            with pytest.raises(grpc.RpcError) as refused:
                list(call)
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
