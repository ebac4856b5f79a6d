"""What is read behind the host's back: losses and norms for telemetry, copies of a save."""

from __future__ import annotations

import pytest
import torch

from distui.core.checkpoint.staging import Staging
from distui.core.ranks import streams
from tests.recording import DEVICE, HOST, RecordingMachine, UnorderedError


def test_a_number_for_the_log_is_read_behind_its_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = RecordingMachine()
    with machine.recording(monkeypatch), machine.in_stream("the script's"):
        loss = torch.ones(3, device=DEVICE).sum()
        read = streams.reader(loss)
        with machine.in_stream("the side thread's"):  # whose own stream knows nothing of the script's
            with pytest.raises(UnorderedError, match="the side thread's reads"):
                float(loss)
            assert read() == 3.0


def test_a_number_on_the_host_is_the_one_of_that_moment() -> None:
    loss = torch.tensor(2.0)
    read = streams.reader(loss)
    loss.zero_()
    assert read() == 2.0


def _stage(machine: RecordingMachine, wait: bool) -> None:
    staging = Staging()
    weights, state = torch.arange(6.0, device=DEVICE), torch.arange(4.0, device=DEVICE)
    items = {"whole": weights, "gaps": state[::2], "number": torch.tensor(3.0)}
    for scale in (1.0, 2.0):
        copies, arrived = staging.copy(items)
        weights.mul_(2.0)  # training goes on
        if wait:
            arrived()
        assert torch.equal(copies["whole"], torch.arange(6.0) * scale)
        assert copies["gaps"].tolist() == [0.0, 2.0] and copies["number"] == 3.0
    assert staging.allocated_bytes == sum(machine.pinned.values()) + 4


def test_a_save_reads_its_copies_when_they_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = RecordingMachine()
    with machine.recording(monkeypatch):
        _stage(machine, wait=True)
        with pytest.raises(UnorderedError, match="host reads"):
            _stage(machine, wait=False)


def test_a_line_follows_the_script_from_stream_to_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, changes = RecordingMachine(), []
    monkeypatch.setattr(streams, "machine", machine)
    assert streams.line_of(torch.device("cpu"), lambda: None) is None
    line = streams.line_of(DEVICE, lambda: changes.append(machine.stream.name))
    assert line is not None
    line.join()
    first = machine.stream
    first.tick()
    with machine.in_stream("another"):
        line.join()
        assert machine.stream.clock == first.clock
        line.join()
    assert changes == ["another"]


def test_the_recorder_tells_who_and_where(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = RecordingMachine()
    with machine.recording(monkeypatch):
        here, there = torch.zeros(64), torch.ones(64, device=DEVICE)
        copy = streams.Copy(here[32:], there[:32])
        here[:32].fill_(1.0)  # beside it
        there[32:].fill_(1.0)
        with pytest.raises(UnorderedError, match=r"host reads .*\n.*test_streams.py(.|\n)*side stream still writes"):
            here.sum()
        with pytest.raises(UnorderedError, match="stream 0 writes"):
            there.add_(0.0)
        copy.order(there)
        there.zero_()
        with pytest.raises(UnorderedError):  # the device's stream has it, the host has not
            here[40].item()
        copy.order(here)
        assert here.sum() == 64
        assert machine.agents[HOST].clock["side stream"] == 1
