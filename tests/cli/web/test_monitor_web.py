"""`distui monitor --web`: the real server, its dashboards as real processes, over real sockets."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import aiohttp
import psutil
import pyte
import pytest

from distui.core.paths import RunFolder
from distui.daemon.runs.store import RunLog
from distui.launcher import cli
from distui.proto import telemetry_pb2 as pb

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


class Terminal:
    """What a terminal shows after the bytes that a dashboard has written."""

    def __init__(self, width: int, height: int) -> None:
        self.height = height
        self._screen = pyte.Screen(width, height)
        self._stream = pyte.ByteStream(self._screen)

    def feed(self, data: bytes) -> None:
        self._stream.feed(data)

    @property
    def lines(self) -> list[str]:
        return list(self._screen.display)

    def row_of_rank_0(self) -> int:
        """Return the row in which the table of ranks has rank 0, with its node, process, state and step; 0 is none."""
        found = (number for number, line in enumerate(self.lines) if re.match(r"\s+0 +n +7 +\S+ finished +39 ", line))
        return next(found, 0)


class Served:
    """A server that was started, and the address that it printed."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        self.process = process
        self.url = process.stdout.readline().strip()
        self.root = "http://" + urlsplit(self.url).netloc

    def interrupt(self) -> int:
        """Send SIGINT; return the exit status once the server and every process of it are gone."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGINT)
        status = self.process.wait(120)
        assert psutil.wait_procs(children, 10)[1] == []
        return status


@pytest.fixture
def served() -> Iterator[Served]:
    """Serve the replay of a run of one rank that has finished."""
    folder = Path(tempfile.mkdtemp(prefix="dt", dir="/tmp"))
    run = RunFolder(folder / "state" / "runs" / "train-1")
    run.create()
    now_s = time.time()
    spec = {"run_id": "train-1", "name": "train", "strategy": "ZeRO-2", "command": ["train.py"], "config_toml": ""}
    run.spec.write_text(json.dumps({**spec, "world_size": 1, "num_nodes": 1, "started_s": now_s - 60}))
    outcome = {"state": "finished", "exit_status": 0, "message": "", "finished_s": now_s, "failed_rank": None}
    run.outcome.write_text(json.dumps({**outcome, "ranks": []}))
    source = pb.Source(rank=0, node="n", pid=7, incarnation=1)
    batch = pb.Batch(run_id="train-1", run_dir=str(run.path), source=source)
    batch.records.add(seq=1, time_s=now_s - 50, rank_started=pb.RankStarted(world_size=1, device="cpu"))
    for step in range(1, 40):
        batch.records.add(seq=1 + step, time_s=now_s - 50 + step, step=pb.Step(step=step, step_s=1.0, loss=4 / step))
    log = RunLog(run)
    log.append(batch)
    log.close()
    environ = {name: value for name, value in os.environ.items() if not name.startswith("DISTUI_")}
    environ |= {"DISTUI_STATE_DIR": str(folder / "state"), "DISTUI_RUNTIME_DIR": str(folder / "rt")}
    process = subprocess.Popen(
        [sys.executable, "-m", "distui", "monitor", "train", "--web", "--replay"],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    yield Served(process)
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()
    shutil.rmtree(folder)


async def _status(session: aiohttp.ClientSession, url: str, **headers: str) -> int:
    async with session.get(url, headers=headers) as response:
        return response.status


async def _websocket_status(session: aiohttp.ClientSession, url: str, **headers: str) -> int:
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        await session.ws_connect(url, headers=headers)
    return refused.value.status


async def test_a_browser_with_the_token_sees_the_dashboard_and_nobody_else_does(served: Served) -> None:
    assert urlsplit(served.url).hostname == "127.0.0.1"
    # An address without a name has cookies as well, in a browser.
    async with aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True)) as session:
        async with session.get(served.url) as page:
            text = await page.text()
            assert page.status == 200 and page.headers["Cache-Control"] == "no-store"
        assert "https://" not in text and text.count("http://") == 0  # nothing is loaded from elsewhere
        for wrong in (f"{served.root}/", f"{served.url[:-2]}/", f"{served.root}/static/js/textual.js"):
            assert await _status(session, wrong) == 403
        assert await _status(session, f"{served.url}static/js/textual.js") == 200
        assert await _status(session, f"{served.root}/download/0") == 404  # the page's cookie was sent
        # By another name than loopback's: a site whose name was made to point here.
        assert await _status(session, served.url, Host="evil.example") == 403
        assert await _status(session, served.url, Host="localhost:9000") == 200  # through a tunnel

        socket = f"{served.url}ws"
        assert await _websocket_status(session, f"{served.root}/ws") == 403
        assert await _websocket_status(session, f"{served.root}/{'a' * 32}/ws") == 403
        assert await _websocket_status(session, socket, Origin="http://evil.example") == 403
        assert await _websocket_status(session, socket, Host="evil.example") == 403

        async with session.ws_connect(f"{socket}?width=120&height=40", origin=served.root) as websocket:
            screen = Terminal(120, 40)
            while not screen.row_of_rank_0():
                message = await websocket.receive(timeout=180)
                assert message.type is aiohttp.WSMsgType.BINARY, message
                screen.feed(message.data)
            assert "train-1" in screen.lines[0] and "1 Overview" in "".join(screen.lines)
            assert served.interrupt() == 0  # an open tab does not hold it up
    async with aiohttp.ClientSession() as stranger:
        with pytest.raises(aiohttp.ClientConnectorError):
            await stranger.get(served.url)
    assert served.process.stdout is not None and "Traceback" not in served.process.stdout.read()


PAINTED = """new Promise(done => {
    const look = () => {
        const layer = document.querySelector("canvas.xterm-text-layer")
        if (!layer || !layer.width) return requestAnimationFrame(look)
        const [top, tall] = [Math.floor(layer.height * ROW / ROWS), Math.floor(layer.height / ROWS)]
        const drawn = layer.getContext("2d").getImageData(0, top, layer.width, tall)
        const seen = new Set(new Uint32Array(drawn.data.buffer))
        seen.size > 8 ? done(seen.size) : requestAnimationFrame(look)  // letters have edges of many shades
    }
    look()
})"""
"""Resolves when the browser has painted letters into a row of the terminal, with how many colours they have."""

DRAWN = """new Promise(done => {
    const look = () => document.body?.classList.contains("-first-byte") && done(document.title)
    new MutationObserver(look).observe(document, {attributes: true, childList: true, subtree: true})
    look()
})"""
"""Resolves when the page's script says that the dashboard's first bytes have come through the websocket."""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
async def test_chromium_draws_it(served: Served, tmp_path: Path) -> None:
    assert CHROMIUM is not None
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--user-data-dir={tmp_path}"]
    command = [CHROMIUM, *options, "--remote-debugging-port=0", "--window-size=1280,800", "about:blank"]
    browser = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert browser.stderr is not None
    try:
        address = next(line.split()[-1] for line in browser.stderr if line.startswith("DevTools listening on"))
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://{urlsplit(address).netloc}/json/list") as listed:
                page = next(target for target in await listed.json() if target["type"] == "page")
            async with session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0) as tools:

                async def event() -> dict[str, Any]:
                    message: dict[str, Any] = await tools.receive_json(timeout=180)
                    if message.get("method") == "Log.entryAdded":
                        complaints.append(message["params"]["entry"])
                    if message.get("method") == "Network.webSocketCreated":
                        asked = parse_qs(urlsplit(message["params"]["url"]).query)
                        screens.append(Terminal(int(asked["width"][0]), int(asked["height"][0])))
                    if message.get("method") == "Network.webSocketFrameReceived":
                        frame = message["params"]["response"]
                        if frame["opcode"] == 2:
                            screens[-1].feed(base64.b64decode(frame["payloadData"]))
                    return message

                async def call(method: str, **params: object) -> dict[str, Any]:
                    await tools.send_json({"id": 1, "method": method, "params": params})
                    while True:
                        message = await event()
                        if message.get("id") == 1:
                            found: dict[str, Any] = message["result"]
                            return found

                complaints: list[dict[str, Any]] = []
                screens: list[Terminal] = []
                await call("Log.enable")
                await call("Network.enable")
                await call("Page.navigate", url=served.url)
                drawn = await call("Runtime.evaluate", expression=DRAWN, awaitPromise=True)
                assert drawn["result"].get("value") == "distui train-1", drawn
                while not (row := screens[-1].row_of_rank_0()):
                    await event()
                look = PAINTED.replace("ROWS", str(screens[-1].height)).replace("ROW", str(row))
                painted = await call("Runtime.evaluate", expression=look, awaitPromise=True)
                assert painted["result"].get("value", 0) > 8, painted
                # Nothing that the page wanted was refused to it or lay elsewhere.
                assert [entry for entry in complaints if entry["level"] == "error"] == []
                if folder := os.environ.get("DISTUI_TEST_PICTURES"):
                    taken = await call("Page.captureScreenshot")
                    Path(folder, "web.png").write_bytes(base64.b64decode(taken["data"]))
    finally:
        os.killpg(browser.pid, signal.SIGKILL)
        browser.wait()
        browser.stderr.close()


def test_without_the_extra_it_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distui.launcher.commands.monitor.find_spec", lambda name: None)
    assert cli.run(["monitor", "--web"]) == 2
    assert "fix: pip install distui[web]" in capsys.readouterr().err
