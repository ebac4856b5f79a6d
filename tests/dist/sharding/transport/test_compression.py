"""Compressed communication: near the exact run, equal on all ranks to the last bit, fewer bytes, nothing hidden."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from distui.core.errors import UserError
from distui.core.sharding.sharded import ShardedModel
from distui.core.sharding.transport.compression import CompressedTransport, Compression, Formats
from distui.core.sharding.units import partition
from distui.core.sharding.units.pool import BufferPool

if TYPE_CHECKING:
    from tests.dist.rank_pool import RunRanks

VOCAB, DIM = 31, 24


class Model(nn.Module):
    """Blocks, a tied head, an embedding with rows that no batch has, and a parameter that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB + 5, DIM)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(DIM, DIM), nn.LayerNorm(DIM)) for _ in range(3))
        nn.init.normal_(self.embedding.weight, std=0.3)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        x_BTD = self.embedding(ids_BT)
        for block in self.blocks:
            x_BTD = x_BTD + torch.tanh(block(x_BTD))
        return F.linear(x_BTD, self.embedding.weight)


def _loss(model: nn.Module, step: int, rank: int, num_ranks: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    first_BT = torch.randint(0, VOCAB, (12, 1), generator=generator)
    ids_BT = (first_BT + 3 * torch.arange(9)) % VOCAB  # each follows from the one before
    ids_BT = ids_BT.chunk(num_ranks)[rank]
    return F.cross_entropy(model(ids_BT[:, :-1]).float().flatten(0, 1), ids_BT[:, 1:].flatten())


def _build(stage: int, compression: Compression | None, lr: float = 5e-3) -> tuple[ShardedModel, Any]:
    partition.SMALL_UNIT_NUMEL = 1
    torch.manual_seed(0)
    model = Model()
    group = dist.group.WORLD if dist.is_initialized() else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99))
    sharded = ShardedModel(model, stage=stage, group=group, compression=compression)
    return sharded, sharded.prepare_optimizer(optimizer)


def _train(sharded: ShardedModel, optimizer: Any, num_steps: int, accumulation: int = 1) -> list[float]:
    rank, num_ranks = sharded.placement.rank, sharded.placement.num_ranks
    losses = []
    for step in range(num_steps):
        for micro in range(accumulation):
            sharded.schedule.sync = micro == accumulation - 1
            sharded.schedule.hide_gradients()
            loss = _loss(sharded.model, step * accumulation + micro, rank, num_ranks)
            (loss / accumulation).backward()
            sharded.schedule.end_backward()
        norm = optimizer.grad_norm(None, 2.0).item()
        if norm > 5.0:
            optimizer.scale_gradients(5.0 / norm, None)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if num_ranks > 1:
            dist.all_reduce(mean)
        losses.append(mean.item() / num_ranks)
    return losses


def _same_on_all_ranks(sharded: ShardedModel) -> None:
    state = torch.cat([value.flatten().float() for value in sharded.full_state_dict().values()])
    of_rank_0 = state.clone()
    dist.broadcast(of_rank_0, 0)
    assert torch.equal(state, of_rank_0)
    # And what forward computes with, where that is another copy.
    loss = _loss(sharded.model, 0, 0, 1).detach()
    of_rank_0 = loss.clone()
    dist.broadcast(of_rank_0, 0)
    assert torch.equal(loss, of_rank_0)


CASES: list[tuple[int, Compression]] = [
    (0, Compression("int8", block=64)),
    (0, Compression("fp8", block=64)),
    (1, Compression("int8", block=64)),
    (2, Compression("fp8", block=64)),
    (3, Compression("int8", "int8", block=64)),
    (0, Compression("onebit", warmup_steps=10)),
]


def _near_exact(num_steps: int, accumulation: int, cases: list[tuple[int, Compression]]) -> None:
    exact, optimizer = _build(0, None)
    expected = _train(exact, optimizer, num_steps, accumulation)[-1]
    full = exact.sent_bytes
    for stage, compression in cases:
        sharded, optimizer = _build(stage, compression)
        losses = _train(sharded, optimizer, num_steps, accumulation)
        name = (stage, compression.gradients, losses[-1], expected)
        apart = 0.15 if compression.gradients == "onebit" else 0.02
        assert losses[-1] == pytest.approx(expected, rel=0.05, abs=apart), name
        assert losses[-1] < 0.5 * losses[0], name
        assert sharded.sent_bytes < full * (0.75 if stage != 2 or accumulation == 1 else 1.2), (name, full)
        _same_on_all_ranks(sharded)
        for unit in sharded.units:
            base, end = unit.layout.shard(unit.rank)
            for low, high in unit.layout.gaps:
                assert not unit.master[max(low - base, 0) : max(min(high, end) - base, 0)].any()
        if compression.gradients == "onebit":
            rows = sharded.full_state_dict()["embedding.weight"][VOCAB:]
            assert optimizer.onebit.frozen and rows.isfinite().all() and rows.abs().max() < 10


@pytest.mark.parametrize(
    ("num_ranks", "cases"), [pytest.param(2, CASES, marks=pytest.mark.matrix), (3, CASES[3:])], ids=["2", "3"]
)
def test_training_is_near_the_exact_run_and_the_same_on_all_ranks(
    run_ranks: RunRanks, num_ranks: int, cases: list[tuple[int, Compression]]
) -> None:
    run_ranks(_near_exact, num_ranks, 40, num_ranks - 1, cases)


def test_one_rank_is_exact(run_ranks: RunRanks) -> None:
    run_ranks(_as_without_compression, 1)  # on one thread: several add in another order when the machine is busy


def _as_without_compression() -> None:
    sharded, optimizer = _build(0, None)
    expected = _train(sharded, optimizer, 5)
    for stage, compression in CASES:
        sharded, optimizer = _build(stage, compression)
        assert _train(sharded, optimizer, 5) == expected


def _onebit_bytes() -> tuple[float, float]:
    sharded, optimizer = _build(0, Compression("onebit", warmup_steps=3))
    sent, before = [], 0
    for _ in range(6):
        _train(sharded, optimizer, 1)
        sent.append(sharded.sent_bytes - before)
        before = sharded.sent_bytes
    assert sent[0] == sent[1] == sent[2] and sent[3] == sent[4] == sent[5]
    return sent[0], sent[5]


def test_after_the_warmup_a_step_sends_a_fifth_at_most(run_ranks: RunRanks) -> None:
    for exact, onebit in run_ranks(_onebit_bytes, 2):
        assert onebit * 5 < exact


def _sums(ranks_per_node: int | None, form: Any) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    group = dist.group.WORLD
    assert group is not None
    transport = CompressedTransport(group, "test", BufferPool(), Formats(form, form, 32, ranks_per_node))
    assert bool(transport.hops) == (ranks_per_node is not None)
    for size in (1, 7, 33, 257):
        everyone = [torch.randn(size * ranks, generator=torch.Generator().manual_seed(r)) for r in range(ranks)]
        exact = torch.stack(everyone).sum(0)
        bound = ranks * 2 * max(e.abs().max().item() for e in everyone) * (1 / 127 if form == "int8" else 1 / 14)
        shard = torch.full((size,), 2.0)
        transport.reduce_scatter(everyone[rank].clone(), shard, accumulate=True).wait()
        mine = exact.view(ranks, size)[rank]
        assert (shard - 2.0 - mine).abs().max() <= bound
        inside = everyone[rank].clone()
        transport.reduce_scatter(inside, inside.view(ranks, size)[rank]).wait()
        torch.testing.assert_close(inside.view(ranks, size)[rank], shard - 2.0, atol=1e-5, rtol=1e-5)
        whole = everyone[rank][: size * ranks - ranks + 1].clone()  # a size that the ranks do not divide
        transport.sum_gradient(whole).wait()
        assert (whole - exact[: whole.numel()]).abs().max() <= 2 * bound
        of_rank_0 = whole.clone()
        dist.broadcast(of_rank_0, 0)
        assert torch.equal(whole, of_rank_0)
    # Several at once, waited for in order; and what is not finite is seen by all.
    gradients = [torch.full((40,), float(index + 1)) for index in range(3)]
    gradients[1][rank] = [float("nan"), float("inf"), 1.0, 1.0][rank]
    pending = [transport.sum_gradient(gradient) for gradient in gradients]
    for one in pending:
        one.wait()
        one.wait()
    torch.testing.assert_close(gradients[2], torch.full((40,), 3.0 * ranks), rtol=0.08, atol=0)
    assert not gradients[1].isfinite().all()
    exact_sum = torch.tensor(1.0 / 3.0)
    transport.all_reduce(exact_sum).wait()
    assert exact_sum.item() == pytest.approx(ranks / 3.0, rel=1e-6)
    weights = torch.empty(ranks * 5)
    transport.gather_weights(weights, torch.arange(5.0) + rank).wait()
    expected = torch.cat([torch.arange(5.0) + r for r in range(ranks)])
    torch.testing.assert_close(weights, expected, atol=0.3, rtol=0.07)


@pytest.mark.parametrize(("num_ranks", "per_node", "form"), [(3, None, "int8"), (4, 2, "int8"), (4, 2, "fp8")])
def test_sums_of_odd_sizes_in_one_and_two_hops(run_ranks: RunRanks, num_ranks: int, per_node: Any, form: str) -> None:
    run_ranks(_sums, num_ranks, per_node, form)


def _engine(folder: str, num_steps: int, gradients: str = "onebit", dtype: str = "fp32", poison: int = -1) -> Any:
    import distui

    partition.SMALL_UNIT_NUMEL = 1
    torch.manual_seed(0)
    engine = distui.Engine(
        compression={"gradients": gradients, "warmup_steps": 4},
        precision={"dtype": dtype, "initial_loss_scale": 64.0},
        optimizer={"max_grad_norm": 1.0},
        run={"dir": folder},
    )
    model = Model()
    model, optimizer = engine.prepare(model, torch.optim.AdamW(model.parameters(), lr=5e-3))
    if Path(folder, "saved").exists():
        engine.load_state(str(Path(folder, "saved")))
    losses = []
    while engine.clock.step < num_steps:
        loss = _loss(model, engine.clock.step, engine.process_index, engine.num_processes)
        losses.append(loss.item())
        bad = engine.clock.step == poison and engine.process_index == 1
        engine.backward(loss * (float("inf") if bad else 1.0))
        optimizer.step()
        assert optimizer.step_was_skipped == (engine.clock.step == poison + 1 and poison >= 0)
        optimizer.zero_grad()
    return engine, optimizer, losses


def _resume(folder: str) -> None:
    rest = _engine(folder, 12)[2][8:]
    engine, optimizer, _ = _engine(folder, 8)
    engine.save_state(str(Path(folder, "saved")))
    assert any(packet.worker_error.any() for packet in optimizer.onebit._packets)
    engine, optimizer, again = _engine(folder, 12)
    assert again == rest  # to the last bit: the error feedback came back too
    assert optimizer.onebit.frozen_at == 4


def _resume_elsewhere(folder: str) -> tuple[float, int]:
    _, optimizer, losses = _engine(folder, 12)
    return sum(losses) / len(losses), optimizer.onebit.frozen_at if optimizer.onebit else 0


def test_a_checkpoint_keeps_the_error_feedback_or_begins_it_again(run_ranks: RunRanks) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(_resume, 2, folder)
        more = run_ranks(_resume_elsewhere, 3, folder)
        assert {frozen_at for _, frozen_at in more} == {4}
        assert all(loss < 3.4 for loss, _ in more)
        assert run_ranks(_resume_elsewhere, 1, folder)[0][0] < 3.4


def _overflow(gradients: str, dtype: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        engine, _, losses = _engine(folder, 9, gradients, dtype, poison=6)
        assert engine.scaler is not None and engine.scaler.num_skipped == 1
        assert all(loss == loss for loss in losses) and losses[-1] < losses[0]


@pytest.mark.parametrize("gradients", ["onebit", "int8"])
def test_fp16_skips_the_step_of_an_overflow_on_one_rank(run_ranks: RunRanks, gradients: str) -> None:
    run_ranks(_overflow, 2, gradients, "fp16")


def _refused() -> None:
    options: Any
    for optimizer_class, options in ((torch.optim.SGD, {}), (torch.optim.Adam, {"amsgrad": True})):
        model = Model()
        sharded = ShardedModel(model, stage=0, group=dist.group.WORLD, compression=Compression("onebit"))
        with pytest.raises(UserError, match="onebit"):
            sharded.prepare_optimizer(optimizer_class(model.parameters(), lr=0.1, **options))
    model = Model()
    sharded = ShardedModel(model, stage=1, group=dist.group.WORLD, compression=Compression("onebit"))
    with pytest.raises(UserError, match="whole momentum"):
        sharded.prepare_optimizer(torch.optim.Adam(model.parameters()))
    model = Model()
    sharded = ShardedModel(model, stage=0, group=dist.group.WORLD, compression=Compression("onebit"))
    first, *others = model.parameters()
    sharded.prepare_optimizer(torch.optim.Adam([first]))
    with pytest.raises(UserError, match="several optimizers"):
        sharded.prepare_optimizer(torch.optim.Adam(others))


def _steps_without_a_gradient() -> None:
    engine, optimizer, _ = _engine("unsaved", 7)
    assert optimizer.onebit.frozen
    (model,) = engine._models
    before = engine.get_state_dict(model)
    optimizer.step()
    after = engine.get_state_dict(model)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_step_without_a_gradient_changes_nothing_after_the_warmup(run_ranks: RunRanks) -> None:
    run_ranks(_steps_without_a_gradient, 2)


def test_what_has_no_variance_to_freeze_is_refused(run_ranks: RunRanks) -> None:
    run_ranks(_refused, 2)
