"""What a script may not do with the groups of a prepared optimizer, since nothing would come of it."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Any

import torch

from distui.core.errors import UserError


def refuse_changed_groups(inner: torch.optim.Optimizer, given: Sequence[Sequence[Any]]) -> None:
    """Refuse groups of other parameters than were `given`. Raises: UserError that names the group."""
    pairs = itertools.zip_longest((group["params"] for group in inner.param_groups), given, fillvalue=(None,))
    for index, (now, before) in enumerate(pairs):
        if len(now) == len(before) and all(map(operator.is_, now, before)):
            continue
        raise UserError(
            f"the parameters in group {index} of the prepared {type(inner).__name__} are not those that it was given",
            f"there are {len(now)} in it, and {len(before)} were given; what is stepped is laid out in shards already",
            "add groups by optimizer.add_param_group, or prepare another optimizer with the groups as they are to be",
        )
