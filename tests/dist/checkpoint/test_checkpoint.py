"""Checkpoints: another stage or number of ranks goes on, damage is named, a crash leaves the last good one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import distui
from distui.core.checkpoint.export import parse_size
from distui.core.errors import UserError

if TYPE_CHECKING:
    from tests.dist.rank_pool import RunRanks

VOCAB = 23


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 12)
        self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))
        self.frozen = nn.Linear(12, 12).requires_grad_(False)
        self.head = nn.Linear(12, VOCAB, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("count", torch.zeros(3))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(self.frozen(x))


class Counter:
    def __init__(self) -> None:
        self.value: Any = 0

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


def _job(stage: int, seed: int = 0, dtype: str = "fp32") -> tuple[Any, ...]:
    engine = distui.Engine(strategy={"zero_stage": stage}, batch={"global_size": 12}, precision={"dtype": dtype})
    torch.manual_seed(seed)
    model = Model()
    groups: list[dict[str, Any]] = [
        {"params": [*model.layers.parameters()]},
        {"params": [model.embedding.weight], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    ids = torch.randint(0, VOCAB, (60, 5), generator=torch.Generator().manual_seed(3))
    loader = DataLoader(TensorDataset(ids), batch_size=12, shuffle=True)
    counter = Counter()
    engine.register_for_checkpointing(counter)
    return (engine, *engine.prepare(model, optimizer, scheduler, loader), counter)


def _steps(job: tuple[Any, ...], num_steps: int, at_step_3: Callable[[], None] | None = None) -> list[float]:
    engine, model, optimizer, scheduler, loader, counter = job
    losses: list[float] = []
    while True:
        for (ids,) in loader:
            loss = F.cross_entropy(model(ids).float().flatten(0, 1), ids.flatten())
            engine.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            counter.value += 1
            losses.append(engine.reduce(loss.detach(), "mean").item())
            if len(losses) == 3 and at_step_3 is not None:
                at_step_3()
            if len(losses) == num_steps:
                return losses


def _save(stage: int, path: str, dtype: str = "fp32") -> tuple[dict[str, Any], list[float]]:
    job = _job(stage, dtype=dtype)
    state: dict[str, Any] = {}

    def save_in_the_middle_of_an_epoch() -> None:
        job[0].save_state(path)
        state.update(job[0].get_state_dict(job[1]))

    return state, _steps(job, 7, save_in_the_middle_of_an_epoch)[3:]


def _load(stage: int, path: str, dtype: str = "fp32") -> tuple[dict[str, Any], list[float], int, int]:
    job = _job(stage, seed=99, dtype=dtype)
    job[0].load_state(path)
    state = job[0].get_state_dict(job[1])
    return state, _steps(job, 4), job[5].value, job[0].clock.step


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [((3, 2), (1, 3)), ((1, 3), (0, 1)), ((0, 1), (3, 2)), ((2, 2), (2, 2)), ((3, 3), (3, 1))],
    ids=lambda value: f"stage{value[0]}x{value[1]}",
)
def test_another_stage_and_world_goes_on(
    run_ranks: RunRanks, tmp_path: Path, saved: tuple[int, int], loaded: tuple[int, int]
) -> None:
    path = str(tmp_path / "ckpt")
    state, losses = run_ranks(_save, saved[1], saved[0], path)[0]
    for found, found_losses, count, step in run_ranks(_load, loaded[1], loaded[0], path):
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], state[name]) for name in state), "weights must be bit-exact"
        torch.testing.assert_close(found_losses, losses, atol=1e-5, rtol=1e-5)
        assert count == 7 and step == 7


def test_another_precision_loads_the_masters(run_ranks: RunRanks, tmp_path: Path) -> None:
    path = str(tmp_path / "ckpt")
    state, _ = run_ranks(_save, 2, 2, path, "bf16")[0]
    found = run_ranks(_load, 1, 0, path, "fp32")[0][0]
    trainable = [name for name in state if not name.startswith("frozen")]
    assert all(torch.equal(found[name], state[name]) for name in trainable)


def _refused(path: str) -> str:
    job = _job(1)
    with pytest.raises(UserError) as caught:
        job[0].load_state(path)
    return caught.value.report()


def test_damage_is_named_on_every_rank(run_ranks: RunRanks, tmp_path: Path) -> None:
    path = tmp_path / "ckpt"
    run_ranks(_save, 2, 1, str(path))
    part = next(path.glob("*/rank00001.bin"))
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(bytes(data))
    for report in run_ranks(_refused, 2, str(path)):
        assert "is damaged" in report and part.name in report
    part.unlink()
    assert f"{part.name} is missing" in run_ranks(_refused, 1, str(path))[0]


def test_a_folder_that_was_never_finished_is_refused(run_ranks: RunRanks, tmp_path: Path) -> None:
    (tmp_path / "half").mkdir()
    assert "never finished" in run_ranks(_refused, 1, str(tmp_path / "half"))[0]
    assert "no such folder" in run_ranks(_refused, 1, str(tmp_path / "none"))[0]


def _save_model(path: str) -> dict[str, Any]:
    engine, model, *_ = _job(3)
    engine.save_model(model, path, "1KB")
    return engine.get_state_dict(model)


def test_save_model_writes_safetensors_with_an_index(run_ranks: RunRanks, tmp_path: Path) -> None:
    state = run_ranks(_save_model, 2, str(tmp_path))[0]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(state) - {"head.weight"}, "a tied weight is written once"
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], state[name])


def test_sizes_are_parsed() -> None:
    assert parse_size("10GB") == 10**10 and parse_size("2MiB") == 2**21 and parse_size(7) == 7
    with pytest.raises(UserError):
        parse_size("lots")
