"""The whole parameters of a unit: where they are, who may read them, and what a script writes to them."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from distui.core.errors import UserError
from distui.core.sharding.homes.home import Waitable
from distui.core.sharding.homes.homes import Homes
from distui.core.sharding.start.start import Start
from distui.core.sharding.transport.transport import Transport
from distui.core.sharding.units.guarded import DATA, guard, let_go, refused_view
from distui.core.sharding.units.placement import Placement
from distui.core.sharding.units.shards import Shards
from distui.core.sharding.units.states import PARAM_MOVES, Machine, ParamState


class UnitParameters(Shards):
    """One flat group of parameters of one dtype; `Unit` adds their gradients."""

    def __init__(
        self,
        name: str,
        named_params: list[tuple[str, nn.Parameter]],
        modules: list[nn.Module],
        is_root: bool,
        placement: Placement,
        gathers: Transport | None,
        homes: Homes | None,
        start: Start,
    ) -> None:
        super().__init__(name, named_params, modules, is_root, placement, gathers, homes, start)
        self.full: torch.Tensor | None = None
        """The whole parameters [P]; None while they are absent (stage 3)."""
        # Parameters in flight: the all-gather after a step (stage 1, 2) or before the unit runs (stage 3).
        self.residence = Machine(name, ParamState.ABSENT, PARAM_MOVES)
        self.gathering: Waitable | None = None
        self.touched = False
        """The script may have written to the parameters since `take_writes`."""
        self._versions = [0] * len(self.params)
        """Of each parameter, autograd's count of writes as far as it is taken note of."""
        self._hidden_at = [0] * len(self.params)
        """Stage 3: how often the unit had been released when each parameter was hidden last."""
        self._num_released = 0
        self._left: list[torch.Tensor] = []
        """Stage 3: memory that was released while somebody else had it, who may have it still: NaN."""
        self._written_hidden = False
        """A view wrote to a parameter that was hidden, since `take_writes`."""
        self._num_shown = 0
        self._own_references = 0
        whole, part = self._begin(start)
        nan = torch.full((), torch.nan if self.dtype.is_floating_point else 0, dtype=self.dtype, device=self.device)
        self._nan = [nan.expand(span.shape) for span in self.layout.spans]
        strides = (torch.empty(span.shape, device="meta").stride() for span in self.layout.spans)
        self._cuts = [(span.shape, each, span.offset) for span, each in zip(self.layout.spans, strides, strict=True)]
        self._classes = guard(self.params, self)  # type: ignore[arg-type]
        self.fetch: Callable[[Iterable[int]], contextlib.AbstractContextManager[None]] | None = None
        """Stage 3: brings this unit here for whoever reads it; set by the residence of the model's units."""
        self.renew: Callable[[], None] | None = None
        """Stage 3: moves whole parameters to other memory where somebody else refers to theirs, who keeps it."""
        self._assigned: set[int] = set()
        """Stages 0 to 2: parameters that are what a script assigned to their `data`, not in `full` yet."""
        self._views: dict[tuple[int, int], list[torch.Tensor]] = {}
        self._place_parameters(whole, part)
        _units.add(self)

    def _place_parameters(self, whole: torch.Tensor | None, part: torch.Tensor) -> None:
        """Take what the unit starts with: `part` is this rank's, in the precision of the script or its files."""
        start, end = self.layout.shard(self.rank)
        if self.has_master:
            master = self._flat(part.numel(), torch.float32)
            self._keep_master(master.copy_(part))
        if self.placement.shards_parameters:
            # Memory of its own: `part` may be cut from the whole unit, which goes.
            shard = self._flat(part.numel(), self.dtype).copy_(part)
            if self.homes is not None and self.homes.params is not None:
                self.shard_cell = self.homes.params.cell(shard.numel(), self.dtype)
                self.shard_cell.store(shard).wait()
            else:
                self.shard = shard
            self._begin_hidden()
        else:
            full = whole
            if full is None or full.dtype != self.dtype:
                full = self._flat(self.layout.padded_numel, self.dtype)
                if whole is not None:
                    full.copy_(whole)
            self.shard = full[start:end]
            if whole is None:
                self.shard.copy_(part)
                self.gather_into(full, self.shard)
            self.place(full)
        if not self.has_master:
            self.master_cell = self.shard_cell
            if self.shard_cell is None:
                self.master = self.shard

    def views(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """Return each parameter's view of the flat `buffer`; cached, since buffers are few and reused."""
        key = (buffer.data_ptr(), buffer.numel())
        views = self._views.get(key)
        if views is None:
            views = [buffer[span.offset : span.end].view(span.shape) for span in self.layout.spans]
            self._views[key] = views
        return views

    # ---- whole, or not -------------------------------------------------------------------------------------------

    @property
    def is_whole(self) -> bool:
        """Whether the whole parameters are in memory just now."""
        return self.residence.state is ParamState.WHOLE

    def _begin_hidden(self) -> None:
        for param, (kept, _) in zip(self.params, self._classes, strict=True):
            param.__class__ = kept
        self._num_shown = len(self.params)
        self.hide_some(range(len(self.params)))

    def show(self) -> None:
        """Make every parameter a view of `full`, which is whole: from here on it is read as fast as ever."""
        self.show_some(range(len(self.params)))

    def show_some(self, indices: Iterable[int]) -> list[int]:
        """Make some parameters views of `full`; return those that were none."""
        assert self.is_whole and self.full is not None
        full, start = self.full, self.full.storage_offset()
        shown = []
        for index in indices:
            param, kept = self.params[index], self._classes[index][0]
            if type(param) is kept:
                continue
            param.__class__ = kept
            shape, strides, offset = self._cuts[index]
            DATA.__set__(param, full.as_strided(shape, strides, start + offset))  # one call: blocks come and go
            if param._version != self._versions[index]:  # by a view from before, which counts with it
                self._note_hidden_write(index)
                self.touched, self._versions[index] = True, param._version
            shown.append(index)
        self._num_shown += len(shown)
        return shown

    def hide(self) -> None:
        """Leave NaN in the place of every parameter: whoever reads one must ask for it."""
        self.hide_some(range(len(self.params)))

    def hide_some(self, indices: Iterable[int]) -> None:
        """Leave NaN in the place of some parameters."""
        for index in indices:
            param, fetched = self.params[index], self._classes[index][1]
            if type(param) is fetched:
                continue
            if param._version != self._versions[index]:
                self.touched, self._versions[index] = True, param._version
            DATA.__set__(param, self._nan[index])
            param.__class__ = fetched
            self._hidden_at[index] = self._num_released
            self._num_shown -= 1

    def _note_writes(self) -> bool:
        """Return whether parameters were written to since this was last asked, hidden ones by views from before."""
        with torch._C.DisableTorchFunctionSubclass():
            versions = [param._version for param in self.params]
        if versions == self._versions:
            return False
        for index, (param, (kept, _)) in enumerate(zip(self.params, self._classes, strict=True)):
            if versions[index] != self._versions[index] and type(param) is not kept:
                self._note_hidden_write(index)
        self._versions = versions
        return True

    def _note_hidden_write(self, index: int) -> None:
        """Note that a view has written to a parameter that is hidden. Raises: UserError where that is lost."""
        if not self.placement.shards_parameters:
            return
        self._written_hidden = True
        if self._hidden_at[index] != self._num_released:
            raise refused_view(self.param_names[index])

    def place(self, full: torch.Tensor) -> None:
        """Have the parameters in `full`, which holds their numbers."""
        self.residence.do("place")
        self.full = full
        self.show()

    def release(self) -> None:
        """Let the whole parameters go (stage 3)."""
        if self.full is not None and self.is_aliased:
            self._left.append(self.full)
        self.residence.do("release")
        if self._num_shown:
            self.hide()
        self.full = None
        self._num_released += 1

    @property
    def is_aliased(self) -> bool:
        """Whether somebody beside the engine holds the whole parameters: a view, a detached tensor, autograd."""
        if self.full is None:
            return False
        # The flat tensor, a view for each parameter, and beside them the shard, or the buffer that `full` is cut from.
        own = 2 + self._num_shown - len(self._assigned) + self._own_references
        return _references(self.full) > own

    @contextlib.contextmanager
    def own_references(self) -> Iterator[None]:
        """Count what the engine keeps of the whole parameters inside as its own."""
        before = _references(self.full) if self.full is not None else 0
        yield
        if self.full is not None:
            self._own_references += _references(self.full) - before

    @contextlib.contextmanager
    def reading(self, indices: Iterable[int]) -> Iterator[None]:
        """Enter with these parameters whole and current."""
        if self.fetch is not None:
            with self.fetch(indices):
                yield
            return
        self.finish_gather()
        yield

    # ---- what the script writes ----------------------------------------------------------------------------------

    def write_data(self, index: int, value: torch.Tensor) -> None:
        """Take what the script assigned to `param.data`. Raises: UserError where it does not fit."""
        span = self.layout.spans[index]
        if value.shape != torch.Size(span.shape) or value.dtype != self.dtype or value.device != self.device:
            raise UserError(
                f"{self.param_names[index]}.data cannot become a {value.dtype} tensor of {list(value.shape)}",
                f"it is laid out as {self.dtype} {list(span.shape)} on {self.device}",
                "assign a tensor of that kind, or change the model before engine.prepare(model)",
            )
        if (other := _parameter_at(value, self.params[index])) is not None:
            raise UserError(
                f"{self.param_names[index]}.data cannot become a view of {other}",
                "in plain torch both would be one memory from then on; here each parameter has its own",
                "assign a clone(), or tie modules by assigning the parameter itself",
            )
        if not self.placement.shards_parameters:
            self._assign(index, value)
            return
        with torch.no_grad(), self.reading((index,)):
            here = DATA.__get__(self.params[index])
            if here.data_ptr() == value.data_ptr() and here.stride() == value.stride():
                return
            del here
            value = self._apart(value)
            if self.renew is not None:
                self.renew()  # what the script took from `data` before stays as it was
            DATA.__get__(self.params[index]).copy_(value)
            self.touched = True

    def _assign(self, index: int, value: torch.Tensor) -> None:
        """Let a parameter be what the script assigned, as in plain torch; `full` takes it when it is needed there.

        So what the script took from `data` before stays as it was, to be assigned again (averages swapped in and out).
        """
        self.finish_gather()
        assert self.full is not None
        span = self.layout.spans[index]
        own = self.full[span.offset : span.end].view(span.shape)
        is_own = value.data_ptr() == own.data_ptr() and value.stride() == own.stride()
        (self._assigned.discard if is_own else self._assigned.add)(index)
        DATA.__set__(self.params[index], own if is_own else self._apart(value))
        self.touched = True

    def _apart(self, value: torch.Tensor) -> torch.Tensor:
        """Return a tensor that writing the whole parameters does not change: their own, transposed, say, is copied."""
        assert self.full is not None
        return value.clone() if value.untyped_storage()._cdata == self.full.untyped_storage()._cdata else value

    def _take_assigned(self) -> None:
        for index in self._assigned:
            assert self.full is not None
            span = self.layout.spans[index]
            own = self.full[span.offset : span.end].view(span.shape)
            DATA.__set__(self.params[index], own.copy_(DATA.__get__(self.params[index])))
        self._assigned.clear()

    def replace(self, full: torch.Tensor) -> None:
        """Have the parameters that are whole in `full`, which holds the same numbers."""
        self.full = full
        for param, span, (kept, _) in zip(self.params, self.layout.spans, self._classes, strict=True):
            if type(param) is kept:
                DATA.__set__(param, full[span.offset : span.end].view(span.shape))

    def take_writes(self) -> None:
        """Take what the script wrote to whole parameters into the shard and its fp32 master.

        Raises: UserError for what a view of memory that was let go wrote, at stage 3.
        """
        if self._left:
            self._left = [left for left in self._left if _references(left) > 1]
        if not self.is_whole or self.full is None:
            if self.placement.shards_parameters:
                self._note_writes()
            return
        self._take_assigned()
        aliased = self.is_aliased
        if not (self._note_writes() or self.touched or aliased):
            return
        self.touched = aliased  # a view may be written to once more before it goes
        start, end = self.layout.shard(self.rank)
        now = self.full[start:end]
        if self.placement.shards_parameters:
            before = self.read_shard()
            written_hidden, self._written_hidden = self._written_hidden, False
            if torch.equal(now, before):
                if written_hidden and self._left:
                    raise refused_view(self.name)
                return
        elif self.has_master:
            before = self.read_master().to(self.dtype)
        if self.has_master:
            master = self.read_master()
            self.write_master(0, torch.where(now == before, master, now.to(master.dtype)))
        if self.placement.shards_parameters:
            self.write_shard(now)  # last: `before` is the shard itself where it is in memory

    # ---- the step ------------------------------------------------------------------------------------------------

    def publish(self, refresh: bool = True) -> None:
        """Bring weights that the optimizer stepped into the compute format and, in stage 1 and 2, to all ranks.

        Collective: all ranks. The gather is waited for by `finish_gather`. Without `refresh` the shard is new already.
        """
        if refresh and self.has_master and not self.shard_is_current:
            self.write_shard(self.read_master())
        self.shard_is_current = False
        if self.placement.shards_optimizer and not self.placement.shards_parameters and self.gathers is not None:
            assert self.full is not None
            aliased = self.is_aliased
            self.residence.do("publish")
            self.gathering = self.gathers.all_gather(self.full, self.shard)
            if aliased:
                self.finish_gather()  # a view that somebody holds cannot wait
                return
            for param, (_, fetched) in zip(self.params, self._classes, strict=True):
                param.__class__ = fetched

    def count_step(self, indices: Iterable[int]) -> None:
        """Have autograd know, as after a step of plain torch, that what it saved of these parameters is no more."""
        torch.autograd.graph.increment_version([self.params[index] for index in indices])
        for index in indices:
            self._versions[index] += 1

    def let_go(self) -> None:
        """Give the parameters back to plain torch: at stage 3, where a rank has but a part of them, empty."""
        let_go(self.params)
        if self.placement.shards_parameters:
            for param, nothing in zip(self.params, self._nan, strict=True):
                DATA.__set__(param, nothing.new_empty(0))

    def start_gather(self, into: torch.Tensor) -> None:
        """Start to fill `into` with whole parameters, which become the unit's. Collective: all ranks."""
        self.residence.do("gather")
        self.full = into
        self.gathering = self.gather_beside(into)

    def finish_gather(self) -> None:
        """Wait until the parameters are all here."""
        if self.gathering is None:
            return
        self.gathering.wait()
        self.gathering = None
        self.residence.do("arrive")
        if not self.placement.shards_parameters:
            for param, (kept, _) in zip(self.params, self._classes, strict=True):
                param.__class__ = kept


_units: weakref.WeakSet[UnitParameters] = weakref.WeakSet()


def _parameter_at(value: torch.Tensor, own: nn.Parameter) -> str | None:
    """Return the name of a prepared parameter but `own` in whose whole memory `value` begins."""
    memory = value.untyped_storage()._cdata
    for unit in _units:
        if unit.full is not None and unit.full.untyped_storage()._cdata == memory:
            at = (value.data_ptr() - unit.full.data_ptr()) // unit.dtype.itemsize
            for name, param, span in zip(unit.param_names, unit.params, unit.layout.spans, strict=True):
                if param is not own and span.offset <= at < span.end:
                    return name
    return None


def _references(tensor: torch.Tensor) -> int:
    """Return how many tensors there are on the memory of `tensor`."""
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)) - _COUNTING


_COUNTING = 0
_COUNTING = _references(torch.empty(1)) - 1
"""What counting itself adds."""
