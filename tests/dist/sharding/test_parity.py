"""Every stage against plain single-process torch on the same global batch, on an awkward model."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from distui.core.ranks.precision import DTYPES, apply_border_casts
from distui.core.sharding.optim.optim import ShardedOptimizer
from distui.core.sharding.sharded import ShardedModel
from distui.core.sharding.transport.transport import Transport
from distui.core.sharding.units import partition
from tests.dist.sharding.by_hand import Trained, train_by_hand

if TYPE_CHECKING:
    from tests.dist.rank_pool import RunRanks

VOCAB, GLOBAL_BATCH, NUM_STEPS, MAX_NORM = 37, 12, 6, 0.5


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, 2 * dim)
        self.down = nn.Linear(2 * dim, dim, bias=False)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return x_BTD + self.down(F.gelu(self.up(self.norm(x_BTD))))


class AwkwardModel(nn.Module):
    """Tied, frozen, unused, integer and raw-read parameters, a buffer, a block called twice, blocks of two sizes."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        dim = 24
        self.reentrant = reentrant
        self.embedding = nn.Embedding(VOCAB, dim)
        self.position = nn.Parameter(torch.randn(10, dim) * 0.1)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(4))
        self.wide = nn.ModuleList(nn.Linear(dim, dim) for _ in range(2))
        self.frozen = nn.Linear(dim, dim).requires_grad_(False)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, VOCAB, bias=False)
        self.head.weight = self.embedding.weight
        self.integers = nn.Parameter(torch.arange(4), requires_grad=False)
        self.offset: torch.Tensor
        self.register_buffer("offset", torch.randn(dim))

    def _block(self, block: nn.Module, x_BTD: torch.Tensor) -> torch.Tensor:
        if self.reentrant is None:
            return block(x_BTD)
        return checkpoint(block, x_BTD, use_reentrant=self.reentrant)

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        x_BTD = self.embedding(ids_BT) + self.position[: ids_BT.shape[1]]
        for index, block in enumerate(self.blocks):
            x_BTD = self._block(block, x_BTD)
            if index == 1:
                x_BTD = self._block(self.blocks[0], x_BTD)
        for layer in self.wide:
            x_BTD = x_BTD + torch.tanh(layer(x_BTD))
        return self.head(self.norm(self.frozen(x_BTD) + self.offset.to(x_BTD.dtype)))


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    matrices = [param for param in model.parameters() if param.requires_grad and param.dim() > 1]
    vectors = [param for param in model.parameters() if param.requires_grad and param.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=3e-3)


def _batch(step: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, (GLOBAL_BATCH, 9), generator=torch.Generator().manual_seed(step))


def _loss(model: nn.Module, ids_BT: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(ids_BT[:, :-1]).float().flatten(0, 1), ids_BT[:, 1:].flatten())


def _plain(reentrant: bool | None) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = AwkwardModel(reentrant)
    optimizer = _optimizer(model)
    losses, norms = [], []
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        loss = _loss(model, _batch(step))
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM).item())
        optimizer.step()
        losses.append(loss.item())
    return losses, norms, {name: value.clone() for name, value in model.state_dict().items()}


def _group() -> dist.ProcessGroup | None:
    return dist.group.WORLD if dist.is_initialized() else None


def _prepared(stage: int, reentrant: bool | None, dtype: str = "fp32") -> tuple[ShardedModel, ShardedOptimizer]:
    # Ranks start from different weights, and rank 0's must win.
    torch.manual_seed(dist.get_rank() if dist.is_initialized() else 0)
    model = AwkwardModel(reentrant)
    optimizer = _optimizer(model)
    compute = None if dtype == "fp32" else DTYPES[dtype]
    sharded = ShardedModel(model, stage=stage, group=_group(), compute_dtype=compute)
    if compute is not None:
        apply_border_casts(model, compute)
    return sharded, sharded.prepare_optimizer(optimizer)


def _train(sharded: ShardedModel, optimizer: ShardedOptimizer, accumulation: int) -> Trained:
    batches = map(_batch, range(NUM_STEPS))
    return train_by_hand(sharded, optimizer, batches, _loss, accumulation=accumulation, max_norm=MAX_NORM)


def _parity_on_ranks(stage: int) -> None:
    partition.SMALL_UNIT_NUMEL = 1  # a unit a block
    for accumulation, reentrant in itertools.product((1, 2), (None, False, True)):
        # Two times of three even these small collectives go through the peers' memory.
        with mock.patch.object(Transport, "min_read_bytes", 1 << 17 if reentrant is False else 0):
            sharded, optimizer = _prepared(stage, reentrant)
            losses, norms, weights = _train(sharded, optimizer, accumulation)
        plain_losses, plain_norms, plain_weights = _plain(reentrant)
        try:
            torch.testing.assert_close(losses, plain_losses, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(norms, plain_norms, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(weights, plain_weights, atol=1e-4, rtol=1e-4)
        except AssertionError as error:
            raise AssertionError(f"accumulation {accumulation}, reentrant {reentrant}: {error}") from None


REPEATED = ((1, 1), (1, 2), (3, 0), (3, 1), (3, 2))
"""What takes the ways of others: at each stage on two ranks, at stage 3 on an odd number."""


@pytest.mark.parametrize(
    ("num_ranks", "stage"),
    [
        pytest.param(num_ranks, stage, marks=[pytest.mark.matrix] if (num_ranks, stage) in REPEATED else [])
        for num_ranks in (1, 2, 3)
        for stage in (0, 1, 2, 3)
    ],
)
def test_losses_norms_and_weights_are_those_of_plain_torch(run_ranks: RunRanks, stage: int, num_ranks: int) -> None:
    run_ranks(_parity_on_ranks, num_ranks, stage)


def _low_precision_on_ranks(stage: int, dtype: str) -> list[float]:
    partition.SMALL_UNIT_NUMEL = 1
    sharded, optimizer = _prepared(stage, None, dtype)
    assert {unit.master.dtype for unit in sharded.units if unit.trainable} == {torch.float32}
    return _train(sharded, optimizer, 2)[0]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_with_fp32_masters_follows_fp32(run_ranks: RunRanks, stage: int) -> None:
    losses = run_ranks(_low_precision_on_ranks, 2, stage, "bf16")
    assert losses[0] == losses[1]
    torch.testing.assert_close(losses[0], _plain(None)[0], atol=0.03, rtol=0.01)


def _one_rank_skips_a_block(stage: int) -> tuple[list[float], list[float]]:
    """A parameter that only some ranks use still takes part in its collective, in the same order everywhere."""
    partition.SMALL_UNIT_NUMEL = 1
    torch.manual_seed(0)

    class Skipping(AwkwardModel):
        def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
            x_BTD = self.embedding(ids_BT)
            for index, block in enumerate(self.blocks):
                if index == 2 and self.skip:
                    continue
                x_BTD = block(x_BTD)
            return self.head(self.norm(x_BTD))

    def build(skip: bool) -> AwkwardModel:
        torch.manual_seed(0)
        model = Skipping(None)
        model.skip = skip  # type: ignore[assignment]
        return model

    rank = dist.get_rank()
    model = build(False)
    optimizer = _optimizer(model)
    sharded = ShardedModel(model, stage=stage, group=_group())
    prepared = sharded.prepare_optimizer(optimizer)
    plain = [build(False), build(False)]
    plain[1].load_state_dict(plain[0].state_dict())
    plain_optimizer = _optimizer(plain[0])
    losses, expected = [], []
    for step in range(4):
        halves = _batch(step).chunk(2)
        model.skip = rank == 1 and step > 0  # type: ignore[assignment]
        sharded.schedule.hide_gradients()
        loss = _loss(model, halves[rank])
        loss.backward()
        sharded.schedule.end_backward()
        prepared.step()
        prepared.zero_grad()
        dist.all_reduce(loss.detach().div_(2))
        losses.append(loss.item())

        plain_optimizer.zero_grad()
        total = torch.zeros(())
        for part in range(2):
            plain[0].skip = part == 1 and step > 0  # type: ignore[assignment]
            total = total + _loss(plain[0], halves[part]) / 2
        total.backward()
        plain_optimizer.step()
        expected.append(total.item())
    return losses, expected


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_block_that_one_rank_skips(run_ranks: RunRanks, stage: int) -> None:
    for losses, expected in run_ranks(_one_rank_skips_a_block, 2, stage):
        torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-5)


def _weights_between_steps(stage: int) -> None:
    partition.SMALL_UNIT_NUMEL = 1
    sharded, optimizer = _prepared(stage, None)
    _train(sharded, optimizer, 1)
    state = sharded.full_state_dict()
    with sharded.full_parameters() as model:
        for name, param in model.named_parameters():
            torch.testing.assert_close(param.detach(), state[name])
    with sharded.full_parameters(writeback=True) as model, torch.no_grad():
        for param in model.parameters():
            if param.is_floating_point():
                param.mul_(0.5)
    halved = sharded.full_state_dict()
    torch.testing.assert_close(halved["position"], state["position"] * 0.5)
    sharded.load_full_state_dict(state)
    torch.testing.assert_close(sharded.full_state_dict(), state)
    # Evaluation between steps sees the loaded weights.
    with torch.no_grad():
        mine = sharded.model(_batch(0)[:, :-1])
        plain = AwkwardModel(None)
        plain.load_state_dict(state)
        torch.testing.assert_close(mine, plain(_batch(0)[:, :-1]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_weights_are_read_and_written_between_steps(run_ranks: RunRanks, stage: int) -> None:
    run_ranks(_weights_between_steps, 2, stage)


def _exception_in_the_middle(stage: int) -> None:
    partition.SMALL_UNIT_NUMEL = 1
    sharded, optimizer = _prepared(stage, None)
    handle: Any = None

    def fail(grad: torch.Tensor) -> None:
        raise FloatingPointError("in the middle of backward")

    def sabotage(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        output.register_hook(fail)

    handle = sharded.model.blocks[1].register_forward_hook(sabotage)  # type: ignore[union-attr,index]
    with pytest.raises(FloatingPointError):
        _loss(sharded.model, _batch(99)).backward()
    handle.remove()
    optimizer.zero_grad()
    losses, _, weights = _train(sharded, optimizer, 1)
    plain_losses, _, plain_weights = _plain(None)
    torch.testing.assert_close(losses, plain_losses, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(weights, plain_weights, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_step_after_an_exception_works(run_ranks: RunRanks, stage: int) -> None:
    run_ranks(_exception_in_the_middle, 2, stage)
