"""Real jobs that go wrong, a few at a time, all under one daemon and forked from one warm process."""

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

from distui.core.paths import RunFolder
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
    "order",
    "killed",
    "memory_error",
    "memory_killed",
    "asleep",
    "stopped",
    "holding_the_gil",
    "operation",
    "size",
    "straggler",
    "slow_actor",
    "learner_that_actors_wait_for",
    "slow_link",
    "data_stall",
    "nan_that_spreads",
    "loss_jumps",
    "leaves",
    "worker_killed",
    "throttled",
    "all_wait_for_data",
    "disk_full",
    "pauses",
)
"""In the order of the tests: the next begin while one is waited for."""

AHEAD = 3
LIMIT_S = 120.0


class Jobs:
    """A job for each fault, begun when a test asks for it or soon before, and ended with that test.

    Three ranks each: all at once would be more than seventy processes, on every worker that has one of the tests.
    """

    def __init__(self, faults: ModuleType) -> None:
        self.bench: Any = faults.Bench()
        self.situations: dict[str, Any] = faults.SITUATIONS
        root = os.geteuid() == 0 and Path("/sys/fs/cgroup/memory/memory.limit_in_bytes").exists()
        self.possible = [name for name in TESTED if root or not self.situations[name].needs_root]
        self._runs: dict[str, RunFolder] = {}
        self._asked: list[str] = []

    def run(self, fault: str) -> RunFolder:
        """Return the run of a fault, and begin those of the next tests."""
        if fault not in self.possible:
            pytest.skip("needs root, network namespaces and control groups")
        if fault not in self._asked:
            self._asked.append(fault)
        at = self.possible.index(fault)
        for name in self.possible[at : at + 1 + AHEAD]:
            if name not in self._runs:
                self._runs[name] = self.bench.start(name)
        return self._runs[fault]

    def end_asked(self) -> None:
        """End the jobs that a test has asked for."""
        for name in self._asked:
            self.bench.end(self._runs.pop(name))
        self._asked.clear()

    def verdict(self, fault: str, words: str = "") -> tuple[Any, Any]:
        """Return the first verdict on the fault that has `words`, and the whole snapshot.

        Nothing may be said before it happens.
        """
        run = self.run(fault)
        _, found, early = self.bench.verdict(run, self.situations[fault].kind, LIMIT_S, words)
        assert found is not None, f"no verdict on {fault}"
        assert not early, early
        return found, self.bench.snapshot(run)

    def event(self, fault: str, kind: str, ranks: str) -> Any:
        """Return the first event of a kind, on these ranks, in a run's log."""
        run = self.run(fault)
        deadline = time.monotonic() + LIMIT_S
        while time.monotonic() < deadline:
            events = (record.event for batch in read_batches(run) for record in batch.records)
            if found := [one for one in events if one.kind == kind and one.attributes["ranks"] == ranks]:
                return found[0]
            time.sleep(0.1)
        raise AssertionError(f"no {kind} of ranks {ranks} in {fault}")

    def wait_fault(self, fault: str) -> RunFolder:
        """Wait until the fault has happened."""
        run = self.run(fault)
        deadline = time.monotonic() + LIMIT_S
        while not (run.path / "fault").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return run


@pytest.fixture(scope="module")
def all_jobs() -> Iterator[Jobs]:
    """Give the daemon and the warm process; jobs that need root are there only for root."""
    kept = {name: os.environ.get(name) for name in ("DISTUI_STATE_DIR", "DISTUI_RUNTIME_DIR")}
    found = Jobs(load_faults())
    yield found
    found.bench.close()
    for name, value in kept.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture
def jobs(all_jobs: Jobs) -> Iterator[Jobs]:
    """Give the jobs; those that the test asked for end with it."""
    yield all_jobs
    all_jobs.end_asked()
