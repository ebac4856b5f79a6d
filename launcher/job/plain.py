"""A job without a screen: rank 0's output as it comes on stdout, distui's own lines on stderr."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from distui.core.config.schema import Config
from distui.core.errors import DistuiError
from distui.core.paths import RunFolder, list_own, open_own, read_json, read_own
from distui.core.telemetry.harmless import HarmlessStream, harmless
from distui.launcher.job.attached import AttachedJob
from distui.launcher.job.background import Background
from distui.launcher.job.job import Job
from distui.launcher.job.outcome import signal_name
from distui.launcher.node.streams import Marks
from distui.tui.format import duration, num_bytes, scalar, seconds, si

if TYPE_CHECKING:
    from distui.proto import telemetry_pb2 as pb

LOG_POLL_S = 0.1
WATCH_INTERVAL_S = 1.0
PROGRESS_S = 5.0
"""Between two lines of progress."""


def say(line: str) -> None:
    """Write one line of distui's own to stderr."""
    print(f"distui: {line}", file=sys.stderr, flush=True)


def say_start(run: RunFolder, config: Config) -> None:
    """Write the start line: run, ranks, strategy, where the logs are; and what a restart would have to begin with."""
    spec = json.loads(read_own(run.spec))
    world = spec["world_size"]
    ranks = f"{world} rank{'s' if world > 1 else ''}"
    nodes = f" on {spec['num_nodes']} nodes" if spec["num_nodes"] > 1 else ""
    say(f"run {run.run_id}: {ranks}{nodes}, {spec['strategy']}; logs in {run.logs}")
    if config.cluster.max_restarts and not (config.checkpoint.every_steps or config.checkpoint.memory_every_steps):
        say("a restart begins from the beginning: checkpoint.every_steps is 0, so that nothing is saved by itself")


def follow_plain(
    job: Job | Background | AttachedJob, config: Config, daemon: Path | None, *, from_now: bool = False
) -> None:
    """Copy the output of this node's first rank to stdout until the job has ended; report progress beside it.

    With `from_now` what the log already has is left out, and the line of the start comes once that is settled.
    """
    assert isinstance(config.cluster.nproc, int)
    shown = 0 if config.cluster.hosts else config.cluster.node_rank * config.cluster.nproc
    log = job.run.rank_log(shown)
    progress = Progress(job.run, daemon) if daemon is not None else None
    if progress is not None:
        progress.start()
    known = list_own(job.run.logs).get(log.name) if from_now else None
    if from_now:
        say_start(job.run, config)
    first = FirstFailure(job.run, shown)
    skip = known.st_size if known is not None else 0
    output = LogCopy(log, sys.stdout.buffer, skip, sys.stderr.buffer, first.tell)
    console, debugging = job.console, WaitsForDebugger(job.run)
    notices = Notices(job.run)
    told = False
    suspended = signal.getsignal(signal.SIGTSTP)
    if suspended is not signal.SIG_IGN:  # a shell without job control has it ignored
        signal.signal(signal.SIGTSTP, lambda *_: _suspend(job.run))
    while not job.wait(LOG_POLL_S):
        asked = console is not None and console.asked()
        notices.tell()
        output.copy()
        debugging.tell()
        if console is not None and asked:
            console.shown()
        if job.stopped_by is not None and not told:
            told = True
            say(f"{job.stopped_by.name}: stopping the ranks; again to kill them at once")
    signal.signal(signal.SIGTSTP, suspended)
    notices.tell()
    output.copy(last=True)
    output.close()
    if progress is not None:
        progress.stop()


def _suspend(run: RunFolder) -> None:
    """Say that Ctrl-Z stops this command alone, and stop it."""
    say(f"Ctrl-Z stops this command, not the job: fg shows it again, distui stop {run.run_id} ends it")
    signal.raise_signal(signal.SIGSTOP)


class LogCopy:
    """Copies what is new in a log to a stream; when nobody reads the stream any more, it stops and the job goes on.

    With `err` what the rank wrote to stderr goes there. `before` is called when something has been read and before it
    is copied.
    """

    def __init__(
        self,
        path: Path,
        out: BinaryIO | HarmlessStream,
        skip: int = 0,
        err: BinaryIO | HarmlessStream | None = None,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        self._path, self._at = path, skip
        self._out: BinaryIO | HarmlessStream | None = out
        self._err, self._before = err, before
        self._marks = Marks(path) if err is not None else None
        self._held = False
        self._log: BinaryIO | None = None

    def copy(self, last: bool = False) -> None:
        """Copy what was appended since the last call; what is being written may wait for the next, unless it is the
        last."""
        if self._out is None:
            return
        if self._log is None:
            try:
                self._log = open(open_own(self._path), "rb")  # noqa: SIM115  kept open: read on from where it was
            except FileNotFoundError:
                return
            self._log.seek(self._at)
        try:
            while data := self._log.read(1 << 16):
                # Whose mark is not written yet waits once: a process that ended within a write never writes it.
                if self._marks is not None and not self._marks.read() and not self._held and not last:
                    self._held = True
                    self._log.seek(self._at)
                    return
                self._held = False
                self._before()
                for is_stderr, piece in self._marks.cut(data, self._at) if self._marks else [(False, data)]:
                    if is_stderr and self._err is not None:
                        self._out.flush()
                        self._err.write(piece)
                        self._err.flush()
                    else:
                        self._out.write(piece)
                self._at += len(data)
            self._out.flush()
        except OSError:  # a closed pipe, or a terminal that is gone
            self._out = None
            say(f"nobody reads stdout; the job goes on, its output is in {self._path}")
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the exit's flush does not fail

    def close(self) -> None:
        """Close the log."""
        if self._log is not None:
            self._log.close()
        if self._marks is not None:
            self._marks.close()


class Notices:
    """Tells what the supervisor of a job on many hosts has to say, or an agent that starts its ranks again."""

    def __init__(self, run: RunFolder) -> None:
        self._path, self._at = run.notices, 0

    def tell(self) -> None:
        """Say the lines that are new."""
        try:
            with open(open_own(self._path), "rb") as file:
                file.seek(self._at)
                whole, newline, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return
        self._at += len(whole) + len(newline)
        for line in whole.decode(errors="replace").splitlines():
            say(harmless(line))


class WaitsForDebugger:
    """Tells which rank waits for somebody to attach to its debugger, each time that one does."""

    def __init__(self, run: RunFolder) -> None:
        self._run, self._told_s = run, 0.0
        self._may = (read_json(run.spec) or {}).get("debug_rank") is not None

    def tell(self) -> None:
        """Say it once."""
        found = read_json(self._run.debugger) if self._may else None
        if found is not None and found["since_s"] != self._told_s:
            self._told_s = found["since_s"]
            say(harmless(str(found["message"])))


class FirstFailure:
    """Tells which rank failed first, before the output of another one shows what came of it."""

    def __init__(self, run: RunFolder, shown_rank: int) -> None:
        self._run, self._shown, self._told = run, shown_rank, False

    def tell(self) -> None:
        """Say it once; the shown rank's own error is in its output."""
        if self._told:
            return
        # First the endings: before a rank ends it has written of what.
        endings = (read_json(self._run.ending) or {}).get("ranks", [])
        # A file that is being written beside its place may be listed, and gone or empty when it is read.
        names = [name for name in list_own(self._run.errors) if name.endswith(".json")]
        errors = [found for name in names if (found := read_json(self._run.errors / name)) is not None]
        if not errors and not endings:
            return
        self._told = True
        first = min([*errors, *endings], key=lambda found: found["time_s"])
        if first["rank"] == self._shown:
            return
        if "type" in first:
            how = f"{first['type']}: {str(first['message']).strip().partition(chr(10))[0]}"
        elif first["signal"]:
            how = f"killed by {signal_name(first['signal'])}"
        else:
            how = f"exit status {first['exit_status']}"
        where = f" on {host}" if (host := first.get("host")) and host != socket.gethostname() else ""
        say(
            harmless(
                f"rank {first['rank']}{where} failed first: {how}; what other ranks say from here on may come of that"
            )
        )


class Progress:
    """A thread that reads the daemon's stream and writes a line every few seconds, and each diagnosis at once."""

    def __init__(self, run: RunFolder, socket: Path) -> None:
        self._run, self._socket = run, socket
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="progress", daemon=True)
        self._told: set[tuple[str, tuple[int, ...], str]] = set()
        self._told_step, self._told_s = 0, 0.0

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread; nothing is written after it."""
        self._ended.set()
        self._thread.join(5.0)

    def _follow(self) -> None:
        from distui.core.telemetry.harmless import make_harmless
        from distui.launcher.job.daemon_client import channel_to
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
                        make_harmless(update)
                        self._tell(update)
            except DistuiError as error:
                if self._ended.is_set():
                    return
                say(f"the daemon is away ({error}); the job goes on")
            self._ended.wait(PROGRESS_S)

    def _tell(self, update: pb.Update) -> None:
        for found in update.snapshot.diagnosis:
            key = (found.kind, tuple(found.ranks), found.group)
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
    """Return `step 40 of 200, loss 2.871, 12.3 k tokens/s, 81.0 ms a step, 412 MiB on rank 1, 13s left`, as known."""
    total = f" of {snapshot.total_steps}" if snapshot.HasField("total_steps") else ""
    words = [f"step {step.step}{total}"]
    if step.HasField("loss"):
        words.append(f"loss {scalar(step.loss)}")
    if step.tokens_per_s > 0:
        words.append(si(step.tokens_per_s, "tokens/s"))
    elif step.samples_per_s > 0:
        words.append(si(step.samples_per_s, "samples/s"))
    words.append(f"{seconds(step.step_s)} a step")
    known = [rank for rank in snapshot.ranks if rank.HasField("memory_bytes")]
    if known:
        fullest = max(known, key=lambda rank: rank.memory_bytes)
        words.append(f"{num_bytes(fullest.memory_bytes)} on rank {fullest.rank}")
    if snapshot.HasField("left_s"):
        words.append(f"{duration(snapshot.left_s)} left")
    return ", ".join(words)
