"""What a sharded model's units and buffers do: hooks that follow the gradients' order, padding, and their bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist
from torch import nn

from distui.core.sharding.sharded import ShardedModel
from distui.core.sharding.units import partition

if TYPE_CHECKING:
    from tests.dist.rank_pool import RunRanks


def _group() -> dist.ProcessGroup | None:
    return dist.group.WORLD if dist.is_initialized() else None


class TwoWays(nn.Module):
    """Uses its layers in one order or the other, or only the first of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(9, 9) for _ in range(3))
        self.way: tuple[int, ...] = (0, 1, 2)

    def forward(self, x_BD: torch.Tensor) -> torch.Tensor:
        for index in self.way:
            x_BD = torch.tanh(self.layers[index](x_BD))
        return x_BD.square().mean()


def _other_ways(stage: int) -> None:
    partition.SMALL_UNIT_NUMEL = 1 << 21  # all layers in one unit
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(TwoWays())
    plain, model = models
    plain_optimizer = torch.optim.SGD(plain.parameters(), lr=0.5)
    sharded = ShardedModel(model, stage=stage, group=_group())
    optimizer = sharded.prepare_optimizer(torch.optim.SGD(model.parameters(), lr=0.5))
    (unit,) = [unit for unit in sharded.units if unit.trainable]
    assert len(unit.params) == 6
    hooked = []
    for step, way in enumerate([(0, 1, 2)] * 2 + [(2, 1, 0)] * 3 + [(0,), (2, 1, 0)]):
        plain.way = model.way = way
        x_BD = torch.randn(4, 9, generator=torch.Generator().manual_seed(step))
        for each, step_optimizer in ((plain, plain_optimizer), (model, optimizer)):
            each(x_BD).backward()
            if each is model:
                sharded.schedule.end_backward()
            step_optimizer.step()
            step_optimizer.zero_grad(set_to_none=False)  # what is not used has a gradient of zero in both
        hooked.append([not unit.collected, *(index not in unit.collected for index in range(6))])
    torch.testing.assert_close(sharded.full_state_dict(), dict(plain.state_dict()), atol=1e-6, rtol=1e-5)
    assert [len(unit.params) - sum(row[1:]) for row in hooked] == [5, 5, 0, 5, 5, 5, 5], (
        "hooks are thinned and put back"
    )
    assert hooked[0] != hooked[3]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_gradients_that_come_in_another_order(run_ranks: RunRanks, stage: int) -> None:
    run_ranks(_other_ways, 2, stage)


def _padding_after_training(stage: int) -> None:
    """Units of one padded size but other gaps take turns on the pooled buffers."""
    partition.SMALL_UNIT_NUMEL = 1

    class Uneven(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.ModuleList(nn.Linear(20, 20) for _ in range(2))
            self.second = nn.ModuleList(nn.Linear(20, 20, bias=False) for _ in range(2))
            self.third = nn.Linear(20, 21, bias=False)

        def forward(self, x_BD: torch.Tensor) -> torch.Tensor:
            for layer in (*self.first, *self.second):
                x_BD = torch.tanh(layer(x_BD))
            return self.third(x_BD)

    model = Uneven()
    sharded = ShardedModel(model, stage=stage, group=_group())
    optimizer = sharded.prepare_optimizer(torch.optim.AdamW(model.parameters()))
    assert len({unit.layout.gaps for unit in sharded.units}) > 1
    assert len({unit.layout.padded_numel for unit in sharded.units}) == 1
    for _ in range(3):
        model(torch.randn(4, 20)).square().sum().backward()
        sharded.schedule.end_backward()
        optimizer.step()
        for unit in sharded.units:
            base, end = unit.layout.shard(unit.rank)
            for low, high in unit.layout.gaps:
                inside = slice(max(low - base, 0), max(min(high, end) - base, 0))
                assert unit.grad_shard is not None
                assert not unit.grad_shard[inside].any() and not unit.master[inside].any(), unit.name
        optimizer.zero_grad()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_padding_stays_zero(run_ranks: RunRanks, stage: int) -> None:
    run_ranks(_padding_after_training, 2, stage)


def _different_models() -> None:
    dim = 8 if dist.get_rank() == 0 else 9
    ShardedModel(nn.Linear(dim, dim), stage=0, group=_group())


def test_ranks_with_different_models_are_refused(run_ranks: RunRanks) -> None:
    with pytest.raises(Exception, match="the ranks hold different models"):
        run_ranks(_different_models, 2)


def _memory(stage: int) -> dict[str, int]:
    model = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(8)))
    sharded = ShardedModel(model, stage=stage, group=_group())
    optimizer = sharded.prepare_optimizer(torch.optim.AdamW(model.parameters()))
    model(torch.randn(2, 256)).sum().backward()
    sharded.schedule.end_backward()
    optimizer.step()
    return sharded.memory_by_category()


def test_states_take_the_bytes_of_the_zero_table(run_ranks: RunRanks) -> None:
    num_params = 8 * 256 * 256
    for stage in range(4):
        found = run_ranks(_memory, 2, stage)[0]
        parameters = 4 * num_params // (2 if stage == 3 else 1)
        gradients = 4 * num_params // (2 if stage >= 2 else 1)
        states = 8 * num_params // (2 if stage >= 1 else 1)
        assert found["parameters"] == parameters, stage
        assert found["gradients"] == gradients, stage
        assert states <= found["optimizer_states"] <= states * 1.001, stage  # the step counters
