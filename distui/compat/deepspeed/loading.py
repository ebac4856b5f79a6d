"""The loader of `deepspeed.initialize(training_data=...)`, and one that never ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from distui.core.data.tokens import count_tokens
from distui.core.engine.engine import Engine


class RepeatingLoader:
    """Iterates a loader for ever, beginning again when it ends."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.data_iter = iter(loader)

    def __iter__(self) -> RepeatingLoader:
        return self

    def __next__(self) -> Any:
        try:
            return next(self.data_iter)
        except StopIteration:
            self.data_iter = iter(self.loader)
            return next(self.data_iter)


class DeepSpeedDataLoader:
    """Gives a rank its micro-batches, in the order in which DeepSpeed gives them.

    That is torch's `DistributedSampler` with its seed 0, shuffled alike in every epoch; the engine hears of every wait.
    """

    def __init__(
        self,
        engine: Engine,
        dataset: Any,
        batch_size: int,
        *,
        collate_fn: Callable[..., Any] | None = None,
        data_sampler: Any = None,
        num_workers: int | None = None,
        drop_last: bool = False,
        pin_memory: bool = True,
        shuffle: bool = True,
    ) -> None:
        if not (hasattr(dataset, "__getitem__") or hasattr(dataset, "__iter__")):
            raise ValueError("Training data must be a torch Dataset")
        self._engine = engine
        self.dataset, self.batch_size = dataset, batch_size
        on_gpu = engine.device.type == "cuda"
        if data_sampler is None and not isinstance(dataset, IterableDataset):
            data_sampler = DistributedSampler(dataset, engine.num_data_ranks, engine.data_index, shuffle=shuffle)
        self.data_sampler = data_sampler
        self.loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=data_sampler,
            collate_fn=collate_fn,
            drop_last=drop_last,
            pin_memory=pin_memory and on_gpu,
            num_workers=(2 if on_gpu else 0) if num_workers is None else num_workers,
        )
        self._iterator: Iterator[Any] | None = None
        self.num_batches = self.num_used = 0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> DeepSpeedDataLoader:
        self._iterator = iter(self.loader)
        return self

    def __next__(self) -> Any:
        if self._iterator is None:
            self._iterator = iter(self.loader)
        self._engine.step_end.fetching(self)
        begin = time.perf_counter()
        try:
            batch = next(self._iterator)
        except StopIteration:
            self._engine.step_end.left(self)
            raise
        self._engine.clock.data_wait(time.perf_counter() - begin)
        self.num_batches += 1
        self._engine.step_end.handed(self)
        return batch


def note_batch(engine: Engine, batch: Any) -> None:
    """Tell the engine how many tokens and samples a forward is given."""
    if engine.telemetry.active and torch.is_grad_enabled():
        tokens, samples = count_tokens(batch)
        engine.clock.batch(tokens, samples)
