"""What a checkpoint must have in common with the run that loads it, and what of it is told."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import distui
from distui.core.checkpoint import folder as folders
from distui.core.checkpoint.weights import read_weights
from distui.core.errors import UserError

if TYPE_CHECKING:
    from tests.dist.rank_pool import RunRanks

FORMAT_1 = Path(__file__).with_name("format1.zip")


class Net(nn.Module):
    def __init__(self, **changes: Any) -> None:
        super().__init__()
        num_in, num_out = changes.pop("first", (6, 4))
        self.first = nn.Linear(num_in, num_out, bias=False)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(changes.pop("layers", 2)))
        count = torch.zeros(changes.pop("count", 3), dtype=changes.pop("count_dtype", torch.int64))
        self.register_buffer("count", count)
        self.register_buffer("table", torch.zeros(changes.pop("table", 4)), persistent=False)
        self.extra = nn.Parameter(torch.ones(2)) if changes.pop("extra", False) else None
        assert not changes


def _prepared(
    stage: int, optimizer: str = "AdamW", seed: int = 0, schedule: str = "", **changes: Any
) -> tuple[Any, ...]:
    engine = distui.Engine(strategy={"zero_stage": stage})
    torch.manual_seed(seed)
    model = Net(**changes)
    groups: Any = [{"params": [model.first.weight]}, {"params": [*model.layers.parameters()]}]
    if model.extra is not None:
        groups[1]["params"].append(model.extra)
    made: Any = getattr(torch.optim, optimizer)(groups, lr=0.1, **({"momentum": 0.9} if optimizer == "SGD" else {}))
    prepared: tuple[Any, ...] = engine.prepare(model, made)
    if schedule:
        engine.prepare(getattr(torch.optim.lr_scheduler, schedule)(prepared[1], 10))
    return engine, *prepared


def _loss(model: Any) -> torch.Tensor:
    total = torch.zeros(())
    for module in (model.first, *model.layers):
        total = total + module(torch.ones(2, module.in_features)).square().mean()
    return total if model.extra is None else total + model.extra.sum()


def _step(job: tuple[Any, ...]) -> None:
    engine, model, optimizer = job
    engine.backward(_loss(model))
    optimizer.step()
    optimizer.zero_grad()


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "a shape": ({"first": (4, 6)}, "model0.first.weight is 4x6 in it and 6x4 here"),
    "a buffer's shape": ({"count": 5}, "model0.count is 3 in it and 5 here"),
    "a buffer's format": ({"count_dtype": torch.float32}, "model0.count is int64 in it and float32 here"),
    "more layers": ({"layers": 3}, "nothing for 2 of 9 tensors: model0.layers.2.bias, model0.layers.2.weight"),
    "fewer layers": (
        {"layers": 1},
        "2 tensors that are not in the model: model0.layers.1.bias, model0.layers.1.w",
    ),
    "a new parameter": ({"extra": True}, "nothing for 1 of 8 tensors: model0.extra"),
    "an optimizer": ({"optimizer": "SGD"}, "optimizer 0 is AdamW in it and SGD here"),
    "a schedule": ({"schedule": "StepLR"}, "it has 0 schedulers, the engine 1"),
}


def _refusals(path: str, stage: int) -> dict[str, tuple[str, bool]]:
    job = _prepared(stage)
    if stage < 3:
        _step(job)
    job[0].save_state(path)
    told = {}
    for name, (changes, _) in CASES.items():
        job = _prepared(stage, seed=5, **changes)
        before = job[0].get_state_dict(job[1])
        with pytest.raises(UserError) as caught:
            job[0].load_state(path)
        after = job[0].get_state_dict(job[1])
        told[name] = (caught.value.report(), all(torch.equal(before[key], after[key]) for key in before))
        if stage < 3:
            _step(job)  # nothing was changed, so training goes on
    return told


@pytest.mark.parametrize(("world", "stage"), [(1, 0), (2, 1), (2, 3)])
def test_what_does_not_fit_is_listed_and_changes_nothing(
    run_ranks: RunRanks, tmp_path: Path, world: int, stage: int
) -> None:
    for told in run_ranks(_refusals, world, str(tmp_path / "ckpt"), stage):
        for name, (_, expected) in CASES.items():
            report, unchanged = told[name]
            assert expected in report and unchanged, f"{name}: {report}"
            assert ("strict=False" in report) == (name not in ("a shape", "a buffer's shape"))


def test_a_buffer_that_torch_does_not_keep_may_have_another_size(tmp_path: Path) -> None:
    _prepared(0)[0].save_state(str(tmp_path / "ckpt"))
    assert _prepared(0, table=9)[0].load_state(str(tmp_path / "ckpt")) == []
    assert set(read_weights(tmp_path / "ckpt", tied=True)["model0"]) == set(Net().state_dict())


def _what_fits(path: str) -> tuple[list[str], dict[str, bool], bool]:
    job = _prepared(1)
    _step(job)
    job[0].save_state(path)
    saved = job[0].get_state_dict(job[1])
    job = _prepared(1, "SGD", seed=5, layers=3)
    left_out = job[0].load_state(path, strict=False)
    found = job[0].get_state_dict(job[1])
    same = {name: torch.equal(value, saved[name]) if name in saved else False for name, value in found.items()}
    _step(job)
    return left_out, same, job[0].clock.step == 2


def test_what_fits_is_taken_where_that_is_wanted(run_ranks: RunRanks, tmp_path: Path) -> None:
    for left_out, same, goes_on in run_ranks(_what_fits, 2, str(tmp_path / "ckpt")):
        assert {name for name, is_same in same.items() if not is_same} == {"layers.2.weight", "layers.2.bias"}
        assert len(left_out) == 2 and "layers.2" in left_out[0] and "AdamW in it and SGD here" in left_out[1]
        assert goes_on


# ---- before the first step -------------------------------------------------------------------------------------------


def _start_again(path: str, stage: int, optimizer: str) -> list[tuple[list[float], list[float]]]:
    """Save before the first step, train, load, and train again: alike, down to what the optimizer has not yet made."""

    def model() -> Any:
        return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))

    def train(job: tuple[Any, ...]) -> list[float]:
        losses = []
        for step in range(3):
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
            loss = job[1](x).square().mean()
            job[0].backward(loss)
            job[2].step()
            job[2].zero_grad()
            losses.append(loss.item())
        return losses

    found = []
    for home in ("none", "cpu") if stage else ("none",):
        engine = distui.Engine(strategy={"zero_stage": stage}, offload={"optimizer": home})
        torch.manual_seed(0)
        net = model()
        own = {"NAdam": {}, "SGD": {"momentum": 0.9, "dampening": 0.5}, "Rprop": {}, "AdamW": {}}[optimizer]
        job = (engine, *engine.prepare(net, getattr(torch.optim, optimizer)(net.parameters(), lr=0.1, **own)))
        engine.save_state(f"{path}/{home}")
        first = train(job)
        engine.load_state(f"{path}/{home}")
        assert engine.clock.step == 0
        found.append((first, train(job)))
    return found


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "NAdam", "Rprop"])
@pytest.mark.parametrize(("world", "stage"), [(1, 0), (2, 1), (2, 3)])
def test_a_checkpoint_of_before_the_first_step(
    run_ranks: RunRanks, tmp_path: Path, world: int, stage: int, optimizer: str
) -> None:
    for found in run_ranks(_start_again, world, str(tmp_path), stage, optimizer):
        for first, again in found:
            assert first == again


class Counting(torch.optim.SGD):
    """Keeps a count as a plain number, as many optimizers of scripts do."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                state["count"] = state.get("count", 0) + 1
                param.data.mul_(1.0 - 0.01 * state["count"])
        return super().step(closure)


def _count(path: str, backend: str) -> tuple[dict[str, Any], dict[str, Any]]:
    def job() -> tuple[Any, ...]:
        engine = distui.Engine(strategy={"backend": backend, "zero_stage": 0})
        torch.manual_seed(0)
        net = nn.Linear(4, 4)
        return engine, *engine.prepare(net, Counting(net.parameters(), lr=0.1))

    def step(job: tuple[Any, ...]) -> None:
        job[0].backward(job[1](torch.ones(2, 4)).square().mean())
        job[2].step()
        job[2].zero_grad()

    whole, broken = job(), job()
    for _ in range(4):
        step(whole)
    for _ in range(2):
        step(broken)
    broken[0].save_state(path)
    resumed = job()
    resumed[0].load_state(path)
    for _ in range(2):
        step(resumed)
    return whole[0].get_state_dict(whole[1]), resumed[0].get_state_dict(resumed[1])


@pytest.mark.parametrize("backend", ["native", "ddp"])
def test_states_that_are_numbers_are_kept(run_ranks: RunRanks, tmp_path: Path, backend: str) -> None:
    for expected, found in run_ranks(_count, 2, str(tmp_path / "ckpt"), backend):
        assert all(torch.equal(found[name], value) for name, value in expected.items())


# ---- half loaded -----------------------------------------------------------------------------------------------------


class Broken:
    """Cannot take its state back."""

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        raise RuntimeError("no")


def test_an_engine_that_is_half_loaded_trains_no_more(tmp_path: Path) -> None:
    job = _prepared(0)
    job[0].save_state(str(tmp_path / "whole"))
    job[0].register_for_checkpointing(Broken())
    job[0].save_state(str(tmp_path / "ckpt"))
    with pytest.raises(RuntimeError, match="no"):
        job[0].load_state(str(tmp_path / "ckpt"))
    with pytest.raises(UserError, match="half of one state"):
        _step(job)
    job[0]._registered.clear()
    job[0].load_state(str(tmp_path / "whole"))
    _step(job)


def _damaged(path: str) -> list[str]:
    """Each rank finds the damage in what it reads itself; the others hear of it."""
    job = _prepared(1)
    _step(job)
    job[0].save_state(path)
    told = []
    part = next(Path(path).glob("*/rank00001.bin"))
    whole = part.read_bytes()
    for kind in ("flipped", "cut", "gone"):
        job[0].wait_for_everyone()
        if job[0].is_main_process:
            flipped = bytearray(whole)
            flipped[len(whole) // 2] ^= 1
            part.write_bytes(bytes(flipped) if kind == "flipped" else whole[:-8])
            if kind == "gone":
                part.unlink()
        job[0].wait_for_everyone()
        before = job[0].get_state_dict(job[1])
        with pytest.raises(UserError) as caught:
            job[0].load_state(path)
        after = job[0].get_state_dict(job[1])
        assert all(torch.equal(before[name], after[name]) for name in before)
        told.append(caught.value.report())
    return told


def test_each_rank_checks_what_it_reads(run_ranks: RunRanks, tmp_path: Path) -> None:
    for flipped, cut, gone in run_ranks(_damaged, 2, str(tmp_path / "ckpt")):
        assert "is damaged" in flipped and "rank00001.bin has other contents" in flipped
        assert "rank00001.bin has" in cut and "instead of" in cut and "rank00001.bin is missing" in gone


# ---- format 1 --------------------------------------------------------------------------------------------------------


class OldNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 40)
        self.layers = nn.ModuleList(nn.Linear(40, 40) for _ in range(2))
        self.norm = nn.BatchNorm1d(40)
        self.head = nn.Linear(40, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(ids)
        for layer in self.layers:
            hidden = torch.tanh(layer(hidden))
        return self.head(self.norm(hidden))


class Counter:
    value = -1

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


def _go_on_from_format_1(folder: str, stage: int, optimizer: str = "AdamW") -> tuple[Any, ...]:
    engine = distui.Engine(strategy={"zero_stage": stage}, batch={"global_size": 4})
    torch.manual_seed(8)
    model: Any = OldNet()
    made: Any = getattr(torch.optim, optimizer)(model.parameters(), lr=0.01)
    scheduler: Any = torch.optim.lr_scheduler.ExponentialLR(made, 0.5)
    ids = torch.randint(0, 7, (12,), generator=torch.Generator().manual_seed(1))
    loader: Any = DataLoader(TensorDataset(ids), batch_size=4, shuffle=True)
    counter = Counter()
    engine.register_for_checkpointing(counter)
    model, made, scheduler, loader = engine.prepare(model, made, scheduler, loader)
    engine.load_state(f"{folder}/start")
    assert engine.clock.step == 0
    engine.load_state(f"{folder}/ck")
    loaded = engine.get_state_dict(model)
    losses = []
    for (batch,) in loader:
        loss = F.cross_entropy(model(batch), batch)
        engine.backward(loss)
        made.step()
        scheduler.step()
        losses.append(engine.reduce(loss.detach(), "mean").item())
    return loaded, losses, engine.get_state_dict(model), counter.value, engine.clock.step


@pytest.mark.parametrize(("world", "stage"), [(1, 0), (2, 3), (2, 1)])
def test_a_checkpoint_of_format_1_is_gone_on_from(run_ranks: RunRanks, tmp_path: Path, world: int, stage: int) -> None:
    with zipfile.ZipFile(FORMAT_1) as packed:
        packed.extractall(tmp_path)
    saved = torch.load(tmp_path / "ck.weights.pt")
    after = torch.load(tmp_path / "after.pt")
    for loaded, losses, left, count, step in run_ranks(_go_on_from_format_1, world, str(tmp_path), stage):
        assert loaded.keys() == saved.keys() and all(torch.equal(loaded[name], saved[name]) for name in saved)
        if world == 1:
            # What the distui of then computed, on another processor: its last bits may be others.
            assert losses == pytest.approx(after["losses"], rel=1e-5)
            for name, value in left.items():
                torch.testing.assert_close(value, after["weights"][name], rtol=1e-5, atol=1e-5)
        assert (count, step) == (2, 3)
    weights = read_weights(tmp_path / "ck", tied=False)["model0"]
    assert all(torch.equal(weights[name], saved[name]) for name in weights) and "head.weight" not in weights


def test_format_1_of_another_optimizer_is_told(run_ranks: RunRanks, tmp_path: Path) -> None:
    with zipfile.ZipFile(FORMAT_1) as packed:
        packed.extractall(tmp_path)
    with pytest.raises(UserError, match="optimizer 0 is another one in it: its groups have no dampening, momentum"):
        run_ranks(_go_on_from_format_1, 1, str(tmp_path), 0, "SGD")


def test_a_crash_between_the_renames_of_format_1_is_found(tmp_path: Path) -> None:
    with zipfile.ZipFile(FORMAT_1) as packed:
        packed.extractall(tmp_path)
    (tmp_path / "ck").rename(tmp_path / "ck.old")
    assert folders.find(tmp_path / "ck") == tmp_path / "ck.old"
    job = _prepared(0)
    job[0].save_state(str(tmp_path / "ck"))
    assert folders.find(tmp_path / "ck") == tmp_path / "ck" and not (tmp_path / "ck.old").exists()
