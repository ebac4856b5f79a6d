"""Accelerate's axes inside a model, on real ranks: what plain torch computes in one process."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from tests.dist.parallel.trainings import MAX_NORM, ROWS, build, difference, optimizer_of
from tests.dist.parallel.trainings import samples as all_samples

from distui.core.errors import ConfigError, UserError

if TYPE_CHECKING:
    from tests.dist.rank_pool import RunRanks

TOLERANCE = 1e-5


def samples() -> list[torch.Tensor]:
    return [row[:8] for row in all_samples()]


def _schedule(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.2 * step))


def _plain(num_data_ranks: int, micro: int = 1) -> dict[str, Any]:
    """Train in plain torch; the schedule moves on once a data rank."""
    model = build("llama", 0)
    optimizer = optimizer_of(model)
    schedule = _schedule(optimizer)
    found: dict[str, Any] = {"losses": [], "norms": []}
    for ids_BT in torch.stack(samples()).split(ROWS):
        losses = [model(input_ids=part, labels=part).loss for part in ids_BT.chunk(micro)]
        loss = torch.stack(losses).mean()
        loss.backward()
        found["norms"].append(float(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)))
        optimizer.step()
        for _ in range(num_data_ranks):
            schedule.step()
        optimizer.zero_grad()
        found["losses"].append(float(loss.detach()))
    return {**found, "weights": {name: value.clone() for name, value in model.state_dict().items()}}


def _forget() -> None:
    from distui.compat.accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (PartialState, AcceleratorState, GradientState):
        state._reset_state()


def _loss(way: str, accelerator: Any, model: Any, ids_BT: torch.Tensor) -> torch.Tensor:
    if way == "shift_labels":  # as Accelerate's own example of context parallelism
        shifted = F.pad(ids_BT, (0, 1), value=-100)[:, 1:].contiguous()
        batch = {"input_ids": ids_BT, "labels": ids_BT, "shift_labels": shifted}
        buffers = list(batch.values())
        with accelerator.maybe_context_parallel(
            buffers=buffers, buffer_seq_dims=[1] * len(buffers), no_restore_buffers=set(buffers)
        ):
            loss: torch.Tensor = model(**batch).loss
            return loss
    loss = model(input_ids=ids_BT, labels=ids_BT).loss
    return loss


def _own_loss(accelerator: Any, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Compute the loss as Accelerate's example of DeepSpeed's sequence parallelism does."""
    assert "labels" not in batch
    outputs = model(**batch)
    unwrapped = accelerator.unwrap_model(model)
    loss: torch.Tensor = unwrapped.loss_function(
        logits=outputs.logits,
        labels=None,
        shift_labels=batch["shift_labels"],
        vocab_size=unwrapped.config.vocab_size,
    )
    group = accelerator.torch_device_mesh["sp"].get_group()
    if group.size() < accelerator.num_processes:
        return loss  # torch's backward of all_gather over gloo takes all ranks only
    good = (batch["shift_labels"] != -100).view(-1).sum()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch would have another function; the example has this one
        all_gather: Any = torch.distributed.nn.functional.all_gather  # type: ignore[attr-defined]
        losses, good_of = all_gather(loss, group=group), all_gather(good, group=group)
    whole: torch.Tensor = sum(one * num for one, num in zip(losses, good_of, strict=True)) / sum(good_of)
    return whole


def _train(way: str, given: dict[str, Any]) -> dict[str, Any]:
    from distui.compat.accelerate import Accelerator, FullyShardedDataParallelPlugin, ParallelismConfig
    from distui.compat.accelerate.utils import MegatronLMPlugin, TorchTensorParallelPlugin

    _forget()
    given = dict(given)
    micro, fsdp = given.pop("micro", 1), given.pop("fsdp", None)
    options: dict[str, Any]
    if way == "megatron":
        options = {"megatron_lm_plugin": MegatronLMPlugin(gradient_clipping=0.0, **given)}
    elif way == "plugin":
        options = {"torch_tp_plugin": TorchTensorParallelPlugin(**given)}
    else:
        options = {"parallelism_config": ParallelismConfig(**given)}
    if fsdp is not None:
        options["fsdp_plugin"] = FullyShardedDataParallelPlugin(sharding_strategy=fsdp)
    accelerator = Accelerator(**options)
    ranks = accelerator.engine.num_data_ranks
    model = build("llama", accelerator.process_index)
    optimizer = optimizer_of(model)
    rows: Any = samples()
    if way == "own loss":
        rows = [{"input_ids": row, "labels": row} for row in rows]
    loader: Any = DataLoader(rows, batch_size=ROWS // ranks // micro)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, _schedule(optimizer))
    found: dict[str, Any] = {"losses": [], "norms": []}
    for batch in loader:
        with accelerator.accumulate(model):
            is_own = way == "own loss"
            loss = _own_loss(accelerator, model, batch) if is_own else _loss(way, accelerator, model, batch)
            accelerator.backward(loss)
            found["norms"].append(float(accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)))
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        gathered = accelerator.gather(loss.detach().reshape(1))
        assert len(gathered) == ranks
        found["losses"].append(float(gathered.mean()))
    found["weights"] = accelerator.get_state_dict(model)
    strategy = accelerator.engine.config.strategy
    found["stage"], found["main"] = strategy.zero_stage, accelerator.is_main_process
    found["ranks"] = (accelerator.num_processes, accelerator.process_index)
    axes = accelerator.parallelism_config
    found["mesh"] = None
    if axes is not None:
        mesh = accelerator.torch_device_mesh
        found["mesh"] = dict(zip(mesh.mesh_dim_names, mesh.shape, strict=True))
        found["places"] = (accelerator.data_parallel_shard_rank, accelerator.tensor_parallel_rank)
    accelerator.free_memory()
    _forget()
    return found


TWO: list[tuple[str, dict[str, Any], dict[str, int] | None]] = [
    ("labels", {"tp_size": 2}, {"tp": 2}),
    ("plugin", {"tp_size": 2}, {"tp": 2}),
    ("shift_labels", {"cp_size": 2, "fsdp": "FULL_SHARD"}, {"cp": 2}),
    ("own loss", {"sp_size": 2}, {"sp": 2}),
    ("megatron", {"tp_degree": 2, "use_distributed_optimizer": True}, {"dp_replicate": 1, "tp": 2}),
    ("megatron", {"pp_degree": 2, "num_micro_batches": 2, "micro": 2}, None),
]


def test_two_ranks_that_share_a_batch_equal_one_process(run_ranks: RunRanks) -> None:
    expected = {1: _plain(1), 2: _plain(1, micro=2)}
    for way, given, mesh in TWO:
        for rank, found in enumerate(run_ranks(_train, 2, way, given)):
            assert difference(found, expected[given.get("micro", 1)]) < TOLERANCE, (way, given)
            assert (found["ranks"], found["main"]) == ((2, rank), rank == 0)
            assert found["mesh"] == (None if mesh is None else {k: v for k, v in mesh.items() if v > 1}), way
            assert found["stage"] == {"fsdp": 3, "use_distributed_optimizer": 1}.get(list(given)[-1], 0)


FOUR: list[tuple[str, dict[str, Any]]] = [
    ("labels", {"tp_size": 2, "dp_shard_size": 2}),
    ("labels", {"tp_size": 2, "dp_shard_size": 2, "fsdp": "SHARD_GRAD_OP"}),
    ("shift_labels", {"cp_size": 2, "dp_replicate_size": 2}),
    ("own loss", {"sp_size": 2}),
    ("megatron", {"pp_degree": 2, "num_micro_batches": 2, "micro": 2}),
]


def test_they_go_with_data_parallel_ranks(run_ranks: RunRanks) -> None:
    expected = {1: _plain(2), 2: _plain(2, micro=2)}
    for way, given in FOUR:
        for rank, found in enumerate(run_ranks(_train, 4, way, given)):
            assert difference(found, expected[given.get("micro", 1)]) < TOLERANCE, (way, given)
            if "tp_size" in given:
                assert found["stage"] == (2 if "fsdp" in given else 3)
                assert found["places"] == (rank // 2, rank % 2)
                assert found["mesh"] == {"dp_shard": 2, "tp": 2}


def _metrics(dispatch: bool) -> dict[str, Any]:
    from distui.compat.accelerate import Accelerator, DataLoaderConfiguration, ParallelismConfig
    from distui.compat.accelerate.utils import gather_object

    _forget()
    accelerator = Accelerator(
        parallelism_config=ParallelismConfig(tp_size=2, dp_replicate_size=2),
        dataloader_config=DataLoaderConfiguration(dispatch_batches=dispatch),
    )
    loader: Any = accelerator.prepare(DataLoader(torch.arange(11).float(), batch_size=3))  # type: ignore[arg-type]
    seen, own = [], []
    for batch in loader:
        own.append(batch.tolist())
        seen += accelerator.gather_for_metrics(batch).tolist()
    with accelerator.split_between_processes(list(range(5))) as part:
        pass
    found = {
        "seen": seen,
        "own": own,
        "sum": float(accelerator.reduce(torch.tensor(1.0), "sum")),
        "objects": gather_object([accelerator.process_index]),
        "part": part,
        "total": loader.total_batch_size,
    }
    _forget()
    return found


def test_samples_are_counted_once(run_ranks: RunRanks) -> None:
    for dispatch in (False, True):
        ranks = run_ranks(_metrics, 4, dispatch)
        for found in ranks:
            assert found["seen"] == list(range(11))
            assert (found["sum"], found["total"]) == (2.0, 6)
        assert [found["part"] for found in ranks] == [[0, 1, 2]] * 2 + [[3, 4]] * 2
        assert [found["objects"] for found in ranks] == [[0, 2], [1, 3], [0, 2], [1, 3]]
        assert ranks[0]["own"] == ranks[1]["own"] and ranks[2]["own"] == ranks[3]["own"]


def _refused() -> list[str]:
    from distui.compat.accelerate import Accelerator, LocalSGD, ParallelismConfig
    from distui.compat.accelerate.utils import MegatronLMPlugin

    told = []
    tries: list[dict[str, Any]] = [
        {"parallelism_config": ParallelismConfig(tp_size=3)},
        {"parallelism_config": ParallelismConfig(tp_size=2, dp_shard_size=2)},
        {"megatron_lm_plugin": MegatronLMPlugin(pp_degree=2)},
        {"megatron_lm_plugin": MegatronLMPlugin(tp_degree=3)},
    ]
    for options in tries:
        _forget()
        with pytest.raises((UserError, ConfigError)) as caught:
            Accelerator(**options)
        told.append(str(caught.value))
    _forget()
    accelerator = Accelerator(parallelism_config=ParallelismConfig(tp_size=2))
    model = accelerator.prepare(build("llama", 0))
    with pytest.raises(UserError) as caught:
        LocalSGD(accelerator, model, 2)
    told.append(str(caught.value))
    with pytest.raises(UserError) as caught:
        with accelerator.join_uneven_inputs([model], even_batches=False):
            pass
    told.append(str(caught.value))
    accelerator.free_memory()
    _forget()
    return told


def test_what_does_not_fit_is_refused_on_all_ranks(run_ranks: RunRanks) -> None:
    expected = [
        "total_size (3) does not match num_processes (2)",
        "total_size (4) does not match num_processes (2)",
        "accumulation=1 with pipeline_parallel=2",
        "the parallel axes do not divide the 2 ranks",
        "LocalSGD is not offered",
        "join_uneven_inputs(even_batches=False) is not offered",
    ]
    for told in run_ranks(_refused, 2):
        for text, part in zip(told, expected, strict=True):
            assert part in text
