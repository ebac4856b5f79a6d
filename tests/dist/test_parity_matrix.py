"""The engine against plain single-process torch on the same global batch, over everything that can be combined.

The default run takes a selection in which every pair of values occurs. All 864 combinations run by

    python -m pytest -m matrix tests/dist/test_parity_matrix.py -s

which prints the table in docs/parity.md. fp32 is compared with one batch in one piece; bf16 and fp16 with plain torch
that computes in the same format, piece by piece as the ranks do, and keeps fp32 weights and gradients.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import distui
from distui.core.precision import DTYPES
from distui.core.sharding import partition
from distui.core.sharding.transport import Transport

if TYPE_CHECKING:
    from tests.dist.ranks import RunRanks

VOCAB, GLOBAL_BATCH, LENGTH, MAX_NORM = 37, 48, 8, 0.5
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


# ---- models ------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A block with a list of its own in it, an unused parameter, and odd sizes."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.ups = nn.ModuleList(nn.Linear(dim, inner) for _ in range(2))
        self.down = nn.Linear(inner, dim, bias=False)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        normed_BTD = self.norm(x_BTD)
        return x_BTD + self.down(F.gelu(self.ups[0](normed_BTD)) * torch.tanh(self.ups[1](normed_BTD)))


class AwkwardModel(nn.Module):
    """Tied, frozen, unused, shared, integer and raw-read parameters, a buffer, a block called twice, uneven units."""

    def __init__(self) -> None:
        super().__init__()
        dim = 23
        self.embedding = nn.Embedding(VOCAB, dim)
        self.position = nn.Parameter(torch.randn(10, dim) * 0.1)
        self.blocks = nn.ModuleList(Block(dim, inner) for inner in (31, 5, 67))
        self.wide = nn.ModuleList(nn.Linear(dim, dim) for _ in range(2))
        self.wide[1].bias = self.wide[0].bias
        self.frozen = nn.Linear(dim, dim).requires_grad_(False)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, VOCAB, bias=False)
        self.head.weight = self.embedding.weight
        self.integers = nn.Parameter(torch.arange(4), requires_grad=False)
        self.offset: torch.Tensor
        self.register_buffer("offset", torch.randn(dim))

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        x_BTD = self.embedding(ids_BT) + self.position[: ids_BT.shape[1]]
        for index in (0, 1, 0, 2):
            x_BTD = self.blocks[index](x_BTD)
        for layer in self.wide:
            x_BTD = x_BTD + torch.tanh(layer(x_BTD))
        return self.head(self.norm(self.frozen(x_BTD) + self.offset.to(x_BTD.dtype)))


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=24, intermediate_size=52, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCAB, n_positions=32, n_embd=24, n_layer=3, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


MODELS: dict[str, Callable[[], nn.Module]] = {"awkward": AwkwardModel, "llama": _llama, "gpt2": _gpt2}


def _built(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return MODELS[name]().train()


def _loss(model: nn.Module, ids_BT: torch.Tensor) -> torch.Tensor:
    out = model(ids_BT[:, :-1])
    logits_BTV = out if isinstance(out, torch.Tensor) else out.logits
    return F.cross_entropy(logits_BTV.float().flatten(0, 1), ids_BT[:, 1:].flatten())


def _batch(step: int) -> torch.Tensor:
    return torch.randint(2, VOCAB, (GLOBAL_BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(step))


# ---- optimizers --------------------------------------------------------------------------------------------------


class Lion(torch.optim.Optimizer):
    """Chen et al., arXiv 2302.06675, a steep tanh for the sign, which flips where a gradient's last bit differs."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    average = self.state[param].setdefault("average", torch.zeros_like(param))
                    param.sub_(torch.tanh(100.0 * torch.lerp(param.grad, average, 0.9)), alpha=group["lr"])
                    average.lerp_(param.grad, 0.01)


class OwnMuon(torch.optim.Optimizer):
    """One optimizer with a group of matrices that it orthogonalises, and one of the rest that it steps like SGD."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                average = self.state[param].setdefault("average", torch.zeros_like(param))
                average.mul_(0.9).add_(param.grad)
                update = self._orthogonal(average) if group["orthogonal"] else average
                param.sub_(update, alpha=group["lr"])

    @staticmethod
    def _orthogonal(matrix: torch.Tensor) -> torch.Tensor:
        x = matrix / (matrix.norm() + 1e-7)
        for _ in range(3):
            x = 1.5 * x - 0.5 * x @ x.T @ x
        return x


def _optimizers(name: str, model: nn.Module) -> list[torch.optim.Optimizer]:
    trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
    matrices = [param for param in trained.values() if param.dim() > 1]
    vectors = [param for param in trained.values() if param.dim() <= 1]
    inner = [param for key, param in trained.items() if param.dim() == 2 and _INNER.search(key)]
    rest = [param for param in trained.values() if not any(param is matrix for matrix in inner)]
    if name == "adamw":
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        return [torch.optim.AdamW(groups, lr=3e-3, eps=1e-6)]
    if name == "adam":
        return [torch.optim.Adam(trained.values(), lr=3e-3, amsgrad=True, eps=1e-6)]
    if name == "sgd":
        return [torch.optim.SGD(trained.values(), lr=0.05, momentum=0.9)]
    if name == "lion":
        return [Lion(trained.values(), lr=1e-3)]
    if name == "muon":
        return [torch.optim.Muon(inner, lr=0.02), torch.optim.AdamW(rest, lr=3e-3, eps=1e-6, weight_decay=0.0)]
    assert name == "own_muon"
    groups = [{"params": inner, "orthogonal": True}, {"params": rest, "orthogonal": False}]
    return [OwnMuon(groups, {"lr": 0.02})]


_INNER = re.compile(r"blocks|layers|\.h\.")
OPTIMIZERS = ("adamw", "sgd", "adam", "lion", "muon", "own_muon")


def _schedulers(optimizers: list[Any]) -> list[Any]:
    return [torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, 1.0, total_iters=3) for optimizer in optimizers]


# ---- both sides --------------------------------------------------------------------------------------------------

Found = tuple[list[float], list[bool], dict[str, torch.Tensor]]
"""Losses, which steps were skipped, weights."""


@functools.cache
def _plain(name: str, dtype: str, accumulation: int, world: int, optimizer: str) -> Found:
    master = _built(name)
    work = master
    if dtype != "fp32":
        work = copy.deepcopy(master)
        for param in work.parameters():
            if param.is_floating_point():
                param.data = param.data.to(DTYPES[dtype])
    pairs = [pair for pair in zip(work.parameters(), master.parameters(), strict=True) if pair[0].requires_grad]
    optimizers = _optimizers(optimizer, master)
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
    model = _built(case.model, seed=engine.process_index)  # rank 0's weights must win
    optimizers = _optimizers(case.optimizer, model)
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
        start = _built(case.model).state_dict()
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
MUON_LIMIT = 0.1
"""torch.optim.Muon orthogonalises in bf16, where the last bit of a gradient may decide a rounding."""


def _hold(deviations: list[Deviation]) -> None:
    for case, loss_off, off, skipped, plain_skipped in deviations:
        loss_limit, limit = LIMITS[case.dtype]
        assert loss_off <= loss_limit and off <= (MUON_LIMIT if case.optimizer == "muon" else limit), (
            case,
            loss_off,
            off,
        )
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
