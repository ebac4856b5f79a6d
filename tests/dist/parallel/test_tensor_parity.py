"""Trainings over tensor-parallel ranks against one process: losses, the clipped norm, and the weights of five steps.

Pairs here; the whole grid of models, layouts and stages under `-m matrix`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import distui
from tests.dist.parallel.trainings import difference, train


@functools.cache
def _alone(name: str) -> dict[str, Any]:
    return train(name, 1, 0)


def _check(run_ranks: Callable[..., Any], name: str, tensor: int, world: int, stage: int) -> None:
    for found in run_ranks(train, world, name, tensor, stage):
        assert difference(found, _alone(name)) < 1e-5


PAIRS = [
    ("llama", 2, 2, 0),
    ("llama-tied", 2, 4, 3),
    ("gpt2", 2, 2, 1),
    ("qwen3", 2, 2, 2),
    ("encoder", 2, 4, 2),
    ("awkward", 2, 4, 0),
    ("awkward", 2, 2, 3),
]


@pytest.mark.parametrize(("name", "tensor", "world", "stage"), PAIRS)
def test_training_equals_one_process(
    run_ranks: Callable[..., Any], name: str, tensor: int, world: int, stage: int
) -> None:
    _check(run_ranks, name, tensor, world, stage)


def _penalised(tensor: int) -> dict[str, torch.Tensor]:
    """Return weights of three steps whose loss has the slope by the input and the gradients by two weights in it."""
    engine = distui.Engine(strategy={"tensor_parallel": tensor, "zero_stage": 3})
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    plan = {"1": "colwise", "3": "rowwise"}
    model, optimizer = engine.prepare(net, torch.optim.SGD(net.parameters(), lr=0.2), plan=plan if tensor > 1 else None)
    for _ in range(3):
        x = torch.linspace(-1, 1, 24).view(4, 6).requires_grad_(True)
        loss = model(x).square().mean()
        grads = torch.autograd.grad(loss, [x, model[0].weight, model[5].weight], create_graph=True)
        engine.backward(loss + sum((grad.norm() - 1).square() for grad in grads))
        optimizer.step()
        optimizer.zero_grad()
    found: dict[str, torch.Tensor] = engine.get_state_dict(model)
    engine.free_memory()
    return found


def test_second_derivatives_go_through_the_sums(run_ranks: Callable[..., Any]) -> None:
    for found in run_ranks(_penalised, 2, 2):
        torch.testing.assert_close(found, _penalised(1), atol=1e-5, rtol=1e-5)


GRID = [
    (name, tensor, world, stage)
    for name in ("llama", "llama-tied", "gpt2", "qwen3", "qwen3-moe", "encoder", "awkward", "bert", "opt", "t5")
    for tensor, world in ((2, 2), (2, 4), (4, 4))
    for stage in range(4)
    if not (name == "awkward" and tensor == 4)  # it has two heads
]


@pytest.mark.matrix
@pytest.mark.parametrize(("name", "tensor", "world", "stage"), GRID)
def test_training_equals_one_process_on_the_whole_grid(
    run_ranks: Callable[..., Any], name: str, tensor: int, world: int, stage: int
) -> None:
    _check(run_ranks, name, tensor, world, stage)
