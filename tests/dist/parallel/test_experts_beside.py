"""Experts over ranks beside tensor parallelism and in pipelines, against one process."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from tests.dist.parallel import experts_beside as beside
from tests.dist.parallel.test_tensor_states import _equal
from tests.dist.parallel.trainings import difference

if TYPE_CHECKING:
    from tests.dist.rank_pool import RunRanks

TOLERANCE = 1e-5


def axes(ep: int, tp: int = 1, pp: int = 1, cp: int = 1, **more: int | str) -> dict[str, int | str]:
    named = {"expert": ep, "tensor": tp, "pipeline": pp, "context": cp}
    return {f"{axis}_parallel": size for axis, size in named.items() if size > 1} | more


def compare(run_ranks: RunRanks, num_ranks: int, cases: list[tuple[Any, ...]]) -> None:
    names = sorted({case[0] for case in cases})
    alone = dict(zip(names, run_ranks(beside.several, 1, [(name, ({}, 0)) for name in names])[0], strict=True))
    of_ranks = run_ranks(beside.several, num_ranks, cases)
    for number, case in enumerate(cases):
        expected, strategy = alone[case[0]], case[1][0]
        assert all(difference(found[number], expected) < TOLERANCE for found in of_ranks), case
        copies = num_ranks // strategy["expert_parallel"] // strategy.get("pipeline_parallel", 1)
        assert sum(found[number]["held"] for found in of_ranks) == copies * expected["held"], case


RECOMPUTED = {"activation_checkpointing": {"mode": "full"}}


def test_beside_tensor_parallel_ranks(run_ranks: RunRanks) -> None:
    compare(run_ranks, 2, [("qwen2-moe", (axes(2, tp=2), 1))])
    cases: list[tuple[Any, ...]] = [
        ("mixtral", (axes(2, tp=2), 3), RECOMPUTED),
        ("deepseek", (axes(4, tp=2), 2)),
        ("qwen3-moe", (axes(2, tp=2), 0)),
        ("mixtral", (axes(2, tp=4), 1)),
        ("mixtral", (axes(4, tp=2, cp=2), 2)),
    ]
    compare(run_ranks, 4, cases)


def test_in_the_stages_of_a_pipeline(run_ranks: RunRanks) -> None:
    cases: list[tuple[Any, ...]] = [
        ("mixtral", (axes(2, pp=2), 0)),
        ("qwen3-moe", (axes(2, pp=2), 3)),
        ("mixtral", (axes(2, pp=2, tp=2), 2), RECOMPUTED),
        ("mixtral-deep", (axes(2, pp=2, pipeline_schedule="zbv"), 1)),
    ]
    compare(run_ranks, 4, cases)


GRID = [
    (4, axes(2, tp=2)),
    (4, axes(4, tp=2)),
    (4, axes(2, tp=4)),
    (4, axes(2, tp=2, cp=2)),
    (4, axes(2, pp=2)),
    (4, axes(2, pp=2, cp=2)),
    (4, axes(2, pp=2, tp=2)),
    (8, axes(2, pp=2, tp=2)),
    (8, axes(4, pp=2, tp=2)),
    (8, axes(4, tp=2, shard_size=2)),
    (8, axes(2, pp=2, tp=2, cp=2)),
]


@pytest.mark.matrix
@pytest.mark.parametrize(("num_ranks", "strategy"), GRID)
def test_all_models_under_all_stages(run_ranks: RunRanks, num_ranks: int, strategy: dict[str, int | str]) -> None:
    models = ("mixtral", "qwen3-moe", *(() if "context_parallel" in strategy else ("qwen2-moe", "deepseek", "olmoe")))
    models = models if num_ranks < 8 else models[:2]
    stages = (1, 2, 3) if "shard_size" in strategy else (0, 1, 2, 3)
    compare(run_ranks, num_ranks, [(name, (strategy, stage)) for name in models for stage in stages])


@pytest.mark.matrix
def test_schedules_with_several_stages_a_rank(run_ranks: RunRanks) -> None:
    layouts = [(axes(2, pp=2, pipeline_schedule="zbv"), 0)]
    layouts += [(axes(2, pp=2, pipeline_schedule="interleaved"), stage) for stage in range(4)]
    compare(run_ranks, 4, [("mixtral-deep", layout) for layout in layouts])


def test_data_ranks_of_a_pipeline_whose_batches_differ(run_ranks: RunRanks) -> None:
    (alone,) = run_ranks(beside.uneven, 1, None)
    for found in run_ranks(beside.uneven, 4, (axes(2, pp=2), 1)):
        assert difference(found, alone) < TOLERANCE


@pytest.mark.parametrize(("num_ranks", "experts"), [(2, 2), (4, 4)])
def test_distui_moe_is_balanced_by_each_token_once(run_ranks: RunRanks, num_ranks: int, experts: int) -> None:
    (alone,) = run_ranks(beside.mixture, 1, ({}, 0))
    for found in run_ranks(beside.mixture, num_ranks, (axes(experts, tp=2), 2)):
        assert difference(found, alone) < TOLERANCE and found["loads"] == alone["loads"]


WAYS = [
    ((4, (axes(2, tp=2), 3)), [(1, ({}, 0)), (4, (axes(4, tp=2), 1)), (4, (axes(2, pp=2), 2))]),
    ((4, (axes(2, pp=2), 1)), [(1, ({}, 0)), (4, (axes(2, tp=2), 2)), (2, (axes(2), 3))]),
]
"""Ranks and layout of who saves, and of those who load."""


@pytest.mark.parametrize(("before", "others"), WAYS)
def test_checkpoints_go_on_in_another_layout(
    run_ranks: RunRanks, tmp_path: Path, before: tuple[int, beside.Layout], others: list[tuple[int, beside.Layout]]
) -> None:
    saved = run_ranks(beside.saved, before[0], "mixtral", before[1], str(tmp_path))[0]
    states: Any = None
    for num_ranks, layout in others:
        for found in run_ranks(beside.resumed, num_ranks, "mixtral", layout, str(tmp_path)):
            assert _equal(found["saved"], saved["saved"]), layout
            assert difference(found, saved) < TOLERANCE, layout
            if found["states"] is not None:
                states = states or found["states"]
                assert _equal(found["states"], states), layout
    written = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(value, saved["saved"][name]) for name, value in written.items())
