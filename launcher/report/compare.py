"""Runs side by side: what they were, how they went, and which settings differ."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from distui.core.config.file import flat_of
from distui.launcher.report.charts import Chart, lines
from distui.launcher.report.data import RunReport
from distui.launcher.report.page import facts, rate_of
from distui.proto import telemetry_pb2 as pb
from distui.tui.format import num_bytes, scalar, seconds, si
from distui.tui.monitor.model import memory_of

Row = tuple[str, list[str]]
"""What it is, and one cell a run."""
NA = "n/a"


def compared_facts(reports: Sequence[RunReport]) -> list[Row]:
    """Return the facts of all runs, and the numbers that are compared."""
    told = [dict(facts(report)) for report in reports]
    names = dict.fromkeys(name for found in told for name in found if name not in ("run", "tokens/s", "samples/s"))
    rows = [(name, [found.get(name) or NA for found in told]) for name in names]
    return [
        *rows,
        ("least loss", [scalar(_least(_values(report, "loss"))) for report in reports]),
        ("median step", [seconds(_median(_values(report, "step_s"))) for report in reports]),
        ("median rate", [_rate(report) for report in reports]),
        ("fullest rank", [num_bytes(_most_memory(report)) for report in reports]),
    ]


def config_differences(reports: Sequence[RunReport]) -> list[Row]:
    """Return the settings that are not the same in all runs."""
    settings = [flat_of(report.config_toml) for report in reports]
    keys = dict.fromkeys(key for found in settings for key in found)
    rows = [(key, [str(found.get(key, NA)) for found in settings]) for key in keys]
    return [row for row in rows if len(set(row[1])) > 1]


def compared_charts(reports: Sequence[RunReport]) -> list[Chart]:
    """Return loss, rate and step time of all runs on common axes."""

    def series(field: str) -> dict[str, Sequence[tuple[float, float]]]:
        return {
            report.snapshot.run.run_id: [(float(step.step), getattr(step, field)) for step in _with(report, field)]
            for report in reports
        }

    column, unit = rate_of(reports[0])
    return [
        lines("loss", series("loss"), scalar),
        lines(f"{unit} per second", series(column), si),
        lines("step time", series("step_s"), seconds),
    ]


def html_of(reports: Sequence[RunReport]) -> str:
    """Return the comparison as one page; everything that came from the runs is escaped."""
    from jinja2 import Environment, PackageLoader
    from markupsafe import Markup

    environment = Environment(loader=PackageLoader("distui.launcher.report", ""), autoescape=True)
    return environment.get_template("compare.html.j2").render(
        runs=[report.snapshot.run.run_id for report in reports],
        facts=compared_facts(reports),
        settings=config_differences(reports),
        charts=[Markup(chart.svg()) for chart in compared_charts(reports)],
    )


def _with(report: RunReport, field: str) -> list[pb.StepSummary]:
    optional = field in ("loss", "grad_norm")
    return [step for step in report.steps if (step.HasField(field) if optional else getattr(step, field))]


def _values(report: RunReport, field: str) -> list[float]:
    return [getattr(step, field) for step in _with(report, field)]


def _least(values: Sequence[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return min(finite) if finite else None


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _rate(report: RunReport) -> str:
    column, unit = rate_of(report)
    return si(_median(_values(report, column)), f"{unit}/s")


def _most_memory(report: RunReport) -> int | None:
    uses = [memory_of(rank) for rank in report.snapshot.ranks]
    return max((use.peak or use.total or 0 for use in uses), default=0) or None
