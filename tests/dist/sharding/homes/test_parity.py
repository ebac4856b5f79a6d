"""States at home in host memory or on NVMe: the same losses, norms and weights as on the device, and as plain torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from distui.core.ranks.precision import DTYPES, apply_border_casts
from distui.core.sharding.homes.homes import Offload
from distui.core.sharding.optim.optim import ShardedOptimizer
from distui.core.sharding.sharded import ShardedModel
from distui.core.sharding.units import partition
from tests.dist.sharding.by_hand import Trained, train_by_hand

if TYPE_CHECKING:
    from tests.dist.rank_pool import RunRanks

VOCAB, DIM, GLOBAL_BATCH, NUM_STEPS, MAX_NORM = 37, 40, 8, 4, 0.3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.up = nn.Linear(DIM, 3 * DIM)
        self.down = nn.Linear(3 * DIM, DIM, bias=False)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return x_BTD + self.down(F.gelu(self.up(self.norm(x_BTD))))


class Model(nn.Module):
    """Tied and frozen parameters, blocks in two groups of an optimizer, a root larger than a block."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, DIM)
        self.blocks = nn.ModuleList(Block() for _ in range(5))
        self.frozen = nn.Linear(DIM, DIM).requires_grad_(False)
        self.head = nn.Linear(DIM, VOCAB, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        x_BTD = self.embedding(ids_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.head(self.frozen(x_BTD))


def _build(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Model()
    matrices = [param for param in model.parameters() if param.requires_grad and param.dim() > 1]
    vectors = [param for param in model.parameters() if param.requires_grad and param.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return model, torch.optim.AdamW(groups, lr=3e-3)


def _batch(step: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, (GLOBAL_BATCH, 9), generator=torch.Generator().manual_seed(step))


def _loss(model: nn.Module, ids_BT: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(ids_BT[:, :-1]).float().flatten(0, 1), ids_BT[:, 1:].flatten())


def _plain() -> Trained:
    model, optimizer = _build(0)
    losses, norms = [], []
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        loss = _loss(model, _batch(step))
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM).item())
        optimizer.step()
        losses.append(loss.item())
    return losses, norms, {name: value.clone() for name, value in model.state_dict().items()}


def _prepared(stage: int, dtype: str, offload: Offload | None) -> tuple[ShardedModel, ShardedOptimizer]:
    partition.SMALL_UNIT_NUMEL = 1
    model, optimizer = _build(dist.get_rank() if dist.is_initialized() else 0)
    compute = None if dtype == "fp32" else DTYPES[dtype]
    group = dist.group.WORLD if dist.is_initialized() else None
    sharded = ShardedModel(model, stage=stage, group=group, compute_dtype=compute, offload=offload)
    if compute is not None:
        apply_border_casts(model, compute)
    return sharded, sharded.prepare_optimizer(optimizer)


def _train(sharded: ShardedModel, optimizer: ShardedOptimizer, accumulation: int, steps: range) -> Trained:
    batches = map(_batch, steps)
    return train_by_hand(sharded, optimizer, batches, _loss, accumulation=accumulation, max_norm=MAX_NORM)


HOMES = [("cpu", "none"), ("nvme", "none"), ("none", "nvme"), ("cpu", "cpu"), ("nvme", "nvme")]


def _cases(stage: int) -> list[tuple[str, str]]:
    return [homes for homes in HOMES if stage == 3 or homes[1] == "none"]


def _parity_on_ranks(stage: int, folder: str) -> None:
    plain = _plain()
    for dtype, accumulation in (("fp32", 2), ("bf16", 1)):
        on_device = _train(*_prepared(stage, dtype, None), accumulation, range(NUM_STEPS))
        for optimizer_home, params_home in _cases(stage):
            sharded, optimizer = _prepared(stage, dtype, Offload(optimizer_home, params_home, folder))
            found = _train(sharded, optimizer, accumulation, range(NUM_STEPS))
            try:
                torch.testing.assert_close(found, on_device, atol=1e-6, rtol=1e-5)
                if dtype == "fp32":
                    torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-4)
            except AssertionError as error:
                case = f"{dtype}, accumulation {accumulation}, homes {optimizer_home} {params_home}"
                raise AssertionError(f"{case}: {error}") from None
    assert not list(Path(folder).iterdir()), "the swap files have no name"


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_losses_norms_and_weights_are_those_without_offload(
    run_ranks: RunRanks, tmp_path: Path, stage: int, num_ranks: int
) -> None:
    run_ranks(_parity_on_ranks, num_ranks, stage, str(tmp_path))
