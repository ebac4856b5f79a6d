"""The loaders that `prepare_data_loader` gives: real torch ones that know where they stand."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from distui.compat.accelerate.data.epochs import Epochs
from distui.compat.accelerate.data.mixin import DataLoaderStateMixin
from distui.compat.accelerate.data.samplers import SkipBatchSampler
from distui.compat.accelerate.data.stateful import stateful_kind
from distui.compat.accelerate.state import GradientState, PartialState
from distui.compat.accelerate.utils.operations import concatenate, find_batch_size, send_to_device, slice_tensors
from distui.compat.accelerate.utils.random import synchronize_rng_states
from distui.core.data.progress import NoWatch, Watch
from distui.core.data.tokens import count_tokens
from distui.core.errors import UserError
from distui.core.ranks.random_states import RandomStates


def get_sampler(dataloader: Any) -> Any:
    """Return the sampler of single indices of a loader; None where it has none."""
    if isinstance(dataloader.sampler, BatchSampler):
        return getattr(dataloader.sampler, "sampler", None)
    batches = dataloader.batch_sampler
    while hasattr(batches, "batch_sampler"):
        batches = batches.batch_sampler
    return getattr(batches, "sampler", None)


def shifted(batch: Any) -> Any:
    """Return a batch with each token's next one as `shift_labels`, and without `labels`."""
    if not isinstance(batch, Mapping) or "labels" not in batch:
        return batch
    labels = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[..., 1:].contiguous()
    return {**{key: value for key, value in batch.items() if key != "labels"}, "shift_labels": labels}


class PreparedDataLoader(DataLoader[Any], DataLoaderStateMixin):
    """What both kinds of prepared loader have in common; with `use_stateful_dataloader` it is torchdata's too."""

    _is_accelerate_prepared = True

    def __new__(cls, *args: Any, use_stateful_dataloader: bool = False, **options: Any) -> PreparedDataLoader:
        """Make torchdata's where that is asked for. Raises: NotInstalled without it."""
        if use_stateful_dataloader:
            cls = stateful_kind(cls)
        return super().__new__(cls)

    def __init__(self, dataset: Any, *, skip_batches: int, iteration: int, stateful: bool, **options: Any) -> None:
        super().__init__(dataset, **options)
        self.skip_batches, self.use_stateful_dataloader = skip_batches, stateful
        self.reset()
        self.gradient_state = GradientState()
        self._epochs = Epochs(iteration)
        self._skip_now = 0
        self._reads_per_batch = 1
        self._drop_last = False
        self.on_wait: Callable[[float], None] | None = None
        """Called with the seconds that the script waited for each batch."""
        self.on_batch: Callable[[int, int], None] | None = None
        """Called with (tokens, samples) of each batch."""
        self.watch: Watch = NoWatch()
        self.shifts_labels = False
        """Whether batches have `shift_labels` in place of `labels`, as DeepSpeed's sequence parallelism gives them."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "on_wait": None, "on_batch": None, "watch": NoWatch(), "_iterator": None}

    @property
    def iteration(self) -> int:
        """The epoch that begins next, or runs."""
        return self._epochs.iteration

    @iteration.setter
    def iteration(self, iteration: int) -> None:
        self._epochs.iteration = iteration

    @property
    def base_dataloader(self) -> DataLoader[Any]:
        """This loader."""
        return self

    @property
    def total_dataset_length(self) -> int:
        """Samples over all ranks."""
        total = getattr(self.dataset, "total_length", None)
        return int(total) if total is not None else len(self.dataset)  # type: ignore[arg-type]

    def get_sampler(self) -> Any:
        """Return the sampler of single indices."""
        return get_sampler(self)

    def set_sampler(self, sampler: Any) -> None:
        """Draw indices from `sampler`."""
        batches: Any = self.sampler if isinstance(self.sampler, BatchSampler) else self.batch_sampler
        while hasattr(batches, "batch_sampler"):
            batches.sampler = sampler
            batches = batches.batch_sampler
        batches.sampler = sampler

    def set_epoch(self, epoch: int) -> None:
        """Make the next iteration that of `epoch`."""
        self.iteration = epoch
        told: Any = self.batch_sampler
        while told is not None:
            for value in (told, getattr(told, "sampler", None)):
                if callable(tell := getattr(value, "set_epoch", None)):
                    tell(epoch)
            told = getattr(told, "batch_sampler", None)
        if callable(tell := getattr(self.dataset, "set_epoch", None)):
            tell(epoch)

    def _generator(self) -> torch.Generator | None:
        own = getattr(get_sampler(self), "generator", None)
        return own if isinstance(own, torch.Generator) else None

    # ---- an epoch ---------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        self.watch.fetching(self._epochs)
        self.begin()
        self.set_epoch(self.iteration)
        self._skip_now = self.skip_batches + self._epochs.resume_batches
        self._epochs.num_batches, self._epochs.resume_batches = self._skip_now, 0
        own = self._generator()
        self._epochs.generator_state = own.get_state() if own is not None else None

    def _end(self) -> None:
        self._epochs.num_batches = 0
        self.iteration += 1
        self.watch.exhausted(self._epochs)

    def _note_position(self) -> None:
        """Note where the script is, before a batch is read ahead."""

    def _leave(self) -> None:
        self.end()
        self.watch.left(self._epochs)

    def _fetching(self) -> None:
        """The script wants the batch after the one in hand, or is at the end."""
        if not self.end_of_dataloader:
            self.watch.fetching(self._epochs)

    def _hand_out(self, batch: Any, is_last: bool, began_s: float) -> Any:
        self.end_of_dataloader = is_last
        if is_last:
            self._note_position()
        if self.shifts_labels:
            batch = shifted(batch)
        self._epochs.num_batches += 1
        if self.on_batch is not None:
            self.on_batch(*count_tokens(batch))
        if self.on_wait is not None:
            self.on_wait(time.perf_counter() - began_s)
        self.watch.handed(self._epochs)
        return batch

    @property
    def _index_sampler(self) -> Any:
        # What torch's iterators draw from: indices that are skipped are not read.
        inner = super()._index_sampler
        if not self._skip_now or isinstance(self.dataset, IterableDataset) or self.persistent_workers:
            return inner
        skip, self._skip_now = self._skip_now * self._reads_per_batch, 0
        return SkipBatchSampler(inner, skip)

    # ---- resuming ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch and the order's seed; with `use_stateful_dataloader` also the position in the epoch."""
        epochs, sampler, own = self._epochs, get_sampler(self), self._generator()
        inside = bool(epochs.num_batches and not self.end_of_dataloader and self.use_stateful_dataloader)
        ended = bool(epochs.num_batches and self.end_of_dataloader)
        now = own.get_state() if own is not None else None
        return {
            "iteration": epochs.iteration + ended,
            "num_batches": epochs.num_batches if inside else epochs.resume_batches,
            "num_processes": PartialState().num_data_ranks,
            "generator": epochs.generator_state if inside else now,
            "initial_seed": getattr(sampler, "initial_seed", None),
        }

    def rank_state_dict(self) -> dict[str, Any] | None:
        """Return the random states with which this rank read ahead; None where a resumed run begins an epoch."""
        random = self._epochs.random_before
        inside = bool(self._epochs.num_batches and not self.end_of_dataloader and self.use_stateful_dataloader)
        return {"random": random.state_dict()} if inside and random is not None else None

    def load_rank_state_dict(self, state: dict[str, Any]) -> None:
        """Read the batch that was read ahead with the same random states."""
        self._epochs.resume_random = RandomStates.of(state["random"])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was.

        Raises: UserError for a position of another number of ranks.
        """
        num_processes = PartialState().num_data_ranks
        if state["num_batches"] and state["num_processes"] != num_processes:
            raise UserError(
                f"the loader's position was saved by {state['num_processes']} ranks, here are {num_processes}",
                f"batch {state['num_batches']} of {state['num_processes']} ranks is no batch of {num_processes}",
                "save at the end of an epoch, or go on with as many ranks",
            )
        sampler, own = get_sampler(self), self._generator()
        self.iteration = state["iteration"]
        self._epochs.num_batches, self._epochs.resume_batches = 0, state["num_batches"]
        self._epochs.resume_random = None
        if state["initial_seed"] is not None and hasattr(sampler, "initial_seed"):
            sampler.initial_seed = state["initial_seed"]
        if own is not None and state["generator"] is not None:
            own.set_state(state["generator"])


class DataLoaderShard(PreparedDataLoader):
    """Reads this rank's batches."""

    def __init__(
        self,
        dataset: Any,
        device: torch.device | None = None,
        rng_types: Any = None,
        synchronized_generator: torch.Generator | None = None,
        skip_batches: int = 0,
        use_stateful_dataloader: bool = False,
        _drop_last: bool = False,
        _non_blocking: bool = False,
        torch_device_mesh: Any = None,
        iteration: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            dataset, skip_batches=skip_batches, iteration=iteration, stateful=use_stateful_dataloader, **kwargs
        )
        self.device, self.rng_types, self.synchronized_generator = device, rng_types, synchronized_generator
        self._drop_last, self._non_blocking = _drop_last, _non_blocking

    def __len__(self) -> int:
        return max(0, super().__len__() - self.skip_batches)

    def __iter__(self) -> Any:
        if self.rng_types is not None:
            synchronize_rng_states(self.rng_types, self.synchronized_generator)
        began_s = time.perf_counter()
        self._begin()
        try:
            now = RandomStates.take() if self._epochs.resume_random is not None else None
            batches = super().__iter__()
            following = islice(batches, self._skip_now, None) if self._skip_now else batches
            if self._epochs.resume_random is not None:
                self._epochs.resume_random.give_back()
                self._epochs.resume_random = None
            batch = next(following, self)
            if now is not None:  # what was drawn here was drawn before the state was saved
                now.give_back()
            while batch is not self:
                if self.device is not None:
                    batch = send_to_device(batch, self.device, non_blocking=self._non_blocking)
                if self.use_stateful_dataloader:
                    self._epochs.random_before = RandomStates.take()
                self._note_position()
                ahead = next(following, self)
                yield self._hand_out(batch, ahead is self, began_s)
                self._fetching()
                began_s = time.perf_counter()
                batch = ahead
            self._end()
        finally:
            self._leave()

    @property
    def total_batch_size(self) -> int:
        """Samples of a global batch, over all ranks."""
        batches: Any = self.sampler if isinstance(self.sampler, BatchSampler) else self.batch_sampler
        size = batches.batch_size
        return size if getattr(batches, "split_batches", False) else size * getattr(batches, "num_processes", 1)


class DataLoaderDispatcher(PreparedDataLoader):
    """Reads on rank 0, and sends every other rank its part of each batch."""

    def __init__(
        self,
        dataset: Any,
        split_batches: bool = False,
        skip_batches: int = 0,
        use_stateful_dataloader: bool = False,
        _drop_last: bool = False,
        _non_blocking: bool = False,
        slice_fn: Callable[..., Any] | None = None,
        torch_device_mesh: Any = None,
        iteration: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            dataset, skip_batches=skip_batches, iteration=iteration, stateful=use_stateful_dataloader, **kwargs
        )
        self.split_batches, self.state, self.slice_fn = split_batches, PartialState(), slice_fn or slice_tensors
        self._reads_per_batch = 1 if split_batches else self.state.num_data_ranks
        self._drop_last, self._non_blocking = _drop_last, _non_blocking

    def __len__(self) -> int:
        whole, ranks = super().__len__(), self.state.num_data_ranks
        if not self.split_batches:
            whole = whole // ranks if self._drop_last else math.ceil(whole / ranks)
        return max(0, whole - self.skip_batches)

    @property
    def total_batch_size(self) -> int | None:
        """Samples of a global batch, over all ranks."""
        size = self.batch_size or getattr(self.batch_sampler, "batch_size", None)
        return size if size is None or self.split_batches else size * self.state.num_data_ranks

    def _global_batches(self) -> Iterator[tuple[Any, bool]]:
        """Yield rank 0's whole batches, with whether each is the last."""
        batches: Iterator[Any] = super().__iter__()
        each = self._reads_per_batch
        batches = islice(batches, self._skip_now * each, None) if self._skip_now else batches

        def join(group: list[Any]) -> Any:
            try:
                return concatenate(group) if len(group) > 1 else group[0]
            except RuntimeError as error:
                raise UserError(
                    "batches of different shapes cannot be dispatched",
                    str(error),
                    "use DataLoaderConfiguration(dispatch_batches=False), or split_batches=True",
                ) from error

        group = list(islice(batches, each))
        while group and not (self._drop_last and len(group) < each):
            self._note_position()
            ahead = list(islice(batches, each))
            last = not ahead or (self._drop_last and len(ahead) < each)
            yield join(group), last
            group = ahead

    def _parts(self, whole: Any, first: Any) -> tuple[list[Any], int]:
        ranks = self.state.num_data_ranks
        size = find_batch_size(whole)
        if rest := -size % ranks:
            filler = slice_tensors(whole, slice(0, ranks)) if first is None else first
            whole = concatenate([whole, slice_tensors(filler, slice(0, rest))])
        each = (size + rest) // ranks
        parts = [
            self.slice_fn(whole, slice(rank * each, (rank + 1) * each), process_index=rank, num_processes=ranks)
            for rank in range(ranks)
        ]
        return parts, size

    def __iter__(self) -> Any:
        began_s = time.perf_counter()
        self._begin()
        try:
            source = self._global_batches() if self.state.is_main_process else iter(())
            first = None
            while True:
                sent: list[Any] | None = None
                if self.state.is_main_process:
                    sent = [None] * self.state.num_processes
                    for whole, last in islice(source, 1):
                        if first is None and not self._drop_last:
                            first = slice_tensors(whole, slice(0, self.state.num_data_ranks))
                        parts, size = self._parts(whole, first)
                        sent = [(parts[place], size, last) for place in self.state.data_places]
                received: list[Any] = [None]
                if self.state.num_processes > 1:
                    dist.scatter_object_list(received, sent, src=0)
                else:
                    received = sent or received
                if received[0] is None:
                    break
                batch, size, last = received[0]
                batch = send_to_device(batch, self.state.device, non_blocking=self._non_blocking)
                if last:
                    self.remainder = size
                yield self._hand_out(batch, last, began_s)
                self._fetching()
                began_s = time.perf_counter()
                if last:
                    break
            self._end()
        finally:
            self._leave()


class SkipDataLoader(DataLoaderShard):
    """A loader without its first batches."""
