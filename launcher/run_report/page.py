"""The report as one self-contained page: HTML, or one SVG for a document or a chat."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from distui.launcher.run_report.charts import WIDTH, Chart, bars, heatmap, lines, stacked, text
from distui.launcher.run_report.data import RunReport
from distui.proto import telemetry_pb2 as pb
from distui.tui.format import clock, count, duration, num_bytes, scalar, seconds, si

HEAT_COLUMNS = 200
_PHASES = ("data_wait", "forward", "backward", "exposed_comm", "optimizer")
_NOTABLE = ("checkpoint", "overflow", "dead_rank", "hang", "straggler", "mismatch", "nan_loss", "daemon_restarted")


def charts_of(report: RunReport) -> list[Chart]:
    """Return the charts of a run, each of which says so where it has nothing to show."""
    steps = report.steps
    xs = [float(step.step) for step in steps]
    marks = _marks(report)

    def over(field: str) -> list[tuple[float, float]]:
        return [(float(step.step), getattr(step, field)) for step in steps if step.HasField(field)]

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
            "tokens per second",
            {"tokens/s": [(x, step.tokens_per_s) for x, step in zip(xs, steps, strict=True) if step.tokens_per_s]},
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
        by_category = {name: float(value) for name, value in sorted(rank.memory.by_category_bytes.items())}
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
        ("started", clock(run.started_s)),
        ("lasted", duration(lasted)),
        ("steps", count(last.step if last else None)),
        ("last loss", scalar(last.loss if last and last.HasField("loss") else None)),
        ("tokens/s", si(last.tokens_per_s if last and last.tokens_per_s else None)),
    ]
    if report.snapshot.dropped:
        rows.append(("lost records", count(report.snapshot.dropped)))
    return rows


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

    environment = Environment(loader=PackageLoader("distui.launcher.run_report", ""), autoescape=True)
    values: dict[str, Any] = {
        "run": report.snapshot.run,
        "facts": facts(report),
        "diagnosis": report.snapshot.diagnosis,
        "charts": [Markup(chart.svg()) for chart in charts_of(report)],
        "ranks": [_rank_row(rank) for rank in report.snapshot.ranks],
        "collectives": [_collective_row(row) for row in report.snapshot.collectives],
        "events": [
            (clock(event.time_s), str(event.rank) if event.rank >= 0 else "", event.event.kind, event.event.message)
            for event in report.events
        ],
        "error": report.error,
        "log_tail": report.log_tail,
        "config": report.config_toml,
    }
    return environment.get_template("page.html.j2").render(values)


def _rank_row(rank: pb.RankState) -> tuple[str, ...]:
    def known(name: str) -> float | None:
        return getattr(rank, name) if rank.HasField(name) else None

    return (
        str(rank.rank),
        rank.node or "n/a",
        rank.state,
        count(known("step")),
        scalar(known("loss")),
        seconds(known("step_s")),
        si(known("tokens_per_s")),
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
