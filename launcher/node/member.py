"""The agent of one host of a job on many: `python -m distui.launcher.node.member`, started by the supervisor's starter.

What it is to do comes on stdin, a line of JSON, so that no secret is among arguments or in the environment. Then it
dials the supervisor, says what this host has, and starts and ends ranks as it is told, for one attempt after another.
It lives as long as its stdin (the ssh session) and the supervisor's beats: without either it kills its ranks and ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from distui.core.errors import EXIT_BUG, EXIT_OK
from distui.core.paths import JOB_ENV, RunFolder, read_own, remove_own, write_own
from distui.launcher.job.outcome import Ending, last_step, read_rank_error
from distui.launcher.job.processes import (
    AGENT_PID_ENV,
    give_way,
    kill_job,
    own_processes,
    request_preemption,
    stop_requested,
)
from distui.launcher.node.facts import Hello, addresses, gather, interface_of, source_address
from distui.launcher.node.feed import FileFeed
from distui.launcher.node.link import Link
from distui.launcher.node.ranks import BACKLOG, STOP_SIGNALS, Place, Ranks
from distui.launcher.node.roller import Roller
from distui.proto import cluster_pb2 as pb

if TYPE_CHECKING:
    from distui.launcher.memory.copies import HostMemory

FEED_S = 0.3
SHORT = "/tmp"
"""Where sockets' paths stay below the kernel's limit."""
LEAVE_S = 2.0
DIAL_S = 3.0
NONCE = "head"
"""A file in the run's folder on the launching side; who finds it shares that disk."""


class Member:
    """This host's part of the job. Ranks are started and waited for on the main thread, the link has its own."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self._spec, self._run = spec, RunFolder(Path(spec["run_dir"]))
        self._work: queue.SimpleQueue[pb.Start | pb.End] = queue.SimpleQueue()
        self._ranks: Ranks | None = None
        self._store: socket.socket | None = None
        self._probed: socket.socket | None = None
        """Where other hosts tried whether this one answers; the kernel takes their calls."""
        self._attempt = 0
        self._is_ending = False
        self._runtime = Path(tempfile.mkdtemp(prefix="distui-", dir=SHORT if os.access(SHORT, os.W_OK) else None))
        self._roller = Roller(self._runtime / "roll", self._runtime)
        self._hello = self._gather()
        self._memory: HostMemory | None = None
        if spec["memory"]:
            self._keep_in_memory(spec["memory"])
        self._feed = FileFeed(self._run, lambda piece: self._link.say(pb.AgentSays(file=piece)))
        self._link = Link(
            spec["address"],
            spec["certificate"].encode(),
            spec["token"],
            lambda: json.dumps({**self._hello.to_json(), "clock_s": time.time()}),
            self._hear,
            self.die,
        )

    def _gather(self) -> Hello:
        """Make the run's folder, and return what this host has."""
        spec = self._spec
        os.environ.update(spec["environ"])
        hello = gather(spec["folder"], spec["files"], spec["optional"])
        known, chosen = addresses(), spec["interface"]
        if chosen and chosen not in known:
            has = ", ".join(f"{name} ({found[0]})" for name, found in known.items())
            hello.problems.append([f"there is no interface {chosen}", f"it has {has}", "--set cluster.interface=..."])
        address = (
            known[chosen][0] if chosen in known else source_address(spec["address"].rpartition(":")[0].strip("[]"))
        )
        shares = False
        try:
            with contextlib.suppress(FileNotFoundError):
                shares = read_own(self._run.path / NONCE).decode() == spec["nonce"]
            if not shares and not spec["check"]:
                with contextlib.suppress(FileExistsError):
                    self._run.create()
                write_own(self._run.config, spec["config_toml"])
                write_own(self._run.spec, spec["spec_json"])
        except OSError as error:
            why = f"{error.strerror or error}: {error.filename or self._run.path}"
            what, fix = (
                f"the run's folder {self._run.path} cannot be made",
                "set run.dir to a folder that every host has",
            )
            hello.problems.append([what, why, fix])
        return Hello(
            **{
                **hello.to_json(),
                "addresses": known,
                "address": address,
                "interface": interface_of(address, known),
                "shares_folder": shares,
                "sees_checkpoints": not spec["probe"] or os.path.exists(spec["probe"]),
            }
        )

    def _keep_in_memory(self, secrets: dict[str, str]) -> None:
        from distui.launcher.memory.copies import HostMemory

        self._memory = HostMemory(self._runtime / "memory", secrets, lambda told: self._link.say(told))
        try:
            self._hello = replace(self._hello, keeps_at=self._memory.open(self._hello.address))
        except OSError as error:
            what, fix = "no port for checkpoints in memory", "--set cluster.interface=..., or memory_every_steps=0"
            self._hello.problems.append([what, str(error), fix])

    def run(self) -> NoReturn:
        """Do what the supervisor says until it says that this is all."""
        self._take_signals()
        self._link.start()
        threading.Thread(target=self._feed_files, name="feed", daemon=True).start()
        while True:
            work = self._work.get()
            if isinstance(work, pb.Start):
                if not self._is_ending:
                    self._run_attempt(work)
                continue
            kill_job(self._run, found=own_processes)
            if work.forgets_preemption:
                self._run.preempt.unlink(missing_ok=True)
            self._is_ending = work.leave
            self._feed.take()
            self._link.say(pb.AgentSays(done=pb.Done(attempt=self._attempt, swept=True)))
            if work.leave:
                self._link.leave(LEAVE_S)
                self._leave(EXIT_OK)

    def die(self, why: str) -> NoReturn:
        """End this host's part at once: nobody is left to say how. From any thread."""
        kill_job(self._run, found=own_processes)
        with contextlib.suppress(OSError):  # nobody reads it any more
            print(f"distui: {why}; the ranks of this host were ended", flush=True)
        self._leave(EXIT_BUG)

    def _leave(self, status: int) -> NoReturn:
        self._roller.close()
        shutil.rmtree(self._runtime, ignore_errors=True)
        os._exit(status)  # threads of gRPC, and of a store, may hold the interpreter back

    def _take_signals(self) -> None:
        for signum in STOP_SIGNALS:
            signal.signal(signum, lambda number, frame: None)  # between attempts there is nothing to stop
        signal.signal(signal.SIGUSR1, lambda number, frame: request_preemption(self._run))

    # ---- what the supervisor says: on the link's thread --------------------------------------------------------------

    def _hear(self, said: pb.SupervisorSays) -> None:
        body = said.WhichOneof("body")
        if body == "open_store":
            self._open_store(said.open_store)
        elif body == "dial":
            addresses = list(said.dial.addresses)
            threading.Thread(target=self._dial, args=(addresses,), name="dial", daemon=True).start()
        elif body == "open_daemon":
            threading.Thread(target=self._open_daemon, args=(said.open_daemon,), name="roller", daemon=True).start()
        elif body == "start":
            self._work.put(said.start)
        elif body == "alone" and self._ranks is not None:
            self._ranks.release()
        elif body == "end":
            self._is_ending = True
            os.kill(os.getpid(), signal.SIGTERM)
            self._work.put(said.end)
        elif body == "preempt":
            request_preemption(self._run)
        elif body == "settled" and self._memory is not None:
            self._memory.keeper.settle(said.settled.save)

    def _open_daemon(self, asked: pb.OpenDaemon) -> None:
        self._serve_sockets()
        self._link.say(pb.AgentSays(daemon=self._roller.open(asked, self._hello.address)))

    def _serve_sockets(self) -> None:
        if not (self._runtime / "daemon.sock").exists():
            self._link.serve_sockets(self._runtime)

    def _dial(self, addresses: list[str]) -> None:
        """Say which addresses do not answer."""
        failed = []
        for address in addresses:
            host, _, port = address.rpartition(":")
            try:
                socket.create_connection((host.strip("[]"), int(port)), timeout=DIAL_S).close()
            except OSError as error:
                failed.append(f"{address}: {error.strerror or error}")
        self._link.say(pb.AgentSays(dialled=pb.Dialled(failed=failed)))

    def _open_store(self, asked: pb.OpenStore) -> None:
        told = pb.StoreAt(attempt=asked.attempt, probe=asked.probe)
        try:
            family = socket.AF_INET6 if ":" in self._hello.address else socket.AF_INET
            opened = socket.create_server((self._hello.address, 0), family=family, backlog=BACKLOG)
            told.port = opened.getsockname()[1]
            if asked.probe:
                self._probed = opened
            else:
                self._store = opened
        except OSError as error:
            told.problem = f"no port can be opened on {self._hello.address}: {error}"
        self._link.say(pb.AgentSays(store=told))

    # ---- an attempt: on the main thread ------------------------------------------------------------------------------

    def _run_attempt(self, start: pb.Start) -> None:
        self._attempt = start.attempt
        done = pb.Done(attempt=start.attempt)
        place = Place(
            start.node,
            start.num_nodes,
            start.first_rank,
            start.num_ranks,
            start.world_size,
            start.address,
            start.port,
            start.attempt,
            start.max_restarts,
        )
        try:
            if self._probed is not None:
                self._probed.close()
            self._set_environment(start)
            if self._memory is not None:
                os.environ.update(self._memory.begin(start))
            self._forget_errors(start)
            self._feed.begin(start.first_rank, start.num_ranks, self._hello.shares_folder)
            store, self._store = (self._store, None) if start.node == 0 else (None, None)
            self._ranks = ranks = Ranks(
                place,
                self._spec["command"],
                store,
                awaits_nodes=start.num_nodes > 1,
                on_ended=self._tell_ended,
                gives_way=self._give_way if self._spec["saves_on_term"] else None,
            )
            if self._is_ending:
                os.kill(os.getpid(), signal.SIGTERM)  # it was said before the ranks could hear it
            ranks.wait(lambda: kill_job(self._run, found=own_processes))
            if ranks.stopped_by is not None and not self._is_ending:
                done.stopped = "control" if stop_requested(self._run) else ranks.stopped_by.name
            if ranks.stopped_by is not None or any(ending.bad for ending in ranks.endings.values()):
                kill_job(self._run, found=own_processes)
            self._take_signals()
            ranks.close()
        except Exception as error:  # noqa: BLE001  the supervisor must hear of it, whatever it was
            traceback.print_exc()
            done.problem = f"{type(error).__name__}: {error}"
            kill_job(self._run, found=own_processes)
        self._ranks = None
        self._feed.take()
        self._link.say(pb.AgentSays(done=done))

    def _give_way(self) -> bool:
        return not self._is_ending and give_way(self._run)

    def _set_environment(self, start: pb.Start) -> None:
        spec = self._spec
        os.chdir(spec["folder"])
        os.environ[JOB_ENV] = str(self._run.path)
        os.environ[AGENT_PID_ENV] = str(os.getpid())
        os.environ["PWD"] = spec["folder"]
        self._serve_sockets()
        os.environ["DISTUI_RUNTIME_DIR"] = str(self._roller.sockets)
        threads = spec["threads"] or max(1, self._hello.num_cores // start.num_ranks)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            if self._hello.interface and (spec["interface"] or name not in spec["environ"]):
                os.environ[name] = self._hello.interface
        if spec["devices"]:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, spec["devices"]))

    def _forget_errors(self, start: pb.Start) -> None:
        for rank in range(start.first_rank, start.first_rank + start.num_ranks):
            with contextlib.suppress(FileNotFoundError):
                remove_own(self._run.rank_error(rank))

    def _tell_ended(self, ending: Ending) -> None:
        self._feed.take()
        told = pb.RankEnded(attempt=self._attempt, rank=ending.rank, pid=ending.pid)
        told.age_s = max(0.0, time.time() - ending.time_s)
        if ending.exit_status is not None:
            told.exit_status = ending.exit_status
        if ending.signal is not None:
            told.signal = ending.signal
        report = read_rank_error(self._run, ending.rank)
        if report is not None:
            told.report = json.dumps(report)
            told.report_age_s = max(0.0, time.time() - float(report["time_s"]))
        if (step := last_step(self._run, ending.rank)) is not None:
            told.step = step
        self._link.say(pb.AgentSays(ended=told))

    def _feed_files(self) -> None:
        while True:
            time.sleep(FEED_S)
            self._feed.take()


def main() -> None:
    """Read the task from stdin and be the agent; or end what an agent that was killed has left."""
    print("distui: agent", flush=True)
    spec = json.loads(sys.stdin.buffer.readline() or b"null")
    if spec is None:
        sys.exit(EXIT_BUG)
    if spec.get("sweep"):
        kill_job(RunFolder(Path(spec["run_dir"])))
        print("distui: swept", flush=True)
        return
    member = Member(spec)

    def hold() -> None:
        while sys.stdin.buffer.read(1 << 12):
            continue
        member.die("the session that started this agent has ended")

    threading.Thread(target=hold, name="session", daemon=True).start()
    member.run()


if __name__ == "__main__":
    main()
