"""What the usual step takes, from which it follows how long ranks may wait."""

from __future__ import annotations

import pytest

from distui.daemon.runs.step_summaries import StepSummaries
from distui.proto import telemetry_pb2 as pb


@pytest.mark.parametrize(
    ("times_s", "told_s"),
    [
        ([], 0.0),
        ([30.0], 30.0),
        ([30.0] + [0.1] * 10, 30.0),
        ([30.0] + [0.1] * 40, 0.1),  # the first compiles: a hang after it is told as soon as any
        ([0.1] * 40 + [30.0, 30.0], 30.0),
        ([0.1] * 396 + [9.0, 8.0, 7.0, 6.0, 5.0], 5.0),
    ],
)
def test_how_long_a_step_may_take(times_s: list[float], told_s: float) -> None:
    steps = StepSummaries()
    for number, step_s in enumerate(times_s, 1):
        steps.add(0, float(number), pb.Step(step=number, step_s=step_s), 1, {})
    assert steps.p99_s() == pytest.approx(told_s)
