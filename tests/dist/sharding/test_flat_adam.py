"""The kernels as the engine's AdamW: the same steps as torch's; 8-bit states train, weigh a quarter, and reshard."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import distui
from distui.core.errors import UserError
from distui.core.sharding.optim.flat_adam import FlatAdam
from distui.core.sharding.units import partition

if TYPE_CHECKING:
    from tests.dist.rank_pool import RunRanks

WIDTH = 24


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(3)), nn.Linear(WIDTH, 1))


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    decayed = [param for param in model.parameters() if param.dim() > 1]
    others = [param for param in model.parameters() if param.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0, "lr": 2e-3}]
    return torch.optim.AdamW(groups, lr=4e-3, betas=(0.9, 0.99))


def _engine(stage: int, bits: int, dtype: str) -> distui.Engine:
    partition.SMALL_UNIT_NUMEL = 1
    return distui.Engine(strategy={"zero_stage": stage}, optimizer={"state_bits": bits}, precision={"dtype": dtype})


def _batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(step))
    mine = slice(dist.get_rank(), None, dist.get_world_size()) if dist.is_initialized() else slice(None)
    return x[mine], x.sin().sum(1, keepdim=True)[mine]


def _steps(engine: distui.Engine, model: Any, optimizer: Any, first: int, last: int, max_norm: float = 1e9) -> float:
    loss = torch.zeros(())
    for step in range(first, last):
        x, y = _batch(step)
        loss = (model(x) - y).square().mean()
        engine.backward(loss)
        engine.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad()
    return float(engine.reduce(loss.detach(), "mean"))


def _trained(stage: int, dtype: str, flat: bool) -> tuple[dict[str, Any], dict[str, Any], list[int]]:
    engine = _engine(stage, 32, dtype)
    model = _model()
    given = _adamw(model)
    called: list[int] = []
    given.register_step_post_hook(lambda *_: called.append(1))
    schedule = torch.optim.lr_scheduler.LambdaLR(given, lambda step: 1.0 / (1 + step))
    model, optimizer, schedule = engine.prepare(model, given, schedule)
    if flat:
        optimizer.flat = FlatAdam(optimizer.inner, optimizer.runs, 32)
    for step in range(3):
        _steps(engine, model, optimizer, step, step + 1, max_norm=0.5)
        schedule.step()
    return engine.get_state_dict(model), optimizer.state_dict(), called


def _as_torch() -> None:
    for stage, dtype in ((0, "fp32"), (1, "bf16"), (3, "bf16")):
        (found, state, called), (expected, wanted, _) = (_trained(stage, dtype, flat) for flat in (True, False))
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
        assert called == [1, 1, 1]
        assert state["state"].keys() == wanted["state"].keys()
        for index, moments in state["state"].items():
            torch.testing.assert_close(
                moments, {key: wanted["state"][index][key] for key in moments}, atol=1e-6, rtol=1e-4
            )


def test_the_flat_step_is_torchs(run_ranks: RunRanks) -> None:
    run_ranks(_as_torch, 2)


def _eight_bits(folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for bits in (32, 8):
        engine = _engine(2, bits, "fp32")
        model = _model()
        model, optimizer = engine.prepare(model, _adamw(model))
        _steps(engine, model, optimizer, 0, 60)
        found[f"loss{bits}"] = _steps(engine, model, optimizer, 0, 8)
        owned = sum(run.param.numel() for runs in optimizer.runs for run in runs)
        states = [t for state in optimizer.inner.state.values() for key, t in state.items() if key != "step"]
        found[f"bytes{bits}"] = sum(t.numel() * t.element_size() for t in states) / owned
        engine.save_state(f"{folder}/{bits}")
        found[f"next{bits}"] = _steps(engine, model, optimizer, 8, 11)
        if bits == 8:
            # What state_dict gives is fp32, and comes back.
            kept = optimizer.state_dict()
            assert {t.dtype for state in kept["state"].values() for t in state.values()} == {torch.float32}
            optimizer.load_state_dict(kept)
            again = optimizer.state_dict()["state"]
            for index, state in kept["state"].items():
                torch.testing.assert_close(again[index], state, atol=1e-4, rtol=0.2)
    return found


def _resumed(folder: str, saved: int, bits: int) -> float:
    """Go on from what `saved` bits wrote, with `bits`, on one rank and at another stage."""
    engine = _engine(1, bits, "fp32")
    model = _model()
    model, optimizer = engine.prepare(model, _adamw(model))
    engine.load_state(f"{folder}/{saved}")
    assert any("exp_avg_codes" in state for state in optimizer.inner.state.values()) == (bits == 8)
    assert engine.clock.step == 68
    return _steps(engine, model, optimizer, 8, 11)


def test_8_bit_states_train_and_reshard(run_ranks: RunRanks, tmp_path: Path) -> None:
    found = run_ranks(_eight_bits, 2, str(tmp_path))[0]
    assert found["loss8"] == pytest.approx(found["loss32"], rel=0.1)
    assert found["loss32"] < 0.5 * 12
    assert found["bytes32"] == 8.0
    assert found["bytes8"] < 8.0 / 3.5  # small shards: a last block is seldom full
    for saved in (8, 32):
        for bits in (8, 32):
            assert _resumed(str(tmp_path), saved, bits) == pytest.approx(found[f"next{saved}"], rel=0.02)


def test_8_bit_states_are_refused_where_they_cannot_be() -> None:
    engine = _engine(0, 8, "fp32")
    for build, why in (
        (lambda params: torch.optim.SGD(params, lr=0.1), "SGD"),
        (lambda params: torch.optim.AdamW(params, amsgrad=True), "amsgrad=True"),
        (lambda params: torch.optim.Adam(params, weight_decay=0.1), "AdamW decays"),
    ):
        model = _model()
        with pytest.raises(UserError, match=why):
            engine.prepare(model, build(model.parameters()))
    model = _model().double()
    with pytest.raises(UserError, match="float64"):
        engine.prepare(model, torch.optim.AdamW(model.parameters()))
