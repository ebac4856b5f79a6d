"""The columns of the table of ranks: all of them on the ranks view, the first ones on the overview."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from distui.proto import telemetry_pb2 as pb
from distui.tui.format import NA, count, duration, num_bytes, scalar, seconds, si
from distui.tui.monitor.history import StepHistory
from distui.tui.monitor.model import RunModel, optional
from distui.tui.monitor.verdict import STATE_GLYPHS, STATE_TONES
from distui.tui.widgets.sparkline import sparkline
from distui.tui.widgets.table import Column, LineTable


@dataclass(frozen=True)
class RankLine:
    """One rank as the table shows it; None is not available."""

    rank: int
    node: str
    pid: int | None
    state: str
    step: int | None
    loss: float | None
    step_s: float | None
    rate: float | None
    """Tokens a second, or samples where the script counts no tokens."""
    memory_bytes: int | None
    phase: str | None
    phase_s: float | None
    device: str | None
    times: Callable[[], Sequence[float]]
    """Its last step times, looked up for the rows in sight only."""


def phase_of(rank: pb.RankState, now_s: float) -> tuple[str | None, float | None]:
    """Return what the rank's main thread does, and since how many seconds."""
    if not rank.HasField("heartbeat") or rank.state in ("finished", "dead"):
        return None, None
    beat = rank.heartbeat
    if beat.waiting_in:
        return f"in {beat.waiting_in}", max(0.0, now_s - beat.waiting_since_s) if beat.waiting_since_s else None
    return beat.phase or None, max(0.0, now_s - beat.phase_since_s) if beat.phase_since_s else None


def rank_lines(model: RunModel, now_s: float) -> list[RankLine]:
    """Return the ranks heard of, by number."""
    rate, now_s = model.rate[0], model.now(now_s)
    return [_line(rank, model.history, rate, now_s) for rank in model.ranks]


def _line(rank: pb.RankState, history: StepHistory, rate: str, now_s: float) -> RankLine:
    phase, phase_s = phase_of(rank, now_s)
    return RankLine(
        rank=rank.rank,
        node=rank.node,
        pid=rank.pid or None,
        state=rank.state,
        step=optional(rank, "step"),
        loss=optional(rank, "loss"),
        step_s=optional(rank, "step_s"),
        rate=optional(rank, rate),
        memory_bytes=optional(rank, "memory_bytes"),
        phase=phase,
        phase_s=phase_s,
        device=rank.device or None,
        times=partial(history.rank_times, rank.rank),
    )


def _word(value: Any) -> str:
    return str(value) if value not in (None, "") else NA


def _state(value: str) -> str:
    return f"{STATE_GLYPHS.get(value, '?')} {value}" if value else NA


def _state_tone(line: RankLine) -> str:
    return STATE_TONES.get(line.state, "")


def _phase_s(value: float | None) -> str:
    return NA if value is None else duration(value) if value >= 1 else "<1s"


RATES = ("tokens/s", "samples/s")


def show_ranks(table: LineTable[RankLine], model: RunModel, now_s: float) -> None:
    """Show the ranks in their table, whose rate is called what it counts."""
    title = RATES[model.rate[0] == "samples_per_s"]
    for index, column in enumerate(table.columns):
        if column.title in RATES and column.title != title:
            table.columns[index] = replace(column, title=title)
    table.show(rank_lines(model, now_s))


RANK_COLUMNS: tuple[Column[RankLine], ...] = (
    Column("rank", lambda r: r.rank, str),
    Column("node", lambda r: r.node, _word, "left", priority=6),
    Column("pid", lambda r: r.pid, _word, priority=8),
    Column("state", lambda r: r.state, _state, "left", width=9, tone=_state_tone),
    Column("step", lambda r: r.step, count, priority=1),
    Column("loss", lambda r: r.loss, scalar, priority=3),
    Column("step time", lambda r: r.step_s, seconds, priority=2, width=9),
    Column(RATES[0], lambda r: r.rate, si, priority=4),
    Column("memory", lambda r: r.memory_bytes, num_bytes, priority=2, width=8),
    Column("phase", lambda r: r.phase, _word, "left", priority=5, width=9),
    Column("for", lambda r: r.phase_s, _phase_s, priority=9, width=3),
    Column("device", lambda r: r.device, _word, "left", priority=10),
    Column(
        "last steps",
        lambda r: r.times,
        align="left",
        priority=11,
        width=12,
        flex=True,
        draw=lambda v, w: sparkline(v(), w),
    ),
)
