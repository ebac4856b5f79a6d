"""The columns of the table of ranks: all of them on the ranks view, the first ones on the overview."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from distui.core.axes.sizes import AxisSizes
from distui.proto import telemetry_pb2 as pb
from distui.tui.format import NA, count, duration, num_bytes, scalar, seconds, si
from distui.tui.monitor.model import RunModel, optional
from distui.tui.monitor.verdict import STATE_GLYPHS, STATE_TONES
from distui.tui.widgets.layout import axes_in_use, place_words
from distui.tui.widgets.sparkline import sparkline
from distui.tui.widgets.table import Column, LineTable

Place = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class _Run:
    """What the ranks' lines have in common."""

    model: RunModel
    rate: str
    now_s: float
    sizes: AxisSizes | None
    axes: Sequence[str]


class RankLine:
    """One rank as the table shows it, read only where it is shown: there may be thousands. None is not available."""

    __slots__ = ("_run", "_told")

    def __init__(self, told: pb.RankState, run: _Run) -> None:
        self._told, self._run = told, run

    @property
    def rank(self) -> int:
        """Its number."""
        return self._told.rank

    @property
    def place(self) -> Place | None:
        """Its coordinate on each axis in use, first the one by which the ranks are grouped."""
        return place_of(self._run.sizes, self._run.axes, self._told.rank)

    @property
    def node(self) -> str:
        """Its host."""
        return self._told.node

    @property
    def pid(self) -> int | None:
        """Its process."""
        return self._told.pid or None

    @property
    def state(self) -> str:
        """Running, waiting and so on."""
        return self._told.state

    @property
    def step(self) -> int | None:
        """Its newest step."""
        return cast("int | None", optional(self._told, "step"))

    @property
    def loss(self) -> float | None:
        """Its newest loss."""
        return cast("float | None", optional(self._told, "loss"))

    @property
    def step_s(self) -> float | None:
        """How long its newest step took."""
        return cast("float | None", optional(self._told, "step_s"))

    @property
    def rate(self) -> float | None:
        """Tokens a second, or samples where the script counts no tokens."""
        return cast("float | None", optional(self._told, self._run.rate))

    @property
    def memory_bytes(self) -> int | None:
        """Its memory in use."""
        return cast("int | None", optional(self._told, "memory_bytes"))

    @property
    def phase(self) -> str | None:
        """What its main thread does."""
        return phase_of(self._told, self._run.now_s)[0]

    @property
    def phase_s(self) -> float | None:
        """Since how many seconds it does that."""
        return phase_of(self._told, self._run.now_s)[1]

    @property
    def device(self) -> str | None:
        """Its device."""
        return self._told.device or None

    def times(self) -> Sequence[float]:
        """Return its last step times."""
        return self._run.model.history.rank_times(self._run.model.row(self._told.rank))


def phase_of(rank: pb.RankState, now_s: float) -> tuple[str | None, float | None]:
    """Return what the rank's main thread does, and since how many seconds."""
    if not rank.HasField("heartbeat") or rank.state in ("finished", "dead"):
        return None, None
    beat = rank.heartbeat
    if beat.waiting_in:
        return f"in {beat.waiting_in}", max(0.0, now_s - beat.waiting_since_s) if beat.waiting_since_s else None
    return beat.phase or None, max(0.0, now_s - beat.phase_since_s) if beat.phase_since_s else None


def rank_lines(model: RunModel, now_s: float, first_axis: str = "") -> list[RankLine]:
    """Return the ranks heard of, by number; their coordinates begin with `first_axis`."""
    rate, now_s, sizes = model.rate[0], model.now(now_s), model.axes
    order = sorted(axes_in_use(sizes), key=lambda axis: axis != first_axis) if sizes is not None else []
    run = _Run(model, rate, now_s, sizes, order)
    return [RankLine(rank, run) for rank in model.ranks]


def place_of(sizes: AxisSizes | None, axes: Sequence[str], rank: int) -> Place | None:
    """Return a rank's coordinates on `axes`; None where there are none."""
    if sizes is None or rank >= sizes.world:
        return None
    found = sizes.place(rank)
    return tuple((axis, found[axis]) for axis in axes)


def _word(value: Any) -> str:
    return str(value) if value not in (None, "") else NA


def _state(value: str) -> str:
    return f"{STATE_GLYPHS.get(value, '?')} {value}" if value else NA


def _state_tone(line: RankLine) -> str:
    return STATE_TONES.get(line.state, "")


def _phase_s(value: float | None) -> str:
    return NA if value is None else duration(value) if value >= 1 else "<1s"


RATES = ("tokens/s", "samples/s")


def show_ranks(table: LineTable[RankLine], model: RunModel, now_s: float, first_axis: str = "") -> None:
    """Show the ranks in their table, whose rate is called what it counts; with places where there are axes."""
    if (model.axes is not None) != (PLACE in table.columns):
        table.toggle_column(PLACE, 1)
    title = RATES[model.rate[0] == "samples_per_s"]
    for index, column in enumerate(table.columns):
        if column.title in RATES and column.title != title:
            table.columns[index] = replace(column, title=title)
    table.show(rank_lines(model, now_s, first_axis))


def _place(value: Place | None) -> str:
    return NA if value is None else place_words(value)


PLACE: Column[RankLine] = Column("place", lambda r: r.place, _place, "left", priority=3)
"""Where a rank is on the model's axes: a column of its own where there are any."""


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
