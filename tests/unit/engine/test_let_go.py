"""What an engine holds goes with it: buffers, hooks, the threads of its disk."""

from __future__ import annotations

import gc
import threading
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from distui.core.engine.engine import Engine


@pytest.mark.parametrize("stage", [0, 1])
def test_an_engine_that_nobody_holds_is_freed(stage: int, tmp_path: Path) -> None:
    threads = set(threading.enumerate())

    def train() -> weakref.ref[nn.Module]:
        homes = {"optimizer": "nvme", "nvme_path": str(tmp_path)} if stage else {}
        engine = Engine(strategy={"zero_stage": stage}, offload=homes)
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
        model, optimizer = engine.prepare(model, torch.optim.AdamW(model.parameters()))
        for _ in range(2):
            engine.backward(model(torch.ones(2, 8)).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        return weakref.ref(model)

    model = train()
    gc.collect()
    assert model() is None
    assert set(threading.enumerate()) <= threads  # those of earlier tests may end meanwhile
