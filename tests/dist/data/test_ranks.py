"""What ranks must agree on: orders whose randomness is the user's, and the exact end of an evaluation."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, Sampler, TensorDataset

import distui
from distui.core.data.loader import PreparedLoader, prepare_loader
from distui.core.ranks import ops
from distui.core.ranks.process import ProcessState

if TYPE_CHECKING:
    from tests.dist.rank_pool import RunRanks


class _Unseeded(Sampler[int]):
    """A sampler with randomness that no one can seed."""

    def __iter__(self) -> Iterator[int]:
        order = list(range(11))
        random.SystemRandom().shuffle(order)
        return iter(order)

    def __len__(self) -> int:
        return 11


class _RandomBatches(_Unseeded):
    """A batch sampler of one's own: batches of sizes 3, 3, 3, 2 in random order."""

    def __iter__(self) -> Iterator[Any]:
        order = list(super().__iter__())
        return iter([order[begin : begin + 3] for begin in range(0, 11, 3)])

    def __len__(self) -> int:
        return 4


def _loader(kind: str, process: ProcessState) -> PreparedLoader:
    data = TensorDataset(torch.arange(11))
    options: dict[str, Any] = {"batch_size": 2}
    if kind == "generator":
        # Seeded differently on each rank, as scripts do that seed everything by rank.
        options |= {"shuffle": True, "generator": torch.Generator().manual_seed(100 + process.process_index)}
    elif kind == "sampler":
        options["sampler"] = _Unseeded()
    elif kind == "batch_sampler":
        options = {"batch_sampler": _RandomBatches()}
    else:
        options["shuffle"] = True
    return prepare_loader(DataLoader(data, **options), process=process)


def _evaluate(kind: str) -> list[list[int]]:
    process = ProcessState()
    loader = _loader(kind, process)
    epochs = []
    for _ in range(2):
        seen: list[int] = []
        for (numbers,) in loader:
            padded = ops.pad_across_processes(numbers, pad_index=-1)
            if loader.end_of_dataloader and loader.remainder > 0 and kind != "batch_sampler":
                seen += ops.gather_for_metrics(numbers, loader.remainder).tolist()
            else:
                seen += [number for number in ops.gather(padded).tolist() if number >= 0]
        epochs.append(seen)
    return epochs


@pytest.mark.parametrize("kind", ["seeded", "generator", "sampler", "batch_sampler"])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_an_epoch_has_every_sample_once_in_one_order(run_ranks: RunRanks, kind: str, world: int) -> None:
    answers = run_ranks(_evaluate, world, kind)
    assert all(answer == answers[0] for answer in answers)
    for seen in answers[0]:
        if kind == "batch_sampler":  # whole batches repeat where ranks have an odd number of them
            assert set(seen) == set(range(11)) and len(seen) >= 11
        else:
            assert sorted(seen) == list(range(11))
    assert answers[0][0] != answers[0][1], "epochs differ"


class _Stream(IterableDataset[int]):
    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.size))


def _every_size() -> list[str]:
    """Evaluate data sets of every small size, and go on in the middle of each; returns what came out wrong."""
    wrong = []
    engine = distui.Engine()
    for size, batch, stream, drop_last in itertools.product(
        (1, 2, 3, 5, 6, 7), (1, 2, 3), (False, True), (False, True)
    ):
        what = f"{size} samples in batches of {batch}, stream {stream}, drop_last {drop_last}"
        dataset: Any = _Stream(size) if stream else list(range(size))
        full = size // (batch * engine.num_processes) * batch * engine.num_processes if drop_last else size

        def loader() -> Any:
            return engine.prepare(DataLoader(dataset, batch_size=batch, drop_last=drop_last))  # noqa: B023

        seen: list[int] = []
        weights: list[int] = []
        prepared, states = loader(), []
        for numbers in prepared:
            seen += engine.gather_for_metrics(numbers).tolist()
            # What is no tensor is gathered, and cut, as a list of samples.
            weights += engine.gather_for_metrics([f"{number}" for number in numbers.tolist()], use_gather_object=True)
            states.append((len(seen), prepared.state_dict()))
        if seen != list(range(full)) or weights != [f"{number}" for number in range(full)]:
            wrong.append(f"{what}: {seen}, {weights}")
        for position, state in states[:-1]:
            resumed = loader()
            resumed.load_state_dict(state)
            rest = [number for numbers in resumed for number in engine.gather_for_metrics(numbers).tolist()]
            if rest != list(range(position, full)):
                wrong.append(f"{what}, after {position}: {rest}")
        engine.free_memory()
    return wrong


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_is_exact_for_every_size_and_after_resuming(run_ranks: RunRanks, world: int) -> None:
    assert run_ranks(_every_size, world) == [[]] * world


def _order_of_generator() -> list[list[int]]:
    loader = _loader("generator", ProcessState())
    return [
        [n for (numbers,) in loader for n in ops.gather(numbers).tolist()[: max(loader.remainder, 0) or None]]
        for _ in "ab"
    ]


def test_rank_0s_generator_decides_as_in_one_process(run_ranks: RunRanks) -> None:
    (alone,) = run_ranks(_order_of_generator, 1)
    assert run_ranks(_order_of_generator, 2) == [alone, alone]
