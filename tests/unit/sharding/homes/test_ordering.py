"""On a GPU the host runs ahead. Every use of memory between host, device and copies is ordered: see tests/recording.py.

Each order is taken away once, and must be missed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distui.core.errors import UserError
from distui.core.ranks import streams
from distui.core.ranks.precision import apply_border_casts
from distui.core.ranks.streams import Copy
from distui.core.sharding.homes import step
from distui.core.sharding.homes.home import Transfer
from distui.core.sharding.homes.homes import Homes, Offload
from distui.core.sharding.homes.memory import MemoryCell, _Copying
from distui.core.sharding.sharded import ShardedModel, refuse_one_queue
from distui.core.sharding.start.start import Start
from distui.core.sharding.units import partition
from tests.recording import DEVICE, Agent, RecordingMachine, UnorderedError

DIM = 24


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(DIM, 2 * DIM), nn.Linear(2 * DIM, DIM)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(DIM, DIM)
        self.blocks = nn.ModuleList(Block() for _ in range(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return x


def _train(stage: int, homes: tuple[str, str], low: torch.dtype | None, accumulation: int = 1, steps: int = 3) -> Any:
    """Three steps in which the script asks the device for no number."""
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    start = Start(model, None, device=DEVICE)
    sharded = ShardedModel(model, stage=stage, group=None, compute_dtype=low, offload=Offload(*homes), start=start)
    if low is not None:
        apply_border_casts(model, low)
    prepared = sharded.prepare_optimizer(optimizer)
    for _ in range(steps):
        for micro in range(accumulation):
            sharded.schedule.sync = micro == accumulation - 1
            sharded.schedule.hide_gradients()
            sharded.model(torch.full((4, DIM), 0.5, device=DEVICE)).square().mean().backward()
            sharded.schedule.end_backward()
        prepared.grad_norm(None, 2.0)
        prepared.step()
        prepared.zero_grad()
    return sharded


CASES = [
    (stage, homes, low)
    for stage in (1, 2, 3)
    for homes in (("cpu", "none"), ("none", "cpu"), ("cpu", "cpu"))
    for low in (None, torch.bfloat16)
    if stage == 3 or homes[1] == "none"
]


@pytest.fixture(autouse=True)
def _small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partition, "SMALL_UNIT_NUMEL", 1)


@pytest.mark.parametrize(("stage", "homes", "low"), CASES)
def test_an_offloaded_step_is_ordered(
    monkeypatch: pytest.MonkeyPatch, stage: int, homes: tuple[str, str], low: torch.dtype | None
) -> None:
    accumulation = 2 if (low is None) == (stage == 2) else 1  # each with each of the others
    machine = RecordingMachine()
    with machine.recording(monkeypatch):
        sharded = _train(stage, homes, low, accumulation)
        found = sharded.full_state_dict()
    assert machine.num_copies > 20
    with monkeypatch.context() as patch:  # the same on one machine, where nothing moves
        patch.setattr("tests.unit.sharding.homes.test_ordering.DEVICE", torch.device("cpu"))
        expected = _train(stage, homes, low, accumulation).full_state_dict()
    torch.testing.assert_close(found, expected)


def _host_goes_on(self: Copy, tensor: torch.Tensor) -> None:
    # As it once was: for a copy to the device its stream waits, and the host takes the source for free.
    if self._mark is not None and streams.machine.holds(self._tensors[0]):
        self._mark.order(DEVICE)
    else:
        self.finish()


def _device_goes_on(self: Copy, tensor: torch.Tensor) -> None:
    if not streams.machine.holds(tensor):
        self.finish()


def _nothing(*args: Any) -> None:
    return None


_clear, _start = step._Frame.clear, MemoryCell._start


def _clear_at_once(self: step._Frame, nbytes: int) -> None:
    self.lent.clear()
    _clear(self, nbytes)


def _start_loosely(self: MemoryCell, out: torch.Tensor, source: torch.Tensor, theirs: torch.Tensor) -> Transfer:
    if streams.machine.holds(self.tensor):
        return _Copying(Copy(out, source), theirs)
    return _start(self, out, source, theirs)


def _give_at_once(self: Homes) -> None:
    self.give(self._storing.popleft()[1])


def _steps(stage: int, homes: tuple[str, str], low: torch.dtype | None = None) -> Callable[[], Any]:
    return lambda: _train(stage, homes, low)


def _many_gradients() -> None:
    homes = Homes(Offload("cpu", "none"), DEVICE, 2)
    assert homes.gradients is not None
    cells = [homes.gradients.cell(4096, torch.float32) for _ in range(6)]
    for number, cell in enumerate(cells):
        buffer = homes.take(4096, torch.float32)
        buffer.fill_(number)
        homes.give_after(cell.store(buffer), buffer)
    homes.settle()
    assert [cell.read(0, 1).item() for cell in cells] == list(range(6))
    assert homes.buffer_bytes <= 3 * 4096 * 4


CPU, PARAMS, BOTH = ("cpu", "none"), ("none", "cpu"), ("cpu", "cpu")
LOW = torch.bfloat16
MUTATIONS: dict[str, tuple[Any, str, Callable[..., Any], Callable[[], Any], str]] = {
    "the host rewrites what a copy still reads": (Copy, "order", _host_goes_on, _steps(2, CPU, LOW), "host writes"),
    "the device computes with what is not there": (Copy, "order", _device_goes_on, _steps(3, BOTH), "stream 0 reads"),
    "the host steps with what still arrives": (MemoryCell, "settle", _nothing, _steps(2, CPU, LOW), "host"),
    "a frame is refilled while it is read": (step._Frame, "clear", _clear_at_once, _steps(2, CPU, LOW), "host writes"),
    "a step begins before its tensors are here": (step._Frame, "finish", _nothing, _steps(1, CPU), "host"),
    "a step on the device begins so": (step._Frame, "finish", _nothing, _steps(3, PARAMS), "stream 0"),
    "a buffer is taken again while it leaves": (Homes, "_give_oldest", _give_at_once, _many_gradients, "stream 0 wr"),
    "the device's own memory is read too early": (MemoryCell, "_start", _start_loosely, _steps(1, CPU), "stream 0"),
}


def test_gradients_leave_through_three_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    with RecordingMachine().recording(monkeypatch):
        _many_gradients()


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_each_order_is_missed_where_it_is_taken_away(monkeypatch: pytest.MonkeyPatch, mutation: str) -> None:
    owner, name, changed, run, told = MUTATIONS[mutation]
    monkeypatch.setattr(owner, name, changed)
    with RecordingMachine().recording(monkeypatch), pytest.raises(UnorderedError, match=told) as found:
        run()
    assert "begun at" in str(found.value) and "core/sharding" in str(found.value), "both places are named"


# ---- gradients in other streams ------------------------------------------------------------------------------------


def _backward_in_two_streams(machine: RecordingMachine, stage: int) -> None:
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    sharded = ShardedModel(model, stage=stage, group=None, start=Start(model, None, device=DEVICE))
    prepared = sharded.prepare_optimizer(optimizer)
    names = iter(f"stream {index}" for index in range(1, 1000))
    # As autograd does: a hook runs in the stream in which its parameter was first used.
    for param in model.parameters():
        for hooks in (param._post_accumulate_grad_hooks,):
            for key, hook in list(hooks.items()):
                hooks[key] = _in_stream(machine, next(names), hook)
    for _ in range(3):
        sharded.schedule.hide_gradients()
        sharded.model(torch.full((4, DIM), 0.5, device=DEVICE)).square().mean().backward()
        sharded.schedule.end_backward()
        prepared.step()
        prepared.zero_grad()


def _in_stream(machine: RecordingMachine, name: str, hook: Callable[..., Any]) -> Callable[..., Any]:
    def called(*args: Any) -> Any:
        machine.agents.setdefault(name, Agent(name)).join(machine.stream.clock)  # autograd has the gradient there
        with machine.in_stream(name):
            return hook(*args)

    return called


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_gradients_that_arrive_in_other_streams_are_ordered(monkeypatch: pytest.MonkeyPatch, stage: int) -> None:
    machine = RecordingMachine()
    with machine.recording(monkeypatch):
        _backward_in_two_streams(machine, stage)
    monkeypatch.setattr(streams.Line, "join", _nothing)
    machine = RecordingMachine()
    with machine.recording(monkeypatch), pytest.raises(UnorderedError, match="stream"):
        _backward_in_two_streams(machine, stage)


def test_no_hook_is_left_out_where_gradients_have_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    with RecordingMachine().recording(monkeypatch):
        sharded = _train(2, ("cpu", "none"), None, steps=2)
        assert all(not unit.collected for unit in sharded.units)


def test_all_that_is_pinned_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = RecordingMachine()
    with machine.recording(monkeypatch):
        sharded = _train(2, CPU, LOW)
        report = sharded.memory_by_category()
        (optimizer,) = sharded.optimizers
        assert sharded.homes is not None and optimizer.stream is not None
        assert sharded.homes.host.held_bytes + optimizer.stream.frame_bytes == sum(machine.pinned.values())
        assert report["host"] >= sharded.homes.host.held_bytes
        whole_pages = sum(-(-unit.layout.shard_numel * 4 // 4096) * 4096 * 2 for unit in sharded.units)
        assert sharded.homes.host.held_bytes == whole_pages, "masters and gradients, to the page"


def test_one_queue_for_two_communicators_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    refuse_one_queue(torch.device("cpu"))
    with pytest.raises(UserError, match="CUDA_DEVICE_MAX_CONNECTIONS=1 at stage 3"):
        refuse_one_queue(torch.device("cuda", 0))
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "8")
    refuse_one_queue(torch.device("cuda", 0))
