"""Pinned memory: as many pages as are needed, unlocked before they are gone."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from distui.core.errors import UserError
from distui.core.ranks import streams
from distui.core.ranks.host_memory import PAGE_BYTES, page_buffer
from distui.core.ranks.streams import Cuda
from distui.core.sharding.homes.home import flat_buffer
from tests.recording import RecordingMachine


def _is_mapped(address: int) -> bool:
    spans = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
    return any(int(begin, 16) <= address < int(end, 16) for begin, end in spans)


class _Watching(RecordingMachine):
    """Notes whether memory is there when it is unlocked."""

    def __init__(self) -> None:
        super().__init__()
        self.unpinned: list[bool] = []

    def pin(self, address: int, nbytes: int) -> Callable[[], None]:
        unpin = super().pin(address, nbytes)

        def watched() -> None:
            self.unpinned.append(_is_mapped(address))
            unpin()

        return watched


def test_pinned_memory_is_not_rounded_to_a_power_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = _Watching()
    monkeypatch.setattr(streams, "machine", machine)
    buffer = page_buffer(5 * PAGE_BYTES + 1, pinned=True)
    assert buffer.numel() == 6 * PAGE_BYTES and buffer.data_ptr() % PAGE_BYTES == 0
    assert machine.pinned == {buffer.data_ptr(): 6 * PAGE_BYTES}
    part = buffer[10:20].fill_(7)
    del buffer
    gc.collect()
    assert machine.pinned and part.sum() == 70, "a view keeps it"
    del part
    gc.collect()
    assert not machine.pinned and machine.unpinned == [True]


def test_memory_that_cannot_be_pinned_is_told_in_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    class Runtime:
        @staticmethod
        def cudaHostRegister(address: int, nbytes: int, flags: int) -> int:
            return 2

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    with pytest.raises(UserError, match="8,192 bytes"):
        Cuda().pin(4096, 8192)


def test_a_forked_child_does_not_get_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "machine", RecordingMachine())
    buffers = page_buffer(1, pinned=False), page_buffer(1, pinned=True)
    flags = [_flags_at(buffer.data_ptr()) for buffer in buffers]
    assert ["dc" in found for found in flags] == [False, True]  # do not copy area on fork


def _flags_at(address: int) -> list[str]:
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            begin, end = (int(word, 16) for word in words[0].split("-"))
            inside = begin <= address < end
        elif inside and words[0] == "VmFlags:":
            return words[1:]
    return []


def test_what_is_asked_for_in_inference_mode_is_trained_with_afterwards() -> None:
    with torch.inference_mode():
        buffers = [page_buffer(10), flat_buffer(3, torch.float32, torch.device("cpu"), aligned=False)]
    for buffer in buffers:
        assert not buffer.is_inference()
        buffer.add_(1)
