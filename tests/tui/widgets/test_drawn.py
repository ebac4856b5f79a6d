"""Pictures of layouts and pipelines, scales that stay, and lines that are painted again only where they changed."""

from __future__ import annotations

import math
from typing import Any

import pytest

from distui.core.axes.schedules import SCHEDULES
from distui.core.axes.sizes import AxisSizes
from distui.tui.widgets.chart import LineChart, Series
from distui.tui.widgets.layout import picture
from distui.tui.widgets.scale import grown, steps_range, widened
from distui.tui.widgets.table import Column, LineTable
from distui.tui.widgets.timeline import PipelineTimeline, pass_of
from tests.tui.widgets.stage import Stage, lines


def test_a_picture_shows_every_rank_by_axis_or_says_how_many_it_leaves_out() -> None:
    assert picture(AxisSizes(2, 2, 1, 2), 60, ranks_per_node=4) == [
        "        tp0 tp1",
        "pp0 dp0   0   1  node 0",
        "    dp1   2   3  node 0",
        "pp1 dp0   4   5  node 1",
        "    dp1   6   7  node 1",
    ]
    assert picture(AxisSizes(dp=3), 60) == ["dp0 dp1 dp2", "  0   1   2"]
    assert picture(AxisSizes(), 60) == []
    for sizes in (AxisSizes(16, 8, 1, 8), AxisSizes(dp=1024), AxisSizes(2, 1, 1, 512)):
        shown = picture(sizes, 60, num_lines=12, ranks_per_node=8)
        assert max(map(len, shown)) <= 60 and any("…" in text for text in shown), shown
        assert "1023" in shown[-1], "the last rank is in it"
    assert picture(AxisSizes(16, 8, 1, 8), 60, num_lines=12)[-2] == "… 117 more lines"


def test_ranks_at_a_place_are_those_of_the_mesh() -> None:
    sizes = AxisSizes(2, 3, 1, 2)
    rows = [text.split() for text in picture(sizes, 60)[1:]]
    stage = ""
    for row in rows:
        stage = row.pop(0) if row[0].startswith("pp") else stage
        ranks = [sizes.rank_at({"pp": int(stage[2:]), "dp": int(row[0][2:]), "cp": 0, "tp": tp}) for tp in (0, 1)]
        assert [int(word) for word in row[1:]] == ranks


@pytest.mark.parametrize("schedule", SCHEDULES)
async def test_a_timeline_draws_each_stages_blocks_in_proportion_and_its_idle_time(schedule: str) -> None:
    found = pass_of(schedule, 4, 8)
    assert found is not None
    widget = PipelineTimeline()
    async with Stage(widget).run_test(size=(120, 6)) as pilot:
        widget.show(found, [0.5, None, 0.25, 0.125])
        await pilot.pause()
        shown = lines(pilot.app)
        assert [text.split()[0] for text in shown[:4]] == ["pp0", "pp1", "pp2", "pp3"]
        assert shown[0].endswith("waits 50.0%") and shown[1].endswith("waits n/a")
        for stage, text in enumerate(shown[:4]):
            cells = text.split("  idle")[0][len(" pp0 ") :]
            waited = cells.count("·") / len(cells)
            assert waited == pytest.approx(found.idle(stage), abs=0.03), (stage, text)
            assert cells.count("▓") + cells.count("▒") > cells.count("█"), "a backward takes longer"
        assert "forward" in shown[4] and ("weights" in shown[4]) == (schedule == "zbv")
        await pilot.resize_terminal(30, 4)
        await pilot.pause()
        assert "pp0" in lines(pilot.app)[0]


async def test_a_timeline_of_many_stages_takes_some_of_them_and_says_so() -> None:
    found = pass_of("1f1b", 64, 8)
    assert found is not None
    widget = PipelineTimeline()
    widget.styles.max_height = "100%"  # as in the dashboard
    async with Stage(widget).run_test(size=(120, 17)) as pilot:
        widget.show(found, [None] * 64)
        await pilot.pause()
        shown = lines(pilot.app)
        assert [text.split()[0] for text in shown[:16]] == [f"pp{number}" for number in range(0, 64, 4)]
        assert "one stage in 4" in shown[16]


@pytest.mark.parametrize(
    "told", [("", 2, 4), ("1f1b", 1, 4), ("1f1b", 2, 0), ("weird", 2, 2), ("gpipe", 4_000_000_000, 4_000_000_000)]
)
def test_no_timeline_where_there_is_no_such_schedule_or_one_that_no_screen_holds(told: tuple[str, int, int]) -> None:
    assert pass_of(*told) is None


@pytest.mark.parametrize("num", range(1, 400, 7))
def test_a_scale_stays_while_steps_come_in_and_always_holds_them(num: int) -> None:
    assert num <= grown(num) <= num * 33 / 32 + 1
    left, right = steps_range(5, 5 + num)
    assert left <= 5 and right >= 5 + num and right - left <= num * 34 / 32 + 2
    low, high = widened(0.1 * num, 0.1 * num + 1)
    assert low <= 0.1 * num + 1e-9 and high >= 0.1 * num + 1 - 1e-9 and high - low < 1.2


async def test_only_the_lines_that_new_values_change_are_painted_again() -> None:
    columns: list[Column[dict[str, Any]]] = [
        Column("rank", lambda row: row["rank"], str),
        Column("loss", lambda row: row["loss"], str, width=6),
    ]
    rows = [{"rank": rank, "loss": 10.0 - rank} for rank in range(50)]
    widget = LineTable(columns, lambda row: row["rank"], sort=0)
    async with Stage(widget).run_test(size=(40, 12)) as pilot:
        widget.show(rows)
        await pilot.pause()
        asked: set[int] = set()

        def exchange() -> Any:
            regions = type(widget)._exchange_repaint_regions(widget)
            for region in regions:
                asked.update(region.line_range)
            return regions

        widget._exchange_repaint_regions = exchange  # type: ignore[method-assign]
        changed = [{**row, "loss": 99.0} if row["rank"] == 3 else row for row in rows]
        widget.show(changed)
        await pilot.pause()
        assert asked == {4}, "the titles are on line 0"
        assert "99.0" in lines(pilot.app)[4]
        asked.clear()
        widget.show(changed)
        await pilot.pause()
        assert not asked
        widget.scroll_to(y=10, animate=False, force=True)
        await pilot.pause()
        assert lines(pilot.app)[1].split()[0] == "10", "scrolling draws all anew"


async def test_a_chart_moves_no_dot_of_former_steps_when_one_comes_in() -> None:
    widget = LineChart()
    losses = [2 + math.exp(-step / 50) for step in range(1, 400)]
    async with Stage(widget).run_test(size=(60, 14)) as pilot:
        before: list[str] | None = None
        same = 0
        for num in range(300, 324):
            widget.show([Series("loss", range(1, num + 1), losses[:num])])
            await pilot.pause()
            shown = [text[:50] for text in lines(pilot.app)]
            same += shown == before
            before = shown
        assert same >= 20, "all but the last columns stay, but for the few steps at which the scale grows"
