"""DeepSpeed's tensor and sequence parallelism on real ranks: what plain torch computes in one process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from distui.core.errors import UserError
from tests.dist.parallel.trainings import MAX_NORM, ROWS, build, difference, optimizer_of, samples

if TYPE_CHECKING:
    from tests.dist.rank_pool import RunRanks

TOLERANCE, GAS = 1e-5, 2


def alone(ranks: int) -> dict[str, Any]:
    model = build("llama", 0)
    optimizer = optimizer_of(model)
    found: dict[str, Any] = {"losses": [], "norms": []}
    for ids_BT in torch.stack(samples())[:, :8].split(ROWS):
        parts = [model(input_ids=part, labels=part).loss for part in ids_BT.chunk(GAS * ranks)]
        loss = torch.stack(parts).mean()
        loss.backward()
        found["norms"].append(float(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)))
        optimizer.step()
        optimizer.zero_grad()
        found["losses"].append(float(loss.detach()))
    return {**found, "weights": {name: value.clone() for name, value in model.state_dict().items()}}


def config(stage: int, micro: int, **more: Any) -> dict[str, Any]:
    return {
        "train_batch_size": ROWS,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_clipping": MAX_NORM,
        "zero_optimization": {"stage": stage},
        **more,
    }


def train(way: str, size: int, stage: int) -> dict[str, Any]:
    from distui.compat import deepspeed
    from distui.compat.deepspeed.utils import groups

    ranks = deepspeed.comm.get_world_size() // size
    given: dict[str, Any] = {"tensor_parallel": {"autotp_size": size}} if way == "json" else {}
    model: Any = build("llama", deepspeed.comm.get_rank())
    if way == "init":
        model = deepspeed.tp_model_init(model, tp_size=size, dtype=torch.float32)
    rows = ROWS // GAS // ranks
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer_of(model), config=config(stage, rows, **given), training_data=samples()
    )
    assert (engine.dp_world_size, engine.gradient_accumulation_steps()) == (ranks, GAS)
    assert groups.get_tensor_model_parallel_world_size() == size
    assert groups.get_data_parallel_rank() == engine.global_rank // size
    found: dict[str, Any] = {"losses": [], "norms": []}
    for ids_BT in torch.stack(samples())[:, :8].split(ROWS):
        losses = []
        for number in range(GAS):
            part = ids_BT.chunk(GAS * ranks)[number * ranks + groups.get_data_parallel_rank()]
            loss = engine(input_ids=part, labels=part).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.detach())
        mean = torch.stack(losses).mean()
        found["losses"].append(float(engine.engine.reduce(mean, "mean")))
        found["norms"].append(engine.get_global_grad_norm())
    found["weights"] = engine.module_state_dict()
    assert engine.training_dataloader is not None
    found["sampler"] = (engine.training_dataloader.data_sampler.num_replicas, engine.global_samples)
    engine.destroy()
    return found


def test_tensor_parallel_ranks_equal_one_process(run_ranks: RunRanks) -> None:
    for world, way, stage in ((2, "json", 0), (2, "init", 3), (4, "json", 1)):
        ranks = world // 2
        expected = alone(ranks)
        for found in run_ranks(train, world, way, 2, stage):
            assert difference(found, expected) < TOLERANCE, (world, way, stage)
            assert found["sampler"] == (ranks, 5 * ROWS)


def ulysses(ranks: int) -> dict[str, Any]:
    """Train as DeepSpeed's example of sequence parallelism does; the loader of each rank has batches of its own."""
    from distui.compat import deepspeed
    from distui.compat.deepspeed.runtime.sequence_parallel.ulysses_sp import (
        UlyssesSPAttentionHF,
        UlyssesSPDataLoaderAdapter,
    )
    from distui.compat.deepspeed.utils import groups

    mpu = UlyssesSPAttentionHF.register_with_transformers("llama", "sdpa", 2, micro_batch_size=1, seq_length=8)
    model: Any = build("llama", deepspeed.comm.get_rank())
    rows = ROWS // GAS // ranks
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer_of(model), config=config(2, rows), model_parameters=model.parameters(), mpu=mpu
    )
    group, place, size = groups._get_sequence_parallel_group(), groups._get_sequence_parallel_rank(), 2
    assert groups._get_sequence_parallel_world_size() == size
    # The pieces of a step lie so that each rank's own batches, handed round, come in the order of one process.
    pieces = [part for ids in torch.stack(samples())[:, :8].split(ROWS) for part in ids.chunk(GAS * ranks)]
    pieces = pieces[groups._get_data_parallel_rank() :: ranks]
    own = [{"input_ids": part, "labels": part, "position_ids": positions(part)} for part in pieces[place::size]]
    loader = UlyssesSPDataLoaderAdapter(own, place, group, size, engine.device)
    found: dict[str, Any] = {"losses": [], "norms": []}
    losses = []
    for batch in loader:
        outputs = engine(**batch)
        unwrapped: Any = engine.module
        loss = unwrapped.loss_function(
            logits=outputs.logits,
            labels=None,
            shift_labels=batch["shift_labels"],
            vocab_size=unwrapped.config.vocab_size,
        )
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
        if len(losses) == GAS:
            found["losses"].append(float(engine.engine.reduce(torch.stack(losses).mean(), "mean")))
            found["norms"].append(engine.get_global_grad_norm())
            losses.clear()
    found["weights"] = engine.module_state_dict()
    engine.destroy()
    return found


def positions(ids_BT: torch.Tensor) -> torch.Tensor:
    return torch.arange(ids_BT.shape[1]).expand_as(ids_BT)


def test_ranks_that_share_sequences_equal_one_process(run_ranks: RunRanks) -> None:
    for ranks in (1, 2):
        expected = alone(ranks)
        for found in run_ranks(ulysses, 2 * ranks, ranks):
            assert difference(found, expected) < TOLERANCE, ranks


class Attending(nn.Module):
    """One attention of [B, T, H, D], alone or over pieces of the sequence."""

    def __init__(self, group: Any) -> None:
        super().__init__()
        from distui.compat.deepspeed.sequence.layer import DistributedAttention

        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 1)
        self.attention: Any = attend if group is None else DistributedAttention(Whole(), group, 2, 1)
        self.more: tuple[Any, ...] = () if group is None else (0,)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (4, 2)) for part in self.qkv(x_BTD).chunk(3, -1))
        loss: torch.Tensor = self.out(self.attention(q, k, v, *self.more).flatten(2)).square().mean()
        return loss


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


class Whole(nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attend(q, k, v)


def attention(is_cut: bool) -> dict[str, torch.Tensor]:
    from distui.compat import deepspeed

    deepspeed.init_distributed()
    torch.manual_seed(0)
    group = torch.distributed.group.WORLD if is_cut else None
    model = Attending(group)
    json = {"train_micro_batch_size_per_gpu": 3, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    engine, *_ = deepspeed.initialize(model=model, config={**json, "zero_optimization": {"stage": 1}})
    x_BTD = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(1))
    own = x_BTD.chunk(engine.world_size, 1)[engine.global_rank] if is_cut else x_BTD
    for _ in range(2):
        engine.backward(engine(own))
        engine.step()
    found = engine.module_state_dict()
    if is_cut:
        with pytest.raises(UserError, match="3 heads of the query over 2 ranks"):
            model.attention(torch.ones(1, 3, 3, 2), torch.ones(1, 3, 4, 2), torch.ones(1, 3, 4, 2), 0)
    engine.destroy()
    return found


def test_distributed_attention_is_that_of_whole_sequences(run_ranks: RunRanks) -> None:
    expected = run_ranks(attention, 1, False)[0]
    for found in run_ranks(attention, 2, True):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=TOLERANCE, rtol=TOLERANCE)


def refused() -> list[str]:
    from distui.compat import deepspeed

    told = []
    tries: list[tuple[nn.Module, dict[str, Any]]] = [
        (nn.Linear(4, 4), {"tensor_parallel": {"autotp_size": 2}}),
        (deepspeed.tp_model_init(build("llama"), 2, torch.float32), {"tensor_parallel": {"autotp_size": 1}}),
        (deepspeed.tp_model_init(build("llama"), 2, torch.float32), {"tensor_parallel": {"autotp_size": 4}}),
        (build("llama"), {"tensor_parallel": {"autotp_size": 2, "preset_model": "llama"}}),
        (build("llama"), {"tensor_parallel": {"autotp_size": 3}}),
    ]
    for model, more in tries:
        with pytest.raises(UserError) as caught:
            json = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "Adam", "params": {}}, **more}
            deepspeed.initialize(model=model, config=json)
        told.append(str(caught.value))
    model = build("llama")
    json = {"train_micro_batch_size_per_gpu": 1, "tensor_parallel": {"autotp_size": 2}}
    engine, *_ = deepspeed.initialize(model=model, config=json)
    with pytest.raises(UserError) as caught:
        deepspeed.utils.safe_get_full_fp32_param(next(iter(engine.module.parameters())))
    told.append(str(caught.value))
    engine.destroy()
    return told


def test_what_cannot_be_cut_is_refused_on_all_ranks(run_ranks: RunRanks) -> None:
    expected = [
        "no tensor-parallel plan is known for Linear",
        "1 in the JSON, 2 in the script",
        "4 in the JSON, 2 in the script",
        "tensor_parallel.preset_model",
        "the parallel axes do not divide the 2 ranks",
        "where axes cut the model",
    ]
    for told in run_ranks(refused, 2):
        for text, part in zip(told, expected, strict=True):
            assert part in text
