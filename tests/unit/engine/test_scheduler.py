"""Schedules count real optimizer steps."""

from __future__ import annotations

import torch

from distui.core.engine.scheduler import PreparedScheduler


class _Step:
    """What the engine would say of the current step."""

    was_real = True
    syncs = True


def _optimizer() -> torch.optim.SGD:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=8.0)


def _prepare(scheduler: object, step: _Step) -> PreparedScheduler:
    return PreparedScheduler(scheduler, did_step=lambda: step.was_real, sync_gradients=lambda: step.syncs)


def test_it_steps_once_an_optimizer_step_and_not_otherwise() -> None:
    optimizer, step = _optimizer(), _Step()
    halving = _prepare(torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5), step)
    for step.syncs, step.was_real in ((False, True), (True, False), (True, True)):
        if step.syncs and step.was_real:
            optimizer.step()
        halving.step()
    assert halving.get_last_lr() == [4.0] == [group["lr"] for group in optimizer.param_groups]
    assert halving.gamma == 0.5, "attributes are the scheduler's"


def test_a_metric_reaches_reduce_on_plateau_and_the_state_travels() -> None:
    optimizer, step = _optimizer(), _Step()
    plateau = _prepare(torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5), step)
    for metric in (1.0, 2.0, 2.0):
        plateau.step(metric)
    assert optimizer.param_groups[0]["lr"] == 2.0
    other = _prepare(torch.optim.lr_scheduler.ReduceLROnPlateau(_optimizer(), patience=0), step)
    other.load_state_dict(plateau.state_dict())
    assert other.scheduler.best == 1.0
