"""Stage 3: the buffers in which full parameters live while their unit runs, and when they are gathered.

Units take turns on a static ring of slots, so a parameter's address never changes and tensors that autograd saved stay
right; what is stale is gathered again before it is read. The root's units own their buffers. Gathers follow the order
of the first forward: the next unit's gather starts before the current one computes.
"""

from __future__ import annotations

from distui.core.offload.home import flat_buffer
from distui.core.sharding.unit import Unit

NUM_SLOTS = 2


class SlotRing:
    """Gathers units into slots just before they run. All ranks call it in the same order."""

    def __init__(self, units: list[Unit]) -> None:
        self._units = [unit for unit in units if not unit.is_root]
        self._roots = [unit for unit in units if unit.is_root]
        self._owner: dict[int, Unit | None] = {}
        """Slot (by address) -> the unit whose parameters it holds or is receiving."""
        self._valid: set[int] = set()
        """Identities of units whose full parameters are here or on their way."""
        self._recorded: list[list[Unit]] = []
        self._recording = True
        self._cursor = -1
        self._backward_reaches: int | None = None
        """Position of the first block that takes part in backward; those before it are frozen. None: not known yet."""
        self._in_backward = False
        self._position: dict[int, int] = {}
        for kind in {(unit.dtype, unit.device, unit.trainable) for unit in self._units}:
            of_kind = [unit for unit in self._units if (unit.dtype, unit.device, unit.trainable) == kind]
            numel = max(unit.layout.padded_numel for unit in of_kind)
            ring = [
                flat_buffer(numel, kind[0], kind[1], of_kind[0].homes is not None)
                for _ in range(min(NUM_SLOTS, len(of_kind)))
            ]
            for index, unit in enumerate(of_kind):
                unit.bind(ring[index % len(ring)][: unit.layout.padded_numel])
        for unit in self._roots:
            unit.bind(flat_buffer(unit.layout.padded_numel, unit.dtype, unit.device, unit.homes is not None))

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all slots and of the root's buffers."""
        seen = {}
        for unit in self._units + self._roots:
            assert unit.full is not None
            storage = unit.full.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        return sum(seen.values())

    def _start(self, unit: Unit) -> None:
        if id(unit) in self._valid:
            return
        assert unit.full is not None
        slot = unit.full.data_ptr()
        previous = self._owner.get(slot)
        if previous is not None and previous is not unit:
            previous.finish_gather()
            self._valid.discard(id(previous))
        self._owner[slot] = unit
        self._valid.add(id(unit))
        unit.start_gather()

    def invalidate(self) -> None:
        """The shards have changed: everything must be gathered again."""
        for unit in self._units + self._roots:
            unit.finish_gather()
            unit.drop_prefetch()
        self._valid.clear()

    # ---- a pass over the model -----------------------------------------------------------------------------------

    def begin_forward(self, roots: list[Unit]) -> None:
        """Gather the root and start on the first block."""
        self._in_backward = False
        for unit in roots:
            self._start(unit)
        self._cursor = -1
        if not self._recording and self._recorded:
            self._gather_all(self._recorded[0])
        for unit in roots:
            unit.finish_gather()

    def _gather_all(self, units: list[Unit]) -> None:
        for unit in units:
            self._start(unit)

    def gather_roots(self, roots: list[Unit]) -> None:
        """Make root units readable."""
        for unit in roots:
            self._start(unit)
            unit.finish_gather()

    def recorded_units(self, units: list[Unit]) -> list[Unit]:
        """Return `units` in the order in which the first forward ran them, the root where it was."""
        place = {id(unit): position for position, entered in enumerate(self._recorded) for unit in entered}
        blocks = sorted((unit for unit in units if not unit.is_root), key=lambda unit: place.get(id(unit), len(place)))
        in_order = iter(blocks)
        return [unit if unit.is_root else next(in_order) for unit in units]

    def enter(self, units: list[Unit], backward: bool) -> None:
        """Make `units` readable, and start the gather of those that come next in this direction."""
        if self._recording and not backward:
            if not self._recorded or self._recorded[-1] is not units:
                self._position.setdefault(id(units), len(self._recorded))
                self._recorded.append(units)
            self._gather_all(units)
            for unit in units:
                unit.finish_gather()
            return
        here = self._position.get(id(units))
        step = -1 if backward else 1
        if here is not None:
            # Units that this rank skipped are gathered all the same: its peers may need its shard.
            for skipped in range(self._cursor + step, here, step):
                if 0 <= skipped < len(self._recorded):
                    self._gather_all(self._recorded[skipped])
                    for unit in self._recorded[skipped]:
                        unit.finish_gather()
            self._cursor = here
        self._gather_all(units)
        for unit in units:
            unit.finish_gather()
        if here is not None and 0 <= here + step < len(self._recorded):
            following = self._recorded[here + step]
            if not self._shares_slot(units, following):
                self._gather_all(following)
            # From a home behind a disk or a bus the shard must set out one step before its gather.
            beyond = here + (1 if self._shares_slot(units, following) else 2) * step
            if 0 <= beyond < len(self._recorded):
                for unit in self._recorded[beyond]:
                    if id(unit) not in self._valid:
                        unit.prefetch()

    def _shares_slot(self, units: list[Unit], others: list[Unit]) -> bool:
        slots = {unit.full.data_ptr() for unit in units if unit.full is not None}
        return any(unit.full is not None and unit.full.data_ptr() in slots for unit in others)

    def end_forward(self) -> bool:
        """Gather what this rank skipped behind the last unit entered; return True if this forward fixed the order."""
        fixed = False
        if self._recording:
            fixed = bool(self._recorded)
            self._recording = not fixed
        else:
            for skipped in self._recorded[self._cursor + 1 :]:
                self._gather_all(skipped)
        self._cursor = len(self._recorded)
        return fixed

    def begin_backward(self, roots: list[Unit]) -> None:
        """The root's parameters are there for all of backward."""
        if self._in_backward:
            return
        self._in_backward = True
        self.gather_roots(roots)
        self._cursor = len(self._recorded)

    def end_backward(self) -> None:
        """Gather what this rank skipped in front of the last unit entered, as the other ranks did."""
        if not self._in_backward:
            return
        self._in_backward = False
        if self._backward_reaches is None:
            self._backward_reaches = self._cursor
        for position in range(self._cursor - 1, self._backward_reaches - 1, -1):
            self._gather_all(self._recorded[position])
        self._cursor = -1
