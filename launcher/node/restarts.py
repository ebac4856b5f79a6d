"""Whether a job that failed is started again, and what is put away before it is."""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distui.core.config.schema import CheckpointSection
from distui.core.errors import EXIT_RANK_FAILED
from distui.core.paths import RunFolder, open_own, remove_own, write_own
from distui.core.telemetry.harmless import harmless
from distui.launcher.job.outcome import Outcome

MAX_STANDSTILLS = 2
"""So many further attempts may fail without a step beyond those before them: more would fail like them."""


@dataclass(slots=True)
class Restarts:
    """The restarts of one job: how many are left, and whether they lead anywhere."""

    max_restarts: int
    attempt: int = 0
    failures: int = 0
    """How many of the attempts before were failures: growing is none."""
    told: list[dict[str, Any]] = field(default_factory=list)
    _best_step: int = -1
    _standstills: int = 0

    def wanted(self, outcome: Outcome, step: int | None) -> str:
        """Return "" where the job is to be started again, else why it is not; `step` is the last that was done."""
        if outcome.state != "failed" or outcome.exit_status != EXIT_RANK_FAILED or not self.max_restarts:
            return "no restart was asked for"
        if self.failures >= self.max_restarts:
            return f"max_restarts={self.max_restarts} allows no more"
        reached = step if step is not None else 0
        if reached > self._best_step:
            self._best_step, self._standstills = reached, 0
        else:
            self._standstills += 1
        if self._standstills >= MAX_STANDSTILLS:
            return f"{self._standstills + 1} attempts came to step {self._best_step} and not beyond it"
        return ""

    def begin(self, run: RunFolder, outcome: Outcome, step: int | None, places: int) -> None:
        """Put away what told of the failed attempt, and note it; `places` is the number of ranks."""
        put_away(run, self.attempt, places)
        self.attempt += 1
        self.failures += outcome.state == "failed"
        why = outcome.message or "failed"
        self.told.append({"attempt": self.attempt, "time_s": time.time(), "step": step, "cause": why})
        self._write(run)

    def ready(self, run: RunFolder, world_size: int, num_nodes: int = 1) -> None:
        """Note that the ranks of an attempt are started: all hosts are there that it is to have."""
        if self.told:
            self.told[-1] |= {"ready_s": time.time(), "world_size": world_size, "num_nodes": num_nodes}
            self._write(run)

    def _write(self, run: RunFolder) -> None:
        write_own(run.restarts, json.dumps({"attempt": self.attempt, "restarts": self.told}))


def say_notice(run: RunFolder, line: str) -> None:
    """Say a line to whoever started the job, and to its log."""
    print(line, flush=True)
    with open(open_own(run.notices, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "a", encoding="utf-8") as file:
        file.write(f"{harmless(line)}\n")


def put_away(run: RunFolder, attempt: int, num_ranks: int) -> None:
    """Keep the errors of an attempt under its number, so that nobody takes them for the next one's."""
    for rank in range(num_ranks):
        path = run.rank_error(rank)
        with contextlib.suppress(FileNotFoundError):
            os.rename(path, path.with_name(f"attempt{attempt}-rank{rank}.txt"))
    with contextlib.suppress(FileNotFoundError):
        remove_own(run.ending)


def newest_checkpoint(run: RunFolder, chosen: CheckpointSection) -> int | None:
    """Return the step of the checkpoint that the next attempt goes on from; None where there is none. For words only.

    It is what `core/engine/resuming` loads, which says so of the same manifests with torch at hand: of this run, unless
    any will do, the one that was saved last, and one in the midst of a step only where there is no other.
    """
    found = []
    for path in checkpoints_of(run, chosen.dir).glob("step_*/manifest.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            manifest = json.loads(path.read_text(encoding="utf-8"))
            if chosen.resume == "always" or manifest.get("run") == run.run_id:
                is_whole = not manifest.get("provisional")
                found.append((is_whole, float(manifest["saved_at_s"]), int(manifest["step"])))
    return max(found)[2] if found else None


def checkpoints_of(run: RunFolder, chosen: str) -> Path:
    """Return where the job's automatic checkpoints are."""
    return Path(chosen) if chosen else run.path / "checkpoints"


def restart_words(outcome: Outcome, restarts: Restarts, checkpoint: int | None, in_memory: int | None = None) -> str:
    """Return the line that tells of a restart, with the steps of the newest checkpoints on disk and in memory."""
    start = "from the beginning, for there is no checkpoint"
    if in_memory is not None and in_memory >= (checkpoint or 0):
        start = f"from the checkpoint of step {in_memory} in memory"
    elif checkpoint is not None:
        start = f"from the checkpoint of step {checkpoint}"
    return f"{outcome.message}; restart {restarts.failures} of {restarts.max_restarts}, {start}"
