"""Resuming scripts of other shapes: no loader, random data sets, samplers and workers, several steps a batch."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset

import distui
from distui.core.checkpoint import folder as folders
from distui.core.checkpoint import rotation
from distui.core.engine import step_end
from distui.core.errors import UserError

if TYPE_CHECKING:
    from tests.dist.rank_pool import RunRanks


def _job(path: str = "", every: int = 0, seed: int = 0, stage: int = 1, **checkpoint: Any) -> tuple[Any, ...]:
    engine = distui.Engine(
        strategy={"zero_stage": stage}, checkpoint={"dir": path, "every_steps": every, "keep": 50, **checkpoint}
    )
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    model: Any = nn.Sequential(nn.Linear(5, 5), nn.Dropout(0.3), nn.Linear(5, 1))
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=0.05)
    model, optimizer = engine.prepare(model, optimizer)
    scheduler: Any = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    engine.register_for_checkpointing(scheduler)
    return engine, model, optimizer, scheduler


def _step(job: tuple[Any, ...], loss: torch.Tensor) -> float:
    engine, _, optimizer, scheduler = job
    engine.backward(loss)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    return loss.item()


# ---- without a loader ------------------------------------------------------------------------------------------------


def _own_data(job: tuple[Any, ...], num_steps: int, way: str) -> list[float]:
    engine, model, *_ = job
    losses = []
    for _ in range(num_steps):
        x = torch.randn(4, 5)
        if way == "accumulate":
            with engine.accumulate(model):
                losses.append(_step(job, model(x).square().mean()))
        elif way == "forward":
            losses.append(_step(job, model(x).square().mean()))
        else:  # never enters the model's forward
            hidden = model[1](model[0](x))
            losses.append(_step(job, model[2](hidden).square().mean()))
    return losses


def _resume_own_data(path: str, way: str, stage: int) -> list[tuple[list[float], list[float]]]:
    found = []
    whole = _own_data(_job(stage=stage), 9, way)
    for every, async_save in ((1, True), (4, False)):
        folder = f"{path}/{way}{every}"
        job = _job(folder, every, stage=stage, async_save=async_save)
        _own_data(job, 5, way)
        job[0].saver.join()  # as it is when the process is killed now
        newest = rotation.checkpoints(Path(folder))[-1]
        assert newest.name == "step_00000004", "that of step 5 would have come with step 6"
        job = _job(seed=7, stage=stage)
        job[0].load_state(str(newest))
        found.append((_own_data(job, 5, way), whole[4:]))
    return found


@pytest.mark.parametrize(("world", "way", "stage"), [
    (1, "accumulate", 0), (1, "parts", 0), (2, "forward", 3), (2, "accumulate", 3), (2, "parts", 1)
])  # fmt: skip
def test_scripts_that_make_their_own_data(
    run_ranks: RunRanks, tmp_path: Path, world: int, way: str, stage: int
) -> None:
    for found in run_ranks(_resume_own_data, world, str(tmp_path), way, stage):
        for resumed, expected in found:
            assert resumed == expected


# ---- random data sets, samplers, workers -----------------------------------------------------------------------------


class Noisy(Dataset[torch.Tensor]):
    """Draws from all three global generators for each sample."""

    def __len__(self) -> int:
        return 22

    def __getitem__(self, index: int) -> torch.Tensor:
        drawn = (
            torch.rand(()).item() + random.random() + float(np.random.rand()) + random.gauss(0, 1) + np.random.randn()
        )
        return torch.full((5,), index / 10) + drawn


class Shuffled(Sampler[int]):
    """Shuffles with Python's global generator, as samplers of scripts do."""

    def __len__(self) -> int:
        return 22

    def __iter__(self) -> Iterator[int]:
        order = list(range(22))
        random.shuffle(order)
        return iter(order)


def _seed_more(worker: int) -> None:
    random.seed(worker + 100)


def _read(
    job: tuple[Any, ...], loader: Any, until: int, save_at: int = -1, path: str = ""
) -> list[tuple[float, float]]:
    found: list[tuple[float, float]] = []
    while True:
        for batch in loader:
            if len(found) == until:
                return found
            if len(found) == save_at:
                job[0].save_state(path)
            found.append((batch.sum().item(), _step(job, job[1](batch).square().mean())))


def _options(kind: str) -> dict[str, Any]:
    if kind == "in process":
        return {"shuffle": True}
    if kind == "sampler":
        return {"sampler": Shuffled()}
    workers = {"shuffle": True, "num_workers": 2, "multiprocessing_context": "fork"}
    if kind == "persistent workers":
        workers |= {"persistent_workers": True}
    elif kind == "seeded workers":
        workers |= {"worker_init_fn": _seed_more}
    return workers


def _resume_reading(path: str, kind: str) -> list[str]:
    def read(job: tuple[Any, ...], until: int, save_at: int = -1, load: str = "") -> list[tuple[float, float]]:
        loader = job[0].prepare(DataLoader(Noisy(), batch_size=2, **_options(kind)))
        if load:
            job[0].load_state(load)
        found = _read(job, loader, until, save_at, f"{path}/{save_at}")
        loader._inner = None  # ends its workers at once: as garbage they would be ended by the next ones, in a fork
        return found

    wrong = []
    whole = read(_job(), 20)
    for save_at in (1, 4, 11, 13):  # epochs have 11 batches on one rank, 6 on two
        read(_job(), save_at + 1, save_at)
        found = read(_job(seed=5), 20 - save_at, load=f"{path}/{save_at}")
        if found != whole[save_at:]:
            wrong.append(f"saved at {save_at}: {found} is not {whole[save_at:]}")
    return wrong


@pytest.mark.parametrize(
    ("world", "kind"),
    [
        *((world, kind) for world in (1, 2) for kind in ("in process", "sampler")),
        *((1, kind) for kind in ("seeded workers", "persistent workers")),
        (2, "workers"),
    ],
)
def test_random_reading_goes_on(run_ranks: RunRanks, tmp_path: Path, kind: str, world: int) -> None:
    for wrong in run_ranks(_resume_reading, world, str(tmp_path), kind, timeout_s=120):
        assert not wrong, "\n".join(wrong)


# ---- loops of other shapes -------------------------------------------------------------------------------------------


def _pairs(job: tuple[Any, ...], path: str = "") -> tuple[list[float], list[str]]:
    """Two loaders side by side, evaluation in the loop, and averages of weights that are updated after the step."""
    engine, model, *_ = job
    data = torch.randn(24, 5, generator=torch.Generator().manual_seed(3))
    one = engine.prepare(DataLoader(TensorDataset(data), batch_size=2, shuffle=True))
    two = engine.prepare(DataLoader(TensorDataset(data + 1), batch_size=2, shuffle=True))
    held_out = engine.prepare(DataLoader(TensorDataset(data), batch_size=6))
    average = Average(engine, model)
    engine.register_for_checkpointing(average)
    if path:
        engine.load_state(path)
    losses: list[float] = []
    for (x,), (y,) in zip(one, two, strict=True):
        losses.append(_step(job, (model(x) - model(y)).square().mean()))
        model.eval()
        for (z,) in held_out:
            with torch.no_grad():
                losses[-1] += model(z).sum().item()
        model.train()
        average.update()
        losses[-1] += average.weight.sum().item()
    return losses, []


class Average:
    def __init__(self, engine: Any, model: Any) -> None:
        self.engine, self.model = engine, model
        self.weight = engine.get_state_dict(model)["0.weight"]

    def update(self) -> None:
        self.weight = 0.9 * self.weight + 0.1 * self.engine.get_state_dict(self.model)["0.weight"]

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"weight": self.weight}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.weight = state["weight"]


def _resume_pairs(path: str) -> tuple[list[float], list[float]]:
    whole, _ = _pairs(_job())
    job = _job(path, 3)
    _pairs(job)
    job[0].saver.join()
    resumed, _ = _pairs(_job(seed=3), f"{path}/step_00000003")
    return resumed, whole[3:]


@pytest.mark.parametrize("world", [1, 2])
def test_two_loaders_evaluation_and_averages_in_the_loop(run_ranks: RunRanks, tmp_path: Path, world: int) -> None:
    for resumed, expected in run_ranks(_resume_pairs, world, str(tmp_path)):
        assert resumed == expected and len(resumed) > 2


def _several_steps(path: str) -> list[str]:
    """Four steps a batch: what is asked for in the first waits for the batch to be done with."""
    job = _job(path, 4)
    loader = job[0].prepare(DataLoader(TensorDataset(torch.ones(12, 5)), batch_size=2))
    for (x,) in loader:
        for _ in range(3):
            _step(job, job[1](x).square().mean())
    job[0].saver.wait()
    return sorted(path.name for path in Path(path).iterdir())


def test_a_save_waits_until_all_steps_of_a_batch_are_done(run_ranks: RunRanks, tmp_path: Path) -> None:
    names = run_ranks(_several_steps, 1, str(tmp_path / "one"))[0]
    assert names == [f"step_{step:08d}" for step in (6, 9, 12, 18)], "every fourth step, at the end of its batch"


def _one_long_batch(path: str) -> list[str]:
    step_end.LONGEST_WAIT_STEPS = 5
    job = _job(path, 4)
    loader = job[0].prepare(DataLoader(TensorDataset(torch.ones(4, 5)), batch_size=4))
    for (x,) in loader:
        for _ in range(14):
            _step(job, job[1](x).square().mean())
        return sorted(path.name for path in Path(path).iterdir())
    raise AssertionError


def test_a_batch_that_never_ends_is_not_waited_for(run_ranks: RunRanks, tmp_path: Path) -> None:
    assert run_ranks(_one_long_batch, 1, str(tmp_path))[0] == ["step_00000010"]


def _one_rank_reads(path: str) -> list[str]:
    """Rank 0 reads a prepared loader and hands its batches on: the others have none to wait for."""
    job = _job(path, 2, async_save=False)
    engine, model, *_ = job
    batches: Any = iter(range(6))
    if engine.is_main_process:
        batches = iter(engine.prepare(DataLoader(TensorDataset(torch.ones(24, 5)), batch_size=2)))
    else:
        engine.prepare(DataLoader(TensorDataset(torch.ones(24, 5)), batch_size=2))
    for _ in range(6):
        batch = next(batches)
        x = batch[0] if engine.is_main_process else torch.empty(2, 5)
        dist.broadcast(x, src=0)
        _step(job, model(x).square().mean())
    engine.saver.wait()
    return sorted(path.name for path in Path(path).iterdir())


def test_ranks_that_read_in_different_ways_do_not_wait_for_each_other(run_ranks: RunRanks, tmp_path: Path) -> None:
    names = run_ranks(_one_rank_reads, 2, str(tmp_path))[0]
    assert names == ["step_00000002", "step_00000004", "step_00000006"]


def _go_back(path: str) -> tuple[list[float], list[float]]:
    """A state is loaded in the middle of the loop: the loop goes on where that state was."""
    engine, model, *_ = job = _job()
    data = torch.randn(20, 5, generator=torch.Generator().manual_seed(3))
    loader = engine.prepare(DataLoader(TensorDataset(data), batch_size=2, shuffle=True))
    first: list[float] = []
    again: list[float] = []
    for (x,) in loader:
        losses = again if len(first) == 5 else first
        losses.append(_step(job, model(x).square().mean()))
        if losses is first and len(first) == 2:
            engine.save_state(path)
        if losses is first and len(first) == 5:
            engine.backward(model(x).square().mean())  # left over: it must not be in the next step
            engine.load_state(path)
    return first[2:], again


@pytest.mark.parametrize("world", [1, 2])
def test_a_loop_goes_back_with_the_state_that_is_loaded_in_it(run_ranks: RunRanks, tmp_path: Path, world: int) -> None:
    for first, again in run_ranks(_go_back, world, str(tmp_path / "ckpt")):
        assert again[:3] == first and len(again) == (10 // world) - 2


# ---- loud ------------------------------------------------------------------------------------------------------------


def _awkward(path: str) -> list[str]:
    engine, model, optimizer, _ = _job()
    told = []
    for way in ("between", "forgotten"):
        engine.backward(model(torch.ones(2, 5)).sum())
        if way == "forgotten":  # a script that leaves out a bad batch
            optimizer.zero_grad()
        try:
            engine.save_state(f"{path}/{way}")
        except UserError as error:
            told.append(f"{way}: {error.report()}")
    optimizer.zero_grad()
    return told


@pytest.mark.parametrize("world", [1, 2])
def test_gradients_that_would_be_lost_are_told(run_ranks: RunRanks, tmp_path: Path, world: int) -> None:
    for told in run_ranks(_awkward, world, str(tmp_path)):
        (only,) = told
        assert only.startswith("between: error: save_state between a backward and the optimizer's step")
        assert "after optimizer.step()" in only
    assert (tmp_path / "forgotten" / folders.MANIFEST).exists() and not (tmp_path / "between").exists()


def _epoch_end(path: str) -> list[Any]:
    job = _job(path, 3)
    engine, model, *_ = job
    loader = engine.prepare(DataLoader(TensorDataset(torch.ones(6 * engine.num_processes, 5)), batch_size=2))
    found = []
    for _ in range(2):
        for (x,) in loader:
            _step(job, model(x).square().mean())
        engine.saver.join()
        kept = rotation.checkpoints(Path(path))
        found.append([(path.name, folders.read_manifest(path)["provisional"]) for path in kept])
    engine.end_training()
    found.append([folders.read_manifest(path)["provisional"] for path in rotation.checkpoints(Path(path))])
    return found


def test_the_end_of_an_epoch_is_saved_before_its_evaluation_and_again_after(
    run_ranks: RunRanks, tmp_path: Path
) -> None:
    first, second, last = run_ranks(_epoch_end, 1, str(tmp_path))[0]
    assert first == [("step_00000003", True)], "were the evaluation to fail, the epoch would not be lost"
    assert second == [("step_00000003", False), ("step_00000006", True)]
    assert last == [False, False]
