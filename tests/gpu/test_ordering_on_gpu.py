"""On a GPU: offloaded training, and backward in a stream of the script's own, end where training on the CPU ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from distui.core.ranks import streams
from distui.core.ranks.host_memory import PAGE_BYTES, page_buffer
from tests.unit.sharding.homes import test_ordering as ordering

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


def _trained(
    monkeypatch: pytest.MonkeyPatch, device: str, stage: int, homes: tuple[str, str], low: torch.dtype | None
) -> Any:
    monkeypatch.setattr(ordering.partition, "SMALL_UNIT_NUMEL", 1)
    monkeypatch.setattr(ordering, "DEVICE", torch.device(device))
    monkeypatch.setattr(ordering, "DIM", 512)
    return ordering._train(stage, homes, low, steps=6).full_state_dict()


@pytest.mark.parametrize("own_stream", [False, True])
@pytest.mark.parametrize(("stage", "homes", "low"), ordering.CASES)
def test_training_ends_where_it_ends_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, stage: int, homes: tuple[str, str], low: torch.dtype | None, own_stream: bool
) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    expected = _trained(monkeypatch, "cpu", stage, homes, low)
    stream = torch.cuda.Stream() if own_stream else torch.cuda.current_stream()
    with torch.cuda.stream(stream):
        found = _trained(monkeypatch, "cuda", stage, homes, low)
    error = 1e-4 if low is None else 2e-2
    torch.testing.assert_close(found, expected, atol=error, rtol=error, check_device=False)


def test_pinned_pages_are_pinned_and_copied_behind_the_host() -> None:
    host = page_buffer(3 * PAGE_BYTES, pinned=True)
    assert host.is_pinned() and host.numel() == 3 * PAGE_BYTES
    there = torch.zeros(host.numel(), dtype=torch.uint8, device="cuda")
    copy = streams.Copy(there, host.fill_(5))
    copy.order(there)
    assert there.eq(5).all()
    copy.order(host)
    host.zero_()
    streams.Copy(host, there).order(host)
    assert host.eq(5).all()
