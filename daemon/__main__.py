"""`python -m distui.daemon [--listen ADDR] [--idle-s S] ...`: this node's daemon."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from distui.core.config.schema import MonitorSection, TelemetrySection
from distui.core.errors import EXIT_OK, NotOwn, UserError

if TYPE_CHECKING:
    from distui.daemon.serve.server import DaemonOptions

ENDING_S = 3.0


def main(arguments: list[str] | None = None) -> int:
    """Serve until SIGTERM, SIGINT or idleness; return the exit status."""
    options = _parser().parse_args(arguments)
    os.umask(0o077)
    try:
        return _serve(options)
    except (UserError, NotOwn) as error:
        told = error if isinstance(error, UserError) else error.told()
        print(told.report(), file=sys.stderr)
        return told.exit_status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="distui daemon", description="This node's daemon.")
    add = parser.add_argument
    add("--listen", metavar="HOST:PORT", help="also serve watchers on this TCP address")
    add("--token-file", type=Path, metavar="FILE", help="what TCP clients must bring; without it one is made")
    add("--tls-cert", type=Path, metavar="FILE", help="PEM certificate; without it one is made")
    add("--tls-key", type=Path, metavar="FILE", help="PEM key of --tls-cert")
    add("--plaintext", action="store_true", help="no TLS; on loopback only")
    add("--allow-control", action="store_true", help="let TCP clients act on jobs")
    add("--accept-runs", action="store_true", help="let other daemons forward their runs: be the head of a cluster")
    add("--forward", metavar="HOST:PORT", help="send this node's runs on to that head daemon")
    add("--forward-token", type=Path, metavar="FILE", help="the head's token")
    add("--forward-ca", type=Path, metavar="FILE", help="the head's certificate, or what signed it")
    add("--roll-up", metavar="ADDR", help="HOST:PORT or unix:SOCKET of the daemon above this one, of many nodes")
    add("--node-name", default="", metavar="NAME", help="what the job calls this node, for --roll-up")
    add("--hold-fd", type=int, metavar="FD", help="end once the other end of this pipe is closed")
    add("--metrics", metavar="HOST:PORT", help="serve /metrics for Prometheus; beyond loopback with TLS and the token")
    add("--metrics-token", action="store_true", help="ask for the token on loopback too")
    add("--keep-days", type=float, default=TelemetrySection().keep_days, help="delete older telemetry; 0: never")
    add("--keep-gib", type=float, default=TelemetrySection().keep_gib, help="delete the oldest above this; 0: never")
    add(
        "--idle-s",
        type=float,
        default=MonitorSection().idle_s,
        help="end after so long without runs and watchers; 0: never",
    )
    add("--detach", action="store_true", help="go on in the background, in a session of its own")
    add("--ready-fd", type=int, help="write a line to this descriptor when the daemon answers")
    return parser


def _serve(options: argparse.Namespace) -> int:
    for name in ("idle_s", "keep_days", "keep_gib"):
        if (value := getattr(options, name)) < 0:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} {value:g} is below 0", "it is an amount", "0 means: no limit")
    # Before grpc loads: the daemon never forks, and gRPC's handlers would only print warnings.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    asked = _options(options)
    if options.detach and os.fork():
        os._exit(EXIT_OK)
    if options.detach:
        os.setsid()
    import asyncio

    from distui.daemon.serve.server import claim_node, run_daemon

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    # Who starts a daemon because none answers may meet one that is just ending.
    lock = claim_node(ENDING_S if options.detach else 0.0)

    def ready(socket: Path) -> None:
        if options.ready_fd is not None:
            os.write(options.ready_fd, f"{socket}\n".encode())
            os.close(options.ready_fd)

    try:
        asyncio.run(run_daemon(asked, ready))
    finally:
        os.close(lock)
    return EXIT_OK


def _options(options: argparse.Namespace) -> DaemonOptions:
    """Return what is asked for, refused before anything starts where it cannot be."""
    from distui.daemon.runs.retention import DAY_S, GIB, Retention
    from distui.daemon.serve.server import DaemonOptions

    retention = Retention(options.keep_days * DAY_S, int(options.keep_gib * GIB))
    tcp = metrics = head = parent = None
    if options.listen is None:
        for name in ("allow_control", "accept_runs"):
            if getattr(options, name):
                flag = f"--{name.replace('_', '-')}"
                raise UserError(f"{flag} without --listen", "it is about TCP clients", "add --listen HOST:PORT")
    if options.listen is not None or options.metrics is not None:
        from distui.core.telemetry.endpoint import is_loopback, split_address
        from distui.daemon.serve.security import tcp_options

        files = {
            "token_file": options.token_file,
            "certificate_file": options.tls_cert,
            "key_file": options.tls_key,
        }
        if options.listen is not None:
            tcp = tcp_options(
                options.listen,
                plaintext=options.plaintext,
                control=options.allow_control,
                accept=options.accept_runs,
                **files,
            )
        if options.metrics is not None:
            local = is_loopback(split_address(options.metrics)[0])
            metrics = tcp_options(options.metrics, plaintext=local, **files)
            if local and not options.metrics_token:
                metrics = replace(metrics, token="")
    if options.metrics_token and options.metrics is None:
        raise UserError("--metrics-token without --metrics", "it is about who reads them", "add --metrics HOST:PORT")
    if options.forward is not None:
        from distui.core.telemetry.endpoint import Endpoint, is_loopback, split_address

        head = Endpoint.tcp(
            options.forward,
            options.forward_token,
            options.forward_ca,
            plaintext=options.plaintext and is_loopback(split_address(options.forward)[0]),
        )
    if options.roll_up is not None and options.roll_up.startswith("unix:"):
        from distui.core.telemetry.endpoint import Endpoint

        parent = Endpoint.unix(Path(options.roll_up.removeprefix("unix:")))
    elif options.roll_up is not None:
        from distui.core.telemetry.endpoint import Endpoint

        parent = Endpoint.tcp(options.roll_up, options.forward_token, options.forward_ca)
    return DaemonOptions(options.idle_s, retention, tcp, metrics, head, parent, options.node_name, options.hold_fd)


if __name__ == "__main__":
    sys.exit(main())
