"""What scripts read of parameters under ZeRO-3."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

if TYPE_CHECKING:
    from tests.dist.rank_pool import RunRanks


def _asked(stage: int) -> tuple[list[int], list[torch.Tensor]]:
    from distui.compat import deepspeed
    from distui.compat.deepspeed.runtime.zero.partition_parameters import ZeroParamStatus, is_zero_param

    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(3)))
    whole = [param.detach().clone() for param in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": stage == 3},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    params: list[Any] = list(engine.module.parameters())
    if stage < 3:
        assert not any(is_zero_param(param) or hasattr(param, "ds_status") for param in params)
        return [], []
    assert all(is_zero_param(param) for param in params)
    statuses = []

    def note(module: nn.Module, args: object) -> None:
        statuses.append(params[4].ds_status)

    module: Any = engine.module
    module[2].register_forward_pre_hook(note)
    loss = engine(torch.ones(2, 5)).float().sum()
    assert statuses == [ZeroParamStatus.AVAILABLE]
    engine.backward(loss)
    engine.step()
    parts = []
    for param, right in zip(params, whole, strict=True):
        asked: Any = param
        assert asked.ds_shape == right.shape and asked.ds_numel == right.numel()
        assert not asked.ds_persist
        assert asked.ds_summary()["ds_shape"] == tuple(right.shape)
        part = asked.ds_tensor
        assert part.dtype is torch.bfloat16
        parts.append(part.float().clone())
        with pytest.raises(RuntimeError, match="inference tensor"):
            part.zero_()
    assert ZeroParamStatus.NOT_AVAILABLE in [param.ds_status for param in params]
    with deepspeed.zero.GatheredParameters(params):
        assert {param.ds_status for param in params} == {ZeroParamStatus.AVAILABLE}
    with pytest.raises(AttributeError, match="no attribute 'ds_mistyped'"):
        params[0].ds_mistyped  # noqa: B018
    assert not hasattr(nn.Linear(2, 2).weight, "ds_id")
    return [param.ds_id for param in params], parts


def test_parameters_answer_what_they_are_at_the_moment(run_ranks: RunRanks) -> None:
    (ids, first), (other_ids, second) = run_ranks(_asked, 2, 3)
    assert ids == other_ids == sorted(set(ids))
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(3)))
    for one, two, right in zip(first, second, model.parameters(), strict=True):
        torch.testing.assert_close(torch.cat([one, two]), right.detach().bfloat16().float().reshape(-1))


def test_parameters_below_stage_3_have_nothing_to_say(run_ranks: RunRanks) -> None:
    run_ranks(_asked, 2, 2)
