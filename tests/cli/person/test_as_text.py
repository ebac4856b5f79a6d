"""What the dashboard shows, opened in a pager and copied, on a real terminal."""

from __future__ import annotations

import base64
from typing import Any

FAILS = "print('its own words', flush=True)\nraise ZeroDivisionError('the data is bad')\n"


def test_errors_and_logs_are_opened_and_copied_by_a_key(home: Any, distui: Any, terminal: Any) -> None:
    home.script("breaks.py", FAILS)
    assert distui("launch", "--nproc", "1", "breaks.py").returncode == 3
    run = home.run_named("breaks").run_id
    watching = terminal(home, "monitor", run, PAGER="sed s/^/paged:/")
    watching.until("1 Overview")
    watching.until("the data is bad")
    watching.type("o")
    watching.until(f"paged:{run}: failed, ")
    assert "ZeroDivisionError: the data is bad" in watching.until("\r\n")
    watching.type("7")
    watching.until("log of rank 0")
    watching.until("its own words")
    watching.type("o")
    watching.until("paged:its own words")
    watching.until("its own words")  # the dashboard is there again
    watching.type("y")
    watching.until("\x1b]52;c;")
    assert base64.b64decode(watching.until("\a")).decode().startswith("its own words\n")
    watching.type("q")
    assert watching.end() == 0
