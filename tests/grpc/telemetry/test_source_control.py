"""The rank's end of the control bus against a real ZeroMQ ROUTER, as the daemon has one."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from distui.core.paths import control_socket
from distui.core.telemetry import control as control_module
from distui.core.telemetry.control import LATER, ControlCommand, ControlListener, stacks


class Router:
    """The daemon's end: binds, hears hello, sends commands, collects replies."""

    def __init__(self) -> None:
        self.context = zmq.Context()
        self.identity = b""
        self.open()

    def open(self) -> None:
        self.socket = self.context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.bind(f"ipc://{control_socket()}")

    def close(self) -> None:
        self.socket.close()

    def receive(self, type_: str) -> dict[str, Any]:
        while self.socket.poll(20_000):
            self.identity, raw = self.socket.recv_multipart()
            message: dict[str, Any] = json.loads(raw)
            if message["type"] == type_:
                return message
        raise AssertionError(f"no {type_} came")

    def send(self, raw: bytes) -> None:
        self.socket.send_multipart([self.identity, raw])

    def ask(self, verb: str, id_: str = "1", deadline_s: float = 20, **arguments: str) -> dict[str, Any]:
        """Send a command and return its last reply, with the states seen on the way."""
        command = {"id": id_, "verb": verb, "arguments": arguments, "deadline_s": deadline_s}
        self.send(json.dumps(command).encode())
        states = []
        while True:
            reply = self.receive("reply")
            assert reply["id"] == id_
            states.append(reply["state"])
            if reply["state"] != "accepted":
                return {**reply, "states": states}


@pytest.fixture
def router(monkeypatch: pytest.MonkeyPatch) -> Iterator[Router]:
    folder = tempfile.mkdtemp(prefix="dt", dir="/tmp")
    monkeypatch.setenv("DISTUI_RUNTIME_DIR", folder)
    monkeypatch.setattr(control_module, "HELLO_S", 3600.0)  # so it is the connection that makes a rank greet
    found = Router()
    yield found
    found.close()
    found.context.term()
    shutil.rmtree(folder)


@pytest.fixture
def listener(router: Router) -> Iterator[ControlListener]:
    found = ControlListener("run-1", 3, control_socket())
    found.start()
    yield found
    found.close()


def test_hello_says_who_and_bye_comes_last(router: Router, listener: ControlListener) -> None:
    hello = router.receive("hello")
    assert (hello["run_id"], hello["rank"]) == ("run-1", 3) and hello["pid"] and hello["node"]
    listener.close()
    assert router.receive("bye") == {"type": "bye"}


def test_a_restarted_daemon_hears_hello_at_once(router: Router, listener: ControlListener) -> None:
    router.receive("hello")
    for _ in range(2):
        router.close()
        router.open()
        assert router.receive("hello")["rank"] == 3
    assert router.ask("stacks")["state"] == "done"


def test_hello_keeps_coming(router: Router, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_module, "HELLO_S", 0.05)
    listener = ControlListener("run-1", 3, control_socket())
    listener.start()
    assert {router.receive("hello")["rank"] for _ in range(4)} == {3}
    listener.close()


def test_handlers_answer_done_error_or_later(router: Router, listener: ControlListener) -> None:
    later: list[ControlCommand] = []

    def defer(command: ControlCommand) -> Any:
        later.append(command)
        threading.Thread(target=command.done, args=("at step 12",)).start()
        return LATER

    def fail(command: ControlCommand) -> None:
        raise OSError("the disk is full")

    listener.on("checkpoint", defer)
    listener.on("profile", lambda command: f"profiling {command.arguments['steps']} steps")
    listener.on("stop", lambda command: None)
    listener.on("fail", fail)
    router.receive("hello")
    done = router.ask("profile", id_="a", steps="5")
    assert (done["states"], done["message"]) == (["accepted", "done"], "profiling 5 steps")
    assert router.ask("checkpoint", id_="b")["message"] == "at step 12"
    assert router.ask("stop", id_="c")["states"] == ["accepted", "done"]
    failed = router.ask("fail", id_="d")
    assert (failed["state"], failed["message"]) == ("error", "OSError: the disk is full")
    later[0].error("too late to say so")
    unknown = router.ask("dance", id_="e")  # the next reply is this one's: an answered command stays answered
    assert unknown["states"] == ["error"]
    assert unknown["message"] == "unknown verb 'dance'; known: checkpoint, fail, log-level, profile, stacks, stop"


def test_stacks_are_answered_while_a_handler_works(router: Router, listener: ControlListener) -> None:
    go_on = threading.Event()

    def slow_handler(command: ControlCommand) -> str:
        assert go_on.wait(120)
        return "finally"

    listener.on("checkpoint", slow_handler)
    router.receive("hello")
    for id_, deadline_s in (("slow", 20.0), ("behind it", 1e-6)):
        router.send(json.dumps({"id": id_, "verb": "checkpoint", "deadline_s": deadline_s}).encode())
        assert router.receive("reply")["state"] == "accepted"
    found = router.ask("stacks")
    assert found["states"] == ["accepted", "done"] and "slow_handler" in found["payload"]
    go_on.set()
    assert router.receive("reply")["message"] == "finally"
    behind = router.receive("reply")
    assert (behind["id"], behind["state"]) == ("behind it", "error") and "deadline" in behind["message"]


def test_log_level(router: Router, listener: ControlListener) -> None:
    router.receive("hello")
    before = logging.getLogger().level
    try:
        assert router.ask("log-level", level="error")["state"] == "done"
        assert logging.getLogger().level == logging.ERROR
    finally:
        logging.getLogger().setLevel(before)
    assert "known: DEBUG, INFO" in router.ask("log-level", level="loud")["message"]


def test_what_cannot_be_read_is_passed_over(
    router: Router, listener: ControlListener, caplog: pytest.LogCaptureFixture
) -> None:
    router.receive("hello")
    for raw in (b"\xff", b"{", b"[]", b'{"verb": "stop"}', b'{"id": 1, "verb": "stop", "arguments": 3}'):
        router.send(raw)
    assert router.ask("stacks")["state"] == "done"
    assert caplog.text.count("cannot be read") == 5


def test_without_a_daemon_it_starts_and_closes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    listener = ControlListener("run-1", 0, tmp_path / "control.sock")
    listener.start()
    listener.close(timeout_s=10)
    assert not listener._thread.is_alive()


def test_stacks_name_the_threads_the_main_one_first() -> None:
    go_on, ready = threading.Event(), threading.Event()

    def loaded() -> None:
        ready.set()
        go_on.wait(120)

    thread = threading.Thread(target=loaded, name="loader")
    thread.start()
    ready.wait(120)
    text = stacks()
    go_on.set()
    thread.join()
    assert text.startswith("Thread MainThread (native id") and "Thread loader" in text and "in loaded" in text


def test_stacks_come_from_a_rank_whose_main_thread_is_blocked_in_c(router: Router) -> None:
    code = """
        import os, sys
        from pathlib import Path
        from distui.core.config.schema import TelemetrySection
        from distui.core.paths import RunFolder
        from distui.core.telemetry.source import open_source
        source = open_source(5, 1, 8, RunFolder(Path(sys.argv[1])), TelemetrySection())

        def stuck_in_a_collective():
            os.read(os.pipe()[0], 1)

        stuck_in_a_collective()
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(control_socket().parent / "run-2")]
    process = subprocess.Popen(command)
    try:
        hello = router.receive("hello")
        assert (hello["run_id"], hello["rank"], hello["pid"]) == ("run-2", 5, process.pid)
        text = router.ask("stacks")["payload"]
        while "stuck_in_a_collective" not in text:
            text = router.ask("stacks")["payload"]  # it greets before it is stuck
        assert "distui-telemetry" in text and text.startswith("Thread MainThread")
    finally:
        process.kill()
        process.wait()
