"""One pass of a pipeline's schedule over time, a line a stage: forwards, backwards, and where a stage waits."""

from __future__ import annotations

from dataclasses import dataclass

from rich.style import Style
from textual.geometry import Size
from textual.strip import Strip

from distui.core.axes.schedules import Course, Table, course, tables
from distui.tui.format import cut, percent
from distui.tui.widgets.drawn import DrawnWidget
from distui.tui.widgets.palette import Ink, line

KINDS = {"F": ("█", 0, "forward"), "B": ("▓", 1, "backward"), "W": ("▒", 2, "weights' part of it")}
IDLE = "·"
MAX_STEPS = 20_000
"""Steps of all stages that are laid out; more of them could not be told apart on any screen."""


@dataclass(frozen=True)
class Pass:
    """A schedule's tables and what they take, with a backward of twice a forward."""

    schedule: str
    num_micro: int
    tables: tuple[Table, ...]
    course: Course

    def idle(self, stage: int) -> float:
        """Return the share of the pass in which a rank has nothing to do."""
        busy = sum(end - begin for begin, end in self.course.times[stage])
        return 1.0 - busy / self.course.end


def pass_of(schedule: str, num_ranks: int, num_micro: int) -> Pass | None:
    """Return one pass; None where there is no such schedule, or no screen could show it."""
    if not 1 < num_ranks <= MAX_STEPS or not 0 < num_micro <= MAX_STEPS or num_ranks * num_micro * 6 > MAX_STEPS:
        return None
    try:
        found = tables(schedule, num_ranks, num_micro)
        return Pass(schedule, num_micro, tuple(found), course(schedule, found))
    except ValueError:
        return None


class PipelineTimeline(DrawnWidget):
    """A line a rank of the pipeline; what it waited in truth stands at the end of the line."""

    DEFAULT_CSS = "PipelineTimeline { height: auto; }"

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._pass: Pass | None = None
        self._waits: list[float | None] = []

    def show(self, found: Pass, waits: list[float | None]) -> None:
        """Take a pass, and for each stage the measured share of a step in which it waits; None is not known."""
        if (found, waits) == (self._pass, self._waits):
            return
        grows = self._pass is None or len(found.tables) != len(self._pass.tables)
        self._pass, self._waits = found, waits
        if grows:
            self.refresh(layout=True)
        self.redraw()

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        """Return a line a stage and the legend's."""
        return len(self._pass.tables) + 1 if self._pass is not None else 1

    def draw(self, width: int, height: int, ink: Ink) -> list[Strip]:
        """Return the stages in sight, evenly taken where there are more than lines, and the legend."""
        found = self._pass
        if found is None or height < 1:
            return []
        num_stages, room = len(found.tables), max(1, height - 1)
        stride = -(-num_stages // room)
        labels = len(f" pp{num_stages - 1} ")
        words = [self._words(found, stage) for stage in range(num_stages)]
        tail = max(map(len, words))
        if width - labels - tail < 24:
            words, tail = [""] * num_stages, 0
        strips = []
        for stage in range(0, num_stages, stride):
            parts: list[tuple[str, Style]] = [(f" pp{stage} ".ljust(labels), ink.muted)]
            parts += _cells(found, stage, width - labels - tail - 1, ink)
            parts.append((words[stage].rjust(tail), ink.text))
            strips.append(line(parts, width, ink.text))
        return [*strips[: max(0, height - 1)], self._legend(found, stride, width, ink)]

    def _words(self, found: Pass, stage: int) -> str:
        wait = self._waits[stage] if stage < len(self._waits) else None
        return f"  idle {percent(found.idle(stage))}, waits {percent(wait)}"

    def _legend(self, found: Pass, stride: int, width: int, ink: Ink) -> Strip:
        kinds = {step.kind for table in found.tables for step in table}
        parts: list[tuple[str, Style]] = []
        for kind, (glyph, color, name) in KINDS.items():
            if kind in kinds:
                parts += [(f" {glyph}", ink.of_series(color)), (f" {name} ", ink.muted)]
        parts += [(f" {IDLE}", ink.faint), (f" idle {percent(found.course.bubble)} by the schedule", ink.muted)]
        if stride > 1:
            parts.append((f", one stage in {stride} shown", ink.muted))
        used, kept = 0, []
        for text, style in parts:
            kept.append((cut(text, width - used), style))
            used += len(text)
            if used >= width:
                break
        return line(kept, width, ink.text)


def _cells(found: Pass, stage: int, width: int, ink: Ink) -> list[tuple[str, Style]]:
    """Return what a stage does in each cell; a block with room for it begins with the number of its micro-batch."""
    scale = width / found.course.end
    parts: list[tuple[str, Style]] = []
    reached = 0
    for step, (begin, end) in zip(found.tables[stage], found.course.times[stage], strict=True):
        start, stop = round(begin * scale), round(end * scale)
        if stop <= start:
            continue
        parts.append((IDLE * (start - reached), ink.faint))
        glyph, color, _ = KINDS[step.kind]
        number = str(step.micro)
        style = ink.of_series(color)
        if stop - start > len(number) + 1:
            parts += [(glyph, style), (number, style), (glyph * (stop - start - len(number) - 1), style)]
        else:
            parts.append((glyph * (stop - start), style))
        reached = stop
    return [*parts, (IDLE * (width - reached), ink.faint)]
