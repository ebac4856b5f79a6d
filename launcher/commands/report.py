"""`distui report`: a run on one page, or its telemetry as tables."""

from __future__ import annotations

import time
from pathlib import Path

import click

from distui.core.errors import UserError

FORMATS = ("html", "svg", "csv", "parquet")


@click.command("report", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("run", required=False)
@click.option("--format", "form", type=click.Choice(FORMATS), help="Without it, by the ending of --output; else html.")
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="PATH", help="File, or folder of the tables.")
@click.option("--force", is_flag=True, help="Replace a page that exists.")
def command(run: str | None, form: str | None, output: Path | None, force: bool) -> None:
    """Write RUN on one page (html, svg), or its records as tables (csv, parquet); without RUN, the newest.

    The page stands alone: it can be sent by mail or kept beside the weights.
    """
    from distui.daemon.runs.folders import find_run
    from distui.launcher.job.launch import configured_runs_dir

    folder = find_run(run, configured_runs_dir())
    ending = output.suffix.removeprefix(".") if output is not None else ""
    form = form or (ending if ending in FORMATS else "html")
    if form in ("csv", "parquet"):
        from distui.launcher.report.tables import write_tables

        place = output or Path(f"{folder.run_id}-{form}")
        counts = write_tables(folder, place, form)
        if not counts:
            raise UserError(
                f"{folder.run_id} has no telemetry",
                f"{folder.telemetry} is empty: telemetry.enabled was false, or it was too old to keep",
                "distui report --format html shows what else is known",
            )
        for name, count in counts.items():
            click.echo(f"{place / f'{name}.{form}'}: {count:,} rows")
        return
    place = output or Path(f"{folder.run_id}.{form}")
    if place.exists() and not force:
        raise UserError(f"{place} exists already", "it would be overwritten", "add --force, or name another --output")
    from distui.launcher.report.data import read_report
    from distui.launcher.report.page import html_page, svg_page

    report = read_report(folder, time.time())
    text = html_page(report) if form == "html" else svg_page(report)
    try:
        place.write_text(text, encoding="utf-8")
    except OSError as error:
        why = error.strerror or str(error)
        raise UserError(f"cannot write {place}", why, "name a writable place with --output") from error
    click.echo(str(place))
