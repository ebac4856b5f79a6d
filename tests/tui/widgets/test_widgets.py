"""The Line-API widgets as a reader sees them: text and glyphs, at small and large sizes, without colour too."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from rich.color import Color
from textual.app import App

from distui.tui.format import num_bytes, seconds, si
from distui.tui.widgets.chart import LineChart, Mark, Series, nice_ticks
from distui.tui.widgets.heatmap import Heatmap
from distui.tui.widgets.log import LogView, clean
from distui.tui.widgets.outliers import ceiling
from distui.tui.widgets.palette import FILLS, RAMP, RAMP_STEPS
from distui.tui.widgets.sparkline import sparkline
from distui.tui.widgets.stack import Bar, StackedBars, StackedColumns
from distui.tui.widgets.table import Column, LineTable
from tests.tui.widgets.stage import Stage, lines

NAN = math.nan


def colors(app: App[None]) -> set[Color | None]:
    strips = app.screen._compositor.render_strips()
    return {segment.style.bgcolor for strip in strips for segment in strip if segment.style is not None}


def table(**more: Any) -> LineTable[dict[str, Any]]:
    columns: list[Column[dict[str, Any]]] = [
        Column("rank", lambda row: row["rank"], str),
        Column("loss", lambda row: row["loss"], lambda v: "n/a" if v is None else f"{v:.1f}", priority=1, width=6),
        Column("host name", lambda row: f"node{row['rank']:02d}", str, "left", priority=2, width=12),
    ]
    return LineTable(columns, lambda row: row["rank"], **more)


ROWS = [{"rank": rank, "loss": None if rank == 1 else 10.0 - rank} for rank in range(50)]


async def test_a_table_aligns_its_columns_and_drops_the_least_important_where_it_is_narrow() -> None:
    widget = table(sort=1)
    async with Stage(widget).run_test(size=(40, 8)) as pilot:
        widget.show(ROWS)
        await pilot.pause()
        shown = lines(pilot.app)
        assert "rank" in shown[0] and "loss ▲" in shown[0] and "host name" in shown[0]
        assert shown[1].split()[:3] == ["49", "-39.0", "node49"]
        assert len({line.index("node") for line in shown[1:]}) == 1
        await pilot.resize_terminal(16, 8)
        await pilot.pause()
        shown = lines(pilot.app)
        assert "host" not in shown[0] and shown[1].split()[:2] == ["49", "-39.0"]


async def test_a_tables_cursor_scrolls_and_what_is_not_available_comes_last() -> None:
    widget = table(sort=1, descending=True)
    async with Stage(widget).run_test(size=(40, 8)) as pilot:
        widget.show(ROWS)
        widget.focus()
        await pilot.press("end")
        await pilot.pause()
        assert widget.cursor_key == 1 and "n/a" in lines(pilot.app)[-1]
        assert "rank" in lines(pilot.app)[0], "titles stay"
        await pilot.press("home", "j", "j", "k")
        assert widget.cursor_key == 2
        await pilot.press("pagedown")
        assert widget.cursor == 7
        widget.show(list(reversed(ROWS))[:45])
        assert widget.cursor_key == 8, "the cursor stays with its row"
        widget.filter(re.compile("node4"))
        assert {row["rank"] for row in widget.rows} == set(range(40, 50))


async def test_a_tables_title_sorts_when_clicked_and_a_row_opens_on_the_second_click() -> None:
    opened: list[Any] = []

    class Listening(Stage):
        def on_line_table_selected(self, event: LineTable.Selected) -> None:
            opened.append(event.key)

    widget = table()
    async with Listening(widget).run_test(size=(40, 8)) as pilot:
        widget.show(ROWS)
        await pilot.pause()
        await pilot.click(widget, offset=(2, 0))
        await pilot.click(widget, offset=(2, 0))
        assert widget.sort_column == 0 and widget.descending and widget.rows[0]["rank"] == 49
        await pilot.click(widget, offset=(2, 3))
        assert widget.cursor == 2 and not opened
        await pilot.click(widget, offset=(2, 3))
        assert opened == [47]


async def test_an_empty_table_says_why() -> None:
    widget = table(empty="no rank yet")
    async with Stage(widget).run_test(size=(40, 6)) as pilot:
        widget.show([])
        assert "no rank yet" in lines(pilot.app)[1]
        await pilot.press("enter", "down", "s")
        assert widget.cursor_key is None


@pytest.mark.parametrize("size", [(80, 24), (30, 6), (160, 50)])
async def test_a_map_of_1000_ranks_shows_the_slow_one(size: tuple[int, int]) -> None:
    widget = Heatmap(unit=seconds)
    rows = [[0.1 + 0.0001 * (rank % 7) for rank in range(1000)] for _ in range(60)]
    for row in rows[-20:]:
        row[617] = 0.5
    async with Stage(widget).run_test(size=size) as pilot:
        widget.show(range(1, 61), rows)
        await pilot.pause()
        shown = lines(pilot.app)
        group = math.ceil(1000 / (2 * (size[1] - 1)))
        num_lines = math.ceil(math.ceil(1000 / group) / 2)
        assert [bool(line) for line in shown] == [row <= num_lines for row in range(size[1])]
        assert f"slowest of each {group}" in shown[0] or size[0] == 30
        bright = [level for level, cells in enumerate(widget._cells) if max(cells) == RAMP_STEPS - 1]
        assert bright == [617 // group]
        assert widget._cells[617 // group][0] < RAMP_STEPS // 2, "it was not slow at first"
        widget.toggle_fit()
        await pilot.pause()
        assert len(widget._cells) == 1000 and widget.virtual_size.height == 501
        widget.scroll_end(animate=False, immediate=True, force=True)
        await pilot.pause()
        assert any("rank 998" in line for line in lines(pilot.app))


async def test_a_map_of_few_ranks_has_a_line_each_with_its_last_value() -> None:
    widget = Heatmap(unit=seconds)
    async with Stage(widget).run_test(size=(60, 8)) as pilot:
        widget.show([1, 2], [[0.1, 0.2], [0.1, NAN]])
        await pilot.pause()
        shown = lines(pilot.app)
        assert "100 ms" in shown[0] and "steps 1 to 2" in shown[0]
        assert shown[1].strip().startswith("rank 0") and shown[1].endswith("100 ms")
        assert "·" in shown[2] and shown[2].endswith("n/a")
        widget.show([], [])
        await pilot.pause()
        assert lines(pilot.app)[0].strip() == "no steps yet"


def test_the_ramp_rises_evenly_in_lightness() -> None:
    def lightness(color: str) -> float:
        red, green, blue = Color.parse(color).get_truecolor()
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    found = [lightness(color) for color in RAMP]
    assert len(found) == RAMP_STEPS and found == sorted(found) and found[-1] - found[0] > 150


async def test_a_chart_has_axes_with_units_its_curve_and_the_events() -> None:
    widget = LineChart(unit=seconds, from_zero=True)
    async with Stage(widget).run_test(size=(60, 14)) as pilot:
        steps = list(range(1, 101))
        widget.show([Series("step time", steps, [0.1 + 0.1 * (n >= 50) for n in steps])], [Mark(50, "oom", 2)])
        await pilot.pause()
        shown = lines(pilot.app)
        assert "200 ms┤" in "\n".join(shown) and "0 s┤" in "\n".join(shown)
        assert "✗" in shown[12] and "step" in shown[13] and " 50 " in shown[13]
        dots = {y: [x for x, c in enumerate(line) if 0x2800 < ord(c) < 0x2900] for y, line in enumerate(shown)}
        top, half = min(y for y in dots if dots[y]), max(y for y in dots if dots[y])
        assert min(dots[top]) > 30 and min(dots[half]) < 12, "low first, high later"
        mark = shown[12].index("✗")
        assert abs(mark - min(dots[top])) <= 1, "the event is where the curve rises"


async def test_a_chart_breaks_nothing_where_there_is_little_to_draw() -> None:
    widget = LineChart()
    async with Stage(widget).run_test(size=(60, 10)) as pilot:
        for ys in ([NAN, NAN], []):
            widget.show([Series("loss", range(len(ys)), ys)], empty="n/a: the script reports no loss")
            await pilot.pause()
            assert "n/a: the script reports no loss" in "\n".join(lines(pilot.app))
        for ys in ([2.0], [2.0, 2.0], [2.0, NAN, 2.5], [0.0, 0.0], [-1.0, math.inf]):
            widget.show([Series("loss", range(len(ys)), ys)])
            await pilot.pause()
            assert any(0x2800 < ord(c) < 0x2900 for line in lines(pilot.app) for c in line), ys
        await pilot.resize_terminal(8, 2)
        await pilot.pause()


def test_ticks_are_round_and_within_the_range() -> None:
    assert nice_ticks(0, 10, 5) == [0, 2, 4, 6, 8, 10]
    assert nice_ticks(0.13, 0.27, 3) == [0.15, 0.2, 0.25]
    assert nice_ticks(5, 5, 3) == [5] and nice_ticks(0, NAN, 3) == [0]


async def test_bars_keep_shares_and_order_with_a_pattern_each_and_the_plans_mark() -> None:
    widget = StackedBars(unit=num_bytes)
    gib = float(1 << 30)
    parts = [("parameters", 3 * gib), ("gradients", gib)]
    async with Stage(widget).run_test(size=(60, 8)) as pilot:
        widget.show([Bar("rank 0", parts, "4.00 GiB", 8 * gib, 6 * gib)], mark_name="planned 6.00 GiB")
        await pilot.pause()
        shown = lines(pilot.app)
        bar = shown[0]
        assert bar.strip().startswith("rank 0") and bar.endswith("4.00 GiB")
        first, second, rest = bar.count(FILLS[0]), bar.count(FILLS[1]), bar.count("·")
        assert first == pytest.approx(3 * second, abs=2) and rest + 1 == pytest.approx(first + second, abs=2)
        assert bar.index("┃") > bar.rindex(FILLS[1])
        legend = " ".join(shown[1:])
        for told in ("parameters 3.00 GiB", "gradients 1.00 GiB", "┃ planned 6.00 GiB"):
            assert told in legend
        widget.show([], empty="n/a: no rank has sent its memory yet")
        await pilot.pause()
        assert "n/a: no rank has sent" in lines(pilot.app)[0]


async def test_columns_of_shares_fill_the_height_and_leave_untimed_steps_empty() -> None:
    widget = StackedColumns(empty="n/a: no timed steps")
    async with Stage(widget).run_test(size=(47, 10)) as pilot:
        half = [NAN] * 20
        widget.show([[0.3] * 20 + half, [0.7] * 20 + half])
        await pilot.pause()
        shown = lines(pilot.app)
        assert shown[0].startswith(" 100%") and shown[9].startswith("   0%")
        text = "\n".join(shown)
        assert text.count(FILLS[0]) == 3 * 20 and text.count(FILLS[1]) == 7 * 20
        widget.show([half, half])
        await pilot.pause()
        assert "n/a: no timed steps" in "\n".join(lines(pilot.app))


def test_a_sparkline_scales_leaves_gaps_and_does_not_draw_noise_as_mountains() -> None:
    assert sparkline([1, 2, 3, 4, 5, 6, 7, 8], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([1, NAN, 8], 5) == "  ▁ █"
    assert sparkline([NAN], 4) == "    " and sparkline([], 3) == "   " and sparkline([1.0, 2.0], 0) == ""
    assert "█" not in sparkline([1.0, 1.01, 1.0], 3)
    assert sparkline(range(100), 3, low=0, high=99) == "███"


def test_what_a_log_holds_cannot_move_the_cursor_or_set_a_title() -> None:
    assert clean("\x1b[31mred\x1b[0m \x1b]0;title\x07ok\x1b[2J\x00") == "red ok"
    assert clean("10%\r20%\r30%\r") == "30%"
    assert clean("a\tb") == "a   b"


async def test_a_log_follows_its_end_until_the_reader_scrolls_back() -> None:
    widget = LogView(empty="the log is empty")
    async with Stage(widget).run_test(size=(30, 5)) as pilot:
        assert lines(pilot.app)[0].strip() == "the log is empty"
        widget.focus()
        widget.append(b"".join(b"line %d\n" % number for number in range(20)) + b"half a li")
        await pilot.pause()
        assert lines(pilot.app)[-1][:20].strip() == "half a li" and widget.num_lines == 21
        widget.append(b"ne\nnext\n")
        await pilot.pause()
        assert [text[:20].strip() for text in lines(pilot.app)[-2:]] == ["half a line", "next"]
        await pilot.press("up", "up")
        await pilot.pause()
        seen = [text[:20] for text in lines(pilot.app)]
        widget.append(b"more\n")
        widget.prepend(b"before 1\nbefore 2\n")
        await pilot.pause()
        assert [text[:20] for text in lines(pilot.app)] == seen and not widget.following
        await pilot.press("end")
        await pilot.pause()
        assert lines(pilot.app)[-1][:20].strip() == "more" and widget.following


async def test_without_colour_everything_still_has_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    widget = Heatmap(unit=seconds)
    async with Stage(widget).run_test(size=(60, 8)) as pilot:
        assert pilot.app.no_color
        widget.show(range(1, 41), [[0.1, 0.1, 0.1 + 0.01 * step] for step in range(40)])
        await pilot.pause()
        greys = {color.get_truecolor() for color in colors(pilot.app) if color is not None and color.triplet}
        assert all(abs(c.red - c.green) <= 1 and abs(c.green - c.blue) <= 1 for c in greys)
        assert len(greys) > 8, "the map is still told by its lightness"


@pytest.mark.parametrize("theme", ["textual-light", "nord", "ansi-dark"])
async def test_widgets_draw_anew_in_another_theme(theme: str) -> None:
    widget = StackedBars(unit=num_bytes)
    async with Stage(widget).run_test(size=(60, 4)) as pilot:
        widget.show([Bar("", [("parameters", 1.0)])])
        await pilot.pause()
        before = lines(pilot.app), colors(pilot.app)
        pilot.app.theme = theme
        await pilot.pause()
        assert lines(pilot.app) == before[0] and colors(pilot.app) != before[1]


def test_one_slow_step_does_not_flatten_the_others_and_is_marked() -> None:
    values = [1.0, 1.2] * 10
    assert ceiling(values) == ceiling([*values, 12.0]) == 1.2
    assert ceiling([*values, 1.9]) == 1.9, "what is not far out is shown in full"
    assert ceiling([1.0, 12.0]) == 12.0, "of two nobody can say which is usual"
    assert sparkline([*values, 12.0], 21) == f"{'▁█' * 10}▲"


def test_a_prefix_belongs_to_a_unit_and_not_to_a_word() -> None:
    assert (si(1490.0, "W"), si(1490.0, "tok/s"), si(1490.0), si(None, "W")) == (
        "1.49 kW",
        "1.49 k tok/s",
        "1.49 k",
        "n/a",
    )
