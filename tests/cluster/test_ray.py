"""Ray places the nodes of a job, and another one where a node is lost: four hosts as namespaces, a real Ray cluster."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from distui.core.errors import UserError
from distui.launcher.cluster.starters.ray import resources_of, source_of
from tests.cluster.conftest import LIMIT_S, STEPS_SCRIPT, last_of_each
from tests.cluster.namespaces import NamespaceCluster, missing

PORT = 6390
has_ray = importlib.util.find_spec("ray") is not None


@pytest.fixture
def cluster() -> Iterator[NamespaceCluster]:
    """Give four hosts; the first one is Ray's head, with no room for ranks, the others have room for one each."""
    with tempfile.TemporaryDirectory(prefix="dtr", dir="/tmp") as name:
        os.chmod(name, 0o755)
        found = NamespaceCluster(Path(name), 4)
        (found.folder / "steps.py").write_text(STEPS_SCRIPT)
        small = ("--object-store-memory=80000000", "--disable-usage-stats")
        ray = str(Path(sys.executable).with_name("ray"))
        quick = ("env", "RAY_health_check_period_ms=1000", "RAY_health_check_failure_threshold=5")
        try:
            for host in found.hosts:
                head = host is found.hosts[0]
                where = (
                    "--head",
                    f"--port={PORT}",
                    f"--temp-dir={name}/ray",
                    "--num-cpus=0",
                    "--include-dashboard=false",
                )
                join = (f"--address={found.hosts[0].address}:{PORT}", "--num-cpus=1")
                host.run(*quick, ray, "start", f"--node-ip-address={host.address}", *(where if head else join), *small)
            yield found
        finally:
            found.stop()


@pytest.mark.cluster
@pytest.mark.timeout(900)
@pytest.mark.skipif(bool(missing()), reason=missing() or "hosts can be made")
@pytest.mark.skipif(not has_ray, reason="Ray is not installed: pip install ray")
def test_a_node_that_is_lost_is_replaced_and_the_job_goes_on(cluster: NamespaceCluster) -> None:
    folder, head = cluster.folder, cluster.hosts[0]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("DISTUI_")}
    environ |= {"DISTUI_STATE_DIR": f"{folder}/state/s", "DISTUI_RUNTIME_DIR": f"{folder}/state/rt"}
    environ |= {"DISTUI_NO_TUI": "1", "OMP_NUM_THREADS": "1"}
    words = ("--ray", f"{head.address}:{PORT}", "--nodes", "2", "--nproc", "1", "--max-restarts", "1")
    options = {"out": "m", "epochs": 10, "pause_s": 0.2}
    script = ("--set", "checkpoint.memory_every_steps=3", str(folder / "steps.py"), json.dumps(options))
    command = head.command([sys.executable, "-m", "distui", "launch", *words, *script])
    said = folder / "said"
    with open(said, "w") as file:
        job = subprocess.Popen(command, env=environ, stdout=file, stderr=file, text=True)
    steps, deadline_s = folder / "m-1.jsonl", time.monotonic() + LIMIT_S
    while not (steps.exists() and steps.read_text().count("\n") > 9):
        assert job.poll() is None and time.monotonic() < deadline_s, said.read_text()
        time.sleep(0.05)
    (caller,) = [host for host in cluster.hosts if host.pids(r"node\.caller .* ray1 ")]
    caller.die()
    assert job.wait(LIMIT_S) == 0, said.read_text()
    told = said.read_text()
    assert re.search(r"ray1 \(node 1, rank 1\): .*; restart 1 of 1, from the checkpoint of step \d+ in memory", told)
    done = last_of_each([json.loads(line) for line in steps.read_text().splitlines()])
    assert [one["step"] for one in done] == list(range(1, len(done) + 1)) and done[-1]["epoch"] == 9
    left = [host.name for host in cluster.hosts if host is not caller and host.pids("distui.launcher|steps.py")]
    assert not left, left


def test_what_a_node_asks_of_ray() -> None:
    assert resources_of("", 4, {"CPU": 64.0}) == {"CPU": 4.0}
    assert resources_of("", 4, {"CPU": 64.0, "GPU": 8.0}) == {"CPU": 4.0, "GPU": 4.0}
    assert resources_of("GPU=2, CPU=16", 4, {}) == {"GPU": 2.0, "CPU": 16.0}
    with pytest.raises(UserError, match="is no number of something"):
        resources_of("GPU", 4, {})
    assert source_of("10.0.0.1", []) == "10.0.0.1"
