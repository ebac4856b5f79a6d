"""What the dashboard knows without a screen: the run, its history, the verdict, and numbers as text (n/a, never 0)."""

from __future__ import annotations

import math
from typing import Any

import pytest

from distui.proto import telemetry_pb2 as pb
from distui.tui.format import clock, count, cut, duration, num_bytes, percent, ranks, scalar, seconds, si
from distui.tui.monitor.history import PHASES, StepHistory
from distui.tui.monitor.model import RunModel, memory_of
from distui.tui.monitor.verdict import judge
from distui.tui.monitor.views.collectives import group_lines, who_waits
from distui.tui.monitor.views.rank_columns import RANK_COLUMNS, rank_lines

NOW_S = 1000.0


def model_of(update: pb.Update) -> RunModel:
    model = RunModel("")
    model.apply(update, NOW_S)
    return model


def step(number: int, time_s: float | None = None, **fields: Any) -> pb.StepSummary:
    return pb.StepSummary(step=number, time_s=number if time_s is None else time_s, **fields)


@pytest.mark.parametrize("write", [si, num_bytes, seconds, duration, count, percent, scalar])
@pytest.mark.parametrize("value", [None, math.nan])
def test_what_is_not_available_is_never_a_zero(write: Any, value: float | None) -> None:
    assert write(value) == "n/a"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (si(999.4), "999"),
        (si(999.6, "tok/s"), "1.00 k tok/s"),
        (si(12_345.0), "12.3 k"),
        (num_bytes(0), "0 B"),
        (num_bytes(1023), "1.00 KiB"),
        (num_bytes(40 << 30), "40.0 GiB"),
        (seconds(0.00085), "850 µs"),
        (seconds(0.1234), "123 ms"),
        (seconds(0.9996), "1.00 s"),
        (seconds(185), "3m 05s"),
        (duration(59.9), "59s"),
        (duration(93_784), "1d 02h"),
        (percent(0.4521), "45.2%"),
        (scalar(2.3456), "2.346"),
        (scalar(3e-4), "3.000e-4"),
        (scalar(-math.inf), "-inf"),
        (count(1234.0), "1,234"),
        (ranks([3]), "rank 3"),
        (ranks([0, 1, 2, 3, 9, 10]), "ranks 0, 1, 2, 3 and 2 more"),
        (cut("abcdef", 4), "abc…"),
        (cut("abc", 0), ""),
        (clock(0.0), "n/a"),
    ],
)
def test_numbers_are_written_with_three_digits_and_their_unit(text: str, told: str) -> None:
    assert text == told


def test_history_takes_each_step_once_and_marks_what_is_missing() -> None:
    history = StepHistory()
    assert history.append(step(1, loss=3.0, step_s=0.5, tokens_per_s=10.0, forward_s=0.2))
    assert history.append(step(2, step_s=0.4))
    assert not history.append(step(2, step_s=0.4)), "as after a reconnect"
    assert list(history.column("step")) == [1, 2]
    assert history.last("loss") == 3.0 and math.isnan(history.column("loss")[1])
    assert history.last("tokens_per_s") == 10.0 and math.isnan(history.column("tokens_per_s")[1])
    assert history.last("mfu") is None
    assert history.other()[0] == pytest.approx(0.3) and math.isnan(history.other()[1])
    assert history.split(slice(1, 2)) is None, "no part was timed in step 2"


def test_a_job_begun_again_from_a_checkpoint_replaces_its_later_steps() -> None:
    history = StepHistory()
    for number in range(1, 11):
        history.append(step(number, loss=float(number), rank_step_s=[1.0, 2.0]))
    assert history.append(step(6, time_s=20.0, loss=60.0, rank_step_s=[3.0, 4.0]))
    assert list(history.column("step")) == [1, 2, 3, 4, 5, 6]
    assert history.last("loss") == 60.0 and history.rank_times(1) == [2.0] * 5 + [4.0]
    assert math.isnan(history.rank_times(7)[0])


def test_history_stays_bounded_keeps_both_ends_and_the_newest_rows_of_ranks() -> None:
    history = StepHistory(capacity=100, rank_rows=10)
    for number in range(1, 1001):
        history.append(step(number, step_s=0.1, rank_step_s=[0.1]))
    steps = list(history.column("step"))
    assert len(steps) <= 100 and steps[0] == 1 and steps[-50:] == list(range(951, 1001))
    assert steps == sorted(steps) and 10 <= len(history.rows) <= 74 and history.rows[-1].step == 1000


def test_a_window_ends_where_it_is_told_and_counts_steps() -> None:
    history = StepHistory()
    for number in range(1, 101):
        history.append(step(number, rank_step_s=[1.0]))
    assert list(history.column("step", history.window(10, None))) == list(range(91, 101))
    assert list(history.column("step", history.window(10, 50))) == list(range(41, 51))
    assert len(history.column("step", history.window(None, 30))) == 30
    assert [row.step for row in history.window_rows(3, 20)] == [18, 19, 20]
    assert not list(StepHistory().column("step", StepHistory().window(10, None)))


def test_what_the_daemon_repeats_after_a_reconnect_changes_nothing(sample: Any) -> None:
    update = sample.sample_update()
    model = model_of(update)
    before = (len(model.history), len(model.events), {name: len(points) for name, points in model.metrics.items()})
    model.apply(update, NOW_S + 1)
    assert before == (
        len(model.history),
        len(model.events),
        {name: len(points) for name, points in model.metrics.items()},
    )
    assert before[0] == 240 and before[1] == 5 and before[2] == {"accuracy": 12, "lr_scale": 12}
    assert model.version == 2


def test_a_frozen_run_does_not_change_with_the_live_one(sample: Any) -> None:
    model = model_of(sample.sample_update(num_steps=100))
    frozen = model.freeze()
    model.apply(sample.sample_update(num_steps=240, state="finished"), NOW_S + 1)
    assert (frozen.history.last("step"), model.history.last("step")) == (100, 240)
    assert (frozen.state, model.state) == ("running", "finished")
    assert len(frozen.metrics["accuracy"]) == 5


def test_events_get_their_place_on_the_axis_of_steps(sample: Any) -> None:
    marks = model_of(sample.sample_update()).event_steps()
    assert [(kind, level) for _, kind, level in marks] == [
        ("checkpoint", 0),
        ("overflow", 1),
        ("evaluation", 0),
        ("ecc", 2),
    ]
    assert marks[0][0] == 64 and marks[1][0] == 136


def test_times_are_the_daemons_not_this_machines(sample: Any) -> None:
    model = model_of(sample.sample_update())
    assert model.elapsed_s(NOW_S) == pytest.approx(34.1) and model.elapsed_s(NOW_S + 5) == pytest.approx(39.1)
    assert model.elapsed_s(NOW_S - 60) == pytest.approx(34.1), "a clock set back"
    lines = rank_lines(model, NOW_S + 2)
    assert lines[0].phase == "backward" and lines[0].phase_s == pytest.approx(2.03)


def test_memory_beyond_the_categories_is_other_and_what_is_unknown_none() -> None:
    gib = 1 << 30
    memory = pb.Memory(by_category_bytes={"gradients": gib, "kv": 2, "parameters": 3}, peak_rss_bytes=9 * gib)
    use = memory_of(pb.RankState(memory_bytes=2 * gib, memory=memory))
    assert use.parts == [("parameters", 3), ("gradients", gib), ("kv", 2), ("other", gib - 5)]
    assert use.limit is None and use.peak == 9 * gib
    nothing = memory_of(pb.RankState())
    assert nothing.parts == [] and (nothing.total, nothing.limit, nothing.peak) == (None, None, None)


def test_a_script_that_counts_no_tokens_has_no_rate(sample: Any) -> None:
    model = model_of(sample.cpu_update())
    assert model.tokens_per_s() is None
    assert model.rate == ("samples_per_s", "samples/s")
    assert model.planned_bytes() is None and model.history.split() is None
    cells = {column.title: column.text(column.value(rank_lines(model, NOW_S)[0])) for column in RANK_COLUMNS[:-1]}
    assert cells["tokens/s"] == "133" and cells["memory"] == "512 MiB" and cells["step"] == "60"


def test_a_rank_of_which_nothing_is_known_shows_only_na(sample: Any) -> None:
    update = sample.starting_update()
    update.snapshot.ranks.add(rank=0)
    [row] = rank_lines(model_of(update), NOW_S)
    cells = {column.title: column.text(column.value(row)) for column in RANK_COLUMNS[:-1]}
    assert cells.pop("rank") == "0"
    assert set(cells.values()) == {"n/a"}, cells


def test_verdict_before_anything_is_known() -> None:
    found = judge(RunModel("run"), NOW_S, "no such run")
    assert (found.state, found.message) == ("waiting", "for the daemon: no such run")


def test_verdict_of_a_healthy_a_starting_and_an_ended_run(sample: Any) -> None:
    assert judge(model_of(sample.sample_update()), NOW_S).message == "all 8 ranks healthy"
    assert judge(model_of(sample.sample_update(num_ranks=1)), NOW_S).message == "its one rank is healthy"
    starting = judge(model_of(sample.starting_update()), NOW_S)
    assert (starting.state, starting.message) == ("starting", "0 of 2 ranks")
    update = sample.sample_update(state="finished")
    update.snapshot.run.finished_s = sample.START_S + 40
    ended = judge(model_of(update), NOW_S)
    assert ended.tone == "good" and ended.message.startswith("after 40s, 240 steps, loss ")


def test_verdict_calls_nobody_healthy_while_the_daemon_is_away(sample: Any) -> None:
    away = judge(model_of(sample.sample_update()), NOW_S, daemon_away=True)
    assert (away.state, away.tone) == ("unknown", "warn")
    assert away.message == "the daemon is away; last known: running, all 8 ranks healthy"
    ended = model_of(sample.sample_update(state="finished"))
    assert judge(ended, NOW_S, daemon_away=True).state == "finished", "how it ended does not change any more"


def test_verdict_names_who_is_missing_dead_or_stopped(sample: Any) -> None:
    hang = judge(model_of(sample.hang_update()), NOW_S)
    assert hang.tone == "bad" and hang.message.startswith(
        "hang: rank 5 on node01 has not entered reduce_scatter #2,881"
    )
    assert hang.message.endswith("(for 12s)")
    update = sample.sample_update()
    update.snapshot.ranks[2].state = "dead"
    update.snapshot.ranks[3].state = update.snapshot.ranks[4].state = "stopped"
    assert judge(model_of(update), NOW_S).message == "rank 2 dead, ranks 3, 4 stopped"
    update = sample.sample_update()
    update.snapshot.run.state = "stalled"
    assert "none is found to be the cause" in judge(model_of(update), NOW_S).message
    update = sample.sample_update()
    update.snapshot.diagnosis.add(kind="straggler", ranks=[3], message="1.35 times the median")
    found = judge(model_of(update), NOW_S)
    assert (found.tone, found.message) == ("warn", "straggler: rank 3 on node00: 1.35 times the median")


def test_who_waits_for_whom(sample: Any) -> None:
    lines = group_lines(model_of(sample.hang_update()), "data_parallel", NOW_S)
    assert [line.behind for line in lines] == [0, 0, 0, 0, 0, 1, 0, 0]
    assert lines[0].waiting_in == "reduce_scatter" and lines[0].waiting_s == pytest.approx(12.4)
    assert who_waits(lines) == "ranks 0, 1, 2, 3 and 3 more wait for rank 5"
    healthy = group_lines(model_of(sample.sample_update()), "data_parallel", NOW_S)
    assert who_waits(healthy) == "rank 2 comes last, 3.90 ms behind the first"
    assert who_waits([]) == "who comes last is n/a"


def test_a_rank_that_is_gone_waits_for_nobody(sample: Any) -> None:
    update = sample.hang_update()
    for rank in update.snapshot.ranks:
        rank.state = "finished"
    model = model_of(update)
    lines = group_lines(model, "data_parallel", NOW_S)
    assert {line.waiting_in for line in lines} == {None} and {line.waiting_s for line in lines} == {None}
    assert {line.phase for line in rank_lines(model, NOW_S)} == {None}


def test_the_split_is_the_mean_over_the_window(sample: Any) -> None:
    model = model_of(sample.sample_update())
    window = slice(190, 240)
    split = model.history.split(window)
    assert split is not None
    mean_step_s = sum(model.history.column("step_s", window)) / 50
    assert sum(split) == pytest.approx(mean_step_s)
    for share, seconds_ in zip(sample.PHASE_SHARES, split[: len(PHASES)], strict=True):
        assert seconds_ == pytest.approx(share * mean_step_s)


def pipelined(sample: Any, time_s: float, blocked: dict[str, float]) -> pb.Update:
    update = sample.axes_update(8)
    update.server_time_s = time_s
    for group, blocked_s in blocked.items():
        update.snapshot.collectives.add(group=group, op="recv", count=1, blocked_s=blocked_s)
    return update


def test_stages_wait_for_what_their_ranks_were_blocked_in_receives_from_their_neighbours(sample: Any) -> None:
    model = RunModel("")
    # world = pp 2 x dp 2 x tp 2: ranks 0 and 4 are one pipeline, 1 and 5 the next; 0 and 1 share a matrix.
    model.apply(pipelined(sample, 1000.0, {"pp[0>4]": 50.0, "pp[4>0]": 10.0}), NOW_S)
    assert model.stage_waits() == [None, None], "one moment tells of no share"
    later = {"pp[0>4]": 54.0, "pp[1>5]": 2.0, "pp[4>0]": 11.0, "tp[0>1]": 90.0, "own[9>4]": 90.0, "own[any>4]": 90.0}
    model.apply(pipelined(sample, 1010.0, later), NOW_S)
    assert model.stage_waits() == [pytest.approx(1 / 40), pytest.approx(6 / 40)], "4 ranks a stage, 10 s"
    frozen = model.freeze()
    model.apply(pipelined(sample, 900.0, later), NOW_S)
    assert model.stage_waits() == [None, None], "a recording went back"
    assert frozen.stage_waits()[1] == pytest.approx(6 / 40)


@pytest.mark.parametrize("layout", [{}, {"pp": 2, "dp": 2, "cp": 1, "tp": 1}, {"pp": 1, "dp": 8, "cp": 1, "tp": 1}])
def test_ranks_have_places_only_where_the_axes_multiply_to_the_world(sample: Any, layout: dict[str, Any]) -> None:
    update = sample.sample_update(8)
    update.snapshot.run.layout.CopyFrom(pb.Layout(**layout))
    model = model_of(update)
    assert model.axes is None and all(line.place is None for line in rank_lines(model, NOW_S))
    placed = rank_lines(model_of(sample.axes_update(8)), NOW_S, "tp")
    assert placed[6].place == (("tp", 0), ("pp", 1), ("dp", 1))
