"""`distui daemon`: the node agent in the foreground, for nodes and service managers."""

from __future__ import annotations

import os
import sys

import click


@click.command("daemon", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--listen", metavar="ADDR", help="Also listen on this address.")
@click.option("--headless", is_flag=True, help="For service managers: never ends when idle.")
def command(listen: str | None, headless: bool) -> None:
    """Run this node's daemon in the foreground until it is interrupted, or idle for monitor.idle_s."""
    from distui.core.settings import load

    arguments = [sys.executable, "-m", "distui.daemon"]
    if listen is not None:
        arguments += ["--listen", listen]
    idle_s = "0" if headless else str(load(None, {}).config.monitor.idle_s)
    os.execv(sys.executable, [*arguments, "--idle-s", idle_s])
