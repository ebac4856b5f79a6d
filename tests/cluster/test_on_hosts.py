"""One command, three hosts: namespaces with an sshd each, faults done to them, and what is said and left.

Needs root and sshd: `make test-cluster`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.conftest import STEPS_SCRIPT
from tests.cluster.namespaces import NamespaceCluster, NamespaceHost, missing

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(bool(missing()), reason=missing() or "hosts can be made")]
LIMIT_S = 150.0


class Hosts:
    """The hosts, and `distui` on the first of them."""

    def __init__(self, folder: Path) -> None:
        self.cluster = NamespaceCluster(folder, 3)
        self.hosts, self.folder = self.cluster.hosts, folder
        self.environ = {name: value for name, value in os.environ.items() if not name.startswith("DISTUI_")}
        self.environ |= {"DISTUI_STATE_DIR": f"{folder}/state/s", "DISTUI_RUNTIME_DIR": f"{folder}/state/rt"}
        self.environ |= {"DISTUI_NO_TUI": "1", "OMP_NUM_THREADS": "1", "DISTUI_TELEMETRY_FLUSH_S": "0.1"}
        (folder / "steps.py").write_text(STEPS_SCRIPT)

    def start(self, options: str, *words: str) -> subprocess.Popen[str]:
        """Start a job with a rank on each host, from the first."""
        ssh = f"cluster.ssh_args={self.cluster.ssh_args}"
        command = [sys.executable, "-m", "distui", "launch", "--nproc", "1", "--hosts", "c0,c1,c2", "--set", ssh]
        script = str(self.folder / "steps.py")
        return subprocess.Popen(
            self.hosts[0].command([*command, *words, script, options]),
            env=self.environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def distui(self, *words: str) -> str:
        """Run `distui` on the first host."""
        command = self.hosts[0].command([sys.executable, "-m", "distui", *words])
        done = subprocess.run(command, env=self.environ, capture_output=True, text=True, check=False, timeout=LIMIT_S)
        return done.stdout + done.stderr

    def wait_for_step(self, out: str, job: subprocess.Popen[str]) -> None:
        """Wait until the second rank has done some steps."""
        path, deadline = self.folder / f"{out}-1.jsonl", time.monotonic() + LIMIT_S
        while time.monotonic() < deadline:
            if path.exists() and path.read_text().count("\n") > 3:
                return
            assert job.poll() is None, job.communicate()[0]
            time.sleep(0.05)
        raise AssertionError("no step was done")

    def left(self, *, but: NamespaceHost | None = None) -> list[str]:
        """Return what is left of jobs on the hosts."""
        found = []
        for host in self.hosts:
            if host is not but:
                pids = host.pids("distui.launcher|steps.py|ssh -F")
                found += [f"{host.name}: {pid}" for pid in pids]
        return found

    def gone(self, *, but: NamespaceHost | None = None) -> bool:
        """Wait a while until nothing of any job is left."""
        deadline = time.monotonic() + 30.0
        while self.left(but=but) and time.monotonic() < deadline:
            time.sleep(0.1)
        return not self.left(but=but)


@pytest.fixture(scope="module")
def made() -> Iterator[Hosts]:
    with tempfile.TemporaryDirectory(prefix="dtn", dir="/tmp") as name:
        os.chmod(name, 0o755)
        found = Hosts(Path(name))
        try:
            yield found
        finally:
            found.cluster.stop()


@pytest.fixture
def hosts(made: Hosts) -> Iterator[Hosts]:
    yield made
    for path in made.folder.glob("*.jsonl"):
        path.unlink()


def need(tool: str) -> None:
    """Skip the test where a tool that its fault is made by is not installed."""
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")


LONG = json.dumps({"out": "long", "epochs": 5000, "pause_s": 0.05})


def test_one_command_trains_on_all_hosts_as_one_run(hosts: Hosts) -> None:
    job = hosts.start(json.dumps({"out": "one", "pause_s": 0.2}))
    hosts.wait_for_step("one", job)
    for host in hosts.hosts:
        seen = host.run("bash", "-c", "cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ | tr '\\0' '\\n'")
        assert "distui.launcher.node.rank" in seen
        assert "BEGIN CERTIFICATE" not in seen and not re.search(r"Bearer|^[A-Za-z0-9_-]{43}$", seen, re.MULTILINE)
    said, _ = job.communicate(timeout=LIMIT_S)
    assert job.returncode == 0, said
    status = json.loads(hosts.distui("status", "--json"))
    assert [(rank["rank"], rank["node"], rank["step"]) for rank in status["ranks"]] == [
        (0, "c0", 12),
        (1, "c1", 12),
        (2, "c2", 12),
    ]
    assert status["state"] == "finished" and not status["diagnosis"]
    assert "rank 2 on c2" in hosts.distui("logs", "--rank", "2"), "its log came here, from another disk"
    assert hosts.gone()


Act = Callable[[Hosts], object]
FAULTS: dict[str, tuple[Act, str]] = {
    "a rank": (lambda all: all.hosts[1].kill(all.hosts[1].pids("node.rank")[0]), "rank 1 failed on c1"),
    "an agent": (lambda all: all.hosts[2].kill(all.hosts[2].pids("node.member")[0]), "error: c2 (node 2, rank 2)"),
    "the first agent": (
        lambda all: all.hosts[0].kill(all.hosts[0].pids("node.member")[0]),
        "error: c0 (node 0, rank 0)",
    ),
    "a session": (
        lambda all: all.hosts[1].run("pkill", "-KILL", "-f", "sshd: root"),
        "error: c1 (node 1, rank 1)",
    ),
    "a link": (lambda all: all.hosts[1].link("down"), "error: c1 (node 1, rank 1): has not answered"),
}


@pytest.mark.parametrize("what", FAULTS)
def test_the_right_host_is_named_and_nothing_is_left(what: str, hosts: Hosts) -> None:
    act, told = FAULTS[what]
    job = hosts.start(LONG)
    hosts.wait_for_step("long", job)
    act(hosts)
    said, _ = job.communicate(timeout=LIMIT_S)
    if what == "a link":
        hosts.hosts[1].link("up")
        assert "all ranks have entered" not in said
    assert job.returncode == 3, said
    first = next(line for line in said.splitlines() if line.startswith("error: "))
    assert told in first, said
    assert hosts.gone(), hosts.left()


@pytest.mark.parametrize("how", ["SIGTERM", "SIGKILL of the supervisor"])
def test_the_end_of_the_supervisor_is_the_end_of_all(how: str, hosts: Hosts) -> None:
    job = hosts.start(LONG)
    hosts.wait_for_step("long", job)
    head = hosts.hosts[0]
    if how == "SIGTERM":
        head.kill(head.pids("distui launch")[0], signal.SIGTERM)
    else:
        head.kill(head.pids("cluster.supervisor")[0])
    said, _ = job.communicate(timeout=LIMIT_S)
    assert job.returncode == (143 if how == "SIGTERM" else 1), said
    assert hosts.gone(), hosts.left()


def _drop(hosts: Hosts) -> Callable[[], object]:
    host = hosts.hosts[1]
    need("iptables")
    host.run("iptables", "-A", "OUTPUT", "-p", "tcp", "--syn", "-d", hosts.hosts[0].address, "-j", "DROP")
    return lambda: host.run("iptables", "-F")


def _drop_ranks(hosts: Hosts) -> Callable[[], object]:
    host = hosts.hosts[1]
    need("iptables")
    host.run("iptables", "-A", "INPUT", "-p", "tcp", "--syn", "-s", hosts.hosts[2].address, "-j", "DROP")
    return lambda: host.run("iptables", "-F")


def _unplug(hosts: Hosts) -> Callable[[], object]:
    hosts.hosts[2].link("down")
    return lambda: hosts.hosts[2].link("up")


def _rename(hosts: Hosts) -> Callable[[], object]:
    head = hosts.hosts[0]
    right = (hosts.folder / "c0.hosts").read_text()
    head.write_hosts("127.0.0.1 localhost\n127.0.1.1 c0 c1\n" + right.splitlines()[-1] + "\n")
    return lambda: head.write_hosts(right)


def _other_script(hosts: Hosts) -> Callable[[], object]:
    host, path = hosts.hosts[1], f"{hosts.folder}/steps.py"
    host.run("bash", "-c", f"echo pass > /run/other.py; mount --bind /run/other.py {path}")
    return lambda: host.run("umount", path)


WRONG: dict[str, tuple[Callable[[Hosts], Callable[[], object]], str]] = {
    "a port is dropped": (_drop, r"error: c1: ssh answers, and 10\.97\.0\.1:\d+ does not answer from there"),
    "ranks' ports are dropped": (_drop_ranks, r"error: c2, c1: c2 does not reach c1 at 10\.97\.0\.2:"),
    "a host is off": (_unplug, r"error: c2: it cannot be used: ssh: connect to host c2 port 2222: "),
    "a name is another host's": (_rename, r"error: c0, c1: c0 and c1 are one machine"),
    "a script differs": (_other_script, r"error: c1: \S+/steps\.py differs"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_start_is_told_before_any_rank(what: str, hosts: Hosts) -> None:
    begin, told = WRONG[what]
    mend = begin(hosts)
    try:
        job = hosts.start(json.dumps({"out": "wrong"}))
        said, _ = job.communicate(timeout=LIMIT_S)
    finally:
        mend()
    assert job.returncode == 2, said
    assert re.search(told, said) and "  why: " in said and "  fix: " in said, said
    assert not list(hosts.folder.glob("wrong-*.jsonl")) and hosts.gone()


def test_a_host_that_calls_itself_loopback_is_reached_all_the_same(hosts: Hosts) -> None:
    right = {host: (hosts.folder / f"{host.name}.hosts").read_text() for host in hosts.hosts}
    for host, text in right.items():
        host.write_hosts(text.replace(f"{host.address} {host.name}", f"127.0.1.1 {host.name}"))
    try:
        job = hosts.start(json.dumps({"out": "own", "epochs": 1}))
        said, _ = job.communicate(timeout=LIMIT_S)
    finally:
        for host, text in right.items():
            host.write_hosts(text)
    assert job.returncode == 0, said
    assert len((hosts.folder / "own-2.jsonl").read_text().splitlines()) == 4


def test_an_agent_that_was_killed_is_started_again(hosts: Hosts) -> None:
    words = ("--max-restarts", "2", "--set", "checkpoint.every_steps=5", "--set", f"checkpoint.dir={hosts.folder}/ck")
    job = hosts.start(json.dumps({"out": "again", "pause_s": 0.3}), *words)
    hosts.wait_for_step("again", job)
    hosts.hosts[1].kill(hosts.hosts[1].pids("node.member")[0])
    said, _ = job.communicate(timeout=LIMIT_S)
    assert job.returncode == 0, said
    assert re.search(r"distui: c1 \(node 1, rank 1\): its agent.*; restart 1 of 2, from ", said), said
    steps = [json.loads(line) for line in (hosts.folder / "again-1.jsonl").read_text().splitlines()]
    assert steps[-1]["step"] == 12 and {one["attempt"] for one in steps} == {0, 1}
    assert hosts.gone()


def test_a_host_that_dies_is_named(hosts: Hosts) -> None:
    # The last test here: this host is not there any more.
    job = hosts.start(LONG)
    hosts.wait_for_step("long", job)
    hosts.hosts[2].die()
    said, _ = job.communicate(timeout=LIMIT_S)
    assert job.returncode == 3, said
    first = next(line for line in said.splitlines() if line.startswith("error: "))
    assert "error: c2 (node 2, rank 2)" in first, said
    assert hosts.gone(but=hosts.hosts[2]), hosts.left()
