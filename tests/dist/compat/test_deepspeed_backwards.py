"""Every way to run a backward through DeepSpeed's face: plain torch's gradients, and DeepSpeed's own where it is there."""

from __future__ import annotations

import importlib
import importlib.util
import math
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from distui.core.errors import ConfigError, UserError
from distui.core.ranks.process import ProcessState

if TYPE_CHECKING:
    from tests.dist.rank_pool import RunRanks

STEPS, LR = 2, 0.1
STYLES = ("own", "mixed", "unreduced", "unscaled", "unmanaged", "sum", "forwards", "engines", "crossed")
FACE = "distui.compat.deepspeed"
REAL = "deepspeed"


class Two(nn.Module):
    """Two outputs, of which one is made of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x_BD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for block in self.blocks:
            x_BD = torch.tanh(block(x_BD))
        return x_BD.pow(2).mean(), x_BD


def _model(seed: int) -> Two:
    torch.manual_seed(seed)
    return Two()


def _input(micro: int, rank: int) -> torch.Tensor:
    return torch.linspace(-1, 1 + micro + 0.5 * rank, 8).view(2, 4)


def _json(stage: int, style: str) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": STEPS,
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
    }
    if style == "unmanaged":
        config |= {"managed_gradient_accumulation": False}
    if style == "sum":
        config |= {"gradient_allreduce_op": "sum"}
    return config


def _plain(style: str, world: int) -> list[torch.Tensor]:
    """Return the weights after one step of plain torch on the batches of all ranks."""
    models = [_model(0), _model(1)]
    for micro in range(STEPS):
        for rank in range(world):
            x = _input(micro, rank)
            loss, hidden = models[0](x)
            total = loss + 2 * hidden.mean()
            if style == "forwards":
                total = total + models[0](2 * x)[0]
            if style in ("engines", "crossed"):
                total = total * models[1](x)[0]
            (total / STEPS / (1 if style == "sum" else world)).backward()
    torch.optim.SGD([p for m in models for p in m.parameters()], lr=LR).step()
    return [p.detach() for m in models for p in m.parameters()]


def _backward(engine: Any, other: Any, x: torch.Tensor, style: str, micro: int, by_hidden: bool) -> None:
    loss, hidden = engine(x)
    if by_hidden:
        loss = hidden.pow(2).mean()
    total = loss + 2 * hidden.mean()
    if style == "forwards":
        total = total + (engine(2 * x)[1].pow(2).mean() if by_hidden else engine(2 * x)[0])
    if style in ("engines", "crossed"):
        total = total * other(x)[0]
    if style in ("crossed", "unmanaged", "sum") or (style == "mixed" and micro == 0):
        engine.backward(total)
    elif style == "unscaled":
        engine.backward(total / STEPS, scale_wrt_gas=False)
    elif style == "unreduced":
        torch.autograd.backward([loss, hidden], [torch.ones(()), torch.full_like(hidden, 2 / hidden.numel())])
    else:
        total.backward()


def _run(
    library: str, stage: int, style: str, by_hidden: bool = False
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    warnings.simplefilter("ignore")  # DeepSpeed's own
    ProcessState()
    deepspeed = importlib.import_module(library)
    if library == REAL:  # which would compile an op first
        setattr(importlib.import_module("deepspeed.comm.torch"), "build_shm_op", lambda: None)  # noqa: B010
    utils = importlib.import_module(f"{library}.utils")
    engines = []
    for seed in range(2):
        model = _model(seed)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=_json(stage, style), dist_init_required=False
        )
        engines.append(engine)
    rank = engines[0].global_rank
    taking_part = engines if style in ("engines", "crossed") else engines[:1]
    params = [param for engine in taking_part for param in engine.module.parameters()]
    grads: list[torch.Tensor] = []
    for micro in range(STEPS):
        _backward(engines[0], engines[1], _input(micro, rank), style, micro, by_hidden)
        if style != "unmanaged" and micro == STEPS - 1:
            grads = [grad for param in params if (grad := utils.safe_get_full_grad(param)) is not None]
        if style != "unmanaged" or micro == STEPS - 1:
            for engine in taking_part:
                engine.step()
    assert (engines[0].global_steps, engines[0].skipped_steps) == (1, 0)
    assert engines[0].global_samples == 2 * STEPS * engines[0].world_size
    weights = [utils.safe_get_full_fp32_param(param) if stage else param.detach().clone() for param in params]
    for engine in engines:
        engine.destroy()
    return weights, [grad.clone() for grad in grads]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_backward_gives_plain_torchs_gradients(run_ranks: RunRanks, stage: int) -> None:
    for style in STYLES:
        if (stage, style) == (3, "sum"):
            continue  # refused, as by DeepSpeed
        expected = _plain(style, 2)
        before = [param.detach() for seed in range(2) for param in _model(seed).parameters()]
        for weights, grads in run_ranks(_run, 2, FACE, stage, style):
            for found, value in zip(weights, expected, strict=False):  # of what took part
                torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-6, msg=lambda text: f"{style}: {text}")
            for grad, old, new in zip(grads, before, expected, strict=False):
                torch.testing.assert_close(
                    grad, (old - new) / LR, rtol=1e-4, atol=1e-5, msg=lambda text: f"{style}: {text}"
                )


def _by_hidden(library: str) -> list[list[torch.Tensor]]:
    # Of two outputs one of which is made of the other, DeepSpeed divides by the micro-batches twice.
    cases = [(stage, style) for stage in (1, 2) for style in ("unscaled", "unmanaged", "sum")]
    return [[*weights, *grads] for weights, grads in (_run(library, *case, by_hidden=True) for case in cases)]


@pytest.mark.skipif(importlib.util.find_spec(REAL) is None, reason="compares with DeepSpeed itself")
def test_deepspeed_itself_gives_the_same(run_ranks: RunRanks) -> None:
    theirs, ours = (run_ranks(_by_hidden, 2, library)[0] for library in (REAL, FACE))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def _refusals() -> None:
    deepspeed = importlib.import_module(FACE)
    config = {**_json(1, "own"), "fp16": {"enabled": True, "initial_scale_power": 4}}
    halves = [
        deepspeed.initialize(model=_model(0), config={**config, "optimizer": {"type": "SGD", "params": {"lr": LR}}})[0]
        for _ in range(2)
    ]
    halves[0].engine.scaler.scale = 8.0
    x = _input(0, 0).half()
    with pytest.raises(UserError, match="different loss scales"):
        halves[0].backward(halves[0](x)[0].float() + halves[1](x)[0].float())
    with pytest.raises(ConfigError, match="stage 3"):
        deepspeed.initialize(model=_model(0), config=_json(3, "sum"))


def _overflow(stage: int, format_: str, checks: bool) -> bool:
    deepspeed = importlib.import_module(FACE)
    config = _json(stage, "own") | {"gradient_accumulation_steps": 1}
    if format_ == "bf16":
        config |= {"bf16": {"enabled": True, "check_grad_overflow": checks}}
    model = _model(0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=LR), config=config)
    x = _input(0, 0).to(torch.bfloat16 if format_ == "bf16" else torch.float32)
    engine.backward(engine(x * (math.nan if engine.global_rank else 1.0))[0].float())
    engine.step()
    weights = engine.module_state_dict()
    assert engine.skipped_steps == int(not engine.was_step_applied())
    engine.destroy()
    return all(bool(value.isfinite().all()) for value in weights.values())


def test_zero_leaves_out_a_step_with_gradients_that_are_not_finite(run_ranks: RunRanks) -> None:
    """As DeepSpeed at stages 1 to 3: in fp32 always, under bf16 unless a key turns it off."""
    cases = ((1, "fp32", True, True), (3, "bf16", True, True), (2, "bf16", False, False), (0, "fp32", True, False))
    for stage, format_, checks, finite in cases:
        assert run_ranks(_overflow, 2, stage, format_, checks) == [finite, finite]


def test_what_cannot_be_told_apart_is_refused(run_ranks: RunRanks) -> None:
    run_ranks(_refusals, 2)
