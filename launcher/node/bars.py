"""How many steps the training will have, from the script's own tqdm bars, where nobody has said.

A bar counts if optimizer steps fall into it: those of evaluations and downloads do not. Bars around each other
multiply. Where only an inner loop has one, its end is all that is known, and the number grows with the next epoch.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from distui.core.telemetry.source import TelemetrySource


@dataclass(slots=True)
class _Bar:
    """One bar. `items` counts those that were begun; `base` is the last step before it."""

    total: float
    base: int
    items: float = 0

    def steps(self, last: int) -> int:
        """Return how many steps it will have in all, from those up to `last`; 0 where it has had none."""
        done = last - self.base
        return math.ceil(done * self.total / self.items) if done > 0 and self.items else 0


def _on_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


class Bars:
    """The bars of this process, told to its telemetry."""

    def __init__(self, source: TelemetrySource) -> None:
        self._source = source
        self._open: list[_Bar] = []
        self._updated: WeakKeyDictionary[Any, _Bar] = WeakKeyDictionary()
        self._found = 0

    def watch(self, module: ModuleType) -> None:
        """Have `tqdm.std`'s bars tell of themselves; its other bars stand on these."""
        bar = module.tqdm
        init, iterate, update, bars = bar.__init__, bar.__iter__, bar.update, self

        def __init__(self: Any, *arguments: Any, **options: Any) -> None:
            init(self, *arguments, **options)
            bars._updated[self] = _Bar(bars._total(self), bars._source.last_step)

        def __iter__(self: Any) -> Iterator[Any]:
            bars._updated.pop(self, None)
            return bars._iterate(bars._total(self), iterate(self))

        def _update(self: Any, n: float | None = 1) -> Any:
            found = bars._updated.get(self) if _on_main_thread() else None  # else a download beside the training
            if found is not None and n:
                found.items += n
                bars._tell(found.base + found.steps(bars._source.last_step) if found.total else 0)
            return update(self, n)

        bar.__init__, bar.__iter__, bar.update = __init__, __iter__, _update

    @staticmethod
    def _total(bar: Any) -> float:
        """Return how many items a bar has to go; 0 where that is not known."""
        total = getattr(bar, "total", None)
        if not isinstance(total, (int, float)) or not math.isfinite(total):
            return 0
        return max(0, total - (getattr(bar, "initial", 0) or 0))

    def _iterate(self, total: float, items: Iterator[Any]) -> Iterator[Any]:
        if not total or not _on_main_thread():
            yield from items
            return
        bar = _Bar(total, self._source.last_step)
        self._open.append(bar)
        try:
            for item in items:
                bar.items += 1
                before = self._source.last_step
                yield item
                if self._source.last_step != before:
                    self._tell(self._end(bar))
        finally:
            self._open = [other for other in self._open if other is not bar]

    def _end(self, inner: _Bar) -> int:
        """Return the step at which the outermost bar around `inner` ends, as far as can be told."""
        steps = inner.steps(self._source.last_step)
        end = inner.base + steps
        for bar in reversed(self._open[: next(at for at, one in enumerate(self._open) if one is inner)]):
            end += int(steps * (bar.total - bar.items))
            steps = end - bar.base
        return end

    def _tell(self, steps: int) -> None:
        """Say how many steps there are to be, unless somebody else has said it."""
        if steps > self._source.last_step - 1 and self._source.total_steps in (0, self._found):
            self._found = self._source.total_steps = steps
