"""Training scripts in Accelerate's style on real ranks: what plain torch computes alone, and Accelerate's ways."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

if TYPE_CHECKING:
    from tests.dist.rank_pool import RunRanks

NUM_SAMPLES, MICRO, STEPS = 22, 2, 2


class Words(nn.Module):
    """A model with a repeated block, a tied weight and an unused parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 13, bias=False)
        self.head.weight = self.embedding.weight
        self.unused = nn.Parameter(torch.zeros(3))

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        hidden_BTD = self.embedding(ids_BT)
        for block in self.blocks:
            hidden_BTD = hidden_BTD + torch.tanh(block(hidden_BTD))
        return self.head(hidden_BTD)


def _ids() -> torch.Tensor:
    return torch.randint(0, 13, (NUM_SAMPLES, 5), generator=torch.Generator().manual_seed(3))


def _loss(model: nn.Module, ids_BT: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(ids_BT).flatten(0, 1), ids_BT.flatten())


def _one_process(world: int) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Train in plain torch as `world` ranks of Accelerate do: batches in turn, evened, the schedule `world` times."""
    torch.manual_seed(0)
    model = Words()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    ids, rates = _ids(), []
    size = MICRO * world
    for _ in range(2):
        order = torch.cat([ids, ids[: -len(ids) % size]])
        batches = order.split(size)
        for number, batch in enumerate(batches, 1):
            (_loss(model, batch) / STEPS).backward()
            if number % STEPS == 0 or number == len(batches):
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
                for _ in range(world):
                    scheduler.step()
                rates.append(float(scheduler.get_last_lr()[0]))
    return model.state_dict(), rates


def _script(stage: int, folder: str) -> tuple[dict[str, torch.Tensor], list[float], list[int]]:
    from distui.compat.accelerate import Accelerator, PartialState
    from distui.compat.accelerate.state import AcceleratorState, GradientState
    from distui.compat.accelerate.utils import FullyShardedDataParallelPlugin

    for state in (PartialState, AcceleratorState, GradientState):
        state._reset_state()
    strategy = {0: "NO_SHARD", 2: "SHARD_GRAD_OP", 3: "FULL_SHARD"}[stage]
    accelerator = Accelerator(
        gradient_accumulation_steps=STEPS,
        project_dir=folder,
        log_with="jsonl",
        fsdp_plugin=FullyShardedDataParallelPlugin(sharding_strategy=strategy) if stage else None,
    )
    assert accelerator.engine.config.strategy.zero_stage == stage
    accelerator.init_trackers("words", config={"stage": stage})
    torch.manual_seed(0)
    model = Words()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    loader = DataLoader(TensorDataset(_ids()), batch_size=MICRO)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    rates: list[float] = []
    seen: list[int] = []
    for _ in range(2):
        seen = []
        for (ids,) in loader:
            with accelerator.accumulate(model):
                loss = _loss(model, ids)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            seen += accelerator.gather_for_metrics(ids[:, 0]).tolist()
            if accelerator.sync_gradients:
                rates.append(scheduler.get_last_lr()[0])
                accelerator.log({"loss": loss.detach()})
    kept = accelerator.get_state_dict(model)
    accelerator.save_state(f"{folder}/state")
    with torch.no_grad(), accelerator.engine.full_parameters(model, writeback=True):
        for param in model.parameters():
            param.zero_()
    accelerator.load_state(f"{folder}/state")
    again = accelerator.get_state_dict(model)
    assert all(torch.equal(kept[name], again[name]) for name in kept)
    for tracker in accelerator.trackers:
        tracker.finish()
    return kept, rates, seen


@pytest.mark.parametrize(("world", "stage"), [(1, 0), (2, 0), (2, 2), (2, 3)])
def test_a_script_trains_as_plain_torch_does(run_ranks: RunRanks, tmp_path: Path, world: int, stage: int) -> None:
    expected, rates = _one_process(world)
    for state, found, seen in run_ranks(_script, world, stage, str(tmp_path)):
        assert found == pytest.approx(rates)
        assert seen == _ids()[:, 0].tolist()
        assert set(state) == set(expected)
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5)
    assert (tmp_path / "words" / "metrics.jsonl").read_text().count("\n") == len(rates)


class Stream(IterableDataset[torch.Tensor]):
    """Counts, on whichever rank reads it."""

    reads = 0

    def __iter__(self) -> Any:
        for value in range(11):
            Stream.reads += 1
            yield torch.tensor(value)


def _loaders() -> dict[str, Any]:
    from distui.compat.accelerate import Accelerator, DataLoaderConfiguration
    from distui.compat.accelerate.data_loader import DataLoaderDispatcher
    from distui.compat.accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    found: dict[str, Any] = {}

    def read(loader: Any) -> list[list[int]]:
        return [batch.tolist() for batch in loader]

    accelerator = Accelerator()
    stream = accelerator.prepare(DataLoader(Stream(), batch_size=2))
    assert isinstance(stream, DataLoaderDispatcher)
    Stream.reads = 0
    found["dispatched"] = read(stream)
    found["reads"] = Stream.reads
    found["whole"] = [value for batch in stream for value in accelerator.gather_for_metrics(batch).tolist()]

    values: Any = list(range(11))
    found["in turn"] = read(accelerator.prepare(DataLoader(values, batch_size=2)))
    found["skipped"] = read(accelerator.skip_first_batches(accelerator.prepare(DataLoader(values, batch_size=2)), 2))
    uneven = Accelerator(dataloader_config=DataLoaderConfiguration(even_batches=False))
    found["uneven"] = read(uneven.prepare(DataLoader(values, batch_size=2)))
    split = Accelerator(dataloader_config=DataLoaderConfiguration(split_batches=True))
    found["split"] = read(split.prepare(DataLoader(values, batch_size=4)))
    config = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=5, use_stateful_dataloader=True)
    seedable = Accelerator(dataloader_config=config)
    shuffled = seedable.prepare(DataLoader(values, batch_size=2, shuffle=True))
    epochs = [read(shuffled), read(shuffled)]
    assert epochs[0] != epochs[1]
    shuffled.set_epoch(0)
    assert read(shuffled) == epochs[0]
    shuffled.set_epoch(0)
    rest = []
    for number, batch in enumerate(shuffled):
        if number == 1:
            state = copy.deepcopy(shuffled.state_dict())
        elif number > 1:
            rest.append(batch.tolist())
    shuffled.load_state_dict(state)
    assert read(shuffled) == rest and read(shuffled) == epochs[1]
    return found


def test_loaders_divide_batches_as_accelerate_does(run_ranks: RunRanks) -> None:
    first, second = run_ranks(_loaders, 2)
    assert first["in turn"] == [[0, 1], [4, 5], [8, 9]] and second["in turn"] == [[2, 3], [6, 7], [10, 0]]
    assert first["skipped"] == [[8, 9]] and second["skipped"] == [[10, 0]]
    assert first["uneven"] == [[0, 1], [4, 5], [8, 9]] and second["uneven"] == [[2, 3], [6, 7], [10]]
    assert first["split"] == [[0, 1], [4, 5], [8, 9]] and second["split"] == [[2, 3], [6, 7], [10, 0]]
    assert first["dispatched"] == [[0, 1], [4, 5], [8, 9]] and second["dispatched"] == [[2, 3], [6, 7], [10, 0]]
    assert (first["reads"], second["reads"]) == (11, 0)
    assert first["whole"] == second["whole"] == list(range(11))


def _corners() -> dict[str, Any]:
    from distui.compat.accelerate import Accelerator, NotOffered
    from distui.compat.accelerate.local_sgd import LocalSGD
    from distui.compat.accelerate.state import AcceleratorState
    from distui.compat.accelerate.utils import DeepSpeedPlugin, DistributedOperationException, gather
    from distui.compat.accelerate.utils.dataclasses import DataLoaderConfiguration, DistributedDataParallelKwargs

    AcceleratorState._reset_state(True)
    found: dict[str, Any] = {}
    accelerator = Accelerator(mixed_precision="bf16")
    rank = accelerator.process_index
    torch.manual_seed(0)
    model = accelerator.prepare(nn.Linear(4, 1, bias=False))
    assert model.weight.dtype is torch.float32 and model(torch.ones(2, 4)).dtype is torch.float32
    with accelerator.autocast():
        found["autocast"] = str(torch.ones(2, 2).mm(torch.ones(2, 2)).dtype)
    with pytest.raises(DistributedOperationException, match="rank 1"):
        gather(torch.zeros(rank + 1))

    # model.zero_grad() forgets the gradients, as optimizer.zero_grad() does.
    plain = Accelerator()
    torch.manual_seed(0)
    line = nn.Linear(2, 1, bias=False)
    start = line.weight.detach().clone()
    line, sgd = plain.prepare(line, torch.optim.SGD(line.parameters(), lr=1.0))
    for _ in range(2):
        line.zero_grad()
        plain.backward(line(torch.ones(1, 2)).sum())
        sgd.step()
    found["moved"] = (start - line.weight.detach()).flatten().tolist()

    # A rank with fewer batches takes part in the reductions of the others.
    joined = Accelerator(dataloader_config=DataLoaderConfiguration(even_batches=False))
    torch.manual_seed(0)
    other, ones = nn.Linear(2, 1, bias=False), cast("Any", torch.ones(3, 2))
    other, opt, loader = joined.prepare(
        other, torch.optim.SGD(other.parameters(), lr=0.1), DataLoader(ones, batch_size=1)
    )
    with joined.join_uneven_inputs([other]):
        for batch in loader:
            joined.backward(other(batch).sum())
            opt.step()
            opt.zero_grad()
    found["joined"] = other.weight.detach().flatten().tolist()

    local = Accelerator()
    torch.manual_seed(0)
    third = nn.Linear(2, 1, bias=False)
    third, third_sgd = local.prepare(third, torch.optim.SGD(third.parameters(), lr=1.0))
    with LocalSGD(accelerator=local, model=third, local_sgd_steps=2) as local_sgd:
        for _ in range(2):
            local.backward(third(torch.full((1, 2), 1.0 + rank)).sum())
            third_sgd.step()
            found.setdefault("alone", []).append(third.weight.detach().flatten()[0].item())
            third_sgd.zero_grad()
            local_sgd.step()
    found["averaged"] = third.weight.detach().flatten()[0].item()
    power = DistributedDataParallelKwargs(comm_hook="power_sgd")  # type: ignore[arg-type]
    for arguments in (
        {"mixed_precision": "fp8"},
        {"deepspeed_plugin": DeepSpeedPlugin(zero_stage=2), "kwargs_handlers": [power]},
    ):
        with pytest.raises(NotOffered, match="instead, "):
            Accelerator(**arguments)
    return found


def test_precision_joining_local_sgd_and_refusals(run_ranks: RunRanks) -> None:
    torch.manual_seed(0)
    start = nn.Linear(2, 1, bias=False).weight.detach().flatten()
    results = run_ranks(_corners, 2)
    for rank, found in enumerate(results):
        assert found["autocast"] == "torch.bfloat16"
        assert found["moved"] == pytest.approx([2.0, 2.0])
        # Two batches on rank 0, one on rank 1: means over both ranks of 1, and then of a half.
        assert found["joined"] == pytest.approx((start - 0.15).tolist())
        assert found["alone"] == pytest.approx([start[0].item() - (1 + rank), start[0].item() - 2 * (1 + rank)])
        assert found["averaged"] == pytest.approx(start[0].item() - 3.0)
