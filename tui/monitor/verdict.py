"""The line above everything: is the run well, and if not, who is to blame."""

from __future__ import annotations

from dataclasses import dataclass

from distui.core.telemetry.kinds import WARNINGS
from distui.proto import telemetry_pb2 as pb
from distui.tui.format import count, duration, ranks, scalar
from distui.tui.monitor.model import RunModel

GOOD, WARN, BAD, CALM = "good", "warn", "bad", "calm"
STATE_GLYPHS = {
    "starting": "◌",
    "running": "●",
    "waiting": "◐",
    "stalled": "▲",
    "stopped": "■",
    "dead": "✗",
    "failed": "✗",
    "finished": "✓",
}
STATE_TONES = {
    "starting": CALM,
    "running": GOOD,
    "waiting": CALM,
    "stalled": BAD,
    "stopped": WARN,
    "dead": BAD,
    "failed": BAD,
    "finished": GOOD,
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """A tone, the run's state with its glyph, and one sentence."""

    tone: str
    glyph: str
    state: str
    message: str


def judge(model: RunModel, now_s: float, problem: str = "", *, daemon_away: bool = False) -> Verdict:
    """Return the verdict of what is known now; `problem` is why nothing is known yet.

    While the daemon is away a run that had not ended is not called healthy: what was last known is told as such.
    """
    if model.snapshot is None:
        return Verdict(CALM, "◌", "waiting", f"for the daemon{f': {problem}' if problem else ''}")
    if daemon_away and not model.ended:
        last = judge(model, now_s)
        return Verdict(WARN, "?", "unknown", f"the daemon is away; last known: {last.state}, {last.message}")
    state = model.state or "unknown"
    glyph = STATE_GLYPHS.get(state, "?")
    if model.ended:
        return Verdict(STATE_TONES[state], glyph, state, _ending(model, now_s))
    if model.diagnosis:
        worst = model.diagnosis[0]
        more = f" (and {len(model.diagnosis) - 1} more)" if len(model.diagnosis) > 1 else ""
        return Verdict(
            WARN if worst.kind in WARNINGS else BAD, "▲", state, f"{worst.kind}: {blame(worst, model)}{more}"
        )
    lost = [rank.rank for rank in model.ranks if rank.state == "dead"]
    halted = [rank.rank for rank in model.ranks if rank.state == "stopped"]
    if lost or halted:
        words = [f"{ranks(lost)} dead"] * bool(lost) + [f"{ranks(halted)} stopped"] * bool(halted)
        return Verdict(BAD, "▲", state, ", ".join(words))
    if state == "starting" or len(model.ranks) < model.run.world_size:
        return Verdict(CALM, "◌", "starting", f"{len(model.ranks):,} of {model.run.world_size:,} ranks")
    if state == "stalled":
        return Verdict(BAD, glyph, state, "no rank makes progress, and none is found to be the cause")
    number = len(model.ranks)
    healthy = f"all {number:,} ranks healthy" if number > 1 else "its one rank is healthy"
    return Verdict(STATE_TONES.get(state, CALM), glyph, state, healthy)


def blame(found: pb.Diagnosis, model: RunModel) -> str:
    """Return a diagnosis as one sentence with rank, host and how long."""
    hosts = {rank.rank: rank.node for rank in model.ranks}
    who = ranks(list(found.ranks))
    if len(found.ranks) == 1 and hosts.get(found.ranks[0]):
        who += f" on {hosts[found.ranks[0]]}"
    what = found.message or (f"{found.collective} #{found.seq} of {found.group}" if found.collective else "")
    sentence = what if what.startswith("rank") else f"{who}: {what}" if what else who
    return f"{sentence} (for {duration(found.since_s)})" if found.since_s >= 1 else sentence


def _ending(model: RunModel, now_s: float) -> str:
    run, parts = model.run, []
    elapsed = model.elapsed_s(now_s)
    if elapsed is not None:
        parts.append(f"after {duration(elapsed)}")
    if (step := model.history.last("step")) is not None:
        parts.append(f"{count(step)} steps")
    if (loss := model.history.last("loss")) is not None:
        parts.append(f"loss {scalar(loss)}")
    if run.HasField("exit_status") and run.exit_status:
        parts.append(f"exit status {run.exit_status}")
    told = run.message or next((f"rank {rank.rank}: {rank.error}" for rank in model.ranks if rank.error), "")
    line = ", ".join(parts)
    return f"{line} · {told}" if told and line else told or line
