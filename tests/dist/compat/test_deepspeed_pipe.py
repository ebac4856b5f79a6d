"""DeepSpeed's `PipelineModule` on the engine's pipeline: what plain torch computes in one process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distui.core.errors import DistuiError

if TYPE_CHECKING:
    from tests.dist.rank_pool import RunRanks

VOCAB, DIM, MICRO, GAS, STEPS, CLIP, LR = 13, 8, 2, 4, 3, 0.3, 0.02


class Embed(nn.Module):
    """Gives the hidden state, and the ids beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB, DIM)

    def forward(self, ids_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.table(ids_BT), ids_BT


class Block(nn.Module):
    """Adds to the hidden state what it makes of it and of the ids."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(DIM, DIM), scale

    def forward(self, given: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        x_BTD, ids_BT = given
        return x_BTD + self.scale * torch.tanh(self.linear(x_BTD)) * (ids_BT[..., None] > 2), ids_BT


def hidden(given: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return given[0]


def head(module: nn.Module, x: Any) -> torch.Tensor:
    """Use the tied embedding as the head."""
    logits: torch.Tensor = x @ module.table.weight.T  # type: ignore[union-attr]
    return logits


def loss_fn(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def layers() -> list[Any]:
    from distui.compat.deepspeed.pipe import LayerSpec, TiedLayerSpec

    return [
        TiedLayerSpec("embed", Embed, tied_weight_attr="table.weight"),
        LayerSpec(Block, scale=0.5),
        Block(),
        LayerSpec(Block),
        hidden,
        LayerSpec(nn.LayerNorm, DIM),
        TiedLayerSpec("embed", Embed, forward_fn=head, tied_weight_attr="table.weight"),
    ]


def module(stages: int, **more: Any) -> Any:
    from distui.compat.deepspeed.pipe import PipelineModule

    torch.manual_seed(0)
    return PipelineModule(layers=layers(), num_stages=stages, loss_fn=loss_fn, **more)


def micro_batches(place: int, ranks: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return a rank's micro-batches, each of another length; the last ones are for evaluation."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for number in range((STEPS + 1) * GAS):
        ids = torch.randint(0, VOCAB, (MICRO * ranks, 4 + number % 3), generator=generator)
        own = ids[MICRO * place : MICRO * (place + 1)]
        found.append((own, own.roll(1, 1)))
    return found


def alone(ranks: int) -> dict[str, Any]:
    model = module(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01)
    found: dict[str, Any] = {"losses": []}
    batches = iter(zip(*(micro_batches(place, ranks) for place in range(ranks)), strict=True))

    def loss() -> torch.Tensor:
        together = [loss_fn(model(ids), labels) for _ in range(GAS) for ids, labels in next(batches)]
        return torch.stack(together).mean()

    for _ in range(STEPS):
        value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        found["losses"].append(float(value.detach()))
    with torch.no_grad():
        found["losses"].append(float(loss()))
    return {**found, "weights": {name: value.clone() for name, value in model.state_dict().items()}}


def config(stage: int, **more: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": MICRO,
        "gradient_accumulation_steps": GAS,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": LR, "weight_decay": 0.01}},
        **more,
    }


def train(stages: int, stage: int, options: dict[str, Any], more: dict[str, Any], folder: str = "") -> dict[str, Any]:
    from distui.compat import deepspeed

    model = module(stages, **options)
    engine, *_ = deepspeed.initialize(model=model, config=config(stage, **more), mpu=model.mpu())
    ranks = engine.dp_world_size
    assert engine.train_batch_size() == MICRO * GAS * ranks
    is_end = engine.is_first_stage() or engine.is_last_stage()
    batches = iter(micro_batches(engine.get_data_parallel_rank(), ranks))
    given: Iterator[Any] | None = batches if is_end else None
    found: dict[str, Any] = {"losses": [float(engine.train_batch(data_iter=given)) for _ in range(STEPS)]}
    if folder:
        engine.save_checkpoint(folder, tag="one")
    loss, logits = engine.eval_batch(given, return_logits=True)
    found["losses"].append(float(loss))
    found["logits"] = None if logits is None else tuple(logits.shape)
    found["steps"] = (engine.global_steps, engine.micro_steps, engine.global_samples)
    found["held"] = sum(param.numel() for param in engine.module.parameters())
    found["weights"] = engine.module_state_dict()
    found["parts"] = model.parts
    found["place"] = (engine.stage_id, engine.is_first_stage(), engine.is_last_stage())
    engine.destroy()
    return found


def same(found: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(
        torch.tensor(found["losses"]), torch.tensor(expected["losses"]), atol=tolerance, rtol=tolerance
    )
    assert found["weights"].keys() == expected["weights"].keys()
    for name, value in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], value, atol=tolerance, rtol=tolerance, msg=name)


Case = tuple[int, int, int, dict[str, Any], dict[str, Any]]
CASES: list[Case] = [
    (2, 2, 1, {"partition_method": "uniform"}, {}),
    (2, 2, 3, {"activation_checkpoint_interval": 1}, {}),
    (2, 1, 3, {}, {}),
    (4, 2, 0, {}, {}),
]
MORE: list[Case] = [
    (2, 2, 0, {}, {}),
    (2, 2, 2, {"partition_method": "type:block"}, {}),
    (4, 2, 2, {}, {}),
    (4, 4, 1, {}, {"pipeline": {"activation_checkpoint_interval": 2}}),
]


def test_a_row_of_layers_equals_one_process(run_ranks: RunRanks) -> None:
    compare(run_ranks, CASES)


@pytest.mark.matrix
def test_more_rows_of_layers_equal_one_process(run_ranks: RunRanks) -> None:
    compare(run_ranks, MORE)


def compare(run_ranks: RunRanks, cases: list[Case]) -> None:
    for world, stages, stage, options, more in cases:
        expected = alone(world // stages)
        whole = sum(value.numel() for value in expected["weights"].values())
        for rank, found in enumerate(run_ranks(train, world, stages, stage, options, more)):
            same(found, expected)
            ranks = world // stages
            assert found["steps"] == (STEPS, STEPS * GAS, STEPS * GAS * MICRO * ranks)
            assert found["place"] == (rank // ranks, rank < ranks, rank >= world - ranks)
            assert (found["logits"] is None) == (rank < world - ranks)
            assert (found["held"] < whole) == (stages > 1)


def test_names_and_parts_are_deepspeeds() -> None:
    assert list(module(1).state_dict())[:3] == ["tied_modules.embed.table.weight", "1.linear.weight", "1.linear.bias"]
    from distui.compat.deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    topology = PipeModelDataParallelTopology(num_pp=2, num_mp=2, num_dp=2)
    assert topology.get_coord(5) == (1, 0, 1)
    assert topology.get_axis_comm_lists("pipe") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert topology.get_rank(pipe=1, data=1, model=0) == 6
    assert topology.get_rank_repr(5) == "model_01"


def _half(dtype: str, stages: int) -> list[float]:
    return train(stages, 1, {}, {dtype: {"enabled": True}})["losses"]


def test_half_precision_is_near(run_ranks: RunRanks) -> None:
    expected = torch.tensor(alone(1)["losses"])
    for dtype in ("bf16", "fp16"):
        first, last = run_ranks(_half, 2, dtype, 2)
        assert first == last
        torch.testing.assert_close(torch.tensor(first), expected, atol=0.05, rtol=0.02)


def _resume(folder: str, stages: int, stage: int) -> dict[str, Any]:
    from distui.compat import deepspeed

    engine, *_ = deepspeed.initialize(model=module(stages), config=config(stage))
    engine.load_checkpoint(folder, tag="one")
    found = {"losses": [], "weights": engine.module_state_dict(), "steps": engine.global_steps}
    engine.destroy()
    return found


def test_a_checkpoint_loads_into_another_number_of_stages(run_ranks: RunRanks, tmp_path: Path) -> None:
    saved = run_ranks(train, 2, 2, 1, {}, {}, str(tmp_path))[0]
    for ranks, stages, stage in ((1, 1, 0), (4, 2, 3)):
        found = run_ranks(_resume, ranks, str(tmp_path), stages, stage)[0]
        assert found["steps"] == STEPS
        for name, value in saved["weights"].items():
            assert torch.equal(found["weights"][name], value), name


def _seeded(stages: int) -> list[float]:
    from distui.compat import deepspeed
    from distui.compat.deepspeed.pipe import LayerSpec, PipelineModule

    torch.manual_seed(deepspeed.comm.get_rank() if stages > 1 else 0)
    rows = [LayerSpec(nn.Linear, DIM, DIM), nn.Dropout(0.5), LayerSpec(nn.Linear, DIM, DIM), nn.Dropout(0.5)]
    model = PipelineModule(
        layers=rows, num_stages=stages, loss_fn=F.mse_loss, seed_layers=True, activation_checkpoint_interval=1
    )
    data: Any = torch.utils.data.TensorDataset(torch.ones(16, DIM), torch.zeros(16, DIM))
    engine, *_ = deepspeed.initialize(model=model, config=config(0), training_data=data)
    losses = [float(engine.train_batch()) for _ in range(3)]
    engine.destroy()
    return losses


def test_seeds_of_layers_give_the_same_numbers_on_any_number_of_stages(run_ranks: RunRanks) -> None:
    expected = run_ranks(_seeded, 1, 1)[0]
    assert len(set(expected)) == 3
    for found in run_ranks(_seeded, 2, 2):
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=1e-5, rtol=1e-5)


def _refused() -> list[str]:
    from distui.compat import deepspeed
    from distui.compat.deepspeed.pipe import PipelineModule
    from distui.compat.deepspeed.runtime.pipe.module import PipelineError

    told = []

    def refused(kind: Any, call: Any) -> None:
        with pytest.raises(kind) as caught:
            call()
        told.append(str(caught.value))

    rank = deepspeed.comm.get_rank()
    engine, *_ = deepspeed.initialize(model=module(2), config=config(0))
    refused(PipelineError, lambda: engine(torch.zeros(1, 1)))
    refused(DistuiError, lambda: engine.train_batch())
    other = iter([(torch.full((2, 4), rank), torch.zeros(2, 4, dtype=torch.int64))] * GAS)
    refused(DistuiError, lambda: engine.train_batch(other))
    engine.destroy()
    refused(RuntimeError, lambda: PipelineModule(layers=layers(), num_stages=3, loss_fn=loss_fn))
    refused(RuntimeError, lambda: PipelineModule(layers=[nn.Linear(2, 2)], num_stages=2, loss_fn=loss_fn))
    few = {**config(0), "gradient_accumulation_steps": 1}
    refused(DistuiError, lambda: deepspeed.initialize(model=module(2), config=few))
    return told


def test_what_is_no_pipeline_is_refused_on_all_ranks(run_ranks: RunRanks) -> None:
    expected = [
        "Only train_batch() is accessible",
        "train_batch has no data",
        "a pipeline's ranks were given different batches",
        "num_stages (3) must divide distributed world size (2)",
        "1 layers cannot be divided into num_stages=2",
        "accumulation=1 with pipeline_parallel=2",
    ]
    for told in run_ranks(_refused, 2):
        for text, part in zip(told, expected, strict=True):
            assert part in text
