"""Limits of control groups, as both versions write them, and a real one where this may make one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distui.daemon.node import cgroups
from distui.daemon.node.cgroups import Throttling, memory_left

CPU = Path("/sys/fs/cgroup/cpu")


def _write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    (tmp_path / "proc/7").mkdir(parents=True)
    return tmp_path / "proc"


def _stat(throttled: int, periods: int) -> str:
    return f"nr_periods {periods}\nnr_throttled {throttled}\nthrottled_usec 5"


def test_version_2_with_the_limit_on_a_group_around(
    tmp_path: Path, proc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (proc / "7/cgroup").write_text("0::/job/rank\n")
    root = tmp_path / "cgroup"
    _write(root / "job/rank", memory__max="max", memory__current="100", cpu__stat="usage_usec 9", cpu__max="max 100000")
    _write(
        root / "job",
        memory__max="1000",
        memory__current="700",
        memory__stat="anon 500\ninactive_file 50",
        cpu__max="150000 100000",
        cpu__stat=_stat(10, 100),
    )
    assert memory_left(7, root, proc) == 350
    held, clock = Throttling(root, proc), iter(float(at) for at in range(100))
    monkeypatch.setattr(cgroups.time, "monotonic", lambda: next(clock))
    assert held.look([7]) == []
    _write(root / "job", cpu__stat=_stat(35, 150))
    (found,) = held.look([7])
    assert (found.pids, found.cores, found.share) == ((7,), 1.5, 0.5)


def test_version_1_with_controllers_apart(tmp_path: Path, proc: Path) -> None:
    (proc / "7/cgroup").write_text("4:memory:/job\n2:cpu,cpuacct:/job\n0::/\n")
    root = tmp_path / "cgroup"
    _write(
        root / "memory/job",
        memory__limit_in_bytes="2000",
        memory__usage_in_bytes="1500",
        memory__stat="total_inactive_file 200",
    )
    _write(root / "memory", memory__limit_in_bytes=str(0x7FFFFFFFFFFFF000), memory__usage_in_bytes="1")
    assert memory_left(7, root, proc) == 700
    assert memory_left(8, root, proc) is None, "it has ended"


def test_no_limit_is_none(proc: Path, tmp_path: Path) -> None:
    (proc / "7/cgroup").write_text("0::/\n")
    _write(tmp_path / "cgroup", memory__stat="anon 1")
    assert memory_left(7, tmp_path / "cgroup", proc) is None
    assert Throttling(tmp_path / "cgroup", proc).look([7]) == []


@pytest.mark.skipif(not os.access(CPU / "cpu.cfs_quota_us", os.W_OK) and not os.access(CPU, os.W_OK), reason="no root")
def test_a_real_group_that_is_held() -> None:
    group = CPU / f"distui-test-{os.getpid()}"
    group.mkdir()
    spin = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        (group / "cpu.cfs_period_us").write_text("10000")
        (group / "cpu.cfs_quota_us").write_text("1000")
        (group / "cgroup.procs").write_text(str(spin.pid))
        throttling = Throttling()
        while not (found := throttling.look([spin.pid])):
            time.sleep(0.1)
        assert found[0].pids == (spin.pid,) and found[0].cores == pytest.approx(0.1) and found[0].share > 0.5
    finally:
        spin.kill()
        spin.wait()
        group.rmdir()
