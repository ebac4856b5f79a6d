"""One attempt of a job on many hosts, as its agents tell of it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from dataclasses import dataclass, field

from distui.core.paths import RunFolder, open_own, write_own
from distui.launcher.job.outcome import Ending, gave_way
from distui.proto import cluster_pb2 as pb

_FILE = re.compile(r"logs/rank[0-9]+\.(log|stderr)")


class Logs:
    """What ranks of other hosts print, in the logs here. A rank that another host has now goes on below the old one."""

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._begins: dict[tuple[int, str], int] = {}
        """By node and file: where in the log here the node's own begins."""
        self._writers: dict[str, int] = {}

    def keep(self, node: int, piece: pb.FilePiece) -> None:
        """Write a piece to where it belongs."""
        if not _FILE.fullmatch(piece.name):
            return
        path = self._run.path / piece.name
        with contextlib.suppress(OSError):  # a full disk costs the copy: the log is on its host
            is_log = piece.name.endswith(".log")
            begin = self._begin(node, piece.name if is_log else f"{piece.name.rpartition('.')[0]}.log")
            if begin and not is_log:
                return  # marks count from the beginning of the node's own log: all of it passes as stdout
            log = open_own(path, os.O_WRONLY | os.O_CREAT)
            os.pwrite(log, piece.data, begin + piece.offset)
            os.close(log)

    def _begin(self, node: int, name: str) -> int:
        if (node, name) not in self._begins:
            path = self._run.path / name
            follows = self._writers.get(name, node) != node and path.exists()
            self._begins[node, name] = path.stat().st_size if follows else 0
        self._writers[name] = node
        return self._begins[node, name]


@dataclass(slots=True)
class Attempt:
    """What is known of one attempt. Times are this host's wall clock."""

    number: int
    run: RunFolder
    logs: Logs
    endings: dict[int, Ending] = field(default_factory=dict)
    steps: dict[int, int] = field(default_factory=dict)
    port: int = 0
    done: set[int] = field(default_factory=set)
    swept: set[int] = field(default_factory=set)
    problems: dict[int, str] = field(default_factory=dict)
    stopped: str = ""
    is_alone_told: bool = False
    is_running: bool = False
    """Whether its ranks have been started."""

    def failed(self) -> bool:
        """Tell whether a rank ended badly, or could not be started."""
        bad = any(ending.bad for ending in self.endings.values())
        return bool(self.problems) or (bad and not gave_way(self.endings))

    def hear(self, node: int, said: pb.AgentSays) -> None:
        """Take in what the agent of a node says."""
        body = said.WhichOneof("body")
        if body == "file":
            self.logs.keep(node, said.file)
        elif body == "store" and said.store.attempt == self.number:
            self.port = said.store.port
            if said.store.problem:
                self.problems[node] = said.store.problem
        elif body == "ended" and said.ended.attempt == self.number:
            self._keep_ending(said.ended)
        elif body == "done" and said.done.attempt == self.number:
            (self.swept if said.done.swept else self.done).add(node)
            self.stopped = self.stopped or said.done.stopped
            if said.done.problem:
                self.problems[node] = said.done.problem

    def _keep_ending(self, told: pb.RankEnded) -> None:
        status = told.exit_status if told.HasField("exit_status") else None
        signum = told.signal if told.HasField("signal") else None
        now_s = time.time()
        self.endings[told.rank] = Ending(told.rank, told.pid, status, signum, now_s - told.age_s)
        if told.HasField("step"):
            self.steps[told.rank] = told.step
        if told.report:
            try:
                report = json.loads(told.report)
                report["time_s"] = now_s - told.report_age_s  # by the clock of this host
                write_own(self.run.rank_error(told.rank), json.dumps(report, indent=1))
            except (ValueError, TypeError, OSError) as error:
                print(f"the error of rank {told.rank} cannot be kept: {error}", flush=True)
