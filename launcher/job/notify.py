"""Tells a person that a job has ended: on the terminal, by a command, by a webhook. What fails there is only warned of.

A webhook is told run, state, ranks and times: neither settings nor environment, and no error's text, which may hold
what a script knows.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from urllib.parse import urlsplit

from distui.core.config.schema import Config, NotifySection
from distui.core.paths import RunFolder
from distui.core.telemetry.harmless import harmless
from distui.launcher.job.outcome import Outcome
from distui.tui.format import duration

COMMAND_S = 30.0
WEBHOOK_S = 10.0
"""For so long the end of the launcher waits for either."""


def without_notify(config: Config) -> Config:
    """Return the settings without those of this room: a webhook's address is a secret, and no rank needs it."""
    return config.model_copy(update={"notify": NotifySection()})


def notify_away(config: Config, run: RunFolder, outcome: Outcome, elapsed_s: float) -> None:
    """Run the command and call the webhook that the settings name; the first node does it for all. Never raises."""
    notify = config.notify
    if config.cluster.node_rank != 0 or elapsed_s < notify.after_s:
        return
    facts = _facts(run, outcome, elapsed_s)
    if notify.command:
        _warn("notify.command", _run(notify.command, facts))
    if notify.webhook:
        _warn("notify.webhook", _post(notify.webhook, facts))


def notify_terminal(config: Config, run: RunFolder, outcome: Outcome, elapsed_s: float) -> None:
    """Ring the terminal's bell, or have the terminal show a message, where stderr is one; not after a Ctrl-C."""
    notify = config.notify
    if notify.terminal == "none" or elapsed_s < notify.after_s or outcome.state == "stopped":
        return
    if sys.stderr.isatty():
        text = str(_facts(run, outcome, elapsed_s)["text"])
        sys.stderr.write("\a" if notify.terminal == "bell" else f"\x1b]9;{text}\a")
        sys.stderr.flush()


def _facts(run: RunFolder, outcome: Outcome, elapsed_s: float) -> dict[str, object]:
    whose = f" (rank {outcome.failed_rank} first)" if outcome.failed_rank is not None else ""
    host = socket.gethostname()
    return {
        "text": harmless(f"{run.run_id} on {host}: {outcome.state}{whose} after {duration(elapsed_s)}"),
        "run": run.run_id,
        "host": host,
        "state": outcome.state,
        "exit_status": outcome.exit_status,
        "failed_rank": outcome.failed_rank,
        "elapsed_s": round(elapsed_s, 1),
    }


def _warn(key: str, problem: str) -> None:
    if problem:
        print(f"distui: {key}: {harmless(problem)}; the job's end is not changed by it", file=sys.stderr, flush=True)


def _run(command: str, facts: dict[str, object]) -> str:
    """Run a line of shell with the facts as NOTIFY_*; return what went wrong, or ""."""
    told = {f"NOTIFY_{name.upper()}": "" if value is None else str(value) for name, value in facts.items()}
    try:
        process = subprocess.Popen(
            ["/bin/sh", "-c", command],
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr.fileno(),
            env={**os.environ, **told},
            start_new_session=True,
        )
    except OSError as error:
        return str(error)
    try:
        status = process.wait(COMMAND_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"the command had not ended after {COMMAND_S:.0f} s, and was"
    return f"the command ended with exit status {status}" if status else ""


def _post(url: str, facts: dict[str, object]) -> str:
    """Post the facts as JSON; return what went wrong, without the path of the address, or ""."""
    import http.client
    import urllib.request

    body = json.dumps({**facts, "content": facts["text"]}).encode()  # Slack and its like read text, Discord content
    headers = {"Content-Type": "application/json", "User-Agent": "distui"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=WEBHOOK_S):
            return ""
    except (OSError, ValueError, http.client.HTTPException) as error:  # urllib's own are OSErrors
        what = getattr(error, "reason", None) or error
        status = f" {error.code}" if hasattr(error, "code") else ""
        return f"{urlsplit(url).hostname} was not told: {type(error).__name__}{status}: {what}"
