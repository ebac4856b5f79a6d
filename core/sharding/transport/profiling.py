"""What a torch profile, the user's or `distui control RUN profile`, sees of collectives in flight."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.autograd.profiler import record_function


@contextmanager
def hidden_from_profiler() -> Iterator[None]:
    """Keep what is sent and received inside out of a torch profile of this thread.

    Gloo's sends and receives note their end in the profile when they are waited for. If the profile was stopped until
    then, as between two steps while weights are on their way, they write into memory that is freed.
    """
    if not torch._C._autograd._profiler_enabled():
        yield
        return
    torch._C._autograd._enable_record_function(False)
    try:
        yield
    finally:
        torch._C._autograd._enable_record_function(True)


def shown_in_profile(name: str) -> AbstractContextManager[Any]:
    """Show what is done inside as `name` in a torch profile of this thread, if one is being taken."""
    return record_function(name) if torch._C._autograd._profiler_enabled() else nullcontext()
