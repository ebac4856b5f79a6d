"""Seeds, and random generators that are alike on every rank."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from distui.compat.accelerate.refusals import NotOffered
from distui.compat.accelerate.state import AcceleratorState, PartialState
from distui.compat.accelerate.utils.enums import RNGType
from distui.core.ranks import ops


def set_seed(seed: int, device_specific: bool = False, deterministic: bool = False) -> None:
    """Seed Python, NumPy and torch; with `device_specific` each rank gets a seed of its own."""
    if device_specific:
        seed += AcceleratorState().process_index
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if deterministic:
        torch.use_deterministic_algorithms(True)


def synchronize_rng_state(rng_type: RNGType | None = None, generator: torch.Generator | None = None) -> None:
    """Give every rank rank 0's state of one generator. Collective."""
    kind = RNGType(str(rng_type)) if rng_type is not None else None
    if kind is RNGType.TORCH:
        state: Any = torch.get_rng_state()
    elif kind is RNGType.CUDA:
        state = torch.cuda.get_rng_state()
    elif kind is RNGType.GENERATOR:
        if generator is None:
            raise ValueError("rng_type 'generator' needs a generator")
        state = generator.get_state()
    else:
        raise NotOffered(f"synchronize_rng_state({rng_type})", "distui runs on CPUs and CUDA GPUs", "use torch or cuda")
    if PartialState().use_distributed:
        state = ops.broadcast_object(state)
    if kind is RNGType.TORCH:
        torch.set_rng_state(state)
    elif kind is RNGType.CUDA:
        torch.cuda.set_rng_state(state)
    elif generator is not None:
        generator.set_state(state)


def synchronize_rng_states(rng_types: Iterable[str | RNGType], generator: torch.Generator | None = None) -> None:
    """Give every rank rank 0's state of each of the generators. Collective."""
    for rng_type in rng_types:
        synchronize_rng_state(RNGType(str(rng_type)), generator=generator)
