"""Trainings over tensor-parallel ranks against one process: losses, the clipped norm, and the weights of five steps.

Pairs here; the whole grid of models, layouts and stages under `-m matrix`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest

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
