"""Offloaded states through the public API: checkpoints both ways, weights between steps, state_dict, bytes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import distui
from distui.core.checkpoint import folder as folders
from distui.core.errors import UserError
from distui.core.sharding.units import partition

if TYPE_CHECKING:
    from tests.dist.rank_pool import RunRanks

VOCAB, DIM = 31, 100


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, DIM)
        self.layers = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(4))
        self.frozen = nn.Linear(DIM, DIM).requires_grad_(False)
        self.head = nn.Linear(DIM, VOCAB, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        x_BTD = self.embedding(ids_BT)
        for layer in self.layers:
            x_BTD = torch.tanh(layer(x_BTD))
        return self.head(self.frozen(x_BTD))


Job = tuple[Any, Any, Any]


def _job(stage: int, dtype: str, homes: tuple[str, str], folder: str, seed: int = 0) -> Job:
    partition.SMALL_UNIT_NUMEL = 1
    engine = distui.Engine(
        strategy={"zero_stage": stage},
        precision={"dtype": dtype},
        offload={"optimizer": homes[0], "params": homes[1], "nvme_path": folder},
        optimizer={"max_grad_norm": 0.5},
    )
    torch.manual_seed(seed)
    model = Model()
    return (engine, *engine.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01)))


def _steps(job: Job, steps: range) -> list[float]:
    engine, model, optimizer = job
    losses = []
    for step in steps:
        ids = torch.randint(0, VOCAB, (8, 6), generator=torch.Generator().manual_seed(step))
        mine = ids.chunk(engine.num_processes)[engine.process_index]
        loss = F.cross_entropy(model(mine).float().flatten(0, 1), mine.flatten())
        engine.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(engine.reduce(loss.detach(), "mean").item())
    return losses


def _across_homes(dtype: str, folder: str) -> None:
    """Save with one placement, go on with another: as if nothing had happened."""
    cases = [
        (1, ("nvme", "none"), 3, ("none", "none")),
        (3, ("none", "none"), 3, ("nvme", "nvme")),
        (3, ("nvme", "nvme"), 2, ("cpu", "none")),
        (2, ("nvme", "none"), 3, ("none", "nvme")),
    ]
    whole = _job(2, dtype, ("none", "none"), folder)
    expected = _steps(whole, range(5))
    weights = whole[0].get_state_dict(whole[1])
    for index, (stage, homes, stage_after, homes_after) in enumerate(cases):
        target = f"{folder}/checkpoint{index}"
        before = _job(stage, dtype, homes, folder)
        found = _steps(before, range(3))
        before[0].save_state(target, asynchronous=True)
        before[0].saver.wait()
        after = _job(stage_after, dtype, homes_after, folder, seed=9)
        if index == 2:
            _steps(after, range(1))  # states that are there are replaced
        after[0].load_state(target)
        found += _steps(after, range(3, 5))
        assert found == pytest.approx(expected, abs=1e-5), cases[index]
        torch.testing.assert_close(after[0].get_state_dict(after[1]), weights, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("num_ranks", "dtype"), [(1, "bf16"), (2, "fp32")])
def test_a_checkpoint_goes_from_any_home_to_any_other(
    run_ranks: RunRanks, tmp_path: Path, num_ranks: int, dtype: str
) -> None:
    run_ranks(_across_homes, num_ranks, dtype, str(tmp_path))
    folders.verify(tmp_path / "checkpoint0")


def _states_and_weights(folder: str) -> None:
    plain, moved = (_job(3, "bf16", homes, folder) for homes in (("none", "none"), ("nvme", "nvme")))
    for job in (plain, moved):
        _steps(job, range(2))
    # The optimizer's own states: the same content, read and given back.
    states, expected = moved[2].state_dict(), plain[2].state_dict()
    assert states["param_groups"] == expected["param_groups"]
    assert [sorted(state) for state in states["state"].values()] == [["exp_avg", "exp_avg_sq", "step"]] * len(
        expected["state"]
    )
    for index, state in expected["state"].items():
        torch.testing.assert_close(states["state"][index], state, atol=1e-7, rtol=1e-5)
    for job in (plain, moved):
        before = job[2].state_dict()
        before = {**before, "state": {i: {k: v.clone() for k, v in s.items()} for i, s in before["state"].items()}}
        weights = job[0].get_state_dict(job[1])
        first = _steps(job, range(2, 4))
        job[2].load_state_dict(before)
        job[0].load_state_dict(job[1], weights)
        assert _steps(job, range(2, 4)) == pytest.approx(first, abs=1e-6)
    # Weights between steps, and what the script writes to them.
    with moved[0].full_parameters(moved[1], writeback=True) as model, torch.no_grad():
        for param in model.parameters():
            param.mul_(0.5)
    halved = moved[0].get_state_dict(moved[1])
    torch.testing.assert_close(
        halved["layers.1.bias"], weights_after(plain)["layers.1.bias"] * 0.5, atol=1e-2, rtol=1e-2
    )
    # Clipping some of the parameters, and single elements.
    for job in (plain, moved):
        engine, model, optimizer = job
        engine.load_state_dict(model, weights)
        ids = torch.zeros(2, 3, dtype=torch.long)
        engine.backward(F.cross_entropy(model(ids).float().flatten(0, 1), ids.flatten()))
        engine.clip_grad_norm_(model.layers.parameters(), 1e-3)
        engine.clip_grad_value_(model.parameters(), 1e-4)
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(weights_after(moved), weights_after(plain), atol=1e-5, rtol=1e-4)


def weights_after(job: Job) -> dict[str, Any]:
    return job[0].get_state_dict(job[1])


def test_states_and_weights_are_read_and_written_between_steps(run_ranks: RunRanks, tmp_path: Path) -> None:
    run_ranks(_states_and_weights, 1, str(tmp_path))


def _bytes(folder: str) -> tuple[dict[str, int], int]:
    job = _job(3, "bf16", ("nvme", "nvme"), folder)
    _steps(job, range(2))
    (sharded,) = job[0].backend._models.values()
    assert not job[2].inner.state[job[2].runs[0][0].param].keys() - {"step"}
    padded = sum(unit.layout.padded_numel * (18 if unit.trainable else 2) for unit in sharded.units)
    nvme = sharded.homes.nvme.file
    assert nvme.bytes_read > 0 and nvme.bytes_written > 0
    return job[0].memory_report(), padded


def test_memory_report_says_what_is_where(run_ranks: RunRanks, tmp_path: Path) -> None:
    for num_ranks in (1, 2):
        for report, padded in run_ranks(_bytes, num_ranks, str(tmp_path)):
            # 2 of the parameter, 4 of its master, 8 of the moments, 4 of the gradient.
            assert report["nvme"] == padded // num_ranks
            assert report["host"] == 0
            assert report["parameters"] == report["gradients"] == 0 and report["optimizer_states"] < 1000
    assert not list(tmp_path.iterdir()), "the files have no name"


def _refusals(folder: str) -> None:
    with pytest.raises(UserError, match="only stage 3 shards parameters"):
        _job(2, "fp32", ("none", "cpu"), folder)
    with pytest.raises(UserError, match="does not exist"):
        _job(3, "fp32", ("nvme", "none"), f"{folder}/missing")


def test_what_cannot_work_is_refused_without_the_launcher(run_ranks: RunRanks, tmp_path: Path) -> None:
    run_ranks(_refusals, 1, str(tmp_path))


def _two_optimizers(folder: str, homes: tuple[str, str]) -> list[Any]:
    partition.SMALL_UNIT_NUMEL = 1
    engine = distui.Engine(
        strategy={"zero_stage": 3},
        offload={"optimizer": homes[0], "params": homes[1], "nvme_path": folder},
        compression={"gradients": "int8"} if engine_has_peers() else {},
    )
    torch.manual_seed(0)
    model = Model()
    matrices = [param for param in model.parameters() if param.requires_grad and param.dim() > 1]
    vectors = [param for param in model.parameters() if param.requires_grad and param.dim() == 1]
    model, first, second = engine.prepare(
        model, torch.optim.AdamW(matrices, lr=0.01), torch.optim.SGD(vectors, lr=0.1, momentum=0.9)
    )
    for step in range(3):
        ids = torch.randint(0, VOCAB, (4, 6), generator=torch.Generator().manual_seed(step))
        engine.backward(F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()))
        engine.clip_grad_norm_(model.parameters(), 0.5)
        for optimizer in (first, second):
            optimizer.step()
            optimizer.zero_grad()
    return [engine.get_state_dict(model)]


def engine_has_peers() -> bool:
    return torch.distributed.is_initialized()


def _two_optimizers_in_each_home(folder: str) -> None:
    (on_device,) = _two_optimizers(folder, ("none", "none"))
    for homes in (("cpu", "none"), ("nvme", "nvme")):
        (found,) = _two_optimizers(folder, homes)
        # Blocks of the 8-bit gradients begin elsewhere, because shards are padded to pages.
        atol = 1e-2 if engine_has_peers() else 1e-6
        torch.testing.assert_close(found, on_device, atol=atol, rtol=1e-2 if engine_has_peers() else 1e-5)
    if engine_has_peers():
        engine = distui.Engine(strategy={"zero_stage": 2}, offload={"optimizer": "nvme", "nvme_path": folder})
        model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
        with pytest.raises(UserError, match="Muon with offload on several ranks"):
            engine.prepare(model, torch.optim.Muon(model.parameters(), lr=0.01))


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_two_optimizers_share_units(run_ranks: RunRanks, tmp_path: Path, num_ranks: int) -> None:
    run_ranks(_two_optimizers_in_each_home, num_ranks, str(tmp_path))
