"""Accelerate's samplers: which indices a rank reads. Pure index arithmetic, but for the seeds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import cycle, islice
from typing import Any

import torch
from torch.utils.data import BatchSampler, IterableDataset, RandomSampler


class SeedableRandomSampler(RandomSampler):
    """A random sampler whose order is made of its seed and the epoch alone."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """`data_seed` is the seed; without it, torch's current one."""
        data_seed = kwargs.pop("data_seed", None)
        super().__init__(*args, **kwargs)
        self.initial_seed = data_seed if data_seed is not None else torch.random.initial_seed()
        self.epoch = 0

    def __iter__(self) -> Iterator[int]:
        if self.generator is None:
            self.generator = torch.Generator()
        self.generator.manual_seed(self.epoch + self.initial_seed)
        yield from super().__iter__()
        self.set_epoch(self.epoch + 1)

    def set_epoch(self, epoch: int) -> None:
        """Make the next order that of `epoch`."""
        self.epoch = epoch


class BatchSamplerShard(BatchSampler):
    """One rank's part of what a batch sampler yields.

    Batches of a round go to the ranks in turn, or with `split_batches` each is cut among them. `even_batches` repeats
    samples from the beginning until every rank has as many batches, all of one size.
    """

    def __init__(
        self,
        batch_sampler: Any,
        num_processes: int = 1,
        process_index: int = 0,
        split_batches: bool = False,
        even_batches: bool = True,
    ) -> None:
        self.batch_sampler = batch_sampler
        self.num_processes, self.process_index = num_processes, process_index
        self.split_batches, self.even_batches = split_batches, even_batches
        self.batch_size = getattr(batch_sampler, "batch_size", None)  # type: ignore[assignment]
        self.drop_last = getattr(batch_sampler, "drop_last", False)
        if split_batches and (self.batch_size is None or self.batch_size % num_processes):
            raise ValueError(
                f"To use `BatchSamplerShard` in `split_batches` mode, the batch size ({self.batch_size}) "
                f"needs to be a round multiple of the number of processes ({num_processes})."
            )

    @property
    def total_length(self) -> int:
        """Batches over all ranks."""
        return len(self.batch_sampler)

    def __len__(self) -> int:
        total = len(self.batch_sampler)
        if self.split_batches:
            return total
        each, rest = divmod(total, self.num_processes)
        if not rest or self.drop_last:
            return each
        return each + 1 if self.even_batches or self.process_index < rest else each

    def __iter__(self) -> Iterator[Any]:
        return self._cut() if self.split_batches else self._in_turn()

    def _cut(self) -> Iterator[Any]:
        size = self.batch_size
        part = size // self.num_processes
        mine = slice(part * self.process_index, part * (self.process_index + 1))
        first: list[Any] | None = None
        for batch in self.batch_sampler:
            first = list(batch) if first is None else first
            if len(batch) == size:
                yield batch[mine]
            elif not self.drop_last:
                if self.even_batches:
                    batch = [*batch, *islice(cycle(first), size - len(batch))]
                if len(batch) > mine.start:
                    yield batch[mine]

    def _in_turn(self) -> Iterator[Any]:
        size, num_ranks = self.batch_size, self.num_processes
        first: list[Any] = []
        round_: list[Any] = []
        for batch in self.batch_sampler:
            if len(round_) == num_ranks:  # a short batch was not the last one: sizes are free
                yield round_[self.process_index]
                round_ = []
            if len(first) < num_ranks and not self.drop_last:
                first.append(batch)
            round_.append(batch)
            if len(round_) == num_ranks and (size is None or len(batch) == size):
                yield round_[self.process_index]
                round_ = []
        if self.drop_last or not round_:
            return
        if not self.even_batches:
            if self.process_index < len(round_):
                yield round_[self.process_index]
        elif size is None:
            yield [*round_, *islice(cycle(first), num_ranks - len(round_))][self.process_index]
        else:
            indices = [index for batch in round_ for index in batch]
            again = cycle([index for batch in first for index in batch])
            indices += islice(again, num_ranks * size - len(indices))
            yield indices[size * self.process_index : size * (self.process_index + 1)]


class SkipBatchSampler(BatchSampler):
    """Another batch sampler without its first batches."""

    def __init__(self, batch_sampler: Any, skip_batches: int = 0) -> None:
        self.batch_sampler, self.skip_batches = batch_sampler, skip_batches
        self.batch_size = getattr(batch_sampler, "batch_size", None)  # type: ignore[assignment]

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.batch_sampler), self.skip_batches, None)

    @property
    def total_length(self) -> int:
        """Batches with those that are skipped."""
        return len(self.batch_sampler)

    def __len__(self) -> int:
        return max(0, len(self.batch_sampler) - self.skip_batches)


class IterableDatasetShard(IterableDataset[Any]):
    """One rank's samples of a stream that every rank reads: in turns of a batch; the last ones are evened out."""

    def __init__(
        self,
        dataset: Any,
        batch_size: int = 1,
        drop_last: bool = False,
        num_processes: int = 1,
        process_index: int = 0,
        split_batches: bool = False,
    ) -> None:
        if split_batches and batch_size > 1 and batch_size % num_processes:
            raise ValueError(
                f"To use `IterableDatasetShard` in `split_batches` mode, the batch size ({batch_size}) "
                f"needs to be a round multiple of the number of processes ({num_processes})."
            )
        self.dataset, self.batch_size, self.drop_last = dataset, batch_size, drop_last
        self.num_processes, self.process_index, self.split_batches = num_processes, process_index, split_batches
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Tell the stream which epoch begins."""
        self.epoch = epoch
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        rounds = len(self.dataset) / (self.batch_size * self.num_processes)
        return (math.floor(rounds) if self.drop_last else math.ceil(rounds)) * self.batch_size

    def __iter__(self) -> Iterator[Any]:
        own = getattr(self.dataset, "generator", None)
        if not hasattr(self.dataset, "set_epoch") and isinstance(own, torch.Generator):
            own.manual_seed(self.epoch)
        size = self.batch_size if self.split_batches else self.batch_size * self.num_processes
        part = size // self.num_processes
        mine = slice(self.process_index * part, (self.process_index + 1) * part)
        stream = iter(self.dataset)
        first: list[Any] = []
        while group := list(islice(stream, size)):
            first = first or group
            if len(group) < size:
                if self.drop_last:
                    return
                group += islice(cycle(first), size - len(group))
            yield from group[mine]
