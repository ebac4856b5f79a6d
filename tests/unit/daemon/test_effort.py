"""What of a run's time was training, and where the rest went, from its steps and restarts."""

from __future__ import annotations

import pytest

from distui.daemon.runs.effort import LOST, Effort


def lost(effort: Effort, started_s: float, now_s: float) -> dict[str, float]:
    told = effort.told(started_s, now_s)
    assert told is not None
    parts = {name: getattr(told, f"{name}_s") for name in LOST}
    assert told.effective * told.wall_s == pytest.approx(told.wall_s - sum(parts.values()))
    return {name: pytest.approx(value) for name, value in parts.items() if value}  # type: ignore[misc]


def train(effort: Effort, first: int, last: int, from_s: float, step_s: float = 1.0) -> float:
    """Have two ranks take steps; return when the last one ended."""
    for number in range(first, last + 1):
        from_s += step_s
        effort.step(number, from_s, step_s)
        effort.step(number, from_s + 0.25, step_s)  # the slower rank tells of it again
    return from_s


def test_a_run_without_failures_lost_its_start_alone() -> None:
    effort = Effort()
    effort.begin(100.0)
    assert effort.told(100.0, 105.0) is None, "before the first step nothing is known"
    end_s = train(effort, 1, 20, 110.0)
    assert lost(effort, 100.0, end_s) == {"start": 10.0}


def test_each_part_of_a_failure_is_counted_once() -> None:
    effort = Effort()
    effort.begin(100.0)
    assert train(effort, 1, 35, 110.0) == 145.0  # saved at 30
    effort.failed(148.0)
    effort.ready(152.0)
    end_s = train(effort, 31, 60, 161.0)  # 31 to 35 once more
    parts = {"start": 10.0, "notice": 3.0, "waiting": 4.0, "restart": 9.0, "replay": 5.0}
    assert lost(effort, 100.0, end_s) == parts
    told = effort.told(100.0, end_s)
    assert told is not None and told.effective == pytest.approx(60 / (end_s - 100.0)), "60 steps of a second"


def test_a_failure_within_a_failure() -> None:
    effort = Effort()
    effort.begin(100.0)
    train(effort, 1, 10, 100.0)
    effort.failed(111.0)
    effort.ready(111.0)
    effort.failed(115.0)  # no step was done
    effort.ready(115.0)
    train(effort, 1, 4, 120.0)
    effort.failed(126.0)  # in the midst of what was done before
    effort.ready(126.0)
    end_s = train(effort, 1, 12, 130.0)
    assert lost(effort, 100.0, end_s) == {"notice": 1.0 + 2.0, "restart": 4.0 + 5.0 + 4.0, "replay": 4.0 + 10.0}
    told = effort.told(100.0, end_s)
    assert told is not None and told.effective == pytest.approx(12 / (end_s - 100.0))


def test_what_goes_on_now_counts_too() -> None:
    effort = Effort()
    effort.begin(100.0)
    train(effort, 1, 10, 100.0)
    effort.failed(112.0)
    assert lost(effort, 100.0, 115.0) == {"notice": 2.0, "waiting": 3.0}
    effort.ready(115.0)
    assert lost(effort, 100.0, 120.0) == {"notice": 2.0, "waiting": 3.0, "restart": 5.0}


def test_clocks_that_disagree_give_no_negative_time() -> None:
    effort = Effort()
    effort.begin(100.0)
    train(effort, 1, 3, 90.0)
    effort.failed(80.0)
    effort.ready(79.0)
    train(effort, 1, 5, 60.0)
    assert all(value.expected >= 0 for value in lost(effort, 100.0, 200.0).values())  # type: ignore[attr-defined]


def test_a_run_that_goes_on_from_another_goes_on_with_its_account() -> None:
    first = Effort()
    first.begin(100.0)
    train(first, 1, 20, 110.0)  # saved at 20, and given way at 134
    told = first.told(100.0, 134.0, was_cut=True)
    assert told is not None and (told.start_s, told.notice_s) == (10.0, 4.0)
    numbers = {field.name: getattr(told, field.name) for field in told.DESCRIPTOR.fields}
    second = Effort({"effort": numbers, "ended_s": 134.0, "step": 20, "restarts": 1})
    second.begin(254.0)  # Slurm had it wait for two minutes
    end_s = train(second, 19, 30, 262.0)  # 19 and 20 once more
    parts = {"start": 10.0, "notice": 4.0, "waiting": 120.0, "restart": 8.0, "replay": 2.0}
    assert lost(second, 254.0, end_s) == parts
    told = second.told(254.0, end_s)
    assert told is not None and told.wall_s == pytest.approx(end_s - 100.0)
    assert told.effective == pytest.approx(30 / (end_s - 100.0)), "30 steps of a second"
