"""`distui compare`: two or more runs side by side."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

import click

from distui.core.errors import UserError


@click.command("compare", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("runs", nargs=-1, required=True, metavar="RUN RUN...")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), metavar="FILE.html", help="A page with curves instead."
)
@click.option("--force", is_flag=True, help="Replace a page that exists.")
def command(runs: tuple[str, ...], output: Path | None, force: bool) -> None:
    """Put runs side by side: what they were, loss, speed, memory, and the settings that differ."""
    from distui.daemon.runs.folders import find_run
    from distui.launcher.job.launch import configured_runs_dir
    from distui.launcher.report.compare import compared_facts, config_differences, html_of
    from distui.launcher.report.data import read_report

    if len(runs) < 2:
        raise UserError("one run is compared to nothing", f"only {runs[0]} is named", "name two runs or more")
    reports = [read_report(find_run(name, configured_runs_dir()), time.time()) for name in runs]
    if output is not None:
        if output.exists() and not force:
            raise UserError(f"{output} exists already", "it would be overwritten", "add --force, or name another")
        try:
            output.write_text(html_of(reports), encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write {output}", error.strerror or str(error), "name a writable place") from error
        click.echo(str(output))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    for report in reports:
        table.add_column(report.snapshot.run.run_id, overflow="fold")
    for name, cells in compared_facts(reports):
        table.add_row(name, *cells)
    differences = config_differences(reports)
    table.add_section()
    table.add_row("settings", "that differ:" if differences else "are the same")
    for key, cells in differences:
        table.add_row(key, *cells)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 160
    Console(highlight=False, markup=False, width=width).print(table)
