"""Recipes with more than a model, an optimizer and a loss: two models, and buffers that training writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import distui
from distui.core.sharding.units import partition

if TYPE_CHECKING:
    from tests.dist.rank_pool import RunRanks

NUM_STEPS = 4


def _seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build()


def _mine(rows: torch.Tensor) -> torch.Tensor:
    return rows.chunk(dist.get_world_size())[dist.get_rank()]


def _engine(stage: int) -> distui.Engine:
    partition.SMALL_UNIT_NUMEL = 1  # a unit a block
    return distui.Engine(strategy={"zero_stage": stage})


def _generator() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), *(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(2)))


def _critic() -> nn.Module:
    return nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(2)), nn.Linear(16, 1))


def _adversarial(
    models: tuple[nn.Module, nn.Module],
    optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer],
    backward: Callable[[torch.Tensor], None],
    rows: Callable[[torch.Tensor], torch.Tensor],
    freeze: bool,
) -> list[float]:
    generator, critic = models
    losses = []
    for step in range(NUM_STEPS):
        source = torch.Generator().manual_seed(step)
        noise, real = torch.randn(8, 6, generator=source), torch.randn(8, 16, generator=source)
        # Two forwards of the critic before its backward.
        fake = generator(rows(noise))
        loss = critic(fake.detach()).square().mean() + (1 - critic(rows(real))).square().mean()
        backward(loss)
        optimizers[1].step()
        optimizers[1].zero_grad()
        losses.append(loss.item())
        # The generator learns through the critic, whose own gradients are dropped or not computed.
        critic.requires_grad_(not freeze)
        loss = (1 - critic(fake)).square().mean()
        backward(loss)
        optimizers[0].step()
        optimizers[0].zero_grad()
        optimizers[1].zero_grad()
        critic.requires_grad_(True)
        losses.append(loss.item())
    return losses


def _two_models(stage: int) -> None:
    def build() -> tuple[tuple[nn.Module, nn.Module], Any]:
        models = (_seeded(_generator), _seeded(_critic, 1))
        return models, tuple(torch.optim.AdamW(model.parameters(), lr=0.01) for model in models)

    for freeze in (False, True):
        models, optimizers = build()
        losses = _adversarial(models, optimizers, lambda loss: loss.backward(), lambda rows: rows, freeze)
        expected = [dict(model.state_dict()) for model in models]
        engine = _engine(stage)
        models, optimizers = build()
        *prepared, first, second = engine.prepare(*models, *optimizers)
        found = _adversarial((prepared[0], prepared[1]), (first, second), engine.backward, _mine, freeze)
        found = engine.reduce(torch.tensor(found), "mean").tolist()
        torch.testing.assert_close(found, losses, atol=1e-5, rtol=1e-5)
        states = [engine.get_state_dict(model) for model in models]
        torch.testing.assert_close(states, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_models_and_two_optimizers(run_ranks: RunRanks, stage: int) -> None:
    run_ranks(_two_models, 2, stage)


def _batch_norm(stage: int) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 1))

    def train(model: nn.Module, optimizer: Any, backward: Callable[[torch.Tensor], None]) -> None:
        for step in range(NUM_STEPS):
            # The same rows on every rank, so that a rank's statistics are those of one process.
            backward(model(torch.randn(8, 6, generator=torch.Generator().manual_seed(step))).square().mean())
            optimizer.step()
            optimizer.zero_grad()

    def start(seed: int) -> nn.Module:
        model: Any = _seeded(build, seed)
        model[1].running_mean.fill_(seed + 1.0)
        return model

    plain = start(0)
    train(plain, torch.optim.SGD(plain.parameters(), lr=0.1), lambda loss: loss.backward())
    engine = _engine(stage)
    model = start(dist.get_rank())
    model, optimizer = engine.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    train(model, optimizer, engine.backward)
    torch.testing.assert_close(engine.get_state_dict(model), dict(plain.state_dict()), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_batch_norm_starts_from_the_buffers_of_rank_0(run_ranks: RunRanks, stage: int) -> None:
    run_ranks(_batch_norm, 2, stage)
