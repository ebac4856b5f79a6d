"""Tensors of the host over a group that leads from GPUs only, such as init_process_group("nccl") makes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distui.core.ranks import ops
from distui.core.sharding.transport import alike
from tests.recording import DEVICE

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)


def _group(*kinds: str) -> Any:
    return SimpleNamespace(_device_types=[torch.device(kind) for kind in kinds])


@pytest.fixture(autouse=True)
def _second_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)


@pytest.mark.parametrize(("kinds", "expected"), [(("cuda",), GPU), (("cpu", "cuda"), CPU), (("cpu",), CPU), ((), CPU)])
def test_small_tensors_travel_where_the_group_leads(kinds: tuple[str, ...], expected: torch.device) -> None:
    assert ops.device_over(CPU, _group(*kinds)) == expected
    assert ops.device_over(GPU, _group(*kinds)) == GPU


def _elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    # A GPU there is none: the CPU's second name stands for it, to which `to` makes a copy.
    monkeypatch.setattr(ops, "device_over", lambda device, group=None: DEVICE)


@pytest.mark.parametrize("shapes", [[(3,)], [(2, 3), (4,)]])
def test_first_numbers_on_the_host_travel_over_a_gpu(
    monkeypatch: pytest.MonkeyPatch, shapes: list[tuple[int, ...]]
) -> None:
    _elsewhere(monkeypatch)
    tensors = [torch.zeros(shape) for shape in shapes]
    own = {tensor.data_ptr() for tensor in tensors}

    def broadcast(tensor: torch.Tensor, **_: Any) -> None:
        assert tensor.data_ptr() not in own, "it would be the host's tensor that NCCL is given"
        tensor.fill_(5.0)

    monkeypatch.setattr(dist, "broadcast", broadcast)
    alike.broadcast_alike(tensors, _group("cuda"))
    assert all(tensor.eq(5.0).all() for tensor in tensors)


def test_the_scripts_own_tensors_travel_too_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    _elsewhere(monkeypatch)
    monkeypatch.setattr(ops, "_world", lambda group=None: 2)
    monkeypatch.setattr(ops, "check_same", lambda *_, group=None: None)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, op, group: tensor.mul_(2.0))
    monkeypatch.setattr(dist, "broadcast", lambda tensor, src: tensor.fill_(9.0))
    given = torch.ones(3)
    assert ops.reduce(given, "sum").tolist() == [2.0] * 3 and ops.broadcast(given).tolist() == [9.0] * 3
    assert given.tolist() == [1.0] * 3
