"""distui.MoE on one process: against experts one by one, its balancing, its capacity, and bad sizes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import distui
from distui.core.parallel.experts import moe as moe_file


def _one_by_one(moe: distui.MoE, x_TD: torch.Tensor) -> torch.Tensor:
    """Return what the layer should, a token and an expert at a time."""
    logits = x_TD @ moe.gate.weight.t()
    scores = logits.softmax(-1) if moe.scores == "softmax" else logits.sigmoid()
    rows = []
    for token, of_token in zip(x_TD, scores, strict=True):
        chosen = (of_token + moe.bias).topk(moe.top_k).indices
        weights = of_token[chosen]
        weights = (weights / weights.sum() if moe.normalize else weights) * moe.scale
        row = torch.zeros_like(token)
        for expert, weight in zip(chosen.tolist(), weights, strict=True):
            row = row + weight * _expert(moe.experts, expert, token)
        rows.append(row if moe.shared is None else row + _expert(moe.shared, 0, token))
    return torch.stack(rows)


def _expert(experts: moe_file.Experts, number: int, token: torch.Tensor) -> torch.Tensor:
    inner = experts.up[number] @ token
    act = moe_file.ACTIVATIONS[experts.activation]
    if experts.gated:
        gates, values = inner.chunk(2)
        inner = act(gates) * values
    else:
        inner = act(inner)
    return experts.down[number] @ inner


KINDS: list[dict[str, Any]] = [
    {},
    {"top_k": 1, "scores": "sigmoid", "normalize": False, "shared_inner": 8},
    {"top_k": 3, "scores": "sigmoid", "scale": 2.5, "activation": "gelu", "gated": False},
    {"inner": 7, "num_experts": 3, "activation": "relu"},
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grouped", [True, False])
def test_it_is_the_sum_of_the_chosen_experts(
    kind: dict[str, Any], grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not grouped:
        monkeypatch.setattr(moe_file, "_grouped_works", lambda device, dtype: False)
    torch.manual_seed(0)
    moe = distui.MoE(16, kind.get("inner", 12), kind.get("num_experts", 5), **{
        key: value for key, value in kind.items() if key not in ("inner", "num_experts")
    })  # fmt: skip
    moe.bias += torch.randn(moe.num_experts) * 0.1
    x_BTD = torch.randn(2, 5, 16, requires_grad=True)
    found = moe(x_BTD)
    expected = _one_by_one(moe, x_BTD.flatten(0, 1)).view_as(x_BTD)
    torch.testing.assert_close(found, expected)
    params = [x_BTD, *moe.parameters()]
    ours = torch.autograd.grad(found.square().sum(), params)
    for mine, other in zip(ours, torch.autograd.grad(expected.square().sum(), params), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_the_bias_moves_against_the_load_and_evens_it() -> None:
    torch.manual_seed(0)
    moe = distui.MoE(8, 8, 4, top_k=1, balance_rate=0.004)
    with torch.no_grad():
        moe.gate.weight[0] += 0.6
    x_TD = torch.rand(256, 8)
    uneven = []
    for _ in range(150):
        moe(x_TD)
        distui.balance_experts(moe)
        assert moe.load is not None and int(moe.load.sum()) == 256
        uneven.append(float(moe.load.max() / 64))
    assert uneven[0] > 2.0 and uneven[-1] < 1.3
    before = moe.bias.clone()
    moe.eval()(x_TD)
    with torch.no_grad():
        moe.train()(x_TD)
    assert int(moe.take_counts().sum()) == 0 and torch.equal(moe.bias, before)


def test_a_recomputation_is_counted_once_and_chooses_alike() -> None:
    torch.manual_seed(0)
    moe = distui.MoE(8, 8, 4)
    x_TD = torch.randn(12, 8, requires_grad=True)
    checkpoint(moe, x_TD, use_reentrant=False).sum().backward()
    assert int(moe.take_counts().sum()) == 24


def test_what_is_over_the_capacity_is_dropped_later_choices_and_tokens_first() -> None:
    moe = distui.MoE(4, 4, 3, top_k=2, capacity_factor=0.75, normalize=False)
    index_TK = torch.tensor([[0, 1], [0, 2], [1, 0], [0, 1]])
    # Two of eight choices an expert: of expert 0 tokens 0 and 1, of expert 1 token 2, then token 0's second choice.
    assert moe._within_capacity(index_TK).tolist() == [[0, 1], [0, 2], [1, 3], [3, 3]]
    x_TD = torch.randn(9, 4)
    every = copy.deepcopy(moe)
    every.capacity_factor = 100.0
    plain = copy.deepcopy(moe)
    plain.capacity_factor = None
    torch.testing.assert_close(every(x_TD), plain(x_TD))
    index_TK, weights_TK = moe.route(x_TD)
    assert int((index_TK == 3).sum()) > 0
    kept = sum(
        (
            _expert(moe.experts, expert, x_TD[token]) * weights_TK[token, place]
            for token, row in enumerate(index_TK.tolist())
            for place, expert in enumerate(row)
            if expert < 3 and token == 0
        ),
        torch.zeros(4),
    )
    torch.testing.assert_close(moe(x_TD)[0], kept)


def test_formats_keep_the_bias_and_empty_batches_pass() -> None:
    moe = distui.MoE(16, 16, 4).to(torch.bfloat16)
    assert moe.bias.dtype == torch.float32 and moe.gate.weight.dtype == torch.bfloat16
    out = moe(torch.randn(3, 16, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    assert moe(torch.randn(0, 16, dtype=torch.bfloat16)).shape == (0, 16)
    x_TD = torch.randn(64, 16, dtype=torch.bfloat16)
    whole = copy.deepcopy(moe).float()
    torch.testing.assert_close(moe(x_TD).float(), whole(x_TD.float()), atol=2e-2, rtol=5e-2)
    assert F.grouped_mm is not None and "num_experts=4, top_k=2" in repr(moe)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"top_k": 5}, "top_k=5 of 4 experts"),
        ({"activation": "sigmoid"}, "activation='sigmoid'"),
        ({"capacity_factor": 0.0}, "capacity_factor=0.0"),
    ],
)
def test_what_does_not_fit_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(distui.UserError, match=said):
        distui.MoE(8, 8, 4, **given)
