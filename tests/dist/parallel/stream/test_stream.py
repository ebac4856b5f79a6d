"""The hidden state cut along the sequence over tensor-parallel ranks, against one process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests.dist.parallel import trainings
from tests.dist.parallel.stream import streams
from tests.dist.parallel.trainings import difference

if TYPE_CHECKING:
    from tests.dist.rank_pool import RunRanks

TOLERANCE = 1e-5
RECOMPUTED = {"activation_checkpointing": {"mode": "full"}}
CASES: list[streams.Case] = [
    ("llama-tied", 2, 0, {}),
    ("gpt2", 2, 3, {}),
    ("qwen3", 2, 1, RECOMPUTED),
    ("mixtral-sp", 2, 2, {}),
]
OF_FOUR: list[streams.Case] = [
    ("llama", 4, 0, {}),
    ("qwen3", 2, 3, RECOMPUTED),
    ("llama-tied", 2, 2, {"strategy": {"context_parallel": 2}}),
    ("mixtral-sp", 2, 1, {"strategy": {"expert_parallel": 2}}),
]


def compare(run_ranks: RunRanks, num_ranks: int, cases: list[streams.Case]) -> None:
    kinds = sorted({(case[0], "context_parallel" in case[3].get("strategy", {})) for case in cases})
    plain = [(name, 1, 0, {"strategy": {"context_parallel": 1}} if even else {}) for name, even in kinds]
    alone: dict[Any, Any] = dict(zip(kinds, run_ranks(streams.several, 1, plain)[0], strict=True))
    for found in run_ranks(streams.several, num_ranks, cases):
        for case, mine in zip(cases, found, strict=True):
            even = "context_parallel" in case[3].get("strategy", {})
            assert difference(mine, alone[case[0], even]) < TOLERANCE, case


def test_trainings_equal_one_process(run_ranks: RunRanks) -> None:
    compare(run_ranks, 2, CASES)  # of 9 tokens one rank has five


def test_beside_other_axes(run_ranks: RunRanks) -> None:
    compare(run_ranks, 4, OF_FOUR)


@pytest.mark.matrix
@pytest.mark.parametrize(("num_ranks", "tensor"), [(2, 2), (4, 2), (4, 4)])
def test_all_models_under_all_stages(run_ranks: RunRanks, num_ranks: int, tensor: int) -> None:
    models = ("llama", "llama-tied", "gpt2", "qwen3", "qwen3-moe", "mixtral-sp")
    compare(run_ranks, num_ranks, [(name, tensor, stage, {}) for name in models for stage in range(4)])


def test_autograd_keeps_a_part_of_what_lies_between(run_ranks: RunRanks) -> None:
    (plain, cut), (_, _) = run_ranks(streams.saved_bytes, 2, "none")
    half = 2 * (4 * 8 * 16) * 4 // 2  # of two blocks' inputs, each 4 sequences of 8 tokens of 16 features in fp32
    assert plain - cut >= 4 * half
    (plain, cut), (_, _) = run_ranks(streams.saved_bytes, 2, "full")
    assert plain - cut == half, "recomputed blocks keep a part of their inputs"


def test_each_rank_drops_other_tokens_and_goes_on_alike(run_ranks: RunRanks) -> None:
    (first, after_first), (second, after_second) = run_ranks(streams.masks, 2)
    assert first.shape == second.shape and not torch.equal(first, second)
    assert not torch.equal(first[0], first[1]) and torch.equal(after_first, after_second)
    for plain, again in zip(
        run_ranks(streams.recomputed_gradients, 2, "none"),
        run_ranks(streams.recomputed_gradients, 2, "full"),
        strict=True,
    ):
        assert all(torch.allclose(again[name], grad, atol=1e-6) for name, grad in plain.items())


def test_evaluation_of_sequences_shorter_than_the_ranks(run_ranks: RunRanks) -> None:
    model = trainings.build("llama").eval()
    ids_BT = torch.stack(trainings.samples()[:4])
    for short, odd in run_ranks(streams.evaluated, 2):
        torch.testing.assert_close(short, model(input_ids=ids_BT[:, :1]).logits.detach(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(odd, model(input_ids=ids_BT).logits.detach(), atol=1e-5, rtol=1e-5)


REFUSED = {
    "encoder": "none of transformers' blocks",
    "awkward": "none of transformers' blocks",
    "opt": "is neither a norm nor an attention or feed-forward that is cut",
    "states": "output_hidden_states with strategy.sequence_parallel",
}


def test_blocks_that_are_not_known_are_refused(run_ranks: RunRanks) -> None:
    for found in run_ranks(streams.refusals, 2, list(REFUSED)):
        for told, expected in zip(found, REFUSED.values(), strict=True):
            assert expected in told
