"""A model to begin with in several ways, and its preparation."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import distui
from distui.core.sharding.units import partition

DIM = 10


class Scaled(nn.Module):
    """A parameter of its own, an initialisation of its own, a table that only the constructor computes."""

    table: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(DIM))
        self.linear = nn.Linear(DIM, DIM)
        self.register_buffer("table", torch.arange(DIM) / DIM, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.scale, 1.0, 2.0)

    def forward(self, x_BD: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(x_BD) * self.scale + self.table)


class Model(nn.Module):
    """Tied, frozen and integer parameters, buffers, several units."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, DIM)
        self.blocks = nn.ModuleList(Scaled() for _ in range(3))
        self.frozen = nn.Linear(DIM, DIM).requires_grad_(False)
        self.norm = nn.BatchNorm1d(DIM)
        self.head = nn.Linear(DIM, 13)
        self.head.weight = self.embedding.weight

    def forward(self, ids_B: torch.Tensor) -> torch.Tensor:
        x_BD = self.embedding(ids_B)
        for block in self.blocks:
            x_BD = block(x_BD)
        return self.head(self.norm(self.frozen(x_BD)))


def prepared(
    kind: str, stage: int, weights: str | None = None, dtype: str = "fp32", offload: dict[str, str] | None = None
) -> tuple[distui.Engine, Any, Any, Any]:
    partition.SMALL_UNIT_NUMEL = 1
    engine = distui.Engine(
        strategy={"zero_stage": stage}, precision={"dtype": dtype}, run={"seed": 5}, offload=offload or {}
    )
    torch.manual_seed(engine.process_index)  # rank 0's must win
    if kind == "cpu":
        model = Model()
    elif kind == "meta":
        with distui.init_empty_weights():
            model = Model()
        assert all(param.is_meta for param in model.parameters())
    else:
        with distui.init_empty_weights(include_buffers=True):
            model = Model()
    before = list(model.parameters())
    block: Any = model.blocks[1]
    tagged = block.linear.weight
    tagged.tag = "kept"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    same, ready = engine.prepare(model, optimizer, weights=weights)
    head: Any = model.head
    assert same is model and head.weight is model.embedding.weight
    assert all(one is other for one, other in zip(nn.Module.parameters(model), before, strict=True))
    assert all(type(param).__name__ == "Parameter" for param in before) and tagged.tag == "kept"
    return engine, model, ready, before


def step(engine: distui.Engine, model: nn.Module, optimizer: Any) -> None:
    model.eval()  # the same result whatever the ranks' shares of the batch
    ids_B = torch.arange(12) % 13
    mine = ids_B.chunk(engine.num_processes)[engine.process_index]
    engine.backward(model(mine).square().mean())
    optimizer.step()
    optimizer.zero_grad()
