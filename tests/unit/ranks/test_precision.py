"""bf16 inside, fp32 outside; what plain autocast takes, the casts at the border take too."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from distui.core.ranks.precision import apply_border_casts


class Positions(nn.Module):
    """A table that is no parameter is added to what the weights are multiplied with."""

    table: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, 8), nn.LayerNorm(8)
        self.conv, self.last = nn.Conv1d(1, 1, 3, padding=1), nn.Linear(8, 2)
        self.register_buffer("table", torch.linspace(-1.0, 1.0, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.first(x) + self.table)
        x = self.conv((x + self.table)[:, None])[:, 0]
        return self.last(x + self.table)


def _in_bf16(model: nn.Module) -> nn.Module:
    for param in model.parameters():
        param.data = param.data.bfloat16()
    return model


def test_a_wider_buffer_raises_no_error_that_autocast_would_not_raise() -> None:
    torch.manual_seed(0)
    model = Positions()
    x = torch.randn(3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
    low = _in_bf16(copy.deepcopy(model))
    handles = apply_border_casts(low, torch.bfloat16)
    found = low(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected.float(), atol=0.05, rtol=0.05)
    found.sum().backward()
    assert all(param.grad is not None for param in low.parameters())
    torch.testing.assert_close(copy.deepcopy(low)(x), found)
    for handle in handles:
        handle.remove()
    with pytest.raises(RuntimeError):
        low(x)


def test_a_model_without_wider_buffers_has_hooks_at_its_border_only() -> None:
    model = _in_bf16(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    assert len(apply_border_casts(model, torch.bfloat16)) == 2
    assert all(not module._forward_pre_hooks for module in model.children())
