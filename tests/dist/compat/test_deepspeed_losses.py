"""Loops of DeepSpeed's users that tell gradients apart: two losses of one forward, recomputed blocks, bare backward."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from distui.compat import deepspeed
from distui.compat.deepspeed.runtime.base_optimizer import ZeROOptimizer
from distui.compat.deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from distui.core.ranks.process import ProcessState

if TYPE_CHECKING:
    from tests.dist.rank_pool import RunRanks

WIDTH, LR = 8, 1e-2


class Recomputed(nn.Module):
    """A frozen base and norm, an adapter and a head; the first part is recomputed."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode
        self.norm = nn.LayerNorm(WIDTH)
        self.base = nn.Linear(WIDTH, WIDTH)
        self.adapter = nn.Sequential(nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False))
        self.head = nn.Linear(WIDTH, WIDTH)
        for part in (self.norm, self.base):
            part.requires_grad_(False)

    def _block(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        return torch.relu(self.base(x) + self.adapter(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.mode != "kept":
            x = checkpoint(self._block, x, use_reentrant=self.mode == "reentrant")
        else:
            x = self._block(x)
        return self.head(x)


def _model(mode: str) -> Recomputed:
    torch.manual_seed(3)
    return Recomputed(mode)


def _start(stage: int, mode: str = "kept", **more: Any) -> Any:
    ProcessState()
    model = _model(mode)
    trained = [param for param in model.parameters() if param.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=trained,
        config={
            "train_micro_batch_size_per_gpu": 2,
            "optimizer": {"type": "Adam", "params": {"lr": LR}},
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": stage},
            **more,
        },
    )
    return engine


def _input(rank: int, step: int = 0) -> torch.Tensor:
    return torch.linspace(-1, 1 + rank + step, 2 * WIDTH).view(2, WIDTH).requires_grad_()


def _gradients(engine: Any) -> list[torch.Tensor]:
    trained = [param for param in engine.module.parameters() if param.requires_grad]
    return [grad.clone() for param in trained if (grad := safe_get_full_grad(param)) is not None]


def _expected(world: int, which: int) -> list[torch.Tensor]:
    model = _model("kept")
    for rank in range(world):
        (model(_input(rank)).pow(2).mean(), model(_input(rank)).sum())[which].div(world).backward()
    return [param.grad for param in model.parameters() if param.grad is not None]


def _two_losses(stage: int) -> None:
    for by_hand in (False, True):
        engine = _start(stage)
        out = engine(_input(engine.global_rank))
        losses = (out.pow(2).mean(), out.sum())
        for which, loss in enumerate(losses):
            engine.zero_grad()
            kwargs = {"retain_graph": True} if which == 0 else {}
            if by_hand:
                engine.scale(loss, **kwargs).backward(**kwargs)
            else:
                engine.backward(loss, **kwargs)
            expected = _expected(engine.world_size, which)
            torch.testing.assert_close(_gradients(engine), expected, rtol=1e-4, atol=1e-5)
        engine.step()
        engine.destroy()


def _weights(world: int) -> list[torch.Tensor]:
    model = _model("kept")
    optimizer = torch.optim.Adam([param for param in model.parameters() if param.requires_grad], lr=LR)
    for step in range(3):
        for rank in range(world):
            model(_input(rank, step)).sum().div(world).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [param.detach() for param in model.parameters() if param.requires_grad]


def _recomputed(stage: int, mode: str) -> None:
    engine = _start(stage, mode)
    for step in range(3):
        out = engine(_input(engine.global_rank, step))
        out.backward(torch.ones_like(out))
        engine.step()
    trained = [param for param in engine.module.parameters() if param.requires_grad]
    found = [safe_get_full_fp32_param(param) for param in trained]
    torch.testing.assert_close(found, _weights(engine.world_size), rtol=1e-4, atol=1e-5)
    engine.destroy()


def _questions(stage: int) -> None:
    fp16: dict[str, Any] = {"fp16": {"enabled": True, "initial_scale_power": 8}}
    engine = _start(stage, **fp16)
    assert isinstance(engine.optimizer, ZeROOptimizer) and engine.optimizer.needs_scaler()
    assert engine.optimizer.cur_scale == 256 and not engine.optimizer.overflow
    with pytest.raises(AssertionError, match="scalar tensor"):
        engine.scale(engine(_input(0).half()))
    loss = engine(_input(engine.global_rank).half()).float().mean()
    with pytest.raises(RuntimeError, match="Loss scaling is required"):
        loss.backward()
    engine.destroy()
    engine = _start(stage, bf16={"enabled": True})
    assert not engine.optimizer.needs_scaler()
    engine.destroy()
    leaves = importlib.import_module("distui.compat.deepspeed.utils.z3_leaf_module")
    model = _model("kept")
    assert leaves.set_z3_leaf_modules(model, [nn.Sequential]) == [model.adapter] and leaves.z3_leaf_module(
        model.adapter
    )
    with pytest.raises(ValueError, match="Conv2d"):
        leaves.set_z3_leaf_modules(model, [nn.Conv2d])
    assert leaves.set_z3_leaf_modules_by_suffix(model, ["head", "tail"], raise_if_not_found=False)[1] == ["tail"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_each_loss_of_one_forward_has_its_own_gradients(run_ranks: RunRanks, stage: int) -> None:
    run_ranks(_two_losses, 2, stage)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_recomputed_blocks_with_frozen_parts_train_by_their_own_backward(run_ranks: RunRanks, stage: int) -> None:
    for mode in ("kept", "reentrant", "not reentrant"):
        run_ranks(_recomputed, 2, stage, mode)


def test_optimizers_answer_as_deepspeeds(run_ranks: RunRanks) -> None:
    for stage in (1, 3):
        run_ranks(_questions, 2, stage)
