"""Stage 3: which units are whole on this rank, for how long, and how the ranks agree on gathering them.

Whoever reads a parameter brings its unit here: a block that is entered, an operation on a parameter (`guarded`), a
tensor that autograd saved. Each asks `need`. What is used last stays: two blocks at a time, so that one computes while
the next arrives, and the root's units until the step. A unit goes earlier than that only where nothing but itself
refers to its memory: what a script or autograd still holds stays right, at the price of its memory. After a step the
numbers are old: whatever still refers to them then finds NaN.

Gathers are collectives, and ranks may take different ways through a model: see `transport/agreement`. What comes next
is learned from what came next before; where that is wrong, or not alike on all ranks, nothing is fetched ahead.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from distui.core.ranks.streams import Line
from distui.core.sharding.hooks import by_alias, route_saving, unseen_by_modes
from distui.core.sharding.refusals import refuse_other_data, refuse_unseen_reads
from distui.core.sharding.transport.agreement import Agreement, DisagreementError, Place, Round
from distui.core.sharding.units.block import Block
from distui.core.sharding.units.pool import BufferPool
from distui.core.sharding.units.states import ParamState
from distui.core.sharding.units.unit import Unit

_KIND = "whole parameters"

KEPT_BLOCKS = 2
"""One that computes, and one that arrives."""


def in_backward() -> bool:
    """Tell whether autograd is running on this thread (a checkpointed forward is then a recomputation)."""
    return torch._C._current_graph_task_id() != -1


@dataclass(slots=True)
class _Saved:
    """A tensor that autograd saved of a unit's parameters: where it lies, not what it holds."""

    group: int
    unit: Unit
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    change: int
    token: object


class Residence:
    """The whole parameters of one model's units on this rank."""

    def __init__(
        self,
        groups: Sequence[list[Unit]],
        agreement: Agreement | None,
        pool: BufferPool,
        sent: Callable[[], list[bool]],
        finish: Callable[[list[int]], None],
        line: Line | None,
    ) -> None:
        """`groups` are units that come and go together; `sent`, `finish` the gradients' part; `line` orders streams."""
        route_saving()
        self._groups, self._agreement, self._pool = list(groups), agreement, pool
        self._sent, self._finish, self._line = sent, finish, line
        self._group_of = {id(unit): index for index, units in enumerate(self._groups) for unit in units}
        self.roots = [index for index, units in enumerate(self._groups) if units[0].is_root]
        self._resident: OrderedDict[int, None] = OrderedDict()
        """Groups that are here or arriving, the root's aside, the one used longest ago first."""
        self._pinned: Counter[int] = Counter()
        self._current = -1
        self._after: dict[tuple[bool, int], int] = {}
        """(in backward, group) -> the group that was needed after it."""
        self._expected: int | None = None
        self._tokens = {id(unit): object() for units in groups for unit in units}  # in all that is saved of a unit
        self._changes: Counter[int] = Counter()  # of each unit's shards, by steps
        self._owners: dict[int, tuple[int, Unit]] = {}
        """Memory of a unit that may go -> its group and the unit."""
        self._buffers: dict[int, torch.Tensor] = {}
        """What a unit's whole parameters are cut from."""
        self._entered: list[tuple[Block, bool]] = []
        """Blocks that are entered, and whether hooks for what autograd saves were set for it."""
        self.all_whole = False
        """Inside `full_parameters`: every unit is whole in memory of its own."""
        self._largest: dict[tuple[Any, ...], int] = {}
        for unit in (unit for units in self._groups for unit in units if not unit.is_root):
            kind = (unit.dtype, unit.device, unit.placement)
            self._largest[kind] = max(self._largest.get(kind, 0), unit.layout.padded_numel)
        for index, units in enumerate(self._groups):
            for unit in units:
                unit.fetch = functools.partial(self._reading, index, unit)
                unit.renew = functools.partial(self._renew, unit)

    def group_of(self, unit: Unit) -> int:
        """Return the group of `unit`."""
        return self._group_of[id(unit)]

    # ---- who needs what ------------------------------------------------------------------------------------------

    def need(self, group: int) -> None:
        """Return when `group` is here. Other ranks take part whenever they come to a round."""
        if self._line is not None:
            self._line.join()
        units = self._groups[group]
        changed = group != self._current and not units[0].is_root
        if changed or not units[0].is_whole:
            with unseen_by_modes():
                self._bring(group, units, changed)

    def _bring(self, group: int, units: list[Unit], changed: bool) -> None:
        backward = in_backward()
        self._collect()
        while units[0].residence.state is ParamState.ABSENT:
            if self._agreement is None:
                self._start(group)
            else:
                self._post(group, self._next(group, backward))
                self._collect()
        for unit in units:
            unit.finish_gather()
        if not changed:
            return
        if self._current >= 0:
            self._after[backward, self._current] = group
        self._current = group
        self._resident.move_to_end(group)
        following = self._next(group, backward)
        if self._agreement is not None:
            self._post(None, following)
        elif following is not None:
            self._start(following)
        if following is not None and (beyond := self._after.get((backward, following))) is not None:
            # From a home behind a disk or a bus the shard must set out one step before its gather.
            for unit in self._groups[beyond]:
                if unit.residence.state is ParamState.ABSENT:
                    unit.prefetch()

    def _next(self, group: int, backward: bool) -> int | None:
        """Return what will be needed soon and is not here, as far as is known; two blocks ahead at most."""
        for _ in range(KEPT_BLOCKS):
            following = self._after.get((backward, group))
            if following is None:
                return None
            if following != self._expected and self._groups[following][0].residence.state is ParamState.ABSENT:
                return following
            group = following
        return None

    def _post(self, wanted: int | None, expected: int | None, place: Place = Place.RUNNING) -> None:
        assert self._agreement is not None
        self._expected = expected
        self._agreement.post(wanted, expected, self._sent(), place)

    def _collect(self) -> Round | None:
        """Act on what the round under way brought."""
        found = self._agreement.result() if self._agreement is not None else None
        if found is None:
            return None
        self._expected = None
        if found.wanted is not None:
            self._start(found.wanted)
        if found.expected is not None and found.expected != found.wanted:
            self._start(found.expected, keep=found.wanted)
        if found.sent:
            self._finish(found.sent)
        return found

    def _start(self, group: int, keep: int | None = None) -> None:
        """Gather `group`, beside `keep`, which is needed first. Collective: all ranks, whether they need it or not."""
        units = self._groups[group]
        if units[0].residence.state is not ParamState.ABSENT:
            for unit in units:
                unit.finish_gather()
                unit.take_writes()
                buffer = self._take(unit)
                unit.gather_beside(buffer[: unit.layout.padded_numel]).wait()
                self._pool.give(buffer, _KIND)
            return
        if not units[0].is_root:
            self._make_room(keep)
            self._resident[group] = None
        for unit in units:
            buffer = self._buffers[id(unit)] = self._take(unit)
            self._owners[buffer.untyped_storage()._cdata] = (group, unit)
            unit.start_gather(buffer[: unit.layout.padded_numel])

    def _take(self, unit: Unit) -> torch.Tensor:
        """Return room for whole parameters: blocks of all sizes take turns on buffers of the largest's."""
        numel = unit.layout.padded_numel
        if not unit.is_root:
            numel = self._largest[unit.dtype, unit.device, unit.placement]
        return self._pool.take(numel, unit.dtype, unit.device, _KIND)

    def _make_room(self, keep: int | None) -> None:
        for candidate in list(self._resident):
            if len(self._resident) < KEPT_BLOCKS:
                return
            units = self._groups[candidate]
            if self._pinned[candidate] or candidate == keep:
                continue
            for unit in units:
                unit.finish_gather()
                unit.take_writes()
            if any(unit.is_aliased for unit in units):
                continue
            self._release(candidate)

    def _release(self, group: int) -> None:
        for unit in self._groups[group]:
            aliased = unit.is_aliased
            unit.release()
            buffer = self._buffers.pop(id(unit))
            self._owners.pop(buffer.untyped_storage()._cdata, None)
            if aliased:
                buffer.fill_(torch.nan if buffer.is_floating_point() else 0)
                self._pool.forget(buffer)
            else:
                self._pool.give(buffer, _KIND)
        self._pinned.pop(group, None)
        self._resident.pop(group, None)

    def _renew(self, unit: Unit) -> None:
        """Move a whole unit to other memory, if anybody else refers to what it has. Raises: UserError."""
        refuse_other_data(unit.name, sys.getrefcount(self._tokens[id(unit)]) > 2)  # the dict's, and the call's
        if not unit.is_aliased or unit.full is None:
            return
        old = self._buffers.get(id(unit))
        if old is None:  # inside `full_parameters`
            return unit.replace(unit.full.clone())
        new = self._buffers[id(unit)] = self._take(unit).copy_(old)
        self._owners[new.untyped_storage()._cdata] = self._owners.pop(old.untyped_storage()._cdata)
        unit.replace(new[: unit.layout.padded_numel])
        self._pool.forget(old)

    @contextlib.contextmanager
    def _reading(self, group: int, unit: Unit, indices: Iterable[int]) -> Iterator[None]:
        """Hold `group` here while inside, and let these parameters of `unit` be read."""
        if self.all_whole:
            yield
            return
        refuse_unseen_reads()
        self.need(group)
        self._pinned[group] += 1
        some = unit.show_some(indices)
        hooked = self._hook_saving(of_block=False)
        try:
            yield
        finally:
            if hooked:
                torch._C._autograd._pop_saved_tensors_default_hooks()
            self._pinned[group] -= 1
            unit.hide_some(some)

    def enter(self, block: Block) -> None:
        """Bring `block` here, to be read by anybody until `leave`; autograd saves where a parameter lies, not it."""
        if self.all_whole:
            return
        refuse_unseen_reads()
        self.need(block.group)
        self._pinned[block.group] += 1
        block.show()
        self._entered.append((block, self._hook_saving(of_block=True)))

    def _hook_saving(self, of_block: bool) -> bool:
        """Set hooks for what autograd saves, unless they are set."""
        # A checkpoint counts what is saved, and again in its recomputation: a block keeps its parameters from both.
        if not torch.is_grad_enabled():
            return False
        outer = torch._C._autograd._top_saved_tensors_default_hooks(True)
        if outer is not None and getattr(outer[0], "distui_owner", None) is self:
            return False
        hooks = self._saving(outer) if outer is None or of_block else (by_alias(outer[0]), outer[1])
        torch._C._autograd._push_saved_tensors_default_hooks(*hooks)
        return True

    def leave(self, block: Block) -> None:
        """Undo one `enter` of `block`; nothing where it was not entered."""
        if all(entered is not block for entered, _ in self._entered):
            return
        left = None
        while left is not block:  # what an exception left entered inside of it goes first
            left, hooks = self._entered.pop()
            if hooks:
                torch._C._autograd._pop_saved_tensors_default_hooks()
            self._pinned[left.group] -= 1
            left.hide()

    def hold_roots(self) -> None:
        """Bring the root's units here until the step: code may read them without calling the module that holds them."""
        if not self.all_whole:
            refuse_unseen_reads()
        for group in self.roots:
            self.need(group)
            if not self._pinned[group]:
                self._pinned[group] = 1
                for unit in self._groups[group]:
                    unit.show()

    # ---- what autograd saves -------------------------------------------------------------------------------------

    def _saving(self, outer: Any) -> tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor]]:
        """Return hooks for saved tensors; what is no parameter goes through `outer`, such as a checkpoint's."""
        owners, tokens, pack_outer, unpack_outer = self._owners, self._tokens, None, None
        if outer is not None:
            pack_outer, unpack_outer = outer

        def pack(tensor: torch.Tensor) -> Any:
            owner = owners.get(tensor.untyped_storage()._cdata)
            if owner is None or tensor.dtype != owner[1].dtype:
                return tensor if pack_outer is None else pack_outer(tensor)
            group, unit = owner
            place = int(tensor.storage_offset()), tuple(tensor.shape), tuple(tensor.stride())
            return _Saved(group, unit, *place, self._changes[id(unit)], tokens[id(unit)])

        def unpack(saved: Any) -> torch.Tensor:
            if type(saved) is not _Saved:
                return saved if unpack_outer is None else unpack_outer(saved)
            return self._unpack(saved)

        pack.distui_owner = self  # type: ignore[attr-defined]
        return pack, unpack

    def _unpack(self, saved: _Saved) -> torch.Tensor:
        num_since = self._changes[id(saved.unit)] - saved.change
        if num_since:
            raise RuntimeError(
                f"backward needs the parameters of {saved.unit.name} as they were {num_since} steps "
                "ago: an optimizer step has changed them since this forward. Run the forward again, or the backward "
                "before the step"
            )
        self.need(saved.group)
        assert saved.unit.full is not None
        return saved.unit.full.as_strided(saved.shape, saved.stride, saved.offset)

    # ---- ends ----------------------------------------------------------------------------------------------------

    def meet(self) -> None:
        """Hear how far the others are. Collective: all ranks, some time."""
        self._collect()
        self._post(None, None)
        self._collect()

    def end_round(self) -> None:
        """Act on the round under way, so that what is done next does not meet its end."""
        self._collect()

    def serve(self, place: Place) -> None:
        """Take part in what other ranks need until they, too, have come to an end. Collective: all ranks.

        Raises: DisagreementError where they came to different ones.
        """
        if self._agreement is None:
            return
        self._collect()
        while True:
            self._post(None, None, place)
            found = self._collect()
            assert found is not None
            if found.wanted is not None or found.first_place is Place.RUNNING:
                continue
            if place is Place.FORWARD_END or found.first_place is found.last_place:
                return
            if found.first_place > Place.FORWARD_END:
                raise DisagreementError(
                    f"ranks are in different places: {found.first_place.name} and {found.last_place.name}"
                )

    def settle(self) -> None:
        """Before a step: what the script wrote to whole parameters goes to the shards."""
        for units in self._groups:
            for unit in units:
                unit.finish_gather()
                unit.take_writes()

    def invalidate(self, changed: Iterable[Unit] | None = None) -> None:
        """The shards of `changed` units (None: all) are others: everything must be gathered again."""
        for unit in (unit for units in self._groups for unit in units) if changed is None else changed:
            self._changes[id(unit)] += 1
        self.release_all()

    def release_all(self) -> None:
        """Let every whole unit go."""
        if self._entered and not in_backward():
            self.leave(self._entered[0][0])  # what an exception left entered
        for group, units in enumerate(self._groups):
            for unit in units:
                unit.finish_gather()
                unit.drop_prefetch()
            if units[0].is_whole:
                self._release(group)
        self._current = -1
