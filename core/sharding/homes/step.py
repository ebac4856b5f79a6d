"""The optimizer's step where states have other homes: unit by unit, so that no more than three are in memory.

While one unit is updated the next one's master, states and gradient are fetched, and those of the one before are
stored. The optimizer itself is the script's own: for each unit its groups hold that unit's runs alone, and what a step
changes in a group's hyper-parameters (a counter) counts once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from distui.core.ranks import streams
from distui.core.ranks.host_memory import PAGE_BYTES, page_buffer
from distui.core.sharding.homes.home import Cell, CellSlice, Transfer
from distui.core.sharding.homes.homes import Homes
from distui.core.sharding.homes.memory import MemoryCell
from distui.core.sharding.optim.elementwise import probe_states
from distui.core.sharding.units.layout import round_up

if TYPE_CHECKING:
    from distui.core.sharding.optim.runs import FlatRun
    from distui.core.sharding.units.unit import Unit

NUM_FRAMES = 3
"""One unit is fetched, one updated, one stored."""


@dataclass(slots=True)
class _Work:
    """One unit's part of the step."""

    unit: Unit
    runs: list[tuple[int, FlatRun]] = field(default_factory=list)
    """With the index of their parameter group."""
    states: dict[str, Cell] = field(default_factory=dict)
    """Homes of the states, each as long as the unit's shard."""
    moved: dict[int, set[str]] = field(default_factory=dict)
    """Run -> its states that rest there."""


class _Frame:
    """Memory for one unit's tensors while they are here."""

    def __init__(self, device: torch.device, pinned: bool) -> None:
        self._device, self._pinned = device, pinned
        self._buffer: torch.Tensor | None = None
        self._filled = 0
        self.transfers: list[Transfer] = []
        self.lent: list[Transfer] = []
        """Copies from here to the device, which it has ordered itself: they need only be over when this is refilled."""

    @property
    def nbytes(self) -> int:
        return self._buffer.numel() if self._buffer is not None else 0

    def clear(self, nbytes: int) -> None:
        """Wait for what is in flight, and make room."""
        self.finish()
        lent, self.lent = self.lent, []
        for transfer in lent:
            transfer.wait()
        self._filled = 0
        if self.nbytes < nbytes:
            self._buffer = None
            on_host = not streams.machine.is_apart(self._device)
            self._buffer = (
                page_buffer(nbytes, self._pinned)
                if on_host
                else torch.zeros(round_up(nbytes, PAGE_BYTES), dtype=torch.uint8, device=self._device)
            )

    def place(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Return room for a flat tensor."""
        assert self._buffer is not None
        start = self._filled
        self._filled = round_up(start + numel * dtype.itemsize, PAGE_BYTES)
        return self._buffer[start : start + numel * dtype.itemsize].view(dtype)

    def finish(self) -> None:
        """Wait until what was fetched is here, and what was stored has left."""
        transfers, self.transfers = self.transfers, []
        for transfer in transfers:
            transfer.wait()


class UnitStream:
    """Steps one optimizer's runs unit by unit."""

    def __init__(self, inner: torch.optim.Optimizer, runs: list[list[FlatRun]], homes: Homes) -> None:
        """Claim room for the states. Raises: UserError where a disk has none."""
        self._inner, self._homes = inner, homes
        self._device = homes.step_device
        works: dict[int, _Work] = {}
        for index, of_group in enumerate(runs):
            for run in of_group:
                work = works.setdefault(id(run.unit), _Work(run.unit))
                work.runs.append((index, run))
        self._works = list(works.values())
        self._work_of = works
        pinned = streams.machine.is_apart(homes.device)
        self._frames = [_Frame(self._device, pinned) for _ in range(min(NUM_FRAMES, len(self._works)))]
        if homes.states is not None:
            kinds = [probe_states(inner, group) for group in inner.param_groups]
            for work in self._works:
                for index, _ in work.runs:
                    for key, dtype in kinds[index].items():
                        self._state_cell(work, key, dtype)
        self.stash()

    @property
    def frame_bytes(self) -> int:
        """Memory that units pass through."""
        return sum(frame.nbytes for frame in self._frames)

    # ---- the step ------------------------------------------------------------------------------------------------

    def step(self, factor: float) -> None:
        """Update every unit, with gradients times `factor`; the shards in the compute format are new as well.

        Raises: UserError where a home fails.
        """
        self._homes.settle()
        groups = self._inner.param_groups
        params = [group["params"] for group in groups]
        before = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        try:
            # As in plain torch, what has no gradient is not stepped; it is the same on all ranks.
            works = [work for work in self._works if work.unit.has_gradient]
            here = self._fetch(works[0], self._frames[0]) if works else {}
            for index, work in enumerate(works):
                following = {}
                if index + 1 < len(works):
                    following = self._fetch(works[index + 1], self._frames[(index + 1) % len(self._frames)])
                frame = self._frames[index % len(self._frames)]
                frame.finish()
                self._bind(work, here, factor)
                for group, hyper, position in zip(groups, before, range(len(groups)), strict=True):
                    group.update(hyper)
                    group["params"] = [run.param for of_group, run in work.runs if of_group == position]
                self._inner.param_groups = [group for group in groups if group["params"]]
                self._inner.step()
                self._store(work, here, frame)
                here = following
            for frame in self._frames:
                frame.finish()
        finally:
            self._inner.param_groups = groups
            for group, whole in zip(groups, params, strict=True):
                group["params"] = whole

    def _elsewhere(self, cell: Cell | None, tensor: torch.Tensor | None) -> Cell | None:
        """Return what must be fetched for the step; None where it lies in the step's memory."""
        if cell is None:
            assert tensor is not None
            cell = MemoryCell(tensor)
        return None if isinstance(cell, MemoryCell) and self._is_here(cell.tensor) else cell

    def _is_here(self, tensor: torch.Tensor) -> bool:
        return streams.machine.holds(tensor) == streams.machine.is_apart(self._device)

    def _master(self, unit: Unit) -> Cell | None:
        return self._elsewhere(unit.master_cell, unit.master if unit.master_cell is None else None)

    def _gradient(self, unit: Unit) -> Cell | None:
        return self._elsewhere(unit.grad_cell, unit.grad_shard)

    @staticmethod
    def _at_hand(cell: Cell | None, tensor: torch.Tensor | None) -> torch.Tensor:
        found = cell.at_hand() if isinstance(cell, MemoryCell) else tensor
        assert found is not None
        return found

    def _fetch(self, work: _Work, frame: _Frame) -> dict[str, torch.Tensor]:
        """Start to bring a unit's tensors here; return where they arrive."""
        unit, numel = work.unit, work.unit.layout.shard_numel
        cells: dict[str, Cell | None] = {"master": self._master(unit), "grad": self._gradient(unit)}
        present = set().union(*work.moved.values()) if work.moved else set()
        # An item of its own for what a first step will bring forth, and for the copy in the compute format.
        rooms = {name: cell.dtype for name, cell in cells.items() if cell is not None}
        rooms |= {f"state.{key}": cell.dtype for key, cell in work.states.items()}
        if unit.has_master and self._writes_low(unit):
            rooms["low"] = unit.dtype
        frame.clear(sum(round_up(numel * dtype.itemsize, PAGE_BYTES) for dtype in rooms.values()))
        here = {name: frame.place(numel, dtype) for name, dtype in rooms.items()}
        cells |= {f"state.{key}": work.states[key] for key in present}
        for name, cell in cells.items():
            if cell is not None:
                frame.transfers.append(cell.fetch(here[name]))
        return here

    def _writes_low(self, unit: Unit) -> bool:
        return unit.shard_cell is not None or not self._is_here(unit.shard)

    def _bind(self, work: _Work, here: dict[str, torch.Tensor], factor: float) -> None:
        unit = work.unit
        master = here.get("master")
        grad = here.get("grad")
        if grad is None:
            grad = self._at_hand(unit.grad_cell, unit.grad_shard)
        if master is None and unit.master_cell is not None:
            unit.master_cell.settle()  # the optimizer has it as its parameter
        for _, run in work.runs:
            if master is not None:
                run.param.data = master[run.start : run.end].view(run.shape)
            piece = grad[run.start : run.end].view(run.shape)
            if factor != 1.0:
                piece.mul_(factor)
            if not run.has_gradient:
                run.param.grad = None
                continue
            run.param.grad = piece if piece.dtype == run.param.dtype else piece.to(run.param.dtype)
            for key in work.moved.get(id(run), ()):
                self._inner.state[run.param][key] = here[f"state.{key}"][run.start : run.end].view(run.shape)

    def _store(self, work: _Work, here: dict[str, torch.Tensor], frame: _Frame) -> None:
        unit = work.unit
        master = here.get("master")
        if self._homes.states is not None:
            for _, run in work.runs:
                self._keep_states(work, run, here)
            for key, cell in work.states.items():
                if f"state.{key}" in here:
                    frame.transfers.append(cell.store(here[f"state.{key}"]))
        if unit.has_master:
            whole = master
            if whole is None:
                whole = self._at_hand(unit.master_cell, unit.master if unit.master_cell is None else None)
            if "low" in here:
                here["low"].copy_(whole)
                if unit.shard_cell is not None:
                    frame.transfers.append(unit.shard_cell.store(here["low"]))
                else:
                    frame.lent.append(MemoryCell(unit.shard).store(here["low"]))
            else:
                unit.shard.copy_(whole)
        home = self._master(unit)
        if master is not None and home is not None:
            (frame.lent if unit.master_cell is None else frame.transfers).append(home.store(master))
        for _, run in work.runs:
            run.param.grad = None
            if master is not None:
                run.param.data = run.param.data.new_empty(0)

    def _keep_states(self, work: _Work, run: FlatRun, here: dict[str, torch.Tensor]) -> None:
        state = self._inner.state[run.param]
        for key in self._movable(run):
            value = state.pop(key).reshape(-1)
            self._state_cell(work, key, value.dtype)
            work.moved.setdefault(id(run), set()).add(key)
            place = here.get(f"state.{key}")
            if place is None:  # a state that came later than the first step
                work.states[key].write(run.start, value)
            elif place[run.start : run.end].data_ptr() != value.data_ptr():
                place[run.start : run.end].copy_(value)

    # ---- the states ----------------------------------------------------------------------------------------------

    def split(self, run: FlatRun, pieces: list[FlatRun]) -> None:
        """Step the `pieces` of a run apart from now on."""
        work = self._work_of[id(run.unit)]
        at = next(index for index, (_, other) in enumerate(work.runs) if other is run)
        group = work.runs[at][0]
        work.runs[at : at + 1] = [(group, piece) for piece in pieces]
        moved = work.moved.pop(id(run), set())
        work.moved.update({id(piece): set(moved) for piece in pieces if moved})

    def _movable(self, run: FlatRun) -> list[str]:
        state = self._inner.state.get(run.param, {})
        shape = torch.Size(run.shape)
        return [
            key
            for key, value in state.items()
            if isinstance(value, torch.Tensor) and value.shape == shape and value.dim()
        ]

    def _state_cell(self, work: _Work, key: str, dtype: torch.dtype) -> Cell:
        cell = work.states.get(key)
        if cell is None:
            assert self._homes.states is not None
            cell = work.states[key] = self._homes.states.cell(work.unit.layout.shard_numel, dtype)
        return cell

    def stash(self) -> None:
        """Bring states that lie in memory (a resumed script's, or loaded ones) to their home."""
        if self._homes.states is None:
            return
        for work in self._works:
            for _, run in work.runs:
                state = self._inner.state.get(run.param, {})
                for key in self._movable(run):
                    value = state.pop(key).detach().reshape(-1)
                    self._state_cell(work, key, value.dtype).write(run.start, value)
                    work.moved.setdefault(id(run), set()).add(key)

    def states_of(self, run: FlatRun) -> dict[str, CellSlice]:
        """Return the states of a run that are not in memory."""
        work = self._work_of[id(run.unit)]
        return {key: CellSlice(work.states[key], run.start, run.end) for key in sorted(work.moved.get(id(run), ()))}

    def make_state(self, run: FlatRun, key: str, dtype: torch.dtype) -> bool:
        """Make a state of a run at home, to be written; False where states lie in memory."""
        if self._homes.states is None:
            return False
        work = self._work_of[id(run.unit)]
        self._state_cell(work, key, dtype)
        work.moved.setdefault(id(run), set()).add(key)
        return True

    def forget(self) -> None:
        """Forget the states that are not in memory, since others are about to be loaded."""
        for work in self._works:
            work.moved.clear()
