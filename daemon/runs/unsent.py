"""What ranks recorded and no daemon took: files beside the run's log, one a source, which the rank wrote itself.

They stay where they are and count as a part of the log. While a rank lives it may still send them on, and so they are
taken only from ranks that have ended.
"""

from __future__ import annotations

from pathlib import Path

from distui.core.paths import NotOwn, RunFolder, list_own, open_own
from distui.daemon.diagnosis.observe import this_node
from distui.daemon.node.processes import DEAD, process_state
from distui.daemon.runs.batches import Malformed, unpack
from distui.daemon.runs.state import RunState
from distui.daemon.runs.store import frames
from distui.proto import telemetry_pb2 as pb


class Unsent:
    """The files of one run, each taken into a state once."""

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._taken: set[Path] = set()

    def take_into(self, state: RunState, *, of_the_living: bool = False) -> None:
        """Apply what the state does not know yet; from ranks that live only where that is asked for."""
        for path in unsent_files(self._run):
            if path in self._taken or not (batches := read_unsent(path)):
                continue
            if not (of_the_living or batches[-1].last or _has_ended(batches[-1].source)):
                continue
            self._taken.add(path)
            for batch in batches:
                if state.only_new(batch):
                    state.apply(batch)


def unsent_files(run: RunFolder) -> list[Path]:
    """Return the files of a run, by name."""
    try:
        folder = run.path / "telemetry"
        names = sorted(list_own(folder))
    except (NotOwn, OSError):
        return []
    return [folder / name for name in names if name.endswith(".unsent")]


def unsent_batches(run: RunFolder) -> list[pb.Batch]:
    """Return what all files hold, each source's in its own order."""
    return [batch for path in unsent_files(run) for batch in read_unsent(path)]


def _has_ended(source: pb.Source) -> bool:
    return source.node == this_node() and process_state(source.pid, source.incarnation / 1e9) == DEAD


def read_unsent(path: Path) -> list[pb.Batch]:
    """Return the whole batches of a file, oldest first; [] where it has been sent meanwhile."""
    found: list[pb.Batch] = []
    try:
        with open(open_own(path), "rb") as file:
            found += [unpack(body) for _, body in frames(file.fileno())]
    except (OSError, NotOwn, Malformed):
        return found  # cut off in the midst of a write, or nobody's of ours
    return found
