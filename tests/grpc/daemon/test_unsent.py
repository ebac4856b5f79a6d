"""What a rank recorded is kept however its daemon does: stopped, killed again and again, or never there."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from distui.core.paths import RunFolder, daemon_socket
from distui.daemon.runs.recording import Recording
from distui.daemon.runs.snapshot import load_state, read_snapshot
from distui.daemon.runs.store import read_batches
from distui.daemon.runs.unsent import Unsent, unsent_batches, unsent_files
from distui.proto import telemetry_pb2 as pb

if TYPE_CHECKING:
    from tests.grpc.simulated_ranks import Node


class Rank:
    """A rank's process, told what to do."""

    def __init__(self, node: Node, run: RunFolder, rank: int = 0, world_size: int = 1) -> None:
        script = str(Path(__file__).with_name("real_rank.py"))
        self.process: subprocess.Popen[str] = node.process(
            sys.executable, script, str(run.path), str(rank), str(world_size)
        )

    def tell(self, line: str) -> None:
        """Have it do something, and wait until it has."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "ok\n"

    def end(self) -> None:
        """Close its telemetry and wait for its end."""
        self.tell("close")
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(120) == 0


def kept_steps(run: RunFolder) -> list[int]:
    """Return the steps that the run's log and what was not sent hold together."""
    batches = [*read_batches(run), *unsent_batches(run)]
    return sorted({record.step.step for batch in batches for record in batch.records if record.HasField("step")})


def test_what_a_stopped_daemon_did_not_take_is_seen_once_it_goes_on(node: Node) -> None:
    daemon = node.start()
    run = node.run(world_size=1)
    rank = Rank(node, run)
    rank.tell("step 5")
    node.wait(run, lambda found: found.ranks and found.ranks[0].step == 5)
    daemon.send_signal(signal.SIGSTOP)
    rank.tell("step 200")
    rank.end()
    assert kept_steps(run) == list(range(1, 201)) and unsent_files(run)
    assert read_snapshot(run).ranks[0].step == 200  # without the daemon, too
    daemon.send_signal(signal.SIGCONT)
    snapshot = node.wait(run, lambda found: found.ranks[0].step == 200 and found.ranks[0].state == "finished")
    assert not snapshot.diagnosis and snapshot.dropped == 0
    node.kill()
    node.start()
    assert node.snapshot(run).ranks[0].step == 200
    update = next(iter(node.monitor.Watch(pb.WatchRequest(run_id=run.run_id))))
    assert [step.step for step in update.steps] == list(range(1, 201))
    recording = Recording(run)
    for slices in (recording.read_more(), recording.move(time.time())):
        list(slices)
    assert recording.state.ranks[0].last_step is not None and recording.state.ranks[0].last_step.step == 200


@pytest.mark.parametrize("kills", [4, pytest.param(100, marks=[pytest.mark.fuzz, pytest.mark.timeout(1800)])])
def test_a_daemon_that_is_killed_again_and_again_loses_no_step(node: Node, kills: int) -> None:
    moments = random.Random(5)
    run = node.run(world_size=1)
    rank = Rank(node, run)
    step = 0
    for _ in range(kills):
        node.start()
        until = time.monotonic() + moments.uniform(0.0, 0.5)
        while time.monotonic() < until:
            step += 3
            rank.tell(f"step {step}")
        node.kill()
        step += 10
        rank.tell(f"step {step}")
    rank.end()
    assert kept_steps(run) == list(range(1, step + 1))
    snapshot = read_snapshot(run)
    assert (snapshot.ranks[0].step, snapshot.ranks[0].state, snapshot.dropped) == (step, "finished", 0)


def test_what_a_living_rank_has_on_its_disk_it_sends_itself_when_a_daemon_comes(node: Node) -> None:
    run = node.run(world_size=1)
    rank = Rank(node, run)
    rank.tell("step 50")
    deadline = time.monotonic() + 120
    while kept_steps(run) != list(range(1, 51)):  # the file may be there before what it is for
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert read_snapshot(run).ranks[0].step == 50
    state = load_state(run)
    Unsent(run).take_into(state)
    assert not state.ranks  # it may still send them, and a daemon would take them for known
    node.start()
    node.wait(run, lambda found: found.ranks and found.ranks[0].step == 50)
    rank.tell("step 60")
    node.wait(run, lambda found: found.ranks[0].step == 60)
    rank.end()
    assert not unsent_files(run)
    steps = [record.step.step for batch in read_batches(run) for record in batch.records if record.HasField("step")]
    assert steps == list(range(1, 61))


def test_a_dead_rank_s_unsent_records_are_taken(node: Node) -> None:
    run = node.run(world_size=1)
    rank = Rank(node, run)
    rank.tell("step 50")
    deadline = time.monotonic() + 120
    while kept_steps(run) != list(range(1, 51)):  # the file may be there before what it is for
        assert time.monotonic() < deadline
        time.sleep(0.05)
    rank.process.kill()
    rank.process.wait()
    state = load_state(run)
    Unsent(run).take_into(state)
    assert state.ranks[0].last_step is not None and state.ranks[0].last_step.step == 50
    assert [found.kind for found in read_snapshot(run).diagnosis] == ["dead_rank"]


def script(text: str, run: RunFolder, delay_s: float = 0.0) -> subprocess.CompletedProcess[str]:
    """Run `text` in a process with an open source, whose side thread begins `delay_s` late."""
    opening = """
        import sys, time
        from pathlib import Path

        class Late:
            def find_spec(self, name, path=None, target=None):
                if name == "distui.core.telemetry.records":
                    time.sleep(float(sys.argv[2]))

        sys.meta_path.insert(0, Late())
        from distui.core.config.schema import TelemetrySection
        from distui.core.paths import RunFolder
        from distui.core.telemetry.source import open_source
        run = RunFolder(Path(sys.argv[1]))
        source = open_source(0, 0, 1, run, TelemetrySection(flush_s=0.02, heartbeat_s=0.1))
    """
    command = [sys.executable, "-c", textwrap.dedent(opening) + textwrap.dedent(text), str(run.path), str(delay_s)]
    return subprocess.run(command, capture_output=True, text=True, timeout=180)


def test_a_rank_whose_side_thread_comes_late_loses_nothing(node: Node) -> None:
    """As on a machine that has more to do than it can: the thread has not even begun when the rank ends."""
    node.start()
    run = node.run(world_size=1)
    done = script("source.step(step=1, step_s=0.1)\nsource.close(0)", run, delay_s=4.0)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    (rank,) = node.snapshot(run).ranks
    assert (rank.step, rank.state) == (1, "finished") and not unsent_files(run)


def test_without_a_daemon_nothing_blocks_or_speaks_and_all_is_on_the_disk(node: Node) -> None:
    run = node.run(world_size=1)
    daemon_socket().touch()  # a file in the way of the socket: what a killed daemon leaves behind
    done = script(
        """
        for step in range(1, 50001):
            source.step(step=step, step_s=0.1)
            source.collective_end(source.collective_begin("world", "all_reduce", "float32", 4, 2))
        source.close(0)
        assert source._sender._outbox.num_in_memory() == 0
        assert "grpc" not in sys.modules
        """,
        run,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    batches = unsent_batches(run)
    records, dropped = [record for batch in batches for record in batch.records], batches[-1].dropped
    told = [record for record in records if record.WhichOneof("body") in ("step", "collective")]
    assert len(told) + dropped == 100_000 and len(told) > 20_000  # what came faster than the ring is read is counted
    assert records[-1].seq == len(records) + dropped and batches[-1].last
