"""What counts as this user's own at the moment it is opened; names that are no paths; folders that users share."""

from __future__ import annotations

import ast
import os
import pickle
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest

from distui.core.errors import NotOwn, UserError
from distui.core.paths import (
    RunFolder,
    default_runs_dir,
    is_run_id,
    list_own,
    new_run_id,
    open_own,
    read_own,
    remove_own,
    runtime_dir,
    write_own,
)
from distui.core.telemetry.endpoint import Endpoint, secrets_dir
from distui.core.telemetry.ledger import Ledger, LedgerReader
from distui.core.telemetry.mapped_file import map_new
from distui.core.telemetry.stacks import known_stack, stack_path
from distui.daemon.runs.folders import find_run, run_folders
from distui.daemon.runs.snapshot import load_state
from distui.daemon.runs.store import RunLog, segment_files
from distui.daemon.serve.monitor import read_log
from distui.daemon.serve.security import tcp_options
from distui.launcher import cli
from distui.launcher.commands.runs import run_row
from distui.launcher.job.ending import flops_report
from distui.launcher.job.outcome import last_step, read_outcome, read_rank_error
from distui.launcher.job.processes import record_session, request_stop
from distui.launcher.report.data import read_report
from distui.proto import telemetry_pb2 as pb
from tests.grpc.security.hostile import SECRET, Stranger

if TYPE_CHECKING:
    from tests.grpc.simulated_ranks import Node

TIMEOUT_S = 120.0
APPEND = os.O_WRONLY | os.O_CREAT | os.O_APPEND


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """Give a run of mine that has ended, with a log and a ledger."""
    made = RunFolder(tmp_path / "runs" / "mine-1")
    made.create()
    made.spec.write_text('{"run_id": "mine-1", "world_size": 1, "started_s": 5.0}')
    made.outcome.write_text('{"state": "failed", "exit_status": 3, "failed_rank": 0, "ranks": []}')
    made.rank_log(0).write_text("mine")
    made.rank_error(0).write_text('{"type": "E"}')
    made.flops.write_text("table\n")
    Ledger(made.rank_ledger(0), rank=0, world_size=1, capacity=16).set_step(7)
    log = RunLog(made)
    log.append(_batch(made))
    log.close()
    return made


def _batch(run: RunFolder) -> pb.Batch:
    source = pb.Source(rank=0, node="n", pid=1, incarnation=1)
    record = pb.Record(seq=1, time_s=6.0, step=pb.Step(step=1, step_s=1.0))
    return pb.Batch(run_id=run.run_id, run_dir=str(run.path), source=source, records=[record])


READERS: dict[str, Callable[[RunFolder], object]] = {
    "spec and outcome": lambda run: read_outcome(run) and read_rank_error(run, 0),
    "log": lambda run: read_log(run, pb.ReadLogRequest(rank=0)).data,
    "telemetry": lambda run: load_state(run).ranks,
    "ledger": lambda run: last_step(run, 0),
    "report": lambda run: [*read_report(run, 9.0).steps, read_report(run, 9.0).error],
    "flops": lambda run: "table" in flops_report(run),
    "found": lambda run: run_folders([run.path.parent]),
}
WRITERS: dict[str, Callable[[RunFolder], object]] = {
    "outcome": lambda run: write_own(run.outcome, "{}"),
    "log": lambda run: os.close(open_own(run.rank_log(0), APPEND)),
    "telemetry": lambda run: RunLog(run).append(_batch(run)),
    "ledger": lambda run: Ledger(run.rank_ledger(0), rank=0, world_size=1, capacity=16),
    "stack": lambda run: map_new(stack_path(run, 0), 64),
    "session": record_session,
    "stop": request_stop,
    "retention": lambda run: remove_own(run.telemetry / "00000001.log"),
}


IN_SUBFOLDERS = {"log": "logs", "ledger": "ledger", "stack": "ledger", "telemetry": "telemetry"}
EXCHANGES = [(how, does) for how in ("run", "mode", "owner") for does in (*READERS, *WRITERS)]
EXCHANGES += [("subfolder", does) for does in IN_SUBFOLDERS]


@pytest.mark.parametrize(("how", "does"), EXCHANGES)
def test_a_folder_that_is_exchanged_between_check_and_use(
    run: RunFolder, tmp_path: Path, how: str, does: str, request: pytest.FixtureRequest
) -> None:
    """The run was found to be mine; then another folder, a link, or other rights stand in its place."""
    act = READERS.get(does) or WRITERS[does]
    if does in READERS:
        assert act(run)
    victim = RunFolder(tmp_path / "elsewhere")
    os.rename(run.path, victim.path)
    before = sorted((path, path.lstat().st_mtime_ns, path.lstat().st_size) for path in victim.path.rglob("*"))
    if how == "run":
        run.path.symlink_to(victim.path)
    elif how == "subfolder":
        run.path.mkdir()
        (run.path / IN_SUBFOLDERS[does]).symlink_to(victim.path / IN_SUBFOLDERS[does])
    elif how == "mode":
        os.rename(victim.path, run.path)
        run.path.chmod(0o777)
    else:
        stranger: Stranger = request.getfixturevalue("stranger")
        os.rename(victim.path, run.path)
        os.chown(run.path, stranger.uid, -1)
    try:
        found = act(run)
    except (NotOwn, UserError):
        found = None
    if does in READERS:
        assert not found or found == [""] or found == [], found
    else:
        assert found is None
    if how in ("mode", "owner"):
        os.rename(run.path, victim.path)
    after = sorted((path, path.lstat().st_mtime_ns, path.lstat().st_size) for path in victim.path.rglob("*"))
    assert after == before


def test_every_kind_of_file_but_a_plain_one_is_refused_at_once(run: RunFolder, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text(SECRET)
    path = run.logs / "rank1.log"
    makes: list[Callable[[], object]] = [lambda: path.symlink_to(target), lambda: os.mkfifo(path), path.mkdir]
    makes += [lambda: path.symlink_to("/dev/zero"), lambda: path.symlink_to("/dev/tty")]
    for make in makes:
        make()
        for flags in (os.O_RDONLY, APPEND, os.O_RDWR | os.O_CREAT | os.O_TRUNC):
            with pytest.raises(OSError):
                open_own(path, flags)
        assert path.name not in list_own(run.logs)
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    os.link(target, path)
    assert read_own(path).decode() == SECRET  # a second name of mine may be read
    with pytest.raises(NotOwn, match="it has 2 names") as refused:
        open_own(path, APPEND)
    assert str(pickle.loads(pickle.dumps(refused.value))) == str(refused.value)
    assert target.read_text() == SECRET


def test_what_is_too_large_is_not_read(run: RunFolder) -> None:
    os.truncate(run.flops, 20 << 30)
    with pytest.raises(OSError, match="more than 16,777,216 bytes"):
        read_own(run.flops)
    os.truncate(run.rank_ledger(0), 20 << 30)
    assert last_step(run, 0) is None
    stack_path(run, 0).write_bytes(b"x" * 20_000)
    assert known_stack(run, 0) is None


def test_a_log_goes_on_in_a_segment_of_its_own_where_the_last_is_not_its_alone(run: RunFolder, tmp_path: Path) -> None:
    os.link(run.telemetry / "00000001.log", tmp_path / "kept by a backup")
    kept = (tmp_path / "kept by a backup").read_bytes()
    (run.telemetry / "00000002.log").symlink_to(tmp_path / "absent")
    log = RunLog(run)
    log.append(_batch(run))
    log.close()
    assert [path.name for path in segment_files(run)] == ["00000001.log", "00000003.log"]
    assert (tmp_path / "kept by a backup").read_bytes() == kept and not (tmp_path / "absent").exists()


def test_subfolders_of_a_shared_umask_are_fine_as_long_as_nobody_gets_there(run: RunFolder) -> None:
    run.logs.chmod(0o775)  # umask 002, in a folder of 0700
    assert read_own(run.rank_log(0)) == b"mine"
    run.path.chmod(0o755)
    with pytest.raises(NotOwn, match=r"others may write in it \(mode 0775\): chmod go-w it"):
        read_own(run.rank_log(0))


NO_NAMES = ["../mine-1", "/tmp", "a/b", ".", "..", "-x", "--json", "a\nb", "a b", "\x1b[31m", "x" * 129, "ü", "a\0b"]


def test_names_that_runs_have() -> None:
    for name in ("my train: (2)!", "--force", "../../x", "ünï", "", "\x1b[31m", "a" * 300):
        assert is_run_id(new_run_id(name))
    assert not any(map(is_run_id, ["", *NO_NAMES]))


@pytest.mark.parametrize("name", NO_NAMES)
def test_commands_take_no_path_for_a_name(run: RunFolder, name: str) -> None:
    with pytest.raises(UserError):
        find_run(name, run.path.parent)


def _entries(node: Node, name: str) -> list[Callable[[], object]]:
    """Return every call of the daemon that takes a run's name."""
    return [
        lambda: node.monitor.GetSnapshot(pb.SnapshotRequest(run_id=name), timeout=TIMEOUT_S),
        lambda: list(node.monitor.Watch(pb.WatchRequest(run_id=name), timeout=TIMEOUT_S)),
        lambda: node.monitor.ReadLog(pb.ReadLogRequest(run_id=name), timeout=TIMEOUT_S),
        lambda: list(node.control.Execute(pb.ControlRequest(run_id=name), timeout=TIMEOUT_S)),
    ]


def test_no_entry_takes_a_path_for_a_name(node: Node) -> None:
    node.start()
    run = node.run("mine")
    run.rank_log(0).write_text(SECRET)
    for name in [*NO_NAMES, str(run.path), f"{run.path}/", f"../runs/{run.run_id}"]:
        for call in _entries(node, name):
            with pytest.raises(grpc.RpcError) as error:
                call()
            assert error.value.code() is grpc.StatusCode.NOT_FOUND, (name, error.value.details())
            assert "is no run's name" in str(error.value.details())
        source = pb.Source(rank=0, node="n", pid=1, incarnation=1)
        with pytest.raises(grpc.RpcError) as error:
            batch = pb.Batch(run_id=name, run_dir=str(run.path), source=source)
            sys.modules["tests.grpc.simulated_ranks"].publish([batch])
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_folder_here_does_not_stand_for_a_run_that_is_named(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    other = RunFolder(run.path.parent.parent / "here" / "mine-1")
    other.create()
    other.spec.write_text("{}")
    monkeypatch.chdir(other.path.parent)
    assert find_run("mine-1", run.path.parent) == run
    assert find_run("./mine-1", run.path.parent) == find_run(str(other.path), run.path.parent) == other


def test_a_state_folder_that_is_a_link_of_mine_goes_on_working(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    (node.folder / "disk").mkdir()
    (node.folder / "link").symlink_to(node.folder / "disk")
    monkeypatch.setenv("DISTUI_STATE_DIR", str(node.folder / "link" / "state"))
    run = node.run("mine", world_size=1)
    node.start()
    sys.modules["tests.grpc.simulated_ranks"].SimulatedRank(run, 0, world_size=1).started().steps(1, 3).publish()
    assert node.snapshot(run).ranks[0].step == 3
    assert find_run("mine", default_runs_dir()).path == run.path and load_state(run).ranks[0].last_step is not None
    assert tcp_options("127.0.0.1:0").token  # makes the daemon's folder


@pytest.fixture
def shared(node: Node, stranger: Stranger) -> Iterator[Path]:
    """Give a state folder in which every user may make files, as /tmp is."""
    node.folder.chmod(0o755)
    folder = node.folder / "s"
    folder.mkdir()
    folder.chmod(0o1777)
    yield folder


def test_a_strangers_token_and_certificate_are_not_used(shared: Path, stranger: Stranger) -> None:
    plant = 'umask 022; mkdir "$1"; printf "%s\n" known-to-the-stranger >"$1/token"; chmod 600 "$1/token"'
    plant += '; printf "%s\n" "-----BEGIN CERTIFICATE-----" >"$1/cert.pem"; printf PRIVATE KEY >"$1/key.pem"'
    stranger.does(plant, secrets_dir())
    for use in (lambda: tcp_options("127.0.0.1:0"), lambda: Endpoint.tcp("127.0.0.1:1", plaintext=True)):
        with pytest.raises(UserError) as error:
            use()
        assert f"it belongs to user {stranger.uid}" in error.value.report()


def test_a_strangers_list_of_folders_is_not_read(shared: Path, stranger: Stranger, node: Node) -> None:
    run = RunFolder(node.folder / "kept-apart" / "mine-2")
    run.create()
    run.spec.write_text("{}")
    stranger.does('mkdir "$1"; printf "%s\n" "$2" >"$1/run_folders"', secrets_dir(), run.path.parent)
    node.start()
    listed = node.monitor.ListRuns(pb.ListRunsRequest(), timeout=TIMEOUT_S).runs
    assert not listed


def test_a_runtime_folder_that_a_stranger_can_exchange_is_refused(
    shared: Path, stranger: Stranger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without XDG_RUNTIME_DIR it lies in /tmp, where a stranger may have come first with a link to a folder of mine."""
    monkeypatch.delenv("DISTUI_RUNTIME_DIR")
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(shared))
    mine = shared.parent / "private"
    mine.mkdir(mode=0o700)
    planted = shared / f"distui-{os.getuid()}"
    stranger.does('ln -s "$1" "$2"', mine, planted)
    with pytest.raises(UserError, match=f"it is a link of user {stranger.uid}"):
        runtime_dir()
    planted.unlink()
    stranger.does('mkdir -m 700 "$1"', planted)
    with pytest.raises(UserError, match="is not private"):
        runtime_dir()
    planted.rmdir()
    assert runtime_dir() == planted
    monkeypatch.setenv("DISTUI_RUNTIME_DIR", str(shared.parent / "link"))
    (shared.parent / "link").symlink_to(mine)  # my own link
    assert runtime_dir() == shared.parent / "link"
    shared.chmod(0o777)
    monkeypatch.setenv("DISTUI_RUNTIME_DIR", str(planted))
    with pytest.raises(UserError, match="all may rename what is in"):
        runtime_dir()


def test_a_ledger_of_noise_is_unreadable_and_nothing_else(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run-1")
    run.create()
    ledger = Ledger(run.rank_ledger(0), rank=0, world_size=1, capacity=16)
    ledger.begin("world", "all_reduce", "float32", 8, 1)
    whole = run.rank_ledger(0).read_bytes()
    for start in range(48, 320, 8):  # past the header each word in turn: counts, names, lengths, tokens
        run.rank_ledger(0).write_bytes(whole[:start] + b"\xff" * 8 + whole[start + 8 :])
        with LedgerReader.open(run.rank_ledger(0)) as reader:
            reader.state()
            reader.held_up()
            assert len(list(reader.entries(reader.head() - 4))) <= 16


A_RUNS_FILE = re.compile(
    r"\b(run|folder|_run)\.(spec|outcome|config|flops|logs|telemetry|ledger|nccl|errors|path)\b|\brank_(log|error|ledger)\("
)
OPENS = re.compile(r"chmod|exists|r?glob|is_(dir|file)|iterdir|open|(read|write)_(bytes|text)|rename|stat|touch|unlink")


def test_nothing_else_opens_a_runs_files() -> None:
    root, found, looked = Path(__file__).parents[3], [], 0
    for folder in ("daemon", "launcher", "tui", "core/telemetry"):
        for path in (root / folder).rglob("*.py"):
            looked += 1
            for node in ast.walk(ast.parse(path.read_text())):
                if not isinstance(node, ast.Call):
                    continue
                if isinstance(node.func, ast.Attribute) and OPENS.fullmatch(node.func.attr):
                    what = ast.unparse(node.func.value)
                    what = ast.unparse(node.args[0]) if what == "os" and node.args else what
                elif isinstance(node.func, ast.Name) and node.func.id == "open":
                    what = ast.unparse(node.args[0])
                else:
                    continue
                if A_RUNS_FILE.search(what) and not what.startswith("open_own("):
                    found.append(f"{path.relative_to(root)}:{node.lineno}: {ast.unparse(node)}")
    assert looked > 100 and not found


def test_a_run_that_others_may_write_in_says_what_to_mend(run: RunFolder) -> None:
    run.path.chmod(0o770)
    for name in (None, "mine-1", str(run.path)):
        with pytest.raises(UserError) as error:
            find_run(name, run.path.parent)
        assert "mode 0770" in error.value.why and "chmod go-w" in error.value.why
    run.path.chmod(0o750)
    assert find_run(None, run.path.parent) == run


def test_commands_act_on_the_run_that_is_named_and_on_no_other_of_its_name(
    node: Node, capsys: pytest.CaptureFixture[str]
) -> None:
    node.start()
    living = node.run("train-1", world_size=1)
    sys.modules["tests.grpc.simulated_ranks"].SimulatedRank(living, 0, world_size=1).started().steps(1, 3).publish()
    copy = RunFolder(node.folder / "copies" / "train-1")
    copy.create()
    copy.spec.write_text('{"name": "the copy", "world_size": 1, "num_nodes": 1, "started_s": 5.0}')
    assert cli.run(["control", str(copy.path), "stop"]) == 2
    assert f"the daemon knows train-1 as {living.path.resolve()}" in capsys.readouterr().err
    assert cli.run(["status", str(copy.path)]) == 0
    shown = capsys.readouterr().out
    assert f"kept in {copy.path}" in shown and "1970" not in shown and " 3 " not in shown


def test_a_file_system_that_gives_files_away_is_refused_at_the_launch(
    node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train.py").write_text("")
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)  # the owner of what was just made is another
    assert cli.run(["launch", "--nproc", "1", "--no-tui", str(tmp_path / "train.py")]) == 2
    told = capsys.readouterr().err
    assert "it belongs to user" in told and "run.dir or DISTUI_STATE_DIR" in told


def test_one_run_that_is_spoilt_hides_no_others(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "train-1")
    run.create()
    run.telemetry.rmdir()
    run.telemetry.symlink_to(tmp_path)
    assert run_row(run)["state"] == "unreadable"


def test_a_link_that_goes_round_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "train-1").symlink_to("train-1")
    with pytest.raises(UserError):
        find_run(str(tmp_path / "train-1"), tmp_path)
