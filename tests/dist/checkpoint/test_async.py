"""Saving in the background: training goes on, what is saved is of its step, errors come back, a kill loses nothing."""

from __future__ import annotations

import os
import resource
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import distui
from distui.core.checkpoint import folder as folders
from distui.core.checkpoint import rotation, writing
from distui.core.checkpoint.flat import FlatShard
from distui.core.checkpoint.staging import Staging
from distui.core.errors import UserError

if TYPE_CHECKING:
    from tests.dist.rank_pool import RunRanks


def _job(stage: int, **checkpoint: Any) -> tuple[distui.Engine, Any, Any]:
    engine = distui.Engine(strategy={"zero_stage": stage}, checkpoint=checkpoint)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 50), nn.BatchNorm1d(50), *(nn.Linear(50, 50) for _ in range(3)))
    return engine, *engine.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01))


def _steps(job: tuple[distui.Engine, Any, Any], num_steps: int) -> None:
    engine, model, optimizer = job
    for _ in range(num_steps):
        engine.backward(model(torch.randn(6, 40)).square().mean())
        optimizer.step()
        optimizer.zero_grad()


class _Gate:
    """Holds every save of rank 0 just before it is sealed."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        self._real = folders.commit

    def __enter__(self) -> _Gate:
        def commit(*args: Any) -> None:
            self.reached.set()
            assert self.opened.wait(120)
            self._real(*args)

        folders.commit = commit  # type: ignore[assignment]
        return self

    def __exit__(self, *_: object) -> None:
        folders.commit = self._real


def _train_on(path: str, stage: int) -> dict[str, Any]:
    job = _job(stage)
    engine = job[0]
    _steps(job, 2)
    state = engine.get_state_dict(job[1])
    moments = [value["exp_avg"].clone() for value in job[2].state.values()]
    with _Gate() as gate:
        engine.save_state(path, asynchronous=True)
        _steps(job, 3)  # its collectives pass while the save is held
        if engine.is_main_process:
            assert gate.reached.wait(120)
            assert not (Path(path) / folders.MANIFEST).exists()
        gate.opened.set()
        engine.saver.wait()
    assert any(not torch.equal(value, state[name]) for name, value in engine.get_state_dict(job[1]).items())
    engine.load_state(path)
    for name, value in engine.get_state_dict(job[1]).items():
        assert torch.equal(value, state[name]) or "running" in name, name
    for value, moment in zip(job[2].state.values(), moments, strict=True):
        assert torch.equal(value["exp_avg"], moment)
    assert engine.clock.step == 2
    return engine.get_state_dict(job[1])


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_training_goes_on_and_the_save_is_of_its_step(run_ranks: RunRanks, tmp_path: Path, stage: int) -> None:
    first, second = run_ranks(_train_on, 2, str(tmp_path / "ckpt"), stage)
    torch.testing.assert_close(first, second, atol=0, rtol=0, msg="buffers are rank 0's on every rank")


def _next_save_waits(path: str) -> None:
    job = _job(2)
    engine = job[0]
    with _Gate() as gate:
        engine.save_state(f"{path}/first", asynchronous=True)
        threading.Timer(0.2, gate.opened.set).start()
        engine.save_state(f"{path}/second", asynchronous=True)
        if engine.is_main_process:
            assert (Path(path) / "first" / folders.MANIFEST).exists(), "one save in flight"
        engine.end_training()
    if engine.is_main_process:
        assert (Path(path) / "second" / folders.MANIFEST).exists(), "end_training waits"


def test_one_save_is_in_flight_and_the_end_waits(run_ranks: RunRanks, tmp_path: Path) -> None:
    run_ranks(_next_save_waits, 2, str(tmp_path))


def _groups_destroyed(path: str) -> None:
    job = _job(1)
    with _Gate() as gate:
        job[0].save_state(path, asynchronous=True)
        torch.distributed.destroy_process_group()
        gate.opened.set()
        job[0].saver.wait()


def test_a_save_survives_the_end_of_the_process_groups(run_ranks: RunRanks, tmp_path: Path) -> None:
    run_ranks(_groups_destroyed, 2, str(tmp_path / "ckpt"))
    run_ranks(_load_at, 1, str(tmp_path / "ckpt"))


def _load_at(path: str) -> None:
    engine = _job(0)[0]
    engine.load_state(path)


def _disk_full(path: str) -> list[str]:
    job = _job(1)
    engine = job[0]
    engine.save_state(path)
    _steps(job, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    reports = []
    for asynchronous in (True, False):
        if engine.process_index == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        try:
            engine.save_state(path, asynchronous=asynchronous)
            engine.saver.wait()
        except UserError as error:
            reports.append(error.report())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert folders.verify(folders.find(Path(path)))["step"] == 0
    if engine.is_main_process:  # it clears up while the others go on
        assert len(list(Path(path).iterdir())) == 2, "the manifest, and the data that it names"
    engine.save_state(path, asynchronous=True)
    engine.saver.wait()
    assert folders.verify(Path(path))["step"] == 1
    return reports


def test_a_full_disk_is_told_to_all_ranks_and_the_last_good_one_stays(run_ranks: RunRanks, tmp_path: Path) -> None:
    path = tmp_path / "ckpt"
    for reports in run_ranks(_disk_full, 2, str(path)):
        assert len(reports) == 2
        for report in reports:
            assert f"the checkpoint {path} was not written" in report
            assert "rank 1: " in report and "rank 0: " not in report and " are free at " in report


def _automatic(path: str, async_save: bool) -> list[str]:
    engine, *_ = job = _job(3, dir=path, every_steps=1, keep=2, async_save=async_save)
    if engine.is_main_process:
        (Path(path) / ".step_00000000.writing").mkdir(parents=True)  # a crash left it
    _steps(job, 5)
    engine.saver.wait()
    return sorted(os.listdir(path))


@pytest.mark.parametrize("async_save", [True, False])
def test_the_newest_automatic_checkpoints_stay(run_ranks: RunRanks, tmp_path: Path, async_save: bool) -> None:
    run_ranks(_automatic, 2, str(tmp_path / "steps"), async_save)
    assert sorted(os.listdir(tmp_path / "steps")) == ["step_00000004", "step_00000005"]


def _killed(path: str, after_s: float) -> None:
    job = _job(2, dir=path, every_steps=1, keep=2)
    _steps(job, 1)
    job[0].saver.wait()
    if job[0].process_index == 1:
        threading.Timer(after_s, os.kill, (os.getpid(), signal.SIGKILL)).start()
    _steps(job, 100_000)


def _load_newest(path: str) -> int:
    newest = rotation.checkpoints(Path(path))[-1]
    job = _job(1)
    job[0].load_state(str(newest))
    assert newest.name == f"step_{job[0].clock.step:08d}"
    _steps(job, 1)
    return job[0].clock.step


@pytest.mark.parametrize("after_s", [pytest.param(0.05, marks=pytest.mark.matrix), 0.31])
def test_a_kill_at_any_moment_leaves_a_good_one(run_ranks: RunRanks, tmp_path: Path, after_s: float) -> None:
    path = tmp_path / "steps"
    with pytest.raises((ChildProcessError, RuntimeError)):
        run_ranks(_killed, 2, str(path), after_s)
    found = rotation.checkpoints(path)
    assert found
    for checkpoint in found:
        folders.verify(checkpoint)
    assert run_ranks(_load_newest, 2, str(path))[0] > 1


def test_staging_copies_each_flat_buffer_once_and_reuses_its_memory() -> None:
    flat, scalar = torch.arange(20.0), torch.tensor(3.0)
    items = {"a": FlatShard(flat[4:7], 0, 3), "b": FlatShard(flat[10:16], 2, 9), "c": FlatShard(flat[:0], 0, 5)}
    staging = Staging()
    copies, arrived = staging.copy({**items, "step": scalar})
    arrived()
    flat.zero_()
    assert torch.equal(copies["a"].local, torch.arange(4.0, 7.0)) and copies["step"] == 3.0
    assert torch.equal(copies["b"].local, torch.arange(10.0, 16.0)) and copies["b"].start == 2
    assert copies["c"].numel() == 5 and not copies["c"].local.numel()
    assert staging.allocated_bytes == 12 * 4 + 4, "from the first to the last element that is saved"
    address = copies["a"].local.data_ptr()
    again, _ = staging.copy(items)
    assert again["a"].local.data_ptr() == address and staging.allocated_bytes == 12 * 4


def test_a_bug_while_writing_is_not_told_as_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = _job(0)[0]

    def buggy(*_: Any) -> None:
        raise KeyError("missing")

    monkeypatch.setattr(writing, "write_rank", buggy)
    engine.save_state(str(tmp_path / "ckpt"), asynchronous=True)
    with pytest.raises(KeyError, match="missing"):
        engine.saver.wait()
    engine.saver.wait()  # told once
