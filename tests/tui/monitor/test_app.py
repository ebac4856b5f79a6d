"""The dashboard under a Pilot, watching a daemon on a real socket: keys, drill-down, endings, a daemon gone away."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from textual.widgets import Input

from distui.tui.monitor import app as app_module
from distui.tui.monitor.app import THEMES, VERDICT_S, VIEWS, DashboardApp, run_dashboard
from distui.tui.monitor.dialogs import HelpScreen, StopScreen
from distui.tui.monitor.rank_screen import RankScreen
from distui.tui.monitor.views.logs import LogsView
from distui.tui.widgets.heatmap import Heatmap
from distui.tui.widgets.log import LogView
from distui.tui.widgets.table import LineTable
from tests.tui.watching import LARGE, SMALL, Clock, Job, current, known, screen_text, until, watching

if TYPE_CHECKING:
    from tests.tui.fake_daemon import FakeDaemon


SEEN = (
    "tokens/s",
    "last steps",
    "peak",
    "where the time goes",
    "gradient norm",
    "reduce_scatter",
    "log of rank 0",
    "ecc",
)


def shows(app: DashboardApp, told: str) -> bool:
    return told in screen_text(app)


@pytest.mark.parametrize("size", [SMALL, LARGE], ids=["80x24", "160x50"])
async def test_number_keys_open_the_views_and_each_shows_the_run(
    daemon: FakeDaemon, sample: Any, size: tuple[int, int]
) -> None:
    daemon.send(sample.sample_update())
    app = watching(daemon, sample)
    async with app.run_test(size=size) as pilot:
        await until(pilot, known(app))
        for number, view in enumerate(VIEWS, start=1):
            await pilot.press(str(number))
            assert current(app) == f"view-{view.TITLE.lower()}"
            told = "tokens/s" if size == SMALL and number in (2, 3) else SEEN[number - 1]
            if (size, number) == (SMALL, 3):
                told = "activations"
            await until(pilot, partial(shows, app, told))
            assert f"{number} {view.TITLE}" in screen_text(app) and "all 8 ranks healthy" in screen_text(app)
        await pilot.press("q")
    assert app.return_value == "quit"


async def test_a_click_on_a_tab_opens_its_view(daemon: FakeDaemon, sample: Any) -> None:
    daemon.send(sample.sample_update())
    app = watching(daemon, sample)
    async with app.run_test(size=SMALL) as pilot:
        await until(pilot, known(app))
        column = screen_text(app).splitlines()[2].index("5 Loss")
        await pilot.click("#tabs", offset=(column + 2, 0))
        await pilot.pause()
        assert current(app) == "view-loss"


async def test_filter_shows_matching_ranks_only_and_esc_shows_all_again(daemon: FakeDaemon, sample: Any) -> None:
    daemon.send(sample.sample_update())
    app = watching(daemon, sample)
    async with app.run_test(size=LARGE) as pilot:
        await until(pilot, known(app))
        await pilot.press("2", "slash")
        table = app.screen.query_one("#ranks-table", LineTable)
        box = app.screen.query_one("#ranks-filter", Input)
        assert app.focused is box
        await pilot.press(*"node01")
        assert [row.rank for row in table.rows] == [4, 5, 6, 7]
        await until(pilot, lambda: "filter /node01/" in screen_text(app) and "node00" not in screen_text(app))
        await pilot.press("left_parenthesis")
        assert len(table.rows) == 4 and "not a regular expression yet" in screen_text(app)
        await pilot.press("backspace", "enter")
        assert app.focused is table and len(table.rows) == 4
        await pilot.press("escape")
        assert len(table.rows) == 8 and not box.display
        await pilot.press("slash", *"no such", "enter")
        assert not table.rows and "no row matches the filter" in screen_text(app)


async def test_sort_goes_through_the_columns_and_keeps_the_cursors_rank(daemon: FakeDaemon, sample: Any) -> None:
    update = sample.sample_update()
    update.snapshot.ranks[6].loss = 9.0
    update.snapshot.ranks[3].ClearField("loss")
    daemon.send(update)
    app = watching(daemon, sample)
    async with app.run_test(size=LARGE) as pilot:
        await until(pilot, known(app))
        await pilot.press("2", "down", "down")
        table = app.screen.query_one("#ranks-table", LineTable)
        assert table.cursor_key == 2
        while table.columns[table.sort_column or 0].title != "loss":
            await pilot.press("s")
        order = [row.rank for row in table.rows]
        assert order[-2:] == [6, 3], "the largest, then what is not available"
        await pilot.press("r")
        assert table.rows[0].rank == 6 and table.rows[-1].rank == 3
        assert table.cursor_key == 2 and "loss ▼" in screen_text(app)
        await pilot.press("S")
        assert table.columns[table.sort_column or 0].title == "step"


async def test_enter_looks_into_a_rank_and_esc_comes_back(daemon: FakeDaemon, sample: Any) -> None:
    daemon.send(sample.sample_update())
    app = watching(daemon, sample)
    async with app.run_test(size=LARGE) as pilot:
        await until(pilot, known(app))
        await pilot.press("2")
        tables = app.screen.query(LineTable)
        await until(pilot, lambda: current(app) == "view-ranks" and any(len(table.rows) > 3 for table in tables))
        await pilot.press("down", "down", "down", "enter")
        await until(pilot, lambda: isinstance(app.screen, RankScreen) and "[rank 3] step  300" in screen_text(app))
        text = screen_text(app)
        for told in ("rank 3  running  on node00  pid 41203", "NVIDIA A100", "1.56 G parameters", "optimizer states"):
            assert told in text
        await pilot.press("right_square_bracket")
        await until(pilot, lambda: "[rank 4] step  300" in screen_text(app))
        assert "[rank 3]" not in screen_text(app)
        await pilot.press("left_square_bracket", "left_square_bracket")
        await until(pilot, lambda: "pid 41202" in screen_text(app))
        await pilot.press("escape")
        assert not isinstance(app.screen, RankScreen) and current(app) == "view-ranks"
        await pilot.press("1", "enter")
        await until(pilot, lambda: isinstance(app.screen, RankScreen))
        await pilot.press("5")
        assert not isinstance(app.screen, RankScreen) and current(app) == "view-loss"


async def test_help_lists_the_keys_of_the_view_and_any_of_its_keys_closes_it(daemon: FakeDaemon, sample: Any) -> None:
    daemon.send(sample.sample_update())
    app = watching(daemon, sample)
    async with app.run_test(size=SMALL) as pilot:
        await until(pilot, known(app))
        await pilot.press("2", "question_mark")
        assert isinstance(app.screen, HelpScreen)
        await until(pilot, lambda: "filter by a regular expression" in screen_text(app))
        await until(pilot, lambda: "quit; the job goes on" in screen_text(app))
        await pilot.press("question_mark")
        assert not isinstance(app.screen, HelpScreen)
        await pilot.press("question_mark", "q")
        assert not isinstance(app.screen, HelpScreen) and app.return_value is None


async def test_pause_holds_the_picture_while_data_arrives(daemon: FakeDaemon, sample: Any) -> None:
    update = sample.sample_update(num_steps=100)
    daemon.send(update)
    app = watching(daemon, sample)
    async with app.run_test(size=LARGE) as pilot:
        await until(pilot, known(app))
        await pilot.press("p")
        assert "paused" in screen_text(app)
        daemon.send(sample.sample_update(num_steps=240))
        await until(pilot, lambda: app.model.history.last("step") == 240)
        await pilot.press("2", "1")
        assert app.screen.query_one("#overview-table", LineTable).rows[0].step == 100
        await pilot.press("p")
        await until(pilot, lambda: app.screen.query_one("#overview-table", LineTable).rows[0].step == 240)
        assert "paused" not in screen_text(app)
        await pilot.press("left")
        assert "paused at step 181" in screen_text(app)
        await pilot.press("right")
        assert "paused" in screen_text(app) and "at step" not in screen_text(app)


async def test_w_shows_fewer_steps(daemon: FakeDaemon, sample: Any) -> None:
    daemon.send(sample.sample_update())
    app = watching(daemon, sample)
    async with app.run_test(size=LARGE) as pilot:
        await until(pilot, known(app))
        await pilot.press("2")
        await until(pilot, lambda: "steps 1 to 240" in screen_text(app))
        await pilot.press("w", "w", "w")
        assert "steps 191 to 240" in screen_text(app)
        assert app.screen.query_one("#ranks-map", Heatmap).num_ranks == 8


async def test_t_takes_the_next_theme_and_comes_round(daemon: FakeDaemon, sample: Any) -> None:
    app = watching(daemon, sample)
    async with app.run_test(size=SMALL) as pilot:
        seen = [app.theme]
        for _ in THEMES:
            await pilot.press("t")
            seen.append(app.theme)
        assert seen == [*THEMES, THEMES[0]]


async def test_ctrl_c_asks_before_it_stops_the_job(daemon: FakeDaemon, sample: Any) -> None:
    daemon.send(sample.sample_update())
    job = Job()
    app = watching(daemon, sample, job)
    async with app.run_test(size=SMALL) as pilot:
        await until(pilot, known(app))
        for no in ("n", "escape", "q"):
            await pilot.press("ctrl+c")
            assert isinstance(app.screen, StopScreen) and "stop the job" in screen_text(app)
            await pilot.press(no)
            assert not isinstance(app.screen, StopScreen) and app.return_value is None
        assert job.num_stops == 0
        await pilot.press("ctrl+c", "y")
    assert (app.return_value, job.num_stops) == ("stop", 1)


async def test_a_second_ctrl_c_stops_the_job(daemon: FakeDaemon, sample: Any) -> None:
    job = Job()
    app = watching(daemon, sample, job)
    async with app.run_test(size=SMALL) as pilot:
        await pilot.press("ctrl+c", "ctrl+c")
    assert (app.return_value, job.num_stops) == ("stop", 1)


async def test_ctrl_c_of_a_mere_watcher_quits(daemon: FakeDaemon, sample: Any) -> None:
    app = watching(daemon, sample)
    async with app.run_test(size=SMALL) as pilot:
        await pilot.press("ctrl+c")
    assert app.return_value == "quit"


async def test_the_dashboard_closes_when_the_job_has_ended(daemon: FakeDaemon, sample: Any) -> None:
    daemon.send(sample.sample_update())
    job, clock = Job(), Clock()
    app = watching(daemon, sample, job, clock)
    async with app.run_test(size=SMALL) as pilot:
        await until(pilot, known(app))
        job.exit_status = 0
        await until(pilot, lambda: app._ended_s is not None)
        assert app.return_value is None, "the last picture stays for a moment"
        clock.now_s += VERDICT_S
        await until(pilot, lambda: app.return_value is not None)
    assert (app.return_value, job.num_stops) == ("ended", 0)


async def test_k_keeps_the_dashboard_of_an_ended_job(daemon: FakeDaemon, sample: Any) -> None:
    daemon.send(sample.sample_update())
    job, clock = Job(), Clock()
    app = watching(daemon, sample, job, clock)
    async with app.run_test(size=SMALL) as pilot:
        await until(pilot, known(app))
        job.exit_status = 1
        await until(pilot, lambda: app._ended_s is not None)
        await pilot.press("k")
        clock.now_s += 60
        app.tick()
        await pilot.pause()
        assert app.return_value is None
        await pilot.press("q")
    assert app.return_value == "ended"


async def test_logs_go_from_the_launcher_over_the_ranks_and_fetch_earlier_lines(
    daemon: FakeDaemon, sample: Any
) -> None:
    daemon.send(sample.sample_update())
    daemon.logs[0] = b"".join(b"line %06d\n" % number for number in range(20_000))
    app = watching(daemon, sample)
    async with app.run_test(size=SMALL) as pilot:
        await until(pilot, known(app))
        await pilot.press("7")
        view = app.screen.query_one(LogsView)
        log = view.query_one(LogView)
        await until(pilot, lambda: "line 019999" in screen_text(app))
        held = log.num_lines
        assert held < 6000, "only the last piece is read"
        daemon.logs[0] += b"a new \x1b[31mline\x1b[0m\n"
        await until(pilot, lambda: "a new line" in screen_text(app))
        await pilot.press("home")
        await until(pilot, lambda: log.num_lines > held + 1 and not log.following)
        await pilot.press("f")
        await until(pilot, lambda: "a new line" in screen_text(app))
        await pilot.press("left_square_bracket")
        await until(pilot, lambda: "log of the launcher" in screen_text(app) and "has no log yet" in screen_text(app))
        await pilot.press("right_square_bracket", "right_square_bracket")
        await until(pilot, lambda: "[rank 1] step  300" in screen_text(app))


async def test_the_palette_offers_the_views_and_no_second_quit(daemon: FakeDaemon, sample: Any) -> None:
    app = watching(daemon, sample)
    async with app.run_test(size=SMALL):
        titles = [command.title for command in app.get_system_commands(app.screen)]
    assert [f"{number} {view.TITLE}" for number, view in enumerate(VIEWS, start=1)] == titles[: len(VIEWS)]
    assert titles.count("Quit") == 1


def test_run_dashboard_answers_quit_when_the_app_breaks(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(app_module.DashboardApp, "run", lambda self: None)
    assert run_dashboard(tmp_path / "d.sock", "run") == "quit"
