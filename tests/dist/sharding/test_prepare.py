"""How a model comes to its units: alike on every rank, a unit at a time, from the script, its modules or files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

import distui
from distui.core.errors import UserError
from distui.core.sharding.sharded import ShardedModel
from distui.core.sharding.start.start import Start
from distui.core.sharding.transport import alike
from distui.core.sharding.units import partition
from distui.core.sharding.units.shards import Shards
from tests.dist.parity_models import MODELS
from tests.dist.sharding.start_models import DIM, Model, prepared, step

if TYPE_CHECKING:
    from tests.dist.rank_pool import RunRanks


def _group() -> dist.ProcessGroup | None:
    return dist.group.WORLD if dist.is_initialized() else None


def _many_parameters() -> int:
    group = dist.group.WORLD
    assert group is not None
    torch.manual_seed(dist.get_rank())
    model = nn.ParameterList(nn.Parameter(tensor) for tensor in torch.randn(10_000, 7).unbind())
    wide = nn.Parameter(torch.randn(64, 48).T)  # not contiguous
    model.append(wide)
    counts, part = torch.full((3,), dist.get_rank()), wide.data[:5]
    for name, buffer in (("counts", counts), ("same", counts), ("part", part), ("nothing", torch.empty(0))):
        model.register_buffer(name, buffer)
    with mock.patch.object(dist, "broadcast", side_effect=dist.broadcast) as calls:
        alike.start_alike(model, group)
    torch.manual_seed(0)
    assert torch.equal(nn.utils.parameters_to_vector(list(model.parameters())[:-1]).view(-1, 7), torch.randn(10_000, 7))
    assert torch.equal(wide.data, torch.randn(64, 48).T)
    assert not counts.any()
    assert part.data_ptr() == wide.data_ptr()
    return int(calls.call_count)


def test_the_start_travels_in_buckets(run_ranks: RunRanks) -> None:
    # 292 KB of floats, and integers.
    assert run_ranks(_many_parameters, 2) == [2, 2]


def _small_buckets() -> int:
    alike.BUCKET_BYTES = 1_000
    torch.manual_seed(dist.get_rank())
    tensors = [torch.randn(size) for size in (100, 100, 100, 300, 50, 10)]
    group = dist.group.WORLD
    assert group is not None
    with mock.patch.object(dist, "broadcast", side_effect=dist.broadcast) as calls:
        alike.broadcast_alike([*tensors, *tensors], group)
    torch.manual_seed(0)
    torch.testing.assert_close(tensors, [torch.randn(size) for size in (100, 100, 100, 300, 50, 10)], rtol=0, atol=0)
    return int(calls.call_count)


def test_a_bucket_is_bounded(run_ranks: RunRanks) -> None:
    # 400 + 400, 400, 1,200 alone, 200 + 40
    assert run_ranks(_small_buckets, 3) == [4, 4, 4]


def _starts(kinds: tuple[str, ...], stages: tuple[int, ...]) -> dict[str, dict[str, torch.Tensor]]:
    """Return the whole state after prepare, and after a step, by kind; equal at all stages."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for kind in kinds:
        for stage in stages:
            engine, model, optimizer, _ = prepared(kind, stage)
            state = engine.get_state_dict(model)
            torch.testing.assert_close(model.blocks[0].table, torch.arange(DIM) / DIM)
            first = found.setdefault(kind, state)
            assert all(torch.equal(value, first[name]) for name, value in state.items()), (kind, stage)
            step(engine, model, optimizer)
            stepped = engine.get_state_dict(model)
            torch.testing.assert_close(stepped, found.setdefault(f"{kind} stepped", stepped), atol=1e-6, rtol=1e-5)
            engine.free_memory()
    return found


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_the_start_is_the_same_at_every_stage_and_number_of_ranks(run_ranks: RunRanks, num_ranks: int) -> None:
    torch.manual_seed(0)
    plain = dict(Model().state_dict())
    for found in run_ranks(_starts, num_ranks, ("cpu", "meta"), (0, 1, 2, 3)):
        for name, value in found["cpu"].items():
            assert torch.equal(value, plain[name]), name
        _check_drawn(found["meta"])
        # What a plain process makes of it, one rank and stage 0: the seeds are of names, not of ranks.
        torch.testing.assert_close(found["meta stepped"], _alone()["meta stepped"], atol=1e-6, rtol=1e-5)
        assert all(torch.equal(value, _alone()["meta"][name]) for name, value in found["meta"].items())


_ALONE: dict[str, dict[str, torch.Tensor]] = {}


def _alone() -> dict[str, dict[str, torch.Tensor]]:
    if not _ALONE:
        _ALONE.update(_starts(("meta",), (0,)))
    return _ALONE


def _check_drawn(state: dict[str, torch.Tensor]) -> None:
    """Every module's own initialisation, and no two modules alike."""
    bound = DIM**-0.5
    for index in range(3):
        assert state[f"blocks.{index}.scale"].min() >= 1.0 and state[f"blocks.{index}.scale"].max() <= 2.0
        weight = state[f"blocks.{index}.linear.weight"]
        assert 0.8 * bound < weight.abs().max() <= bound
        assert not torch.equal(weight, state[f"blocks.{(index + 1) % 3}.linear.weight"])
    assert torch.equal(state["norm.weight"], torch.ones(DIM)) and torch.equal(
        state["norm.running_var"], torch.ones(DIM)
    )
    assert 0.7 < state["embedding.weight"].std() < 1.3, "the embedding's numbers, not those of the head tied to it"
    assert torch.equal(state["embedding.weight"], state["head.weight"])


def _meta_buffers() -> str:
    partition.SMALL_UNIT_NUMEL = 1
    engine = distui.Engine(strategy={"zero_stage": 3})
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    engine.prepare(model)
    state = engine.get_state_dict(model)
    assert torch.equal(state["1.running_var"], torch.ones(3)) and not state["1.num_batches_tracked"].any()
    with pytest.raises(UserError) as refused:
        prepared("all on meta", 3)
    return f"{refused.value} {refused.value.fix}"


def test_a_table_on_meta_is_refused(run_ranks: RunRanks) -> None:
    for text in run_ranks(_meta_buffers, 2):
        assert "blocks.0.table" in text and "init_empty_weights" in text


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))


class Reaching(nn.Module):
    """Its reset_parameters is for all that is in it."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.zeros(4))
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def reset_parameters(self) -> None:
        for param in self.parameters():
            nn.init.ones_(param)


class OwnInit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.constant_(module.weight, 0.5)


def test_what_nothing_initialises_is_named() -> None:
    partition.SMALL_UNIT_NUMEL = 1
    with distui.init_empty_weights():
        model = nn.Sequential(nn.Linear(2, 2), Bare())
        reaching: Any = Reaching()
        own: Any = OwnInit()
    engine = distui.Engine(strategy={"zero_stage": 3})
    with pytest.raises(UserError, match=r"1\.weight is on the meta device.*Bare\.reset_parameters does not exist"):
        engine.prepare(model)
    with pytest.raises(UserError, match="touches parameters of other modules"):
        engine.prepare(reaching)
    engine.prepare(own)
    assert torch.equal(own.layers[1].weight, torch.full((4, 4), 0.5))
    with distui.init_empty_weights():
        again: Any = nn.Sequential(nn.Linear(2, 2), Bare())

    def fill(module: nn.Module) -> None:
        if isinstance(module, Bare):
            nn.init.constant_(module.weight, 7.0)

    engine.prepare(again, init=fill)
    assert torch.equal(again[1].weight, torch.full((4,), 7.0))
    assert 0.0 < again[0].weight.abs().max() < 1.0


def test_hooks_and_gradients_outlive_the_meta_device() -> None:
    with distui.init_empty_weights():
        model = nn.Linear(2, 2)
    seen = []
    model.weight.register_hook(lambda grad: seen.append("hook"))
    engine = distui.Engine(strategy={"zero_stage": 1})
    engine.prepare(model)
    engine.backward(model(torch.ones(1, 2)).sum())
    assert seen == ["hook"]
    assert model.weight.grad is not None
    assert torch.equal(model.weight.grad, torch.ones(2, 2))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_transformers_models_initialise_their_modules(name: str) -> None:
    partition.SMALL_UNIT_NUMEL = 1
    with distui.init_empty_weights():
        model = MODELS[name]()
    assert all(param.is_meta for param in model.parameters())
    engine = distui.Engine(strategy={"zero_stage": 3})
    state = engine.get_state_dict(engine.prepare(model))
    expected = MODELS[name]().state_dict()
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        spread = 0.05 + 3 / value.numel() ** 0.5
        assert state[key].std(correction=0) == pytest.approx(value.std(correction=0), rel=spread, abs=1e-8), key
        assert abs(state[key].mean() - value.mean()) <= spread * value.std(correction=0) + 1e-8, key
    ids = torch.arange(6)[None]
    mask = torch.ones_like(ids)
    assert model(input_ids=ids, attention_mask=mask).logits.isfinite().all()


# ---- a unit at a time ------------------------------------------------------------------------------------------------


def _freed() -> list[int]:
    """Return, before each unit is filled, how many of the script's own storages are still there."""
    partition.SMALL_UNIT_NUMEL = 1
    model = nn.ModuleList(nn.Linear(64, 64) for _ in range(6))
    pointers = {param.data_ptr() for param in model.parameters()}
    left = []
    own = Shards._begin

    def begin(unit: Shards, start: Start) -> Any:
        here = [param for param in model.parameters() if type(param) is nn.Parameter]
        left.append(sum(param.data_ptr() in pointers for param in here))
        return own(unit, start)

    with mock.patch.object(Shards, "_begin", begin):
        ShardedModel(model, stage=3, group=_group())
    return left


def test_each_unit_frees_what_it_takes(run_ranks: RunRanks) -> None:
    assert run_ranks(_freed, 2) == [[12, 10, 8, 6, 4, 2]] * 2
