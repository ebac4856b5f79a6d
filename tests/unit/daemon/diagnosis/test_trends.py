"""Losses that jump, memory that grows, data that all wait for: told when they are there, and only then."""

from __future__ import annotations

import math
import random
import re
from pathlib import Path

import pytest

from distui.core.paths import RunFolder
from distui.daemon.diagnosis.drifts import bad_loss, data_bound, loss_rise, loss_spike, memory_growth
from distui.daemon.diagnosis.observe import RUNNING, Observed
from distui.daemon.diagnosis.trends import JUMP_STEPS, NEW_LEVEL_STEPS, Lasting, LossTrend, MemoryTrend
from distui.daemon.runs.state import RunState
from distui.proto import telemetry_pb2 as pb

NOW = 1.8e9


def _fed(losses: list[float], trend: LossTrend | None = None, first: int = 1) -> LossTrend:
    trend = trend or LossTrend()
    for step, loss in enumerate(losses, first):
        trend.add(step, loss, NOW + step)
    return trend


def _falling(num_steps: int, seed: int = 0) -> list[float]:
    draws = random.Random(seed)
    return [8.0 * math.exp(-step / 300) + 2.0 + draws.gauss(0, 0.1) for step in range(num_steps)]


def test_a_loss_that_stays_up_has_jumped_and_is_over_when_it_is_back() -> None:
    trend = _fed([*_falling(400), *[9.0] * (JUMP_STEPS - 1)])
    assert trend.jump is None, "a hard batch or two"
    trend.add(404, 9.5, NOW + 404)
    assert trend.jump is not None and trend.jump.step == 401 and trend.jump.now == 9.5
    assert trend.jump.usual == pytest.approx(4.3, abs=0.4) and trend.jump.since_s == NOW + 401
    _fed([4.2] * 4, trend, 405)
    assert trend.jump is not None
    _fed([4.2], trend, 409)
    assert trend.jump is None


def test_a_new_level_is_the_usual_one_after_a_while() -> None:
    trend = _fed([*_falling(400), *[9.0] * (NEW_LEVEL_STEPS + 1)])
    assert trend.jump is None
    assert _fed([9.1] * 50, trend, 700).jump is None
    assert _fed([30.0] * 6, trend, 800).jump is not None


def test_a_second_training_is_not_held_against_the_first() -> None:
    trend = _fed(_falling(400))
    assert _fed([9.0] * 50, trend, first=1).jump is None


def test_fast_steps_leave_a_jump_in_sight_for_a_while() -> None:
    trend = LossTrend()
    for step in range(1, 4000):  # 10 ms each
        trend.add(step, 1.0 if step < 100 else 7.0, NOW + step / 100)
    assert trend.jump is not None and trend.jump.step == 100


@pytest.mark.parametrize("seed", range(4))
def test_noise_is_no_jump(seed: int) -> None:
    draws = random.Random(seed)
    for make in (
        lambda step: draws.lognormvariate(0, 1),  # single samples
        lambda step: draws.lognormvariate(0, 1) * 1e-4,  # converged
        lambda step: abs(draws.gauss(0, 1)),
        lambda step: draws.gauss(-5, 2),  # a likelihood
        lambda step: 3.0 + 2.0 * math.sin(step / 15) + draws.gauss(0, 0.1),  # two datasets by turns
        lambda step: 2.0,
        lambda step: 0.0,
        lambda step: 0.0 if step < 100 else 0.5 + draws.gauss(0, 0.05),  # a replay buffer that fills first
        lambda step: max(0.0, draws.gauss(-0.05, 0.03)),  # a hinge
        lambda step: 8.0 if step % 7 in (3, 5) else 1.0 + draws.gauss(0, 0.1),  # unequal batches
    ):
        trend = LossTrend()
        for step in range(3000):
            trend.add(step, make(step), NOW + step)
            assert trend.jump is None, step


def test_a_height_that_comes_again_is_told_once() -> None:
    trend, told = LossTrend(), set()
    for step in range(2000):  # short sentences, then long ones
        trend.add(step, 1.0 + 2.0 * (step // 10 % 3 == 2), NOW + step)
        told |= {trend.jump.step} if trend.jump else set()
    assert len(told) == 1
    _fed([9.0] * JUMP_STEPS, trend, 2000)
    assert trend.jump is not None, "a greater one is news"


def _restarts(peak: float) -> LossTrend:
    """Return the trend of a cosine that has just begun again, after 300 steps, and lifted the loss to `peak`."""
    trend = LossTrend()
    for step, loss in enumerate(_falling(300), 1):
        trend.add(step, loss, NOW + step, 1e-3 * (1 + math.cos(math.pi * step / 300)) / 2)
    for step in range(301, 310):
        trend.add(step, peak, NOW + step, 1e-3)
    return trend


def test_a_raised_learning_rate_explains_a_rise_to_what_it_began_with() -> None:
    restarted = _restarts(9.6).jump
    assert restarted is not None and restarted.rates == (pytest.approx(0.0, abs=1e-9), 1e-3)
    diverged = _restarts(30.0).jump
    assert diverged is not None and diverged.rates is None, "above all that it began with"
    trend = LossTrend()
    for step, loss in enumerate([*_falling(300), *[9.6] * 9], 1):
        trend.add(step, loss, NOW + step, 1e-3 * 0.998**step)
    assert trend.jump is not None and trend.jump.rates is None, "no rate was raised"


def _grown(held: list[float], gap_s: float = 2.0) -> float:
    trend = MemoryTrend()
    for at, gib in enumerate(held):
        trend.add(at * gap_s, int(gib * 2**30))
    return trend.bytes_per_s


def test_only_what_grows_all_the_time_grows() -> None:
    draws = random.Random(1)
    leak = [1.0 + 0.01 * at + draws.gauss(0, 0.005) for at in range(200)]
    assert _grown(leak) == pytest.approx(0.005 * 2**30, rel=0.05)
    assert _grown(leak[:10]) == 0.0, "too short to tell"
    assert _grown([1.0 + 0.5 * (1 - math.exp(-at / 20)) for at in range(200)]) == 0.0, "a cache that fills"
    assert _grown([1.0 + 0.3 * (at % 20) / 20 for at in range(200)]) == 0.0, "garbage that is collected"
    assert _grown([1.0] * 100 + [3.0] * 60) == 0.0, "an evaluation's buffers"
    assert _grown([4.0 + draws.gauss(0, 0.05) for _ in range(200)]) == 0.0


def test_a_leak_that_begins_late_is_seen() -> None:
    assert _grown([2.0] * 400 + [2.0 + 0.02 * at for at in range(400)]) == pytest.approx(0.01 * 2**30, rel=0.05)


def test_a_share_lasts_until_it_is_low() -> None:
    lasting = Lasting(begin=0.25, end=0.15)
    assert [lasting.look(share, at) for at, share in enumerate([0.2, 0.3, 0.2, 0.16, 0.1, 0.2])] == [0, 0, 1, 2, 0, 0]


# ---- verdicts ------------------------------------------------------------------------------------------------------


class _Run:
    def __init__(self, folder: Path, world: int) -> None:
        run = RunFolder(folder / "train-1")
        run.create()
        self.state, self.world, self.seqs = RunState(run), world, dict.fromkeys(range(world), 0)
        self.state.info.world_size = world
        self.now_s = NOW

    def tell(self, rank: int, **body: object) -> None:
        self.seqs[rank] += 1
        source = pb.Source(rank=rank, node="elsewhere", pid=10 + rank, incarnation=1)
        record = pb.Record(seq=self.seqs[rank], time_s=self.now_s, **body)  # type: ignore[arg-type]
        self.state.apply(pb.Batch(source=source, records=[record]), self.now_s)

    def step(self, number: int, losses: list[float], data_s: list[float]) -> None:
        self.now_s += 0.5
        for rank in range(self.world):
            self.tell(rank, step=pb.Step(step=number, step_s=0.5, loss=losses[rank], data_wait_s=data_s[rank]))

    def observed(self) -> list[Observed]:
        return [Observed(rank, "elsewhere", 10 + rank, RUNNING) for rank in range(self.world)]


@pytest.fixture
def job(tmp_path: Path) -> _Run:
    return _Run(tmp_path, 3)


def test_a_nan_is_blamed_on_where_it_began(job: _Run) -> None:
    job.step(1, [1.0, 1.0, 1.0], [0.0] * 3)
    job.step(2, [1.0, math.nan, 1.0], [0.0] * 3)
    (found,) = bad_loss(job.state, job.now_s)
    assert list(found.ranks) == [1] and "rank 1 is nan since step 2; stop" in found.message
    job.step(3, [math.nan] * 3, [0.0] * 3)
    (found,) = bad_loss(job.state, job.now_s)
    assert list(found.ranks) == [1]
    assert "rank 1 is nan since step 2; ranks 0, 2 followed at step 3" in found.message
    assert "the batch of step 2 on rank 1" in found.message


def test_where_a_nan_began_is_waited_for(job: _Run) -> None:
    job.step(1, [1.0, 1.0, 1.0], [0.0] * 3)
    job.now_s += 0.5
    job.tell(0, step=pb.Step(step=3, step_s=0.5, loss=math.nan))  # rank 1 tells of its step 2 a little later
    assert not bad_loss(job.state, job.now_s + 0.2)
    (found,) = bad_loss(job.state, job.now_s + 2.0)
    assert list(found.ranks) == [0]
    job.tell(1, step=pb.Step(step=2, step_s=0.5, loss=math.nan))
    job.tell(2, step=pb.Step(step=3, step_s=0.5, loss=math.nan))
    job.tell(1, step=pb.Step(step=3, step_s=0.5, loss=math.nan))
    (found,) = bad_loss(job.state, job.now_s + 0.2)
    assert list(found.ranks) == [1]


def test_a_jump_is_told_with_its_step_and_ranks(job: _Run) -> None:
    for step, loss in enumerate(_falling(300), 1):
        job.step(step, [loss, loss + 0.1, loss], [0.0] * 3)
    assert not loss_spike(job.state, job.now_s)
    for step in range(301, 306):
        job.step(step, [4.9, 20.0, 4.9], [0.0] * 3)
    (found,) = loss_spike(job.state, job.now_s)
    assert list(found.ranks) == [1] and "rank 1 jumped at step 301" in found.message and "to 20" in found.message
    assert found.since_s == pytest.approx(2.0)


def test_a_rise_with_the_learning_rate_is_no_verdict(job: _Run) -> None:
    for step, loss in enumerate([*_falling(300), *[9.6] * 9], 1):
        job.now_s += 0.5
        rate = 1e-3 if step > 295 else 1e-5
        for rank in range(3):
            job.tell(rank, step=pb.Step(step=step, step_s=0.5, loss=loss, learning_rate=rate))
    assert not loss_spike(job.state, job.now_s)
    step, words = loss_rise(job.state)
    assert step == 301 and "the loss of all ranks rose at step 301" in words and "from 1e-05 to 0.001" in words


def test_whose_loss_jumped_is_told_once_all_have_come_so_far(job: _Run) -> None:
    for step in range(1, 60):
        job.step(step, [1.0] * 3, [0.0] * 3)
    for step in range(60, 60 + JUMP_STEPS):
        job.now_s += 0.01
        job.tell(0, step=pb.Step(step=step, step_s=0.01, loss=5.0))
    assert not loss_spike(job.state, job.now_s + 0.1)
    (found,) = loss_spike(job.state, job.now_s + 2.0)
    assert list(found.ranks) == [0]
    for step in range(60, 60 + JUMP_STEPS):
        for rank in (1, 2):
            job.tell(rank, step=pb.Step(step=step, step_s=0.01, loss=5.0))
    (found,) = loss_spike(job.state, job.now_s + 0.1)
    assert list(found.ranks) == [0, 1, 2]


def test_data_that_all_wait_for_is_told_after_a_while_with_its_share(job: _Run) -> None:
    told = []
    for step in range(1, 60):
        job.step(step, [1.0] * 3, [0.2, 0.25, 0.22])
        told.append(bool(data_bound(job.state, job.observed(), job.now_s)))
    assert told.index(True) == pytest.approx(40, abs=2), "20 steps, then 10 s"
    (found,) = data_bound(job.state, job.observed(), job.now_s)
    assert "all ranks wait for data 45% of each step (223 of 500 ms)" in found.message
    for step in range(60, 90):
        job.step(step, [1.0] * 3, [0.2, 0.05, 0.22])  # one rank has its data: the others do not wait for theirs
    assert not data_bound(job.state, job.observed(), job.now_s)


def test_memory_is_told_with_the_time_that_is_left(job: _Run) -> None:
    total = 16 << 30
    hardware = pb.HardwareSample(memory_total_bytes=total, memory_used_bytes=total - (4 << 30))
    job.state.nodes["elsewhere"] = pb.NodeState(node="elsewhere", hardware=hardware)
    for step in range(1, 241):
        job.step(step, [1.0] * 3, [0.0] * 3)
        for rank in range(3):
            job.tell(rank, memory=pb.Memory(rss_bytes=(2 << 30) + (step << 23) * (rank == 2)))
    (found,) = memory_growth(job.state, job.observed())
    assert list(found.ranks) == [2] and re.search(r"grows all the time, by 1[5-7]\.\d MiB/s", found.message)
    assert "4.00 GiB are left on the host, for about 4 min" in found.message
    job.state.nodes["elsewhere"].hardware.memory_total_bytes = total + (400 << 30)
    assert not memory_growth(job.state, job.observed()), "there is enough for hours"
