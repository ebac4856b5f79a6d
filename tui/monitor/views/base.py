"""What all views share: the frame they draw, titled panels, and the numbers they have in common."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from textual.app import ComposeResult
from textual.containers import Vertical
from textual.widget import Widget

from distui.proto import telemetry_pb2 as pb
from distui.tui.format import num_bytes
from distui.tui.monitor.history import PHASE_NAMES
from distui.tui.monitor.log_tail import ReadLog
from distui.tui.monitor.model import CATEGORIES, OTHER, MemoryUse, RunModel, category_title, memory_of
from distui.tui.widgets.chart import LineChart, Mark, Series
from distui.tui.widgets.heatmap import Heatmap
from distui.tui.widgets.stack import Bar, MadeBars, StackedBars


@dataclass(frozen=True)
class Frame:
    """What is drawn: the run (live or frozen), the time, and the steps in sight."""

    model: RunModel
    now_s: float
    num_steps: int | None = None
    """How many steps back; None is all."""
    end_step: int | None = None
    """The last step in sight; None is the newest."""
    frozen: bool = False
    read_log: ReadLog | None = None

    @property
    def window(self) -> slice:
        """The steps in sight, of the history's columns."""
        return self.model.history.window(self.num_steps, self.end_step)

    @property
    def steps_key(self) -> tuple[object, ...]:
        """What stands for all the steps in sight: where it is the same, there is nothing new to draw of them."""
        return self.model.history, self.model.history.revision, self.num_steps, self.end_step


@dataclass(frozen=True)
class Key:
    """A key of a view, for the help screen."""

    keys: str
    what: str


class Panel(Vertical):
    """A titled part of a view: a line above with the title on the left and the newest number on the right."""

    DEFAULT_CSS = """
    Panel {
        height: 1fr; border-top: solid $foreground 25%; border-title-color: $foreground 75%;
        border-subtitle-color: $foreground; border-title-style: bold; padding: 0;
    }
    """

    def __init__(self, title: str, *children: Widget, id: str | None = None, classes: str | None = None) -> None:
        super().__init__(*children, id=id, classes=classes)
        self.border_title = title

    def tell(self, title: str, number: str = "") -> None:
        """Write title and newest number into the line above."""
        text = f"{_plain(title)}  [b]{_plain(number)}[/b]" if number else _plain(title)
        if text != self.border_title:
            self.border_title = text


def _plain(text: str) -> str:
    return text.replace("[", r"\[")


class View(Vertical):
    """One of the dashboard's views. `show` is called 2 to 4 times a second, only while the view is in sight."""

    TITLE = ""
    KEYS: tuple[Key, ...] = ()

    def compose(self) -> ComposeResult:
        """Make the parts."""
        raise NotImplementedError

    def show(self, frame: Frame) -> None:
        """Draw the frame."""
        raise NotImplementedError

    def main_widget(self) -> Widget | None:
        """Return what takes the keys when the view is opened; None where nothing does."""
        return None


@dataclass(frozen=True)
class Curve:
    """A chart of one column of the history."""

    column: str
    color: int = 0
    missing: str = "n/a"
    marks: bool = field(default=True)


def draw_curve(chart: LineChart, frame: Frame, curve: Curve) -> None:
    """Draw one column of the history with the events above its axis."""
    events = frame.model.event_steps() if curve.marks else []
    if not chart.is_new((frame.steps_key, curve, events)):
        return
    history, window = frame.model.history, frame.window
    steps, values = history.column("step", window), history.column(curve.column, window)
    marks = [Mark(step, kind, level) for step, kind, level in events]
    empty = "no steps yet" if not len(history) else f"{curve.missing} in these steps"
    chart.show([Series(curve.column, steps, values, curve.color)], marks, empty)


def newest(values: Sequence[float]) -> float | None:
    """Return the newest available value; None where there is none."""
    return next((value for value in reversed(values) if not math.isnan(value)), None)


def window_newest(frame: Frame, column: str) -> float | None:
    """Return the newest available value of a column in sight."""
    return newest(frame.model.history.column(column, frame.window))


def draw_split(bars: StackedBars, frame: Frame) -> None:
    """Draw what a step's time is spent on, as the mean over the last 50 steps in sight."""
    if not bars.is_new((frame.steps_key, bars.brief)):
        return
    history, window = frame.model.history, frame.window
    recent = slice(max(window.start or 0, window.stop - 50), window.stop)
    split = history.split(recent)
    parts = list(zip(PHASE_NAMES, split, strict=True)) if split is not None else []
    empty = "no steps yet" if not len(history) else "n/a: the ranks do not time the parts of a step"
    bars.show([Bar("", parts)] if parts else [], empty=empty)


def draw_map(heatmap: Heatmap, frame: Frame) -> None:
    """Draw the ranks' step times over the steps in sight; of many ranks the hosts', the sick ones at the top."""
    hosts = frame.model.hosts
    order = tuple(host.row for host in hosts if host.sick)
    if heatmap.is_new((frame.steps_key, order, len(hosts))):
        rows = frame.model.history.window_rows(frame.num_steps, frame.end_step)
        named = {host.row: host.node for host in hosts}
        heatmap.show([row.step for row in rows], [row.step_s for row in rows], named)


def map_title(model: RunModel) -> str:
    """Return what the map's lines are."""
    sick = sum(host.sick for host in model.hosts)
    if not model.hosts:
        return "step time by rank"
    return f"step time by host, {sick or 'none'} sick{', at the top' if sick else ''}"


def memory_bar(label: str, use: MemoryUse, planned: int | None, scale: float | None, parts: Sequence[str]) -> Bar:
    """Return a rank's bar; `parts` fixes the order, so that all bars agree."""
    sizes = use.sizes
    pieces = [(category_title(name), float(sizes.get(name, 0))) for name in parts]
    if not sizes and use.total:
        pieces = [(_IN_USE, float(use.total))]
    text = num_bytes(use.total if use.total is not None else sum(sizes.values()) or None)
    if use.limit is not None:
        text += f" of {num_bytes(use.limit)}"
    return Bar(label, pieces if use.total or sizes else [], text, scale, float(planned) if planned else None)


def draw_memory(bars: StackedBars, ranks: Sequence[pb.RankState], model: RunModel, labels: bool = True) -> None:
    """Draw ranks' memory by category against the limit and the plan, all on one scale; bars are made in sight only."""
    found: set[str] = set()
    told: list[pb.RankState] = []
    limit = most = 0
    unnamed = False
    for rank in ranks:
        by_category, total = rank.memory.by_category_bytes, rank.memory_bytes
        if not by_category and not total:
            continue
        told.append(rank)
        named = sum(by_category.values())
        found.update(by_category)
        if by_category and total > named:
            found.add(OTHER)
        unnamed |= not by_category
        most, limit = max(most, total, named), max(limit, rank.memory.device_total_bytes)
    order = [name for name in CATEGORIES if name in found]
    order += sorted(found - set(CATEGORIES) - {OTHER}) + [OTHER] * (OTHER in found)
    planned = model.planned_bytes()
    # Against a limit that is far away nothing could be told apart: then the largest rank is the scale.
    scale = float(max(limit if most > 0.2 * limit else 0, most, planned or 0)) or None

    def bar(index: int) -> Bar:
        rank = told[index]
        return memory_bar(f"rank {rank.rank}" if labels else "", memory_of(rank), planned, scale, order)

    fullest = max(told, key=lambda rank: rank.memory_bytes, default=None)
    values = None
    if fullest is not None:
        parts = memory_of(fullest).parts
        values = {category_title(name): float(size) for name, size in parts} or {_IN_USE: float(fullest.memory_bytes)}
    names = [*map(category_title, order), *[_IN_USE] * unnamed]
    made = MadeBars(len(told), bar, names)
    bars.show(made, values, "plan" if planned else "", "n/a: no rank has sent its memory yet")


_IN_USE = "in use"
"""What a rank's memory is called where it does not tell its categories."""
