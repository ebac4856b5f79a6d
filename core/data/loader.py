"""A torch DataLoader made to give each rank its slice of every global batch."""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset

from distui.core.data.order import SampleOrder, call_set_epoch, epoch_seed
from distui.core.data.progress import NoWatch, Progress, Watch
from distui.core.data.slices import Slice, mark_last, num_slices, rank_slices
from distui.core.data.stream import CollateSlice
from distui.core.data.tokens import count_tokens
from distui.core.data.workers import CollateWithState, StartWorker, State, begin_reading
from distui.core.errors import UserError
from distui.core.ranks import ops, streams
from distui.core.ranks.process import ProcessState
from distui.core.ranks.random_states import RandomStates

Batch = tuple[int, int, Any]
"""(num_real, num_repeats, batch)"""


class _SliceSampler:
    """What the inner loader draws indices from; the slices are set anew before each of its iterators is made."""

    def __init__(self) -> None:
        self.slices: Iterator[Any] = iter(())

    def __iter__(self) -> Iterator[Any]:
        return self.slices


class PreparedLoader:
    """Iterates this rank's batches, on its device.

    Attributes that are not its own are the original loader's (`dataset`, `collate_fn`, ...).
    """

    def __init__(
        self,
        source: DataLoader[Any],
        process: ProcessState,
        micro_size: int | None,
        accumulation: int,
        seed: int,
        on_wait: Callable[[float], None] | None,
        device: torch.device | None,
        pieces: int = 1,
    ) -> None:
        self._source, self._process, self._device = source, process, device
        self.accumulation = accumulation
        self.on_wait = on_wait
        """Called with the seconds that the script waited for each batch."""
        self.on_batch: Callable[[int, int], None] | None = None
        """Called with (tokens, samples) of each batch, before the script gets it."""
        self.watch: Watch = NoWatch()
        self._progress = Progress()
        self._num_skipped = 0
        self._is_stream = isinstance(source.dataset, IterableDataset)
        own_batches = source.batch_sampler is not None and type(source.batch_sampler) is not BatchSampler
        self._items_are_batches = source.batch_sampler is None or (own_batches and not self._is_stream)
        self.own_batch_size: int | None = getattr(source.batch_sampler, "batch_size", source.batch_size)
        """What the script's loader says."""
        self.batch_size: int | None = None
        """Samples of this rank's micro-batch; None where the script makes its own batches."""
        if not self._items_are_batches:
            self.batch_size = micro_size or (self.own_batch_size and self.own_batch_size * pieces)
        self._check(source, micro_size)
        sampler = source.batch_sampler if own_batches else getattr(source.batch_sampler, "sampler", source.sampler)
        self._order = SampleOrder(sampler, source.generator, seed, process)  # type: ignore[arg-type]
        self._drop_last = bool(getattr(source.batch_sampler, "drop_last", False)) and not own_batches
        self._worker_generator = torch.Generator()
        self._slices = _SliceSampler()
        self._start_worker = StartWorker(source.worker_init_fn)
        self._draws = False
        """Whether reading a batch in this process draws random numbers."""
        self._inner: DataLoader[Any] = self._make_inner()

    def _check(self, source: DataLoader[Any], micro_size: int | None) -> None:
        num_ranks = self._process.num_data_ranks
        sampler = getattr(source.batch_sampler, "sampler", source.sampler)
        if num_ranks > 1 and isinstance(sampler, DistributedSampler):
            raise UserError(
                "the loader's sampler is a DistributedSampler",
                f"its order would be divided by {num_ranks} ranks twice",
                "give the loader shuffle=True or a plain sampler; prepare() divides it",
            )
        own = getattr(source.batch_sampler, "batch_size", None)
        if self._items_are_batches and micro_size is not None and own != micro_size:
            raise UserError(
                f"the loader makes its own batches, but the configuration wants micro-batches of {micro_size}",
                "batch_size=None and a batch sampler of one's own leave the sizes to the script",
                "unset batch.global_size and batch.micro_size, or give the loader a batch_size",
            )

    def _make_inner(self) -> DataLoader[Any]:
        source, process = self._source, self._process
        options: dict[str, Any] = {
            "num_workers": source.num_workers,
            "pin_memory": source.pin_memory,
            "timeout": source.timeout,
            "worker_init_fn": self._start_worker,
            "multiprocessing_context": source.multiprocessing_context,
            "prefetch_factor": source.prefetch_factor,
            "persistent_workers": source.persistent_workers,
            "generator": self._worker_generator,
            # Batches must arrive in the order in which they were asked for, or ranks would mix global batches.
            "in_order": True,
        }
        if self._is_stream:
            whole = source.batch_sampler is None
            size = process.num_data_ranks * (1 if whole else self.batch_size or 1)
            collate = CollateSlice(source.collate_fn, size, process.num_data_ranks, process.data_index, whole)
            return DataLoader(
                source.dataset, batch_size=size, drop_last=source.drop_last, collate_fn=collate, **options
            )
        options["collate_fn"] = CollateWithState(source.collate_fn)
        if source.batch_sampler is None:
            return DataLoader(source.dataset, batch_size=None, sampler=self._slices, **options)
        return DataLoader(source.dataset, batch_sampler=self._slices, **options)

    # ---- what the engine asks ---------------------------------------------------------------------------------

    @property
    def is_active(self) -> bool:
        """Whether this is the innermost loader that is being iterated."""
        active = self._process.active_loaders
        return bool(active) and active[-1] is self._progress

    @property
    def end_of_dataloader(self) -> bool:
        """Whether the script holds the last batch of the epoch."""
        return self._progress.end_of_dataloader

    @property
    def remainder(self) -> int:
        """Samples of the current global batch, over all ranks, where it ends with repeats; otherwise -1."""
        return self._progress.remainder

    @property
    def total_batch_size(self) -> int | None:
        """Samples of a global micro-batch, over all ranks."""
        return self.batch_size and self.batch_size * self._process.num_data_ranks

    def __len__(self) -> int:
        num_items = len(self._source.dataset) if self._is_stream else len(self._order)  # type: ignore[arg-type]
        size = self.batch_size or 1
        return max(0, num_slices(num_items, size, self._process.num_data_ranks, self._drop_last) - self._num_skipped)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._source, name)

    # ---- iteration --------------------------------------------------------------------------------------------

    def set_epoch(self, epoch: int) -> None:
        """Make the next iteration the one of `epoch`; without it, epochs count from 0, one for each iteration."""
        self._progress.next_epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        progress, active = self._progress, self._process.active_loaders
        self.watch.fetching(progress)
        if progress.until_epoch is not None and self.watch.passes_over(progress):
            progress.next_epoch += 1
            return
        begin = time.perf_counter()
        batches = self._begin(progress)
        active.append(progress)
        try:
            while (following := self._next(batches, progress)) is not None:
                (num_real, num_repeats, batch), is_last = following
                if self._device is not None:
                    batch = ops.send_to_device(batch, self._device, non_blocking=self._may_run_ahead(batch))
                num_tokens, num_samples = count_tokens(batch)
                if self._items_are_batches and self._source.batch_sampler is None:
                    # Of batches that the script makes itself, only this one's size is known.
                    num_real *= max(num_samples, 1)
                progress.end_of_dataloader = is_last
                progress.remainder = num_real if num_repeats else -1
                progress.num_batches += 1
                if self.on_batch is not None:
                    self.on_batch(num_tokens, num_samples)
                if self.on_wait is not None:
                    self.on_wait(time.perf_counter() - begin)
                self.watch.handed(progress)
                yield batch
                if not is_last:
                    self.watch.fetching(progress)
                begin = time.perf_counter()
                if progress.is_moved:
                    batches = self._begin(progress)
            progress.num_batches = progress.num_used = progress.num_begun = 0
            progress.end_of_dataloader, progress.remainder = False, -1
            self.watch.exhausted(progress)
        finally:
            active.remove(progress)
            progress.end_of_dataloader, progress.remainder = False, -1
            self.watch.left(progress)

    def _may_run_ahead(self, batch: Any) -> bool:
        """Whether nobody rewrites what a copy may still read: the loader pins memory anew, a data set may not."""
        if self._source.pin_memory or self._device is None or not streams.machine.is_apart(self._device):
            return True
        return not any(tensor.is_pinned() for _, tensor in ops.iter_tensors(batch))

    def _next(self, batches: Iterator[tuple[Batch, bool]], progress: Progress) -> tuple[Batch, bool] | None:
        """Return the next batch, and keep the random states of before; None after the last."""
        is_first = progress.num_batches == progress.num_begun and not self._source.num_workers
        progress.random_before = RandomStates.take(every=is_first or self._draws)
        found = next(batches, None)
        if is_first:
            self._draws = not progress.random_before.same_as(RandomStates.take())
        return found

    def _begin(self, progress: Progress) -> Iterator[tuple[Batch, bool]]:
        """Begin an epoch; yields (batch, is_last). Collective where the order is (see SampleOrder)."""
        progress.epoch = progress.next_epoch
        progress.next_epoch += 1
        skip = self._num_skipped
        if progress.until_epoch is None or progress.until_epoch <= progress.epoch:
            skip += progress.resume_batches
            progress.resume_batches, progress.until_epoch = 0, None
        progress.num_batches = progress.num_used = progress.num_begun = skip
        progress.is_moved = False
        call_set_epoch(self._source.dataset, progress.epoch)
        if self._is_stream:
            # Each rank must see the same stream, so its workers must be seeded alike.
            self._worker_generator.manual_seed(epoch_seed(self._order.seed, progress.epoch))
            return mark_last(islice(begin_reading(self._inner), skip, None))
        order, worker_seed = self._order.draw(progress.epoch)
        self._worker_generator.manual_seed((worker_seed + self._process.data_index) % 2**63)
        slices = rank_slices(
            order,
            self.batch_size or 1,
            self._process.num_data_ranks,
            self._process.data_index,
            self._drop_last,
            *([len] if self._items_are_batches and self._source.batch_sampler is not None else []),
        )
        return self._read(mark_last(islice(slices, skip, None)), skip)

    def _read(self, slices: Iterator[tuple[Slice[Any], bool]], skip: int) -> Iterator[tuple[Batch, bool]]:
        # The end of the epoch is seen in the indices, so no sample is read before the script asks for it.
        drawn: deque[tuple[int, int, bool]] = deque()

        def indices() -> Iterator[Any]:
            for taken, is_last in slices:
                drawn.append((taken.num_real, taken.num_repeats, is_last))
                yield taken.items[0] if self._items_are_batches else taken.items

        self._slices.slices = indices()
        states, num_workers = self._progress.worker_states, self._source.num_workers
        for number, (batch, state) in enumerate(self._workers(skip), skip):
            if state is not None:
                self._progress.replaced = (number % num_workers, states.get(number % num_workers))
                states[number % num_workers] = state
            num_real, num_repeats, is_last = drawn.popleft()
            yield (num_real, num_repeats, batch), is_last

    def _workers(self, skip: int) -> Iterator[tuple[Any, State | None]]:
        """Begin to read, by workers that go on from where those before them were."""
        progress, start, num_workers = self._progress, self._start_worker, self._source.num_workers
        if not num_workers:
            return begin_reading(self._inner)
        live_on = self._source.persistent_workers
        if live_on and (progress.starts_workers or start.first):
            # The living ones have other states, or stand for others' parts.
            self._inner = self._make_inner()
        elif not live_on and not progress.starts_workers:
            progress.worker_states.clear()
        start.first, start.states = skip % num_workers, dict(progress.worker_states)
        progress.starts_workers = False
        return begin_reading(self._inner)

    # ---- resuming ---------------------------------------------------------------------------------------------

    def state_dict(self, again: bool = False) -> dict[str, Any]:
        """Return the position, in a form that any number of ranks can go on from.

        With `again` a batch in hand that is still to be trained with comes again.
        """
        progress = self._progress
        unused = again and progress.is_unused
        if progress.num_batches and (unused or not progress.end_of_dataloader):
            epoch, num_batches = progress.epoch, progress.num_batches - unused
        else:
            epoch, num_batches = progress.next_epoch, progress.resume_batches
        return {
            "epoch": epoch,
            "num_items": num_batches * self._items_per_batch,
            **self._order.state_dict(inside=epoch == progress.epoch),
        }

    def rank_state_dict(self) -> dict[str, Any] | None:
        """Return the states of this rank's workers; None where they begin anew with the next batch anyway.

        They belong to `state_dict(again=True)`.
        """
        progress = self._progress
        states: dict[int, State | None] = dict(progress.worker_states)
        inside = bool(progress.num_batches) and (progress.is_unused or not progress.end_of_dataloader)
        if self._is_stream or not states or not (inside or self._source.persistent_workers):
            return None
        if progress.is_unused:
            states[progress.replaced[0]] = progress.replaced[1]
        kept = [[worker, state] for worker, state in sorted(states.items()) if state is not None]
        return {"num_workers": self._source.num_workers, "states": kept}

    def load_rank_state_dict(self, state: dict[str, Any]) -> None:
        """Have the workers go on from `state`; as many of them must there be."""
        if state["num_workers"] == self._source.num_workers:
            self._progress.worker_states.update({int(worker): tuple(held) for worker, held in state["states"]})
            self._progress.starts_workers = True

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was: the next iteration yields the batches that were still to come.

        Raises: UserError where the position is in the middle of a global batch of the size of this run.
        """
        size = self._items_per_batch
        num_batches, rest = divmod(state["num_items"], size)
        if rest:
            raise UserError(
                f"the saved position, {state['num_items']} samples into epoch {state['epoch']}, is inside a batch",
                f"{state['num_items']} = {num_batches} x {size} + {rest}, with {self.batch_size or 1} x "
                f"{self._process.num_data_ranks} ranks = {size} samples in a global micro-batch",
                "keep batch.global_size when the number of ranks changes",
            )
        self._order.load_state_dict(state)
        progress = self._progress
        progress.is_moved = any(progress is active for active in self._process.active_loaders)
        progress.epoch, progress.next_epoch = -1, state["epoch"]
        progress.num_batches = progress.num_used = progress.num_begun = 0
        progress.resume_batches = num_batches
        progress.worker_states.clear()
        progress.starts_workers = False

    def replay(self) -> bool:
        """Have a script that counts epochs from 0 again pass over those before the position that was loaded.

        Returns whether there are any.
        """
        if not self._progress.next_epoch:
            return False
        self._progress.until_epoch, self._progress.next_epoch = self._progress.next_epoch, 0
        return True

    @property
    def _items_per_batch(self) -> int:
        return (self.batch_size or 1) * self._process.num_data_ranks

    def skipping(self, num_batches: int) -> PreparedLoader:
        """Return a view of this loader that leaves out the first `num_batches` of each iteration."""
        view = copy.copy(self)
        view._num_skipped = self._num_skipped + num_batches
        return view


def prepare_loader(
    loader: DataLoader[Any],
    *,
    process: ProcessState,
    micro_size: int | None = None,
    accumulation: int = 1,
    seed: int = 0,
    on_wait: Callable[[float], None] | None = None,
    device: torch.device | None = None,
    pieces: int = 1,
) -> PreparedLoader:
    """Give each rank its slice of every global batch of `loader`.

    `micro_size` None takes the loader's own batch size as each rank's, `pieces` times where a pipeline cuts it. The
    order is that of one process (see `SampleOrder`), for any number of ranks; an iterable data set must yield the same
    stream on every rank.

    Raises: UserError for a loader that is divided among ranks already, or makes batches against `micro_size`.
    """
    return PreparedLoader(loader, process, micro_size, accumulation, seed, on_wait, device, pieces)


def skip_first_batches(loader: PreparedLoader, num_batches: int) -> PreparedLoader:
    """Return a view of `loader` without its first `num_batches`; map-style data sets do not read what is skipped.

    The view and the loader share their epoch: iterate the view once, then go on with the loader.
    """
    return loader.skipping(num_batches)
