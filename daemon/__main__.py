"""`python -m distui.daemon [--listen ADDR] [--idle-s S] [--foreground]`: the node's daemon, until a signal or idle."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
from logging.handlers import RotatingFileHandler

os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"  # before grpc is imported

from distui.core.config import MonitorSection
from distui.core.errors import EXIT_OK, DistuiError, UserError
from distui.core.paths import state_dir

LOG_BYTES = 4 << 20


def main() -> int:
    """Serve, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m distui.daemon", description=__doc__)
    parser.add_argument("--listen", metavar="ADDR", help="TCP address; refused in this version")
    parser.add_argument("--idle-s", type=float, default=MonitorSection().idle_s, metavar="S", help="0 is never")
    parser.add_argument("--foreground", action="store_true", help="log to stderr too")
    asked = parser.parse_args()
    try:
        if asked.listen is not None:
            raise UserError(
                f"cannot listen on {asked.listen}",
                "TCP needs TLS and a token, which this version does not have",
                "leave --listen out: the daemon serves its Unix socket; reach it from afar by ssh",
            )
        if asked.idle_s < 0:
            raise UserError(f"--idle-s {asked.idle_s} is negative", "it is a time in seconds", "0 is never")
        _log_to_file(asked.foreground or sys.stderr.isatty())
        from distui.daemon.server import Daemon

        asyncio.run(_serve(Daemon, asked.idle_s))
    except UserError as error:
        print(error.report(), file=sys.stderr)
        return error.exit_status
    except DistuiError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    return EXIT_OK


async def _serve(daemon: type, idle_s: float) -> None:
    await daemon(idle_s).run()


def _log_to_file(stderr_too: bool) -> None:
    folder = state_dir()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        handlers: list[logging.Handler] = [
            RotatingFileHandler(folder / "daemon.log", maxBytes=LOG_BYTES, backupCount=1)
        ]
    except OSError as error:
        raise UserError(
            f"cannot write {folder / 'daemon.log'}", str(error), "set DISTUI_STATE_DIR to a folder that you may write"
        ) from error
    if stderr_too:
        handlers.append(logging.StreamHandler())
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", handlers=handlers)


if __name__ == "__main__":
    sys.exit(main())
