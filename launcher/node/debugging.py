"""What `breakpoint()` does in a rank: one rank stops, at the launcher's terminal or for somebody who attaches.

The others pass over it and wait for that one at their next collective: of all ranks that come to the same line only
one can have the terminal.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any

from distui.core.errors import UserError
from distui.core.paths import RunFolder, read_own, remove_own, write_own
from distui.core.telemetry.after_import import after_import
from distui.core.telemetry.kinds import DEBUGGER
from distui.launcher.job.console import ConsoleLine
from distui.launcher.job.debug_socket import Lent, accept, listen
from distui.launcher.node.stdin import PersonWait

if TYPE_CHECKING:
    from distui.core.telemetry.source import TelemetrySource


def debug_here(
    run: RunFolder, rank: int, source: TelemetrySource | None, waits: PersonWait, line: ConsoleLine | None
) -> None:
    """Have `breakpoint()` and `pdb.set_trace()` of this rank do what the launch asked for."""
    try:
        spec = json.loads(read_own(run.spec))
    except FileNotFoundError:
        return
    asked = spec.get("debug_rank")
    stops: Callable[[FrameType, str | None], None]
    if asked is None and rank == 0:
        stops = AtStdin(waits, line).stop
    elif asked == rank and spec.get("debugger") == "debugpy":
        stops = InAnEditor(run, rank, source).stop
    elif asked == rank:
        stops = Attached(run, rank, source, waits).stop
    else:
        stops = PassedOver(rank, asked or 0, source).stop
    mine = os.getpid()

    def hook(*arguments: Any, header: str | None = None, **more: Any) -> Any:
        wanted = os.environ.get("PYTHONBREAKPOINT", "")
        if os.getpid() != mine or wanted == "0" or (wanted and asked is None and rank == 0):
            return sys.__breakpointhook__(*arguments, **more)  # a child's, or as the user has chosen
        return stops(sys._getframe(1), header)

    sys.breakpointhook = hook
    after_import("pdb", lambda module: setattr(module, "set_trace", hook))


def _place(frame: FrameType) -> str:
    return f"{os.path.relpath(frame.f_code.co_filename)}:{frame.f_lineno}"


class PassedOver:
    """Another rank than the one that stops."""

    def __init__(self, rank: int, stops: int, source: TelemetrySource | None) -> None:
        self._rank, self._stops, self._source = rank, stops, source
        self._told: set[str] = set()

    def stop(self, frame: FrameType, header: str | None) -> None:
        """Say once for each line that it is passed over."""
        place = _place(frame)
        if place in self._told:
            return
        self._told.add(place)
        message = f"rank {self._rank} passes over breakpoint() at {place}: rank {self._stops} is the one that stops"
        message += f" (--debug-rank {self._rank} stops this one)"
        print(f"distui: {message}", file=sys.stderr)
        if self._source is not None:
            self._source.event("info", "breakpoint", message)


class _Stops:
    """A pdb that is given a terminal each time that it wants to ask, and not in between."""

    def __init__(self, waits: PersonWait) -> None:
        self._waits = waits
        self._pdb: Any = None

    def stop(self, frame: FrameType, header: str | None) -> None:
        """Stop at the frame's next line."""
        pdb = self._made()
        if header is not None:
            print(header)
        pdb.set_trace(frame)

    def _made(self) -> Any:
        if self._pdb is None:
            import pdb

            stops = self

            class Pdb(pdb.Pdb):
                def interaction(self, frame: Any, *more: Any) -> None:
                    try:
                        with stops._waits(DEBUGGER), stops._terminal(frame):
                            super().interaction(frame, *more)
                    except OSError as error:  # whoever had attached is gone, and the terminal with him
                        print(f"distui: the debugger's terminal is gone ({error}); going on", file=sys.stderr)
                        stops._gone()
                        self.set_continue()

                def do_EOF(self, arg: str) -> Any:
                    if not stops._gone():
                        return super().do_EOF(arg)
                    self.message("")
                    self.set_continue()
                    return 1

            self._pdb = Pdb()
        return self._pdb

    @contextmanager
    def _terminal(self, frame: FrameType | None) -> Iterator[None]:
        yield

    def _gone(self) -> bool:
        """Let go of a terminal that was lent; return whether one was."""
        return False


@contextmanager
def _on(stdin: int, stdout: int) -> Iterator[None]:
    """Have file descriptors 0 and 1 be others: only so do C's and Python's reading of lines see the terminal."""
    sys.stdout.flush()
    kept = [os.dup(0), os.dup(1)]
    try:
        os.dup2(stdin, 0)
        os.dup2(stdout, 1)
        yield
    finally:
        with suppress(OSError):  # the terminal is gone
            sys.stdout.flush()
        for number, own in enumerate(kept):
            os.dup2(own, number)
            os.close(own)


class AtStdin(_Stops):
    """Stops at the launcher's stdin, which is this rank's."""

    def __init__(self, waits: PersonWait, line: ConsoleLine | None) -> None:
        super().__init__(waits)
        self._line = line

    def stop(self, frame: FrameType, header: str | None) -> None:
        """Stop at the frame's next line. Raises: UserError without a stdin."""
        if self._line is None:
            raise UserError(
                f"breakpoint() at {_place(frame)} in rank 0, which has no terminal",
                "under the dashboard and in the background no rank has the launcher's stdin",
                "distui launch --no-tui, or --debug-rank 0 and distui attach --debug from another terminal",
            )
        super().stop(frame, header)

    @contextmanager
    def _terminal(self, frame: FrameType | None) -> Iterator[None]:
        if self._line is None or not os.isatty(0):
            yield
            return
        sys.stdout.flush()
        self._line.wait_shown()
        with _on(0, 0):  # a terminal is open for both
            yield


class Attached(_Stops):
    """Stops for whoever attaches from another terminal."""

    def __init__(self, run: RunFolder, rank: int, source: TelemetrySource | None, waits: PersonWait) -> None:
        super().__init__(waits)
        self._telling, self._rank = _Telling(run, source), rank
        self._run_id = run.run_id
        self._listening: socket.socket = listen(run)
        self._lent: Lent | None = None

    @contextmanager
    def _terminal(self, frame: FrameType | None) -> Iterator[None]:
        if self._lent is None or not self._lent.use():
            self._gone()
            place = _place(frame) if frame is not None else "its end"
            how = f"distui attach {self._run_id} --debug, from another terminal"
            with self._telling(f"rank {self._rank} waits in a debugger at {place}: {how}"):
                self._lent = accept(self._listening)
        with _on(self._lent.stdin, self._lent.stdout):
            yield

    def _gone(self) -> bool:
        lent, self._lent = self._lent, None
        if lent is not None:
            lent.give_back()
        return lent is not None


class InAnEditor:
    """Stops in debugpy, on a free port of this machine, once an editor has attached to it."""

    def __init__(self, run: RunFolder, rank: int, source: TelemetrySource | None) -> None:
        self._telling, self._rank, self._address = _Telling(run, source), rank, ""

    def stop(self, frame: FrameType, header: str | None) -> None:
        """Stop at the frame's next line."""
        import debugpy

        if not self._address:
            host, port = debugpy.listen(("127.0.0.1", 0))
            self._address = f"{host}:{port}"
        if not debugpy.is_client_connected():
            message = (
                f"rank {self._rank} waits at {_place(frame)} for an editor to attach to debugpy at {self._address}"
            )
            with self._telling(message):
                debugpy.wait_for_client()
        sys.modules["pydevd"].settrace(  # debugpy.breakpoint() would stop here, not in the script
            suspend=True, trace_only_current_thread=True, patch_multiprocessing=False, stop_at_frame=frame
        )


class _Telling:
    """Tells the launcher and the dashboard that somebody is waited for."""

    def __init__(self, run: RunFolder, source: TelemetrySource | None) -> None:
        self._run, self._source = run, source

    @contextmanager
    def __call__(self, message: str) -> Iterator[None]:
        write_own(self._run.debugger, json.dumps({"since_s": time.time(), "message": message}))
        if self._source is not None:
            self._source.event("warning", DEBUGGER, message)
        try:
            yield
        finally:
            with suppress(FileNotFoundError):
                remove_own(self._run.debugger)
