"""The file behind the NVMe home: what is stored comes back, and every failure of a disk is told in three lines."""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distui.core.errors import UserError
from distui.core.ranks.host_memory import PAGE_BYTES
from distui.core.sharding.homes import nvme
from distui.core.sharding.homes.home import CellSlice, flat_buffer
from distui.core.sharding.homes.homes import Homes, Offload
from distui.core.sharding.homes.nvme import NvmeHome


def home_in(folder: Path, warnings: list[str] | None = None) -> NvmeHome:
    found: list[str] = [] if warnings is None else warnings
    return NvmeHome(str(folder), found.append, pinned=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("numel", [1, 2048, 5000, 3 << 20])
def test_what_is_stored_comes_back(tmp_path: Path, dtype: torch.dtype, numel: int) -> None:
    home = home_in(tmp_path)
    first, second = home.cell(numel, dtype), home.cell(numel, dtype)
    values = torch.randint(0, 200, (numel,)).to(dtype)
    aligned = flat_buffer(numel, dtype, torch.device("cpu"))
    aligned.copy_(values)
    first.store(aligned).wait()
    second.store(values.flip(0)).wait()  # not aligned: through a buffer
    out = flat_buffer(numel, dtype, torch.device("cpu"))
    first.fetch(out).wait()
    assert torch.equal(out, values)
    misplaced = torch.empty(numel + 1, dtype=dtype)[1:]
    second.fetch(misplaced).wait()
    assert torch.equal(misplaced, values.flip(0))
    # Ranges: what is around them stays.
    low, high = numel // 3, numel - numel // 4
    assert torch.equal(first.read(low, high), values[low:high])
    part = CellSlice(first, low, high)
    part.write(0, torch.full((part.numel(),), 7).to(dtype))
    values[low:high] = 7
    assert torch.equal(first.read(0, numel), values)
    assert torch.equal(second.read(0, numel), misplaced)
    assert not list(tmp_path.iterdir())


def test_a_fetch_sees_the_store_before_it(tmp_path: Path) -> None:
    cell = home_in(tmp_path).cell(1 << 20, torch.float32)
    source, out = (flat_buffer(1 << 20, torch.float32, torch.device("cpu")) for _ in range(2))
    for round_number in range(5):
        source.fill_(round_number)
        cell.store(source)
        cell.fetch(out).wait()
        assert out.eq(round_number).all()


def test_a_file_system_without_o_direct_works_with_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_open = os.open

    def refuse(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real_open(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    warnings: list[str] = []
    home = home_in(tmp_path, warnings)
    assert not home.file.is_direct and "refuses O_DIRECT" in warnings[0]
    cell = home.cell(3000, torch.float32)
    cell.store(torch.arange(3000.0)).wait()
    assert torch.equal(cell.read(0, 3000), torch.arange(3000.0))
    with pytest.warns(UserWarning, match="refuses O_DIRECT"):
        Homes(Offload(optimizer="nvme", nvme_path=str(tmp_path)), torch.device("cpu"), stage=2)


def test_no_unnamed_files_on_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_open = os.open

    def refuse(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return real_open(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    cell = home_in(tmp_path).cell(10, torch.float32)
    cell.store(torch.ones(10)).wait()
    assert cell.read(0, 10).eq(1).all() and not list(tmp_path.iterdir())


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    home = home_in(tmp_path)
    with pytest.raises(UserError) as refused:
        home.file.expect(1 << 60, "the model")
    assert f"{1 << 60:,} bytes" in refused.value.why and "are free" in refused.value.why
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(UserError) as refused:
            home.cell(1 << 20, torch.float32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"{4 << 20:,} bytes are needed" in refused.value.why and "ulimit -f" in refused.value.fix
    with pytest.raises(UserError, match="cannot be used"):
        home_in(tmp_path / "missing")


def _full(handle: int) -> None:
    os.dup2(os.open("/dev/full", os.O_RDWR), handle)


def _cut_off(handle: int) -> None:
    os.ftruncate(handle, PAGE_BYTES)


@pytest.mark.parametrize(
    ("sabotage", "doing", "why", "fix"),
    [(_full, "writing", "No space left", "free some space"), (_cut_off, "reading", "the file ends at", "smartctl")],
)
def test_a_disk_that_fails_is_told_to_who_waits(
    tmp_path: Path, sabotage: Callable[[int], None], doing: str, why: str, fix: str
) -> None:
    home = home_in(tmp_path)
    cell = home.cell(1 << 20, torch.float32)
    source = flat_buffer(1 << 20, torch.float32, torch.device("cpu"))
    cell.store(source).wait()
    sabotage(home.file.handle)
    transfer = cell.store(source) if doing == "writing" else cell.fetch(source)
    with pytest.raises(UserError) as failed:
        transfer.wait()
    assert failed.value.why.startswith(f"{doing} {4 << 20:,} bytes") and why in failed.value.why
    assert fix in failed.value.fix and "last checkpoint" in failed.value.fix


def test_a_disk_that_does_not_answer_ends_the_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    cell = home_in(tmp_path, warnings).cell(10, torch.float32)
    answer = threading.Event()
    real = nvme.move_chunk
    monkeypatch.setattr(nvme, "move_chunk", lambda *args: (answer.wait(120), real(*args)))
    monkeypatch.setattr(nvme, "SLOW_S", 0.05)
    monkeypatch.setattr(nvme, "STALLED_S", 0.1)
    transfer = cell.store(torch.ones(10))
    with pytest.raises(UserError, match="does not answer"):
        transfer.wait()
    assert "is slow: writing" in warnings[0]
    answer.set()
    transfer.wait()
