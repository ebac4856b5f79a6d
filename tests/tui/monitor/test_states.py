"""What the dashboard shows of a run in each of its states, over a real socket; and a daemon that goes and comes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distui.tui.monitor.app import VIEWS
from distui.tui.monitor.rank_screen import RankScreen
from tests.tui.watching import LARGE, SMALL, Clock, known, screen_text, until, verdict, watching

if TYPE_CHECKING:
    from tests.tui.fake_daemon import FakeDaemon


async def test_a_daemon_that_goes_away_and_comes_back(daemon: FakeDaemon, sample: Any) -> None:
    daemon.send(sample.sample_update(num_steps=100))
    clock = Clock()
    app = watching(daemon, sample, clock=clock)
    async with app.run_test(size=LARGE) as pilot:
        await until(pilot, known(app))
        await daemon.stop()
        assert app.client is not None
        await until(pilot, lambda: app.client is not None and app.client.away_since_s is not None)
        clock.now_s += 7
        await until(pilot, lambda: "daemon away 7s" in screen_text(app))
        assert app.model.history.last("step") == 100 and "all 8 ranks healthy" in screen_text(app)
        daemon.updates = [sample.sample_update(num_steps=150)]
        await daemon.start()
        await until(pilot, lambda: app.model.history.last("step") == 150)
        await until(pilot, lambda: "daemon away" not in screen_text(app))
        assert len(app.model.history) == 150, "what was known is not counted twice"
        assert len(app.model.events) == len(sample.events())


async def test_no_daemon_at_first(daemon: FakeDaemon, sample: Any) -> None:
    await daemon.stop()
    daemon.send(sample.sample_update())
    app = watching(daemon, sample)
    async with app.run_test(size=SMALL) as pilot:
        await until(pilot, lambda: "daemon away" in screen_text(app))
        assert "waiting" in verdict(app) and sample.RUN_ID[:12] in screen_text(app)
        await daemon.start()
        await until(pilot, lambda: "all 8 ranks healthy" in verdict(app))


async def test_a_run_of_which_no_rank_is_known_yet(daemon: FakeDaemon, sample: Any) -> None:
    daemon.send(sample.starting_update())
    app = watching(daemon, sample)
    async with app.run_test(size=SMALL) as pilot:
        await until(pilot, lambda: verdict(app) == "◌ starting  0 of 2 ranks")
        for number in range(1, len(VIEWS) + 1):
            await pilot.press(str(number))
            await pilot.pause()
            assert "0 B" not in screen_text(app) and " 0 s" not in screen_text(app)
        await pilot.press("1", "enter")
        await pilot.pause()
        assert not isinstance(app.screen, RankScreen) and "no rank yet" in screen_text(app)


async def test_a_finished_run_is_shown_as_it_ended(daemon: FakeDaemon, sample: Any) -> None:
    update = sample.sample_update(state="finished")
    update.snapshot.run.finished_s = sample.START_S + 95
    daemon.send(update)
    clock = Clock()
    app = watching(daemon, sample, clock=clock)
    async with app.run_test(size=LARGE) as pilot:
        await until(pilot, lambda: verdict(app).startswith("✓ finished  after 1m 35s, 240 steps, loss"))
        await until(pilot, lambda: not daemon.num_watching)
        clock.now_s += 3600
        app.tick()
        assert daemon.num_watches == 1 and "1m 35s" in screen_text(app) and "daemon away" not in screen_text(app)


async def test_a_failed_run_says_who_and_why(daemon: FakeDaemon, sample: Any) -> None:
    update = sample.sample_update(state="failed")
    update.snapshot.run.exit_status = 1
    update.snapshot.ranks[5].state, update.snapshot.ranks[5].error = "dead", "ValueError: bad batch"
    daemon.send(update)
    app = watching(daemon, sample)
    async with app.run_test(size=LARGE) as pilot:
        await until(pilot, lambda: "✗ failed" in verdict(app))
        assert "exit status 1" in verdict(app) and "rank 5: ValueError: bad batch" in verdict(app)
        await until(pilot, lambda: "✗ dead" in screen_text(app))


async def test_a_hang_is_said_above_everything_and_explained(daemon: FakeDaemon, sample: Any) -> None:
    daemon.send(sample.hang_update())
    app = watching(daemon, sample)
    async with app.run_test(size=LARGE) as pilot:
        await until(pilot, lambda: "hang: rank 5 on node01 has not entered reduce_scatter" in verdict(app))
        await pilot.press("6")
        await until(pilot, lambda: "ranks 0, 1, 2, 3 and 3 more wait for rank 5" in screen_text(app))
        await pilot.press("8")
        await until(pilot, lambda: "▲ hang" in screen_text(app))
