"""Which parameters form a unit, and which optimizers may step flat pieces."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from distui.core.errors import UserError
from distui.core.sharding.optim.elementwise import why_not_elementwise
from distui.core.sharding.sharded import ShardedModel
from distui.core.sharding.units import partition
from distui.core.sharding.units.partition import find_blocks


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 50, bias=False)
        self.head.weight = self.embedding.weight


def test_each_parameter_is_in_exactly_one_unit_and_tied_ones_in_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partition, "SMALL_UNIT_NUMEL", 1)
    model = Tied()
    units = partition.partition(model)
    names = [name for unit in units for name, _ in unit.params]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert [unit.is_root for unit in units] == [True, False, False, False, True]
    assert [name for name, _ in units[0].params] == ["embedding.weight"]
    assert [name for name, _ in units[-1].params] == ["norm.weight", "norm.bias"]


def test_small_neighbours_are_joined() -> None:
    units = partition.partition(Tied())
    assert [len(unit.modules) for unit in units] == [0, 3, 0]


def test_blocks_inside_blocks_belong_to_the_outer_one() -> None:
    inner = [nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2)]
    model = nn.Sequential(nn.Embedding(3, 4), nn.Sequential(*inner))
    assert [name for name, _ in find_blocks(model)] == ["1.0", "1.1"]


def test_classes_that_a_transformers_model_names_are_blocks() -> None:
    class Layer(nn.Linear):
        pass

    class Model(nn.Module):
        _no_split_modules = ("Layer",)

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Layer(4, 4), Layer(4, 4)

    assert [name for name, _ in find_blocks(Model())] == ["first", "second"]


class Lion(torch.optim.Optimizer):
    """A custom element-wise optimizer (Chen et al., arXiv 2302.06675) with a constructor of its own."""

    def __init__(self, params: Any, rate: float, *, betas: tuple[float, float]) -> None:
        super().__init__(params, {"lr": rate, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                momentum = self.state[param].setdefault("momentum", torch.zeros_like(param))
                first, second = group["betas"]
                param.sub_(torch.sign(momentum * first + param.grad * (1 - first)), alpha=group["lr"])
                momentum.mul_(second).add_(param.grad, alpha=1 - second)


class RowNormalised(torch.optim.Optimizer):
    """Divides each row of the gradient by its norm: no element-wise rule."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                param.sub_(param.grad / param.grad.norm(dim=-1, keepdim=True), alpha=group["lr"])


def test_elementwise_optimizers_are_recognised_by_trying() -> None:
    params = [nn.Parameter(torch.randn(4, 4))]
    assert why_not_elementwise(torch.optim.AdamW(params)) == ""
    assert why_not_elementwise(Lion(params, 0.1, betas=(0.9, 0.99))) == ""
    assert "on flattened pieces of a 6x8 matrix" in why_not_elementwise(RowNormalised(params))
    assert "rows and columns" in why_not_elementwise(torch.optim.Adafactor(params))


def test_a_schedulers_wrapper_is_not_stepped_by_the_trial() -> None:
    param = nn.Parameter(torch.randn(4, 4))
    optimizer = Lion([param], 0.1, betas=(0.9, 0.99))
    torch.optim.lr_scheduler.ConstantLR(optimizer)
    before = param.detach().clone()
    assert why_not_elementwise(optimizer) == ""
    assert torch.equal(param, before)


def test_closures_are_refused_with_a_reason() -> None:
    model = nn.Linear(4, 4)
    sharded = ShardedModel(model, stage=0, group=None)
    with pytest.raises(UserError, match="closure"):
        sharded.prepare_optimizer(torch.optim.LBFGS(model.parameters()))


def test_whole_matrices_are_given_where_states_are_replicated() -> None:
    model, plain = nn.Linear(4, 6), nn.Linear(4, 6)
    plain.load_state_dict(model.state_dict())
    inputs = torch.randn(3, 4)
    sharded = ShardedModel(model, stage=0, group=None)
    optimizer = sharded.prepare_optimizer(RowNormalised([model.weight]))
    model(inputs).square().sum().backward()
    sharded.schedule.end_backward()
    optimizer.step()
    plain(inputs).square().sum().backward()
    RowNormalised([plain.weight]).step()
    torch.testing.assert_close(model.weight, plain.weight)


def test_a_strange_parameter_in_the_optimizer_is_refused() -> None:
    model = nn.Linear(4, 4)
    sharded = ShardedModel(model, stage=0, group=None)
    with pytest.raises(UserError, match="a parameter that the model does not have"):
        sharded.prepare_optimizer(torch.optim.SGD([*model.parameters(), nn.Parameter(torch.ones(2))]))


def test_states_of_an_optimizer_that_has_stepped_are_carried_over() -> None:
    model, plain = nn.Linear(5, 3), nn.Linear(5, 3)
    plain.load_state_dict(model.state_dict())
    inputs = torch.randn(4, 5)
    optimizers = [torch.optim.AdamW(net.parameters(), lr=0.1) for net in (model, plain)]
    for net, optimizer in zip((model, plain), optimizers, strict=True):
        net(inputs).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    sharded = ShardedModel(model, stage=2, group=None)
    prepared = sharded.prepare_optimizer(optimizers[0])
    model(inputs).square().sum().backward()
    sharded.schedule.end_backward()
    prepared.step()
    plain(inputs).square().sum().backward()
    optimizers[1].step()
    torch.testing.assert_close(model.state_dict(), plain.state_dict())
