"""The engine against plain single-process torch on the same global batch, over everything that can be combined.

The default run takes a selection in which every pair of values occurs. All 864 combinations run by

    python -m pytest -m matrix tests/dist/engine/test_parity_matrix.py -s

which prints the table in docs/parity.md. fp32 is compared with one batch in one piece; bf16 and fp16 with plain torch
that computes in the same format, piece by piece as the ranks do, and keeps fp32 weights and gradients.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import distui
from distui.core.ranks.precision import DTYPES
from distui.core.sharding.transport.transport import Transport
from distui.core.sharding.units import partition
from tests.dist.parity_models import MODELS, OPTIMIZERS, VOCAB, built, make_optimizers

if TYPE_CHECKING:
    from tests.dist.rank_pool import RunRanks

GLOBAL_BATCH, LENGTH, MAX_NORM = 48, 8, 0.5
NUM_STEPS = {"fp32": 3, "bf16": 3, "fp16": 7}
LOSS_SCALES = {"awkward": 2.0**19, "llama": 2.0**22, "gpt2": 2.0**22}
"""High enough that the first steps overflow in fp16."""
SCALE_WINDOW = 2

STAGES, DTYPE_NAMES, ACCUMULATIONS = (0, 1, 2, 3), ("fp32", "bf16", "fp16"), (1, 4)
RECOMPUTED, WORLDS = ("none", "full", "selective"), (1, 2, 3, 4)


@dataclass(frozen=True)
class Case:
    """One combination."""

    model: str
    stage: int
    dtype: str
    accumulation: int
    recomputed: str
    world: int
    optimizer: str


def _loss(model: nn.Module, ids_BT: torch.Tensor) -> torch.Tensor:
    out = model(ids_BT[:, :-1])
    logits_BTV = out if isinstance(out, torch.Tensor) else out.logits
    return F.cross_entropy(logits_BTV.float().flatten(0, 1), ids_BT[:, 1:].flatten())


def _batch(step: int) -> torch.Tensor:
    return torch.randint(2, VOCAB, (GLOBAL_BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(step))


# ---- both sides --------------------------------------------------------------------------------------------------


def _schedulers(optimizers: list[Any]) -> list[Any]:
    return [torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, 1.0, total_iters=3) for optimizer in optimizers]


Found = tuple[list[float], list[bool], dict[str, torch.Tensor]]
"""Losses, which steps were skipped, weights."""


@functools.cache
def _plain(name: str, dtype: str, accumulation: int, world: int, optimizer: str) -> Found:
    master = built(name)
    work = master
    if dtype != "fp32":
        work = copy.deepcopy(master)
        for param in work.parameters():
            if param.is_floating_point():
                param.data = param.data.to(DTYPES[dtype])
    pairs = [pair for pair in zip(work.parameters(), master.parameters(), strict=True) if pair[0].requires_grad]
    optimizers = make_optimizers(optimizer, master)
    schedulers = _schedulers(optimizers)
    scaler = torch.amp.GradScaler(
        "cpu", init_scale=LOSS_SCALES[name], growth_interval=SCALE_WINDOW, enabled=dtype == "fp16"
    )
    losses, skipped = [], []
    for step in range(NUM_STEPS[dtype]):
        total = 0.0
        for rows in _batch(step).chunk(accumulation * world):
            loss = _loss(work, rows) / accumulation
            scaler.scale(loss).backward()
            total += loss.item() / world
            if work is not master:
                for param, kept in pairs:
                    if param.grad is not None:
                        grad, param.grad = param.grad.float() / world, None
                        kept.grad = grad if kept.grad is None else kept.grad.add_(grad)
        for each in optimizers:
            scaler.unscale_(each)
        norm = nn.utils.clip_grad_norm_(master.parameters(), MAX_NORM)
        overflow = not bool(torch.isfinite(norm))
        for each in optimizers:
            if not overflow:  # GradScaler would step one of two optimizers, and skip the other
                scaler.step(each)
            each.zero_grad()
        scaler.update()
        for scheduler in schedulers if not overflow else ():
            scheduler.step()
        if work is not master:
            with torch.no_grad():
                for param, kept in pairs:
                    param.copy_(kept)
        losses.append(total)
        skipped.append(overflow)
    return losses, skipped, {key: value.detach().clone() for key, value in master.state_dict().items()}


def _trained(case: Case) -> Found:
    partition.SMALL_UNIT_NUMEL = 1  # a unit a block
    scaling = {"initial_loss_scale": LOSS_SCALES[case.model], "loss_scale_window": SCALE_WINDOW}
    engine = distui.Engine(
        strategy={"zero_stage": case.stage},
        batch={"accumulation": case.accumulation},
        precision={"dtype": case.dtype, **scaling},
        activation_checkpointing={"mode": case.recomputed},
    )
    model = built(case.model, seed=engine.process_index)  # rank 0's weights must win
    optimizers = make_optimizers(case.optimizer, model)
    model, *prepared = engine.prepare(model, *optimizers, *_schedulers(optimizers))
    losses, skipped = [], []
    for step in range(NUM_STEPS[case.dtype]):
        pieces = _batch(step).chunk(engine.num_processes * case.accumulation)
        total = torch.zeros(())
        for micro in range(case.accumulation):
            with engine.accumulate(model):
                loss = _loss(model, pieces[micro * engine.num_processes + engine.process_index])
                engine.backward(loss)
                engine.clip_grad_norm_(model.parameters(), MAX_NORM)
                for optimizer in prepared[: len(optimizers)]:
                    optimizer.step()
                for scheduler in prepared[len(optimizers) :]:
                    scheduler.step()
                for optimizer in prepared[: len(optimizers)]:
                    optimizer.zero_grad()
            total += loss.detach() / case.accumulation
        losses.append(engine.reduce(total, "mean").item())
        skipped.append(engine.optimizer_step_was_skipped)
    assert engine.clock.step == NUM_STEPS[case.dtype]
    state = engine.get_state_dict(model)
    engine.free_memory()
    return losses, skipped, state


Deviation = tuple[Case, float, float, list[bool], list[bool]]


def _deviations(cases: list[Case]) -> list[Deviation]:
    """Return of each case how far losses and weights are off (weights relative to how far training moved them)."""
    found = []
    for case in cases:
        # Every other case sends even these small tensors through the peers' memory, as large ones are.
        with mock.patch.object(Transport, "min_read_bytes", 0 if case.accumulation > 1 else 1 << 17):
            losses, skipped, state = _trained(case)
        if dist.is_initialized() and dist.get_rank():
            continue
        pieces = (1, 1) if case.dtype == "fp32" else (case.accumulation, case.world)
        plain_losses, plain_skipped, plain_state = _plain(case.model, case.dtype, *pieces, case.optimizer)
        start = built(case.model).state_dict()
        assert list(state) == list(plain_state)
        for key in [key for key in start if key.startswith("frozen")]:
            # What does not train is kept in the format that computes.
            assert torch.equal(state.pop(key).float(), start.pop(key).to(DTYPES[case.dtype]).float())
        moved = math.sqrt(sum(_apart(plain_state[key], start[key]) for key in start))
        off = math.sqrt(sum(_apart(plain_state[key], state[key]) for key in start))
        loss_off = max(abs(one - other) for one, other in zip(losses, plain_losses, strict=True))
        found.append((case, loss_off, off / moved, skipped, plain_skipped))
    return found


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one.double() - other.double()).square().sum().item()


LIMITS = {"fp32": (1e-5, 1e-4), "bf16": (1e-3, 1e-2), "fp16": (1e-3, 1e-2)}
"""Largest difference of a loss, and of the weights relative to how far training moved them.

In 16 bits a rounding may go the other way.
"""
MUON_LIMITS = (1e-3, 0.1)
"""torch.optim.Muon orthogonalises in bf16, where the last bit of a gradient may decide a rounding.

Plain torch against itself, with that bit of each gradient changed (6e-8 of it), has a loss that is off by 8e-5.
"""


def _hold(deviations: list[Deviation]) -> None:
    for case, loss_off, off, skipped, plain_skipped in deviations:
        loss_limit, limit = MUON_LIMITS if case.optimizer == "muon" else LIMITS[case.dtype]
        assert loss_off <= loss_limit and off <= limit, (case, loss_off, off)
        assert skipped == plain_skipped, case
        assert any(skipped) == (case.dtype == "fp16") and not all(skipped), (case, skipped)


# ---- which -------------------------------------------------------------------------------------------------------


def _pairwise(world: int) -> list[Case]:
    """Return a share of cases that together hold every pair of values."""
    axes: list[tuple[Any, ...]] = [
        tuple(MODELS), STAGES, DTYPE_NAMES, ACCUMULATIONS, RECOMPUTED, WORLDS, OPTIMIZERS
    ]  # fmt: skip
    pairs = {
        ((a, one), (b, other))
        for a, b in itertools.combinations(range(len(axes)), 2)
        for one in axes[a]
        for other in axes[b]
    }
    everything = list(itertools.product(*axes))
    random.Random(0).shuffle(everything)
    chosen = []
    while pairs:
        candidates = everything[:: max(1, len(everything) // 400)]
        best = max(candidates, key=lambda values: len(pairs.intersection(itertools.combinations(enumerate(values), 2))))
        covered = pairs.intersection(itertools.combinations(enumerate(best), 2))
        if not covered:
            one, other = sorted(pairs)[0]
            best = next(v for v in everything if v[one[0]] == one[1] and v[other[0]] == other[1])
            covered = pairs.intersection(itertools.combinations(enumerate(best), 2))
        pairs -= covered
        chosen.append(Case(*best))
    return [case for case in chosen if case.world == world]


@pytest.mark.parametrize("world", WORLDS)
def test_every_pair_of_settings_trains_as_plain_torch(run_ranks: RunRanks, world: int) -> None:
    _hold(run_ranks(_deviations, world, _pairwise(world))[0])


def _all(world: int, dtype: str, model: str) -> list[Case]:
    combinations = itertools.product(STAGES, ACCUMULATIONS, RECOMPUTED)
    shift = WORLDS.index(world) + DTYPE_NAMES.index(dtype) + list(MODELS).index(model)
    return [
        Case(model, stage, dtype, accumulation, recomputed, world, OPTIMIZERS[(number + shift) % len(OPTIMIZERS)])
        for number, (stage, accumulation, recomputed) in enumerate(combinations)
    ]


@pytest.mark.matrix
@pytest.mark.timeout(600)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize("world", WORLDS)
def test_all_settings_train_as_plain_torch(run_ranks: RunRanks, world: int, dtype: str, model: str) -> None:
    deviations = run_ranks(_deviations, world, _all(world, dtype, model), timeout_s=590.0)[0]
    _hold(deviations)
    loss_off = max(one[1] for one in deviations)
    muon_off = max(one[2] for one in deviations if one[0].optimizer == "muon")
    off = max(one[2] for one in deviations if one[0].optimizer != "muon")
    figures = f"{loss_off:.1e} | {off:.1e} | {muon_off:.1e} | {sum(sum(one[3]) for one in deviations)}"
    print(f"| {model} | {dtype} | {world} | {len(deviations)} | {figures} |")
