"""Experts over ranks against one process: losses, norms and weights of five clipped steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from tests.dist.parallel import experts
from tests.dist.parallel.trainings import difference

if TYPE_CHECKING:
    from tests.dist.rank_pool import RunRanks

TOLERANCE = 1e-5
MODELS = ("mixtral", "qwen2-moe", "qwen3-moe", "deepseek", "olmoe", "gpt-oss")


def compare(run_ranks: RunRanks, num_ranks: int, cases: list[tuple[Any, ...]]) -> None:
    names = sorted({case[0] for case in cases})
    alone = dict(zip(names, run_ranks(experts.several, 1, [(name, 1, 0) for name in names])[0], strict=True))
    for found in run_ranks(experts.several, num_ranks, cases):
        for case, mine in zip(cases, found, strict=True):
            assert difference(mine, alone[case[0]]) < TOLERANCE, case


def test_two_ranks_that_share_the_experts_equal_one_process(run_ranks: RunRanks) -> None:
    compare(run_ranks, 2, [("mixtral", 2, 0), ("qwen2-moe", 2, 1), ("deepseek", 2, 2), ("gpt-oss", 2, 3)])


def test_two_pairs_equal_one_process(run_ranks: RunRanks) -> None:
    compare(run_ranks, 4, [("qwen3-moe", 2, 0), ("deepseek", 2, 1), ("olmoe", 2, 2), ("mixtral", 2, 3)])


def test_with_context_parallel_ranks(run_ranks: RunRanks) -> None:
    context = {"strategy": {"context_parallel": 2}}
    ring = {"strategy": {"context_parallel": 2, "context_method": "ring"}}
    compare(run_ranks, 4, [("mixtral", 2, 1, context), ("olmoe", 4, 3, context), ("qwen3-moe", 2, 2, ring)])


@pytest.mark.parametrize(("name", "layer", "num_pairs"), [("mixtral", "model.layers.1.mlp.experts", 64), ("mixture", "layers.1.moe", 64)])
def test_the_load_of_each_expert_is_told(run_ranks: RunRanks, name: str, layer: str, num_pairs: int) -> None:
    first, second = run_ranks(experts.loads, 2, name, 2)
    assert first == second and first["skipped"] == []
    load = first["load"][layer]
    assert len(first["load"]) == 2 and len(load) == 4 and sum(load) == num_pairs
    uneven = max(max(of_layer) * 4 / num_pairs for of_layer in first["load"].values())
    assert first["told"] == [(1, {"experts.max_over_mean": uneven})]


@pytest.mark.matrix
@pytest.mark.parametrize(("num_ranks", "num_experts"), [(2, 2), (4, 2), (4, 4)])
def test_all_models_under_all_stages(run_ranks: RunRanks, num_ranks: int, num_experts: int) -> None:
    compare(run_ranks, num_ranks, [(name, num_experts, stage) for name in MODELS for stage in range(4)])


KINDS: list[tuple[str, str, int, dict[str, Any], float]] = [
    ("bf16", "mixtral", 2, {"precision": {"dtype": "bf16"}}, 3e-2),
    ("fp16", "mixtral", 3, {"precision": {"dtype": "fp16", "initial_loss_scale": 256.0}}, 1e-2),
    ("recomputed", "deepseek", 3, {"activation_checkpointing": {"mode": "full"}}, 1e-5),
    ("offloaded", "olmoe", 3, {"offload": {"optimizer": "cpu", "params": "cpu"}}, 1e-5),
    ("accumulated", "mixtral", 3, {"batch": {"accumulation": 2}}, 1e-5),
    ("recomputed", "qwen2-moe", 1, {"activation_checkpointing": {"mode": "selective"}}, 1e-5),
    ("offloaded", "olmoe", 2, {"offload": {"optimizer": "cpu"}}, 1e-5),
    ("accumulated", "mixtral", 0, {"batch": {"accumulation": 2}}, 1e-5),
]


def test_formats_recomputation_and_homes_go_with_it(run_ranks: RunRanks) -> None:
    _compare_kinds(run_ranks, 2, KINDS[:5])


def _compare_kinds(run_ranks: RunRanks, num_ranks: int, kinds: list[tuple[str, str, int, dict[str, Any], float]]) -> None:
    cases = [(name, 2, stage, sections) for _, name, stage, sections, _ in kinds]
    alone_in = [(name, 1, 0, sections if kind == "accumulated" else {}) for kind, name, _, sections, _ in kinds]
    alone = run_ranks(experts.several, 1, alone_in)[0]
    for found in run_ranks(experts.several, num_ranks, cases):
        for (kind, *_, tolerance), mine, expected in zip(kinds, found, alone, strict=True):
            assert mine["losses"] == pytest.approx(expected["losses"], abs=tolerance), kind
            assert mine["norms"] == pytest.approx(expected["norms"], rel=max(tolerance, 2e-5)), kind


@pytest.mark.matrix
def test_formats_recomputation_and_homes_on_two_pairs(run_ranks: RunRanks) -> None:
    _compare_kinds(run_ranks, 4, KINDS)


SKEWED = ("skewed", "skewed-frozen-experts", "skewed-experts-only", "skewed-frozen-up")


def _compare_skewed(run_ranks: RunRanks, num_ranks: int, cases: list[tuple[Any, ...]]) -> None:
    names = sorted({case[0] for case in cases})
    alone = dict(zip(names, run_ranks(experts.skewed, 1, [(name, 1, 0, {}) for name in names])[0], strict=True))
    for found in run_ranks(experts.skewed, num_ranks, cases):
        for case, mine in zip(cases, found, strict=True):
            assert difference(mine, alone[case[0]]) < TOLERANCE, case


RECOMPUTED = {"activation_checkpointing": {"mode": "full"}}


def test_a_rank_whose_experts_get_no_token(run_ranks: RunRanks) -> None:
    stages = zip(SKEWED, (3, 0, 1, 2), strict=True)
    cases: list[tuple[Any, ...]] = [(name, 2, stage, {}) for name, stage in stages]
    _compare_skewed(run_ranks, 4, [*cases, (SKEWED[0], 2, 2, {}), (SKEWED[0], 2, 3, RECOMPUTED)])


@pytest.mark.matrix
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_idle_experts_under_all_stages(run_ranks: RunRanks, num_ranks: int) -> None:
    cases: list[tuple[Any, ...]] = [(name, 2, stage, {}) for name in SKEWED for stage in range(4)]
    cases += [(SKEWED[0], num_ranks, stage, RECOMPUTED) for stage in (1, 3)]
    _compare_skewed(run_ranks, num_ranks, cases)


def test_losses_of_routers_are_those_of_data_parallel_ranks(run_ranks: RunRanks) -> None:
    plain = run_ranks(experts.with_losses_of_routers, 2, 1, 0)[0]
    for found in run_ranks(experts.with_losses_of_routers, 2, 2, 1):
        assert difference(found, plain) < TOLERANCE


def test_mixtures_of_ours_with_their_balancing_under_every_engine(run_ranks: RunRanks) -> None:
    accumulated = {"batch": {"accumulation": 2}}
    (alone, accumulating) = run_ranks(experts.mixtures, 1, [("mixture", 1, 0, {}), ("mixture", 1, 0, accumulated)])[0]
    cases: list[tuple[Any, ...]] = [
        ("mixture", 2, 0, RECOMPUTED),
        ("mixture", 2, 3, RECOMPUTED),
        ("mixture", 1, 2, {}),
        ("mixture", 1, 0, {"strategy": {"backend": "ddp"}}),
        ("mixture", 1, 3, {"strategy": {"backend": "fsdp2"}}),
        ("mixture", 2, 1, accumulated),
    ]
    assert any(name.endswith("bias") and value.abs().max() > 0 for name, value in alone["weights"].items())
    for found in run_ranks(experts.mixtures, 2, cases):
        for case, mine in zip(cases, found, strict=True):
            expected = accumulating if case[3] is accumulated else alone
            assert difference(mine, expected) < TOLERANCE, case
            assert mine["loads"] == expected["loads"], case


def test_a_capacity_counts_a_ranks_own_tokens_wherever_the_experts_are(run_ranks: RunRanks) -> None:
    plain = run_ranks(experts.mixtures, 2, [("mixture-capacity", 1, 0, {})])[0][0]
    for found in run_ranks(experts.mixtures, 2, [("mixture-capacity", 2, 1, {}), ("mixture-capacity", 2, 3, {})]):
        assert all(difference(mine, plain) < TOLERANCE for mine in found)
