"""The rank's end of the control bus: a ZeroMQ DEALER on a side thread, so a hanging main thread can still be asked.

Wire format. One message is one JSON object in UTF-8. The daemon binds a ROUTER at `core.paths.control_socket()` (ipc)
and sees `[identity, json]`, the identity made by ZeroMQ anew for every connection; the rank sends and sees `[json]`.

Rank to daemon:

    {"type": "hello", "run_id": str, "rank": int, "pid": int, "node": str}
    {"type": "reply", "id": <as in the command>, "state": "accepted" | "done" | "error", "message": str, "payload": str}
    {"type": "bye"}

`hello` comes when a connection is up (so at once after a restart of the daemon) and every `HELLO_S` = 5 s as a
keep-alive; who has not been heard for three of them is gone. The latest identity of a (run_id, rank) is the one to use.
`bye` comes when the rank closes its telemetry.

Daemon to rank:

    {"id": str | int, "verb": str, "arguments": {str: str}, "deadline_s": float}

`deadline_s` is seconds from now. A command gets one `accepted`, then one `done` or `error`; or only an `error` where it
cannot be taken. `payload` is text: the stacks. The verbs `stacks` and `log-level` (arguments: `level`) are
answered on the listening thread itself; all others go to the handlers of `ControlListener.on`, one at a time, on a
thread of their own. An unknown verb is an `error` whose message lists the known ones.
"""

from __future__ import annotations

import json
import logging
import os
import socket as sockets
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import zmq

HELLO_S = 5.0
DEFAULT_DEADLINE_S = 30.0
ENGINE_VERBS = ("checkpoint", "profile")
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")

_log = logging.getLogger("distui.telemetry")


class Later:
    """What a handler returns when it answers later, by `ControlCommand.done` or `.error`."""


LATER = Later()


class ControlCommand:
    """One command to this rank, to be answered once, from any thread."""

    def __init__(
        self,
        send: Callable[[dict[str, Any]], None],
        id_: str | int,
        verb: str,
        arguments: dict[str, str],
        deadline: float,
    ) -> None:
        """Answer through `send`; `deadline` is in `time.monotonic()` seconds."""
        self.id, self.verb, self.arguments, self.deadline = id_, verb, arguments, deadline
        self._send = send
        self._answered = threading.Lock()

    def expired(self) -> bool:
        """Tell whether nobody waits for the answer any more."""
        return time.monotonic() > self.deadline

    def accepted(self, message: str = "") -> None:
        """Say that it is being worked on."""
        self._reply("accepted", message)

    def done(self, message: str = "", payload: str = "") -> None:
        """Say that it is done."""
        if self._answered.acquire(blocking=False):
            self._reply("done", message, payload)

    def error(self, message: str) -> None:
        """Say why it is not done."""
        if self._answered.acquire(blocking=False):
            self._reply("error", message)

    def _reply(self, state: str, message: str, payload: str = "") -> None:
        self._send({"type": "reply", "id": self.id, "state": state, "message": message, "payload": payload})


Handler = Callable[[ControlCommand], "str | Later | None"]
"""Gets the command; what it returns is the message of `done` (None: no message), what it raises that of `error`."""


class ControlListener:
    """Registers the rank at the daemon's control bus and answers what comes, until it is closed."""

    def __init__(self, run_id: str, rank: int, socket: Path) -> None:
        """Take whom to register, and where."""
        self._hello = {
            "type": "hello",
            "run_id": run_id,
            "rank": rank,
            "pid": os.getpid(),
            "node": sockets.gethostname(),
        }
        self._socket = socket
        self._handlers: dict[str, Handler] = {}
        self._replies: deque[dict[str, Any]] = deque(maxlen=1024)
        self._waker, self._woken = sockets.socketpair()
        self._waker.setblocking(False)
        self._woken.setblocking(False)
        self._closing = False
        self._commands: SimpleQueue[tuple[Handler, ControlCommand]] = SimpleQueue()
        self._worker: threading.Thread | None = None
        self._thread = threading.Thread(target=self._run, name="distui-control", daemon=True)

    def start(self) -> None:
        """Start the listening thread."""
        self._thread.start()

    def on(self, verb: str, handler: Handler) -> None:
        """Let `handler` answer `verb` from now on, in place of any before it."""
        self._handlers[verb] = handler

    def verbs(self) -> list[str]:
        """Return what can be asked."""
        return sorted({"stacks", "log-level", *self._handlers})

    def close(self, timeout_s: float = 1.0) -> None:
        """Say goodbye and end the thread."""
        self._closing = True
        self._wake()
        self._thread.join(timeout_s)

    def _send(self, message: dict[str, Any]) -> None:
        """Hand a message to the listening thread: a ZeroMQ socket belongs to one thread."""
        self._replies.append(message)
        self._wake()

    def _wake(self) -> None:
        try:
            self._waker.send(b"\0")
        except BlockingIOError:
            pass  # full of wake-ups that are still unread
        except OSError:
            _log.debug("the control bus is closed; a reply was lost")

    def _run(self) -> None:
        import zmq

        context = zmq.Context()
        dealer = context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.LINGER, 200)
        dealer.setsockopt(zmq.IMMEDIATE, 1)  # without a daemon nothing queues up
        dealer.setsockopt(zmq.RECONNECT_IVL, 100)
        dealer.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
        connections = dealer.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
        poller = zmq.Poller()
        for source in (dealer, connections, self._woken.fileno()):
            poller.register(source, zmq.POLLIN)
        dealer.connect(f"ipc://{self._socket}")
        try:
            self._serve(dealer, connections, poller)
        finally:
            dealer.disable_monitor()
            connections.close()
            dealer.close()
            context.term()
            self._waker.close()
            self._woken.close()

    def _serve(self, dealer: zmq.Socket[bytes], connections: zmq.Socket[bytes], poller: zmq.Poller) -> None:
        next_hello = time.monotonic() + HELLO_S
        while not self._closing:
            ready = dict(poller.poll(int(max(0.0, next_hello - time.monotonic()) * 1000) + 1))
            if self._woken.fileno() in ready:
                self._woken.recv(4096)
            if connections in ready:
                connections.recv_multipart()
                next_hello = 0.0
            if dealer in ready:
                self._receive(dealer.recv())
            while self._replies:
                _deliver(dealer, self._replies.popleft())
            if time.monotonic() >= next_hello:
                _deliver(dealer, self._hello)
                next_hello = time.monotonic() + HELLO_S
        _deliver(dealer, {"type": "bye"})

    def _receive(self, raw: bytes) -> None:
        try:
            message = json.loads(raw)
            deadline = time.monotonic() + float(message.get("deadline_s") or DEFAULT_DEADLINE_S)
            command = ControlCommand(
                self._send, message["id"], message["verb"], dict(message.get("arguments") or {}), deadline
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            _log.warning("a control message cannot be read: %s: %s", type(error).__name__, error)
            return
        if command.verb == "stacks":
            command.accepted()
            command.done(payload=stacks())
        elif command.verb == "log-level":
            _set_log_level(command)
        elif handler := self._handlers.get(command.verb):
            command.accepted()
            self._commands.put((handler, command))
            if self._worker is None:
                self._worker = threading.Thread(target=self._work, name="distui-control-worker", daemon=True)
                self._worker.start()
        elif command.verb in ENGINE_VERBS:
            command.error(f"{command.verb} is the engine's, and this script has made no distui.Engine (yet)")
        else:
            command.error(f"unknown verb {command.verb!r}; known: {', '.join(self.verbs())}")

    def _work(self) -> None:
        while True:
            handler, command = self._commands.get()
            _handle(handler, command)


def stacks() -> str:
    """Return the Python stacks of all threads of this process as text, the main thread first."""
    threads = {thread.ident: thread for thread in threading.enumerate()}
    main = threading.main_thread().ident
    parts = []
    for ident, frame in sorted(sys._current_frames().items(), key=lambda found: found[0] != main):
        thread = threads.get(ident)
        name = f"{thread.name} (native id {thread.native_id})" if thread else f"not started by Python (id {ident})"
        parts.append(f"Thread {name}\n{''.join(traceback.format_stack(frame))}")
    return "\n".join(parts)


def _handle(handler: Handler, command: ControlCommand) -> None:
    if command.expired():
        command.error("its deadline passed before its turn came")
        return
    try:
        result = handler(command)
    except Exception as error:  # noqa: BLE001  a handler is the engine's or the user's; what it raises is the answer
        command.error(f"{type(error).__name__}: {error}")
        return
    if not isinstance(result, Later):
        command.done(result or "")


def _set_log_level(command: ControlCommand) -> None:
    level = command.arguments.get("level", "").upper()
    if level not in LEVELS:
        command.error(f"unknown level {level!r}; known: {', '.join(LEVELS)}")
        return
    command.accepted()
    logging.getLogger().setLevel(level)
    command.done(f"the root logger is at {level}")


def _deliver(dealer: zmq.Socket[bytes], message: dict[str, Any]) -> None:
    import zmq

    try:
        dealer.send(json.dumps(message).encode(), zmq.DONTWAIT)
    except zmq.Again:
        _log.debug("no daemon on the control bus; %s not delivered", message["type"])
