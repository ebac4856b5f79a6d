"""Saves at once or in the background: then a step waits only until its shards are copied to host memory."""

from __future__ import annotations

import atexit
import sys
import threading
import time
import uuid
import weakref
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from distui.core.checkpoint import state
from distui.core.checkpoint.flat import CellShard
from distui.core.checkpoint.folder import PREFIX
from distui.core.checkpoint.memory import Agent
from distui.core.checkpoint.memory import keep as keep_in_memory
from distui.core.checkpoint.plain import Plain
from distui.core.checkpoint.staging import Staging
from distui.core.checkpoint.trained import Trained
from distui.core.checkpoint.writing import Snapshot, write
from distui.core.errors import UserError
from distui.core.paths import current_run
from distui.core.ranks.random_states import RandomStates
from distui.core.telemetry.source import NullSource, TelemetrySource

WRITE_TIMEOUT = timedelta(hours=2)
"""How long a rank waits for the slowest one to have written its files."""
OnDone = Callable[[Path, "BaseException | None"], None]
"""Called when a checkpoint is there, or why it is not."""
_savers: weakref.WeakSet[Saver] = weakref.WeakSet()


class Saver:
    """The saves and loads of one engine, at most one save in flight."""

    def __init__(self, telemetry: TelemetrySource | NullSource) -> None:
        self._telemetry = telemetry
        self._group: dist.ProcessGroup | None = None
        self._staging = Staging()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._lineage = uuid.uuid4().hex
        """This run and those that go on from its checkpoints; by it rotation knows its own."""
        self._newest_s = 0.0
        self._agent = Agent.of_this_rank()
        self._checks_room = True
        self.before_wait: Callable[[], None] = lambda: None
        """Called when somebody waits for the saves, to begin those that are still to be made."""
        _savers.add(self)

    @property
    def failed(self) -> bool:
        """Whether a save in the background failed and nobody was told; `wait` tells."""
        return self._error is not None

    @property
    def is_busy(self) -> bool:
        """Whether a save is in flight, or agents keep none: no moment for one in memory."""
        return self._agent is None or (self._thread is not None and self._thread.is_alive())

    @property
    def staged_bytes(self) -> int:
        """Bytes of host memory that saving in the background holds."""
        return self._staging.allocated_bytes

    def group(self, engine: Trained) -> dist.ProcessGroup | None:
        """Return the group over which saves are agreed on, once no thread of a save uses it; None alone. Collective.

        Raises: the error of the save that was in flight.
        """
        self.join()  # not `wait`: a provisional save would make the one that is to take its place
        if engine.num_processes > 1 and self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=WRITE_TIMEOUT)
        return self._group

    def save(
        self,
        engine: Trained,
        output_dir: str,
        asynchronous: bool,
        *,
        keep: int | None = None,
        random: RandomStates | None = None,
        without: frozenset[int] = frozenset(),
        provisional: bool = False,
        in_memory: bool = False,
        on_disk: bool = True,
        on_done: OnDone = lambda path, error: None,
    ) -> str:
        """Write the engine's whole state to `output_dir`, and return that folder. Collective.

        With `asynchronous` it returns as soon as the state is copied; the folder is there when `wait` returns, and
        `on_done` is called on another thread. `keep` removes all but so many of the newest checkpoints of this run
        beside it. `random` are the random states to go on from, where they are not the present ones; `without` are
        models whose weights somebody else keeps; a `provisional` one says that the script was not done with its step.
        `in_memory` has agents keep it as well or, without `on_disk`, has them alone keep it: their failure is told.

        Raises: UserError where it, or the save before it, could not be written, or a state is no plain data.
        """
        self._telemetry.phase("checkpoint")
        try:
            self.join()
            group = self.group(engine)
            main = engine.process_index == 0
            # The clock of another machine may be behind; what is saved later must be newer all the same.
            self._newest_s = max(time.time(), self._newest_s + 1e-3)
            random = random if random is not None else RandomStates.take()
            common = Plain(state.common_state(engine), "the state", keeps=main)
            snapshot = Snapshot(
                target=Path(output_dir).absolute(),
                rank=engine.process_index,
                items=state.items_to_save(engine, without),
                own=Plain(state.own_state(engine, random), "the state of this rank"),
                common=common if main else None,
                facts=state.facts(engine, without)
                | {
                    "lineage": self._lineage,
                    "saved_at_s": self._newest_s,
                    "provisional": provisional,
                    "run": _run_id(),
                },
                keep=keep,
                in_memory=in_memory,
                on_disk=on_disk,
            )
            self._start(snapshot, group, engine.clock.step, asynchronous, on_done)
            return str(snapshot.target)
        finally:
            self._telemetry.phase("idle")

    def _start(
        self, snapshot: Snapshot, group: dist.ProcessGroup | None, step: int, asynchronous: bool, on_done: OnDone
    ) -> None:
        if not asynchronous or any(isinstance(item, CellShard) for item in snapshot.items.values()):
            # What rests on a disk is there because host memory has no room for a copy of it.
            self._write(snapshot, group, step, on_done)
            self.join()
            return
        snapshot.items, arrived = self._staging.copy(snapshot.items)

        def write_in_background() -> None:
            arrived()
            self._write(snapshot, group, step, on_done)

        # Not a daemon thread: the interpreter waits for it before it ends.
        self._thread = threading.Thread(target=write_in_background, name="distui-checkpoint")
        self._thread.start()

    def _write(self, snapshot: Snapshot, group: dist.ProcessGroup | None, step: int, on_done: OnDone) -> None:
        if snapshot.in_memory:
            self._keep(snapshot, group, step)
        if not snapshot.on_disk:
            return
        error: BaseException | None = None
        try:
            write(snapshot, group)
        except Exception as problem:  # noqa: BLE001 - raised by join, on the training thread
            error = self._error = problem
        level, text = ("info", f"saved {snapshot.target}") if error is None else ("error", str(error))
        self._telemetry.event(level, "checkpoint", text, step=step)
        on_done(snapshot.target, error)

    def _keep(self, snapshot: Snapshot, group: dist.ProcessGroup | None, step: int) -> None:
        """Have agents keep it. They do for all ranks or, from the first failure on, for none."""
        if self._agent is None:
            return
        try:
            keep_in_memory(snapshot, group, self._agent, checks_room=self._checks_room)
            self._checks_room = False
        except Exception as problem:  # noqa: BLE001  training goes on without, and checkpoints on the disk as well
            self._agent = None
            what = problem if isinstance(problem, UserError) else f"{type(problem).__name__}: {problem}"
            text = f"no checkpoints are kept in memory from step {step} on: {what}"
            self._telemetry.event("warning", "checkpoint", text, step=step)
            if snapshot.rank == 0:
                sys.stderr.write(f"distui: {text}\n")

    def save_step(
        self,
        engine: Trained,
        on_done: OnDone,
        *,
        in_memory: bool = False,
        on_disk: bool = True,
        random: RandomStates | None = None,
        provisional: bool = False,
        at_exit: bool = False,
    ) -> None:
        """Save this step where checkpoints go, and keep the newest `checkpoint.keep` of this run. Collective.

        The interpreter makes no more threads `at_exit`.
        """
        settings = engine.config.checkpoint
        self.save(
            engine,
            str(folder_of_step(engine)),
            settings.async_save and not at_exit,
            keep=settings.keep,
            random=random,
            provisional=provisional,
            in_memory=in_memory,
            on_disk=on_disk,
            on_done=on_done,
        )

    def load(
        self,
        engine: Trained,
        input_dir: str,
        *,
        optimizers: bool = True,
        strict: bool = True,
        models: frozenset[int] | None = None,
    ) -> list[str]:
        """Bring the engine to the state in `input_dir` (see `state.load`); returns what was not taken. Collective."""
        self.wait()
        self._telemetry.phase("checkpoint")
        try:
            manifest, left_out = state.load(
                engine, input_dir, self.group(engine), optimizers=optimizers, strict=strict, models=models
            )
        finally:
            self._telemetry.phase("idle")
        self._lineage = str(manifest.get("lineage", self._lineage))
        self._newest_s = max(self._newest_s, float(manifest.get("saved_at_s", 0.0)))
        step = engine.clock.step
        self._telemetry.event("info", "checkpoint", f"loaded {input_dir}", step=step)
        if left_out:
            self._telemetry.event("warning", "checkpoint", f"not loaded: {'; '.join(left_out)}", step=step)
        if manifest.get("provisional"):
            text = (
                "it was saved at the end of an epoch, before what the script does there (a schedule may be a step back)"
            )
            self._telemetry.event("warning", "checkpoint", f"{input_dir}: {text}", step=step)
        return left_out

    def wait(self) -> None:
        """Make the saves that are still to be made, and return when none is in flight. Collective.

        Raises: the error of the save, once.
        """
        self.before_wait()
        self.join()

    def join(self) -> None:
        """Return when no save is in flight. Raises: the error of the save, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error


def _run_id() -> str:
    run = current_run()
    return run.run_id if run is not None else ""


def folder_of_step(engine: Trained) -> Path:
    """Return where the engine's step is saved: under `checkpoint.dir`, else the run's folder, else `checkpoints/`."""
    run, chosen = current_run(), engine.config.checkpoint.dir
    folder = Path(chosen) if chosen else run.path / "checkpoints" if run else Path("checkpoints")
    return folder / f"{PREFIX}{engine.clock.step:08d}"


@atexit.register
def _tell_unseen_errors() -> None:
    for saver in list(_savers):
        try:
            saver.join()
        except UserError as error:
            sys.stderr.write(f"{error.report()}\n")
        except Exception as error:  # noqa: BLE001 - told; at exit nothing is left that could handle it
            sys.stderr.write(f"a checkpoint was not written: {type(error).__name__}: {error}\n")
