"""Training scripts in DeepSpeed's style on real ranks: what plain torch computes in one process, at every stage."""

from __future__ import annotations

import argparse
import io
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distui.core.errors import UserError

if TYPE_CHECKING:
    from tests.dist.rank_pool import RunRanks

MICRO, STEPS, NUM_STEPS, LR, CLIP = 2, 2, 3, 0.02, 0.3
CLIENT = {"epoch": 7, "place": Path("here"), "args": argparse.Namespace(lr=LR), "best": np.float64(0.5)}
"""What scripts give `save_checkpoint` to keep: not only plain values."""


class Words(nn.Module):
    """A model with a repeated block, a tied weight and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 13, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden_BTD = self.embedding(ids_BT)
        for block in self.blocks:
            hidden_BTD = hidden_BTD + torch.tanh(block(hidden_BTD))
        return self.head(hidden_BTD), hidden_BTD


def _losses(model: Any, ids_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logits, hidden = model(ids_BT)
    return F.cross_entropy(logits.flatten(0, 1), ids_BT.flatten()), hidden.pow(2).mean()


def _batches(world: int) -> list[torch.Tensor]:
    ids = torch.randint(0, 13, (NUM_STEPS * STEPS * MICRO * world, 5), generator=torch.Generator().manual_seed(3))
    return list(ids.split(MICRO * world))


def _rate(step: int) -> float:
    """WarmupLR over 4 steps, by its logarithm; DeepSpeed steps it after the optimizer."""
    return 0.0 if step == 0 else LR * math.log(step) / math.log(4)


def _one_process(world: int) -> tuple[dict[str, torch.Tensor], list[float]]:
    torch.manual_seed(0)
    model, norms = Words(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01)
    batches = iter(_batches(world))
    for step in range(NUM_STEPS):
        for _ in range(STEPS):
            first, second = _losses(model, next(batches))
            ((first + second) / STEPS).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        for group in optimizer.param_groups:
            group["lr"] = _rate(step)
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict(), norms


def _json(stage: int, **more: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": MICRO,
        "gradient_accumulation_steps": STEPS,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": LR, "weight_decay": 0.01}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": LR, "warmup_num_steps": 4}},
        **more,
    }


def _make(stage: int, **more: Any) -> Any:
    from distui.compat import deepspeed

    torch.manual_seed(0)
    with deepspeed.zero.Init():
        model = Words()
    return deepspeed.initialize(model=model, config=_json(stage, **more))


def _train(engine: Any, batches: list[torch.Tensor], style: str) -> list[float]:
    norms = []
    for number, whole in enumerate(batches):
        ids = whole[engine.global_rank * MICRO :][:MICRO]
        first, second = _losses(engine, ids)
        if style == "several":
            engine.backward(first, retain_graph=True)
            engine.backward(second)
        elif style == "torch":
            (first + second).backward()
        else:
            engine.backward(loss=first + second)
        assert engine.is_gradient_accumulation_boundary() == bool(number % STEPS)
        engine.step()
        if number % STEPS:
            norms.append(engine.get_global_grad_norm())
    return norms


def _script(stage: int, style: str, folder: str) -> tuple[dict[str, torch.Tensor], list[float]]:
    from distui.compat import deepspeed
    from distui.compat.deepspeed import utils

    engine, optimizer, loader, schedule = _make(stage)
    assert loader is None and optimizer is engine.optimizer and schedule is engine.lr_scheduler
    assert engine.zero_optimization_stage() == stage and engine.train_batch_size() == MICRO * STEPS * engine.world_size
    batches = _batches(engine.world_size)
    norms = _train(engine, batches[: 2 * STEPS], style)
    assert (engine.global_steps, engine.micro_steps, engine.skipped_steps) == (2, 2 * STEPS, 0)
    weight = engine.module.blocks[1].weight
    master = utils.safe_get_full_fp32_param(weight)
    moment = utils.safe_get_full_optimizer_state(weight, "exp_avg")
    assert master is not None and master.shape == (8, 8) and moment is not None and moment.abs().sum() > 0
    engine.save_checkpoint(save_dir=folder, client_state=CLIENT)
    # Going on from the checkpoint gives what going on without it would give, also on a new engine.
    with deepspeed.zero.GatheredParameters(weight, modifier_rank=0):
        if engine.global_rank == 0:
            with torch.no_grad():
                weight.fill_(3.0)
    torch.testing.assert_close(utils.safe_get_full_fp32_param(weight), torch.full((8, 8), 3.0), rtol=0, atol=0)
    with deepspeed.zero.GatheredParameters([weight]):
        assert torch.equal(weight.detach(), torch.full((8, 8), 3.0))
    engine.destroy()
    engine, _, _, schedule = _make(stage)
    path, client = engine.load_checkpoint(folder)
    assert path == str(Path(folder) / "global_step2") and client == CLIENT
    assert engine.global_steps == 2 and schedule.last_batch_iteration == 1
    weight = engine.module.blocks[1].weight
    torch.testing.assert_close(utils.safe_get_full_fp32_param(weight), master, rtol=0, atol=0)
    torch.testing.assert_close(utils.safe_get_full_optimizer_state(weight, "exp_avg"), moment, rtol=0, atol=0)
    norms += _train(engine, batches[2 * STEPS :], style)
    assert engine.get_lr() == pytest.approx([_rate(3)])
    state = engine.module_state_dict()
    assert engine.save_16bit_model(folder, "weights.bin")
    saved = torch.load(f"{folder}/weights.bin")
    assert all(torch.equal(saved[name], state[name]) for name in state)
    engine.destroy()
    return state, norms


@pytest.mark.parametrize(
    ("world", "stage", "style"), [(1, 0, "sum"), (2, 0, "torch"), (2, 1, "sum"), (2, 2, "several"), (2, 3, "several")]
)
def test_a_script_trains_as_plain_torch_does(
    run_ranks: RunRanks, tmp_path: Path, world: int, stage: int, style: str
) -> None:
    expected, norms = _one_process(world)
    for state, own_norms in run_ranks(_script, world, stage, style, str(tmp_path)):
        assert own_norms == pytest.approx(norms, rel=1e-4)
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5)


MUON = {"type": "Muon", "params": {"muon_lr": 0.05, "adam_lr": LR, "weight_decay": 0.1, "betas": [0.8, 0.9]}}


def _muon_script(stage: int) -> tuple[list[bool], dict[str, torch.Tensor]]:
    from distui.compat import deepspeed

    torch.manual_seed(0)
    config = {**_json(stage, optimizer=MUON, gradient_clipping=0), "scheduler": {}}
    engine, optimizer, _, _ = deepspeed.initialize(model=Words(), config=config)
    _train(engine, _batches(engine.world_size), "sum")
    return [group["use_muon"] for group in optimizer.param_groups], engine.module_state_dict()


def test_muon_from_the_json_steps_matrices_whole_and_the_rest_by_adam(run_ranks: RunRanks) -> None:
    from distui.compat.deepspeed.optim.muon import build_muon, set_use_muon

    torch.manual_seed(0)
    model = Words()
    set_use_muon(model)
    marked = [name for name, param in model.named_parameters() if getattr(param, "use_muon")]  # noqa: B009
    assert marked == [f"blocks.{index}.weight" for index in range(3)]
    optimizer = build_muon(MUON["params"], model.parameters())  # type: ignore[arg-type]
    batches = iter(_batches(2))
    for _ in range(NUM_STEPS):
        for _ in range(STEPS):
            (sum(_losses(model, next(batches))) / STEPS).backward()  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
    for stage in (1, 3):
        for kinds, state in run_ranks(_muon_script, 2, stage):
            assert kinds == [True, False]
            for name, value in model.state_dict().items():
                torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5)


class Runs:
    """Makes a folder where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def _keep_what_runs(folder: str) -> None:
    from distui.compat.deepspeed import saving

    engine = _make(0)[0]
    with pytest.raises(UserError, match="Runs"):
        engine.save_checkpoint(save_dir=folder, client_state={"odd": Runs(Path(folder, "ran"))})
    # A checkpoint of an earlier version, made by somebody else.
    buffer = io.BytesIO()
    torch.save(Runs(Path(folder, "ran")), buffer)
    with pytest.raises(UserError, match="reading it could run code"):
        saving._plain(torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8), "client state")
    engine.destroy()


def test_nothing_that_is_pickled_in_a_checkpoint_is_run(run_ranks: RunRanks, tmp_path: Path) -> None:
    run_ranks(_keep_what_runs, 2, str(tmp_path))
    assert not (tmp_path / "ran").exists()
