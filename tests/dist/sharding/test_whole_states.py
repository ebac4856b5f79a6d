"""`optimizer.state_dict()`: plain torch's at every stage and home, and taken by any other."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import distui
from distui.core.errors import UserError

if TYPE_CHECKING:
    from tests.dist.rank_pool import RunRanks

KINDS = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.05, eps=1e-2),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
    "muon": lambda params: torch.optim.Muon(params, lr=0.05),
}


def _model(kind: str) -> nn.Module:
    torch.manual_seed(3)
    bias = kind != "muon"
    return nn.Sequential(nn.Linear(6, 5, bias), nn.Tanh(), nn.Linear(5, 3, bias), nn.Tanh(), nn.Linear(3, 1, bias))


def _step(model: Any, optimizer: Any, step: int, backward: Any) -> None:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
    # The last layer gets no gradient in the first steps, and so fewer steps are counted.
    backward((model[:4](x) if step < 2 else model(x)).square().mean())
    optimizer.step()
    optimizer.zero_grad()


def _equal(found: dict[str, Any], right: dict[str, Any]) -> None:
    assert [group["params"] for group in found["param_groups"]] == [group["params"] for group in right["param_groups"]]
    assert found["state"].keys() == right["state"].keys()
    for number, state in right["state"].items():
        assert found["state"][number].keys() == state.keys()
        for key, value in state.items():
            assert getattr(found["state"][number][key], "shape", None) == getattr(value, "shape", None)
            torch.testing.assert_close(found["state"][number][key], value, atol=1e-6, rtol=1e-4)


def _prepared(kind: str, stage: int, **options: Any) -> tuple[Any, Any, Any]:
    engine = distui.Engine(strategy={"zero_stage": stage}, **options)
    model = _model(kind)
    return engine, *engine.prepare(model, KINDS[kind](model.parameters()))


def _as_torch(kind: str, stage: int, options: dict[str, Any]) -> None:
    plain = _model(kind)
    alone = KINDS[kind](plain.parameters())
    engine, model, optimizer = _prepared(kind, stage, **options)
    seen: list[int] = []
    optimizer.register_state_dict_post_hook(lambda _, state: seen.append(len(state["state"])))
    optimizer.register_load_state_dict_pre_hook(lambda _, state: seen.append(len(state["state"])))
    _equal(optimizer.state_dict(), alone.state_dict())
    for step in range(4):
        _step(plain, alone, step, torch.Tensor.backward)
        _step(model, optimizer, step, engine.backward)
        _equal(optimizer.state_dict(), alone.state_dict())
    # Into another stage, where nothing has been stepped; the weights likewise.
    kept = copy.deepcopy(optimizer.state_dict())
    other, second, stepping = _prepared(kind, (stage + 1) % 4 if not options else stage, **options)
    other.load_state_dict(second, engine.get_state_dict(model))
    stepping.load_state_dict(kept)
    _equal(stepping.state_dict(), alone.state_dict())
    # Back to before, the steps that it counts alike for all.
    fresh = KINDS[kind]((late := _model(kind)).parameters())
    for step in (5, 6):
        _step(late, fresh, step, torch.Tensor.backward)
    optimizer.load_state_dict(copy.deepcopy(fresh.state_dict()))
    _equal(optimizer.state_dict(), fresh.state_dict())
    optimizer.load_state_dict(kept)
    for step in (7, 8):
        _step(plain, alone, step, torch.Tensor.backward)
        _step(model, optimizer, step, engine.backward)
        _step(second, stepping, step, other.backward)
    for trained in (engine.get_state_dict(model), other.get_state_dict(second)):
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(trained[name], value, atol=1e-5, rtol=1e-4)
    _equal(optimizer.state_dict(), alone.state_dict())
    assert len(seen) == 10, seen  # hooks are called once each


@pytest.mark.parametrize(("kind", "stage"), [("adamw", 1), ("adamw", 3), ("momentum", 2), ("muon", 1), ("muon", 3)])
def test_states_are_plain_torchs(kind: str, stage: int, run_ranks: RunRanks) -> None:
    run_ranks(_as_torch, 3 if kind == "adamw" else 2, kind, stage, {})


def test_states_that_rest_elsewhere(run_ranks: RunRanks, tmp_path: Path) -> None:
    offload = {"optimizer": "nvme", "nvme_path": str(tmp_path)}
    run_ranks(_as_torch, 2, "adamw", 2, {"offload": offload})
    _as_torch("adamw", 1, {"offload": offload})


def _refused() -> list[str]:
    _, _, optimizer = _prepared("adamw", 1)
    plain = KINDS["adamw"](_model("adamw").parameters())
    right = plain.state_dict()
    told = []
    for wrong in (
        {**right, "param_groups": [{**right["param_groups"][0], "params": [0, 1]}]},
        {**right, "state": {0: {"exp_avg": torch.zeros(6, 5), "step": torch.tensor(1.0)}}},
    ):
        with pytest.raises(UserError) as caught:
            optimizer.load_state_dict(wrong)
        told.append(str(caught.value))
    by_name = {**right, "state": {"2.weight": {"step": torch.tensor(4.0), "exp_avg": torch.ones(3, 5)}}}
    names = [name for name, _ in _model("adamw").named_parameters()][::-1]
    by_name["param_groups"] = [{**right["param_groups"][0], "params": names}]
    optimizer.load_state_dict(by_name)
    assert torch.equal(optimizer.state_dict()["state"][2]["exp_avg"], torch.ones(3, 5))
    dist.barrier()
    return told


def test_other_states_are_refused_and_names_are_followed(run_ranks: RunRanks) -> None:
    for groups, shape in run_ranks(_refused, 2):
        assert "groups of [2] parameters, and the optimizer has [6]" in groups
        assert "exp_avg of 0.weight has the shape (6, 5), and the parameter (5, 6)" in shape
