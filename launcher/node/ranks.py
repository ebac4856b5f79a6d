"""The rank processes of one node: started, waited for, and ended together.

The names in a rank's environment are torchrun's, so that a script written for it finds what it looks for.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from distui.core.config.schema import ClusterSection
from distui.launcher.job.console import CONSOLE_ENV
from distui.launcher.job.outcome import Ending, signal_name
from distui.launcher.job.processes import GRACE_S, signal_all
from distui.launcher.node.store import STORE_ENV, Standby

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
GIVE_WAY_S = 60.0
"""Once a rank has saved and ended, the others, which have saved with it, have so long to end."""
BACKLOG = 4096
"""Ranks may connect before anybody serves: the kernel keeps so many of them waiting."""


def listen(cluster: ClusterSection) -> socket.socket:
    """Return the socket of the job's store: on loopback for one node, else on every address, for the other nodes.

    Raises: OSError where the port is taken; `cluster.master_port` 0 takes a free one.
    """
    if cluster.nodes == 1:
        return socket.create_server(("127.0.0.1", cluster.master_port), backlog=BACKLOG)
    if socket.has_dualstack_ipv6():
        where, family = ("", cluster.master_port), socket.AF_INET6
        return socket.create_server(where, family=family, dualstack_ipv6=True, backlog=BACKLOG)
    return socket.create_server(("", cluster.master_port), backlog=BACKLOG)


@dataclass(frozen=True, slots=True)
class Place:
    """Which of the job's ranks run on this node, and where all of them meet."""

    node_rank: int
    num_nodes: int
    first_rank: int
    num_ranks: int
    world_size: int
    address: str
    port: int
    attempt: int = 0
    """How often the job was started again before."""
    max_restarts: int = 0

    @classmethod
    def of(cls, cluster: ClusterSection, port: int) -> Place:
        """Return the place that the settings give to this node, where every node has `nproc` ranks."""
        assert isinstance(cluster.nproc, int)
        return cls(
            cluster.node_rank,
            cluster.nodes,
            cluster.node_rank * cluster.nproc,
            cluster.nproc,
            cluster.nproc * cluster.nodes,
            "127.0.0.1" if cluster.nodes == 1 else cluster.master_addr,
            port,
            max_restarts=cluster.max_restarts,
        )

    def environ(self, local_rank: int) -> dict[str, str]:
        """Return what torchrun puts into the environment of a rank."""
        rank = self.first_rank + local_rank
        numbers = {
            "RANK": rank,
            "LOCAL_RANK": local_rank,
            "GROUP_RANK": self.node_rank,
            "ROLE_RANK": rank,
            "WORLD_SIZE": self.world_size,
            "LOCAL_WORLD_SIZE": self.num_ranks,
            "GROUP_WORLD_SIZE": self.num_nodes,
            "ROLE_WORLD_SIZE": self.world_size,
            "MASTER_PORT": self.port,
            "TORCHELASTIC_RESTART_COUNT": self.attempt,
            "TORCHELASTIC_MAX_RESTARTS": self.max_restarts,
        }
        return {
            **{name: str(number) for name, number in numbers.items()},
            "MASTER_ADDR": self.address,
            "ROLE_NAME": "rank",
            "TORCHELASTIC_RUN_ID": "distui",
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is there already: rank 0 must not make another
            "TORCH_NCCL_ASYNC_ERROR_HANDLING": os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
        }


@dataclass(slots=True)
class _Rank:
    rank: int
    process: subprocess.Popen[bytes]


class Ranks:
    """The ranks of this node. All calls come from the thread that made it, which must live as long as they do."""

    def __init__(
        self,
        place: Place,
        arguments: Sequence[str],
        store: socket.socket | None,
        console: str = "",
        *,
        awaits_nodes: bool = False,
        on_ended: Callable[[Ending], None] = lambda ending: None,
        gives_way: Callable[[], bool] | None = None,
    ) -> None:
        """Start them with the script's `arguments`; `store` is the listening socket where rank 0 may serve the store.

        `console` is the `CONSOLE_ENV` of this process: what rank 0 has of the launcher's. With `awaits_nodes` rank 0
        serves other nodes too, and stays until `release`. `on_ended` hears of each rank that has ended.
        With `gives_way` SIGTERM does not end the job where that returns True: then ranks take SIGTERM in the same way,
        whoever sends it, and are ended by SIGHUP.
        """
        self.stopped_by: signal.Signals | None = None
        """The first signal that asked for the end of the job."""
        self.endings: dict[int, Ending] = {}
        self._running: dict[int, _Rank] = {}
        self._on_ended, self._is_released = on_ended, not awaits_nodes
        self._gives_way = gives_way
        self._end_signal = signal.SIGTERM if gives_way is None else signal.SIGHUP
        self._woken, self._wake = os.pipe()
        os.set_blocking(self._wake, False)
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        for signum in STOP_SIGNALS:
            signal.signal(signum, lambda number, frame: self._stop(signal.Signals(number)))
        command = [sys.executable, "-u", "-m", "distui.launcher.node.rank", *arguments]
        self._standby = Standby(store) if store is not None else None
        shared = [int(number) for number in console.split(",") if number]
        held = {signal.SIGUSR1} if gives_way is None else {signal.SIGUSR1, signal.SIGTERM}
        signal.pthread_sigmask(signal.SIG_BLOCK, held)  # until a rank can hear them: it inherits that
        for local_rank in range(place.num_ranks):
            environ = {**os.environ, **place.environ(local_rank)}
            inherited: tuple[int, ...] = ()
            stdin = subprocess.DEVNULL
            if shared and environ["RANK"] == "0":
                stdin, line = shared
                inherited = (line,)
                environ[CONSOLE_ENV] = str(line)
            if self._standby is not None and local_rank == 0:
                mine = self._standby.inherited()
                inherited += mine
                environ[STORE_ENV] = ",".join(str(number) for number in mine)
            process = subprocess.Popen(command, stdin=stdin, env=environ, pass_fds=inherited, start_new_session=True)
            self._running[os.pidfd_open(process.pid)] = _Rank(int(environ["RANK"]), process)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, held)
        if place.attempt >= place.max_restarts:
            for number in shared:
                os.close(number)  # that rank 0 has ended is to be seen at the other end
        if self._standby is not None:
            self._standby.start()

    def release(self) -> None:
        """Let rank 0 go once the other ranks here have ended: those of other nodes have. From any thread."""
        self._is_released = True
        with suppress(OSError):  # they have ended, and `close` was called
            os.write(self._wake, b"r")

    def close(self) -> None:
        """Give up what `wait` needed; the ranks have ended."""
        signal.set_wakeup_fd(-1)
        os.close(self._woken)
        os.close(self._wake)
        if self._standby is not None:
            self._standby.close()

    def wait(self, kill: Callable[[], None], told: Callable[[], None] = lambda: None) -> None:
        """Wait until every rank has ended.

        `told` is called before the others are ended: whoever watches must know that from then on it is us.
        From the first that ends badly, or from a signal to stop, the others have the grace period after their SIGTERM;
        then `kill` is called, which must end whatever is left.
        """
        poll = select.poll()
        for handle in (self._woken, *self._running):
            poll.register(handle, select.POLLIN)
        kill_s: float | None = None
        is_told = False
        while self._running:
            if self._standby is not None and self._is_released and self._only_first():
                self._standby.release()
            left_s = 3600.0 if kill_s is None else max(0.0, kill_s - time.monotonic())
            for handle, _ in poll.poll(left_s * 1000):
                if handle == self._woken:
                    os.read(handle, 64)
                    continue
                poll.unregister(handle)
                self._reap(handle)
            bad = any(ending.bad and not ending.gave_way for ending in self.endings.values())
            if kill_s is None and any(ending.gave_way for ending in self.endings.values()):
                kill_s = time.monotonic() + GIVE_WAY_S
            if not is_told and self._running and (bad or self.stopped_by is not None):
                is_told = True
                told()
                signal_all((one.process.pid for one in self._running.values()), self._end_signal)
                kill_s = time.monotonic() + GRACE_S
            elif kill_s is not None and time.monotonic() >= kill_s:
                kill()
                kill_s = time.monotonic() + GRACE_S

    def _only_first(self) -> bool:
        return [one.rank for one in self._running.values()] == [0]

    def _stop(self, signum: signal.Signals) -> None:
        if signum == signal.SIGTERM and self._gives_way is not None and self._gives_way():
            return
        self.stopped_by = self.stopped_by or signum

    def _reap(self, handle: int) -> None:
        ended = self._running.pop(handle)
        os.close(handle)
        code = ended.process.wait()
        status, signum = (code, None) if code >= 0 else (None, -code)
        how = f"ended with exit status {code}" if signum is None else f"was ended by {signal_name(signum)}"
        print(f"rank {ended.rank} (pid {ended.process.pid}) {how}", flush=True)
        ending = self.endings[ended.rank] = Ending(ended.rank, ended.process.pid, status, signum, time.time())
        self._on_ended(ending)
