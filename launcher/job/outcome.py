"""How a run ended: outcome.json, and which rank failed first."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from distui.core.errors import EXIT_PREEMPTED, EXIT_RANK_FAILED
from distui.core.paths import RunFolder, read_json, write_own

_UNPROVOKED = {
    *(signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGSYS),
    *(signal.SIGXCPU, signal.SIGXFSZ, signal.SIGALRM, signal.SIGUSR1, signal.SIGUSR2),
}
_HEAD_START_S = 1.0
"""A rank that such a signal ends takes its peers with it within this time; a peer's error never causes the signal."""
_OURS_S = 2.5
"""A rank that we end by SIGKILL has had its grace period before; who is killed sooner, somebody else has killed."""
_LOST_PEER = re.compile(
    r"gloo/transport/.*(\bby peer|Broken pipe|[Tt]imed out|No route to host|unreachable)"
    r"|DistNetworkError|Connection (reset|closed) by (remote )?peer|remote process exited|ncclRemoteError"
    r"|failed to recv, got 0 bytes",
    re.DOTALL,
)
"""What a rank says whose peer is gone: it comes of another's failure, whichever is told first."""


END_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
"""By which an agent ends its ranks: the second where SIGTERM has them save."""
HOST_LOST = "its host was lost"
"""The error of a rank whose host is gone."""


@dataclass(frozen=True, slots=True)
class Ending:
    """How the process of a rank ended, seen at `time_s`; both None where it was not seen how."""

    rank: int
    pid: int
    exit_status: int | None
    signal: int | None
    time_s: float

    @property
    def known(self) -> bool:
        """Whether it was seen how it ended."""
        return self.exit_status is not None or self.signal is not None

    @property
    def bad(self) -> bool:
        """Whether it ended other than by exit status 0."""
        return bool(self.exit_status) or self.signal is not None

    @property
    def gave_way(self) -> bool:
        """Whether it has saved and ended because it was asked to."""
        return self.exit_status == EXIT_PREEMPTED


@dataclass(slots=True)
class RankOutcome:
    """One rank's end, as outcome.json has it; `error` is one line."""

    rank: int
    exit_status: int | None = None
    signal: int | None = None
    error: str = ""
    host: str = ""
    """Where it ran, in a job on many hosts."""
    step: int | None = None
    """The last that its host told of, in a job on many hosts."""


@dataclass(slots=True)
class Outcome:
    """outcome.json. `failed_rank` is the first rank that failed, where one did."""

    state: str
    exit_status: int
    message: str
    finished_s: float = field(default_factory=time.time)
    ranks: list[RankOutcome] = field(default_factory=list)
    failed_rank: int | None = None
    is_victim: bool = False
    """Whether the rank that failed first only lost a peer."""
    report: str = ""
    """What is told instead of the message, where that takes several lines: what, why, fix."""
    restarts: int = 0
    """How often the job was started again."""

    def write(self, run: RunFolder) -> None:
        """Write outcome.json."""
        told = asdict(self)
        told["ranks"] = [_without(rank, "host", "step") for rank in told["ranks"]]
        write_own(run.outcome, json.dumps(_without(told, "is_victim", "report", "restarts"), indent=1))


def _without(told: dict[str, Any], *names: str) -> dict[str, Any]:
    """Return what is told but for those of `names` that say nothing."""
    return {name: value for name, value in told.items() if name not in names or value not in ("", None, False, 0)}


def read_outcome(run: RunFolder) -> Outcome | None:
    """Return how the run ended; None while it has no outcome."""
    from distui.daemon.runs.folders import read_outcome as read_checked

    found = read_checked(run)
    if not found:
        return None
    ranks = [RankOutcome(**_known(RankOutcome, rank)) for rank in found["ranks"]]
    return Outcome(**{"exit_status": 0, "message": "", **_known(Outcome, found), "ranks": ranks})


def _known(kind: type[Outcome] | type[RankOutcome], found: Mapping[str, Any]) -> dict[str, Any]:
    names = {one.name for one in fields(kind)}
    return {name: value for name, value in found.items() if name in names}


def read_rank_error(run: RunFolder, rank: int) -> dict[str, Any] | None:
    """Return what rank `rank` wrote when it raised; None where it wrote nothing."""
    return read_json(run.rank_error(rank))


def last_step(run: RunFolder, rank: int) -> int | None:
    """Return the last step that a rank noted in its ledger, dead or alive; None where it kept none."""
    from distui.core.telemetry.ledger import LedgerReader, LedgerUnreadable

    try:
        with LedgerReader.open(run.rank_ledger(rank)) as ledger:
            return ledger.state().step
    except (OSError, LedgerUnreadable):
        return None


def signal_name(number: int) -> str:
    """Return `SIGKILL` for 9; a number that has no name stays one."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def gave_way(endings: Mapping[int, Ending]) -> bool:
    """Tell whether ranks have saved and ended because they were asked to, and no other ended badly."""
    bad = [ending for ending in endings.values() if ending.bad]
    return bool(bad) and all(ending.gave_way for ending in bad)


def preempted_words(step: int | None) -> str:
    """Return the message of a job that gave way."""
    return f"gave way, and saved after step {step if step is not None else 'n/a'}"


def tell_ending(run: RunFolder, stopped_by: signal.Signals | None, endings: Mapping[int, Ending]) -> None:
    """Write ending.json: what made the agent end the other ranks, so that nobody takes that for a fault of theirs."""
    bad = [asdict(ending) for ending in endings.values() if ending.bad]
    try:
        write_own(run.ending, json.dumps({"stopped_by": stopped_by and stopped_by.name, "ranks": bad}))
    except OSError:
        print("a full disk? ending.json cannot be written; the ranks are ended all the same", flush=True)


def _error_line(ending: Ending | None, report: Mapping[str, Any] | None) -> str:
    if report is not None:
        message = str(report["message"]).strip().partition("\n")[0]
        return f"{report['type']}: {message}" if message else str(report["type"])
    if ending is None or not ending.bad:
        return ""
    if ending.signal is not None:
        return f"killed by {signal_name(ending.signal)}"
    return f"exit status {ending.exit_status}"


def judge(
    run: RunFolder, state: str, exit_status: int, message: str, endings: Mapping[int, Ending], first: int, nproc: int
) -> Outcome:
    """Return the outcome of this node's ranks `first` to `first + nproc - 1`.

    The first failure is the earliest: when it raised, or else when its process ended. Who only lost a peer is not it
    where another failed by itself.
    """
    ranks, failures, own = [], [], False
    first_bad_s = min((ending.time_s for ending in endings.values() if ending.bad), default=0.0)
    for rank in range(first, first + nproc):
        ending, report = endings.get(rank), read_rank_error(run, rank)
        status, signum = (ending.exit_status, ending.signal) if ending else (None, None)
        if state == "finished":
            status, signum = 0, None
        error = "" if state == "finished" else _error_line(ending, report)
        ranks.append(RankOutcome(rank, status, signum, error))
        if ending is not None and ending.bad:
            time_s = report["time_s"] if report else ending.time_s
            lost = report is not None and _LOST_PEER.search(str(report["message"])) is not None
            lost = lost or (report is not None and _LOST_PEER.search(str(report["type"])) is not None)
            if report is None and ending.signal in END_SIGNALS and ending.time_s > first_bad_s:
                lost = True  # ended by us, for what had ended badly by then
            killed = ending.signal in _UNPROVOKED and ending.time_s - first_bad_s < _OURS_S
            own |= not lost and (report is not None or ending.signal is None or killed)
            failures.append((lost, time_s - (_HEAD_START_S if ending.signal in _UNPROVOKED else 0.0), rank, error))
    outcome = Outcome(state, exit_status, message, ranks=ranks)
    if exit_status == EXIT_RANK_FAILED and failures and not message:
        outcome.is_victim, _, outcome.failed_rank, error = min(
            (one for one in failures if not (own and one[0])), key=lambda one: one[1:3]
        )
        outcome.message = f"rank {outcome.failed_rank}: {error}"
    return outcome
