"""Optimizers prepared late, never, or for two models, and groups added later: plain torch's numbers, or loud."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from distui.core.engine.engine import Engine
from distui.core.errors import UserError

if TYPE_CHECKING:
    from tests.dist.rank_pool import RunRanks

Params = Any


def _model() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)), nn.Linear(6, 1))


def _batches(step: int, world: int) -> list[torch.Tensor]:
    return [torch.full((2, 6), 0.3 + step + 0.7 * rank) for rank in range(world)]


def _train(engine: Engine, model: nn.Module, optimizer: Any, plain: nn.Module, plain_optimizer: Any, step: int) -> None:
    batches = _batches(step, engine.num_processes)
    engine.backward(model(batches[engine.process_index]).float().pow(2).mean())
    optimizer.step()
    optimizer.zero_grad()
    plain(torch.cat(batches)).pow(2).mean().backward()
    plain_optimizer.step()
    plain_optimizer.zero_grad()


def _same(engine: Engine, model: nn.Module, plain: nn.Module) -> None:
    for name, value in engine.get_state_dict(model).items():
        torch.testing.assert_close(value, plain.state_dict()[name], rtol=1e-4, atol=1e-6)


def _left_out(folder: str) -> list[str]:
    told: list[str] = []
    every: tuple[dict[str, Any], ...] = (
        {"strategy": {"zero_stage": 0}},
        {"strategy": {"zero_stage": 0, "backend": "ddp"}},
        {"strategy": {"zero_stage": 0}, "optimizer": {"max_grad_norm": 0.1}},
        {"strategy": {"zero_stage": 0}, "precision": {"dtype": "bf16"}},
        {"strategy": {"zero_stage": 0, "backend": "ddp"}, "precision": {"dtype": "fp16"}},
        *({"strategy": {"zero_stage": stage}} for stage in (1, 2, 3)),
        {"strategy": {"zero_stage": 3, "backend": "fsdp2"}},
    )
    for settings in every:
        engine, model = Engine(**settings), _model()
        plain = copy.deepcopy(model)
        optimizer, plain_optimizer = (torch.optim.AdamW(m.parameters(), lr=0.1) for m in (model, plain))
        model = engine.prepare(model)
        try:
            for step in range(3):
                _train(engine, model, optimizer, plain, plain_optimizer, step)
            _same(engine, model, plain)
            engine.save_state(f"{folder}/{len(told)}")  # the step is known to have happened
            told.append("same")
        except UserError as error:
            assert "did not go through prepare" in error.what and "engine.prepare" in error.fix
            told.append(error.why)
        engine.free_memory()
    return told


def test_an_optimizer_that_was_not_prepared_steps_as_in_plain_torch_or_is_refused(
    run_ranks: RunRanks, tmp_path: Any
) -> None:
    told, _ = run_ranks(_left_out, 2, str(tmp_path))
    assert told[:2] == ["same", "same"]
    for words, why in zip(("max_grad_norm", "fp32 copies", "loss scale", "cut", "cut", "cut"), told[2:], strict=False):
        assert words in why
    assert "in the place of" in told[8]


def _groups(stage: int, kind: str, dtype: str) -> None:
    make = {"sgd": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9), "adamw": lambda p: torch.optim.AdamW(p, lr=0.1)}
    engine = Engine(strategy={"zero_stage": stage})
    model = _model()
    model[1].requires_grad_(False)
    plain = copy.deepcopy(model)
    first = [[*m[0].parameters(), m[3].weight] for m in (model, plain)]
    optimizer, plain_optimizer = (make[kind](params) for params in first)
    model, optimizer = engine.prepare(model, optimizer)
    pairs = (engine, model, optimizer, plain, plain_optimizer)
    _train(*pairs, 0)
    for of, held in ((model, optimizer), (plain, plain_optimizer)):
        held.add_param_group({"params": list(of[2].parameters()), "lr": 0.05})
    _train(*pairs, 1)
    for of, held in ((model, optimizer), (plain, plain_optimizer)):
        held.add_param_group({"params": of[1].requires_grad_(True).parameters(), "lr": 0.03})
    for step in range(2, 4):
        _train(*pairs, step)
    _same(engine, model, plain)
    assert [group["lr"] for group in optimizer.param_groups] == [g["lr"] for g in plain_optimizer.param_groups]
    with pytest.raises(UserError, match="parameter that the model does not have"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    with pytest.raises(ValueError, match="some parameters appear in more than one"):
        optimizer.add_param_group({"params": [model[0].weight]})
    _train(*pairs, 4)
    _same(engine, model, plain)


@pytest.mark.parametrize(("stage", "kind"), [(0, "adamw"), (1, "sgd"), (2, "adamw"), (3, "adamw")])
def test_groups_that_are_added_after_prepare_are_stepped_from_then_on(
    run_ranks: RunRanks, stage: int, kind: str
) -> None:
    run_ranks(_groups, 2, stage, kind, "fp32")


@pytest.mark.parametrize("backend", ["native", "ddp"])
def test_one_optimizer_of_two_models_and_one_before_its_model_are_told(backend: str) -> None:
    engine = Engine(strategy={"backend": backend, "zero_stage": 0})
    early = _model()
    with pytest.raises(UserError, match="belong to no prepared model") as error:
        engine.prepare_optimizer(torch.optim.SGD(early.parameters(), lr=0.1))
    assert "prepare" in error.value.fix
    if backend == "native":
        one, other = engine.prepare(nn.Linear(2, 2), nn.Linear(2, 2))
        both = [*one.parameters(), *other.parameters()]
        with pytest.raises(UserError, match="2 prepared models, Linear and Linear") as error:
            engine.prepare_optimizer(torch.optim.SGD(both, lr=0.1))
        assert "nn.ModuleList" in error.value.fix
