"""DeepSpeed's checkpoints, made by hand in the layout that 0.19.8 writes: stages 1 and 3 of two ranks."""

from __future__ import annotations

import argparse
import math
import os
import pickle
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distui.core.checkpoint.formats.deepspeed_files import Foreign, is_deepspeed, read
from distui.core.errors import UserError

SHAPES: list[dict[str, torch.Size]] = [
    {"embedding.weight": torch.Size([5, 3]), "norm.weight": torch.Size([3])},
    {"norm.bias": torch.Size([3])},
]


class ZeroStageEnum:
    """Pickled as a class of DeepSpeed's, by a call with its number."""

    def __init__(self, stage: int) -> None:
        self.stage = stage

    def __reduce__(self) -> Any:
        return ZeroStageEnum, (self.stage,)


class Evil:
    """Would make a file when it is unpickled, each kind in another way."""

    def __init__(self, path: Path, kind: str) -> None:
        self.path, self.kind = path, kind

    def __reduce__(self) -> Any:
        if self.kind == "function":
            return subprocess.getoutput, (f"touch {self.path}",)
        if self.kind == "method":
            return Path.touch, (self.path,)
        if self.kind == "shell":
            return os.system, (f"touch {self.path}",)
        return eval, (f"open({str(self.path)!r}, 'w')",)


def _truth() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for group in SHAPES for name, shape in group.items()}


def _cut_group(group: dict[str, torch.Size], values: dict[str, torch.Tensor], stage: int) -> list[torch.Tensor]:
    """Return a group's flat piece of each of two ranks."""
    if stage < 3:
        flat = torch.cat([values[name].flatten() for name in group])
        flat = torch.cat([flat, torch.zeros(-len(flat) % 4)])
        return list(flat.chunk(2))
    pieces: list[list[torch.Tensor]] = [[], []]
    for name in group:
        each = math.ceil(values[name].numel() / 2)
        padded = torch.cat([values[name].flatten(), torch.zeros(2 * each - values[name].numel())])
        for rank in range(2):
            pieces[rank].append(padded[rank * each : (rank + 1) * each])
    return [torch.cat(parts) for parts in pieces]


def _write(folder: Path, stage: int, monkeypatch: pytest.MonkeyPatch, evil: Any = None) -> dict[str, torch.Tensor]:
    truth = _truth()
    module = types.ModuleType("deepspeed.runtime.zero.config")
    module.__dict__["ZeroStageEnum"] = ZeroStageEnum
    monkeypatch.setattr(ZeroStageEnum, "__module__", module.__name__)
    for name in ("deepspeed", "deepspeed.runtime", "deepspeed.runtime.zero", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    tag = folder / "global_step4"
    tag.mkdir()
    (folder / "latest").write_text("global_step4")
    whole = {**truth, "head.weight": truth["embedding.weight"], "norm.running_mean": torch.ones(3)}
    cut = [_cut_group(group, truth, stage) for group in SHAPES]
    for rank in range(2):
        main: dict[str, Any] = {
            "module": {name: value if stage < 3 or "mean" in name else torch.zeros(0) for name, value in whole.items()},
            "buffer_names": ["norm.running_mean"],
            "param_shapes": SHAPES,
            "shared_params": {"head.weight": "embedding.weight"},
            "frozen_param_shapes": None,
            "lr_scheduler": {"last_batch_iteration": 3},
            "global_steps": 4,
            "dp_world_size": 2,
            "ds_version": "0.19.8",
            "epoch": 2,
            "args": argparse.Namespace(lr=0.1, names=["a"]),
            "counts": np.arange(3),
            "evil": evil,
        }
        if stage == 3 or rank == 0:
            prefix = f"zero_pp_rank_{rank}_" if stage == 3 else ""
            torch.save(main, tag / f"{prefix}mp_rank_00_model_states.pt")
        base = {
            "state": {
                index: {"step": torch.tensor(4.0), "exp_avg": pieces[rank] * 2} for index, pieces in enumerate(cut)
            },
            "param_groups": [{"lr": 0.1, "params": [0]}, {"lr": 0.2, "params": [1]}],
        }
        flat = [pieces[rank] for pieces in cut]
        shard: dict[str, Any] = {"zero_stage": ZeroStageEnum(stage), "partition_count": 2 if stage == 3 else [2, 2]}
        if stage == 3:
            shard |= {"fp32_flat_groups": flat, "optimizer_state_dict": base}
        else:
            shard |= {"single_partition_of_fp32_groups": flat, "base_optimizer_state": base}
        torch.save({"optimizer_state_dict": shard}, tag / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return truth


@pytest.mark.parametrize("stage", [1, 3])
def test_weights_and_states_come_back_whole(tmp_path: Path, stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = _write(tmp_path, stage, monkeypatch, Evil(tmp_path / "ran", "function"))
    assert is_deepspeed(tmp_path) and is_deepspeed(tmp_path / "global_step4")
    found = read(tmp_path)
    assert (found.stage, found.world_size, found.global_steps, found.version) == (stage, 2, 4, "0.19.8")
    for name, value in truth.items():
        assert torch.equal(found.weights[name], value)
        assert torch.equal(found.optimizer_states[f"{name}.exp_avg"], value * 2)
        assert found.optimizer_states[f"{name}.step"] == 4.0
    assert torch.equal(found.weights["head.weight"], truth["embedding.weight"])
    assert torch.equal(found.weights["norm.running_mean"], torch.ones(3))
    assert found.groups == [{"lr": 0.1}, {"lr": 0.2}] and found.lr_scheduler == {"last_batch_iteration": 3}
    assert found.client_state["epoch"] == 2 and found.client_state["args"] == argparse.Namespace(lr=0.1, names=["a"])
    assert found.client_state["counts"].tolist() == [0, 1, 2]
    assert isinstance(found.client_state["evil"], Foreign) and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["method", "shell", "eval"])
def test_nothing_in_it_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    evil = Evil(tmp_path / "ran", kind)
    _write(tmp_path, 1, monkeypatch, evil)
    assert pickle.dumps(evil, 2), "it can be pickled, so only the reader keeps it from running"
    try:
        assert isinstance(read(tmp_path).client_state["evil"], Foreign)
    except UserError as error:
        assert "cannot be read" in error.what
    assert not (tmp_path / "ran").exists()


def test_what_is_missing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path, 1, monkeypatch)
    tag = tmp_path / "global_step4"
    (tag / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(UserError, match="2 ranks saved it, and 1"):
        read(tmp_path)
    (tag / "mp_rank_01_model_states.pt").write_bytes(b"")
    with pytest.raises(UserError, match="tensor- and pipeline-parallel"):
        read(tmp_path)
    with pytest.raises(UserError, match="no checkpoint of DeepSpeed"):
        read(tmp_path / "absent")
