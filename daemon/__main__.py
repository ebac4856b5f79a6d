"""`python -m distui.daemon [--listen ADDR] [--idle-s S]`: this node's daemon."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

from distui.core.config import MonitorSection
from distui.core.errors import EXIT_OK, UserError

ENDING_S = 3.0


def main(arguments: list[str] | None = None) -> int:
    """Serve until SIGTERM, SIGINT or idleness; return the exit status."""
    parser = argparse.ArgumentParser(prog="distui daemon", description="This node's daemon.")
    parser.add_argument("--listen", metavar="ADDR", help="also listen on this TCP address")
    parser.add_argument(
        "--idle-s",
        type=float,
        default=MonitorSection().idle_s,
        help="end after so long without runs and watchers; 0: never",
    )
    parser.add_argument("--detach", action="store_true", help="go on in the background, in a session of its own")
    parser.add_argument("--ready-fd", type=int, help="write a line to this descriptor when the daemon answers")
    options = parser.parse_args(arguments)
    os.umask(0o077)
    try:
        return _serve(options)
    except UserError as error:
        print(error.report(), file=sys.stderr)
        return error.exit_status


def _serve(options: argparse.Namespace) -> int:
    if options.listen is not None:
        raise UserError(
            f"the daemon cannot listen on {options.listen}",
            "TCP needs TLS and a token, which are not available in this version",
            "leave --listen out: on this node everything goes over its Unix socket",
        )
    if options.idle_s < 0:
        raise UserError(f"--idle-s {options.idle_s:g} is below 0", "it is a time in seconds", "0 means: never end")
    if options.detach and os.fork():
        os._exit(EXIT_OK)
    if options.detach:
        os.setsid()
    # Before grpc loads: the daemon never forks, and gRPC's handlers would only print warnings.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    import asyncio

    from distui.daemon.server import claim_node, run_daemon

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    # Who starts a daemon because none answers may meet one that is just ending.
    lock = claim_node(ENDING_S if options.detach else 0.0)

    def ready(socket: Path) -> None:
        if options.ready_fd is not None:
            os.write(options.ready_fd, f"{socket}\n".encode())
            os.close(options.ready_fd)

    try:
        asyncio.run(run_daemon(options.idle_s, ready))
    finally:
        os.close(lock)
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
