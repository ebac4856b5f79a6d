"""The daemon of a host in a job on many: started by the agent, it rolls its ranks up to the daemon above it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from distui.core.paths import JOB_ENV, write_own
from distui.proto import cluster_pb2 as pb

START_S = 30.0
END_S = 3.0


class Roller:
    """One daemon, in folders of its own below the agent's. Its end is this process's end, however that comes."""

    def __init__(self, folder: Path, tunnel: Path) -> None:
        """Keep sockets and secrets in `folder`; `tunnel` is the folder of sockets that lead to the head's daemon."""
        self._folder, self._tunnel = folder, tunnel
        self._process: subprocess.Popen[bytes] | None = None
        self._hold = -1
        self.sockets = tunnel
        """The folder of sockets that ranks are to connect to."""

    def open(self, asked: pb.OpenDaemon, address: str) -> pb.DaemonAt:
        """Start the daemon, `address` being this host's; on failure ranks go on to speak to the head's."""
        self.close()
        try:
            self._start(asked, address)
            return self._told(asked)
        except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
            self.close()
            return pb.DaemonAt(problem=f"{type(error).__name__}: {error}")

    def _start(self, asked: pb.OpenDaemon, address: str) -> None:
        state, runtime, ranks = (self._folder / name for name in ("state", "daemon", "ranks"))
        for folder in (state, runtime, ranks):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        reader, writer = os.pipe()
        held, self._hold = os.pipe()
        words = ["--idle-s", "0", "--node-name", asked.name, "--ready-fd", str(writer), "--hold-fd", str(held)]
        if asked.parent:
            for name, text in (("parent.token", asked.token), ("parent.pem", asked.certificate)):
                write_own(state / name, text)
            words += ["--roll-up", asked.parent, "--forward-token", str(state / "parent.token")]
            words += ["--forward-ca", str(state / "parent.pem")]
        else:
            words += ["--roll-up", f"unix:{self._tunnel / 'daemon.sock'}"]
        if asked.serves:
            name = f"[{address}]" if ":" in address else address
            words += ["--listen", f"{name}:0", "--accept-runs"]
        environ = {**os.environ, "DISTUI_STATE_DIR": str(state), "DISTUI_RUNTIME_DIR": str(runtime)}
        environ.pop(JOB_ENV, None)  # it outlives an attempt, whose processes are ended by this mark
        with open(self._folder / "daemon.log", "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "distui.daemon", *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environ,
                pass_fds=[writer, held],
                start_new_session=True,
            )
        os.close(writer)
        os.close(held)
        import select

        poll = select.poll()
        poll.register(reader, select.POLLIN)
        is_up = bool(poll.poll(START_S * 1000)) and bool(os.read(reader, 1))
        os.close(reader)
        if not is_up:
            last = (self._folder / "daemon.log").read_text(errors="replace").strip().splitlines()[-1:]
            raise RuntimeError(f"its daemon did not start: {last[0] if last else 'it said nothing'}")
        for name, target in (("daemon.sock", runtime), ("control.sock", self._tunnel)):
            with suppress(FileNotFoundError):
                (ranks / name).unlink()
            (ranks / name).symlink_to(target / name)
        self.sockets = ranks

    def _told(self, asked: pb.OpenDaemon) -> pb.DaemonAt:
        if not asked.serves:
            return pb.DaemonAt()
        import grpc

        from distui.proto import telemetry_pb2, telemetry_pb2_grpc

        state = self._folder / "state" / "daemon"
        with grpc.insecure_channel(f"unix:{self._folder / 'daemon' / 'daemon.sock'}") as channel:
            monitor = telemetry_pb2_grpc.MonitorStub(channel)
            info = monitor.GetDaemonInfo(telemetry_pb2.DaemonInfoRequest(), timeout=START_S)
        address = next((one.removeprefix("tls://") for one in info.addresses if one.startswith("tls://")), "")
        if not address:
            raise RuntimeError(f"its daemon does not listen: {json.dumps(list(info.addresses))}")
        token, pem = (state / "token").read_text().strip(), (state / "cert.pem").read_text()
        return pb.DaemonAt(address=address, certificate=pem, token=token)

    def close(self) -> None:
        """End the daemon; what it has is sent on in that time, or stays in its log."""
        self.sockets = self._tunnel
        if self._hold >= 0:
            os.close(self._hold)
            self._hold = -1
        if self._process is not None:
            try:
                self._process.wait(END_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
