"""The random states of a loader's worker processes: carried with each batch, so that a resumed run goes on from them.

torch seeds a worker when it starts, and what the data set draws in it moves on from there. A worker that starts in the
middle of an epoch would draw what the first batches had: it is given the state that the worker of that batch had left.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data._utils.worker import _generate_state

from distui.core.ranks.random_states import RandomStates

State = tuple[bytes, bytes, bytes]
"""torch's, Python's and numpy's states; as bytes they travel with a batch, where a tensor would take a file each."""


def _take() -> State:
    states = RandomStates.take()
    assert states.python is not None
    _, internal, gauss = states.python
    python = np.asarray(internal, dtype=np.int64).tobytes() + np.float64(np.nan if gauss is None else gauss).tobytes()
    if states.numpy is None:
        return states.torch_cpu.numpy().tobytes(), python, b""
    inner = states.numpy["state"]
    numbers = np.asarray([inner["pos"], states.numpy["has_gauss"]], dtype=np.uint32)
    numpy = np.asarray(inner["key"], dtype=np.uint32).tobytes() + numbers.tobytes()
    return states.torch_cpu.numpy().tobytes(), python, numpy + np.float64(states.numpy["gauss"]).tobytes()


def _give_back(state: State) -> None:
    own_torch, python, numpy = state
    torch.set_rng_state(torch.frombuffer(bytearray(own_torch), dtype=torch.uint8))
    gauss = float(np.frombuffer(python[-8:], dtype=np.float64)[0])
    internal = tuple(np.frombuffer(python[:-8], dtype=np.int64).tolist())
    random.setstate((3, internal, None if np.isnan(gauss) else gauss))
    if numpy:
        position, has_gauss = np.frombuffer(numpy[-16:-8], dtype=np.uint32).tolist()
        cached = float(np.frombuffer(numpy[-8:], dtype=np.float64)[0])
        np.random.set_state(("MT19937", np.frombuffer(numpy[:-16], dtype=np.uint32), position, has_gauss, cached))


def begin_reading(loader: DataLoader[Any]) -> Iterator[Any]:
    """Return an iterator of `loader`, whose workers leave alone what is garbage in this process.

    A fork that collects it would end process groups whose threads it has not: it crashes or hangs (torch 2.13, gloo).
    """
    if not loader.num_workers or gc.get_freeze_count():
        return iter(loader)
    gc.freeze()
    try:
        return iter(loader)
    finally:
        gc.unfreeze()


class CollateWithState:
    """Collates as the loader's own function does, and adds the state that the worker is left in."""

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self._collate = collate

    def __call__(self, samples: Any) -> tuple[Any, State | None]:
        """Return the batch, and the worker's state; None in the training process, whose states the engine keeps."""
        batch = self._collate(samples)
        return batch, _take() if get_worker_info() is not None else None


class StartWorker:
    """Readies a worker as the loader's own function does, in the part of the worker whose place it takes."""

    def __init__(self, own: Callable[[int], None] | None) -> None:
        self._own = own
        self.first = 0
        """Which worker of the interrupted epoch the first one stands for."""
        self.states: dict[int, State] = {}
        """What those left, as far as they had made a batch."""

    def __call__(self, worker: int) -> None:
        """Be called in a worker, before it reads anything."""
        info = get_worker_info()
        assert info is not None
        part = (self.first + worker) % info.num_workers
        if part != worker and part not in self.states:
            base = info.seed - info.id  # as torch seeds it
            random.seed(base + part)
            torch.manual_seed(base + part)
            np.random.seed(_generate_state(base, part))
        if self._own is not None:
            self._own(part)
        if part in self.states:
            _give_back(self.states[part])
