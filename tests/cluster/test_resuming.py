"""A script that was started again goes on where its run was saved, without a word of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import distui
from distui.core.engine.resuming import RESTARTS_ENV
from distui.core.paths import JOB_ENV, RunFolder
from distui.core.telemetry import source as sources

Told = list[tuple[int, int, float, float]]


class Killed(Exception):
    """Stands for the signal."""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunFolder]:
    """Give the folder of a job of one rank that saves every four steps."""
    folder = RunFolder(tmp_path / "run")
    folder.create()
    folder.config.write_text("[checkpoint]\nevery_steps = 4\nasync_save = false\n[telemetry]\nenabled = false\n")
    folder.spec.write_text(json.dumps({"run_id": "run"}))
    monkeypatch.setenv(JOB_ENV, str(folder.path))
    yield folder
    sources._current = None


def train(kill: int = 0, epochs: int = 3, load: str = "", evaluates: bool = False, **checkpoint: Any) -> Told:
    """Train 6 steps an epoch; return (epoch, step, loss, learning rate) of each until the step of the kill."""
    engine = distui.Engine(checkpoint=checkpoint) if checkpoint else distui.Engine()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.3), torch.nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    data = torch.utils.data.TensorDataset(torch.arange(48.0).reshape(12, 4) / 48)
    loader = torch.utils.data.DataLoader(data, 2, shuffle=True, generator=torch.Generator().manual_seed(1))
    held_out = torch.utils.data.DataLoader(data, 4)
    model, optimizer, loader, held_out, scheduler = engine.prepare(model, optimizer, loader, held_out, scheduler)
    if load:
        engine.load_state(load)
    told: Told = []
    for epoch in range(epochs):
        model.train()
        for (batch,) in loader:
            loss = (model(batch) - 1).square().mean()
            engine.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            told.append((epoch, engine.clock.step, loss.item(), scheduler.get_last_lr()[0]))
            if engine.clock.step == kill:
                return told
        scheduler.step()  # once an epoch
        if evaluates:
            model.eval()
            with torch.no_grad():
                sizes = [len(batch) for (batch,) in held_out]
            assert sum(sizes) == 12, "an evaluation has all of its batches, also on the way to where the run was"
    return told


@pytest.mark.parametrize(("kill", "saved"), [(7, 4), (14, 12), (18, 16)])
@pytest.mark.parametrize("evaluates", [False, True])
def test_it_goes_on_as_if_nothing_had_been(
    kill: int, saved: int, evaluates: bool, run: RunFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = train(evaluates=evaluates, dir=str(tmp_path / "elsewhere"))
    assert whole == train(evaluates=evaluates, dir=str(tmp_path / "twice")), "the first attempt loads nothing"
    first = train(kill, evaluates=evaluates)
    monkeypatch.setenv(RESTARTS_ENV, "1")
    second = train(evaluates=evaluates)
    assert first == whole[:kill] and second == whole[saved:], "the same epochs, steps, losses and learning rates"


def test_a_script_that_loads_by_itself_is_left_alone(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train()
    monkeypatch.setenv(RESTARTS_ENV, "1")
    again = train(load=str(run.path / "checkpoints" / "step_00000012"), epochs=1)
    assert [step for _, step, _, _ in again] == [13, 14, 15, 16, 17, 18]
    assert [one[2:] for one in again] == [one[2:] for one in whole[12:18]]


def test_without_a_checkpoint_of_this_run_it_begins_anew(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = train(dir=str(tmp_path / "shared"))
    other = RunFolder(tmp_path / "other")
    other.create()
    other.config.write_bytes(run.config.read_bytes())
    monkeypatch.setenv(JOB_ENV, str(other.path))
    monkeypatch.setenv(RESTARTS_ENV, "1")
    assert train(dir=str(tmp_path / "shared")) == whole, "another run's checkpoint is not this one's state"


def test_always_goes_on_from_whatever_is_there(run: RunFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    chosen: dict[str, Any] = {"dir": str(tmp_path / "shared"), "resume": "always"}
    whole = train(dir=str(tmp_path / "whole"))
    first = train(9, **chosen)
    second = train(**chosen)
    assert first == whole[:9] and second == whole[8:]
