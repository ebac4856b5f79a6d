"""Collectives in a stream of their own, as NCCL's: whoever reads what they gather or sum does so after the wait."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from distui.core.sharding.homes.homes import Offload
from distui.core.sharding.sharded import ShardedModel
from distui.core.sharding.start.start import Start
from distui.core.sharding.units import partition
from distui.core.sharding.units.placement import Placement
from distui.core.sharding.units.shards import Shards
from distui.core.sharding.units.unit import Unit
from distui.core.sharding.units.unit_parameters import UnitParameters
from tests.recording import DEVICE, Agent, RecordingMachine, UnorderedError
from tests.unit.sharding.homes.test_ordering import DIM, Model


class _Work:
    def __init__(self, machine: RecordingMachine, agent: Agent) -> None:
        self._machine, self._clock = machine, dict(agent.clock)

    def wait(self) -> None:
        self._machine.stream.join(self._clock)


class _OneRankNccl:
    """The collectives of a group of one, each on the group's own stream, which waits for the one that is current."""

    shares_scales = False

    def __init__(self, machine: RecordingMachine, name: str) -> None:
        self._machine = machine
        self._agent = machine.agents.setdefault(name, Agent(name))

    def _run(self, act: Callable[[], Any]) -> _Work:
        self._agent.join(self._machine.stream.clock)
        with self._machine.in_stream(self._agent.name):
            act()
        return _Work(self._machine, self._agent)

    def gather_weights(self, full: torch.Tensor, shard: torch.Tensor) -> _Work:
        return self._run(lambda: full.copy_(shard))

    all_gather = gather_weights

    def reduce_scatter(self, full: torch.Tensor, shard: torch.Tensor, accumulate: bool = False) -> _Work:
        def act() -> None:
            shard.add_(full) if accumulate else shard.copy_(full)

        return self._run(act)

    def sum_gradient(self, full: torch.Tensor) -> _Work:
        return self._run(lambda: full.mul_(1.0))


def _train(machine: RecordingMachine, stage: int, homes: tuple[str, str]) -> dict[str, Any]:
    return _trained(machine, stage, homes).full_state_dict()


def _trained(machine: RecordingMachine, stage: int, homes: tuple[str, str]) -> ShardedModel:
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    start = Start(model, None, device=DEVICE)
    sharded = ShardedModel(model, stage=stage, group=None, offload=Offload(*homes), start=start)
    for unit in sharded.units:
        unit.transport = _OneRankNccl(machine, "sums")  # type: ignore[assignment]
        unit.gathers = _OneRankNccl(machine, "gathers")  # type: ignore[assignment]
    prepared = sharded.prepare_optimizer(optimizer)
    for step in range(3):
        for micro in range(2):
            sharded.schedule.sync = micro == 1
            sharded.schedule.hide_gradients()
            sharded.model(torch.full((4, DIM), 0.5 + step, device=DEVICE)).square().mean().backward()
            sharded.schedule.end_backward()
        prepared.step()
        prepared.zero_grad()
    return sharded


@pytest.fixture(autouse=True)
def _one_rank_does_as_several_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partition, "SMALL_UNIT_NUMEL", 1)
    monkeypatch.setattr(Placement, "shards_optimizer", property(lambda self: self.stage >= 1))
    monkeypatch.setattr(Placement, "shards_gradients", property(lambda self: self.stage >= 2))
    monkeypatch.setattr(Placement, "shards_parameters", property(lambda self: self.stage >= 3))


CASES = [
    (0, ("none", "none")),
    (1, ("none", "none")),
    (1, ("cpu", "none")),
    (2, ("none", "none")),
    (2, ("cpu", "none")),
    (3, ("none", "none")),
    (3, ("cpu", "cpu")),
]


@pytest.mark.parametrize(("stage", "homes"), CASES)
def test_training_comes_after_its_collectives(
    monkeypatch: pytest.MonkeyPatch, stage: int, homes: tuple[str, str]
) -> None:
    machine = RecordingMachine()
    with machine.recording(monkeypatch):
        found = _train(machine, stage, homes)
    assert machine.agents["sums"].clock and bool(machine.agents["gathers"].clock) == (stage > 0)
    if stage:
        machine = RecordingMachine()
        with machine.recording(monkeypatch):
            expected = _train(machine, 0, ("none", "none"))
        torch.testing.assert_close(found, expected)


def _gather_at_once(self: Shards, into: torch.Tensor) -> Any:
    self.prefetch()
    assert self._arriving is not None and self.gathers is not None
    (_, buffer), self._arriving = self._arriving, None
    return self.gathers.gather_weights(into, buffer)


def _finish_gather_at_once(self: UnitParameters) -> None:
    if self.gathering is not None:
        self.gathering = None
        self.residence.do("arrive")


def _sum_is_here(self: Unit) -> None:
    self.pending = None


MUTATIONS: dict[str, tuple[Any, str, Callable[..., Any], tuple[int, tuple[str, str]], str]] = {
    "a shard is gathered before it is here": (Shards, "gather_beside", _gather_at_once, (3, ("cpu", "cpu")), "gathers"),
    "parameters are read while they arrive": (
        UnitParameters,
        "finish_gather",
        _finish_gather_at_once,
        (3, ("none", "none")),
        "what gathers still writes",
    ),
    "a sum is used while it travels": (Unit, "_wait_for_sum", _sum_is_here, (2, ("none", "none")), "what sums still"),
    "a sum leaves while it travels": (Unit, "_wait_for_sum", _sum_is_here, (2, ("cpu", "none")), "what sums still"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_each_wait_is_missed_where_it_is_taken_away(monkeypatch: pytest.MonkeyPatch, mutation: str) -> None:
    owner, name, changed, case, told = MUTATIONS[mutation]
    monkeypatch.setattr(owner, name, changed)
    machine = RecordingMachine()
    with machine.recording(monkeypatch), pytest.raises(UnorderedError, match=told):
        _train(machine, *case)


def _drop_at_once(self: Shards) -> None:
    assert self._arriving is not None and self.homes is not None
    (_, buffer), self._arriving = self._arriving, None
    self.homes.give(buffer)


@pytest.mark.parametrize("waits", [True, False])
def test_a_shard_that_is_not_wanted_any_more_arrives_before_its_buffer_is_taken(
    monkeypatch: pytest.MonkeyPatch, waits: bool
) -> None:
    machine = RecordingMachine()
    with machine.recording(monkeypatch):
        sharded = _trained(machine, 3, ("cpu", "cpu"))
        if not waits:
            monkeypatch.setattr(Shards, "drop_prefetch", _drop_at_once)
        unit = sharded.units[0]
        unit.prefetch()
        assert unit._arriving is not None
        _, buffer = unit._arriving
        unit.drop_prefetch()
        if waits:
            buffer.zero_()
        else:
            with pytest.raises(UnorderedError, match="what side stream still writes"):
                buffer.zero_()
