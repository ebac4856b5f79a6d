"""Groups of ranks that hold a copy of the states each: trainings, checkpoints and memory against one process."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests.dist.parallel import shard_groups
from tests.dist.parallel.test_tensor_states import _equal
from tests.dist.parallel.trainings import difference

from distui.core.checkpoint.weights import read_weights

if TYPE_CHECKING:
    from tests.dist.rank_pool import RunRanks

PAIRS: dict[str, Any] = {"strategy": {"shard_size": 2}}
RECOMPUTED = {"activation_checkpointing": {"mode": "full"}}
TWO_MICRO = {"batch": {"accumulation": 2}}
CASES: list[tuple[str, str, int, dict[str, Any]]] = [
    ("train", "awkward", 1, PAIRS),
    ("train", "awkward", 2, PAIRS | TWO_MICRO),
    ("train", "llama-tied", 3, PAIRS | TWO_MICRO | RECOMPUTED),
    ("twice", "llama", 1, PAIRS),
    ("twice", "llama", 3, PAIRS),
    ("train", "llama", 3, {"strategy": {"shard_size": 1, "context_parallel": 2}}),
    ("train", "mixtral", 2, {"strategy": {"shard_size": 2, "expert_parallel": 2}} | TWO_MICRO),
    ("matrices", "llama", 2, PAIRS),
]


def compare(run_ranks: RunRanks, num_ranks: int, cases: list[tuple[str, str, int, dict[str, Any]]]) -> None:
    plain = [(way, name, 0, {key: value for key, value in more.items() if key == "batch"}) for way, name, _, more in cases]
    alone = run_ranks(shard_groups.several, 1, plain)[0]
    for found in run_ranks(shard_groups.several, num_ranks, cases):
        for case, mine, expected in zip(cases, found, alone, strict=True):
            assert difference(mine, expected) < 1e-5, case


def test_trainings_equal_one_process(run_ranks: RunRanks) -> None:
    compare(run_ranks, 4, CASES)


OF_EIGHT: list[dict[str, Any]] = [
    {"shard_size": 2, "tensor": 2},
    {"shard_size": 2, "context_parallel": 2},
]


@pytest.mark.matrix
@pytest.mark.parametrize("strategy", OF_EIGHT)
def test_beside_other_axes(run_ranks: RunRanks, strategy: dict[str, Any]) -> None:
    compare(run_ranks, 8, [("train", "llama", stage, {"strategy": strategy}) for stage in (1, 2, 3)])


@pytest.mark.matrix
@pytest.mark.parametrize("experts", [2, 4])
def test_beside_experts(run_ranks: RunRanks, experts: int) -> None:
    strategy = {"shard_size": 2, "context_parallel": 2, "expert_parallel": experts}
    compare(run_ranks, 8, [("train", "mixtral", stage, {"strategy": strategy}) for stage in (1, 2, 3)])


FORMATS: list[tuple[str, int, dict[str, Any], float]] = [
    ("llama", 2, {"precision": {"dtype": "bf16"}}, 1e-4),
    ("llama", 3, {"precision": {"dtype": "fp16", "initial_loss_scale": 256.0}}, 1e-4),
    ("llama", 3, {"offload": {"optimizer": "cpu", "params": "cpu"}}, 1e-5),
    ("llama", 2, {"compression": {"gradients": "int8"}}, 2e-2),
    ("llama", 3, {"compression": {"gradients": "fp8", "weights": "int8"}}, 5e-2),
    ("llama", 1, {"optimizer": {"state_bits": 8}}, 1e-4),
]


def test_formats_homes_and_compression_are_as_without_groups(run_ranks: RunRanks) -> None:
    every = [(name, stage, sections) for name, stage, sections, _ in FORMATS]
    groups = [(name, stage, sections | PAIRS) for name, stage, sections in every]
    for found in run_ranks(shard_groups.losses, 4, [*every, *groups]):
        for case, plain, mine in zip(FORMATS, found[: len(every)], found[len(every) :], strict=True):
            assert mine["losses"] == pytest.approx(plain["losses"], abs=case[-1]), case
            assert mine["norms"] == pytest.approx(plain["norms"], rel=20 * case[-1]), case


@pytest.mark.matrix
def test_compressed_gradients_take_two_hops_in_groups_of_several_nodes(run_ranks: RunRanks) -> None:
    case = ("llama", 2, {"compression": {"gradients": "int8"}, "strategy": {"shard_size": 2, "context_parallel": 2}})
    (plain,) = run_ranks(shard_groups.losses, 1, [("llama", 0, {})])[0]
    for found in run_ranks(shard_groups.on_nodes, 8, 2, case):
        assert found["losses"] == pytest.approx(plain["losses"], abs=2e-2)


@pytest.mark.parametrize("stage", [1, 3])
def test_an_overflow_of_one_rank_skips_the_step_in_all_groups(run_ranks: RunRanks, stage: int) -> None:
    found = run_ranks(shard_groups.overflowing, 4, stage)
    assert all(of_rank == found[0] for of_rank in found) and found[0] == [True, False, False, False, False]


def test_checkpoints_are_written_once_and_loaded_by_any_layout(run_ranks: RunRanks, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    saved = run_ranks(shard_groups.save, 4, "awkward", 2, PAIRS, str(folder))
    assert all(_equal(found, saved[0]) for found in saved)
    plain = run_ranks(shard_groups.load, 1, "awkward", 0, {}, str(folder), str(tmp_path / "one"))
    assert _equal(plain[0], saved[0])
    for ranks, stage, sections in ((4, 3, PAIRS), (2, 1, {})):
        for found in run_ranks(shard_groups.load, ranks, "awkward", stage, sections, str(tmp_path / "one")):
            assert _equal(found, saved[0])
    sizes = [sum(path.stat().st_size for path in (tmp_path / name).rglob("*.bin")) for name in ("saved", "one")]
    assert sizes[0] < 1.5 * sizes[1], "each element is written by one of its copies"
    whole = {key.removeprefix("weights."): value for key, value in saved[0].items() if key.startswith("weights.")}
    consolidated = read_weights(folder, tied=True)["model0"]
    assert all(torch.equal(value, whole[key]) for key, value in consolidated.items())


@pytest.mark.parametrize("stage", [1, 3])
def test_a_rank_holds_its_share_and_sends_but_that_to_copies(run_ranks: RunRanks, stage: int) -> None:
    two = run_ranks(shard_groups.held, 2, stage, 0)
    for rank, found in enumerate(run_ranks(shard_groups.held, 4, stage, 2)):
        assert found["memory"] == two[rank % 2]["memory"]
        near = f"data_parallel[{'0,1' if rank < 2 else '2,3'}]"
        across = f"replicas[{'0,2' if rank % 2 == 0 else '1,3'}]"
        assert near in found["sent"] and across in found["sent"]
        steps = 5
        grads = steps * 4 * sum(found["shards"])
        assert grads <= found["sent"][across] <= grads + steps * 8, "a share of the gradients, and the norm"
        assert (found["rank 0"] > 0) is (rank == 0)
        assert found["mesh"] == (1, 4, 1, 1) and found["data"] == (4, rank)


def test_micro_batches_meet_the_copies_once_a_step(run_ranks: RunRanks) -> None:
    once, twice = (run_ranks(shard_groups.sent, 4, accumulation) for accumulation in (1, 2))
    for one, two in zip(once, twice, strict=True):
        assert two["near"] == pytest.approx(2 * one["near"], rel=0.01) and two["across"] == one["across"]
