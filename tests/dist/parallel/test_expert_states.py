"""Experts over ranks: checkpoints that any other layout loads, whole states, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.dist.parallel import expert_uses, experts, trainings
from tests.dist.parallel.test_tensor_states import _equal
from tests.dist.parallel.trainings import difference

from distui.core.checkpoint.weights import read_weights

if TYPE_CHECKING:
    from tests.dist.rank_pool import RunRanks

Layout = tuple[int, tuple[int, int]]
"""Ranks, and of them those that share the experts, with the ZeRO stage."""

WAYS: list[tuple[str, Layout, list[Layout]]] = [
    ("gpt-oss", (2, (2, 0)), [(1, (1, 0)), (4, (2, 3))]),
    ("deepseek", (4, (2, 3)), [(4, (4, 1)), (2, (1, 2))]),
]


@pytest.mark.parametrize(("name", "before", "others"), WAYS)
def test_a_checkpoint_is_loaded_by_other_layouts_bit_for_bit(
    run_ranks: RunRanks, tmp_path: Path, name: str, before: Layout, others: list[Layout]
) -> None:
    folder = tmp_path / "saved"
    saved = run_ranks(expert_uses.saved, before[0], name, before[1], str(folder))
    assert all(_equal(found, saved[0]) for found in saved[1:])
    for num_ranks, layout in others:
        for found in run_ranks(expert_uses.loaded, num_ranks, name, layout, str(folder)):
            assert _equal(found, saved[0])
    whole = {key.removeprefix("weights."): value for key, value in saved[0].items() if key.startswith("weights.")}
    consolidated = read_weights(folder, tied=True)["model0"]
    assert consolidated.keys() == whole.keys()
    assert all(torch.equal(value, whole[key]) for key, value in consolidated.items())
    written = load_file(tmp_path / "saved-model" / "model.safetensors")
    assert all(torch.equal(value, whole[key]) for key, value in written.items())


GRID: list[Layout] = [(ranks, (num, stage)) for ranks, num in ((2, 2), (4, 2), (4, 4), (2, 1)) for stage in range(4)]


@pytest.mark.matrix
@pytest.mark.parametrize("number", range(len(GRID)))
def test_every_layout_is_loaded_by_others(run_ranks: RunRanks, tmp_path: Path, number: int) -> None:
    ranks, layout = GRID[number]
    saved = run_ranks(expert_uses.saved, ranks, "mixtral", layout, str(tmp_path / "saved"))[0]
    for step in (1, 6, 11):  # so that over all of them every kind meets every other
        ranks, layout = GRID[(number + step) % len(GRID)]
        assert _equal(run_ranks(expert_uses.loaded, ranks, "mixtral", layout, str(tmp_path / "saved"))[0], saved), layout


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.matrix), 3])
def test_whole_gradients_weights_and_refusals(run_ranks: RunRanks, tmp_path: Path, stage: int) -> None:
    expected = expert_uses.gradients()
    for rank, found in enumerate(run_ranks(expert_uses.features, 4, str(tmp_path / "weights"), stage)):
        for name, grad in expected.items():
            torch.testing.assert_close(found["gradients"][name], grad, rtol=1e-4, atol=2e-6)
        assert found["doubled"] and found["weights"]
        assert found["shapes"] == [(4, 16, 16)]
        assert found["data"] == (4, rank)
        assert found["state_dict"] == "state_dict of a model that is cut over 2 expert-parallel ranks"
        assert found["full"] == "full_parameters of a model that is cut over ranks"
        assert found["shape"].startswith(f"{expert_uses.EXPERTS} is [3, 3] in the state and [8, 16, 16]")


WRONG = {
    "llama": "expert_parallel=2, and LlamaForCausalLM has no experts that could be shared",
    "three": "expert_parallel=2 does not divide the 3 experts of model.layers.0.mlp.experts",
    "tied": "other.0 is tied to the experts of another module",
    "trained": "embedding.weight has a gradient already",
    "buffer": "layers.0.experts.limits seems to be of 4 experts",
    "named": "True",
    "called": "the experts layers.0.experts cannot be shared among 2 ranks",
    "again": "layers.0.experts.up is a piece of (2, 16, 32)",
    "muon": "the optimizer Whole with strategy.expert_parallel=2",
}


def test_what_cannot_be_is_said_on_every_rank(run_ranks: RunRanks) -> None:
    for found in run_ranks(expert_uses.refusals, 2, list(WRONG)):
        for kind, told in zip(WRONG, found, strict=True):
            assert WRONG[kind] in told, (kind, told)


@pytest.mark.parametrize("stage", [1, 3])
def test_models_on_meta_begin_as_one_process_begins_them(run_ranks: RunRanks, tmp_path: Path, stage: int) -> None:
    weights = experts._mixtral().state_dict()
    save_file({name: value.clone() for name, value in weights.items()}, tmp_path / "model.safetensors")
    (alone,) = run_ranks(expert_uses.from_meta, 1, 1, 0, str(tmp_path))
    for found in run_ranks(expert_uses.from_meta, 4, 2, stage, str(tmp_path)):
        assert _equal(found["seeds"], alone["seeds"]) and _equal(found["files"], weights)


@pytest.mark.parametrize("stage", [0, 3])
def test_an_overflow_of_one_expert_skips_the_step_on_all(run_ranks: RunRanks, stage: int) -> None:
    found = run_ranks(expert_uses.overflowing, 4, 2, stage)
    assert all(of_rank == found[0] for of_rank in found)
    assert [skipped for skipped, _ in found[0]] == [True, False, False, False, False]


@pytest.mark.parametrize(("num_ranks", "stages"), [(2, [1]), (4, [2, 3])])
def test_parts_are_frozen_and_thawed_and_matrices_stepped_whole(
    run_ranks: RunRanks, num_ranks: int, stages: list[int]
) -> None:
    (alone,) = run_ranks(expert_uses.thawing, 1, [(1, 0)])[0]
    for found in run_ranks(expert_uses.thawing, num_ranks, [(2, stage) for stage in stages]):
        assert all(difference(mine, alone) < 1e-5 for mine in found)


def test_frozen_experts_are_saved_and_loaded(run_ranks: RunRanks, tmp_path: Path) -> None:
    saved = run_ranks(expert_uses.frozen, 4, 2, 0, str(tmp_path / "saved"), False)[0]
    assert _equal(saved, trainings.build("skewed-frozen-experts").state_dict())
    for num_ranks, num_experts, stage in ((1, 1, 0), (2, 2, 3)):
        for found in run_ranks(expert_uses.frozen, num_ranks, num_experts, stage, str(tmp_path / "saved"), True):
            assert _equal(found, saved)


@pytest.mark.parametrize("stage", [0, 3])
def test_ranks_with_empty_batches_take_part(run_ranks: RunRanks, stage: int) -> None:
    (alone,) = run_ranks(expert_uses.idle, 1, 1, 0)
    for found in run_ranks(expert_uses.idle, 4, 2, stage):
        assert difference(found, alone) < 1e-5


@pytest.mark.matrix
@pytest.mark.parametrize("name", ["mixture", "mixtral"])
def test_compiled_layers(run_ranks: RunRanks, name: str) -> None:
    (alone,) = run_ranks(expert_uses.compiled, 1, name, 1, 0)
    for stage in (1, 3):
        for found in run_ranks(expert_uses.compiled, 2, name, 2, stage):
            assert difference(found, alone) < 1e-5


def test_a_step_of_one_model_balances_no_other(run_ranks: RunRanks) -> None:
    for stepped, other in run_ranks(expert_uses.two_models, 2):
        assert sum(stepped) == 2 * 2 * 3 * 2  # of ranks, rows, tokens, and experts a token
        assert other is None
