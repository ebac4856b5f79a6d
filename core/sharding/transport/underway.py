"""What is under way over gloo lives until it is over, though whoever began it is gone.

A message whose buffer was freed stops the connection that it comes by: whatever the ranks do next then waits for ever.
So a script that drops an engine right after its step, while weights travel, must not drop the messages with it.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist


class Underway:
    """The exchanges of one process group that nobody has waited for."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[weakref.ref[Any], Sequence[Any], Any]] = {}
        self._numbers = itertools.count()

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> Underway:
        """Return the exchanges of `group`; they go with it."""
        return _of_group.setdefault(group, cls())

    def hold(self, owner: Any, works: Sequence[Any], tensors: Any) -> int:
        """Keep `works` and the memory that they read and write, for `owner`; returns a number for `let_go`."""
        number = next(self._numbers)
        self._held[number] = (weakref.ref(owner), works, tensors)
        return number

    def let_go(self, number: int) -> None:
        """Forget what is over."""
        del self._held[number]

    def finish_dropped(self) -> None:
        """Wait for what nobody can wait for any more, and free its memory. All ranks have begun it."""
        for number, (owner, works, _) in list(self._held.items()):
            if owner() is None:
                self.let_go(number)
                for work in works:
                    work.wait()


_of_group: weakref.WeakKeyDictionary[dist.ProcessGroup, Underway] = weakref.WeakKeyDictionary()
