"""What the dashboard costs on a real terminal of 160x50: the app on a run of 8 ranks, and each widget's full repaint.

    python -m benchmarks.dashboard [--ranks 8] [--hz 8] [--seconds 6] [--repaints 60]

Everything runs under a pseudo-terminal, because a headless app does not encode what it draws. The app watches a daemon
in a process of its own, which tells `--hz` steps a second; CPU is the app's alone, user and system, without its start.
A repaint is new data, layout, drawing, encoding and writing of the widget alone on the screen.
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import json
import math
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

WIDTH, HEIGHT = 160, 50
VIEWS = ("overview", "ranks", "memory", "throughput", "loss", "collectives", "logs", "events")


async def serve(num_ranks: int, hz: float) -> None:
    """Tell a run until SIGTERM, as a daemon would; print the socket."""
    from tests.tui import sample_run
    from tests.tui.fake_daemon import FakeDaemon

    daemon = FakeDaemon()
    daemon.logs = {rank: sample_run.log_text(rank) for rank in range(num_ranks)}
    await daemon.start()
    all_steps = sample_run.sample_update(num_ranks, 2000)
    known = 400
    first = sample_run.sample_update(num_ranks, known)
    daemon.send(first)
    this = asyncio.current_task()
    assert this is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, this.cancel)
    print(daemon.socket, flush=True)
    try:
        while known < len(all_steps.steps):
            await asyncio.sleep(0.5)
            newest = min(len(all_steps.steps), known + max(1, round(hz / 2)))
            update = sample_run.sample_update(num_ranks, 1)
            del update.steps[:], update.events[:], update.metrics[:]
            update.server_time_s = all_steps.steps[newest - 1].time_s
            update.steps.extend(all_steps.steps[known:newest])
            for rank in update.snapshot.ranks:
                rank.step = newest
                rank.loss = update.steps[-1].loss
                rank.last_step.step = newest
            daemon.send(update)
            known = newest
    finally:
        await daemon.close()


@contextmanager
def on_terminal(*arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], int, list[int]]]:
    """Start this file with `arguments` on a terminal of its own; give the process, the terminal, the bytes drawn."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", HEIGHT, WIDTH, 0, 0))
    environ = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor"}
    command = [sys.executable, "-m", "benchmarks.dashboard", *arguments]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environ, start_new_session=True)
    os.close(theirs)
    drawn = [0]

    def drain() -> None:
        try:
            while data := os.read(ours, 1 << 16):
                drawn[0] += len(data)
        except OSError:
            return  # the terminal is closed: the app has ended

    reader = threading.Thread(target=drain, daemon=True)
    reader.start()
    try:
        yield process, ours, drawn
    finally:
        process.terminate()
        process.wait(10)
        reader.join(10)
        os.close(ours)


def cpu_s(process: psutil.Process) -> float:
    """Return the CPU time a process has used."""
    times = process.cpu_times()
    return times.user + times.system


def measure_app(num_ranks: int, hz: float, seconds: float) -> dict[str, dict[str, float]]:
    """Return each view's CPU, as a share of one core, and the bytes it writes to the terminal."""
    arguments = ["--serve", "--ranks", str(num_ranks), "--hz", str(hz)]
    command = [sys.executable, "-m", "benchmarks.dashboard", *arguments]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        socket = server.stdout.readline().strip()
        found = {}
        with on_terminal("--watch", socket) as (child, terminal, drawn):
            process = psutil.Process(child.pid)
            time.sleep(4.0)  # start and first paint are not what is measured
            for number, view in enumerate(VIEWS, start=1):
                os.write(terminal, str(number).encode())
                time.sleep(1.0)
                before, bytes_before, began = cpu_s(process), drawn[0], time.monotonic()
                time.sleep(seconds)
                took_s = time.monotonic() - began
                found[view] = {
                    "cpu_percent_of_a_core": round(100 * (cpu_s(process) - before) / took_s, 1),
                    "bytes_per_s": round((drawn[0] - bytes_before) / took_s),
                }
            found["process"] = {"rss_bytes": process.memory_info().rss}
            os.write(terminal, b"q")
            child.wait(10)
        return found
    finally:
        server.terminate()
        server.wait(10)


def widget_cases() -> dict[str, tuple[Callable[[], Any], Callable[[Any, int], None]]]:
    """Return how each widget is made, and how it is given new data the n-th time."""
    from distui.tui.format import num_bytes, seconds
    from distui.tui.monitor.model import RunModel
    from distui.tui.monitor.views.rank_columns import RANK_COLUMNS, rank_lines
    from distui.tui.widgets.chart import LineChart, Series
    from distui.tui.widgets.heatmap import Heatmap
    from distui.tui.widgets.stack import Bar, StackedBars, StackedColumns
    from distui.tui.widgets.table import LineTable
    from tests.tui import sample_run

    model = RunModel("bench")
    model.apply(sample_run.sample_update(64, 200), 0.0)
    lines = [rank_lines(model, 0.0), rank_lines(model, 5.0)]
    curves = [[math.sin(x / 40 + phase) + 0.1 * math.sin(x) for x in range(500)] for phase in range(4)]
    rows = [[1 + 0.2 * math.sin(step / 9 + rank / 70) for rank in range(1000)] for step in range(150)]
    parts = [[(name, 1.0 + (n + rank) % 5) for n, name in enumerate("abcdef")] for rank in range(40)]

    def chart(widget: LineChart, turn: int) -> None:
        widget.show([Series("loss", range(500), curves[turn % 4], 0)])

    def several(widget: LineChart, turn: int) -> None:
        widget.show([Series(str(n), range(500), curves[(turn + n) % 4], n) for n in range(4)])

    def heatmap(widget: Heatmap, turn: int) -> None:
        shift = turn % 16
        widget.show(range(shift, shift + 134), rows[shift : shift + 134])

    def bars(widget: StackedBars, turn: int) -> None:
        widget.show([Bar(f"rank {n}", parts[(n + turn) % 40], "12.3 GiB") for n in range(40)])

    def columns(widget: StackedColumns, turn: int) -> None:
        widget.show([curve[turn % 8 :] for curve in ([value + 2 for value in values] for values in curves)])

    return {
        "table 64x13": (lambda: LineTable(RANK_COLUMNS, lambda r: r.rank), lambda w, n: w.show(lines[n % 2])),
        "line chart, 500 points": (LineChart, chart),
        "line chart, 4 x 500 points": (LineChart, several),
        "heatmap, 1,000 ranks x 134 steps": (lambda: Heatmap(unit=seconds), heatmap),
        "40 stacked bars": (lambda: StackedBars(unit=num_bytes), bars),
        "stacked columns, 4 x 500 steps": (StackedColumns, columns),
    }


def repaint(name: str, num_repaints: int, report: Path) -> None:
    """Draw one widget alone on the screen again and again; write the milliseconds of CPU of each repaint."""
    from textual.app import App, ComposeResult

    make, give = widget_cases()[name]

    class Alone(App[None]):
        CSS = "Screen > * { height: 1fr; }"

        def compose(self) -> ComposeResult:
            yield make()

        def on_mount(self) -> None:
            self._turn, self._began = 0, 0.0
            self._target = self.screen.children[0]
            self.call_after_refresh(self._next)

        def _next(self) -> None:
            if self._turn == 5:  # styles are cached by now
                self._began = time.process_time()
            if self._turn == 5 + num_repaints:
                took_s = time.process_time() - self._began
                report.write_text(str(1000 * took_s / num_repaints))
                self.exit()
                return
            self._turn += 1
            give(self._target, self._turn)
            self._target.refresh()
            self.call_after_refresh(self._next)

    Alone().run()


def measure_widgets(num_repaints: int) -> dict[str, dict[str, float]]:
    """Return the CPU of one full repaint of each widget, and the bytes it writes."""
    found = {}
    report = Path(f"/tmp/distui-repaint-{os.getpid()}")
    for name in widget_cases():
        try:
            with on_terminal("--widget", name, "--repaints", str(num_repaints), "--report", str(report)) as (
                child,
                _,
                drawn,
            ):
                child.wait(120)
            found[name] = {
                "cpu_ms": round(float(report.read_text()), 1),
                "bytes_per_repaint": round(drawn[0] / (num_repaints + 5)),
            }
        finally:
            report.unlink(missing_ok=True)
    return found


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--hz", type=float, default=8.0, help="steps a second of the run")
    parser.add_argument("--seconds", type=float, default=6.0, help="time on each view")
    parser.add_argument("--repaints", type=int, default=60)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--watch", help=argparse.SUPPRESS)
    parser.add_argument("--widget", help=argparse.SUPPRESS)
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        with suppress(asyncio.CancelledError):
            asyncio.run(serve(options.ranks, options.hz))
    elif options.watch:
        from distui.tui.monitor.app import run_dashboard

        run_dashboard(Path(options.watch), "")
    elif options.widget:
        repaint(options.widget, options.repaints, options.report)
    else:
        app = measure_app(options.ranks, options.hz, options.seconds)
        found = {"size": f"{WIDTH}x{HEIGHT}", "app": app, "widgets": measure_widgets(options.repaints)}
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
