"""What the dashboard costs on a real terminal of 160x50: the app on a run of 8 ranks, and each widget's full repaint.

    python -m benchmarks.dashboard [--ranks 8 1024] [--hz 1] [--seconds 6] [--repaints 60] [--beside CHECKOUT]
    chrt -r 10 python -m benchmarks.dashboard ...    where others work too: keys then tell of the app alone

Everything runs under a pseudo-terminal, because a headless app does not encode what it draws. The app watches a daemon
in a process of its own, which tells `--hz` steps a second, and the state of all ranks twice a second; CPU is the app's
alone, user and system, without its start. A key's answer is timed from the key to the first text that only the answer
has. A repaint is new data, layout, drawing, encoding and writing of the widget alone on the screen. `--beside` measures
the dashboard of another checkout in the same run, view by view in turns.

Goals: at most 5% of a core in any view at 8 ranks and 1 step/s, 15% at 1,024 ranks; keys answered within 100 ms.
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
import statistics
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
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
    owed = 0.0
    this = asyncio.current_task()
    assert this is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, this.cancel)
    print(daemon.socket, flush=True)
    try:
        while known < len(all_steps.steps):
            await asyncio.sleep(0.5)
            owed += hz / 2
            newest = min(len(all_steps.steps), known + int(owed))
            owed -= int(owed)
            update = sample_run.sample_update(num_ranks, 1)
            del update.steps[:], update.events[:], update.metrics[:]
            update.server_time_s = all_steps.steps[newest - 1].time_s
            update.steps.extend(all_steps.steps[known:newest])
            for rank in update.snapshot.ranks:
                rank.step = newest
                rank.loss = all_steps.steps[newest - 1].loss
                rank.last_step.step = newest
            daemon.send(update)
            known = newest
    finally:
        await daemon.close()


class Screen:
    """A process on a terminal of its own, and what it draws."""

    def __init__(self, root: Path, *arguments: str) -> None:
        """Start this file with `arguments`, on the distui of the checkout at `root`."""
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", HEIGHT, WIDTH, 0, 0))
        environ = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor", "PYTHONPATH": str(root)}
        command = [sys.executable, str(ROOT / "benchmarks" / "dashboard.py"), *arguments]
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=environ, start_new_session=True, cwd=root
        )
        os.close(theirs)
        self.num_bytes = 0
        self._since_key = b""
        self._waited_for: bytes | None = None
        self._answered = threading.Event()
        self._answered_s = 0.0
        self._lock = threading.Lock()
        self._reader = threading.Thread(target=self._drain, daemon=True)
        self._reader.start()

    def _drain(self) -> None:
        with suppress(OSError):  # the terminal is closed: the app has ended
            while data := os.read(self._ours, 1 << 16):
                now_s = time.monotonic()
                with self._lock:
                    self.num_bytes += len(data)
                    self._since_key += data
                    if self._waited_for is not None and self._waited_for in self._since_key:
                        self._waited_for, self._answered_s = None, now_s
                        self._answered.set()

    def press(self, key: str) -> None:
        """Press a key."""
        os.write(self._ours, key.encode())

    def answer_s(self, key: str, text: str) -> float:
        """Press a key and return the seconds until `text` is drawn."""
        with self._lock:
            self._since_key, self._waited_for = b"", text.encode()
            self._answered.clear()
        began_s = time.monotonic()
        self.press(key)
        if not self._answered.wait(30):
            raise SystemExit(f"{key!r} was not answered by {text!r} in 30 s")
        return self._answered_s - began_s

    def close(self) -> None:
        """End the process."""
        self.process.terminate()
        self.process.wait(10)
        self._reader.join(10)
        os.close(self._ours)


def cpu_s(process: psutil.Process) -> float:
    """Return the CPU time a process has used."""
    times = process.cpu_times()
    return times.user + times.system


ANSWERS = {
    "2": "step time by rank",
    "3": "in numbers",
    "4": "where the time goes",
    "5": "gradient norm",
    "6": "blocked over all ranks",
    "7": "log of rank",
    "8": "diagnosis",
    "1": "the fullest",
}
"""Keys, and what is drawn in answer to them."""


def measure_app(num_ranks: int, hz: float, seconds: float, roots: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Return, for each checkout, each view's CPU as a share of one core, the bytes it writes, and how keys answer."""
    arguments = ["--serve", "--ranks", str(num_ranks), "--hz", str(hz)]
    command = [sys.executable, "-m", "benchmarks.dashboard", *arguments]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert server.stdout is not None
    screens: dict[str, Screen] = {}
    try:
        socket = server.stdout.readline().strip()
        screens = {str(root): Screen(root, "--watch", socket) for root in roots}
        processes = {name: psutil.Process(screen.process.pid) for name, screen in screens.items()}
        found: dict[str, dict[str, Any]] = {name: {} for name in screens}
        time.sleep(6.0)  # start and first paint are not what is measured
        for number, view in enumerate(VIEWS, start=1):
            for screen in screens.values():
                screen.press(str(number))
            time.sleep(1.0)
            began = {
                name: (cpu_s(processes[name]), screen.num_bytes, time.monotonic()) for name, screen in screens.items()
            }
            time.sleep(seconds)
            for name, screen in screens.items():
                before_s, bytes_before, began_s = began[name]
                took_s = time.monotonic() - began_s
                found[name][view] = {
                    "cpu_percent_of_a_core": round(100 * (cpu_s(processes[name]) - before_s) / took_s, 1),
                    "bytes_per_s": round((screen.num_bytes - bytes_before) / took_s),
                }
        for name, screen in screens.items():
            of_key: dict[str, list[float]] = {key: [] for key in ANSWERS}
            for turn in range(5):
                for key, text in ANSWERS.items():
                    time.sleep(0.11 + 0.07 * turn)  # at several moments between two ticks
                    of_key[key].append(1000 * screen.answer_s(key, text))
            times = [value for values in of_key.values() for value in values]
            found[name]["keys"] = {
                "median_ms": round(statistics.median(times), 1),
                "worst_ms": round(max(times), 1),
                "median_ms_of_view": {
                    VIEWS[int(key) - 1]: round(statistics.median(values), 1) for key, values in of_key.items()
                },
                "over_100_ms": f"{sum(value > 100 for value in times)} of {len(times)}",
            }
            found[name]["process"] = {"rss_bytes": processes[name].memory_info().rss}
        return found
    finally:
        for screen in screens.values():
            screen.close()
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
        screen = Screen(ROOT, "--widget", name, "--repaints", str(num_repaints), "--report", str(report))
        try:
            screen.process.wait(120)
            found[name] = {
                "cpu_ms": round(float(report.read_text()), 1),
                "bytes_per_repaint": round(screen.num_bytes / (num_repaints + 5)),
            }
        finally:
            screen.close()
            report.unlink(missing_ok=True)
    return found


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 1024])
    parser.add_argument("--hz", type=float, default=1.0, help="steps a second of the run")
    parser.add_argument("--seconds", type=float, default=6.0, help="time on each view")
    parser.add_argument("--repaints", type=int, default=60, help="of each widget alone; 0 leaves them out")
    parser.add_argument("--beside", type=Path, nargs="*", default=[], help="other checkouts, measured in the same run")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--watch", help=argparse.SUPPRESS)
    parser.add_argument("--widget", help=argparse.SUPPRESS)
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        with suppress(asyncio.CancelledError):
            asyncio.run(serve(options.ranks[0], options.hz))
    elif options.watch:
        from distui.tui.monitor.app import run_dashboard

        run_dashboard(Path(options.watch), "")
    elif options.widget:
        repaint(options.widget, options.repaints, options.report)
    else:
        roots = [ROOT, *(path.resolve() for path in options.beside)]
        found: dict[str, Any] = {"size": f"{WIDTH}x{HEIGHT}", "steps_per_s": options.hz}
        for num_ranks in options.ranks:
            found[f"{num_ranks} ranks"] = measure_app(num_ranks, options.hz, options.seconds, roots)
        if options.repaints:
            found["widgets"] = measure_widgets(options.repaints)
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
