"""Brings a script that was started again to its newest checkpoint by itself, before it trains.

The script runs from its beginning, as if for the first time. When it first trains, or asks a loader for a batch to
train with, everything has been prepared: then the newest whole checkpoint of the run is loaded. Loops over epochs that
were trained before are passed over (they give no batch, and schedulers stand still), so that a script that counts
epochs from 0 comes to the one in which it was. A script that calls `load_state` itself is left alone.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from distui.core.errors import UserError
from distui.core.paths import current_run
from distui.core.ranks import ops
from distui.core.ranks.random_states import RandomStates

if TYPE_CHECKING:  # the room of checkpoints takes a second to import: it is when it is first used
    from distui.core.checkpoint.trained import Trained

    class Resumed(Trained, Protocol):
        """An engine, as far as it is brought to a checkpoint."""

        def load_state(self, input_dir: str, *, strict: bool = True) -> list[str]:
            """Load a checkpoint. Collective."""
            ...


IN_MEMORY = "memory"
RESTARTS_ENV = "TORCHELASTIC_RESTART_COUNT"
"""How often the job was started again, as torchrun has it."""


class Resuming:
    """Whether a checkpoint is to be loaded by itself, and whether the script is on its way to where it was."""

    def __init__(self, engine: Resumed) -> None:
        self._engine, run = engine, current_run()
        restarts = os.environ.get(RESTARTS_ENV, "0")
        again = run is not None and restarts.isdecimal() and int(restarts) > 0
        self._run_id = run.run_id if run is not None and engine.config.checkpoint.resume == "restart" else None
        self.is_due = again or engine.config.checkpoint.resume == "always"
        """Whether the script has not trained yet, and is to go on from a checkpoint."""
        self.is_passing = False
        """Whether the script passes over epochs that were trained before."""
        self._random: RandomStates | None = None
        """Those of the checkpoint, until the script is there."""

    def before_batch(self) -> None:
        """Load what is due where the script wants a batch to train with. Collective."""
        engine = self._engine
        if self.is_due and engine._optimizers and any(model.training for model in engine._models):
            self.is_passing = self._load()

    def before_work(self) -> None:
        """Load what is due where the script begins to train. Collective."""
        if self.is_due:
            self._load()
        self.is_passing, self._random = False, None

    def arrive(self) -> None:
        """Forget what the script drew on its way to the epoch in which it was, in evaluations, say."""
        if self._random is not None:
            self._random.give_back()
            self._random = None

    def _load(self) -> bool:
        """Load the newest checkpoint, if there is one; tell whether there was."""
        from distui.core.checkpoint.memory import folder_in_memory

        self.is_due = False
        engine = self._engine
        found = self._newest() if engine.process_index == 0 else ""
        if engine.num_processes > 1:
            found = ops.broadcast_object(found)
        if not found:
            return False
        # Each host has its own folder of what is in memory.
        engine.load_state(str(folder_in_memory()) if found == IN_MEMORY else found)
        again = [loader for loader in engine._loaders if loader.replay()]
        if again:
            self._random = RandomStates.take()
        if engine.process_index == 0:
            passed = "; loops over epochs that were trained before give no batch" if again else ""
            where = f"step {engine.clock.step} in memory" if found == IN_MEMORY else found
            print(f"distui: going on from {where}{passed}", file=sys.stderr, flush=True)
        return True

    def _newest(self) -> str:
        """Return the newest whole checkpoint, or `IN_MEMORY`; "" without one. One in an epoch's end comes last.

        What a restart says beforehand (`launcher/node/restarts`) follows the same rule, without torch.
        """
        from distui.core.checkpoint.folder import read_manifest
        from distui.core.checkpoint.memory import folder_in_memory
        from distui.core.checkpoint.rotation import checkpoints
        from distui.core.checkpoint.saver import folder_of_step

        known: list[tuple[bool, Path]] = []
        for path in checkpoints(folder_of_step(self._engine).parent):
            try:
                manifest = read_manifest(path)
            except (UserError, OSError):
                continue  # gone by now
            if self._run_id is None or manifest.get("run") == self._run_id:
                known.append((bool(manifest.get("provisional")), path))
        whole = [path for provisional, path in known if not provisional] or [path for _, path in known]
        kept = folder_in_memory()
        if kept is not None:
            saved_at_s = read_manifest(kept)["saved_at_s"]
            if not whole or read_manifest(whole[-1]).get("saved_at_s", 0.0) <= saved_at_s:
                return IN_MEMORY
        return str(whole[-1]) if whole else ""
