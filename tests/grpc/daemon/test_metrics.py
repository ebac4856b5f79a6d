"""What Prometheus reads of a daemon, how long telemetry is kept, and what systemd hears."""

from __future__ import annotations

import os
import shutil
import signal
import socket as sockets
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from prometheus_client.parser import text_string_to_metric_families

from distui.core.paths import RunFolder, runtime_dir
from distui.core.telemetry.endpoint import secrets_dir
from distui.daemon.runs.retention import DAY_S, Retention, prune
from distui.daemon.serve.service_manager import notify, watchdog_s
from distui.launcher.commands.daemon import unit_text
from distui.proto import telemetry_pb2 as pb

if TYPE_CHECKING:
    from tests.grpc.simulated_ranks import Node, SimulatedRank

TIMEOUT_S = 120.0


@pytest.fixture
def ranks() -> type[SimulatedRank]:
    found: type[SimulatedRank] = sys.modules["tests.grpc.simulated_ranks"].SimulatedRank
    return found


def _metrics_url(node: Node) -> str:
    info = node.monitor.GetDaemonInfo(pb.DaemonInfoRequest(), timeout=TIMEOUT_S)
    return next(where for where in info.addresses if where.endswith("/metrics"))


def test_prometheus_reads_every_metric(node: Node, ranks: type[SimulatedRank]) -> None:
    node.start("--metrics", "127.0.0.1:0")
    run = node.run()
    for number in (0, 1):
        rank = ranks(run, number).started().steps(1, 7, step_s=0.25, grad_norm=1.5)
        memory = pb.Memory(allocated_bytes=1 << 30, by_category_bytes={"parameters": 1 << 20})
        rank.add(memory=memory).publish()
    with urllib.request.urlopen(_metrics_url(node), timeout=TIMEOUT_S) as answer:
        families = {family.name: family for family in text_string_to_metric_families(answer.read().decode())}
    samples = {
        (sample.name, *(sample.labels.get(key, "") for key in ("run", "rank", "phase", "category"))): sample.value
        for family in families.values()
        for sample in family.samples
    }
    assert samples["distui_step_seconds", run.run_id, "", "", ""] == 0.25
    assert samples["distui_steps_total", run.run_id, "", "", ""] == 7
    assert samples["distui_gradient_norm", run.run_id, "", "", ""] == 1.5
    assert samples["distui_memory_allocated_bytes", run.run_id, "1", "", ""] == 1 << 30
    assert samples["distui_memory_bytes", run.run_id, "1", "", "parameters"] == 1 << 20
    assert samples["distui_rank_up", run.run_id, "0", "", ""] == 1
    assert samples["distui_records_dropped_total", run.run_id, "", "", ""] == 0
    assert ("distui_mfu_ratio", run.run_id, "", "", "") not in samples  # not available is no sample, never 0
    assert {"distui_build_info", "distui_run_info", "distui_daemon_cpu_seconds"} <= set(families)
    for family in families.values():
        for sample in family.samples:
            assert not {"step", "seq"} & set(sample.labels)


def test_metrics_beyond_loopback_ask_for_tls_and_the_token(node: Node) -> None:
    node.start("--metrics", "0.0.0.0:0")
    url = _metrics_url(node).replace("0.0.0.0", "127.0.0.1")
    assert url.startswith("https://")
    context = ssl.create_default_context(cafile=str(secrets_dir() / "cert.pem"))
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(url, timeout=TIMEOUT_S, context=context)
    assert error.value.code == 401
    error.value.close()
    token = (secrets_dir() / "token").read_text().strip()
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=TIMEOUT_S, context=context) as answer:
        assert b"distui_build_info" in answer.read()


def _run(folder: Path, name: str, sizes: list[int], age_days: float, ended: bool, now_s: float) -> RunFolder:
    run = RunFolder(folder / name)
    run.create()
    run.spec.write_text("{}")
    (run.logs / "rank0.log").write_text("kept")
    for number, size in enumerate(sizes, 1):
        path = run.telemetry / f"{number:08d}.log"
        path.write_bytes(b"x" * size)
        os.utime(path, (now_s, now_s - age_days * DAY_S + number))
    if ended:
        run.outcome.write_text("{}")
    return run


def test_the_oldest_telemetry_goes_first(tmp_path: Path) -> None:
    now_s = 1.7e9
    old = _run(tmp_path, "old", [100, 100], 40, True, now_s)
    recent = _run(tmp_path, "recent", [100, 100], 5, True, now_s)
    living = _run(tmp_path, "living", [100, 100, 100, 100], 50, False, now_s)
    runs = [old, recent, living]

    def left() -> list[list[str]]:
        return [[path.name[7:8] for path in sorted(run.telemetry.iterdir())] for run in runs]

    assert prune(runs, Retention(0, 0), now_s) == 0
    assert prune(runs, Retention(30 * DAY_S, 0), now_s) == 200
    assert left() == [[], ["1", "2"], ["1", "2", "3", "4"]]  # what still runs is never too old
    assert prune(runs, Retention(30 * DAY_S, 550), now_s) == 100
    assert left() == [[], ["2"], ["1", "2", "3", "4"]]
    assert prune(runs, Retention(0, 100), now_s) == 300
    assert left() == [[], [], ["1", "4"]]  # of a living run the first and the last stay, whatever the limit
    assert (old.logs / "rank0.log").exists() and old.outcome.exists()


def test_a_file_with_holes_counts_by_what_it_takes_of_the_disk(tmp_path: Path) -> None:
    """As in a copy of a run that means harm: 20 GiB by its length would delete all of the user's telemetry."""
    mine, copied = _run(tmp_path, "mine", [100], 5, True, 1.7e9), _run(tmp_path, "copied", [100], 5, True, 1.7e9)
    os.truncate(copied.telemetry / "00000001.log", 20 << 30)
    assert prune([mine, copied], Retention(0, 10 << 30), 1.7e9) == 0


def test_the_service_manager_hears_that_it_is_ready_and_ending(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    path = runtime_dir() / "notify"
    with sockets.socket(sockets.AF_UNIX, sockets.SOCK_DGRAM) as manager:
        manager.bind(str(path))
        manager.settimeout(TIMEOUT_S)
        monkeypatch.setenv("NOTIFY_SOCKET", str(path))
        monkeypatch.setenv("WATCHDOG_USEC", "2000000")
        node.start()
        assert manager.recv(100) == b"READY=1"
        assert manager.recv(100) == b"WATCHDOG=1"
        node.kill(signal.SIGTERM)
        words = b""
        while words != b"STOPPING=1":
            words = manager.recv(100)
    assert notify("READY=1", {}) is False
    assert watchdog_s({"WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"}) is None


def test_the_unit_is_one_that_systemd_takes(tmp_path: Path) -> None:
    unit = tmp_path / "distui.service"
    unit.write_text(unit_text(["--listen", "0.0.0.0:7270"]))
    assert "daemon --headless --listen 0.0.0.0:7270" in unit.read_text()
    if (verify := shutil.which("systemd-analyze")) is None:
        pytest.skip("systemd-analyze is not installed")
    found = subprocess.run([verify, "verify", str(unit)], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert found.returncode == 0, found.stderr
