"""The small models and checks that Accelerate's own test scripts import."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from distui.compat.accelerate.state import PartialState
from distui.compat.accelerate.test_utils.training import RegressionDataset, RegressionModel
from distui.compat.accelerate.utils.operations import gather

__all__ = [
    "RegressionDataset",
    "RegressionModel",
    "are_the_same_tensors",
    "assert_exception",
    "device_count",
    "require_bnb",
    "torch_device",
]

torch_device = "cuda" if torch.cuda.is_available() else "cpu"
device_count = torch.cuda.device_count() if torch.cuda.is_available() else 0


def are_the_same_tensors(tensor: torch.Tensor) -> bool:
    """Return whether every rank has the same tensor. Collective."""
    state = PartialState()
    everyones = gather(tensor[None].clone().to(state.device)).cpu()
    return all(torch.equal(everyones[0], other) for other in everyones[1:])


@contextmanager
def assert_exception(exception_class: type[BaseException], msg: str | None = None) -> Iterator[None]:
    """Fail unless the block raises `exception_class` with `msg` in its text."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  whatever it is, it is told
        assert isinstance(error, exception_class), f"Expected {exception_class}, got {type(error)}: {error}"
        assert msg is None or msg in str(error), f"Expected {msg!r} in {error}"
        return
    raise AssertionError(f"Expected {exception_class} to be raised")


def require_bnb(test_case: Callable[..., Any]) -> Callable[..., Any]:
    """Skip a test: distui does not quantize."""
    import unittest

    return unittest.skip("distui does not quantize")(test_case)
