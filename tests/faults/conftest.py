"""Real jobs that go wrong, all under one daemon and forked from one warm process."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def load_faults() -> ModuleType:
    """Import benchmarks/faults.py, which is no package."""
    spec = importlib.util.spec_from_file_location("faults_benchmark", BENCHMARKS / "faults.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["faults_benchmark"] = module
    spec.loader.exec_module(module)
    return module


class Jobs:
    """All faults begin at once; each test waits for its own verdict."""

    def __init__(self, faults: ModuleType, names: list[str]) -> None:
        self.bench: Any = faults.Bench()
        self.expected: dict[str, tuple[str, float]] = faults.EXPECTED
        self.runs = {name: self.bench.start(name) for name in names}

    def verdict(self, fault: str) -> tuple[Any, Any]:
        """Return the verdict on the fault, and the whole snapshot; nothing may be said before it happens."""
        _, found, early = self.bench.verdict(self.runs[fault], self.expected[fault][0])
        assert found is not None, f"no verdict on {fault}"
        assert not early, early
        return found, self.bench.snapshot(self.runs[fault])

    def wait_fault(self, fault: str) -> None:
        """Wait until the fault has happened."""
        deadline = time.monotonic() + 50
        while not (self.runs[fault].path / "fault").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.fixture(scope="module")
def jobs() -> Iterator[Jobs]:
    """Give the running jobs; those that need root are there only for root."""
    kept = {name: os.environ.get(name) for name in ("DISTUI_STATE_DIR", "DISTUI_RUNTIME_DIR")}
    faults = load_faults()
    root = os.geteuid() == 0 and Path("/sys/fs/cgroup/memory/memory.limit_in_bytes").exists()
    names = [name for name in (*faults.EXPECTED, "pauses") if root or name not in faults.NEEDS_ROOT]
    found = Jobs(faults, names)
    yield found
    found.bench.close()
    for name, value in kept.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
