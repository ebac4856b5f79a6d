"""The agents on all hosts: started, heard, swept after, and let go."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from distui.core.config.schema import Config
from distui.core.errors import ConfigError, Problem, UserError
from distui.core.paths import RunFolder, control_socket, daemon_socket, read_own, write_own
from distui.core.telemetry.endpoint import is_loopback
from distui.core.telemetry.harmless import harmless
from distui.launcher.cluster.certificate import new_certificate
from distui.launcher.cluster.control import ControlPort, Seat
from distui.launcher.cluster.gang import Gang
from distui.launcher.cluster.hello import compare, remarks
from distui.launcher.cluster.hosts import Host, chosen_environ
from distui.launcher.cluster.starter import Starter
from distui.launcher.job.processes import own_command
from distui.launcher.node.facts import Hello, addresses, files_of, gather, source_address
from distui.launcher.node.member import NONCE
from distui.launcher.node.restarts import checkpoints_of
from distui.proto import cluster_pb2 as pb

AGENT = "distui.launcher.node.member"
SWEEP_S = 10.0
CLOSE_S = 5.0
REACH_S = 8.0
LOOK_S = 0.5
AWAITED_S = 10.0
"""Between two lines of who is awaited."""
MAX_DIALLED = 16
GONE_S = 1.0
"""A stream that ended may have ended with its session, which says why a moment later."""
ELSEWHERE = "192.0.2.1"
"""An address of nobody (RFC 5737): where packets to it would leave from is this machine's usual address."""


class Crew:
    """The agents of one job. All calls on one event loop; `changed` is set whenever something has happened."""

    def __init__(
        self,
        run: RunFolder,
        config: Config,
        hosts: Sequence[Host],
        starter: Starter,
        command: Sequence[str],
        config_file: Path | None,
        on_said: Callable[[int, pb.AgentSays], None],
        *,
        only_checks: bool = False,
    ) -> None:
        """Start nothing yet. With `only_checks` agents make no run's folder: no rank is to be started."""
        self._only_checks = only_checks
        self._probes: dict[int, int] = {}
        self._dialled: dict[int, list[str]] = {}
        self.changed = asyncio.Event()
        loop = asyncio.get_running_loop()
        self._way = getattr(starter, "way", config.cluster.starter)
        self.gang = Gang(hosts, loop.time, config.cluster.meet_s, self._way)
        self.files, self.optional = files_of(command, Path.cwd(), config_file)
        self._run, self._config, self._starter, self._command = run, config, starter, command
        self._hosts = hosts
        self._memory_secrets: dict[str, str] = {}
        self._on_said = on_said
        self._nonce = secrets.token_hex(16)
        self._seats: dict[int, Seat] = {}
        self._processes: dict[int, asyncio.subprocess.Process] = {}
        self._stderr: dict[int, deque[str]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._dial: dict[int, str] = {}
        self._is_leaving = False
        self.offsets_s: dict[int, float] = {}
        """How far each host's clock was ahead when its hello came, but for the time of its way here."""
        self._probe: Path | None = None
        """A file among the checkpoints: who sees it shares that disk."""

        def sockets() -> dict[str, Path]:
            return {"daemon": daemon_socket(), "control": control_socket()} if config.telemetry.enabled else {}

        self._port = ControlPort(self._hello, self._said, self._gone, sockets)

    # ---- the way there -----------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Listen where each host can reach this one. Raises: UserError."""
        write_own(self._run.path / NONCE, self._nonce)
        if self._config.checkpoint.every_steps:
            folder = checkpoints_of(self._run, self._config.checkpoint.dir).absolute()
            folder.mkdir(parents=True, exist_ok=True)
            self._probe = folder / f".distui-{self._nonce}"
            self._probe.touch()
        if self._config.checkpoint.memory_every_steps and not self._only_checks:
            certificate, key = new_certificate()
            token = secrets.token_urlsafe(32)
            self._memory_secrets = {"certificate": certificate.decode(), "key": key.decode(), "token": token}
        chosen, known = self._config.cluster.interface, addresses()
        if chosen and chosen not in known:
            has = ", ".join(f"{name} ({found[0]})" for name, found in known.items())
            raise UserError(
                f"there is no interface {chosen} on this host", f"it has {has}", "set cluster.interface to one"
            )
        members, found = self.gang.members, list[str]()
        for member in members:
            target = await self._starter.address(member.host)
            found.append(known[chosen][0] if chosen else source_address(target) if target else "")
        outside = next((one for one in found if one and not is_loopback(one)), "")
        usual = outside or source_address(ELSEWHERE) or "127.0.0.1"
        # A name of this very host leads to loopback, which the others cannot reach.
        here = outside or "127.0.0.1"
        dial = [usual if not one else here if is_loopback(one) else one for one in found]
        ports = await self._port.start(list(dict.fromkeys(dial)))
        for member, address in zip(members, dial, strict=True):
            name = f"[{address}]" if ":" in address else address
            self._dial[member.node] = f"{name}:{ports[address]}"

    def start(self, node: int) -> None:
        """Begin to start the agent of a node; the gang hears how far it comes."""
        member = self.gang.members[node]
        member.stage, member.problem, member.note = "starting", None, ""
        self._seats[node] = self._port.seat(node)
        if (old := self._processes.get(node)) is not None and old.returncode is None:
            old.kill()  # it is lost: it may have been stopped, and would not end by itself
        self._task(self._start(node, self._seats[node]))

    async def _start(self, node: int, seat: Seat) -> None:
        host = self.gang.members[node].host
        try:
            process = await self._starter.start(host, own_command(AGENT))
        except UserError as error:
            self.gang.failed(node, Problem(host.name, error.what, error.why, error.fix))
            self.changed.set()
            return
        except Exception as error:  # noqa: BLE001  a plug-in may fail of anything, and must not be waited for
            why = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
            fix = f"is what cluster.starter={self._config.cluster.starter} needs installed here?"
            self.gang.failed(node, Problem(host.name, "its agent cannot be started", why, fix))
            self.changed.set()
            return
        self._processes[node] = process
        self._stderr[node] = deque(maxlen=20)
        assert process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended: its end is told below
            process.stdin.write(json.dumps(self._task_of(node, seat)).encode() + b"\n")
            await process.stdin.drain()
        reading = [asyncio.create_task(self._read(node, process.stdout, False))]
        reading.append(asyncio.create_task(self._read(node, process.stderr, True)))
        status = await process.wait()
        await asyncio.wait(reading, timeout=GONE_S)
        member = self.gang.members[node]
        if self._seats[node] is not seat:
            return  # another agent has taken its place
        if member.here:
            self._lose(node, self._why_gone(node))
        elif member.stage != "lost":
            said = "\n".join(self._stderr[node])
            self.gang.failed(node, self._starter.explain(host, status, said))
        self.changed.set()

    def _task_of(self, node: int, seat: Seat) -> dict[str, Any]:
        """Return what the agent is told on its stdin: all that is secret, and all that is long."""
        cluster, host = self._config.cluster, self.gang.members[node].host
        return {
            "run_dir": str(self._run.path.absolute()),
            "nonce": self._nonce,
            "address": self._dial[node],
            "certificate": self._port.certificate.decode(),
            "token": seat.token,
            "environ": chosen_environ(cluster.env),
            "folder": os.getcwd(),
            "files": self.files,
            "optional": self.optional,
            "command": list(self._command),
            "config_toml": read_own(self._run.config).decode(),
            "spec_json": read_own(self._run.spec).decode(),
            "interface": cluster.interface,
            "probe": str(self._probe or ""),
            "check": self._only_checks,
            "saves_on_term": cluster.on_preempt == "save",
            "threads": cluster.threads_per_rank,
            "devices": list(host.devices),
            "memory": self._memory_secrets,
        }

    async def _read(self, node: int, stream: asyncio.StreamReader | None, is_stderr: bool) -> None:
        """Take in what a starter's command writes: its stages, and words for the log."""
        host = self.gang.members[node].host
        while stream is not None and (line := await stream.readline()):
            text = harmless(line.decode(errors="replace").rstrip())
            if is_stderr:
                self._stderr[node].append(text)
            word, _, rest = text.removeprefix("distui: ").partition(" ")
            if text in ("distui: ssh", "distui: agent"):
                self.gang.came(node, word)
            elif text.startswith("distui: unreachable "):
                what = f"{self._way} answers, and {rest} does not answer from there"
                why, fix = (
                    "a firewall, or an address that is not the right one",
                    "open it, or --set cluster.interface=...",
                )
                self.gang.failed(node, Problem(host.name, what, why, fix))
            else:
                print(f"{host.name}: {text}", flush=True)
            self.changed.set()

    async def meet(self, nodes: Sequence[int], notice: Callable[[str], None], is_over: Callable[[], bool]) -> None:
        """Start the agents of `nodes` and wait for all; who is lost meanwhile is started again.

        `notice` gets a line each 10 s of who is awaited. Raises: UserError where not all come, or they do not fit.
        """
        gang, loop = self.gang, asyncio.get_running_loop()
        gang.begin_meeting()
        for node in nodes:
            self.start(node)
        next_line_s = loop.time() + AWAITED_S
        while not gang.all_here():
            await self.something(LOOK_S)
            if is_over():
                return
            gang.lose_silent()
            for member in gang.members:
                if member.stage == "lost" and not member.is_left_out and member.problem is None:
                    notice(f"{member.host.name} {member.lost}; its agent is started again")
                    self.start(member.node)
            if problems := gang.refused():
                raise ConfigError(problems)
            if loop.time() >= next_line_s:
                next_line_s += AWAITED_S
                notice(gang.awaited())
        if problems := self.differences() or await self.reach():
            raise ConfigError(problems)
        there = [(member, member.hello) for member in gang.members if member.here and member.hello is not None]
        for remark in remarks(self._hosts, {member.node: hello for member, hello in there}, self.offsets_s):
            print(remark, flush=True)
        words = [f"{member.host.name} ({hello.address})" for member, hello in there]
        print(f"hosts: {', '.join(words)}; interface {there[0][1].interface}", flush=True)

    def differences(self) -> list[Problem]:
        """Return what keeps the hosts that are there from training together."""
        hellos = {one.node: one.hello for one in self.gang.members if one.here and one.hello is not None}
        here = gather(os.getcwd(), self.files, self.optional)
        return compare(self._hosts, hellos, here, one_machine=self._starter.one_machine)

    # ---- what agents say ---------------------------------------------------------------------------------------------

    def say(self, node: int, **body: Any) -> None:
        """Send a message to a node's agent, where there is one."""
        if self.gang.members[node].here:
            self._seats[node].say(**body)

    def say_all(self, **body: Any) -> None:
        """Send a message to every agent that is there."""
        for member in self.gang.members:
            self.say(member.node, **body)

    def _hello(self, seat: Seat, hello: Hello) -> None:
        self.offsets_s[seat.node] = hello.clock_s - time.time()
        self.gang.joined(seat.node, hello)
        self.changed.set()

    def _said(self, seat: Seat, message: pb.AgentSays) -> None:
        self.gang.heard(seat.node)
        body = message.WhichOneof("body")
        if body == "dialled":
            self._dialled[seat.node] = list(message.dialled.failed)
        elif body == "store" and message.store.probe:
            self._probes[seat.node] = message.store.port
        elif body != "beat":
            self._on_said(seat.node, message)
        if body != "beat":
            self.changed.set()

    def _gone(self, seat: Seat) -> None:
        if self._seats[seat.node] is seat and not self._is_leaving:
            self._task(self._lose_soon(seat.node))

    async def _lose_soon(self, node: int) -> None:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._processes[node].wait(), GONE_S)
        if self.gang.members[node].here:
            self._lose(node, self._why_gone(node))

    def _lose(self, node: int, why: str) -> None:
        self.gang.lose(node, why)
        self._seats[node].close()
        self.changed.set()

    def _why_gone(self, node: int) -> str:
        process, last = self._processes[node], next(iter(reversed(self._stderr[node])), "")
        if process.returncode is None:
            return "its agent hung up"
        return f"its agent, or its session, has ended{f' ({last})' if last else ''}"

    async def reach(self) -> list[Problem]:
        """Have hosts dial each other, all of them or, of many, some; return who does not reach whom."""
        members = [member for member in self.gang.members if member.here]
        if len(members) < 2:
            return []
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + REACH_S
        self._probes, self._dialled = {}, {}
        for member in members:
            self.say(member.node, open_store=pb.OpenStore(probe=True))
        while len(self._probes) < len(members) and loop.time() < deadline_s:
            await self.something(REACH_S / 8)
        where = {}
        for member in members:
            assert member.hello is not None
            address = f"[{member.hello.address}]" if ":" in member.hello.address else member.hello.address
            if port := self._probes.get(member.node):
                where[f"{address}:{port}"] = member
        for place, member in enumerate(members):
            others = [address for address, other in where.items() if other is not member]
            if len(others) > MAX_DIALLED:
                others = [others[(place + step) % len(others)] for step in (0, *(1 << bit for bit in range(6)))]
            self.say(member.node, dial=pb.Dial(addresses=others))
        while len(self._dialled) < len(members) and loop.time() < deadline_s:
            await self.something(REACH_S / 8)
        found = []
        for node, failed in sorted(self._dialled.items()):
            name = self.gang.members[node].host.name
            for text in failed:
                address, _, why = text.partition(": ")
                other = where[address].host.name if address in where else "?"
                what = f"{name} does not reach {other} at {address}"
                fix = "let the hosts of a job reach each other on all ports, or --set cluster.interface=..."
                found.append(Problem(f"{name}, {other}", what, f"{why}: a firewall, or another network", fix))
        return found

    async def something(self, within_s: float) -> None:
        """Wait until something has happened, for a while at most."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.changed.wait(), within_s)
        self.changed.clear()

    # ---- the end -----------------------------------------------------------------------------------------------------

    async def sweep(self, node: int, within_s: float = SWEEP_S) -> bool:
        """End what an agent that is gone has left on its host; tell whether the host answered."""
        old = self._processes.get(node)
        if old is not None and old.returncode is None:
            old.kill()
        process: asyncio.subprocess.Process | None = None
        try:
            process = await self._starter.start(self.gang.members[node].host, own_command(AGENT))
            task = json.dumps({"sweep": True, "run_dir": str(self._run.path.absolute())})
            told, _ = await asyncio.wait_for(process.communicate(task.encode() + b"\n"), within_s)
            return b"distui: swept" in told
        except (OSError, asyncio.TimeoutError):
            return False
        finally:
            if process is not None and process.returncode is None:
                process.kill()

    async def leave(self, within_s: float) -> None:
        """Have every agent end, which ends its ranks; end the sessions of those that do not."""
        self._is_leaving = True
        if self._probe is not None:
            self._probe.unlink(missing_ok=True)
        for member in self.gang.members:
            if member.here:
                self._seats[member.node].say(end=pb.End(leave=True))
        alive = {node: process for node, process in self._processes.items() if process.returncode is None}
        for node, process in alive.items():
            if process.stdin is not None and not self.gang.members[node].here:
                process.stdin.close()  # who has not connected has no other way to hear of it
        running = list(alive.values())
        waits = [asyncio.ensure_future(process.wait()) for process in running]
        if waits:
            await asyncio.wait(waits, timeout=within_s)
        for process in running:
            if process.returncode is None:
                process.kill()
        for task in [*self._tasks, *waits]:
            task.cancel()
        if (close := getattr(self._starter, "close", None)) is not None:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(close(0), CLOSE_S)
        await self._port.stop()

    def _task(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
