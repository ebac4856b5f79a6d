"""LAMB, 0/1 Adam, curricula and dropped tokens on ranks, at every stage: what one process gives with all batches."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from distui.compat import deepspeed
from distui.compat.deepspeed.optim.optimizers import build_optimizer
from distui.compat.deepspeed.runtime.data_pipeline.data_routing import (
    convert_to_random_ltd,
    save_without_random_ltd,
)
from distui.compat.deepspeed.utils import safe_get_full_fp32_param
from distui.core.ranks.process import ProcessState

if TYPE_CHECKING:
    from tests.dist.rank_pool import RunRanks

WIDTH, LENGTH, MICRO, STEPS = 6, 12, 2, 5
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "Lamb": {"lr": 0.05, "weight_decay": 0.1},
    "ZeroOneAdam": {"lr": 0.01, "var_freeze_step": 2, "var_update_scaler": 1, "local_step_scaler": 1},
}


class Layer(nn.Module):
    """Mixes neighbours, so that it matters which tokens it sees; has a mask and a second output, as BERT's has."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_BTD: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, str]:
        mixed = hidden_BTD + hidden_BTD.roll(1, dims=1)
        if mask is not None:
            mixed = mixed * mask.diagonal(dim1=-2, dim2=-1).squeeze(1).unsqueeze(-1)
        return hidden_BTD + torch.tanh(self.linear(mixed)), "attentions"


class Tower(nn.Module):
    """Four layers and a head; `curriculum_seqlen` cuts the sequence, as the script of a curriculum does."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(4))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None, curriculum_seqlen: int = LENGTH) -> torch.Tensor:
        x = x[:, :curriculum_seqlen]
        for layer in self.layers:
            x, _ = layer(x, mask=mask)
        return self.head(x).pow(2).mean()


def _tower() -> Tower:
    torch.manual_seed(5)
    return Tower()


def _input(rank: int, step: int) -> torch.Tensor:
    return torch.randn(MICRO, LENGTH, WIDTH, generator=torch.Generator().manual_seed(10 * step + rank))


def _start(stage: int, **more: Any) -> Any:
    ProcessState()
    config = {"train_micro_batch_size_per_gpu": MICRO, "zero_optimization": {"stage": stage}, "gradient_clipping": 0.0}
    engine, *_ = deepspeed.initialize(model=_tower(), config={**config, **more})
    return engine


def _weights(engine: Any) -> list[torch.Tensor | None]:
    return [safe_get_full_fp32_param(param) for param in nn.Module.parameters(engine.module)]


def _optimizers(stage: int, folder: Path) -> None:
    for kind, params in OPTIMIZERS.items():
        section = {"type": kind, "params": params}
        engine = _start(stage, optimizer=section)
        plain = _tower()
        optimizer = build_optimizer(section, list(plain.parameters()))
        assert optimizer is not None
        for step in range(STEPS):
            engine.backward(engine(_input(engine.global_rank, step)))
            engine.step()
            for rank in range(engine.world_size):
                (plain(_input(rank, step)) / engine.world_size).backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == 2:
                engine.save_checkpoint(str(folder / f"{kind}{stage}"))
        expected = [param.detach() for param in plain.parameters()]
        torch.testing.assert_close(_weights(engine), expected, rtol=1e-4, atol=1e-5)
        engine.destroy()
        resumed = _start((stage + 1) % 4, optimizer=section)
        resumed.load_checkpoint(str(folder / f"{kind}{stage}"))
        for step in range(3, STEPS):
            resumed.backward(resumed(_input(resumed.global_rank, step)))
            resumed.step()
        torch.testing.assert_close(_weights(resumed), expected, rtol=1e-4, atol=1e-5)
        resumed.destroy()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_optimizers_give_one_processs_weights(run_ranks: RunRanks, tmp_path: Path, stage: int) -> None:
    run_ranks(_optimizers, 2, stage, tmp_path)


CURRICULUM = {
    "enabled": True,
    "curriculum_type": "seqlen",
    "min_difficulty": 4,
    "max_difficulty": LENGTH,
    "schedule_type": "fixed_linear",
    "schedule_config": {"total_curriculum_step": 4, "difficulty_step": 2},
}
SGD = {"type": "SGD", "params": {"lr": 0.1}}


def _ltd(model_type: str, **more: Any) -> dict[str, Any]:
    schedule: dict[str, Any] = {"min_value": 4, "max_value": LENGTH, "schedule_type": "fixed_linear"}
    schedule["schedule_config"] = {"require_steps": 4, "seq_per_step": 2}
    section = {
        "enabled": True,
        "total_layer_num": 4,
        "random_ltd_layer_num": 2,
        "random_ltd_layer_id": [1, 2],
        "model_mask_name": "mask",
        "model_type": model_type,
        "hidden_state_order": "batch_seq_dim",
        "random_ltd_schedule": schedule,
        **more,
    }
    return {"enabled": True, "data_routing": {"enabled": True, "random_ltd": section}}


def _mask() -> torch.Tensor:
    return torch.linspace(0.5, 1.5, LENGTH).diag().expand(MICRO, 1, LENGTH, LENGTH)


def _dropped(plain: Tower, rank: int, step: int, kept: int, is_encoder: bool) -> torch.Tensor:
    """Return the loss with layers 1 and 2 on `kept` tokens, by DeepSpeed's draws, in plain torch."""
    torch.manual_seed(100 * step + rank)
    x, mask = _input(rank, step), _mask()
    draws = torch.multinomial(torch.ones(2 * MICRO, LENGTH), kept) if kept < LENGTH else None
    for number, layer in enumerate(plain.layers):
        if number not in (1, 2) or draws is None:
            x = layer(x, mask=mask)[0]
            continue
        rows = draws.view(2, MICRO, kept)[number - 1].sort().values
        parts = []
        for sample, row in enumerate(rows):
            cut = mask[sample : sample + 1, :, row][:, :, :, row] if is_encoder else mask[:1, :, :kept, :kept]
            whole = x[sample].clone()
            whole[row] = layer(x[sample : sample + 1, row], mask=cut)[0][0]
            parts.append(whole)
        x = torch.stack(parts)
    return plain.head(x).pow(2).mean()


def _curricula(stage: int, folder: Path) -> None:
    engine = _start(stage, optimizer=SGD, curriculum_learning=CURRICULUM)
    lengths = []
    plain = _tower()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for step in range(STEPS):
        engine.backward(engine(_input(engine.global_rank, step)))
        engine.step()
        lengths.append(engine.curriculum_scheduler_legacy.get_current_difficulty())
        for rank in range(engine.world_size):
            (plain(_input(rank, step), curriculum_seqlen=lengths[-1]) / engine.world_size).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert lengths == [6, 8, 10, 12, 12]
    expected = [param.detach() for param in plain.parameters()]
    torch.testing.assert_close(_weights(engine), expected, rtol=1e-4, atol=1e-5)
    engine.eval()
    engine(_input(0, 0))  # whole in evaluation
    engine.destroy()
    for model_type in ("encoder", "decoder"):
        engine = convert_to_random_ltd(_start(stage, optimizer=SGD, data_efficiency=_ltd(model_type)), Layer)
        plain = _tower()
        optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
        for step, kept in enumerate((4, 6, 8, 10, 12)):
            torch.manual_seed(100 * step + engine.global_rank)
            engine.backward(engine(_input(engine.global_rank, step), mask=_mask()))
            engine.step()
            for rank in range(engine.world_size):
                (_dropped(plain, rank, step, kept, model_type == "encoder") / engine.world_size).backward()
            optimizer.step()
            optimizer.zero_grad()
        expected = [param.detach() for param in plain.parameters()]
        torch.testing.assert_close(_weights(engine), expected, rtol=1e-4, atol=1e-5)
        assert set(save_without_random_ltd(engine)) == set(plain.state_dict())
        place = str(folder / f"{model_type}{stage}")
        engine.save_checkpoint(place)
        consumed = engine.random_ltd_scheduler.state_dict()
        engine.destroy()
        engine = _start(stage, optimizer=SGD, data_efficiency=_ltd(model_type))
        engine.load_checkpoint(place)
        assert engine.random_ltd_scheduler.state_dict() == consumed and consumed["consumed_layer_tokens"] > 0
        engine.destroy()


@pytest.mark.parametrize("stage", [0, 3])
def test_lengths_and_dropped_tokens_give_plain_torchs_weights(run_ranks: RunRanks, tmp_path: Path, stage: int) -> None:
    run_ranks(_curricula, 2, stage, tmp_path)
