"""Jobs whose ranks have different parts in each step, and ranks that are slow among those that have the same."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from situations.job import Job, healthy, sick

LONG_S, SHORT_S = 0.15, 0.03


def _train(job: Job, cycle: Callable[[], None], *learners: int) -> None:
    """Go through `cycle` for ever; only learners tell of steps."""
    began = time.perf_counter()
    while True:
        cycle()
        now = time.perf_counter()
        job.step += 1
        if job.rank in learners:
            job.source.step(step=job.step, step_s=now - began, loss=1.0)
        began = now


def _gather_and_broadcast(job: Job, learner_s: float, actor_s: Callable[[], float]) -> Callable[[], None]:
    """Actors roll out, the learner takes it, trains, and gives its weights away."""
    rollout, weights = torch.ones(256), torch.ones(1 << 14)
    parts = [torch.empty(256) for _ in range(job.world)] if job.rank == 0 else None

    def cycle() -> None:
        if job.rank:
            time.sleep(actor_s())
        dist.gather(rollout, parts, dst=0)
        if job.rank == 0:
            time.sleep(learner_s)
        dist.broadcast(weights, src=0)

    return cycle


@healthy(for_s=25.0)
def learner_that_actors_wait_for(job: Job) -> None:
    _train(job, _gather_and_broadcast(job, LONG_S, lambda: SHORT_S / 10), 0)


@healthy(for_s=25.0, world=2)
def actor_that_a_learner_waits_for(job: Job) -> None:
    found: list[Any] = [None, None]

    def cycle() -> None:
        if job.rank:
            time.sleep(LONG_S)
        dist.all_gather_object(found, {"rewards": [1.0] * 64})
        if job.rank == 0:
            time.sleep(SHORT_S)
        dist.broadcast_object_list([b"weights"], src=0)

    _train(job, cycle, 0)


@healthy(for_s=25.0)
def turns_between_barriers(job: Job) -> None:
    """What they exchange goes by files: only barriers are seen."""

    def cycle() -> None:
        time.sleep(0.0 if job.rank == 0 else SHORT_S)
        dist.barrier()
        time.sleep(LONG_S if job.rank == 0 else 0.0)
        dist.barrier()

    _train(job, cycle, 0)


@healthy(for_s=25.0)
def weights_made_meanwhile(job: Job) -> None:
    """The learner trains on what was rolled out before, while the actors roll out: it never waits."""
    sums, weights = torch.ones(2), torch.ones(1 << 14)

    def cycle() -> None:
        time.sleep(LONG_S if job.rank == 0 else SHORT_S)
        dist.all_reduce(sums)
        dist.broadcast(weights, src=0)

    _train(job, cycle, 0)


@healthy(for_s=25.0)
def stages_of_a_pipeline(job: Job) -> None:
    """Each stage waits for the one before and, backwards, for the one behind; the first is done last."""
    activations, norm = torch.ones(1 << 10), torch.ones(1)

    def cycle() -> None:
        if job.rank:
            dist.recv(activations, job.rank - 1)
        time.sleep(0.02)
        if job.rank < job.world - 1:
            dist.send(activations, job.rank + 1)
            dist.recv(activations, job.rank + 1)
        time.sleep(0.04)
        if job.rank:
            dist.send(activations, job.rank - 1)
        dist.all_reduce(norm)

    _train(job, cycle, *range(job.world))


@healthy(for_s=30.0)
def evaluation_of_one_each_20_steps(job: Job) -> None:
    def cycle() -> None:
        time.sleep(SHORT_S)
        dist.all_reduce(job.tensor)
        if job.rank == 0 and job.step % 20 == 0:
            job.source.phase("evaluation")
            time.sleep(2.0)
            job.source.phase("idle")

    _train(job, cycle, *range(job.world))


@sick("straggler", 2, within_s=20.0, world=4)
def slow_actor(job: Job) -> None:
    _train(job, _gather_and_broadcast(job, SHORT_S, lambda: LONG_S if job.rank == 2 else SHORT_S), 0)


@sick("straggler", 0, within_s=20.0)
def slow_source_of_buffers(job: Job) -> None:
    """As DDP with batch norm: rank 0 gives its buffers away before each forward, and its data is slow."""
    gradients, buffers = torch.ones(1 << 12), torch.ones(64)

    def cycle() -> None:
        time.sleep(SHORT_S if job.rank == 0 else 0.0)
        dist.broadcast(buffers, src=0)
        time.sleep(LONG_S)
        dist.all_reduce(gradients)

    _train(job, cycle, *range(job.world))


@sick("straggler", 1, within_s=20.0, world=4)
def slow_in_two_groups(job: Job) -> None:
    """Rank 0 shares each layer with the slow one, so it is late among those that hold the same part, and not slow."""
    pairs = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    copies = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])]
    layer, gradients = torch.ones(1 << 8), torch.ones(1 << 12)

    def cycle() -> None:
        for _ in range(4):
            time.sleep(SHORT_S * (1.5 if job.is_culprit else 1.0))
            dist.all_reduce(layer, group=pairs[job.rank // 2])
        dist.all_reduce(gradients, group=copies[job.rank % 2])

    _train(job, cycle, *range(job.world))
