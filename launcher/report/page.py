"""The report as one self-contained page: HTML, or one SVG for a document or a chat."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

from distui.core.config.file import flat_of
from distui.launcher.report.charts import WIDTH, Chart, bars, heatmap, lines, stacked, text
from distui.launcher.report.data import RunReport
from distui.proto import telemetry_pb2 as pb
from distui.tui.format import clock, count, duration, lost_time, num_bytes, scalar, seconds, si
from distui.tui.monitor.model import memory_of

HEAT_COLUMNS = 200
_PHASES = ("data_wait", "forward", "backward", "exposed_comm", "optimizer")
_NOTABLE = (
    *("checkpoint", "overflow", "dead_rank", "hang", "straggler", "mismatch", "nan_loss", "daemon_restarted"),
    "restart",
)


def charts_of(report: RunReport) -> list[Chart]:
    """Return the charts of a run, each of which says so where it has nothing to show."""
    steps = report.steps
    xs = [float(step.step) for step in steps]
    marks = _marks(report)

    def over(field: str) -> list[tuple[float, float]]:
        return [(float(step.step), getattr(step, field)) for step in steps if step.HasField(field)]

    column, unit = rate_of(report)
    parts = {name: [getattr(step, f"{name}_s") for step in steps] for name in _PHASES}
    parts["other"] = [
        max(0.0, step.step_s - math.fsum(getattr(step, f"{name}_s") for name in _PHASES)) for step in steps
    ]
    return [
        lines("loss", {"loss": over("loss")}, scalar, marks),
        lines("gradient norm", {"gradient norm": over("grad_norm")}, scalar, marks),
        lines("learning rate", {"learning rate": over("learning_rate")}, scalar),
        stacked(
            "step time, mean of ranks", xs, {name.replace("_", " "): part for name, part in parts.items()}, seconds
        ),
        lines(
            f"{unit} per second",
            {f"{unit}/s": [(x, value) for x, step in zip(xs, steps, strict=True) if (value := getattr(step, column))]},
            si,
        ),
        lines("MFU", {"MFU": over("mfu")}, lambda value: f"{100 * value:.1f}%"),
        _heat(steps),
        _memory(report.snapshot),
    ]


def _marks(report: RunReport) -> list[tuple[float, str]]:
    """Return the steps during which something notable happened."""
    marks = []
    for event in report.events:
        if event.event.kind in _NOTABLE and report.steps:
            during = next((step for step in report.steps if step.time_s >= event.time_s), report.steps[-1])
            marks.append((float(during.step), f"{event.event.kind}: {event.event.message}"))
    return marks


def _heat(steps: Sequence[pb.StepSummary]) -> Chart:
    known = [step for step in steps if step.rank_step_s]
    stretch = max(1, math.ceil(len(known) / HEAT_COLUMNS))
    columns = [_slowest(known[start : start + stretch]) for start in range(0, len(known), stretch)]
    num_ranks = max((len(column) for column in columns), default=0)
    rows = [[column[rank] if rank < len(column) else math.nan for column in columns] for rank in range(num_ranks)]
    first, last = (known[0].step, known[-1].step) if known else (0, 0)
    return heatmap("step time by rank", rows, first, last, seconds)


def _slowest(steps: Sequence[pb.StepSummary]) -> list[float]:
    """Return each rank's slowest of some steps: what stands out must not be averaged away."""
    num_ranks = max(len(step.rank_step_s) for step in steps)
    found = []
    for rank in range(num_ranks):
        values = [step.rank_step_s[rank] for step in steps if rank < len(step.rank_step_s)]
        finite = [value for value in values if math.isfinite(value)]
        found.append(max(finite) if finite else math.nan)
    return found


def _memory(snapshot: pb.Snapshot) -> Chart:
    rows: list[tuple[str, dict[str, float]]] = []
    if planned := dict(snapshot.run.planned_memory_bytes):
        rows.append(("planned", {name: float(value) for name, value in sorted(planned.items())}))
    for rank in snapshot.ranks[:64]:
        by_category = {name: float(size) for name, size in memory_of(rank).parts}
        if by_category:
            rows.append((f"rank {rank.rank}", by_category))
    return bars("memory by category", rows, num_bytes)


def facts(report: RunReport) -> list[tuple[str, str]]:
    """Return what is said in words: what it was, how it went, how it ended."""
    run, last = report.snapshot.run, report.steps[-1] if report.steps else None
    lasted = run.finished_s - run.started_s if run.HasField("finished_s") else None
    rows = [
        ("run", run.run_id),
        ("state", run.state + (f": {run.message}" if run.message else "")),
        ("strategy", run.strategy),
        ("ranks", f"{run.world_size} on {run.num_nodes or 1} node{'s' if run.num_nodes > 1 else ''}"),
        ("command", " ".join(run.command)),
        *_origin(report.provenance),
        ("started", time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(run.started_s)) if run.started_s else "n/a"),
        ("lasted", duration(lasted)),
        ("steps", count(last.step if last else None)),
        ("last loss", scalar(last.loss if last and last.HasField("loss") else None)),
        _rate(report),
    ]
    if run.restarts:
        rows.append(("restarts", count(run.restarts)))
    if report.snapshot.HasField("effort"):
        rows.append(("effective time", lost_time(report.snapshot.effort)))
    if report.snapshot.dropped:
        rows.append(("lost records", count(report.snapshot.dropped)))
    return rows


def _origin(known: dict[str, Any]) -> list[tuple[str, str]]:
    """Return host, folder, versions and commit, each n/a where launch did not write it."""
    git = known["git"]
    changed = {"True": ", with changes that are not committed", "False": ", nothing changed"}.get(git.get("dirty"), "")
    return [
        ("host", ", ".join(filter(None, (known.get("host"), known.get("system")))) or "n/a"),
        ("folder", known.get("folder", "n/a")),
        ("versions", ", ".join(f"{name} {version}" for name, version in known["versions"].items()) or "n/a"),
        ("git", f"{git['commit']}{changed}" if "commit" in git else "n/a"),
    ]


def svg_page(report: RunReport) -> str:
    """Return everything that can be drawn, one below the other, as one SVG."""
    head, y = [], 22
    head.append(text(12, y, f"distui: {report.snapshot.run.run_id}", weight="bold"))
    for name, value in facts(report)[1:]:
        y += 16
        head.append(text(12, y, f"{name}: {value}"))
    for found in report.snapshot.diagnosis:
        y += 16
        head.append(text(12, y, f"{found.kind}: {found.message}", weight="bold"))
    parts, y = [Chart("".join(head), y + 12).svg(0)], y + 16
    for chart in charts_of(report):
        parts.append(chart.svg(y))
        y += chart.height + 8
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y}" viewBox="0 0 {WIDTH} {y}" '
        f'font-family="system-ui,sans-serif" font-size="11" color="#222"><rect width="100%" height="100%" fill="#fff"/>'
        f"{''.join(parts)}</svg>\n"
    )


def html_page(report: RunReport) -> str:
    """Return the page; everything that came from the run is escaped."""
    from jinja2 import Environment, PackageLoader
    from markupsafe import Markup

    environment = Environment(loader=PackageLoader("distui.launcher.report", ""), autoescape=True)
    values: dict[str, Any] = {
        "run": report.snapshot.run,
        "facts": facts(report),
        "diagnosis": report.snapshot.diagnosis,
        "charts": [Markup(chart.svg()) for chart in charts_of(report)],
        "unit": rate_of(report)[1],
        "ranks": [_rank_row(rank, rate_of(report)[0]) for rank in report.snapshot.ranks],
        "collectives": [_collective_row(row) for row in report.snapshot.collectives],
        "events": [
            (clock(event.time_s), str(event.rank) if event.rank >= 0 else "", event.event.kind, event.event.message)
            for event in report.events
        ],
        "error": report.error,
        "log_tail": report.log_tail,
        "settings": settings_of(report),
        "config": report.config_toml,
    }
    return environment.get_template("page.html.j2").render(values)


def settings_of(report: RunReport) -> list[tuple[str, str, str]]:
    """Return each setting that somebody set, with where."""
    values = flat_of(report.config_toml)
    return [(key, str(values.get(key, "n/a")), origin) for key, origin in sorted(report.provenance["origins"].items())]


def rate_of(report: RunReport) -> tuple[str, str]:
    """Return the field of the rate that this run has, and what it counts: samples where there are no tokens."""
    last = report.steps[-1] if report.steps else None
    if last is not None and not last.tokens_per_s and last.samples_per_s:
        return "samples_per_s", "samples"
    return "tokens_per_s", "tokens"


def _rate(report: RunReport) -> tuple[str, str]:
    column, unit = rate_of(report)
    return f"{unit}/s", si((getattr(report.steps[-1], column) if report.steps else None) or None)


def _rank_row(rank: pb.RankState, rate: str) -> tuple[str, ...]:
    def known(name: str) -> float | None:
        return getattr(rank, name) if rank.HasField(name) else None

    return (
        str(rank.rank),
        rank.node or "n/a",
        rank.state,
        count(known("step")),
        scalar(known("loss")),
        seconds(known("step_s")),
        si(known(rate)),
        num_bytes(known("memory_bytes")),
        rank.error,
    )


def _collective_row(row: pb.CollectiveSummary) -> tuple[str, ...]:
    latest = max(row.lateness_s.items(), key=lambda item: item[1], default=None)
    return (
        row.group,
        row.op,
        count(row.count),
        num_bytes(row.bytes),
        seconds(row.mean_s),
        seconds(row.max_s),
        seconds(row.blocked_s),
        f"rank {latest[0]}, by {seconds(latest[1])}" if latest and latest[1] > 0 else "n/a",
    )
