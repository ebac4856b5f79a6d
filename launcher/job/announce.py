"""The launcher's own records, RunStarted and RunFinished, as source -1."""

from __future__ import annotations

import json
import os
import socket as sockets
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from distui.core.errors import DistuiError
from distui.core.paths import RunFolder, open_own, read_json, read_own
from distui.core.telemetry.harmless import harmless
from distui.core.telemetry.kinds import AGAIN, RESTART
from distui.launcher.job.outcome import Outcome

if TYPE_CHECKING:
    from distui.proto import telemetry_pb2 as pb

LAUNCHER_RANK = -1


LOOK_S = 0.25


class Announcer:
    """Tells the daemon that a run begins, each time that it is started again, and how it ended.

    What is not acknowledged is sent again with the next record. A daemon that is gone costs the job nothing: run.json
    and outcome.json say the same.
    """

    def __init__(self, run: RunFolder, socket: Path | None) -> None:
        self._run, self._socket = run, socket
        self._incarnation = time.time_ns()
        self._records: list[pb.Record] = []
        self._seq = 0
        self._restarts = self._again = 0
        self._ended = threading.Event()
        self._watch = threading.Thread(target=self._tell_restarts, name="restarts", daemon=True)

    def started(self) -> None:
        """Send RunStarted, as run.json has it."""
        if self._socket is None:
            return
        from distui.proto import telemetry_pb2 as pb

        spec = json.loads(read_own(self._run.spec))
        names = ("name", "command", "strategy", "config_toml", "world_size", "num_nodes", "planned_memory_bytes")
        spec["command"] = [harmless(word) for word in spec["command"]]  # an argument need be no Unicode
        self._send(pb.Record(run_started=pb.RunStarted(**{name: spec[name] for name in names})))
        if spec.get("max_restarts"):
            self._watch.start()

    def _tell_restarts(self) -> None:
        """Send an event a restart, as soon as there is one: before its ranks are there."""
        from distui.proto import telemetry_pb2 as pb

        while True:
            ended = self._ended.wait(LOOK_S)
            told = (read_json(self._run.restarts) or {}).get("restarts", [])
            for place, one in enumerate(told):
                about = {"attempt": str(one["attempt"]), "step": str(one["step"] if one["step"] is not None else "n/a")}
                if place >= self._restarts:
                    self._restarts += 1
                    about["time_s"] = str(one["time_s"])
                    self._event(pb.Event.WARNING, RESTART, one["cause"], about)
                if place >= self._again and "ready_s" in one:
                    self._again += 1
                    about |= {"time_s": str(one["ready_s"])}
                    about |= {name: str(one[name]) for name in ("world_size", "num_nodes")}
                    message = f"attempt {one['attempt']} is started, with {one['world_size']} ranks"
                    self._event(pb.Event.INFO, AGAIN, message, about)
            if ended:
                return

    def _event(self, level: pb.Event.Level, kind: str, message: str, about: dict[str, str]) -> None:
        from distui.proto import telemetry_pb2 as pb

        self._send(pb.Record(event=pb.Event(level=level, kind=kind, message=message, attributes=about)))

    def finished(self, outcome: Outcome) -> None:
        """Send RunFinished."""
        if self._socket is None:
            return
        self._ended.set()
        if self._watch.is_alive():
            self._watch.join()
        from distui.proto import telemetry_pb2 as pb

        finished = pb.RunFinished(state=outcome.state, exit_status=outcome.exit_status, message=outcome.message)
        self._send(pb.Record(run_finished=finished))

    def _send(self, record: pb.Record) -> None:
        from distui.launcher.job.daemon_client import publish
        from distui.proto import telemetry_pb2 as pb

        assert self._socket is not None
        self._seq += 1
        record.seq, record.time_s = self._seq, time.time()
        self._records.append(record)
        source = pb.Source(
            rank=LAUNCHER_RANK, node=sockets.gethostname(), pid=os.getpid(), incarnation=self._incarnation
        )
        batch = pb.Batch(run_id=self._run.run_id, run_dir=str(self._run.path), source=source, records=self._records)
        try:
            acked = publish(self._socket, batch)
        except DistuiError as error:
            told = f"distui: the daemon did not take the launcher's records: {error}"
            path = self._run.logs / "launcher.log"
            try:
                with open(open_own(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "a", encoding="utf-8") as log:
                    log.write(f"{told}\n")
            except OSError:  # a full disk, or the run's folder is gone
                print(told, file=sys.stderr)
            return
        self._records = [kept for kept in self._records if kept.seq > acked]
