"""What hosts say of themselves is compared, and all that differs is told at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from distui.launcher.cluster.hello import CLOCK_S, compare, remarks
from distui.launcher.cluster.hosts import Host
from distui.launcher.node.facts import Hello, files_of, gather, hash_of, interface_of, source_address

HOSTS = [Host("gpu1", 2), Host("gpu2", 2), Host("gpu3", 4)]
HERE = Hello(
    host_name="head",
    machine="1 head",
    python="/opt/python",
    versions={"python": "3.11", "distui": "0.1", "torch": "2.13.0"},
    folder="/project",
    folder_there=True,
    hashes={"/project/train.py": "a" * 64, "/project/model.py": "b" * 64},
    optional=["/project/model.py"],
)


def hellos() -> dict[int, Hello]:
    return {node: replace(HERE, host_name=host.name, machine=f"1 {host.name}") for node, host in enumerate(HOSTS)}


def test_hosts_that_are_alike_have_no_problem() -> None:
    found = hellos()
    assert not compare(HOSTS, found, HERE, one_machine=False)
    found[1] = replace(found[1], hashes={**HERE.hashes, "/project/model.py": ""})
    assert not compare(HOSTS, found, HERE, one_machine=False), "a host may lack what is not the script"


def test_all_that_differs_is_told_at_once_with_its_hosts() -> None:
    found = hellos()
    old = {**HERE.versions, "torch": "2.12.0"}
    found[0] = replace(found[0], versions=old)
    found[1] = replace(found[1], versions=old, hashes={"/project/train.py": "", "/project/model.py": "c" * 64})
    found[2] = replace(found[2], folder_there=False, num_gpus=2, problems=[["no disk", "it is full", "free some"]])
    told = {(problem.path, problem.what) for problem in compare(HOSTS, found, HERE, one_machine=False)}
    assert told == {
        ("gpu1, gpu2", "torch 2.12.0"),
        ("gpu2", "/project/train.py is not there"),
        ("gpu2", "/project/model.py differs"),
        ("gpu3", "the working folder /project is not there"),
        ("gpu3", "no disk"),
        ("gpu3", "4 ranks on 2 GPUs"),
    }


def test_two_names_of_one_machine_are_found() -> None:
    found = hellos()
    found[2] = replace(found[2], machine=found[0].machine, host_name="gpu1")
    (problem,) = compare(HOSTS, found, HERE, one_machine=False)
    assert problem.path == "gpu1, gpu3" and "one machine" in problem.what and "127.0.1.1" in problem.why
    assert not compare(HOSTS, found, HERE, one_machine=True)


def test_who_does_not_see_the_checkpoints_is_told() -> None:
    found = hellos()
    found[1] = replace(found[1], sees_checkpoints=False)
    (problem,) = compare(HOSTS, found, HERE, one_machine=False)
    assert problem.path == "gpu2" and "checkpoint.dir" in problem.fix


def test_clocks_and_limits_are_remarks() -> None:
    found = hellos()
    found[1] = replace(found[1], remarks=["memlock is 64 KiB"])
    told = remarks(HOSTS, found, {0: CLOCK_S - 1, 2: -CLOCK_S - 1})
    assert told == ["gpu2: memlock is 64 KiB", "gpu3: its clock is -6 s from this one: times in its logs differ"]


def test_a_host_tells_of_its_files_and_interfaces(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("import model")
    (tmp_path / "model.py").write_text("")
    (tmp_path / "distui.toml").write_text("")
    files, optional = files_of(["train.py", "--lr", "1"], tmp_path, None)
    assert [Path(name).name for name in files] == ["train.py", "model.py", "distui.toml"]
    assert [Path(name).name for name in optional] == ["model.py", "distui.toml"]
    said = gather(str(tmp_path), [*files, str(tmp_path / "none.py")], optional)
    assert said.hashes[files[0]] == hash_of(files[0]) and len(hash_of(files[0])) == 64
    assert said.hashes[str(tmp_path / "none.py")] == ""
    assert Hello.of(said.to_json()) == said and said.versions["torch"] and said.folder_there
    assert source_address("127.0.0.1") == "127.0.0.1" and source_address("no.such.host.invalid") == ""
    assert interface_of("10.0.0.1", {"lo": ["127.0.0.1"], "eth0": ["10.0.0.1"]}) == "eth0"
