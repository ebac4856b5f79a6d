"""Saves that are asked for inside an optimizer step wait until the step is over for the script as well.

What asks (`checkpoint.every_steps`, a command) is seen in `optimizer.step()`. Then the script still steps its schedule,
counts, and averages weights: a checkpoint of that moment would put every resumed run a step behind. The step is over
- where a prepared loader was being read: when it is asked for its next batch, or for its next epoch;
- else, or when that loop was left: at the next `accumulate`, the next forward of a model in training, `backward`, or at
  the latest the next `optimizer.step`, before it changes anything;
- at `end_training`, `load_state`, `saver.wait()`, and the end of the script.
At the end of a loader's epoch the state is saved at once as well, as a provisional one: what the script does there (it
evaluates, for an hour) may fail. What belongs to the epoch's end comes into the save that takes its place.
"""

from __future__ import annotations

import atexit
import sys
import threading
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from distui.core.errors import UserError
from distui.core.ranks import ops
from distui.core.ranks.random_states import RandomStates

EXIT_TIMEOUT = timedelta(seconds=60)
"""How long a rank whose script has ended waits for the others' to end, to save what the last steps asked for."""
LONGEST_WAIT_STEPS = 100
"""A script that takes so many steps with one batch is not waited for: its checkpoint is made inside the batch."""
ON_DISK, IN_MEMORY = "disk", "memory"
"""Who asks by settings, and is told nothing: `checkpoint.every_steps`, `memory_every_steps`."""
_open: weakref.WeakSet[StepEnd] = weakref.WeakSet()


class Save(Protocol):
    """Saves the step with the random states to go on from, and tells all that asked."""

    def __call__(
        self, asked: list[Any], random: RandomStates | None, *, provisional: bool = False, at_exit: bool = False
    ) -> None: ...


class StepEnd:
    """What waits for the end of a step; loaders, models and the engine tell it where the script is."""

    def __init__(
        self, save: Save, group: Callable[[], dist.ProcessGroup | None], trains: Callable[[], bool], num_processes: int
    ) -> None:
        """`group` gives what saves talk over, and may make it first; `trains` says whether models are in training."""
        self._save, self._group, self._trains, self._num_processes = save, group, trains, num_processes
        self._asked: list[Any] = []
        self._reading: dict[int, tuple[Any, int]] = {}
        """Loaders in whose loop the script is, each with the thread that reads it."""
        self._awaited: list[Any] = []
        """The loaders of which the next batch ends the step."""
        self._is_left = True
        """Whether the loop over them, if there was one, is over."""
        self._random: RandomStates | None = None
        self._waited_steps = 0
        self.before_batch: Callable[[], None] = lambda: None
        """Called when the script wants a batch."""
        self.before_work: Callable[[], None] = lambda: None
        """Called when the script begins to train with one."""
        self.arrived: Callable[[], None] = lambda: None
        """Called when the script has come to the epoch in which it was before it was started again."""
        self.after_save: Callable[[], None] = lambda: None
        """Called when what was asked for is being saved, and the script is still there."""
        _open.add(self)

    # ---- asking: in the step -------------------------------------------------------------------------------------

    def ask(self, who: Any = ON_DISK) -> None:
        """Have this step saved when it is over, and tell `who`. Collective: all ranks, in `optimizer.step`."""
        if not self._asked:
            self._group()  # here, where all ranks are surely together
            here = threading.get_ident()
            reading = [loader for loader, thread in self._reading.values() if thread == here]
            self._awaited = reading if self._same_everywhere(len(reading)) else []
            self._is_left = not self._awaited
            self._random = RandomStates.take()
            self._waited_steps = 0
        self._asked.append(who)

    def _same_everywhere(self, count: int) -> bool:
        if self._num_processes == 1:
            return True
        counts = torch.tensor([count, -count], device=ops.object_device())
        dist.all_reduce(counts, op=dist.ReduceOp.MAX)
        return counts.tolist() == [count, -count]

    def stepped(self) -> None:
        """Count a step; it may be that the script takes many with one batch."""
        if self._asked:
            self._waited_steps += 1
            self._is_left = self._is_left or self._waited_steps > LONGEST_WAIT_STEPS

    # ---- where the script is -------------------------------------------------------------------------------------

    def fetching(self, loader: Any) -> None:
        """The script wants a batch of `loader`, the first or a further one."""
        if self._asked and any(loader is awaited for awaited in self._awaited):
            self._run(None)
        self.before_batch()

    def passes_over(self, loader: Any) -> bool:
        """Tell whether the script comes again to an epoch that it has trained before it was started again."""
        if not self._trains():
            return False
        passes = bool(loader.next_epoch < loader.until_epoch)
        if not passes:
            self.arrived()
        return passes

    def handed(self, loader: Any) -> None:
        """The script has got a batch of `loader`."""
        self._reading[id(loader)] = (loader, threading.get_ident())
        if not self._trains():
            loader.num_used = loader.num_batches

    def exhausted(self, loader: Any) -> None:
        """The last batch of `loader` is done with, and the script goes on after its loop."""
        if self._asked and any(loader is awaited for awaited in self._awaited):
            self._is_left = True
            if any(who != IN_MEMORY for who in self._asked):  # one in memory is soon followed by another
                self._save([], None, provisional=True)

    def left(self, loader: Any) -> None:
        """The script is not in a loop over `loader` any more."""
        self._reading.pop(id(loader), None)
        if any(loader is awaited for awaited in self._awaited):
            self._is_left = True

    def working(self) -> None:
        """The script begins its next micro-batch."""
        if self._asked and self._is_left:
            self._run(None if self._awaited else self._random)
        self.before_work()

    def used(self) -> None:
        """A backward has run: the batches in hand have been trained with."""
        for loader, _ in self._reading.values():
            loader.num_used = loader.num_batches

    def in_hand(self) -> RandomStates | None:
        """Return the random states from before a batch that was handed out and not trained with; None without one."""
        unused = [loader for loader, _ in self._reading.values() if getattr(loader, "is_unused", False)]
        return unused[0].random_before if unused else None

    def finish(self, at_exit: bool = False) -> None:
        """Save what waits, if anything does. Collective."""
        if at_exit and all(who == IN_MEMORY for who in self._asked):
            self.forget()  # nobody will need it
        if not self._asked:
            return
        if at_exit and self._num_processes > 1:
            # Others may have raised: they never come.
            dist.monitored_barrier(self._group(), timeout=EXIT_TIMEOUT, wait_all_ranks=True)
        self._run(None if self._awaited else self._random, at_exit=at_exit)

    def forget(self) -> None:
        """Save nothing of what waits."""
        self._asked, self._awaited = [], []

    def _run(self, random: RandomStates | None, at_exit: bool = False) -> None:
        asked, self._asked = self._asked, []
        self._awaited, self._random = [], None
        self._save(asked, random, at_exit=at_exit)
        if not at_exit:
            self.after_save()


def finish_all() -> None:
    """Save what the script's last steps asked for; called when it has ended well. Collective.

    What goes wrong is told on stderr: nothing is left that could handle it.
    """
    for step_end in list(_open):
        try:
            step_end.finish(at_exit=True)
        except UserError as error:
            sys.stderr.write(f"{error.report()}\n")
        except Exception as error:  # noqa: BLE001 - as above
            sys.stderr.write(f"a checkpoint was not written: {type(error).__name__}: {error}\n")


def forget_all() -> None:
    """Save nothing more: the script has ended badly, and other ranks may not know."""
    for step_end in list(_open):
        step_end.forget()


@atexit.register
def _at_exit() -> None:
    # A rank whose script has raised must not wait for the others.
    if getattr(sys, "last_value", None) is None:
        finish_all()
