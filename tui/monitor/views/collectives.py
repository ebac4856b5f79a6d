"""View 6: what the ranks exchange, and who waits for whom."""

from __future__ import annotations

from dataclasses import dataclass

from textual import on
from textual.app import ComposeResult
from textual.widget import Widget

from distui.proto import telemetry_pb2 as pb
from distui.tui.format import NA, NONE, count, duration, num_bytes, ranks, seconds
from distui.tui.monitor.model import RunModel
from distui.tui.monitor.views.base import Frame, Key, Panel, View
from distui.tui.widgets.table import Column, LineTable
from distui.tui.widgets.timeline import Pass, PipelineTimeline, pass_of


def _bandwidth(found: pb.CollectiveSummary) -> float | None:
    """Return bytes a second of one call: mean size over mean time."""
    return found.bytes / found.count / found.mean_s if found.count and found.mean_s and found.bytes else None


def _share(found: pb.CollectiveSummary) -> float | None:
    return found.bytes / found.count if found.count else None


_COLUMNS: tuple[Column[pb.CollectiveSummary], ...] = (
    Column("group", lambda c: c.group, str, "left"),
    Column("operation", lambda c: c.op, str, "left"),
    Column("count", lambda c: c.count, count),
    Column("bytes", lambda c: c.bytes or None, num_bytes, width=8),
    Column("each", _share, num_bytes, priority=4, width=8),
    Column("mean", lambda c: c.mean_s or None, seconds, priority=1, width=7),
    Column("max", lambda c: c.max_s or None, seconds, priority=2, width=7),
    Column("blocked", lambda c: c.blocked_s, seconds, priority=1, width=7),
    Column("rate", _bandwidth, lambda v: NA if v is None else f"{num_bytes(v)}/s", priority=5, width=10),
)


@dataclass(frozen=True)
class _RankLine:
    rank: int
    node: str
    seq: int | None
    behind: int | None
    lateness_s: float | None
    waiting_in: str | None
    waiting_s: float | None


_RANK_COLUMNS: tuple[Column[_RankLine], ...] = (
    Column("rank", lambda r: r.rank, str),
    Column("node", lambda r: r.node or None, lambda v: v or NA, "left", priority=5),
    Column("last call", lambda r: r.seq, lambda v: NA if v is None else f"#{v:,}"),
    Column(
        "behind", lambda r: r.behind, lambda v: NA if v is None else count(v), tone=lambda r: "bad" if r.behind else ""
    ),
    Column("mean lateness", lambda r: r.lateness_s, seconds, priority=1),
    Column("waiting in", lambda r: r.waiting_in, lambda v: v or NONE, "left", priority=2, width=12),
    Column("for", lambda r: r.waiting_s, lambda v: NONE if v is None else duration(v), priority=3, width=4),
)


def group_lines(model: RunModel, group: str, now_s: float) -> list[_RankLine]:
    """Return where each rank of a group is in its sequence of calls, the last one first."""
    last: dict[int, int] = {}
    late: dict[int, list[float]] = {}
    for found in model.collectives:
        if found.group == group:
            for rank, seq in found.last_seq.items():
                last[rank] = max(seq, last.get(rank, 0))
            for rank, lateness in found.lateness_s.items():
                late.setdefault(rank, []).append(lateness)
    states = {rank.rank: rank for rank in model.ranks}
    for number, state in states.items():
        if (called := state.heartbeat.last_seq.get(group)) is not None:
            last[number] = max(called, last.get(number, 0))
    front = max(last.values(), default=0)
    lines = []
    for number in sorted(set(last) | set(late)):
        state = states.get(number, pb.RankState())
        beat, entered = state.heartbeat, last.get(number)
        # The last heartbeat of a rank that is gone may still say that it waits.
        waits = bool(beat.waiting_in) and state.state not in ("finished", "dead")
        lines.append(
            _RankLine(
                rank=number,
                node=state.node,
                seq=entered,
                behind=None if entered is None else front - entered,
                lateness_s=sum(late[number]) / len(late[number]) if number in late else None,
                waiting_in=beat.waiting_in if waits else None,
                waiting_s=max(0.0, model.now(now_s) - beat.waiting_since_s) if waits else None,
            )
        )
    return lines


def who_waits(lines: list[_RankLine]) -> str:
    """Return one sentence: who waits for whom in this group, or who comes last."""
    waiting = [line.rank for line in lines if line.waiting_in and not line.behind]
    missing = [line.rank for line in lines if line.behind]
    if waiting and missing:
        return f"{ranks(waiting)} wait{'s' if len(waiting) == 1 else ''} for {ranks(missing)}"
    known = [(line.lateness_s, line.rank) for line in lines if line.lateness_s is not None]
    if len(known) > 1:
        lateness, rank = max(known)
        return (
            f"rank {rank} comes last, {seconds(lateness)} behind the first" if lateness > 0 else "all arrive together"
        )
    return "who comes last is n/a"


class CollectivesView(View):
    """Choose a group in the upper table; the lower one shows its ranks."""

    TITLE = "Collectives"
    KEYS = (Key("↑ ↓", "choose the group whose ranks are shown below"),)

    def compose(self) -> ComposeResult:
        """Make the parts."""
        with Panel("collectives", id="collectives-panel"):
            yield LineTable[pb.CollectiveSummary](
                _COLUMNS,
                lambda c: (c.group, c.op),
                sort=7,
                descending=True,
                empty="no collective yet; one rank alone has none",
                id="collectives-table",
            )
        with Panel("pipeline", id="pipeline-panel"):
            yield PipelineTimeline(id="pipeline")
        with Panel("who waits for whom", id="waits-panel"):
            yield LineTable[_RankLine](_RANK_COLUMNS, lambda r: r.rank, empty="n/a", id="waits-table")

    def on_mount(self) -> None:
        """Nothing is drawn yet."""
        self._frame: Frame | None = None
        self._schedule: tuple[str, int, int] = ("", 1, 0)
        self._pass: Pass | None = None

    def show(self, frame: Frame) -> None:
        """Draw the frame."""
        self._frame = frame
        self.query_one("#collectives-table", LineTable).show(frame.model.collectives)
        blocked = sum(found.blocked_s for found in frame.model.collectives)
        number = f"{seconds(blocked)} blocked over all ranks" if frame.model.collectives else ""
        self.query_one("#collectives-panel", Panel).tell("collectives", number)
        self._show_pipeline(frame.model)
        self._show_group(frame)

    def _show_pipeline(self, model: RunModel) -> None:
        """Draw the schedule's ideal pass, and beside it how long each stage waited in truth."""
        told = model.run.layout
        key = told.pipeline_schedule, model.axes.pp if model.axes else 1, told.pipeline_micro_batches
        if key != self._schedule:
            self._schedule, self._pass = key, pass_of(*key)
        self.query_one("#pipeline-panel").display = self._pass is not None
        if self._pass is not None:
            self.query_one("#pipeline", PipelineTimeline).show(self._pass, model.stage_waits())
            number = f"{key[0]}, {key[2]} micro-batch{'es' if key[2] != 1 else ''}, in theory"
            self.query_one("#pipeline-panel", Panel).tell("pipeline", number)

    def _show_group(self, frame: Frame) -> None:
        key = self.query_one("#collectives-table", LineTable).cursor_key
        if not isinstance(key, tuple):
            self.query_one("#waits-table", LineTable).show([])
            return
        lines = group_lines(frame.model, key[0], frame.now_s)
        self.query_one("#waits-table", LineTable).show(lines)
        self.query_one("#waits-panel", Panel).tell(f"ranks of {key[0]}", who_waits(lines))

    @on(LineTable.Moved, "#collectives-table")
    def _moved(self) -> None:
        if self._frame is not None:
            self._show_group(self._frame)

    def main_widget(self) -> Widget:
        """The table of collectives takes the keys."""
        return self.query_one("#collectives-table")
