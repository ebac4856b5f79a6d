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

from distui.core.precision import DTYPES, apply_border_casts
from distui.core.sharding import partition
from distui.core.sharding.optim import ShardedOptimizer
from distui.core.sharding.sharded import ShardedModel
from distui.core.sharding.transport import Transport

if TYPE_CHECKING:
    from tests.dist.ranks import RunRanks

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


def _train(
    sharded: ShardedModel, optimizer: ShardedOptimizer, accumulation: int
) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    rank, num_ranks = sharded.placement.rank, sharded.placement.num_ranks
    size = GLOBAL_BATCH // (num_ranks * accumulation)
    losses, norms = [], []
    for step in range(NUM_STEPS):
        total = torch.zeros(())
        for micro in range(accumulation):
            first = (micro * num_ranks + rank) * size
            sharded.schedule.sync = micro == accumulation - 1
            sharded.schedule.hide_gradients()
            loss = _loss(sharded.model, _batch(step)[first : first + size]) / accumulation
            loss.backward()
            sharded.schedule.end_backward()
            total += loss.detach()
        norm = optimizer.grad_norm(None, 2.0).item()
        if norm > MAX_NORM:
            optimizer.scale_gradients(MAX_NORM / (norm + 1e-6), None)
        optimizer.step()
        optimizer.zero_grad()
        if num_ranks > 1:
            dist.all_reduce(total)
        losses.append(total.item() / num_ranks)
        norms.append(norm)
    return losses, norms, sharded.full_state_dict()


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


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
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


class TwoWays(nn.Module):
    """Uses its layers in one order or the other, or only the first of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(9, 9) for _ in range(3))
        self.way = (0, 1, 2)

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
