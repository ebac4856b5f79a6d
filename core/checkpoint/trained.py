"""What checkpoints ask of an engine: a Protocol, so that this room needs no floor above it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn

from distui.core.config.schema import Config


class Clock(Protocol):
    """Counts optimizer steps."""

    step: int


class Held(Protocol):
    """What a backend says of the states that it holds, as ranges by name."""

    @property
    def name(self) -> str: ...

    def model_items(self, model: nn.Module, part: tuple[int, int] | None) -> dict[str, torch.Tensor]:
        """Return this rank's ranges of parameters and buffers."""

    def optimizer_items(self, optimizer: Any, part: tuple[int, int] | None) -> dict[str, Any]:
        """Return this rank's ranges of the optimizer's states, and those that are numbers."""

    def param_shapes(self, model: nn.Module) -> dict[str, list[int]]:
        """Return every parameter's shape by name."""

    def allocate_states(self, optimizer: Any, saved: Mapping[str, Any]) -> None:
        """Let the optimizer have exactly the states that are to be loaded into."""

    def loaded(self, model: nn.Module) -> None:
        """Take over what was written into the ranges."""


class Trained(Protocol):
    """What an engine holds and does, as far as it is saved and loaded."""

    @property
    def config(self) -> Config: ...
    @property
    def clock(self) -> Clock: ...
    @property
    def backend(self) -> Held: ...
    @property
    def scaler(self) -> Any: ...
    @property
    def process_index(self) -> int: ...
    @property
    def num_processes(self) -> int: ...
    @property
    def data_index(self) -> int: ...
    @property
    def num_data_ranks(self) -> int: ...
    @property
    def _models(self) -> list[nn.Module]: ...
    @property
    def _optimizers(self) -> list[Any]: ...
    @property
    def _schedulers(self) -> list[Any]: ...
    @property
    def _loaders(self) -> list[Any]: ...
    @property
    def _registered(self) -> list[Any]: ...
    @property
    def _faces(self) -> Mapping[str, Any]: ...

    def forget_step(self) -> None:
        """Drop what is left of a step that began before a state was loaded."""

    def half_loaded(self, what: str) -> AbstractContextManager[None]:
        """Train no more where the block is not left well, until another one is."""

    def wait_for_everyone(self) -> None:
        """Return when all ranks have come here. Collective."""

    def get_state_dict(self, model: nn.Module, only_rank_0: bool = False) -> Mapping[str, Any]:
        """Return the whole state of `model`. Collective."""
