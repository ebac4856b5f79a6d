"""`distui daemon`: the node agent in the foreground, for nodes and service managers."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

_PATH = click.Path(path_type=Path)


@click.command("daemon", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--listen", metavar="HOST:PORT", help="Also serve watchers on this TCP address, with TLS and a token.")
@click.option("--token-file", type=_PATH, metavar="FILE", help="What TCP clients must bring; one is made otherwise.")
@click.option("--tls-cert", type=_PATH, metavar="FILE", help="PEM certificate; one is made otherwise.")
@click.option("--tls-key", type=_PATH, metavar="FILE", help="PEM key of --tls-cert.")
@click.option("--plaintext", is_flag=True, help="No TLS; on loopback only.")
@click.option("--allow-control", is_flag=True, help="Let TCP clients act on jobs; otherwise they only read.")
@click.option("--accept-runs", is_flag=True, help="Be the head of a cluster: take the runs that other daemons forward.")
@click.option("--forward", metavar="HOST:PORT", help="Send this node's runs on to that head daemon.")
@click.option("--forward-token", type=_PATH, metavar="FILE", help="The head's token.")
@click.option("--forward-ca", type=_PATH, metavar="FILE", help="The head's certificate, or what signed it.")
@click.option("--metrics", metavar="HOST:PORT", help="Serve /metrics for Prometheus.")
@click.option("--metrics-token", is_flag=True, help="Ask for the token on loopback too.")
@click.option("--headless", is_flag=True, help="For service managers: never ends when idle.")
@click.option("--print-unit", is_flag=True, help="Print a systemd unit for this command, and do nothing else.")
def command(headless: bool, print_unit: bool, **options: str | Path | bool | None) -> None:
    """Run this node's daemon in the foreground until it is interrupted, or idle for monitor.idle_s.

    `distui launch` starts one by itself where none answers. Start it by hand to watch a node from another one, to put
    several nodes on one dashboard, or to be scraped by Prometheus.
    """
    from distui.core.config.settings import load

    arguments = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            arguments.append(flag)
        elif value not in (None, False):
            arguments += [flag, str(value)]
    if print_unit:
        click.echo(unit_text(arguments), nl=False)
        return
    config = load(None, {}).config
    arguments += ["--idle-s", "0" if headless else str(config.monitor.idle_s)]
    arguments += ["--keep-days", str(config.telemetry.keep_days), "--keep-gib", str(config.telemetry.keep_gib)]
    os.execv(sys.executable, [sys.executable, "-m", "distui.daemon", *arguments])


def unit_text(arguments: list[str]) -> str:
    """Return a systemd unit that runs the daemon with these arguments."""
    from importlib.resources import files

    text = files("distui.daemon.node").joinpath("distui.service").read_text(encoding="utf-8")
    words = [sys.executable, "-m", "distui"]
    quoted = " ".join(f'"{word}"' if " " in word else word for word in (*words, "daemon", "--headless", *arguments))
    return text.replace("@EXEC@ daemon --headless", quoted)
