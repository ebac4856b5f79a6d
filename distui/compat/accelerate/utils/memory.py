"""Freeing memory, and finding the batch size that fits."""

from __future__ import annotations

import functools
import gc
import inspect
from collections.abc import Callable
from typing import Any

import torch

_OUT_OF_MEMORY = ("out of memory", "CUDNN_STATUS_NOT_SUPPORTED", "can't allocate memory", "not enough memory")


def clear_device_cache(garbage_collection: bool = False) -> None:
    """Give cached device memory back."""
    if garbage_collection:
        gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def release_memory(*objects: Any) -> list[None]:
    """Return a None for each object, to rebind their names, and free what they held."""
    clear_device_cache(garbage_collection=True)
    return [None for _ in objects]


def should_reduce_batch_size(exception: BaseException) -> bool:
    """Return whether memory ran out."""
    if isinstance(exception, torch.OutOfMemoryError):
        return True
    text = str(exception).lower()
    return isinstance(exception, RuntimeError) and any(sign.lower() in text for sign in _OUT_OF_MEMORY)


def find_executable_batch_size(
    function: Callable[..., Any] | None = None,
    starting_batch_size: int = 128,
    reduce_batch_size_fn: Callable[[], int] | None = None,
) -> Any:
    """Decorate `function(batch_size, ...)` to be called again with nine tenths of the size when memory runs out.

    Raises: TypeError where the caller gives batch_size itself; RuntimeError when the size is zero.
    """
    if function is None:
        return functools.partial(
            find_executable_batch_size,
            starting_batch_size=starting_batch_size,
            reduce_batch_size_fn=reduce_batch_size_fn,
        )

    @functools.wraps(function)
    def attempt(*args: Any, **kwargs: Any) -> Any:
        parameters = list(inspect.signature(function).parameters)
        if len(parameters) < len(args) + 1:
            given = ", ".join(f"{name}={value}" for name, value in zip(parameters[1:], args[1:], strict=False))
            raise TypeError(
                f"Batch size was passed into `{function.__name__}` as the first argument when called.\n"
                f"Remove this as the decorator already does so: `{function.__name__}({given})`"
            )
        size = starting_batch_size
        clear_device_cache(garbage_collection=True)
        while size > 0:
            try:
                return function(size, *args, **kwargs)
            except Exception as error:
                if not should_reduce_batch_size(error):
                    raise
            clear_device_cache(garbage_collection=True)
            size = reduce_batch_size_fn() if reduce_batch_size_fn is not None else int(size * 0.9)
        raise RuntimeError("No executable batch size found, reached zero.")

    return attempt
