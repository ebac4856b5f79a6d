"""Slurm on hosts that are namespaces: a controller, a slurmd on each, a munged; nothing of the machine's own."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.cluster.namespaces import NamespaceCluster, NamespaceHost
from tests.cluster.namespaces import missing as hosts_missing

READY_S = 60.0
_CGROUP = (
    "mount -t tmpfs none /sys/fs/cgroup; mkdir -p /sys/fs/cgroup/systemd; "
    "mount -t cgroup -o none,name=systemd cgroup /sys/fs/cgroup/systemd"
)


def missing() -> str:
    """Return what keeps Slurm from being run here; "" where nothing does."""
    if why := hosts_missing():
        return why
    for tool in ("slurmctld", "slurmd", "munged", "mungekey", "srun", "sbatch"):
        if shutil.which(tool, path=f"{os.environ.get('PATH', '')}:/usr/sbin") is None:
            return f"{tool} is not installed (apt-get install slurm-wlm munge)"
    return ""


class SlurmCluster(NamespaceCluster):
    """Hosts with a Slurm over all of them. `environ` is what its commands need."""

    def __init__(self, folder: Path, num_hosts: int, kill_wait_s: int = 30) -> None:
        super().__init__(folder, num_hosts)
        self.environ = {"SLURM_CONF": f"{folder}/slurm.conf"}
        self._daemons: list[subprocess.Popen[bytes]] = []
        names = ",".join(host.name for host in self.hosts)
        nodes = "".join(
            f"NodeName={host.name} NodeAddr={host.address} NodeHostname={host.name} CPUs=4 RealMemory=2000 "
            "State=UNKNOWN\n"
            for host in self.hosts
        )
        (folder / "slurm.conf").write_text(
            f"ClusterName=test\nSlurmctldHost=c0({self.hosts[0].address})\nSlurmUser=root\nSlurmdUser=root\n"
            f"AuthType=auth/munge\nAuthInfo=socket={folder}/munge.socket\nCredType=cred/munge\n"
            f"StateSaveLocation={folder}/state/ctld\nSlurmdSpoolDir={folder}/state/slurmd\n"
            f"SlurmctldPidFile={folder}/state/ctld.pid\nSlurmdPidFile={folder}/state/slurmd.pid\n"
            f"SlurmctldLogFile={folder}/slurmctld.log\nSlurmdLogFile={folder}/slurmd-%n.log\n"
            "ProctrackType=proctrack/linuxproc\nTaskPlugin=task/none\nMpiDefault=none\nReturnToService=2\n"
            "SelectType=select/cons_tres\nSelectTypeParameters=CR_CPU\nSwitchType=switch/none\n"
            "JobAcctGatherType=jobacct_gather/none\nAccountingStorageType=accounting_storage/none\n"
            f"KillWait={kill_wait_s}\nOverTimeLimit=0\nSchedulerParameters=sched_interval=1,bf_interval=2,batch_sched_delay=0\n"
            "SlurmdParameters=config_overrides\nMinJobAge=300\nInactiveLimit=0\nSlurmdTimeout=60\nSlurmctldTimeout=60\nRebootProgram=/bin/true\n"
            f"{nodes}PartitionName=debug Nodes={names} Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO\n"
        )
        self._start()

    def _start(self) -> None:
        folder = self.folder
        (folder / "munge").mkdir(mode=0o700)
        subprocess.run(["mungekey", "--create", f"--keyfile={folder}/munge/key"], check=True)
        words = ["munged", "--foreground", "--force", f"--key-file={folder}/munge/key"]
        words += [
            f"--socket={folder}/munge.socket",
            f"--pid-file={folder}/munge/pid",
            f"--seed-file={folder}/munge/seed",
        ]
        self._daemon([*words, f"--log-file={folder}/munge/log"])
        _until(lambda: (folder / "munge.socket").exists(), "munged did not start")
        self._daemon(self.hosts[0].command(["bash", "-c", f"mkdir -p {folder}/state/ctld; exec slurmctld -D"]))
        for host in self.hosts:
            script = f"{_CGROUP}; mkdir -p {folder}/state/slurmd; exec slurmd -D -N {host.name}"
            self._daemon(host.command(["unshare", "--mount", "bash", "-c", script]))
        _until(lambda: self._idle() == len(self.hosts), "nodes did not come up", self._say)

    def _daemon(self, words: list[str]) -> None:
        environ = {**os.environ, **self.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
        with (self.folder / "daemons.log").open("ab") as log:
            daemon = subprocess.Popen(words, env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._daemons.append(daemon)

    def _idle(self) -> int:
        done = self.slurm("sinfo", "-h", "-N", "-o", "%T")
        return done.split().count("idle")

    def _say(self) -> str:
        return "\n".join(path.read_text(errors="replace")[-2000:] for path in sorted(self.folder.glob("*.log")))

    def slurm(self, *words: str, host: NamespaceHost | None = None) -> str:
        """Run a command of Slurm on the first host, and return what it prints."""
        done = subprocess.run(
            (host or self.hosts[0]).command(words),
            env={**os.environ, **self.environ},
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout + done.stderr

    def stop(self) -> None:
        """Take all of it away."""
        for daemon in reversed(self._daemons):
            daemon.terminate()
        super().stop()
        for daemon in self._daemons:
            daemon.kill()
            daemon.wait()


def _until(is_so: Callable[[], bool], what: str, why: Callable[[], str] = lambda: "") -> None:
    deadline = time.monotonic() + READY_S
    while not is_so():
        assert time.monotonic() < deadline, f"{what}: {why()}"
        time.sleep(0.05)
