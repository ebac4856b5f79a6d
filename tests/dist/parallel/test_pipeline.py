"""Pipelines against one process: losses, norms and weights of five clipped steps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from tests.dist.parallel import pipelines
from tests.dist.parallel.pipelines import trainings
from tests.dist.parallel.trainings import ROWS, difference

if TYPE_CHECKING:
    from tests.dist.rank_pool import RunRanks

TOLERANCE = 1e-5
MODELS = ("llama", "llama-tied", "gpt2", "encoder")


def compare(run_ranks: RunRanks, num_ranks: int, cases: list[tuple[Any, ...]]) -> None:
    asked = [(case[0], case[3].get("rows", ROWS) if len(case) > 3 else ROWS) for case in cases]
    kinds = sorted(set(asked))
    alone_in = [(name, 1, 0, {"rows": rows}) for name, rows in kinds]
    alone = dict(zip(kinds, run_ranks(trainings, 1, alone_in)[0], strict=True))
    for found in run_ranks(trainings, num_ranks, cases):
        for case, of, mine in zip(cases, asked, found, strict=True):
            assert difference(mine, alone[of]) < TOLERANCE, case


def test_two_stages_equal_one_process(run_ranks: RunRanks) -> None:
    compare(run_ranks, 2, [(name, 2, stage) for name, stage in zip(MODELS, (0, 1, 2, 3), strict=True)])


def test_two_stages_of_two_data_ranks(run_ranks: RunRanks) -> None:
    compare(run_ranks, 4, [("llama-tied", 2, 1), ("gpt2", 2, 2), ("llama-tied", 2, 3)])


def test_two_stages_of_two_tensor_parallel_ranks(run_ranks: RunRanks) -> None:
    tensor = {"strategy": {"tensor_parallel": 2}}
    cases = [("llama-tied", 2, 0, tensor), ("gpt2", 2, 3, tensor), ("encoder", 2, 2, tensor)]
    compare(run_ranks, 4, cases)


def test_two_stages_of_two_context_parallel_ranks(run_ranks: RunRanks) -> None:
    ulysses, ring = ({"strategy": {"context_parallel": 2, "context_method": way}} for way in ("ulysses", "ring"))
    recomputed = {**ulysses, "activation_checkpointing": {"mode": "full"}}
    interleaved = {"strategy": {"context_parallel": 2, "pipeline_schedule": "interleaved"}}
    cases: list[tuple[Any, ...]] = [
        ("even-llama-tied", 2, 1, ulysses),
        ("even-gpt2", 2, 3, recomputed),
        ("even-llama", 2, 2, ring),
        ("even-deep", 2, 1, interleaved),
    ]
    compare(run_ranks, 4, cases)


@pytest.mark.matrix
def test_stages_beside_context_and_tensor_parallel_ranks(run_ranks: RunRanks) -> None:
    both = {"strategy": {"context_parallel": 2, "tensor_parallel": 2}}
    zbv = {"strategy": {"context_parallel": 2, "pipeline_schedule": "zbv", "context_method": "ring"}}
    compare(run_ranks, 8, [("even-llama-tied", 2, stage, both) for stage in (0, 3)])
    compare(run_ranks, 4, [("even-deep", 2, 1, zbv)])


@pytest.mark.matrix
def test_stages_beside_groups_that_hold_a_copy_each(run_ranks: RunRanks) -> None:
    groups = {"strategy": {"shard_size": 2}, "rows": 2 * ROWS}  # a row for each micro-batch of four data ranks
    compare(run_ranks, 8, [("llama-tied", 2, stage, groups) for stage in (1, 2, 3)])


def test_other_schedules_recomputation_and_frozen_blocks(run_ranks: RunRanks) -> None:
    recomputed = {"activation_checkpointing": {"mode": "full"}}
    cases: list[tuple[Any, ...]] = [
        ("llama-tied", 2, 2, {"strategy": {"pipeline_schedule": "gpipe"}}),
        ("gpt2", 2, 3, recomputed),
        ("frozen", 2, 0),
        ("frozen", 2, 3),
    ]
    compare(run_ranks, 2, cases)


def test_four_stages_with_a_tied_embedding_over_the_ends(run_ranks: RunRanks) -> None:
    compare(run_ranks, 4, [("deep", 4, 1)])


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zbv"])
def test_bf16_is_that_of_one_process_over_the_same_micro_batches(run_ranks: RunRanks, schedule: str) -> None:
    bf16 = {"precision": {"dtype": "bf16"}}
    alone = run_ranks(pipelines.accumulated, 1, "deep", bf16)[0]
    for found in run_ranks(trainings, 2, [("deep", 2, 1, {**bf16, "strategy": {"pipeline_schedule": schedule}})]):
        # Under zbv a tied weight's two gradients are rounded apart.
        assert difference(found[0], alone) < (3e-3 if schedule == "zbv" else 1e-3)


@pytest.mark.parametrize(
    ("name", "schedule", "last_rank"), [("llama-tied", "1f1b", 1), ("deep", "interleaved", 1), ("deep", "zbv", 0)]
)
def test_odd_batches_two_passes_a_step_and_evaluation(
    run_ranks: RunRanks, name: str, schedule: str, last_rank: int
) -> None:
    alone = run_ranks(pipelines.odd_batches, 1, name, None)[0]
    told = run_ranks(pipelines.odd_batches, 2, name, schedule)
    last, other = told[last_rank], told[1 - last_rank]
    for found in told:
        assert difference(found, alone) < TOLERANCE
    for mine, expected in zip(last["logits"], alone["logits"], strict=True):
        torch.testing.assert_close(mine, expected, atol=TOLERANCE, rtol=TOLERANCE)
    assert other["logits"] is None
    assert "output.logits of a pipelined model" in other["refused"]
    assert f"on the last stage, rank {last_rank}" in other["refused"]


CHUNKS = {"strategy": {"pipeline_schedule": "interleaved"}}
ZERO_BUBBLE = {"strategy": {"pipeline_schedule": "zbv"}}


def test_several_stages_on_a_rank(run_ranks: RunRanks) -> None:
    recomputed = {"activation_checkpointing": {"mode": "full"}}
    cases: list[tuple[Any, ...]] = [
        ("deep", 2, 0, {**CHUNKS, "micro": 4}),
        ("deep-gpt2", 2, 2, CHUNKS),
        ("deep-encoder", 2, 3, CHUNKS),
        ("deep", 2, 1, {**ZERO_BUBBLE, "micro": 4}),
        ("deep-gpt2", 2, 0, {**ZERO_BUBBLE, **recomputed}),
        ("deep-encoder", 2, 1, {**ZERO_BUBBLE, "micro": 4}),
    ]
    compare(run_ranks, 2, cases)


def test_several_stages_on_a_rank_beside_other_axes(run_ranks: RunRanks) -> None:
    tensor = {"strategy": {"pipeline_schedule": "zbv", "tensor_parallel": 2}}
    compare(run_ranks, 4, [("deep", 2, 3, CHUNKS), ("deep-gpt2", 2, 1, ZERO_BUBBLE), ("deep", 2, 1, tensor)])


def test_a_failing_stage_is_told_on_all_ranks(run_ranks: RunRanks) -> None:
    first, last = (found[0] for found in run_ranks(pipelines.refusals, 2, ["Failing"]))
    assert last == "ValueError: the third forward fails"
    assert "stage 1 of 2 (rank 1): ValueError: the third forward fails" in first


@pytest.mark.parametrize(("schedule", "rank", "stages"), [("interleaved", 1, "1 and 3"), ("zbv", 0, "0 and 3")])
def test_a_failing_stage_among_several_of_a_rank(run_ranks: RunRanks, schedule: str, rank: int, stages: str) -> None:
    found = [told[0] for told in run_ranks(pipelines.refusals, 2, ["Failing"], 2, schedule)]
    assert found[rank] == "ValueError: the third forward fails"
    assert f"stages {stages} of 4 (rank {rank}): ValueError: the third forward fails" in found[1 - rank]


def test_a_failing_backward_is_told_along_the_line(run_ranks: RunRanks) -> None:
    found = [told[0] for told in run_ranks(pipelines.refusals, 4, ["FailingBackward"], 4)]
    assert found.pop(1) == "ValueError: this backward fails"
    for told in found:
        assert "stage 1 of 4 (rank 1): ValueError: this backward fails" in told


REFUSED = {
    "Residual": "changes what blocks.",
    "Backwards": "is called where blocks.0 is expected",
    "Skipping": "is given more than its hidden state by embedding",
    "NoLoss": "gives no loss in a pipeline",
    "Looking": "the first loss of Looking in a pipeline is NaN",
    "part": "a part of Failing was called, and not the model",
    "short": "pipeline_parallel=2 with 0 blocks",
    "batches": "a pipeline's ranks were given different batches",
    "scaled": "was multiplied by 2 before the backward",
    "penalty": "has other terms that reach its parameters",
    "gradients": "engine.gradients of a pipelined model",
    "states": "in a pipeline: each of 2 stages has the states of its own blocks",
}


def test_what_would_be_another_computation_is_refused_on_all_ranks(run_ranks: RunRanks) -> None:
    for found in run_ranks(pipelines.refusals, 2, list(REFUSED)):
        for kind, told in zip(REFUSED, found, strict=True):
            assert REFUSED[kind] in told, (kind, told)


@pytest.mark.parametrize("schedule", ["interleaved", "zbv"])
def test_a_loss_of_hidden_states_is_refused_on_all_ranks(run_ranks: RunRanks, schedule: str) -> None:
    for told in run_ranks(pipelines.refusals, 2, ["Collecting"], 2, schedule):
        assert "the first loss of Collecting in a pipeline is NaN" in told[0]


@pytest.mark.parametrize("name", ["output_router_logits", "output_hidden_states"])
def test_what_is_collected_of_all_blocks_is_refused(run_ranks: RunRanks, name: str) -> None:
    assert run_ranks(pipelines.routed, 2, name) == [f"{name}=True in a pipeline"] * 2


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_gradients_that_a_model_asks_for_are_its_own(run_ranks: RunRanks, schedule: str) -> None:
    alone = run_ranks(pipelines.asking, 1, None)[0]
    for found in run_ranks(pipelines.asking, 2, schedule):
        torch.testing.assert_close(found, alone, atol=TOLERANCE, rtol=TOLERANCE)


def test_an_overflow_of_one_stage_skips_the_step_on_all(run_ranks: RunRanks) -> None:
    first, last = run_ranks(pipelines.overflowing, 2)
    assert first == last == [(True, 2.0**39), (True, 2.0**38)]


LAYOUTS: list[tuple[tuple[Any, ...], tuple[Any, ...]]] = [
    ((2, 2, 1), (2, 1, 3)),
    ((2, 1, 2), (2, 2, 0)),
    ((2, 2, 3), (1, 1, 0)),
    ((4, 2, 1, 2), (2, 2, 2)),
    ((2, 2, 3, 1, "interleaved", "deep"), (2, 2, 1, 1, "zbv", "deep")),
    ((2, 2, 1, 1, "zbv", "deep"), (2, 1, 3, 1, "1f1b", "deep")),
]
"""Ranks, stages, ZeRO stage, tensor-parallel ranks, schedule, model: of who saves and who loads."""


@pytest.mark.parametrize(("before", "after"), LAYOUTS)
def test_checkpoints_go_on_in_another_layout(
    run_ranks: RunRanks, tmp_path: Path, before: tuple[Any, ...], after: tuple[Any, ...]
) -> None:
    saved = run_ranks(pipelines.saved, before[0], str(tmp_path), *before[1:])[0]
    for found in run_ranks(pipelines.resumed, after[0], str(tmp_path), *after[1:]):
        assert found["saved"].keys() == saved["saved"].keys()
        assert all(torch.equal(found["saved"][name], value) for name, value in saved["saved"].items())
        assert difference(found, saved) < TOLERANCE
    files = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(value, saved["saved"][name]) for name, value in files.items())
    assert len(files) >= len(saved["saved"]) - 1  # of tied weights one


def test_a_rank_holds_its_stage_only(run_ranks: RunRanks) -> None:
    (first, total), (last, _) = run_ranks(pipelines.held_numel, 2)
    embedding, norm = 37 * 16, 16  # on both ends
    assert first + last == total + embedding + norm


def test_what_a_stage_waits_is_communication_and_no_forward(run_ranks: RunRanks) -> None:
    assert all(found > 0.0 for found in run_ranks(pipelines.blocked_s, 2))


@pytest.mark.matrix
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_all_models_under_all_stages(run_ranks: RunRanks, num_ranks: int) -> None:
    compare(run_ranks, num_ranks, [(name, 2, stage) for name in MODELS for stage in range(4)])
