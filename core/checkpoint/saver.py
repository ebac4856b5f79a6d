"""Saves at once or in the background: then a step waits only until its shards are copied to host memory."""

from __future__ import annotations

import atexit
import io
import sys
import threading
import weakref
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from distui.core.checkpoint import state
from distui.core.checkpoint.flat import CellShard
from distui.core.checkpoint.folder import PREFIX
from distui.core.checkpoint.staging import Staging
from distui.core.checkpoint.writing import Snapshot, write
from distui.core.errors import UserError
from distui.core.paths import current_run
from distui.core.telemetry.source import NullSource, TelemetrySource

if TYPE_CHECKING:
    from distui.core.engine import Engine

WRITE_TIMEOUT = timedelta(hours=2)
"""How long a rank waits for the slowest one to have written its files."""
OnDone = Callable[["BaseException | None"], None]
_savers: weakref.WeakSet[Saver] = weakref.WeakSet()


class Saver:
    """The saves of one engine, at most one of them in flight."""

    def __init__(self, telemetry: TelemetrySource | NullSource) -> None:
        self._telemetry = telemetry
        self._group: dist.ProcessGroup | None = None
        self._staging = Staging()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        _savers.add(self)

    @property
    def failed(self) -> bool:
        """Whether a save in the background failed and nobody was told; `wait` tells."""
        return self._error is not None

    @property
    def staged_bytes(self) -> int:
        """Bytes of host memory that saving in the background holds."""
        return self._staging.allocated_bytes

    def save(
        self,
        engine: Engine,
        output_dir: str,
        asynchronous: bool,
        keep: int | None = None,
        on_done: OnDone = lambda error: None,
    ) -> str:
        """Write the engine's whole state to `output_dir`, and return that folder. Collective.

        With `asynchronous` it returns as soon as the state is copied; the folder is there when `wait` returns, and
        `on_done` is called on another thread. `keep` deletes all but so many of the newest checkpoints beside it.

        Raises: UserError where it, or the save before it, could not be written.
        """
        self._telemetry.phase("checkpoint")
        try:
            return self._save(engine, output_dir, asynchronous, keep, on_done)
        finally:
            self._telemetry.phase("idle")

    def _save(self, engine: Engine, output_dir: str, asynchronous: bool, keep: int | None, on_done: OnDone) -> str:
        self.wait()
        if engine.num_processes > 1 and self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=WRITE_TIMEOUT)
        state.quieten_dcp()
        snapshot = Snapshot(
            target=Path(output_dir).absolute(),
            rank=engine.process_index,
            items=state.items_to_save(engine),
            random=_serialised({"random": state.random_states(), "onebit": state.onebit_states(engine)}),
            common=_serialised(state.common_state(engine)) if engine.is_main_process else b"",
            facts=state.facts(engine),
            keep=keep,
        )
        if not asynchronous or any(isinstance(item, CellShard) for item in snapshot.items.values()):
            # What rests on a disk is there because host memory has no room for a copy of it.
            self._write(snapshot, engine.clock.step, on_done)
            self.wait()
            return str(snapshot.target)
        snapshot.items, arrived = self._staging.copy(snapshot.items)

        def write_in_background() -> None:
            arrived()
            self._write(snapshot, engine_step, on_done)

        engine_step = engine.clock.step
        # Not a daemon thread: the interpreter waits for it before it ends.
        self._thread = threading.Thread(target=write_in_background, name="distui-checkpoint")
        self._thread.start()
        return str(snapshot.target)

    def _write(self, snapshot: Snapshot, step: int, on_done: OnDone) -> None:
        error: BaseException | None = None
        try:
            write(snapshot, self._group)
        except Exception as problem:  # noqa: BLE001 - raised by wait, on the training thread
            error = self._error = problem
        level, text = ("info", f"saved {snapshot.target}") if error is None else ("error", str(error))
        self._telemetry.event(level, "checkpoint", text, step=step)
        on_done(error)

    def after_step(self, engine: Engine) -> None:
        """Save where `checkpoint.every_steps` says so. Collective, after every optimizer step."""
        every = engine.config.checkpoint.every_steps
        if every and engine.clock.step % every == 0:
            self.save_step(engine)

    def save_step(self, engine: Engine, on_done: OnDone = lambda error: None) -> None:
        """Save this step where checkpoints go, and keep the newest `checkpoint.keep`. Collective."""
        settings = engine.config.checkpoint
        self.save(engine, str(self.folder_of_step(engine)), settings.async_save, settings.keep, on_done)

    @staticmethod
    def folder_of_step(engine: Engine) -> Path:
        """Return where this step is saved: under `checkpoint.dir`, else the run's folder, else `checkpoints/`."""
        run, chosen = current_run(), engine.config.checkpoint.dir
        folder = Path(chosen) if chosen else run.path / "checkpoints" if run else Path("checkpoints")
        return folder / f"{PREFIX}{engine.clock.step:08d}"

    def wait(self) -> None:
        """Return when no save is in flight.

        Raises: the error of the save, once.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error


def finish_saves() -> None:
    """Wait for every save of this process, before the process group goes.

    Raises: the first error.
    """
    for saver in list(_savers):
        saver.wait()


@atexit.register
def _tell_unseen_errors() -> None:
    for saver in list(_savers):
        try:
            saver.wait()
        except UserError as error:
            sys.stderr.write(f"{error.report()}\n")
        except Exception as error:  # noqa: BLE001 - told; at exit nothing is left that could handle it
            sys.stderr.write(f"a checkpoint was not written: {type(error).__name__}: {error}\n")


def _serialised(value: Any) -> bytes:
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()
