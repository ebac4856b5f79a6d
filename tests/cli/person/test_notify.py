"""The end of a run is told: a real command, a real HTTP server, a real terminal; what fails there changes nothing."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

Done = subprocess.CompletedProcess[str]


class Webhook(HTTPServer):
    """Keeps what is posted; answers 500 to /broken."""

    def __init__(self) -> None:
        self.posted: list[tuple[str, dict[str, Any]]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                server.posted.append((self.path, json.loads(body)))
                self.send_response(500 if self.path == "/broken" else 200)
                self.end_headers()

            def log_message(self, *words: object) -> None:
                return

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def webhook() -> Iterator[Webhook]:
    with Webhook() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_command_and_a_webhook_are_told_and_no_secret_is(
    home: Any, distui: Callable[..., Done], webhook: Webhook
) -> None:
    home.script("fails.py", "import os\nraise ValueError('token ' + os.environ['API_TOKEN'])")
    settings = (f"notify.webhook={webhook.url}/a-secret-path", 'notify.command=echo "$NOTIFY_TEXT" > told.txt')
    options = [word for setting in settings for word in ("--set", setting)]
    done = distui("launch", "--nproc", "2", *options, "fails.py", API_TOKEN="hidden-42")
    assert done.returncode == 3
    run = home.run_named("fails")
    ((path, posted),) = webhook.posted
    assert path == "/a-secret-path"
    assert (posted["run"], posted["state"], posted["exit_status"]) == (run.run_id, "failed", 3)
    assert set(posted) == {"text", "content", "run", "host", "state", "exit_status", "failed_rank", "elapsed_s"}
    assert "hidden-42" not in json.dumps(posted)
    told = (home.path / "told.txt").read_text()
    assert told == posted["text"] + "\n" and run.run_id in told and "failed (rank " in told
    assert "a-secret-path" not in run.config.read_text() + run.spec.read_text() + done.stderr


def test_what_fails_to_be_told_is_warned_of(home: Any, distui: Callable[..., Done], webhook: Webhook) -> None:
    home.script("ends.py", "print('done')")
    broken = ("--set", f"notify.webhook={webhook.url}/broken", "--set", "notify.command=exit 7")
    done = distui("launch", "--nproc", "1", *broken, "ends.py")
    assert done.returncode == 0 and done.stdout == "done\n"
    assert "notify.command: the command ended with exit status 7" in done.stderr
    assert "notify.webhook: 127.0.0.1 was not told: HTTPError 500" in done.stderr and "/broken" not in done.stderr
    webhook.posted.clear()
    quiet = ("--set", f"notify.webhook={webhook.url}", "--set", "notify.after_s=3600")
    assert distui("launch", "--nproc", "1", *quiet, "ends.py").returncode == 0 and not webhook.posted
    refused = distui("launch", "--nproc", "1", "--set", "notify.webhook=file:///etc/passwd", "ends.py")
    assert refused.returncode == 2 and "https://host/path" in refused.stderr


def test_a_job_in_the_background_tells_its_end(home: Any, distui: Callable[..., Done], webhook: Webhook) -> None:
    home.script("left.py", "print('done')")
    run_id = distui("launch", "--detach", "--nproc", "1", "left.py", DISTUI_NOTIFY_WEBHOOK=webhook.url).stdout.strip()
    assert distui("logs", run_id, "-f").returncode == 0
    while not webhook.posted:
        continue
    assert webhook.posted[0][1]["run"] == run_id and webhook.posted[0][1]["state"] == "finished"


@pytest.mark.parametrize(("kind", "sign"), [("bell", "\a"), ("osc9", "\x1b]9;rings-")])
def test_the_terminal_rings(home: Any, terminal: Any, kind: str, sign: str) -> None:
    home.script("rings.py", "print('done')")
    words = ("launch", "--no-tui", "--nproc", "1", "--set", f"notify.terminal={kind}", "rings.py")
    shown = terminal(home, *words, DISTUI_TELEMETRY_ENABLED="false")
    shown.until("finished after")
    shown.until(sign)
    assert shown.end() == 0
