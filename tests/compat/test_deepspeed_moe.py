"""`deepspeed.moe.layer.MoE` of the face beside DeepSpeed's own: outputs, losses, counts, gradients, on one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from distui.compat.deepspeed.moe import layer as ours
from distui.compat.deepspeed.moe import utils as our_utils

SETTINGS: list[dict[str, Any]] = [
    {"k": 1},
    {"k": 1, "use_rts": False, "min_capacity": 0, "capacity_factor": 0.7},
    {"k": 1, "drop_tokens": False},
    {"k": 1, "noisy_gate_policy": "RSample"},
    {"k": 1, "noisy_gate_policy": "Jitter", "use_residual": True},
    {"k": 2},
    {"k": 2, "capacity_factor": 0.5, "top2_2nd_expert_sampling": False},
    {"k": 2, "drop_tokens": False, "use_residual": True},
    {"k": 3, "capacity_factor": 0.6},
    {"k": 3, "drop_tokens": False},
]


def _expert() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))


def _ran(kind: Any, settings: dict[str, Any], train: bool, state: dict[str, Any] | None = None) -> dict[str, Any]:
    torch.manual_seed(0)
    layer = kind(8, _expert(), num_experts=4, **settings).train(train)
    with torch.no_grad():
        for number, param in enumerate(layer.parameters()):  # or all experts would be alike
            param.add_(0.3 * torch.randn(param.shape, generator=torch.Generator().manual_seed(number)))
    x = torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
    torch.manual_seed(7)
    output, aux, counts = layer(x)
    (output.square().sum() + aux).backward()
    grads = {name: param.grad for name, param in layer.named_parameters()}
    return {"output": output.detach(), "aux": aux.detach(), "counts": counts.long(), "x": x.grad, **grads}


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("train", [True, False])
def test_it_computes_what_deepspeed_computes(settings: dict[str, Any], train: bool) -> None:
    theirs = pytest.importorskip("deepspeed.moe.layer")
    expected, found = _ran(theirs.MoE, settings, train), _ran(ours.MoE, settings, train)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        value = torch.zeros_like(found[name]) if value is None else value  # an expert without tokens
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5, msg=lambda text: f"{name}: {text}")  # noqa: B023


def test_groups_of_experts_are_those_of_deepspeed() -> None:
    theirs = pytest.importorskip("deepspeed.moe.utils")
    layer = ours.MoE(8, _expert(), num_experts=4)
    names = {id(param): name for name, param in layer.named_parameters()}
    for most in (100, 178956971, None):
        found, expected = (
            module.split_params_into_different_moe_groups_for_optimizer(
                ({"params": list(layer.parameters()), "name": "all", "lr": 0.1},), most
            )
            for module in (our_utils, theirs)
        )
        told = [
            [{**group, "params": [names[id(param)] for param in group["params"]]} for group in groups]
            for groups in (found, expected)
        ]
        filled = [[group for group in groups if group["params"]] for groups in told]
        assert filled[0] == filled[1]
    assert our_utils.has_moe_layers(nn.Sequential(layer)) == (True, 4)
    assert sum(map(our_utils.is_moe_param, layer.parameters())) == 16
