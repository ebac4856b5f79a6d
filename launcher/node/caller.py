"""A host that calls its supervisor, in a pod or a queued job: `python -m distui.launcher.node.caller ADDR NAME FOLDER`.

FOLDER has `token` and `cert.pem` of the job. Each call takes one command, starts it, and carries its streams; when it
has ended the next call is made, so that a restart needs no new pod. SIGTERM goes on to the command, which then saves.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import FrameType

from distui.launcher.job.processes import die_with_parent

FRAME = struct.Struct("!cI")
MAX_FRAME_BYTES = 64 << 20
RETRY_S = 1.0
GIVE_UP_S = 600.0
"""A supervisor that has not answered for so long does not come any more."""
CONNECT_S = 10.0
PIECE_BYTES = 1 << 16


class Caller:
    """Calls until it is told to leave."""

    def __init__(self, address: str, name: str, folder: Path) -> None:
        host, _, port = address.rpartition(":")
        self._where, self._name = (host.strip("[]"), int(port)), name
        self._token = (folder / "token").read_text().strip()
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._context.check_hostname = False  # it is known by this very certificate
        self._context.load_verify_locations(folder / "cert.pem")
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._told_to_end = False

    def on_signal(self, signum: int, frame: FrameType | None = None) -> None:
        """Pass SIGTERM, by which this host is taken away, to the command; without one, end."""
        self._told_to_end = True
        if self._process is None:
            sys.exit(128 + signum)
        self._process.send_signal(signum)

    def run(self) -> int:
        """Call, again and again; return the exit status."""
        since_s = time.monotonic()
        while True:
            try:
                plain = socket.create_connection(self._where, CONNECT_S)
                with plain, self._context.wrap_socket(plain) as call:
                    call.settimeout(None)
                    if (status := self._serve(call)) is not None:
                        return status
                since_s = time.monotonic()
            except OSError as error:
                if time.monotonic() - since_s > GIVE_UP_S or self._told_to_end:
                    print(f"distui: {self._where[0]}:{self._where[1]} does not answer: {error}", flush=True)
                    return 1
            time.sleep(RETRY_S)  # nobody can say when the other side is up

    def _send(self, call: ssl.SSLSocket, kind: bytes, data: bytes) -> None:
        with self._lock:
            call.sendall(FRAME.pack(kind, len(data)) + data)

    def _serve(self, call: ssl.SSLSocket) -> int | None:
        """Serve one call; return the exit status where it says to leave."""
        self._send(call, b"h", json.dumps({"token": self._token, "name": self._name}).encode())
        threads: list[threading.Thread] = []
        process: subprocess.Popen[bytes] | None = None
        try:
            while True:
                kind, data = self._receive(call)
                if kind == b"l":
                    status: int = struct.unpack("!i", data)[0]
                    return status
                if kind == b"c" and process is None:
                    process = self._process = subprocess.Popen(
                        json.loads(data),
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.PIPE,
                        start_new_session=True,
                    )
                    threads = [threading.Thread(target=self._carry, args=(call, process), daemon=True)]
                    threads[0].start()
                elif kind == b"k" and process is not None:
                    process.kill()
                elif kind in b"iz" and process is not None and process.stdin is not None:
                    _give(process, data if kind == b"i" else None)
        except EOFError:
            return None
        finally:
            if process is not None:
                _give(process, None)  # it sees that its session has ended, and ends
                process.wait()
                self._process = None
            for thread in threads:
                thread.join()

    def _receive(self, call: ssl.SSLSocket) -> tuple[bytes, bytes]:
        kind, length = FRAME.unpack(_exactly(call, FRAME.size))
        if length > MAX_FRAME_BYTES:
            raise EOFError
        return kind, _exactly(call, length)

    def _carry(self, call: ssl.SSLSocket, process: subprocess.Popen[bytes]) -> None:
        """Send what the command writes, then how it ended."""

        def pump(kind: bytes, descriptor: int) -> None:
            try:
                while data := os.read(descriptor, PIECE_BYTES):
                    self._send(call, kind, data)
            except OSError:
                pass  # the call has ended: the command is ended too

        assert process.stdout is not None and process.stderr is not None
        other = threading.Thread(target=pump, args=(b"e", process.stderr.fileno()), daemon=True)
        other.start()
        pump(b"o", process.stdout.fileno())
        other.join()
        status = process.wait()
        try:
            self._send(call, b"x", struct.pack("!i", status))
            call.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # nobody is there to hear it


def _give(process: subprocess.Popen[bytes], data: bytes | None) -> None:
    """Write to a command's stdin, or end it."""
    assert process.stdin is not None
    try:
        if data is None:
            process.stdin.close()
        else:
            process.stdin.write(data)
            process.stdin.flush()
    except OSError:
        pass  # it has ended: its end is told


def _exactly(call: ssl.SSLSocket, length: int) -> bytes:
    found = bytearray()
    while len(found) < length:
        try:
            data = call.recv(length - len(found))
        except OSError as error:
            raise EOFError from error
        if not data:
            raise EOFError
        found += data
    return bytes(found)


def call(where: str, name: str, token: bytes, certificate: bytes) -> int:
    """Call `where` as the host `name` until told to leave, in a process of its own; return its exit status.

    For whatever runs a Python function elsewhere, such as a job of submitit.
    """
    with tempfile.TemporaryDirectory(prefix="distui-") as folder:
        for file, data in (("token", token), ("cert.pem", certificate)):
            path = Path(folder) / file
            path.touch(0o600)
            path.write_bytes(data)
        # Bound to this process: whoever ends it, or its node, means the agent too.
        command = [sys.executable, "-m", "distui.launcher.node.caller", where, name, folder, str(os.getpid())]
        process = subprocess.Popen(command)
        try:
            return process.wait()
        finally:
            process.terminate()


def main() -> None:
    """Call until told to leave."""
    address, name, folder, *parent = sys.argv[1:]
    if parent:
        die_with_parent(int(parent[0]), signal.SIGKILL)
    caller = Caller(address, name, Path(folder))
    signal.signal(signal.SIGTERM, caller.on_signal)
    sys.exit(caller.run())


if __name__ == "__main__":
    main()
