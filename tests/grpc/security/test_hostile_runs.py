"""Run folders that mean harm: another user's beside mine, and my own whose content I was given."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest

from distui.core.paths import RunFolder, default_runs_dir
from distui.daemon.runs.retention import GIB, Retention, prune
from distui.daemon.serve.live import LiveRuns
from distui.proto import telemetry_pb2 as pb
from tests.grpc.security.hostile import CONTENT, KINDS, SECRET, Stranger, give_away, plant, tree

if TYPE_CHECKING:
    from tests.grpc.simulated_ranks import Node

TIMEOUT_S = 120.0


@dataclass
class Scene:
    """A daemon, a finished run of mine, and hostile ones beside it."""

    node: Node
    mine: RunFolder
    secret: Path
    elsewhere: Path
    before: dict[str, dict[str, tuple[int, int, int]]]

    def hostile(self, kind: str) -> RunFolder:
        return RunFolder(default_runs_dir() / kind)

    def unharmed(self) -> bool:
        """Tell whether the secret is what it was."""
        return self.secret.read_text() == SECRET and (self.elsewhere / "rank0.log").read_text() == SECRET


def _scene(stranger: Stranger | None, kinds: list[str]) -> Iterator[Scene]:
    module = sys.modules["tests.grpc.simulated_ranks"]
    folder = Path(tempfile.mkdtemp(prefix="dt", dir="/tmp"))
    folder.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        _enter(folder, patch)
        node = module.Node(folder)
        default_runs_dir().mkdir(parents=True)
        default_runs_dir().chmod(0o1777)  # several users share it
        secret, elsewhere = folder / "secret", folder / "elsewhere"
        elsewhere.mkdir()
        for path in (secret, elsewhere / "rank0.log"):
            path.write_text(SECRET)
            path.chmod(0o600)
        mine = node.run("mine", world_size=1)
        node.start("--listen", "127.0.0.1:0", "--plaintext")
        module.SimulatedRank(mine, 0, world_size=1).started().steps(1, 3).publish(close=True)
        mine.outcome.write_text('{"state": "finished", "exit_status": 0}')
        before = {}
        for kind in kinds:
            run = plant(kind, default_runs_dir(), secret, elsewhere)
            if stranger is not None:
                give_away(run, stranger.uid)
            before[kind] = tree(run.path)
    yield Scene(node, mine, secret, elsewhere, before)
    node.close()
    shutil.rmtree(folder)


def _enter(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Have the folders of runs and sockets be those of a scene."""
    patch.setenv("DISTUI_STATE_DIR", str(folder / "s"))
    patch.setenv("DISTUI_RUNTIME_DIR", str(folder / "r"))
    patch.delenv("DISTUI_JOB", raising=False)


@pytest.fixture(scope="module")
def strangers(stranger: Stranger) -> Iterator[Scene]:
    yield from _scene(stranger, list(KINDS))


@pytest.fixture(scope="module")
def mine() -> Iterator[Scene]:
    yield from _scene(None, CONTENT)


@pytest.fixture
def shared(strangers: Scene, monkeypatch: pytest.MonkeyPatch) -> Scene:
    """Give a folder of runs in which a stranger has planted one of every kind."""
    _enter(strangers.secret.parent, monkeypatch)
    return strangers


@pytest.fixture
def given(mine: Scene, monkeypatch: pytest.MonkeyPatch) -> Scene:
    """Give a folder of runs that are all mine, and hostile by what is in them."""
    _enter(mine.secret.parent, monkeypatch)
    return mine


def _distui(*commands: str) -> list[tuple[int, str]]:
    """Run commands in a process that has not much memory; return the exit status and output of each."""
    code = """
        import contextlib, io, json, resource, sys
        from distui.launcher import cli
        resource.setrlimit(resource.RLIMIT_DATA, (1 << 30, 1 << 30))
        for command in sys.argv[1:]:
            told = io.StringIO()
            with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
                status = cli.run(command.split())
            print(json.dumps([status, told.getvalue()]))
    """
    command = [sys.executable, "-c", textwrap.dedent(code), *commands]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    return [(status, text) for status, text in map(json.loads, done.stdout.splitlines())]


def _answers(node: Node, run_id: str) -> list[tuple[grpc.StatusCode, str]]:
    """Ask the daemon for a run in every way there is; return the code and text of each answer."""
    calls = [
        lambda: node.monitor.GetSnapshot(pb.SnapshotRequest(run_id=run_id), timeout=TIMEOUT_S),
        lambda: next(node.monitor.Watch(pb.WatchRequest(run_id=run_id), timeout=TIMEOUT_S)),
        lambda: node.monitor.ReadLog(pb.ReadLogRequest(run_id=run_id, rank=0), timeout=TIMEOUT_S),
        lambda: node.monitor.ReadLog(pb.ReadLogRequest(run_id=run_id, rank=-1), timeout=TIMEOUT_S),
        lambda: next(node.control.Execute(pb.ControlRequest(run_id=run_id, verb="stacks"), timeout=TIMEOUT_S)),
    ]
    found = []
    for call in calls:
        try:
            found.append((grpc.StatusCode.OK, str(call())))
        except grpc.RpcError as error:
            found.append((error.code(), str(error.details())))
        except StopIteration:
            found.append((grpc.StatusCode.OK, ""))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_stranger_plants_does_not_count(shared: Scene, kind: str) -> None:
    run = shared.hostile(kind)
    for name in (kind, str(run.path)):
        for code, text in _answers(shared.node, name):
            assert code is grpc.StatusCode.NOT_FOUND and SECRET not in text, (name, code, text)
    listed = shared.node.monitor.ListRuns(pb.ListRunsRequest(), timeout=TIMEOUT_S).runs
    assert [info.run_id for info in listed] == ["mine"]
    assert shared.unharmed() and tree(run.path) == shared.before[kind]


def test_commands_find_mine_among_a_strangers(shared: Scene, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    found = _distui("status", "status --json", f"report -o {page}")
    assert [status for status, _ in found] == [0, 0, 0], found
    for text in (found[0][1], found[1][1], page.read_text()):
        assert "mine" in text and SECRET not in text
    assert shared.unharmed()


def test_a_strangers_runs_are_refused_when_they_are_named(shared: Scene) -> None:
    names = [name for kind in KINDS for name in (kind, str(shared.hostile(kind).path))]
    for name, (status, text) in zip(names, _distui(*(f"status {name}" for name in names)), strict=True):
        assert status == 2 and text.startswith("error: ") and "it belongs to user" in text, (name, text)
        assert SECRET not in text
    assert shared.unharmed()


def test_a_strangers_sparse_file_costs_me_no_telemetry(shared: Scene) -> None:
    kept = tree(shared.mine.telemetry)
    assert kept and prune(LiveRuns().folders(), Retention(0, 10 * GIB)) == 0
    assert tree(shared.mine.telemetry) == kept


@pytest.mark.parametrize("kind", CONTENT)
def test_what_is_in_a_run_harms_nobody(given: Scene, kind: str) -> None:
    """The run is mine, so it is shown as far as it makes sense; it reads nothing, writes nothing, holds nobody up."""
    run = given.hostile(kind)
    for code, text in _answers(given.node, kind):
        known = (grpc.StatusCode.OK, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.FAILED_PRECONDITION)
        assert code in known and SECRET not in text, (code, text)
    given.node.monitor.ListRuns(pb.ListRunsRequest(), timeout=TIMEOUT_S)
    report = f"report {kind} --force -o {os.devnull}"
    *found, (status, text) = _distui(f"status {kind} --json", f"status {run.path}", report, "status mine --json")
    for exit_status, told in found:
        assert exit_status in (0, 2) and "Traceback" not in told and SECRET not in told, told
    assert status == 0 and json.loads(text)["state"] == "finished"
    assert given.unharmed() and tree(run.path) == given.before[kind]
