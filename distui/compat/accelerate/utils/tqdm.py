"""A progress bar on rank 0 only."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from distui.compat.accelerate.state import PartialState


def tqdm(*args: Any, main_process_only: bool = True, **kwargs: Any) -> Any:
    """Return tqdm's bar; a silent one on other ranks than each node's first."""
    from tqdm.auto import tqdm as bar

    if args and isinstance(args[0], bool):
        raise ValueError("Passing `True` or `False` as the first argument to Accelerate's `tqdm` is not supported.")
    if main_process_only and not kwargs.get("disable", False):
        kwargs["disable"] = PartialState().local_process_index != 0
    return bar(*args, **kwargs)


class _Callable(ModuleType):
    """`accelerate.utils.tqdm` names this module and the function; whichever a script finds there, it can call it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return tqdm(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
