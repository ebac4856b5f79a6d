"""A log view that reads a rank's log from the daemon, a piece at a time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from textual import on

from distui.core.errors import DaemonUnavailable
from distui.proto import telemetry_pb2 as pb
from distui.tui.widgets.log import LogView

ReadLog = Callable[[int, int, int], Awaitable[pb.ReadLogResponse]]
"""(rank, offset, max_bytes) -> a piece of that rank's log."""

PIECE_BYTES = 65536
READING = "reading the log"


class LogTail(LogView):
    """Follows the log of one rank: the last piece first, then what is new, and earlier pieces when scrolled back."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(empty=READING, id=id)
        self._rank: int | None = None
        self._first = 0
        self._next: int | None = None
        self._read: ReadLog | None = None
        self._busy = False
        self._turn = 0
        """Grows with each change of the rank: what was asked before is not for this log."""

    @property
    def read_once(self) -> bool:
        """Whether the log, or why there is none, is known."""
        return self._next is not None or self.empty != READING

    @property
    def told(self) -> str:
        """How many lines are held, for a title."""
        return f"{self.num_lines:,} lines" if self.read_once else "reading"

    def follow(self, rank: int) -> None:
        """Begin with another rank's log; -1 is the launcher's."""
        if rank != self._rank:
            self._rank, self._first, self._next = rank, 0, None
            self._turn += 1
            self.empty = READING
            self.clear()

    def poll(self, read: ReadLog | None) -> None:
        """Read what is new, unless a read is still under way."""
        if read is None:
            self.empty = "n/a: not connected to the daemon"
            self.refresh()
        elif not self._busy and self._rank is not None:
            self._read = read
            self._busy = True
            self.run_worker(self._forward(read, self._rank), group="log")

    async def _forward(self, read: ReadLog, rank: int) -> None:
        turn, start = self._turn, self._next
        try:
            reply = await read(rank, -PIECE_BYTES if start is None else start, PIECE_BYTES)
            if turn != self._turn:
                return
            if start is not None and reply.size < start:
                self._next = None
                self.clear()
                return
            data = bytes(reply.data)
            if start is None:
                self._first = reply.next_offset - len(data)
                if self._first > 0:
                    # The piece begins within a line: leave that to the earlier piece.
                    cut = data.find(b"\n") + 1
                    data, self._first = data[cut:], self._first + cut
            self._next = reply.next_offset
            self.empty = "the log is empty"
            self.append(data)
        except DaemonUnavailable as error:
            if turn == self._turn:
                self.empty = f"n/a: {error}"
                self.refresh()
        finally:
            self._busy = False

    @on(LogView.WantsMore)
    def _earlier(self) -> None:
        if self._first > 0 and not self._busy and self._read is not None and self._rank is not None:
            self._busy = True
            self.run_worker(self._backward(self._read, self._rank), group="log")

    async def _backward(self, read: ReadLog, rank: int) -> None:
        turn, start = self._turn, max(0, self._first - PIECE_BYTES)
        try:
            reply = await read(rank, start, self._first - start)
            if turn != self._turn:
                return
            data = bytes(reply.data)
            cut = data.find(b"\n") + 1 if start > 0 else 0
            self.prepend(data[cut:])
            self._first = start + cut
        except DaemonUnavailable as error:
            self.notify(str(error), title="Cannot read earlier lines", severity="warning", markup=False)
        finally:
            self._busy = False
