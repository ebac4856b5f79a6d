"""Real models against plain single-process torch: a transformers Llama and GPT-2 from configs, and usual recipes."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import distui
from distui.core.errors import UserError
from distui.core.sharding.units import partition
from tests.dist.parity_models import gpt2, llama

if TYPE_CHECKING:
    from tests.dist.rank_pool import RunRanks

VOCAB, NUM_STEPS, GLOBAL_BATCH, MAX_NORM = 61, 4, 4, 0.3
Build = Callable[[], nn.Module]


BUILDS: dict[str, Build] = {
    "llama": partial(llama, VOCAB),
    "llama-tied": partial(llama, VOCAB, tied=True),
    "gpt2": partial(gpt2, VOCAB),
}


def _seeded(build: Build, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build()


def _ids(step: int, rows: int = GLOBAL_BATCH) -> torch.Tensor:
    return torch.randint(2, VOCAB, (rows, 8), generator=torch.Generator().manual_seed(step))


def _mine(ids: torch.Tensor) -> torch.Tensor:
    return ids.chunk(dist.get_world_size())[dist.get_rank()]


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    params = [param for param in model.parameters() if param.requires_grad]
    return torch.optim.AdamW(params, lr=3e-3, weight_decay=0.1)


def _recompute(model: Any, reentrant: bool | None) -> None:
    if reentrant is None:
        return
    with warnings.catch_warnings():
        # The name that scripts use; newer releases of transformers ask for another one.
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing_enable.*", category=FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})


Found = dict[str, Any]
Between = Callable[[nn.Module], Any]


def _plain(model: nn.Module, optimizer: torch.optim.Optimizer | None = None, between: Between | None = None) -> Found:
    """Train by plain torch on the whole batch."""
    optimizer = optimizer or _optimizer(model)
    model.train()
    found: Found = {"losses": [], "norms": [], "between": []}
    for step in range(NUM_STEPS):
        ids = _ids(step)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        found["norms"].append(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM).item())
        optimizer.step()
        optimizer.zero_grad()
        found["losses"].append(loss.item())
        if between is not None:
            found["between"].append(between(model))
    found["state"] = dict(model.state_dict())
    return found


def _trained(
    engine: distui.Engine, model: nn.Module, optimizer: torch.optim.Optimizer, between: Between | None = None
) -> Found:
    """Train by the engine, each rank on its rows."""
    model.train()
    found: Found = {"losses": [], "norms": [], "between": []}
    for step in range(NUM_STEPS):
        ids = _mine(_ids(step))
        loss = model(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        norm = engine.clip_grad_norm_(model.parameters(), MAX_NORM)
        assert norm is not None
        found["norms"].append(norm.item())
        optimizer.step()
        optimizer.zero_grad()
        found["losses"].append(engine.reduce(loss.detach(), "mean").item())
        if between is not None:
            found["between"].append(between(model))
    found["state"] = engine.get_state_dict(model)
    return found


def _engine(stage: int, **sections: Any) -> distui.Engine:
    partition.SMALL_UNIT_NUMEL = 1  # a unit a block
    return distui.Engine(strategy={"zero_stage": stage}, **sections)


def _same(found: Found, expected: Found, what: str = "") -> None:
    try:
        torch.testing.assert_close(found["losses"], expected["losses"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found["norms"], expected["norms"], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found["between"], expected["between"], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found["state"], expected["state"], atol=1e-4, rtol=1e-4)
    except AssertionError as error:
        raise AssertionError(f"{what}: {error}") from None


# ---- transformers ------------------------------------------------------------------------------------------------


def _parity(stage: int) -> None:
    for name, build in BUILDS.items():
        expected = _plain(_seeded(build))
        for reentrant in (None, False, True):
            engine = _engine(stage)
            model: nn.Module = _seeded(build, seed=dist.get_rank())  # rank 0's weights must win
            _recompute(model, reentrant)
            model, optimizer = engine.prepare(model, _optimizer(model))
            _same(_trained(engine, model, optimizer), expected, f"{name}, reentrant {reentrant}")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_llama_and_gpt2_train_as_in_plain_torch(run_ranks: RunRanks, stage: int) -> None:
    run_ranks(_parity, 2, stage)


def _generate(model: Any) -> torch.Tensor:
    model.eval()
    ids = model.generate(_ids(50), max_new_tokens=6, do_sample=False)
    model.train()
    return ids


def _evaluate(model: Any) -> float:
    model.eval()
    with torch.no_grad():
        loss = model(input_ids=_ids(51), labels=_ids(51)).loss.item()
    model.train()
    return loss


def _between_steps(stage: int) -> None:
    for name, build in BUILDS.items():
        for between in (_generate, _evaluate):
            expected = _plain(_seeded(build), between=between)
            engine = _engine(stage)
            model, optimizer = engine.prepare(*(lambda model: (model, _optimizer(model)))(_seeded(build)))
            _same(_trained(engine, model, optimizer, between), expected, f"{name}, {between.__name__}")


@pytest.mark.parametrize("stage", [1, 3])
def test_generation_and_evaluation_between_steps(run_ranks: RunRanks, stage: int) -> None:
    run_ranks(_between_steps, 2, stage)


class _LowRank(nn.Module):
    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.base(x_BTD) + self.up(self.down(x_BTD))


def _adapted() -> nn.Module:
    model: Any = BUILDS["llama"]().requires_grad_(False)
    for layer in model.model.layers[1:]:
        layer.self_attn.q_proj = _LowRank(layer.self_attn.q_proj)
        layer.self_attn.v_proj = _LowRank(layer.self_attn.v_proj)
    return model


def _frozen_base(stage: int) -> None:
    expected = _plain(_seeded(_adapted))
    for reentrant in (None, False):
        engine = _engine(stage)
        model = _seeded(_adapted)
        _recompute(model, reentrant)
        model, optimizer = engine.prepare(model, _optimizer(model))
        found = _trained(engine, model, optimizer)
        _same(found, expected, f"reentrant {reentrant}")
        assert sum(buffer["exp_avg"].numel() for buffer in optimizer.state.values()) < 1000


@pytest.mark.parametrize("stage", [2, 3])
def test_adapters_on_a_frozen_base(run_ranks: RunRanks, stage: int) -> None:
    run_ranks(_frozen_base, 2, stage)


# ---- averages ----------------------------------------------------------------------------------------------------


def _averages(stage: int) -> None:
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    def average_of(model: nn.Module) -> Any:
        return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))

    plain = _seeded(partial(llama, VOCAB, tied=True))
    plain_average = average_of(plain)
    _plain(plain, between=plain_average.update_parameters)
    engine = _engine(stage)
    model = _seeded(partial(llama, VOCAB, tied=True))
    model, optimizer = engine.prepare(model, _optimizer(model))
    with engine.full_parameters(model):
        average = average_of(model)

    def update(model: nn.Module) -> None:
        with engine.full_parameters(model):
            average.update_parameters(model)

    between: Between = update if stage == 3 else average.update_parameters
    _trained(engine, model, optimizer, between)
    torch.testing.assert_close(dict(average.state_dict()), dict(plain_average.state_dict()), atol=1e-4, rtol=1e-4)
    # The average is a model of its own: it runs without the collectives of the one it was copied from.
    own = {id(param) for param in average.module.parameters()}
    assert own.isdisjoint(id(param) for param in model.parameters())
    if engine.is_main_process:
        expected = _evaluate(plain_average.module)
        assert _evaluate(average.module) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_an_exponential_average_of_the_weights(run_ranks: RunRanks, stage: int) -> None:
    run_ranks(_averages, 2, stage)


# ---- guards and the compiler --------------------------------------------------------------------------------------


def _guarded(stage: int) -> list[str]:
    """Reading or copying slots, or losing what was loaded, is refused or made right."""
    engine = _engine(stage, precision={"dtype": "bf16"})
    model = _seeded(BUILDS["gpt2"])
    model, optimizer = engine.prepare(model, _optimizer(model))
    state = engine.get_state_dict(model)
    zeros = {name: torch.zeros_like(value) for name, value in state.items()}
    refused = []
    for act in (copy.deepcopy, lambda model: model.state_dict(), lambda model: model.load_state_dict(zeros)):
        try:
            act(model)
        except UserError as error:
            refused.append(error.what)
    with engine.full_parameters(model, writeback=True):
        model.load_state_dict(zeros)
        copied = copy.deepcopy(model)
        pickle.loads(pickle.dumps(model))
    assert not any(param.any() for param in copied.parameters())
    # The masters took what was loaded: the next step starts from it.
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    ids = _mine(_ids(0))
    engine.backward(model(input_ids=ids, labels=ids).loss)
    optimizer.step()
    assert not any(value.any() for value in engine.get_state_dict(model).values())
    if stage < 3:
        ones = {name: torch.ones_like(value) for name, value in state.items()}
        model.load_state_dict(ones)
        assert all(torch.equal(value, ones[name]) for name, value in engine.get_state_dict(model).items())
    return refused


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_sharded_weights_are_never_silently_wrong(run_ranks: RunRanks, stage: int) -> None:
    names = ["deepcopy", "state_dict", "load_state_dict"] if stage == 3 else []
    for refused in run_ranks(_guarded, 2, stage):
        assert [what.split()[0] for what in refused] == names


def _compiled(stage: int) -> None:
    # The compiler asks every tensor for its gradient and hides the warning, which comes first where it is an error.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf Tensor")
    import torch._dynamo

    expected = _plain(_seeded(BUILDS["gpt2"]))
    for before_prepare in (False, True) if stage == 3 else (True,):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        engine = _engine(stage)
        model: Any = _seeded(BUILDS["gpt2"])
        optimizer = _optimizer(model)
        if not before_prepare:
            model, optimizer = engine.prepare(model, optimizer)
        for block in model.transformer.h:
            block.compile(backend="aot_eager")
        if before_prepare:
            model, optimizer = engine.prepare(model, optimizer)
        _same(_trained(engine, model, optimizer), expected, f"before prepare {before_prepare}")
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 3


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.matrix), 3])
def test_compiled_blocks(run_ranks: RunRanks, stage: int) -> None:
    run_ranks(_compiled, 2, stage)
