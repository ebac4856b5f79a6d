"""How long the stages of a pipeline wait for each other, from what their ranks were blocked in receives of late."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable

from distui.core.axes.sizes import AxisSizes
from distui.proto import telemetry_pb2 as pb

WINDOW_S = 30.0
_PAIR = re.compile(r"\[(\d+)>(\d+)\]$")
"""The end of the name of one direction between two ranks, as `core/telemetry/collectives.py` writes it."""


class StageWaits:
    """What each rank was blocked in receives from each other, at several times; the last `WINDOW_S` seconds count."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, dict[tuple[int, int], float]]] = deque()

    def note(self, time_s: float, collectives: Iterable[pb.CollectiveSummary]) -> None:
        """Take in a snapshot's collectives. Units: Unix seconds of the daemon."""
        blocked: dict[tuple[int, int], float] = {}
        for found in collectives:
            if found.op == "recv" and (pair := _PAIR.search(found.group)):
                sender, receiver = int(pair[1]), int(pair[2])
                blocked[sender, receiver] = blocked.get((sender, receiver), 0.0) + found.blocked_s
        if not blocked:
            return
        while self._samples and not 0.0 < time_s - self._samples[0][0] <= WINDOW_S:
            self._samples.popleft()  # also when a recording is moved back
        self._samples.append((time_s, blocked))

    def shares(self, sizes: AxisSizes) -> list[float | None]:
        """Return for each stage what share of the time its ranks waited for its neighbours; None is not known."""
        if len(self._samples) < 2:
            return [None] * sizes.pp
        (began_s, before), (now_s, after) = self._samples[0], self._samples[-1]
        waited: list[float | None] = [None] * sizes.pp
        for (sender, receiver), blocked_s in after.items():
            if max(sender, receiver) >= sizes.world or receiver not in sizes.peers(sender, ("pp",)):
                continue  # the script's own, or another axis's
            stage = sizes.place(receiver)["pp"]
            waited[stage] = (waited[stage] or 0.0) + max(0.0, blocked_s - before.get((sender, receiver), 0.0))
        of_stage = (now_s - began_s) * (sizes.world // sizes.pp)
        return [None if value is None else min(1.0, value / of_stage) for value in waited]
