"""A recording as the dashboard's source: what `MonitorClient` is for a live run, and the player's controls."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator

from distui.core.errors import DaemonUnavailable, NotOwn
from distui.core.paths import RunFolder
from distui.daemon.runs.folders import FINAL_STATES, read_info
from distui.daemon.runs.recording import Recording
from distui.daemon.serve.monitor import read_log
from distui.proto import telemetry_pb2 as pb
from distui.tui.monitor.player import SPEEDS

ALL_ANEW_STEPS = 2000
"""After a jump over more steps than this, the thinned history is sent and not each of them."""


class Replay:
    """Plays one run. Use it within one event loop."""

    def __init__(self, run: RunFolder) -> None:
        """Begin at the first record, playing."""
        self.recording = Recording(run)
        self.away_since_s: float | None = None
        self.problem = ""
        self.playing, self.speed = True, SPEEDS[0]
        self.busy: tuple[str, float] | None = None
        self._run = run
        self._wanted_s: float | None = None
        self._wake = asyncio.Event()
        self._grows = read_info(run).state not in FINAL_STATES

    @property
    def epoch(self) -> int:
        """Grows when the cursor went back, and what was sent before no longer holds."""
        return self.recording.epoch

    @property
    def first_s(self) -> float:
        """When the recording begins. Units: Unix seconds."""
        return self.recording.first_s

    @property
    def last_s(self) -> float:
        """When it ends so far. Units: Unix seconds."""
        return self.recording.last_s

    @property
    def at_s(self) -> float:
        """Where the cursor is, or is on its way to. Units: Unix seconds."""
        at_s = self._wanted_s if self._wanted_s is not None else self.recording.at_s
        return max(self.first_s, min(at_s, self.last_s))

    def play_or_pause(self) -> None:
        """Stop or go on; at the end, begin again."""
        self.playing = not self.playing
        if self.playing and self.recording.at_end and not self._grows:
            self._wanted_s = self.first_s
        self._wake.set()

    def seek(self, to_s: float) -> None:
        """Go to a moment. Units: Unix seconds."""
        self._wanted_s = max(self.first_s, min(to_s, self.last_s))
        self._wake.set()

    def change_speed(self, by: int) -> None:
        """Take the next speed, or the one before."""
        self.speed = SPEEDS[max(0, min(len(SPEEDS) - 1, SPEEDS.index(self.speed) + by))]

    async def close(self) -> None:
        """Nothing is open between two reads."""

    async def watch(
        self, run_id: str, interval_s: float = 0.5, max_points: int = 2000
    ) -> AsyncGenerator[pb.Update, None]:
        """Yield what there was to see as the cursor moves; without end."""
        await self._work("reading", self.recording.read_more())
        if not self.recording.num_records:
            self.problem = "this run has no telemetry: telemetry.enabled was false, or it was too old to keep"
        self._wanted_s = self.first_s
        marks, epoch, before = (0, 0, 0), -1, time.monotonic()
        while True:
            self._wake.clear()
            if self._grows:
                await self._work("", self.recording.read_more())
                self._grows = read_info(self._run).state not in FINAL_STATES
            passed_s, before = time.monotonic() - before, time.monotonic()
            to_s, self._wanted_s = self._next_s(passed_s), None
            if self.recording.num_records and (to_s != self.recording.at_s or epoch < 0):
                await self._work("seeking", self.recording.move(to_s))
                before = time.monotonic()
                update, marks = self._update(marks if epoch == self.epoch else (0, 0, 0), max_points)
                epoch = self.epoch
                yield update
            if self._wanted_s is None:
                try:
                    await asyncio.wait_for(self._wake.wait(), interval_s)
                except asyncio.TimeoutError:
                    continue

    def _next_s(self, passed_s: float) -> float:
        if self._wanted_s is not None:
            return self._wanted_s
        at_s = self.recording.at_s
        if not self.playing:
            return at_s
        if self.recording.at_end and not self._grows:
            self.playing = False
            return at_s
        return max(at_s, min(at_s + passed_s * self.speed, self.last_s))

    async def _work(self, what: str, slices: Iterator[float]) -> None:
        """Do it in slices, so that keys are heard meanwhile; another seek ends it."""
        began = time.monotonic()
        for share in slices:
            if what and time.monotonic() - began > 0.3:  # what is faster needs no word
                self.busy = (what, share)
            await asyncio.sleep(0)
            if what == "seeking" and self._wanted_s is not None:
                break
        self.busy = None

    def _update(self, marks: tuple[int, int, int], max_points: int) -> tuple[pb.Update, tuple[int, int, int]]:
        snapshot = self.recording.snapshot()  # first: at the end it sums up the last steps
        state = self.recording.state
        steps = state.steps.history
        far = steps.head - marks[0] > ALL_ANEW_STEPS or not marks[0]
        update = pb.Update(
            snapshot=snapshot,
            steps=steps.all(max_points) if far else steps.after(marks[0]),
            events=state.events.after(marks[1]) if marks[1] else state.events.all(),
            metrics=state.metrics.after(marks[2]) if marks[2] else state.metrics.all(max_points),
            server_time_s=self.recording.at_s,
        )
        return update, (steps.head, state.events.head, state.metrics.head)

    async def read_log(self, run_id: str, rank: int, offset: int, max_bytes: int = 65536) -> pb.ReadLogResponse:
        """Return a piece of a rank's log as far as it went at the cursor, where the rank has told; else all of it."""
        size = self._log_bytes(rank)
        if size is None:
            return await self._read(pb.ReadLogRequest(rank=rank, offset=offset, max_bytes=max_bytes))
        start = max(0, size + offset) if offset < 0 else min(offset, size)
        request = pb.ReadLogRequest(rank=rank, offset=start, max_bytes=min(max_bytes, size - start))
        if start == size:
            return pb.ReadLogResponse(next_offset=size, size=size)
        reply = await self._read(request)
        reply.size = size
        return reply

    async def _read(self, request: pb.ReadLogRequest) -> pb.ReadLogResponse:
        try:
            return await asyncio.to_thread(read_log, self._run, request)
        except NotOwn as error:
            raise DaemonUnavailable(f"{error.filename}: {error.strerror}") from error

    def _log_bytes(self, rank: int) -> int | None:
        """Return how long a rank's log was at the cursor; None where it was not told."""
        if rank < 0 or self.recording.at_end:
            return None
        known = self.recording.state.ranks.get(rank)
        if known is None or known.heartbeat is None:
            return 0  # nothing had been heard of it
        return known.heartbeat.log_bytes if known.heartbeat.HasField("log_bytes") else None

    async def execute(
        self, run_id: str, verb: str, arguments: dict[str, str] | None = None, deadline_s: float = 30.0
    ) -> AsyncIterator[pb.ControlReply]:
        """Refuse: what is past cannot be acted upon. Raises: DaemonUnavailable."""
        raise DaemonUnavailable("this is a recording: distui monitor RUN shows the run itself")
        yield pb.ControlReply()  # makes this an asynchronous generator
