"""Ranks that come together before a collective that a script may have put under `if is_main_process`."""

from __future__ import annotations

from collections import Counter
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from distui.core.errors import UserError

WITHIN_S = 600.0
"""How long one rank waits for the others, as NCCL does by default: a slow one may still be evaluating."""
_met: Counter[str] = Counter()


def meet(what: str, group: dist.ProcessGroup | None = None, within_s: float | None = None) -> None:
    """Wait until all ranks of `group` have come to `what`. Collective, and cheap: two words in the store.

    Raises: UserError on those that came, naming those that did not, after `within_s` (default: WITHIN_S).
    """
    within_s = WITHIN_S if within_s is None else within_s
    ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
    if len(ranks) < 2:
        return
    kind = f"distui/meet/{what}/{','.join(map(str, ranks))}"
    key = f"{kind}/{_met[kind]}"
    store, own = _get_default_store(), dist.get_rank()
    store.set(f"{key}/{own}", "")
    if store.add(f"{key}/came", 1) == len(ranks):
        store.set(f"{key}/all", "")
    try:
        store.wait([f"{key}/all"], timedelta(seconds=within_s))
    except RuntimeError as error:  # of files' stores no DistStoreError
        missing = [rank for rank in ranks if not store.check([f"{key}/{rank}"])]
        if missing:
            store.add(f"{key}/came", -1)
            store.delete_key(f"{key}/{own}")
            raise UserError(
                f"rank {own} called {what}, which ranks {', '.join(map(str, missing))} did not within {within_s:g} s",
                "each rank holds a part, so that all must call it",
                "take the call out of `if is_main_process`, and keep only what is written to disk under it",
            ) from error
    _met[kind] += 1
