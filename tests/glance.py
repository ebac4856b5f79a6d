"""`distui status` many times over, without a process for each: what a test waits with until a job is so far."""

from __future__ import annotations

import contextlib
import io
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from distui.core.errors import EXIT_OK
from distui.launcher import cli

LOOK_S = 0.05
PATIENCE_S = 120.0


def wait_for_status(
    environ: Mapping[str, str], condition: Callable[[dict[str, Any]], bool], *run_id: str
) -> dict[str, Any]:
    """Return the first status of a run, or the newest, for which `condition` holds. `environ` has the folders."""
    deadline, printed = time.monotonic() + PATIENCE_S, io.StringIO()
    folders = ("DISTUI_STATE_DIR", "DISTUI_RUNTIME_DIR")
    with pytest.MonkeyPatch.context() as patch:
        for name in folders:
            patch.setenv(name, environ[name])
        while time.monotonic() < deadline:
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
                code = cli.run(["status", "--json", *run_id])
            if code == EXIT_OK and condition(found := json.loads(printed.getvalue())):
                return dict(found)
            time.sleep(LOOK_S)  # nobody tells when the answer changes
    raise AssertionError(f"the condition never held; last status: {printed.getvalue()}")
