"""Accelerate's `prepare_data_loader`, which divides a loader's batches among the ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler

from distui.compat.accelerate.data.loaders import (
    DataLoaderDispatcher,
    DataLoaderShard,
    PreparedDataLoader,
    SkipDataLoader,
    get_sampler,
)
from distui.compat.accelerate.data.mixin import DataLoaderStateMixin
from distui.compat.accelerate.data.samplers import (
    BatchSamplerShard,
    IterableDatasetShard,
    SeedableRandomSampler,
    SkipBatchSampler,
)
from distui.compat.accelerate.refusals import offered
from distui.compat.accelerate.state import PartialState

__all__ = [
    "BatchSamplerShard",
    "DataLoaderDispatcher",
    "DataLoaderShard",
    "DataLoaderStateMixin",
    "IterableDatasetShard",
    "SeedableRandomSampler",
    "SkipBatchSampler",
    "SkipDataLoader",
    "get_sampler",
    "prepare_data_loader",
    "skip_first_batches",
]

_OPTIONS = [
    "num_workers",
    "collate_fn",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "generator",
    "prefetch_factor",
    "persistent_workers",
    "pin_memory_device",
    "in_order",
]
"""What a prepared loader takes over; who reads which indices is its own matter."""


def prepare_data_loader(
    dataloader: DataLoader[Any],
    device: torch.device | None = None,
    num_processes: int | None = None,
    process_index: int | None = None,
    split_batches: bool = False,
    put_on_device: bool = False,
    rng_types: Any = None,
    dispatch_batches: bool | None = None,
    even_batches: bool = True,
    slice_fn_for_dispatch: Callable[..., Any] | None = None,
    use_seedable_sampler: bool = False,
    data_seed: int | None = None,
    non_blocking: bool = False,
    use_stateful_dataloader: bool = False,
    torch_device_mesh: Any = None,
) -> Any:
    """Divide a loader's batches among the ranks. Collective where batches are dispatched."""
    stream = isinstance(dataloader.dataset, IterableDataset)
    if dispatch_batches is None:
        dispatch_batches = put_on_device and stream
    if dispatch_batches and not put_on_device:
        raise ValueError("Using `dispatch_batches=True` requires `put_on_device=True`.")
    state = PartialState()
    num_processes = state.num_data_ranks if num_processes is None else num_processes
    process_index = state.data_index if process_index is None else process_index
    batches: Any = dataloader.sampler if isinstance(dataloader.sampler, BatchSampler) else dataloader.batch_sampler
    in_sampler = batches is dataloader.sampler
    if split_batches:
        size = dataloader.batch_size or getattr(batches, "batch_size", None)
        if size is None or (size > 1 and size % num_processes):
            raise ValueError(
                f"To use a `DataLoader` in `split_batches` mode, the batch size ({size}) "
                f"needs to be a round multiple of the number of processes ({num_processes})."
            )
    options: dict[str, Any] = {name: getattr(dataloader, name) for name in _OPTIONS if hasattr(dataloader, name)}
    if use_stateful_dataloader and hasattr(dataloader, "snapshot_every_n_steps"):
        options["snapshot_every_n_steps"] = dataloader.snapshot_every_n_steps
    if not options.get("pin_memory_device"):
        options.pop("pin_memory_device", None)  # deprecated in torch: setting it warns
    dataset, synchronized = dataloader.dataset, None
    sampler = get_sampler(dataloader)
    if isinstance(sampler, RandomSampler) and use_seedable_sampler:
        sampler = SeedableRandomSampler(
            data_source=sampler.data_source,
            replacement=sampler.replacement,
            num_samples=sampler._num_samples,
            generator=sampler.generator or torch.Generator(),
            data_seed=data_seed,
        )
    if num_processes > 1 and not dispatch_batches:
        if stream:
            synchronized = getattr(dataset, "generator", None)
            dataset = IterableDatasetShard(
                dataset, dataloader.batch_size or 1, dataloader.drop_last, num_processes, process_index, split_batches
            )
        else:
            if not use_seedable_sampler and hasattr(sampler, "generator"):
                if sampler.generator is None:
                    sampler.generator = torch.Generator()
                    sampler.generator.manual_seed(int(torch.empty((), dtype=torch.int64).random_().item()))
                synchronized = sampler.generator
            batches = BatchSamplerShard(batches, num_processes, process_index, split_batches, even_batches)
    if rng_types is not None:
        wanted = [str(kind) for kind in rng_types]
        rng_types = [kind for kind in wanted if kind != "generator" or isinstance(synchronized, torch.Generator)]
    if stream:
        size = dataloader.batch_size
        if split_batches and not dispatch_batches and size:
            size //= num_processes
        options |= {"batch_size": size, "drop_last": dataloader.drop_last}
    elif in_sampler:
        options |= {"sampler": batches, "batch_size": dataloader.batch_size}
    else:
        options["batch_sampler"] = batches
    common: dict[str, Any] = {
        "_drop_last": dataloader.drop_last,
        "_non_blocking": non_blocking,
        "use_stateful_dataloader": use_stateful_dataloader,
    }
    prepared: PreparedDataLoader
    if dispatch_batches:
        options.pop("generator", None)
        prepared = DataLoaderDispatcher(
            dataset, split_batches=split_batches, slice_fn=slice_fn_for_dispatch, **common, **options
        )
    else:
        prepared = DataLoaderShard(
            dataset,
            device=(device or state.device) if put_on_device else None,
            rng_types=rng_types,
            synchronized_generator=synchronized,
            **common,
            **options,
        )
    if isinstance(sampler, SeedableRandomSampler) and use_seedable_sampler:
        prepared.set_sampler(sampler)
    return prepared


def skip_first_batches(dataloader: Any, num_batches: int = 0) -> Any:
    """Return a view of a loader without its first batches; what is skipped of a map-style data set is not read."""
    if isinstance(dataloader, PreparedDataLoader):
        view = copy.copy(dataloader)
        view.__dict__["_iterator"] = None
        view.skip_batches += num_batches
        view.on_wait, view.on_batch, view.watch = dataloader.on_wait, dataloader.on_batch, dataloader.watch
        return view
    plain = prepare_data_loader(dataloader, num_processes=1, process_index=0)
    plain.skip_batches = num_batches
    return plain


def __getattr__(name: str) -> Any:
    return offered("accelerate.data_loader", {}, name)
