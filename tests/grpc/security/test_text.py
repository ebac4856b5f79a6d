"""Text of ranks, files and daemons: whatever is in it, a terminal or a page that shows it does nothing but show it."""

from __future__ import annotations

import csv
import io
import re
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from distui.core.errors import EXIT_BUG, EXIT_OK, EXIT_USER, DaemonUnavailable, NotOwn, UserError
from distui.core.paths import RunFolder, daemon_socket, default_runs_dir
from distui.core.telemetry.endpoint import Endpoint
from distui.core.telemetry.harmless import HarmlessStream, harmless, make_harmless
from distui.daemon.runs.snapshot import load_state
from distui.daemon.serve.monitor import read_log
from distui.launcher import cli
from distui.launcher.job.daemon_client import get_snapshot
from distui.launcher.job.ending import failure_report
from distui.launcher.job.outcome import read_outcome
from distui.launcher.report.replay import Replay
from distui.proto import telemetry_pb2 as pb
from distui.proto import telemetry_pb2_grpc as rpc
from distui.tui.client import MonitorClient
from distui.tui.monitor.app import DashboardApp
from distui.tui.monitor.model import RunModel
from distui.tui.widgets.log import clean
from tests.grpc.security.hostile import ESCAPE, plant

if TYPE_CHECKING:
    from tests.grpc.simulated_ranks import Node

TIMEOUT_S = 120.0
ACTS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069]")
"""What a terminal acts on: controls of 7 and 8 bits, and the direction of writing. Tabs and ends of lines are none."""


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("plain, ünïcode, 日本, ✓ and 🙂", "plain, ünïcode, 日本, ✓ and 🙂"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b[2J\x1b[H\x1b[?1049h\x1b[38;2;1;2;3mx", "x"),
        ("a\x1b]0;title\x07b", "ab"),
        ("a\x1b]8;;http://evil\x1b\\link\x1b]8;;\x1b\\b", "alinkb"),
        ("a\x1bP1;2|dcs\x1b\\b\x1b_apc\x9cc", "abc"),
        ("a\x9b31mb\x9d0;t\x9cc", "abc"),
        ("a\x1b]0;never ends", "a0;never ends"),
        ("a\x1bcb\x1b(0d\x1b", "abd"),
        ("\rover\bwritten\x7f\x00", "overwritten"),
        ("left\u202eright\u200b\u2066.", "leftright."),
        ("non\u00a0breaking\u2028line", "non breaking line"),
        ("two\nlines\tand a tab", "two lines and a tab"),
        ("lone \ud800 surrogate", "lone  surrogate"),
        ("\ue0b0 private use", "\ue0b0 private use"),
    ],
)
def test_what_becomes_of_text(text: str, told: str) -> None:
    assert harmless(text) == told
    assert harmless(told) == told


def test_lines_and_tabs_stay_where_there_may_be_several() -> None:
    assert harmless("a\x1b[1m\n\tb\r\n", lines=True) == "a\n\tb\n"


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_a_log_keeps_its_colours_and_its_progress_bars_in_whatever_pieces_it_comes(size: int) -> None:
    text = "\x1b[1;31mred\x1b[0m 10%\r20%\n\x1b]0;t\x07a\x1b[2Jb\x9b1mc\x1bPx\x1b\\d\u202ee 日本\x00\x1b[31"
    log, out = text.encode() + b"\xff\x9b", io.BytesIO()
    stream = HarmlessStream(out)
    for at in range(0, len(log), size):
        stream.write(log[at : at + size])
    stream.flush()
    told = out.getvalue().decode()
    assert told.startswith("\x1b[1;31mred\x1b[0m 10%\r20%\nabcde 日本")
    assert not ACTS.search(re.sub("\x1b\\[[0-9;]*m|\r", "", told))


def test_a_long_text_takes_no_longer_than_its_length() -> None:
    for part in ("\x1b]", "\x9d", "\x1b[", "\x1b[" + "0" * 50, "\x1bP\x9b", "\x1b"):
        harmless(part * 200_000)  # quadratic, it would outlast the test's limit


def _fill(message: Message) -> None:
    """Write hostile text into every field that takes any, in every message below."""
    for field in message.DESCRIPTOR.fields:
        value: Any = getattr(message, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            key, kind = field.message_type.fields
            name: Any = f"k{ESCAPE}" if key.type == FieldDescriptor.TYPE_STRING else 1
            value[name] = f"v{ESCAPE}" if kind.type == FieldDescriptor.TYPE_STRING else 1
        elif field.message_type is not None:
            if field.containing_oneof is None or field.is_repeated:
                _fill(value.add() if field.is_repeated else value)
        elif field.type == FieldDescriptor.TYPE_STRING:
            if field.is_repeated:
                value.append(f"r{ESCAPE}")
            else:
                setattr(message, field.name, f"s{ESCAPE}\nnext")


def _texts(message: Message) -> Iterator[str]:
    for field, value in message.ListFields():
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            yield from (text for pair in value.items() for text in pair if isinstance(text, str))
        elif field.message_type is not None:
            for one in value if field.is_repeated else [value]:
                yield from _texts(one)
        elif field.type == FieldDescriptor.TYPE_STRING:
            yield from value if field.is_repeated else [value]


@pytest.mark.parametrize("kind", [pb.Update, pb.ListRunsResponse, pb.ControlReply, pb.Collective, pb.RunStarted])
def test_no_field_of_a_message_is_forgotten(kind: type[Message]) -> None:
    message = kind()
    _fill(message)
    before = list(_texts(message))
    assert before and all("\x1b" in text for text in before)
    make_harmless(message)
    after = list(_texts(message))
    assert len(after) == len(before) and not any(map(ACTS.search, after))
    assert {"\n" in text for text in after} <= {False, True} and all("owned" not in text for text in after)


@pytest.fixture
def hostile(node: Node, tmp_path: Path) -> RunFolder:
    """Give a run of mine in which all text is hostile, known to a daemon with metrics."""
    node.start("--metrics", "127.0.0.1:0")
    default_runs_dir().mkdir(parents=True)
    return plant("text-with-escapes", default_runs_dir(), tmp_path / "secret", tmp_path)


def test_what_commands_print(hostile: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["status"]) == cli.run(["status", "--json"]) == EXIT_OK
    printed = capsys.readouterr()
    assert "text-with-escapes" in printed.out and "mred" in printed.out
    outcome = read_outcome(hostile)
    assert outcome is not None
    shown = [printed.out, printed.err, failure_report(hostile, outcome)]
    assert "redbold" in shown[-1] and "line" in shown[-1]
    for form in ("html", "svg"):
        assert cli.run(["report", hostile.run_id, "-o", str(tmp_path / f"page.{form}")]) == EXIT_OK
        shown.append((tmp_path / f"page.{form}").read_text())
    for command in (
        ["runs"],
        ["runs", "--json"],
        ["logs", hostile.run_id],
        ["why", hostile.run_id],
        ["compare", hostile.run_id],
    ):
        assert cli.run([*command, *[hostile.run_id] * (command[0] == "compare")]) in (EXIT_OK, EXIT_USER), command
        told = capsys.readouterr()
        assert (told.out or told.err) and "Traceback" not in told.err, command
        shown += [re.sub("\x1b\\[[0-9;]*m|\r", "", text) if command[0] == "logs" else text for text in told]
    assert cli.run(["report", hostile.run_id, "--format", "csv", "-o", str(tmp_path / "csv")]) == EXIT_OK
    tables = list((tmp_path / "csv").iterdir())
    assert {"events.csv", "collectives.csv", "metrics.csv"} <= {path.name for path in tables}
    shown += [cell for path in tables for row in csv.reader(path.read_text().splitlines()) for cell in row]
    for text in shown:
        assert not ACTS.search(text), text


async def test_what_the_dashboard_gets(hostile: RunFolder, node: Node) -> None:
    replayed = await anext(Replay(hostile).watch(hostile.run_id))
    client = MonitorClient(daemon_socket())
    live = await anext(client.watch(hostile.run_id))
    runs = await client.list_runs()
    await client.close()
    for message in (replayed, live, *runs):
        texts = list(_texts(message))
        assert texts and not any(map(ACTS.search, texts))
    assert any("owned" not in text and "mred" in text for text in _texts(live))
    log = read_log(hostile, pb.ReadLogRequest(rank=0)).data.decode()
    assert "\x1b" in log and not ACTS.search(clean(log.rstrip("\n")))


async def test_what_the_dashboard_shows(hostile: RunFolder) -> None:
    """Markup in a name, a verdict or a path is text there like any other: it neither colours, nor acts, nor fails."""
    app = DashboardApp(hostile.run_id, recording=Replay(hostile))
    async with app.run_test(size=(160, 50)) as pilot:
        while app.model.snapshot is None:
            await pilot.pause(0.01)
        for key in ("1", "2", "3", "4", "5", "6", "7", "8", "9", "enter", "escape", "question_mark", "escape"):
            await pilot.press(key)
            shown = app.export_screenshot()
            assert not ACTS.search(shown), key
    assert app.return_code in (None, 0)


def test_what_prometheus_gets(hostile: RunFolder, node: Node) -> None:
    run = node.run("live")
    rank = sys.modules["tests.grpc.simulated_ranks"].SimulatedRank(run, 0)
    rank.started().steps(1, 2).add(memory=pb.Memory(rss_bytes=1, by_category_bytes={f"c{ESCAPE}": 1})).publish()
    info = node.monitor.GetDaemonInfo(pb.DaemonInfoRequest(), timeout=TIMEOUT_S)
    url = next(where for where in info.addresses if where.endswith("/metrics"))
    with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
        text = answer.read().decode()
    assert 'category="credbold' in text and not ACTS.search(text)


def test_a_state_is_harmless_whoever_wrote_it(hostile: RunFolder) -> None:
    state = load_state(hostile)
    kept = [state.info, *state.events.all(), *state.metrics.all(10), *state.collectives.summaries()]
    texts = [text for message in kept for text in _texts(message)]
    assert any("red" in text for text in texts) and not any(map(ACTS.search, texts))


class _Liar(rpc.MonitorServicer):
    """A daemon of somebody else, which sends what it likes."""

    def GetSnapshot(self, request: pb.SnapshotRequest, context: grpc.ServicerContext) -> pb.Snapshot:
        update = pb.Update()
        _fill(update)
        update.snapshot.run.run_id = request.run_id or "run-1"
        return update.snapshot


def test_a_daemon_of_somebody_else_sends_no_escapes_and_names_no_files(tmp_path: Path) -> None:
    from concurrent import futures

    server = grpc.server(futures.ThreadPoolExecutor(2))
    rpc.add_MonitorServicer_to_server(_Liar(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        endpoint = Endpoint(f"127.0.0.1:{port}")
        texts = list(_texts(get_snapshot(endpoint, "")))
        assert texts and not any(map(ACTS.search, texts))
        for name in ("../../evil", "/etc/evil", "--plaintext", "a b"):
            with pytest.raises(UserError, match="no run's name"):
                get_snapshot(endpoint, name)
    finally:
        server.stop(None).wait()
    model = RunModel("mine-1")
    model.apply(pb.Update(snapshot=pb.Snapshot(run=pb.RunInfo(run_id="../../evil"))), time.time())
    assert model.run_id == "mine-1"


@pytest.mark.parametrize("error", [UserError(ESCAPE, ESCAPE, ESCAPE), DaemonUnavailable(ESCAPE), NotOwn(ESCAPE, "why")])
def test_an_error_of_a_command_is_harmless_too(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(cli.cli, "main", fail)
    assert cli.run(["status"]) in (EXIT_USER, EXIT_BUG)
    told = capsys.readouterr().err
    assert "redboldback" in told and not ACTS.search(told)
