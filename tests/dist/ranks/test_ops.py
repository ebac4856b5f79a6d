"""Collectives on nested structures, on one, two and three ranks.

The expected values are those of accelerate 1.15's `utils.operations`, which was run beside this module; it raises where
the mean of whole numbers or a scalar in one process is asked for.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, defaultdict
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from distui.core.errors import UserError
from distui.core.ranks import ops

if TYPE_CHECKING:
    from tests.dist.rank_pool import RunRanks

WORLDS = pytest.mark.parametrize("world", [1, 2, 3])


class Pair(NamedTuple):
    a: torch.Tensor
    b: torch.Tensor


@dataclasses.dataclass
class Plain:
    loss: torch.Tensor
    name: str = "x"


class ModelOutput(OrderedDict[str, Any]):
    """As in transformers: a mapping whose values are attributes too."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


def _me() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _gathers() -> None:
    rank, world = _me()
    assert ops.gather(torch.tensor(float(rank))).tolist() == list(range(world)), "scalars become one entry a rank"
    rows = ops.gather(torch.full((2, 3), rank))
    assert rows.shape == (2 * world, 3) and rows[:, 0].tolist() == [r for r in range(world) for _ in range(2)]
    own = torch.tensor([rank])
    nested = ops.gather({"a": [own, (own * 2,)], "pair": Pair(own, own.bool()), "out": ModelOutput(x=own)})
    assert nested["a"][0].tolist() == list(range(world)) and nested["a"][1][0].tolist() == [2 * r for r in range(world)]
    assert isinstance(nested["pair"], Pair) and nested["pair"].b.tolist() == [bool(r) for r in range(world)]
    assert isinstance(nested["out"], ModelOutput) and nested["out"].x.tolist() == list(range(world))
    assert ops.gather((torch.arange(6.0).view(2, 3) + rank).t()).shape == (3 * world, 2), "not contiguous"
    assert ops.gather(torch.ones(2, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert ops.gather(torch.zeros(0, 2)).shape == (0, 2)
    assert ops.gather_object([rank, str(rank)]) == [entry for r in range(world) for entry in (r, str(r))]
    with pytest.raises(TypeError, match="str is neither"):
        ops.gather([own, "text"])


def _reductions() -> None:
    rank, world = _me()
    own = {"x": torch.tensor([1.0, rank]), "n": torch.tensor(rank)}
    total = world * (world - 1) // 2
    assert ops.reduce(own, "sum")["x"].tolist() == [world, total]
    assert ops.reduce(own)["x"].tolist() == [1.0, total / world] and ops.reduce(own)["n"].item() == total / world
    assert ops.reduce(own, "max", scale=3.0)["x"].tolist() == [3.0, 3.0 * (world - 1)]
    assert own["x"].tolist() == [1.0, rank], "the argument stays"
    with pytest.raises(UserError, match="'median' is unknown"):
        ops.reduce(own, "median")


def _padding() -> None:
    rank, world = _me()
    mine = {"x": torch.full((1 + rank, 2), rank + 1), "scalar": torch.tensor(rank)}
    padded = ops.pad_across_processes(mine, dim=0, pad_index=-7)
    assert padded["x"][:, 0].tolist() == [rank + 1] * (1 + rank) + [-7] * (world - 1 - rank)
    assert padded["scalar"].item() == rank
    first = ops.pad_across_processes(mine["x"].t(), dim=-1, pad_first=True)
    assert first[0].tolist() == [0] * (world - 1 - rank) + [rank + 1] * (1 + rank)
    assert ops.pad_across_processes(mine["x"], dim=2) is mine["x"], "no such dimension"
    assert ops.gather(padded)["x"].shape == (world * world, 2)


def _broadcasts() -> None:
    rank, world = _me()
    last = world - 1
    mine: dict[str, Any] = {"x": torch.tensor([rank]), "pair": Pair(torch.tensor(rank), torch.ones(1))}
    sent = ops.broadcast(mine, from_process=last)
    assert sent["x"].tolist() == [last] and sent["pair"].a.item() == last and mine["x"].tolist() == [rank]
    assert ops.broadcast_object({"of": rank}, last) == {"of": last}
    values = [rank, "x"]
    assert ops.broadcast_object_list(values) is values and values == [0, "x"]


def _metrics() -> None:
    rank, world = _me()
    samples = torch.arange(2) + 2 * rank
    kept = ops.gather_for_metrics({"loss": torch.tensor(1.0), "x": samples}, num_real=2 * world - 1)
    assert kept["x"].tolist() == list(range(2 * world - 1)) and kept["loss"].shape == (world,)
    assert ops.gather_for_metrics(samples, num_real=-1).tolist() == list(range(2 * world))
    texts = [f"{rank}a", f"{rank}b"]
    assert ops.gather_for_metrics(texts, num_real=1) == ["0a"]
    assert len(ops.gather_for_metrics(texts, num_real=0, use_gather_object=True)) == 2 * world


def _everything() -> None:
    for part in (_gathers, _reductions, _padding, _broadcasts, _metrics):
        part()


@WORLDS
def test_every_operation_on_every_rank(run_ranks: RunRanks, world: int) -> None:
    run_ranks(_everything, world)


def _what_differs() -> list[str]:
    rank = dist.get_rank()
    texts = []
    for operation, value in (
        (ops.gather, torch.zeros(2 + rank, 3)),
        (ops.reduce, {"x": torch.zeros(1, dtype=torch.float32 if rank else torch.float64)}),
        (ops.broadcast, [torch.zeros(1)] * (1 + rank)),
        (ops.pad_across_processes, torch.zeros([1] * (1 + rank))),
    ):
        with pytest.raises(UserError) as caught:
            operation(value)
        texts.append(caught.value.report())
    return texts


def test_shapes_that_differ_are_an_error_on_every_rank_that_names_them(run_ranks: RunRanks) -> None:
    of_rank0, of_rank1 = run_ranks(_what_differs, 2)
    assert of_rank0 == of_rank1
    assert "rank 0: tensor: [2, 3] float32 | rank 1: tensor: [3, 3] float32" in of_rank0[0]
    assert "gather" in of_rank0[0] and "pad_across_processes" in of_rank0[0]
    assert "rank 0: ['x']: [1] float64 | rank 1: ['x']: [1] float32" in of_rank0[1]
    assert "rank 0: [0]: [1] float32 | rank 1: [0]: [1] float32; [1]: [1] float32" in of_rank0[2]
    assert "1 dimensions, float32 | rank 1: tensor: 2 dimensions" in of_rank0[3]


def test_structures_keep_their_types() -> None:
    counts: defaultdict[str, torch.Tensor] = defaultdict(lambda: torch.zeros(1), x=torch.ones(1))
    doubled = ops.map_structure(lambda tensor: tensor * 2, [Plain(torch.ones(1)), counts, "text", None])
    assert doubled[0] == Plain(torch.full((1,), 2.0)) and doubled[2:] == ["text", None]
    assert isinstance(doubled[1], defaultdict) and doubled[1]["x"].item() == 2 and doubled[1]["new"].item() == 0
    assert [path for path, _ in ops.iter_tensors({"a": [torch.ones(1)], "b": Plain(torch.ones(1))})] == [
        "['a'][0]",
        "['b'].loss",
    ]


def test_helpers_that_need_no_ranks() -> None:
    assert ops.find_batch_size([torch.tensor(1.0), {"x": torch.zeros(5, 2)}]) == 5
    with pytest.raises(ValueError, match="no tensor with a batch dimension"):
        ops.find_batch_size({"x": "text"})
    joined = ops.concatenate([Pair(torch.ones(1), torch.ones(2)), Pair(torch.zeros(1), torch.zeros(2))])
    assert isinstance(joined, Pair) and joined.a.tolist() == [1, 0] and joined.b.shape == (4,)
    assert ops.concatenate([{"x": torch.ones(1, 1)}, {"x": torch.zeros(1, 1)}], dim=1)["x"].shape == (1, 2)
    with pytest.raises(TypeError, match="not str"):
        ops.concatenate(["a", "b"])
    low = ops.convert_outputs_to_fp32(lambda: {"x": torch.ones(1, dtype=torch.bfloat16), "n": torch.ones(1).long()})()
    assert low["x"].dtype == torch.float32 and low["n"].dtype == torch.int64
    assert ops.take_first({"x": torch.arange(4)}, 2)["x"].tolist() == [0, 1] and ops.take_first(["a", "b"], 1) == ["a"]


class _Movable:
    device = "here"

    def to(self, device: str) -> _Movable:
        moved = _Movable()
        moved.device = device
        return moved


def test_send_to_device_moves_tensors_and_what_can_move() -> None:
    sent = ops.send_to_device({"x": torch.ones(1), "m": [_Movable()], "keep": torch.ones(1)}, "meta", skip_keys="keep")
    assert sent["x"].device.type == "meta" and sent["m"][0].device == "meta" and sent["keep"].device.type == "cpu"
    assert ops.send_to_device(Pair(torch.ones(1), torch.ones(1)), "meta").b.device.type == "meta"
    assert ops.send_to_device(("text", 3), "meta") == ("text", 3)
