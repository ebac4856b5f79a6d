"""`distui cluster check`: what each host has, who reaches whom, and what to mend."""

from __future__ import annotations

from pathlib import Path

import click

from distui.core.errors import EXIT_OK, EXIT_USER


@click.group("cluster", context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Look after the hosts that jobs are started on."""


@command.command("check", short_help="Say what each host has, who reaches whom, and what to mend.")
@click.option("--hosts", metavar="A,B:4", help="The hosts; else those of distui.toml.")
@click.option("--hostfile", metavar="FILE", help="File that lists hosts: `a slots=4` or `a:4` a line.")
@click.option("--include", default="", metavar="A:0,1@B", help="Only these hosts and slots.")
@click.option("--exclude", default="", metavar="A:0,1@B", help="All but these hosts and slots.")
@click.option("--set", "assignments", metavar="KEY=VALUE", multiple=True, help="Any setting, as section.key=value.")
@click.option("--config", "config_path", metavar="FILE", type=click.Path(path_type=Path), help="Else ./distui.toml.")
@click.argument("script", required=False)
def check(
    hosts: str | None,
    hostfile: str | None,
    include: str,
    exclude: str,
    assignments: tuple[str, ...],
    config_path: Path | None,
    script: str | None,
) -> int:
    """Start an agent on each host as a launch would, and print a table of what they have; SCRIPT is compared too.

    Exit status 2 where a job could not start on them: each problem is told with its hosts and what to do.
    """
    from rich.console import Console
    from rich.table import Table

    from distui.core.config.settings import load
    from distui.core.errors import UserError
    from distui.core.hardware.detect import detect
    from distui.core.telemetry.harmless import harmless
    from distui.launcher.cluster.checking import COLUMNS, check_hosts, row
    from distui.launcher.commands.launch import overrides_of
    from distui.launcher.job.launch import decided, hosts_of
    from distui.launcher.job.request import LaunchRequest

    overrides = overrides_of(assignments, {"cluster.hosts": hosts, "cluster.hostfile": hostfile})
    config = decided(load(config_path, overrides).config, detect())
    if not config.cluster.hosts and not config.cluster.hostfile and config.cluster.starter != "slurm":
        raise UserError("no hosts are named", "neither here nor in distui.toml", "distui cluster check --hosts a,b")
    target = [script] if script else []
    request = LaunchRequest(target, overrides, config_path, include=include, exclude=exclude)
    found = check_hosts(config, hosts_of(request, config), target)
    console, table = Console(highlight=False, markup=False), Table(box=None, pad_edge=False)
    for title in COLUMNS:
        table.add_column(title, justify="right" if title in COLUMNS[3:7] else "left", no_wrap=True)
    for member in found.gang.members:
        table.add_row(*(harmless(word) for word in row(member, found.gang.words(member))))
    console.print(table, soft_wrap=True)
    for remark in found.remarks:
        console.print(f"note: {harmless(remark)}", markup=False, soft_wrap=True)
    for problem in found.problems:
        console.print(harmless(problem.report(), lines=True), markup=False, soft_wrap=True)
    if not found.problems:
        console.print(f"{len(found.gang.members)} hosts can train together", markup=False)
    return EXIT_USER if found.problems else EXIT_OK
