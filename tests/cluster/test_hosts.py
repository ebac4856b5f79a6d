"""Lists of hosts, hostfiles of DeepSpeed and MPI, and what is chosen of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from distui.core.config.schema import ClusterSection
from distui.core.errors import UserError
from distui.launcher.cluster.hosts import Host, as_setting, choose_hosts

HOSTFILE = """\
# ours
gpu1 slots=4
gpu2:2   # as MPI has it
user@gpu3 slots = 8 max_slots=16

gpu4
"""


def test_a_list_gives_hosts_in_order_with_their_ranks() -> None:
    hosts = choose_hosts("a, b:4,user@c:1,[fe80::1]:2,[fe80::2]", "", "", "", 3)
    assert [(host.name, host.num_ranks) for host in hosts] == [
        ("a", 3),
        ("b", 4),
        ("user@c", 1),
        ("[fe80::1]", 2),
        ("[fe80::2]", 3),
    ]
    cluster = ClusterSection(hosts=as_setting(hosts), nproc=7)
    assert cluster.ranks_by_host() == {host.name: host.num_ranks for host in hosts}
    assert cluster.world_size() == 13, "nproc counts only where there are no hosts"
    assert ClusterSection(hosts="a,[fe80::1]", nproc=7).world_size() == 14, "as the user writes it"


def test_a_hostfile_of_either_kind_is_read(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text(HOSTFILE)
    hosts = choose_hosts("", str(path), "", "", 1)
    assert as_setting(hosts) == "gpu1:4,gpu2:2,user@gpu3:8,gpu4:1"
    assert all(not host.devices for host in hosts)


def test_filters_choose_hosts_and_slots(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text(HOSTFILE)
    (first, second) = choose_hosts("", str(path), "gpu1:0,2@gpu2", "", 1)
    assert first == Host("gpu1", 2, (0, 2)) and second == Host("gpu2", 2)
    assert Host.of(first.spec()) == first
    left = choose_hosts("", str(path), "", "gpu2:1@gpu4", 1)
    assert left == [Host("gpu1", 4), Host("gpu2", 1, (0,)), Host("user@gpu3", 8)]


@pytest.mark.parametrize(
    ("hosts", "lines", "include", "exclude", "what"),
    [
        ("a,,b", "", "", "", "'' is no host"),
        ("a,b:x", "", "", "", "'b:x' is no host"),
        ("a:0", "", "", "", "'a:0' is no host"),
        ("-oProxyCommand=sh", "", "", "", "is no host"),
        ("a,a", "", "", "", "--hosts names a again"),
        ("a", "b slots=1", "", "", "hosts and a hostfile"),
        ("a", "", "a", "b", "--include and --exclude"),
        ("a", "", "b", "", "b is not in the hostfile"),
        ("", "gpu1 slots=4\ngpu1:2", "", "", ":2 names gpu1 again"),
        ("", "gpu1 slots=0", "", "", "gpu1 has no slot"),
        ("", "gpu1 four", "", "", ":1 is no host"),
        ("", "# nothing", "", "", "is empty"),
    ],
)
def test_what_is_no_host_is_told(hosts: str, lines: str, include: str, exclude: str, what: str, tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    if lines:
        path.write_text(lines)
    with pytest.raises(UserError) as caught:
        choose_hosts(hosts, str(path) if lines else "", include, exclude, 1)
    assert what in caught.value.what
