"""The flags of DeepSpeed's launcher and its hostfile, for `distui launch --as deepspeed`; torch-free.

Where DeepSpeed logs in to every host, here each host starts its own ranks: what would have to be typed there is told.
"""

from __future__ import annotations

import re
import shlex
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import psutil

from distui.core.errors import UserError

DEFAULT_HOSTFILE = Path("/job/hostfile")
DEFAULT_PORT = 29500

Pool = dict[str, list[int]]
"""Host -> its slots (GPUs), in the hostfile's order."""

_VALUES = {
    "hostfile": ("-H", "--hostfile"),
    "include": ("-i", "--include"),
    "exclude": ("-e", "--exclude"),
    "num_nodes": ("--num_nodes",),
    "num_gpus": ("--num_gpus", "--num_accelerators"),
    "ds_master_addr": ("--master_addr",),
    "ds_master_port": ("--master_port",),
    "ds_node_rank": ("--node_rank",),
    "ds_launcher": ("--launcher",),
    "launcher_args": ("--launcher_args",),
    "enable_each_rank_log": ("--enable_each_rank_log",),
    "autotuning": ("--autotuning",),
    "bind_core_list": ("--bind_core_list",),
    "ssh_port": ("--ssh_port",),
    "venv_script": ("--venv_script",),
    "ds_log_level": ("--log_level",),
}
_OURS = {
    "hostfile": "File that lists hosts: `a slots=4` or `a:4` a line.",
    "include": "Only these hosts and slots: a:0,1@b",
    "exclude": "All but these hosts and slots.",
}
"""What `distui launch` takes too, without `--as deepspeed`."""
_SWITCHES = {
    "no_python": ("--no_python",),
    "no_local_rank": ("--no_local_rank",),
    "no_ssh": ("--no_ssh",),
    "no_ssh_check": ("--no_ssh_check",),
    "force_multi": ("--force_multi",),
    "save_pid": ("--save_pid",),
    "bind_cores_to_rank": ("--bind_cores_to_rank",),
    "ds_quiet": ("-q", "--quiet"),
}
_REFUSED = {
    "launcher_args": "its argument belongs to pdsh or mpirun, which are not used: start each node by itself",
    "autotuning": "ask `distui plan` which stage and micro-batch fit",
    "no_python": "the target is a Python script, or a module with -m",
    "bind_core_list": "start it under `taskset -c LIST distui launch ...`; cluster.threads_per_rank divides the cores",
    "ssh_port": "distui does not log in to other machines: start each node by itself",
    "venv_script": "activate the environment, and start each node by itself",
}


@dataclass(frozen=True, slots=True)
class Placement:
    """What DeepSpeed's flags come to on this node."""

    overrides: dict[str, str] = field(default_factory=dict)
    """`section.key` -> text."""
    environment: dict[str, str] = field(default_factory=dict)
    passes_local_rank: bool = True
    """Whether each script gets `--local_rank=N` before its own arguments, as DeepSpeed's launcher gives it."""


def deepspeed_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the flags of DeepSpeed's launcher to a command, unlisted: they are for `--as deepspeed`."""
    for name, flags in reversed(_VALUES.items()):
        function = click.option(*flags, name, hidden=name not in _OURS, help=_OURS.get(name))(function)
    for name, flags in reversed(_SWITCHES.items()):
        function = click.option(*flags, name, is_flag=True, hidden=True)(function)
    return function


def given_flags(flags: Mapping[str, Any]) -> dict[str, str]:
    """Return what the user wrote of DeepSpeed's flags, by name, with the flag as it is written."""
    names = {**_VALUES, **_SWITCHES}
    return {name: names[name][-1] for name, value in flags.items() if value not in (None, False)}


def place(flags: Mapping[str, Any], target: Sequence[str], addresses: set[str] | None = None) -> Placement:
    """Return settings for DeepSpeed's flags on this node, which `addresses` names.

    Raises: UserError for a hostfile or filter that is wrong, and for what is not offered.
    """
    for name, flag in given_flags(flags).items():
        if name in _REFUSED:
            raise UserError(f"{flag} is not offered", "it belongs to DeepSpeed's own way to start", _REFUSED[name])
    if (launcher := flags.get("ds_launcher")) and launcher.lower() not in ("pdsh", "local"):
        raise UserError(
            f"--launcher {launcher} is not offered",
            "each node starts its own ranks",
            "under Slurm: srun distui launch --nodes $SLURM_NNODES --node-rank $SLURM_NODEID --master-addr HOST ...",
        )
    local_rank = not flags.get("no_local_rank")
    path = Path(flags["hostfile"]) if flags.get("hostfile") else DEFAULT_HOSTFILE
    pool = read_hostfile(path) if flags.get("hostfile") or path.is_file() else None
    filters = [name for name in ("include", "exclude") if flags.get(name)]
    counts = [name for name in ("num_nodes", "num_gpus") if flags.get(name)]
    if len(filters) > 1 or (filters and counts):
        both = ", ".join(f"--{name}" for name in filters + counts)
        raise UserError("flags that exclude each other", f"{both} all choose hosts and slots", "give one of them")
    if pool is None:
        return _local(flags, local_rank)
    hosts = choose(pool, flags.get("include") or "", flags.get("exclude") or "")
    if flags.get("num_nodes"):
        wanted = _count("--num_nodes", flags["num_nodes"])
        if wanted > len(hosts):
            raise UserError(
                f"--num_nodes {wanted}", f"{path} has {len(hosts)}: {', '.join(hosts)}", f"give at most {len(hosts)}"
            )
        hosts = dict(list(hosts.items())[:wanted])
    if flags.get("num_gpus"):
        wanted = _count("--num_gpus", flags["num_gpus"])
        for host, slots in hosts.items():
            if wanted > len(slots):
                raise UserError(
                    f"--num_gpus {wanted}", f"{host} has slots={len(slots)} in {path}", f"give at most {len(slots)}"
                )
        hosts = {host: slots[:wanted] for host, slots in hosts.items()}
    return _across(hosts, pool, flags, target, addresses or own_names(), local_rank)


def _count(flag: str, text: Any) -> int:
    if not str(text).isdecimal() or int(text) < 1:
        raise UserError(f"{flag} {text} is no count", "it takes a whole number above 0", f"write {flag} 1")
    return int(text)


def _local(flags: Mapping[str, Any], local_rank: bool) -> Placement:
    """Settle flags without a hostfile: this node only, but for `--no_ssh`, where each node is told of the others."""
    overrides, environment = {}, {}
    if flags.get("num_gpus"):
        overrides["cluster.nproc"] = str(_count("--num_gpus", flags["num_gpus"]))
    nodes = _count("--num_nodes", flags["num_nodes"]) if flags.get("num_nodes") else 1
    for name in ("include", "exclude"):
        if flags.get(name):
            host, slots = _parse_filter(flags[name]).popitem()
            if host not in ("localhost", *own_names()) or len(_parse_filter(flags[name])) > 1 or name == "exclude":
                raise UserError(
                    f"--{name} {flags[name]} needs a hostfile",
                    "without one there is this machine only, and its slots are not counted",
                    "give --hostfile FILE, or --include localhost:0,1",
                )
            if slots:
                overrides["cluster.nproc"] = str(len(slots))
                environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, slots))
    if nodes > 1:
        if flags.get("ds_node_rank") is None or not flags.get("ds_master_addr"):
            raise UserError(
                f"--num_nodes {nodes} without a hostfile",
                "the other nodes are not known",
                "give --hostfile FILE, or on each node --no_ssh --node_rank R --master_addr ADDR --master_port PORT",
            )
        overrides["cluster.nodes"] = str(nodes)
        overrides["cluster.master_port"] = str(DEFAULT_PORT)
    overrides |= _rendezvous(flags)
    return Placement(overrides, environment, local_rank)


def _rendezvous(flags: Mapping[str, Any]) -> dict[str, str]:
    named = {
        "cluster.master_addr": flags.get("ds_master_addr"),
        "cluster.master_port": flags.get("ds_master_port"),
        "cluster.node_rank": flags.get("ds_node_rank"),
    }
    return {key: str(value) for key, value in named.items() if value is not None}


def _across(
    hosts: Pool, pool: Pool, flags: Mapping[str, Any], target: Sequence[str], addresses: set[str], local_rank: bool
) -> Placement:
    order = list(hosts)
    if len(set(map(len, hosts.values()))) > 1:
        counts = ", ".join(f"{host}: {len(slots)}" for host, slots in hosts.items())
        least = min(map(len, hosts.values()))
        raise UserError(
            "hosts with different numbers of slots", f"{counts}; every node starts as many ranks", f"--num_gpus {least}"
        )
    overrides = {"cluster.nproc": str(len(hosts[order[0]]))}
    given = flags.get("ds_node_rank")
    here = order[int(given)] if given is not None and int(given) < len(order) else None
    here = here or next((host for host in order if host in addresses), None)
    if len(order) > 1:
        overrides["cluster.nodes"] = str(len(order))
        overrides["cluster.master_addr"] = order[0]
        overrides["cluster.master_port"] = str(DEFAULT_PORT)
    overrides |= _rendezvous(flags)
    if here is None or (len(order) > 1 and not flags.get("no_ssh") and given is None):
        commands = "; ".join(
            f"on {host}: {_command(rank, hosts, overrides, target)}" for rank, host in enumerate(order)
        )
        why = "distui does not log in to other machines"
        if here is None:
            why += f", and this one ({', '.join(sorted(addresses)[:4])}) is not among them"
        raise UserError(f"the job takes {', '.join(order)}", why, f"start each by itself: {commands}")
    if len(order) > 1:
        overrides.setdefault("cluster.node_rank", str(order.index(here)))
    environment = {}
    if hosts[here] != pool[here]:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, hosts[here]))
    return Placement(overrides, environment, local_rank)


def _command(rank: int, hosts: Pool, overrides: Mapping[str, str], target: Sequence[str]) -> str:
    words = ["distui", "launch", "--as", "deepspeed", "--nproc", overrides["cluster.nproc"]]
    if len(hosts) > 1:
        words += ["--nodes", str(len(hosts)), "--node-rank", str(rank)]
        words += ["--master-addr", overrides["cluster.master_addr"]]
        words += ["--master-port", overrides["cluster.master_port"]]
    return shlex.join([*words, *target])


def own_names() -> set[str]:
    """Return the names and addresses of this machine."""
    name = socket.gethostname()
    found = {"localhost", name, name.split(".")[0], socket.getfqdn()}
    for entries in psutil.net_if_addrs().values():
        found |= {entry.address for entry in entries if entry.family in (socket.AF_INET, socket.AF_INET6)}
    return found


def read_hostfile(path: Path) -> Pool:
    """Return the hosts of a hostfile: lines `host slots=N`, `#` begins a comment.

    Raises: UserError with the line that is wrong.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read the hostfile {path}",
            str(getattr(error, "strerror", None) or error),
            "name a file with lines `host slots=N`, or leave --hostfile out for this machine alone",
        ) from error
    pool: Pool = {}
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        match = re.match(r"(\S+)\s+slots=(\d+)\s*(#.*)?$", text)
        if match is None:
            raise UserError(f"{path}:{number} is no host", f"it reads {text!r}", "write it as `host slots=N`")
        if match[1] in pool:
            raise UserError(f"{path}:{number} names {match[1]} again", "each host has one line", "take one out")
        pool[match[1]] = list(range(int(match[2])))
    if not pool:
        raise UserError(f"the hostfile {path} is empty", "it has no line `host slots=N`", "add a host")
    return pool


def _parse_filter(text: str) -> Pool:
    """Return host -> slots of `host[:slot,...][@...]`; no slots are all of them."""
    found: Pool = {}
    for part in text.split("@"):
        host, colon, slots = part.partition(":")
        numbers = slots.split(",") if colon else []
        if not host or any(not number.isdecimal() for number in numbers):
            raise UserError(
                f"{part!r} names no slots", "it takes host or host:0,1, several joined by @", "for example worker-1:0,2"
            )
        found[host] = sorted({*found.get(host, []), *map(int, numbers)})
    return found


def choose(pool: Pool, include: str, exclude: str) -> Pool:
    """Return the hosts and slots that a filter leaves, in the hostfile's order.

    Raises: UserError for a host or slot that the hostfile does not have, or where nothing is left.
    """
    chosen = _parse_filter(include or exclude) if include or exclude else {}
    for host, slots in chosen.items():
        if host not in pool:
            raise UserError(
                f"{host} is not in the hostfile", f"it has {', '.join(pool)}", "correct --include or --exclude"
            )
        for slot in slots:
            if slot not in pool[host]:
                raise UserError(
                    f"{host} has no slot {slot}", f"its slots are 0 to {len(pool[host]) - 1}", "correct the filter"
                )
    if include:
        left = {host: chosen[host] or slots for host, slots in pool.items() if host in chosen}
    else:
        gone = {host: slots or pool[host] for host, slots in chosen.items()}
        left = {host: [slot for slot in slots if slot not in gone.get(host, [])] for host, slots in pool.items()}
    left = {host: slots for host, slots in left.items() if slots}
    if not left:
        raise UserError("no slot is left", f"--exclude {exclude} takes all of them", "exclude fewer")
    return left


def config_path(arguments: Sequence[str]) -> Path | None:
    """Return the JSON that a script's arguments name, if they do: `--deepspeed_config FILE`."""
    for index, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag in ("--deepspeed_config", "--deepspeed-config"):
            if equals:
                return Path(value)
            return Path(arguments[index + 1]) if index + 1 < len(arguments) else None
    return None


def check_config(arguments: Sequence[str]) -> None:
    """Read the JSON that a script's arguments name, so that a typo stops the job before it starts.

    Raises: ConfigError with every mistyped key and wrong value; UserError where it cannot be read.
    """
    path = config_path(arguments)
    if path is None:
        return
    from distui.core.config.imports.deepspeed import refuse_unknown
    from distui.core.config.imports.parsing import read_json

    refuse_unknown(read_json(path))
