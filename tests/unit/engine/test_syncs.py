"""How often a step asks the device for a number: each time the host waits for all that it has launched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import distui
from distui.core.ranks import streams
from distui.core.ranks.streams import Cuda, Mark


class _Passed(Mark):
    def order(self, device: torch.device) -> None:
        """Nothing is behind."""

    def wait(self) -> None:
        """Nothing is behind."""


class _Behind(Cuda):
    """All tensors are a device's."""

    def holds(self, tensor: torch.Tensor) -> bool:
        return True

    def mark(self, device: torch.device) -> Mark:
        return _Passed()


class _Counting(TorchDispatchMode):
    num_numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num_numbers += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def _job(dtype: str) -> tuple[Any, Any, Any]:
    engine = distui.Engine(strategy={"zero_stage": 1}, precision={"dtype": dtype, "initial_loss_scale": 8.0})
    model = nn.Linear(4, 4)
    return (engine, *engine.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1)))


@pytest.mark.parametrize("max_norm", [1e-3, 1e3])
def test_clipping_asks_once(monkeypatch: pytest.MonkeyPatch, max_norm: float) -> None:
    engine, model, optimizer = _job("fp32")
    engine.backward(model(torch.ones(2, 4)).sum())
    monkeypatch.setattr(streams, "machine", _Behind())
    with _Counting() as counting:
        norm = engine.clip_grad_norm_(model.parameters(), max_norm)
    assert counting.num_numbers == 1
    assert engine.clock.grad_norm is not None and engine.clock.grad_norm() == norm.item()
    with _Counting() as counting:
        optimizer.step()
    assert counting.num_numbers == 0


def test_the_loss_is_read_when_the_log_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, model, _ = _job("fp32")
    monkeypatch.setattr(streams, "machine", _Behind())
    loss = model(torch.ones(2, 4)).sum()
    with _Counting() as counting:
        engine.backward(loss)
    assert counting.num_numbers == 0
    assert [read() for read in engine.clock._losses] == [loss.item()]


def test_fp16_asks_once_more_whether_the_step_is_finite() -> None:
    engine, model, optimizer = _job("fp16")
    engine.backward(model(torch.ones(2, 4)).sum())
    engine.clip_grad_norm_(model.parameters(), 1.0)
    with _Counting() as counting:
        optimizer.step()
    assert counting.num_numbers == 1 and not optimizer.step_was_skipped
