"""Prepared loaders against plain torch in one process; ranks are simulated where nothing travels between them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
    get_worker_info,
)

from distui.core.data import loader as loaders
from distui.core.data.loader import PreparedLoader, prepare_loader, skip_first_batches
from distui.core.data.order import epoch_seed
from distui.core.data.tokens import count_tokens
from distui.core.errors import UserError
from distui.core.ranks import streams
from distui.core.ranks.process import ProcessState
from tests.recording import DEVICE, RecordingMachine


def _rank(rank: int = 0, world: int = 1) -> ProcessState:
    state = ProcessState(device="cpu")
    state.process_index, state.num_processes = rank, world
    return state


class Numbers(Dataset[torch.Tensor]):
    """0, 1, 2, ...; remembers what was read."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> torch.Tensor:
        self.read.append(index)
        return torch.tensor(index)


class Stream(IterableDataset[int]):
    """0, 1, 2, ..., divided among workers as torch's documentation does it."""

    def __init__(self, size: int) -> None:
        self.begin, self.end = 0, size

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.begin, self.end))


class SizedStream(Stream):
    def __len__(self) -> int:
        return self.end - self.begin


def _divide_stream(worker: int) -> None:
    info = get_worker_info()
    assert info is not None
    stream: Any = info.dataset
    each = -(-(stream.end - stream.begin) // info.num_workers)
    stream.begin, stream.end = worker * each, min((worker + 1) * each, stream.end)


def _epoch(loader: Any) -> list[list[int]]:
    return [batch.tolist() for batch in loader]


def _global_epoch(loaders: list[PreparedLoader]) -> list[list[int]]:
    """Join what simulated ranks get, without the repeats."""
    epochs = []
    for loader in loaders:
        epochs.append([(batch.tolist(), loader.remainder) for batch in loader])
    rows = []
    for parts in zip(*epochs, strict=True):
        assert len({(len(items), remainder) for items, remainder in parts}) == 1
        whole = [item for items, _ in parts for item in items]
        rows.append(whole[: parts[0][1]] if parts[0][1] > 0 else whole)
    return rows


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("size", [24, 25, 31])
def test_shuffled_batches_are_those_of_plain_torch(world: int, size: int) -> None:
    seeded = DataLoader(Numbers(size), batch_size=6, shuffle=True, generator=torch.Generator().manual_seed(7))
    plain = _epoch(seeded)
    ranks = [
        prepare_loader(
            DataLoader(Numbers(size), batch_size=6, shuffle=True),
            process=_rank(rank, world),
            micro_size=6 // world,
            seed=7,
        )
        for rank in range(world)
    ]
    assert _global_epoch(ranks) == plain
    assert [len(loader) for loader in ranks] == [len(plain)] * world
    second = _global_epoch(ranks)
    assert second != plain and sorted(chain(*second)) == list(range(size))


def test_the_epoch_decides_the_order() -> None:
    one = prepare_loader(DataLoader(Numbers(20), shuffle=True, batch_size=5), process=_rank(), seed=3)
    first, second, third = _epoch(one), _epoch(one), _epoch(one)
    assert first != second != third
    other = prepare_loader(DataLoader(Numbers(20), shuffle=True, batch_size=5), process=_rank(), seed=3)
    other.set_epoch(2)
    assert _epoch(other) == third
    other.set_epoch(0)
    assert _epoch(other) == first
    assert epoch_seed(3, 0) == 3 and epoch_seed(0, 1) != epoch_seed(1, 0)


def test_a_generator_of_the_user_gives_plain_torchs_order_in_every_epoch() -> None:
    def make() -> DataLoader[torch.Tensor]:
        return DataLoader(Numbers(17), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(5))

    plain, prepared = make(), prepare_loader(make(), process=_rank())
    assert [_epoch(plain) for _ in range(3)] == [_epoch(prepared) for _ in range(3)]


def test_plain_and_prepared_agree_with_drop_last_and_without_batches() -> None:
    numbers = Numbers(11)
    dropped = DataLoader(numbers, batch_size=4, drop_last=True)
    assert _epoch(prepare_loader(dropped, process=_rank())) == _epoch(dropped)
    assert len(prepare_loader(dropped, process=_rank())) == 2
    single: DataLoader[torch.Tensor] = DataLoader(numbers, batch_size=None)
    assert [value.item() for value in prepare_loader(single, process=_rank())] == list(range(11))
    ranks = [prepare_loader(single, process=_rank(rank, 2)) for rank in range(2)]
    assert [[value.item() for value in loader] for loader in ranks] == [[0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9, 0]]


def test_samplers_keep_their_meaning() -> None:
    numbers = Numbers(10)
    few = prepare_loader(
        DataLoader(numbers, sampler=RandomSampler(numbers, replacement=True, num_samples=7), batch_size=3),
        process=_rank(),
    )
    assert len(few) == 3 and sum(map(len, _epoch(few))) == 7
    heavy = prepare_loader(
        DataLoader(numbers, sampler=WeightedRandomSampler([0.0] * 9 + [1.0], 5), batch_size=5), process=_rank()
    )
    assert _epoch(heavy) == [[9] * 5]
    assert few.dataset is numbers and few.sampler.num_samples == 7


def test_a_batch_sampler_of_ones_own_goes_round_the_ranks() -> None:
    batches = [[0, 1, 2], [3], [4, 5], [6, 7], [8]]
    ranks = [prepare_loader(DataLoader(Numbers(9), batch_sampler=batches), process=_rank(rank, 1)) for rank in range(1)]
    assert _epoch(ranks[0]) == batches and len(ranks[0]) == 5
    plain = DataLoader(Numbers(9), batch_sampler=BatchSampler(SequentialSampler(range(9)), 4, drop_last=False))
    pair = [prepare_loader(plain, process=_rank(rank, 2), micro_size=2) for rank in range(2)]
    assert _global_epoch(pair) == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_streams_are_divided_as_one_process_reads_them(world: int, num_workers: int) -> None:
    options: dict[str, Any] = {"num_workers": num_workers}
    if num_workers:
        options |= {"worker_init_fn": _divide_stream, "multiprocessing_context": "fork"}
    plain = _epoch(DataLoader(Stream(22), batch_size=6, **options))
    ranks = [
        prepare_loader(
            DataLoader(Stream(22), batch_size=1, **options), process=_rank(rank, world), micro_size=6 // world
        )
        for rank in range(world)
    ]
    assert _global_epoch(ranks) == plain
    assert sorted(chain(*plain)) == list(range(22))


def test_streams_know_their_length_and_end() -> None:
    loader = prepare_loader(DataLoader(SizedStream(10), batch_size=4, drop_last=True), process=_rank())
    assert len(loader) == 2
    assert [loader.end_of_dataloader for _ in loader] == [False, True]
    with pytest.raises(TypeError):
        len(prepare_loader(DataLoader(Stream(10), batch_size=4), process=_rank()))


def _collate(samples: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"x": torch.stack(samples) * 10}


def test_workers_and_collate_are_kept() -> None:
    source = DataLoader(
        Numbers(9),
        batch_size=2,
        num_workers=2,
        collate_fn=_collate,
        persistent_workers=True,
        multiprocessing_context="fork",
    )
    loader = prepare_loader(source, process=_rank())
    for _ in range(2):
        assert [batch["x"].tolist() for batch in loader] == [[0, 10], [20, 30], [40, 50], [60, 70], [80]]
    assert loader.num_workers == 2 and loader.collate_fn is _collate


def test_the_engine_is_told_what_it_needs() -> None:
    waits: list[float] = []
    seen: list[tuple[int, int]] = []
    process = _rank()
    tokens = TensorDataset(torch.zeros(5, 8, dtype=torch.int64))
    loader = prepare_loader(DataLoader(tokens, batch_size=2), process=process, accumulation=2, on_wait=waits.append)
    loader.on_batch = lambda num_tokens, num_samples: seen.append((num_tokens, num_samples))
    assert not loader.is_active
    flags = []
    for _ in loader:
        flags.append((loader.is_active, loader.end_of_dataloader, loader.remainder))
        inner = prepare_loader(DataLoader(tokens, batch_size=5), process=process)
        for _ in inner:
            assert inner.is_active and inner.end_of_dataloader and not loader.is_active
    assert flags == [(True, False, -1), (True, False, -1), (True, True, -1)]
    assert seen == [(16, 2), (16, 2), (8, 1)]
    assert len(waits) == 3 and min(waits) > 0
    for _ in loader:
        break
    assert not process.active_loaders, "a loop that is left early is over"


def test_no_sample_is_read_ahead() -> None:
    numbers = Numbers(6)
    loader = prepare_loader(DataLoader(numbers, batch_size=2), process=_rank())
    iterator = iter(loader)
    next(iterator)
    assert numbers.read == [0, 1]


def test_skipped_batches_are_not_read_and_share_the_epoch() -> None:
    numbers = Numbers(12)
    loader = prepare_loader(DataLoader(numbers, batch_size=3, shuffle=True), process=_rank(), seed=1)
    whole = _epoch(loader)
    again = _epoch(loader)
    numbers.read.clear()
    loader.set_epoch(0)
    rest = skip_first_batches(loader, 3)
    assert len(rest) == 1 and _epoch(rest) == whole[3:]
    assert len(numbers.read) == 3
    assert _epoch(loader) == again, "the loader goes on with the next epoch"


@pytest.mark.parametrize("kind", ["seeded", "generator", "stream"])
@pytest.mark.parametrize("world", [1, 2])
def test_resuming_in_the_middle_goes_on_where_it_was(kind: str, world: int) -> None:
    def make(rank: int) -> PreparedLoader:
        if kind == "stream":
            source: DataLoader[Any] = DataLoader(Stream(22), batch_size=4)
        else:
            generator = torch.Generator().manual_seed(9) if kind == "generator" else None
            source = DataLoader(Numbers(22), batch_size=4, shuffle=True, generator=generator)
        # Ranks are simulated here, and a generator's state would be broadcast: one rank is enough for that.
        count = 1 if kind == "generator" else world
        return prepare_loader(source, process=_rank(rank % count, count), micro_size=8 // count, seed=2)

    loader = make(0)
    _epoch(loader)
    expected, saved = [], None
    for index, batch in enumerate(loader):
        if index == 1:
            saved = loader.state_dict()
        elif index > 1:
            expected.append(batch.tolist())
    following = _epoch(loader)
    assert saved is not None and saved["epoch"] == 1 and saved["num_items"] == 16
    resumed = make(0)
    resumed.load_state_dict(saved)
    assert resumed.state_dict()["num_items"] == 16
    assert _epoch(resumed) == expected
    assert _epoch(resumed) == following


def test_a_position_resumes_under_another_number_of_ranks() -> None:
    def make(rank: int, world: int) -> PreparedLoader:
        source = DataLoader(Numbers(40), shuffle=True)
        return prepare_loader(source, process=_rank(rank, world), micro_size=12 // world, seed=4)

    one = make(0, 1)
    iterator = iter(one)
    next(iterator)
    saved = one.state_dict()
    rest = [batch.tolist() for batch in iterator]
    three = [make(rank, 3) for rank in range(3)]
    for loader in three:
        loader.load_state_dict(saved)
    assert _global_epoch(three) == rest
    odd = prepare_loader(DataLoader(Numbers(40), batch_size=5), process=_rank())
    with pytest.raises(UserError, match=r"12 samples into epoch 0.*12 = 2 x 5 \+ 2"):
        odd.load_state_dict(saved)


def test_a_state_saved_at_the_last_batch_begins_the_next_epoch() -> None:
    loader = prepare_loader(DataLoader(Numbers(6), batch_size=3), process=_rank())
    states = [loader.state_dict() for _ in loader]
    assert [(state["epoch"], state["num_items"]) for state in states] == [(0, 3), (1, 0)]


def test_what_cannot_be_divided_is_refused() -> None:
    numbers = Numbers(8)
    with pytest.raises(UserError, match="DistributedSampler"):
        prepare_loader(
            DataLoader(numbers, sampler=DistributedSampler(numbers, num_replicas=2, rank=0)), process=_rank(0, 2)
        )
    with pytest.raises(UserError, match="micro-batches of 4"):
        prepare_loader(DataLoader(numbers, batch_sampler=[[0], [1]]), process=_rank(), micro_size=4)


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ({"input_ids": torch.zeros(2, 3, dtype=torch.int64), "labels": torch.zeros(2)}, (6, 2)),
        ([torch.zeros(4, 5), torch.zeros(4, 7, dtype=torch.int32)], (28, 4)),
        ((torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64)), (0, 4)),
        ((torch.zeros(4, 3, 8, 8), torch.zeros(4, 8, 8, dtype=torch.int64)), (0, 4)),
        ("text", (0, 0)),
    ],
)
def test_count_tokens(batch: Any, expected: tuple[int, int]) -> None:
    assert count_tokens(batch) == expected


@pytest.mark.parametrize(
    ("pinned_by_loader", "is_pinned", "ahead"), [(True, True, True), (False, False, True), (False, True, False)]
)
def test_the_host_waits_for_a_copy_of_memory_that_the_data_set_may_rewrite(
    monkeypatch: pytest.MonkeyPatch, pinned_by_loader: bool, is_pinned: bool, ahead: bool
) -> None:
    monkeypatch.setattr(streams, "machine", RecordingMachine())
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: is_pinned)
    asked: list[bool] = []

    def send(batch: Any, device: torch.device, non_blocking: bool) -> Any:
        asked.append(non_blocking)
        return batch

    monkeypatch.setattr(loaders.ops, "send_to_device", send)
    prepared = prepare_loader(DataLoader(Numbers(4), batch_size=2), process=_rank(), device=DEVICE)
    monkeypatch.setattr(prepared._source, "pin_memory", pinned_by_loader)
    assert len(list(prepared)) == 2 and asked == [ahead] * 2
