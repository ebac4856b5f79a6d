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

from distui.daemon.runs.store import read_batches

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def load_faults() -> ModuleType:
    """Import benchmarks/faults.py, which is no package."""
    spec = importlib.util.spec_from_file_location("faults_benchmark", BENCHMARKS / "faults.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["faults_benchmark"] = module
    sys.path.insert(0, str(BENCHMARKS))  # as for a script
    spec.loader.exec_module(module)
    return module


TESTED = (
    "asleep",
    "stopped",
    "holding_the_gil",
    "killed",
    "memory_error",
    "memory_killed",
    "operation",
    "size",
    "order",
    "straggler",
    "slow_link",
    "data_stall",
    "nan_that_spreads",
    "disk_full",
    "pauses",
    "leaves",
    "worker_killed",
    "loss_jumps",
    "throttled",
    "all_wait_for_data",
    "learner_that_actors_wait_for",
    "slow_actor",
)


class Jobs:
    """All faults begin at once; each test waits for its own verdict."""

    def __init__(self, faults: ModuleType, names: list[str]) -> None:
        self.bench: Any = faults.Bench()
        self.situations: dict[str, Any] = faults.SITUATIONS
        self.runs = {name: self.bench.start(name) for name in names}

    def verdict(self, fault: str, words: str = "") -> tuple[Any, Any]:
        """Return the first verdict on the fault that has `words`, and the whole snapshot.

        Nothing may be said before it happens.
        """
        _, found, early = self.bench.verdict(self.runs[fault], self.situations[fault].kind, 120.0, words)
        assert found is not None, f"no verdict on {fault}"
        assert not early, early
        return found, self.bench.snapshot(self.runs[fault])

    def event(self, fault: str, kind: str, ranks: str) -> Any:
        """Return the first event of a kind, on these ranks, in a run's log."""
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            events = (record.event for batch in read_batches(self.runs[fault]) for record in batch.records)
            if found := [one for one in events if one.kind == kind and one.attributes["ranks"] == ranks]:
                return found[0]
            time.sleep(0.1)
        raise AssertionError(f"no {kind} of ranks {ranks} in {fault}")

    def wait_fault(self, fault: str) -> None:
        """Wait until the fault has happened."""
        deadline = time.monotonic() + 120
        while not (self.runs[fault].path / "fault").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.fixture(scope="module")
def jobs() -> Iterator[Jobs]:
    """Give the running jobs; those that need root are there only for root."""
    kept = {name: os.environ.get(name) for name in ("DISTUI_STATE_DIR", "DISTUI_RUNTIME_DIR")}
    faults = load_faults()
    root = os.geteuid() == 0 and Path("/sys/fs/cgroup/memory/memory.limit_in_bytes").exists()
    names = [name for name in TESTED if root or not faults.SITUATIONS[name].needs_root]
    found = Jobs(faults, names)
    yield found
    found.bench.close()
    for name, value in kept.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
