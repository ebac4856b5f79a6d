"""Naming a daemon on another node: the options of the commands that can watch one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from distui.core.errors import UserError

if TYPE_CHECKING:
    from distui.core.telemetry.endpoint import Endpoint

_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.-]+):\d{1,5}")
_PATH = click.Path(path_type=Path)


def remote_options(function: click.decorators.FC) -> click.decorators.FC:
    """Add the options that a daemon on TCP needs."""
    for option in (
        click.option("--plaintext", is_flag=True, help="HOST:PORT speaks no TLS; on loopback only."),
        click.option("--ca", type=_PATH, metavar="FILE", help="Certificate of HOST:PORT, or what signed it."),
        click.option("--token-file", type=_PATH, metavar="FILE", help="Token of HOST:PORT."),
    ):
        function = option(function)
    return function


def remote_and_run(
    names: tuple[str, ...], token_file: Path | None, ca: Path | None, plaintext: bool
) -> tuple[Endpoint | None, str | None]:
    """Return the daemon that `HOST:PORT` names, None for this node's, and the run that is left.

    Raises: UserError for more than one of either, or what cannot be connected to.
    """
    addresses = [name for name in names if _ADDRESS.fullmatch(name)]
    runs = [name for name in names if name not in addresses]
    if len(addresses) > 1:
        raise UserError(
            f"{len(addresses)} daemons were named",
            "one dashboard shows one daemon; a head daemon shows what the others forward to it",
            f"on {addresses[0]}: distui daemon --listen HOST:PORT --accept-runs; "
            f"on the others: distui daemon --forward {addresses[0]}",
        )
    if len(runs) > 1:
        raise UserError(f"{len(runs)} runs were named", "one is shown at a time", f"name one: {runs[0]}")
    run = runs[0] if runs else None
    if not addresses:
        if token_file or ca or plaintext:
            raise UserError(
                "a token, certificate or --plaintext without a daemon to connect to",
                "this node's own daemon is reached over its Unix socket",
                "name the daemon as HOST:PORT, or leave them out",
            )
        return None, run
    from distui.core.telemetry.endpoint import Endpoint

    return Endpoint.tcp(addresses[0], token_file, ca, plaintext), run
