"""Hosts to test on, on one machine: network, process, name and mount namespaces of their own, with an sshd in each."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

PORT = 2222
READY_S = 20.0


def missing() -> str:
    """Return what keeps such hosts from being made here; "" where nothing does."""
    if os.geteuid() != 0:
        return "making hosts of namespaces needs root"
    for tool in ("ip", "unshare", "nsenter", "ssh", "ssh-keygen"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    if not Path("/usr/sbin/sshd").exists():
        return "sshd is not installed"
    probe = subprocess.run(
        ["unshare", "--net", "--pid", "--fork", "--mount-proc", "true"], capture_output=True, check=False
    )
    return "" if probe.returncode == 0 else "namespaces cannot be made here"


class NamespaceHost:
    """One host: its name, its address, and the process that is its init."""

    def __init__(self, cluster: NamespaceCluster, number: int) -> None:
        self.name, self.address = f"c{number}", f"10.97.0.{number + 1}"
        self.netns = f"{cluster.prefix}{number}"
        self._cluster, self._number = cluster, number
        self._holder: subprocess.Popen[bytes]
        self.pid = 0

    def start(self) -> None:
        """Make its network and start its init with an sshd."""
        bridge, folder = self._cluster.bridge, self._cluster.folder
        _ip("netns", "add", self.netns)
        peer = f"p{self._number}"
        _ip("link", "add", "eth0", "netns", self.netns, "type", "veth", "peer", "name", peer, "netns", bridge)
        _ip("-n", bridge, "link", "set", peer, "master", "br0", "up")
        _ip("-n", self.netns, "link", "set", "lo", "up")
        # A host that was made anew has the address that its neighbours remember.
        _ip("-n", self.netns, "link", "set", "eth0", "address", f"02:00:00:97:00:{self._number + 1:02x}")
        _ip("-n", self.netns, "addr", "add", f"{self.address}/24", "dev", "eth0")
        _ip("-n", self.netns, "link", "set", "eth0", "up")
        self.boot(folder)

    def boot(self, folder: Path) -> None:
        """Start its init: its own name, its own disk for runs, its own sshd."""
        ready = folder / f"{self.name}.ready"
        ready.unlink(missing_ok=True)
        script = (
            f"hostname {self.name}; mount --bind {folder}/{self.name}.hosts /etc/hosts; "
            f"mkdir -p {folder}/state /run/sshd; mount -t tmpfs none {folder}/state; "
            f"/usr/sbin/sshd -f {folder}/sshd_config && touch {ready}; exec sleep infinity"
        )
        hosts = "".join(f"{one.address} {one.name}\n" for one in self._cluster.hosts)
        (folder / f"{self.name}.hosts").write_text(f"127.0.0.1 localhost\n{hosts}")
        words = ["ip", "netns", "exec", self.netns, "unshare", "--uts", "--pid", "--mount", "--fork", "--kill-child"]
        self._holder = subprocess.Popen([*words, "--mount-proc", "bash", "-c", script], start_new_session=True)
        deadline = time.monotonic() + READY_S
        while not ready.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert ready.exists(), f"{self.name} did not start"
        # `ip netns exec` replaces itself by unshare, whose child is the init.
        self.pid = int(_out("pgrep", "-P", str(self._holder.pid)).split()[0])

    def command(self, words: Sequence[str]) -> list[str]:
        """Return the command that runs `words` on this host."""
        return ["nsenter", "-t", str(self.pid), "-n", "-u", "-p", "-m", f"--wd={self._cluster.folder}", "--", *words]

    def run(self, *words: str) -> str:
        """Run a command on this host, and return what it prints."""
        return _out(*self.command(words))

    def pids(self, text: str) -> list[int]:
        """Return the processes of this host, as the host numbers them, whose command line has `text` in it."""
        done = subprocess.run(self.command(["pgrep", "-f", text]), capture_output=True, text=True, check=False)
        return [int(word) for word in done.stdout.split()]

    def kill(self, pid: int, signum: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to one of this host's processes."""
        self.run("kill", f"-{int(signum)}", str(pid))

    def link(self, state: str) -> None:
        """Set the host's link `up` or `down`."""
        _ip("-n", self._cluster.bridge, "link", "set", f"p{self._number}", state)

    def write_hosts(self, text: str) -> None:
        """Replace the host's /etc/hosts."""
        (self._cluster.folder / f"{self.name}.hosts").write_text(text)

    def die(self) -> None:
        """Kill the host: every process of it, at once."""
        os.kill(self.pid, signal.SIGKILL)
        self._holder.wait()

    def stop(self) -> None:
        """Take the host away."""
        if self._holder.poll() is None:
            self._holder.kill()
        self._holder.wait()
        subprocess.run(["ip", "netns", "del", self.netns], check=False, capture_output=True)


class NamespaceCluster:
    """Some hosts on one bridge, that let each other in by ssh."""

    def __init__(self, folder: Path, num_hosts: int) -> None:
        self.folder, self.prefix = folder, f"dt{os.getpid() % 100000}n"
        self.bridge = f"{self.prefix}br"
        self.hosts = [NamespaceHost(self, number) for number in range(num_hosts)]
        _keys(folder, [host.name for host in self.hosts])
        _ip("netns", "add", self.bridge)
        _ip("-n", self.bridge, "link", "add", "br0", "type", "bridge")
        _ip("-n", self.bridge, "link", "set", "br0", "up")
        for host in self.hosts:
            host.start()

    @property
    def ssh_args(self) -> str:
        """`cluster.ssh_args` with which the hosts let each other in."""
        return f"-F {self.folder}/ssh_config"

    def stop(self) -> None:
        """Take all of it away."""
        for host in self.hosts:
            host.stop()
        subprocess.run(["ip", "netns", "del", self.bridge], check=False, capture_output=True)


def _keys(folder: Path, names: Sequence[str]) -> None:
    for name in ("host_key", "user_key"):
        _out("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name))
    host_key = (folder / "host_key.pub").read_text()
    known = ",".join(f"[{name}]:{PORT}" for name in names)
    (folder / "known_hosts").write_text(f"{known} {host_key}")
    (folder / "sshd_config").write_text(
        f"Port {PORT}\nHostKey {folder}/host_key\nAuthorizedKeysFile {folder}/user_key.pub\nUsePAM no\n"
        "StrictModes no\nPidFile none\nPermitRootLogin yes\nUseDNS no\nMaxStartups 100\n"
    )
    (folder / "ssh_config").write_text(
        f"Host *\n  Port {PORT}\n  User root\n  IdentityFile {folder}/user_key\n  IdentitiesOnly yes\n"
        f"  UserKnownHostsFile {folder}/known_hosts\n  StrictHostKeyChecking yes\n"
    )


def _ip(*words: str) -> None:
    _out("ip", *words)


def _out(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stdout}{done.stderr}"
    return done.stdout
