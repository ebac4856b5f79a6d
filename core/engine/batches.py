"""What the settings make of the script's own batches, and how many steps they are."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distui.core.data.loader import PreparedLoader
    from distui.core.engine.states import States


def tell_changed_batch(engine: States, own: int | None, cut: int | None) -> None:
    """Say in one line, and in the dashboard's events, where the settings cut a loader's `own` batches otherwise.

    Called on every rank; the main one tells. None is a size that nobody gives.
    """
    batch = engine.config.batch
    # Where the loader's batch is the global one, a step takes what it took in one process.
    if own is None or cut is None or own in (cut, batch.global_size) or engine.process_index != 0:
        return
    given = [f"batch.{name} = {value}" for name in type(batch).model_fields if (value := getattr(batch, name))]
    ranks, times = engine.num_data_ranks, engine.gradient_accumulation_steps
    message = (
        f"the loader's batches of {own} a rank are {cut} by {', '.join(given)}: a step takes {cut} x {times} x {ranks} "
        f"rank{'s' if ranks > 1 else ''} = {cut * times * ranks} samples, not {own * times * ranks}; "
        f"unset {'them' if len(given) > 1 else 'it'} to train as the script says"
    )
    print(f"distui: {message}", file=sys.stderr, flush=True)
    engine.telemetry.event("warning", "batch_changed", message)


def note_loader(engine: States, loader: PreparedLoader, num_epochs: int) -> None:
    """Tell where its batches are changed, and work out from the first one how many steps the training will have."""
    own = loader.own_batch_size
    tell_changed_batch(engine, own and own * engine.num_micro, loader.batch_size)
    if not num_epochs or engine.telemetry.total_steps or engine._loaders:
        return
    try:
        num_batches = len(loader)
    except TypeError:  # a stream has no length
        return
    engine.telemetry.total_steps = num_epochs * math.ceil(num_batches / engine.gradient_accumulation_steps)
