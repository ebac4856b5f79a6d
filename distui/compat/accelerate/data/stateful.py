"""Loaders that are torchdata's StatefulDataLoader as well, with its states; torchdata is imported where one is made."""

from __future__ import annotations

import functools
import warnings
from typing import TYPE_CHECKING, Any

from distui.compat.accelerate.state import PartialState
from distui.compat.accelerate.utils.imports import stateful_class

if TYPE_CHECKING:
    from distui.compat.accelerate.data.epochs import Epochs


def stateful_kind(kind: Any) -> Any:
    """Return the class that is both `kind` and torchdata's loader. Raises: NotInstalled."""
    return _both(kind, stateful_class())


@functools.cache
def _both(kind: Any, theirs: Any) -> Any:
    bases = (TorchdataStates, kind, theirs)
    return kind if issubclass(kind, theirs) else type(kind.__name__, bases, {"plain_kind": kind})


def _again(kind: Any) -> Any:
    return kind.__new__(kind, use_stateful_dataloader=True)


class TorchdataStates:
    """What a prepared loader does otherwise where torchdata keeps its position; stands before it among the bases.

    What is skipped is read, since torchdata counts what is read.
    """

    plain_kind: Any
    _epochs: Epochs
    _iterator: Any
    _reads_per_batch: int
    dataset: Any
    iteration: int
    num_workers: int
    end_of_dataloader: bool

    def __init__(self, *args: Any, **options: Any) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="'set_vital' is deprecated")  # torchdata calls it
            super().__init__(*args, **options)

    def __reduce__(self) -> Any:
        # Its class has no name that pickle could find.
        return _again, (self.plain_kind,), super().__getstate__()  # type: ignore[misc]

    @property
    def _index_sampler(self) -> Any:
        return self.batch_sampler if self._auto_collation else self.sampler  # type: ignore[attr-defined]

    def _begin(self) -> None:
        epochs = self._epochs
        theirs, epochs.resume_torchdata, epochs.torchdata = epochs.resume_torchdata, {}, {}
        done = epochs.resume_batches if theirs else 0
        epochs.resume_batches -= done
        super()._begin()  # type: ignore[misc]
        epochs.num_batches += done
        if theirs:
            stateful_class().load_state_dict(self, theirs)

    def _note_position(self) -> None:
        if self._iterator is not None:
            self._epochs.torchdata = stateful_class().state_dict(self)

    def state_dict(self) -> dict[str, Any]:
        """Return torchdata's state of where the script is, without what was read ahead, and beside it the epoch."""
        theirs = self._epochs.torchdata or self._epochs.resume_torchdata
        own: dict[str, Any] = super().state_dict()  # type: ignore[misc]
        return {**theirs, "_iterator_finished": self.end_of_dataloader, **own}

    def rank_state_dict(self) -> dict[str, Any] | None:
        """Return what belongs to this rank: random states, and the state of its data set."""
        own: dict[str, Any] | None = super().rank_state_dict()  # type: ignore[misc]
        return None if own is None else {**own, "torchdata": self._epochs.torchdata}

    def load_rank_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with what `rank_state_dict` returned."""
        super().load_rank_state_dict(state)  # type: ignore[misc]
        self._resume(state.get("torchdata", {}))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was: this loader's, or torchdata's of one that reads this rank's batches."""
        if "iteration" not in state:
            done = 0 if state.get("_iterator_finished") else _yielded(state) // self._reads_per_batch
            known = {"num_processes": PartialState().num_data_ranks, "generator": None, "initial_seed": None}
            state = {**state, **known, "iteration": self.iteration, "num_batches": done}
        super().load_state_dict(state)  # type: ignore[misc]
        self._epochs.resume_torchdata, self._epochs.torchdata = {}, {}
        self.end_of_dataloader = False
        self._resume(state)

    def _resume(self, state: dict[str, Any]) -> None:
        if self._epochs.resume_batches and ("_num_yielded" in state or "_snapshot" in state):
            self._epochs.resume_torchdata = {key: value for key, value in state.items() if key.startswith("_")}
            self._epochs.resume_torchdata.update({key: state[key] for key in _UNMARKED if key in state})
        elif not self.num_workers and state.get("dataset_state") and hasattr(self.dataset, "load_state_dict"):
            self.dataset.load_state_dict(state["dataset_state"])  # the epoch was over; the data set goes on


_UNMARKED = ("dataset_state", "fetcher_state")
"""torchdata's keys that do not begin as its others do."""


def _yielded(state: dict[str, Any]) -> int:
    """Return the batches that torchdata's state has handed out."""
    if "_snapshot" in state:
        return int(state["_snapshot"]["_snapshot_step"] + state["_steps_since_snapshot"])
    return int(state.get("_num_yielded", 0))
