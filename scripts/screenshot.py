"""Draw the dashboard of a run headless and write it as an SVG, for the documentation.

    python scripts/screenshot.py RUN_ID OUT.svg [--size 120x34] [--view 1] [--min-step 0]

It is the app that `distui monitor` shows, on what the daemon of this user tells of the run.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

from distui.core.paths import daemon_socket
from distui.tui.monitor.app import VIEWS, DashboardApp

_TRY_S = 0.1


def _size(text: str) -> tuple[int, int]:
    width, height = text.split("x")
    return int(width), int(height)


async def draw(run_id: str, size: tuple[int, int], view: int, min_step: int, theme: str, timeout_s: float) -> str:
    """Return the dashboard of the run as an SVG, once the run is at `min_step` or has ended.

    Raises: TimeoutError where the daemon says nothing of the run, or not that step, within `timeout_s`.
    """
    app = DashboardApp(run_id, socket=daemon_socket(), theme=theme)
    async with app.run_test(size=size) as pilot:

        async def reach() -> None:
            while not (app.model.ended or (app.model.history.last("step") or -1) >= min_step):
                await pilot.pause(_TRY_S)

        await asyncio.wait_for(reach(), timeout_s)
        app.action_view(view - 1)
        # One more tick for what a view reads on its own: a log.
        await pilot.pause(1.0)
        svg = app.export_screenshot(title=f"distui monitor {app.model.run_id}")
        await app.action_quit()
    return svg


def main() -> int:
    """Write the picture; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run_id")
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", type=_size, default=(120, 34), help="columns x lines (120x34)")
    parser.add_argument("--view", type=int, choices=range(1, len(VIEWS) + 1), default=1)
    parser.add_argument("--min-step", type=int, default=0, help="wait until the run has made this step")
    parser.add_argument("--theme", default="textual-dark")
    parser.add_argument("--timeout-s", type=float, default=120.0)
    given = parser.parse_args()
    try:
        svg = asyncio.run(draw(given.run_id, given.size, given.view, given.min_step, given.theme, given.timeout_s))
    except asyncio.TimeoutError:
        print(f"the daemon told nothing of {given.run_id} at step {given.min_step} or later", file=sys.stderr)
        return 1
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(svg)
    return 0


if __name__ == "__main__":
    sys.exit(main())
