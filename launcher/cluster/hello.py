"""What the agents of all hosts say of themselves, compared before any rank is started."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from distui.core.errors import Problem
from distui.launcher.cluster.hosts import Host
from distui.launcher.node.facts import Hello

CLOCK_S = 5.0
"""Clocks that differ by less do no harm: no verdict goes by them."""


def compare(hosts: Sequence[Host], hellos: Mapping[int, Hello], here: Hello, *, one_machine: bool) -> list[Problem]:
    """Return all that keeps the hosts from training together, each problem once, with the hosts that it is about.

    `here` is the launching side, whose versions and files count. With `one_machine` the starter puts several nodes on
    one machine on purpose.
    """
    found = [*_versions(hosts, hellos, here), *_files(hosts, hellos, here)]
    for node, hello in sorted(hellos.items()):
        name = hosts[node].name
        found += [Problem(name, *problem) for problem in hello.problems]
        if hello.num_gpus and hosts[node].num_ranks > hello.num_gpus:
            what = f"{hosts[node].num_ranks} ranks on {hello.num_gpus} GPU{'s' * (hello.num_gpus > 1)}"
            found.append(
                Problem(name, what, "each rank needs a GPU of its own", f"--hosts ...,{name}:{hello.num_gpus}")
            )
    blind = [hosts[node].name for node, hello in sorted(hellos.items()) if not hello.sees_checkpoints]
    if blind and not found:
        what, why = f"the folder of checkpoints on {here.host_name} is not there", "all ranks save into one folder"
        fix = "name one on a disk that all hosts share: --set checkpoint.dir=..., or checkpoint.every_steps=0"
        found.append(Problem(", ".join(blind), what, why, fix))
    return found + ([] if one_machine else _twice(hosts, hellos))


def _versions(hosts: Sequence[Host], hellos: Mapping[int, Hello], here: Hello) -> list[Problem]:
    found = []
    for package, mine in here.versions.items():
        others: dict[str, list[str]] = {}
        for node, hello in sorted(hellos.items()):
            if (version := hello.versions.get(package, "")) != mine:
                others.setdefault(version, []).append(hosts[node].name)
        for version, names in others.items():
            what = f"{package} {version}" if version else f"{package} is not there"
            fix = (
                f"pip install {package}=={mine} for {here.python} there"
                if package != "python"
                else "the same Python there"
            )
            found.append(Problem(", ".join(names), what, f"it is {package} {mine} on {here.host_name}", fix))
    return found


def _files(hosts: Sequence[Host], hellos: Mapping[int, Hello], here: Hello) -> list[Problem]:
    found = []
    gone = [hosts[node].name for node, hello in sorted(hellos.items()) if not hello.folder_there]
    if gone:
        what, fix = f"the working folder {here.folder} is not there", "put the project at the same path on every host"
        found.append(Problem(", ".join(gone), what, f"ranks start in it, as on {here.host_name}", fix))
    for path, mine in here.hashes.items():
        missing, other = [], []
        for node, hello in sorted(hellos.items()):
            if not hello.folder_there:
                continue
            theirs = hello.hashes.get(path, "")
            if not theirs and path not in here.optional:
                missing.append(hosts[node].name)
            elif theirs and theirs != mine:
                other.append(hosts[node].name)
        why = f"on {here.host_name} its hash is {mine[:12]}"
        fix = f"copy it there: rsync {path} HOST:{path}"
        if missing:
            found.append(Problem(", ".join(missing), f"{path} is not there", why, fix))
        if other:
            found.append(Problem(", ".join(other), f"{path} differs", why, fix))
    return found


def _twice(hosts: Sequence[Host], hellos: Mapping[int, Hello]) -> list[Problem]:
    machines: dict[str, list[int]] = {}
    for node, hello in sorted(hellos.items()):
        machines.setdefault(hello.machine, []).append(node)
    found = []
    for nodes in machines.values():
        if len(nodes) > 1:
            names = [hosts[node].name for node in nodes]
            what = f"{' and '.join(names)} are one machine: all of them came to {hellos[nodes[0]].host_name}"
            why = "a name may resolve to 127.0.1.1, or to another host's address"
            found.append(Problem(", ".join(names), what, why, f"correct /etc/hosts or ssh's HostName of {names[-1]}"))
    return found


def remarks(hosts: Sequence[Host], hellos: Mapping[int, Hello], offsets_s: Mapping[int, float]) -> list[str]:
    """Return what does no harm by itself, and explains much when something is wrong."""
    found = []
    for node, hello in sorted(hellos.items()):
        name = hosts[node].name
        found += [f"{name}: {remark}" for remark in hello.remarks]
        if abs(offset_s := offsets_s.get(node, 0.0)) > CLOCK_S:
            found.append(f"{name}: its clock is {offset_s:+.0f} s from this one: times in its logs differ")
    return found
