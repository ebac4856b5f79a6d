"""Hosts over ssh: the `ssh` command with the user's own configuration, and never a question.

The user's files say how a host is reached (HostName, User, Port, ProxyJump, keys); `cluster.ssh_args` come on top, as
`-F FILE` or `-p 2222`. Host keys are checked as they are for anybody.
"""

from __future__ import annotations

import asyncio
import re
import shlex
from asyncio.subprocess import PIPE
from collections.abc import Sequence

from distui.core.config.schema import ClusterSection
from distui.core.errors import Problem
from distui.launcher.cluster.hosts import Host

CONNECT_S = 8
"""Where the user's configuration has no ConnectTimeout: a host that is off says nothing."""

_CAUSES = (
    (
        r"Could not resolve hostname",
        "the name is not known here",
        "correct the name, or give it a HostName in ~/.ssh/config",
    ),
    (
        r"Connection refused",
        "nobody listens at its ssh port",
        "start sshd there, or name its port: --set cluster.ssh_args='-p PORT'",
    ),
    (r"No route to host|Network is unreachable", "no route leads to it", "is it on, and in this network?"),
    (r"timed out", "it does not answer", "is it on, and does a firewall let port 22 through?"),
    (
        r"Permission denied",
        "it does not let this user in without a password",
        "ssh-copy-id HOST, or name a key with IdentityFile in ~/.ssh/config",
    ),
    (
        r"Host key verification failed|REMOTE HOST IDENTIFICATION",
        "its host key is not the known one",
        "ssh HOST once by hand, and look at its key",
    ),
    (r"No module named '?distui", "distui is not installed for that Python", "install distui there, at the same path"),
    (
        r"[Nn]o such file|not found|Permission denied.*python",
        "there is no such Python",
        "install Python and distui there, at the same path",
    ),
)


class SshStarter:
    """Starts commands by `ssh HOST`."""

    one_machine = False

    def __init__(self, cluster: ClusterSection) -> None:
        self._arguments = shlex.split(cluster.ssh_args)
        self._settings: dict[str, dict[str, str]] = {}

    async def _settings_of(self, host: Host) -> dict[str, str]:
        """Return what ssh's own configuration says of a host."""
        if host.name not in self._settings:
            asked = await asyncio.create_subprocess_exec(
                "ssh", *self._arguments, "-G", host.name, stdin=asyncio.subprocess.DEVNULL, stdout=PIPE, stderr=PIPE
            )
            told, _ = await asked.communicate()
            pairs = (line.partition(" ") for line in told.decode(errors="replace").splitlines())
            self._settings[host.name] = {key: value for key, _, value in pairs}
        return self._settings[host.name]

    async def address(self, host: Host) -> str:
        """Return the address that ssh connects to; "" where it goes by a proxy."""
        settings = await self._settings_of(host)
        if settings.get("proxyjump") or settings.get("proxycommand"):
            return ""
        return settings.get("hostname", host.name.rpartition("@")[2])

    async def start(self, host: Host, command: Sequence[str]) -> asyncio.subprocess.Process:
        """Start `command` there."""
        settings = await self._settings_of(host)
        options = ["-o", "BatchMode=yes", "-o", "ClearAllForwardings=yes", "-T"]
        if settings.get("connecttimeout", "none") in ("none", "0"):
            options += ["-o", f"ConnectTimeout={CONNECT_S}"]
        if settings.get("serveraliveinterval", "0") == "0":
            options += ["-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3"]
        line = f"echo distui: ssh; exec {shlex.join(command)}"
        return await asyncio.create_subprocess_exec(
            "ssh",
            *self._arguments,
            *options,
            host.name,
            line,
            stdin=PIPE,
            stdout=PIPE,
            stderr=PIPE,
            start_new_session=True,
        )

    def explain(self, host: Host, status: int, said: str) -> Problem:
        """Return what ssh's words come to."""
        last = next((line.strip() for line in reversed(said.splitlines()) if line.strip()), f"exit status {status}")
        for pattern, why, fix in _CAUSES:
            if re.search(pattern, said):
                return Problem(host.name, f"it cannot be used: {last}", why, fix.replace("HOST", host.name))
        what = "ssh could not log in" if status == 255 else f"the agent could not start (exit status {status})"
        return Problem(host.name, what, last, f"try it by hand: ssh {host.name} true")
