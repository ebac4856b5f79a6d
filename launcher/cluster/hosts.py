"""Which hosts a job takes, and how many ranks each: `--hosts`, hostfiles of DeepSpeed and MPI, include and exclude."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distui.core.errors import UserError
from distui.launcher.compat.deepspeed_flags import Pool, choose

_LINE = re.compile(
    r"(?P<host>\[[0-9A-Fa-f:.%]+\]|[^\s:#]+)(:(?P<count>\d+))?(\s+slots\s*=\s*(?P<slots>\d+))?"
    r"(\s+max[-_]slots\s*=\s*\d+)?\s*(#.*)?"
)
_NAME = re.compile(r"([A-Za-z0-9_.-]+@)?(\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9_][A-Za-z0-9_.-]*)")


@dataclass(frozen=True, slots=True)
class Host:
    """A machine as the user names it, which is also how ssh gets it."""

    name: str
    num_ranks: int
    devices: tuple[int, ...] = ()
    """The GPUs that its ranks may see, where some were chosen; none: all."""

    def spec(self) -> dict[str, Any]:
        """Return it as run.json has it."""
        return {"name": self.name, "num_ranks": self.num_ranks, "devices": list(self.devices)}

    @classmethod
    def of(cls, spec: Mapping[str, Any]) -> Host:
        """Return the host that run.json tells of."""
        return cls(str(spec["name"]), int(spec["num_ranks"]), tuple(int(one) for one in spec["devices"]))


def choose_hosts(hosts: str, hostfile: str, include: str, exclude: str, default: int) -> list[Host]:
    """Return the hosts in their order; one without a number of its own gets `default` ranks.

    Raises: UserError for what is no host, twice there, or filtered by what is not there.
    """
    if hosts and hostfile:
        raise UserError("hosts and a hostfile", "both say which hosts there are", "give one: --hosts or --hostfile")
    if include and exclude:
        raise UserError("--include and --exclude", "both choose hosts and slots", "give one of them")
    counts = _of_file(Path(hostfile).expanduser()) if hostfile else _of_list(hosts)
    pool: Pool = {host: list(range(count or default)) for host, count in counts.items()}
    chosen = choose(pool, include, exclude) if include or exclude else pool
    found = []
    for host, slots in chosen.items():
        picked = tuple(slots) if slots != pool[host] else ()
        found.append(Host(host, len(slots), picked))
    return found


def as_setting(hosts: Sequence[Host]) -> str:
    """Return `cluster.hosts` with every number decided."""
    return ",".join(f"{host.name}:{host.num_ranks}" for host in hosts)


def _of_list(text: str) -> dict[str, int]:
    counts: dict[str, int] = {}
    for entry in text.split(","):
        word = entry.strip()
        host, colon, count = word.rpartition(":")
        if not colon or word.endswith("]"):
            host, count = word, ""
        if not _NAME.fullmatch(host) or (colon and count and not count.isdecimal()) or count == "0":
            raise UserError(
                f"--hosts: {word!r} is no host",
                "hosts are names or addresses, each with its ranks",
                "a,b:4 or [fe80::1]:2",
            )
        _add(counts, host, int(count or 0), "--hosts")
    return counts


def _of_file(path: Path) -> dict[str, int]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = str(getattr(error, "strerror", None) or error)
        raise UserError(f"cannot read the hostfile {path}", why, "name a file with lines `host slots=N`") from error
    counts: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        match = _LINE.fullmatch(text)
        if match is None or not _NAME.fullmatch(match["host"]):
            raise UserError(
                f"{path}:{number} is no host", f"it reads {text!r}", "write it as `host slots=N` or `host:N`"
            )
        count = match["slots"] or match["count"]
        if count is not None and int(count) == 0:
            raise UserError(f"{path}:{number}: {match['host']} has no slot", f"it reads {text!r}", "take the line out")
        _add(counts, match["host"], int(count or 0), f"{path}:{number}")
    if not counts:
        raise UserError(f"the hostfile {path} is empty", "it has no line `host slots=N`", "add a host")
    return counts


def _add(counts: dict[str, int], host: str, count: int, where: str) -> None:
    if host in counts:
        raise UserError(
            f"{where} names {host} again", "each host has one place in a job", f"write {host}:N, N its ranks"
        )
    counts[host] = count


def chosen_environ(patterns: str) -> dict[str, str]:
    """Return the variables of this process that names and patterns choose, but for places of this host."""
    words = [word.strip() for word in patterns.split(",") if word.strip()]
    own = ("DISTUI_RUNTIME_DIR", "DISTUI_JOB", "DISTUI_AGENT_PID", "DISTUI_CONSOLE")
    return {
        name: value
        for name, value in os.environ.items()
        if name not in own and any(fnmatch.fnmatchcase(name, word) for word in words)
    }
