"""Thousands of rows and bars, of which only those in sight are made; the line of keys; garbage that can wait."""

from __future__ import annotations

import gc
from typing import Any, ClassVar

import pytest
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.widgets import Input

from distui.proto import telemetry_pb2 as pb
from distui.tui.client import _CLEANED_AT_ONCE, _clean
from distui.tui.format import num_bytes
from distui.tui.terminal import TerminalApp, on_terminal
from distui.tui.widgets.keys import KeyLine
from distui.tui.widgets.stack import Bar, MadeBars, StackedBars
from distui.tui.widgets.table import SAMPLED_ROWS, Column, LineTable
from tests.tui.widgets.stage import Stage, lines


async def test_a_table_of_thousands_writes_those_in_sight_and_never_cuts_a_number() -> None:
    written = 0

    def text(value: int) -> str:
        nonlocal written
        written += 1
        return f"{value:,}"

    columns: list[Column[int]] = [Column("rank", lambda n: n, str), Column("step", lambda n: n**3, text)]
    widget = LineTable(columns, lambda n: n)
    async with Stage(widget).run_test(size=(40, 12)) as pilot:
        await pilot.pause()
        written = 0
        widget.show(range(10_000))
        await pilot.pause()
        assert 0 < written < 10 * SAMPLED_ROWS, "a cell that nobody sees costs nothing"
        widget.focus()
        for key in ("end", "home", "pagedown", "end"):
            await pilot.press(key)
            await pilot.pause()
        assert lines(pilot.app)[-1].split() == ["9999", f"{9999**3:,}"]
        wide = lines(pilot.app)[0].rstrip()
        widget.show([7])  # numbers that become shorter move no column
        await pilot.pause()
        assert lines(pilot.app)[0].rstrip() == wide
        assert lines(pilot.app)[1].split() == ["7", "343"]


async def test_a_row_that_comes_in_sight_is_whole_although_it_was_not_looked_at_before() -> None:
    widget: LineTable[int] = LineTable([Column("n", str, str, "left"), Column("x", lambda n: n)], lambda n: n)
    rows = [10**9 if number == 501 else number for number in range(1000)]  # between those that are sampled
    async with Stage(widget).run_test(size=(30, 10)) as pilot:
        widget.show(rows)
        widget.focus()
        await pilot.pause()
        widget.cursor = 501
        await pilot.pause()
        assert any(text.split() == [str(10**9)] * 2 for text in lines(pilot.app)), lines(pilot.app)


async def test_bars_are_made_where_they_are_seen() -> None:
    made: list[int] = []

    def make(number: int) -> Bar:
        made.append(number)
        return Bar(f"rank {number}", [("parameters", float(number))], num_bytes(number), 5000.0)

    widget = StackedBars(unit=num_bytes, legend_first=True)
    widget.styles.height = 10
    async with Stage(widget).run_test(size=(60, 10)) as pilot:
        widget.show(MadeBars(5000, make, ["parameters"]), {"parameters": 1.0})
        await pilot.pause()
        assert lines(pilot.app)[1].startswith(" rank 0 ") and len(set(made)) < 200
        widget.scroll_end(animate=False, force=True)
        await pilot.pause()
        assert "rank 4999" in lines(pilot.app)[-1] and lines(pilot.app)[-1].endswith("4.88 KiB")


class Keys(TerminalApp[str]):
    """Bindings, and two places for the focus that have others."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("f5", "note", "Note"), Binding("f6", "note", "Hidden", show=False)]

    def __init__(self) -> None:
        super().__init__()
        self.notes = 0

    def compose(self) -> ComposeResult:
        yield LineTable([Column("n", str)], lambda n: n)
        yield Input()
        yield KeyLine()

    def action_note(self) -> None:
        self.notes += 1


async def test_the_line_of_keys_follows_the_focus_can_be_clicked_and_cuts_no_word() -> None:
    app = Keys()
    async with app.run_test(size=(50, 6)) as pilot:
        app.query_one(LineTable).focus()
        await pilot.pause()
        assert app.query_one(KeyLine).shown == ["Sort", "Note", "palette"]
        bottom = lines(app)[-1]
        assert bottom.startswith(" s Sort  f5 Note") and bottom.endswith("│ ^p palette"), bottom
        await pilot.click(KeyLine, offset=(bottom.index("Note"), 0))
        await pilot.pause()
        assert app.notes == 1
        app.query_one(Input).focus()
        await pilot.pause()
        assert lines(app)[-1].startswith(" f5 Note") and "Sort" not in lines(app)[-1]
        app.query_one(LineTable).focus()
        await pilot.resize_terminal(25, 6)
        await pilot.pause()
        assert lines(app)[-1].startswith(" s Sort ") and "f5" not in lines(app)[-1]


async def test_garbage_is_searched_for_while_nobody_types(monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[Any] = []
    monkeypatch.setattr(gc, "collect", lambda: searched.append(1))
    now_s = 1000.0
    monkeypatch.setattr("distui.tui.terminal.time", type("Clock", (), {"monotonic": staticmethod(lambda: now_s)}))
    app = Keys()
    async with app.run_test() as pilot:
        before = gc.get_threshold()
        assert not app.search_garbage(), "in a program that does not run it on a terminal Python does"
        with on_terminal():
            assert gc.get_freeze_count() > 0 and gc.get_threshold()[:2] == before[:2]
            app.search_garbage()
            now_s += app.EVERY_S + 1
            await pilot.press("f5")
            assert not app.search_garbage() and not searched
            now_s += app.IDLE_S
            assert app.search_garbage() and searched == [1]
            assert not app.search_garbage(), "once is enough"
            now_s += app.AT_MOST_S
            await pilot.press("f5")
            assert app.search_garbage(), "somebody who types all day does not fill the memory"
        assert gc.get_threshold() == before and gc.get_freeze_count() == 0


async def test_what_thousand_ranks_say_is_made_harmless_to_the_last() -> None:
    update = pb.Update()
    update.snapshot.run.strategy = "ZeRO\x1b[2J"
    for number in range(2 * _CLEANED_AT_ONCE + 3):
        rank = update.snapshot.ranks.add(rank=number, node=f"n{number}\x1b[31m")
        rank.heartbeat.phase = "for\x07ward"
    update.snapshot.diagnosis.add(message="bad\x1b]0;title\x07", ranks=[1])
    update.events.add().event.message = "\x9b2Jgone"
    await _clean(update)
    assert [rank.node for rank in update.snapshot.ranks] == [f"n{n}" for n in range(2 * _CLEANED_AT_ONCE + 3)]
    assert {rank.heartbeat.phase for rank in update.snapshot.ranks} == {"forward"}
    assert update.snapshot.run.strategy == "ZeRO" and update.snapshot.diagnosis[0].message == "bad"
    assert update.events[0].event.message == "gone"
