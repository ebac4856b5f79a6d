"""A job without a screen: rank 0's output as it comes on stdout, distui's own lines on stderr."""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from distui.core.config import Config
from distui.core.errors import DistuiError
from distui.core.paths import RunFolder
from distui.launcher.job import Job
from distui.tui.format import num_bytes, scalar, seconds, si

if TYPE_CHECKING:
    from distui.proto import telemetry_pb2 as pb

LOG_POLL_S = 0.1
WATCH_INTERVAL_S = 1.0
PROGRESS_S = 5.0
"""Between two lines of progress."""


def say(line: str) -> None:
    """Write one line of distui's own to stderr."""
    print(f"distui: {line}", file=sys.stderr, flush=True)


def say_start(run: RunFolder) -> None:
    """Write the start line: run, ranks, strategy, and where the logs are."""
    spec = json.loads(run.spec.read_text(encoding="utf-8"))
    world = spec["world_size"]
    ranks = f"{world} rank{'s' if world > 1 else ''}"
    nodes = f" on {spec['num_nodes']} nodes" if spec["num_nodes"] > 1 else ""
    say(f"run {run.run_id}: {ranks}{nodes}, {spec['strategy']}; logs in {run.logs}")


def follow_plain(job: Job, config: Config, socket: Path | None, *, from_now: bool = False) -> None:
    """Copy the output of this node's first rank to stdout until the job has ended; report progress beside it.

    With `from_now` what the log already has is left out.
    """
    assert isinstance(config.cluster.nproc, int)
    log = job.run.rank_log(config.cluster.node_rank * config.cluster.nproc)
    progress = Progress(job.run, socket) if socket is not None else None
    if progress is not None:
        progress.start()
    output = LogCopy(log, sys.stdout.buffer, skip=log.stat().st_size if from_now and log.exists() else 0)
    told = False
    while not job.wait(LOG_POLL_S):
        output.copy()
        if job.stopped_by is not None and not told:
            told = True
            say(f"{job.stopped_by.name}: stopping the ranks; again to kill them at once")
    output.copy()
    output.close()
    if progress is not None:
        progress.stop()


class LogCopy:
    """Copies what is new in a log to a stream; when nobody reads the stream any more, it stops and the job goes on."""

    def __init__(self, path: Path, out: BinaryIO, skip: int = 0) -> None:
        self._path, self._skip = path, skip
        self._out: BinaryIO | None = out
        self._log: BinaryIO | None = None

    def copy(self) -> None:
        """Copy what was appended since the last call."""
        if self._out is None:
            return
        if self._log is None:
            try:
                self._log = open(self._path, "rb")  # noqa: SIM115  kept open: read on from where it was
            except FileNotFoundError:
                return
            self._log.seek(self._skip)
        try:
            while data := self._log.read(1 << 16):
                self._out.write(data)
            self._out.flush()
        except OSError:  # a closed pipe, or a terminal that is gone
            self._out = None
            say(f"nobody reads stdout; the job goes on, its output is in {self._path}")
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the exit's flush does not fail

    def close(self) -> None:
        """Close the log."""
        if self._log is not None:
            self._log.close()


class Progress:
    """A thread that reads the daemon's stream and writes a line every few seconds, and each diagnosis at once."""

    def __init__(self, run: RunFolder, socket: Path) -> None:
        self._run, self._socket = run, socket
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="progress", daemon=True)
        self._told: set[tuple[str, tuple[int, ...], str, int]] = set()
        self._told_step, self._told_s = 0, 0.0

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread; nothing is written after it."""
        self._ended.set()
        self._thread.join(5.0)

    def _follow(self) -> None:
        from distui.launcher.daemon_client import channel_to
        from distui.proto import telemetry_pb2 as pb
        from distui.proto import telemetry_pb2_grpc as rpc

        request = pb.WatchRequest(run_id=self._run.run_id, interval_s=WATCH_INTERVAL_S, max_points=1)
        while not self._ended.is_set():
            try:
                with channel_to(self._socket) as channel:
                    stream = rpc.MonitorStub(channel).Watch(request, wait_for_ready=True)
                    waiter = threading.Thread(target=lambda call=stream: (self._ended.wait(), call.cancel()))
                    waiter.daemon = True
                    waiter.start()
                    for update in stream:
                        if self._ended.is_set():
                            return
                        self._tell(update)
            except DistuiError as error:
                if self._ended.is_set():
                    return
                say(f"the daemon is away ({error}); the job goes on")
            self._ended.wait(PROGRESS_S)

    def _tell(self, update: pb.Update) -> None:
        for found in update.snapshot.diagnosis:
            key = (found.kind, tuple(found.ranks), found.group, found.seq)
            if key not in self._told:
                self._told.add(key)
                say(f"{found.kind}: {found.message}")
        if not update.steps:
            return
        newest = update.steps[-1]
        now = update.server_time_s
        if newest.step > self._told_step and now - self._told_s >= PROGRESS_S:
            self._told_step, self._told_s = newest.step, now
            say(progress_line(newest, update.snapshot))


def progress_line(step: pb.StepSummary, snapshot: pb.Snapshot) -> str:
    """Return `step 40, loss 2.871, 12.3 k tokens/s, 81.0 ms a step, 412 MiB on rank 1`, as far as known."""
    words = [f"step {step.step}"]
    if step.HasField("loss"):
        words.append(f"loss {scalar(step.loss)}")
    if step.tokens_per_s > 0:
        words.append(si(step.tokens_per_s, "tokens/s"))
    words.append(f"{seconds(step.step_s)} a step")
    known = [rank for rank in snapshot.ranks if rank.HasField("memory_bytes")]
    if known:
        fullest = max(known, key=lambda rank: rank.memory_bytes)
        words.append(f"{num_bytes(fullest.memory_bytes)} on rank {fullest.rank}")
    return ", ".join(words)
