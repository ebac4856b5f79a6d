"""The server behind `distui monitor --web`: textual-serve on loopback, behind a token.

    browser ──http, websocket──> Guard ──> textual-serve ──pipes──> `distui monitor RUN`, one process a tab

The token is the first part of every path, so that the page, its files and the websocket carry it without a cookie, and
no other site that the browser has open can name them. Only a download is asked for at the root, by textual-serve's own
script; a cookie for that path alone carries the token there.
"""

from __future__ import annotations

import asyncio
import hmac
import os
import secrets
import shlex
import socket
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp_jinja2
import jinja2
from aiohttp import web
from textual_serve.server import Server

from distui.core.errors import UserError
from distui.daemon.node.processes import raise_file_limit

HOST = "127.0.0.1"
LOOPBACK_NAMES = frozenset({"127.0.0.1", "localhost", "::1"})
"""What a browser may call this machine; with `ssh -L` the port is another one."""

COOKIE = "distui_download"
FONT_SIZES_PX = range(6, 49)
SHUTDOWN_S = 3.0
"""How long the dashboards have to end when the server does."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def listen(port: int) -> socket.socket:
    """Listen on a port of loopback; 0 takes a free one.

    Raises: UserError where the port is taken or not ours to take.
    """
    try:
        return socket.create_server((HOST, port))
    except OSError as error:
        raise UserError(
            f"cannot listen on {HOST}:{port}", error.strerror or str(error), "leave out --port to take a free one"
        ) from error


def is_loopback(netloc: str) -> bool:
    """Whether `HOST[:PORT]` names this machine's loopback."""
    try:
        return urlsplit(f"//{netloc}").hostname in LOOPBACK_NAMES
    except ValueError:
        return False


class DashboardServer(Server):
    """Runs `command`, a Textual app, once for each browser tab that knows the token."""

    def __init__(self, command: Sequence[str], listening: socket.socket, title: str) -> None:
        # `exec`: the shell that textual-serve starts must not stand between it and the app.
        port = listening.getsockname()[1]
        super().__init__(
            f"exec {shlex.join(command)}", HOST, port, title=title, templates_path=Path(__file__).parent.absolute()
        )
        self.token = secrets.token_urlsafe(24)
        self._listening = listening
        self._open: set[asyncio.Task[object]] = set()

    @property
    def url(self) -> str:
        """What to open; whoever knows it may watch."""
        return f"{self.public_url}/{self.token}/"

    def run(self) -> None:
        """Serve until SIGINT or SIGTERM; the dashboards end with it."""
        raise_file_limit()  # every user of this machine may connect, and be silent
        # No access log: it would hold the token.
        web.run_app(
            self._make_app(),
            sock=self._listening,
            print=lambda *_: None,
            access_log=None,
            shutdown_timeout=SHUTDOWN_S,
        )

    async def _make_app(self) -> web.Application:
        inner = web.Application()
        aiohttp_jinja2.setup(inner, loader=jinja2.FileSystemLoader(self.templates_path))
        inner.add_routes(
            [
                web.get("/", self.handle_index),
                web.get("/ws", self.handle_websocket),
                web.static("/static", self.statics_path),
            ]
        )
        app = web.Application(middlewares=[self._guard])
        app.add_subapp(f"/{self.token}", inner)
        app.router.add_get("/download/{key}", self.handle_download)
        app.on_shutdown.append(self.on_shutdown)
        return app

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Refuse who does not know the token, or calls this machine by a name that is not loopback's."""
        # A page of another site can have its name point to 127.0.0.1, but not send another name than its own.
        if not is_loopback(request.host):
            raise web.HTTPForbidden(text=f"Open the address that was printed: {request.host} is not loopback.\n")
        origin = request.headers.get("Origin")
        if origin is not None and urlsplit(origin).netloc != request.host:
            raise web.HTTPForbidden(text="Asked for by a page of another site.\n")
        part = request.path.split("/", 2)[1]
        given = request.cookies.get(COOKIE, "") if part == "download" else part
        if not hmac.compare_digest(given.encode(), self.token.encode()):
            raise web.HTTPForbidden(text="Open the whole address that was printed, with its token.\n")
        return await handler(request)

    async def handle_index(self, request: web.Request) -> web.StreamResponse:
        """Serve the page; everything that it loads comes from this server."""
        asked = request.query.get("fontsize", "")
        context = {
            "title": self.title,
            # The browser may be behind a tunnel: only it knows the port.
            "websocket": f"ws://{request.host}/{self.token}/ws",
            "static": f"/{self.token}/static",
            "font_size": asked if asked.isdecimal() and int(asked) in FONT_SIZES_PX else "15",
        }
        response = aiohttp_jinja2.render_template("dashboard.html.j2", request, context)
        response.headers.update(
            {
                "Content-Security-Policy": (
                    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; font-src 'self'; "
                    f"img-src 'self' data:; connect-src 'self' ws://{request.host}; frame-ancestors 'none'; "
                    "base-uri 'none'; form-action 'none'"
                ),
                "Referrer-Policy": "no-referrer",
                "Cache-Control": "no-store",
            }
        )
        response.set_cookie(COOKIE, self.token, path="/download", httponly=True, samesite="Strict")
        return response

    async def handle_websocket(self, request: web.Request) -> web.WebSocketResponse:
        """Run one dashboard for as long as the tab is open."""
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        try:
            return await super().handle_websocket(request)
        finally:
            self._open.discard(task)

    async def on_shutdown(self, app: web.Application) -> None:
        """End the dashboards: a tab that stays open must not hold the server up."""
        for task in tuple(self._open):
            task.cancel()


def dashboard_command(arguments: Sequence[str]) -> list[str]:
    """Return the command that shows the dashboard of `distui monitor ARGUMENTS` to this process's browser."""
    return [sys.executable, "-m", "distui", "monitor", *arguments, "--served-by", str(os.getpid())]


def tunnel_hint(port: int) -> str | None:
    """Return how to reach the server from the machine that this one is logged in from; None where it is not."""
    if not os.environ.get("SSH_CONNECTION"):
        return None
    return f"on your own machine: ssh -N -L {port}:{HOST}:{port} {socket.gethostname()}, then open it there"
