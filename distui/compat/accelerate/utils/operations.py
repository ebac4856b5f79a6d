"""Accelerate's functions on nested structures, on distui's collectives.

One process gets scalars back as they are, and ranks that differ raise `DistributedOperationException` on every rank,
always (Accelerate: in its debug mode).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch

from distui.compat.accelerate import beside
from distui.compat.accelerate.refusals import offered
from distui.compat.accelerate.utils.dataclasses import TensorInformation
from distui.core.errors import UserError
from distui.core.ranks import ops
from distui.core.ranks.ops import (
    broadcast_object_list,
    concatenate,
    convert_outputs_to_fp32,
    convert_to_fp32,
    find_batch_size,
    send_to_device,
)
from distui.core.ranks.ops import gather_object as gather_objects

__all__ = [
    "CannotPadNestedTensorWarning",
    "DistributedOperationException",
    "broadcast",
    "broadcast_object_list",
    "concatenate",
    "convert_outputs_to_fp32",
    "convert_to_fp32",
    "copy_tensor_to_devices",
    "find_batch_size",
    "find_device",
    "gather",
    "gather_object",
    "get_data_structure",
    "honor_type",
    "ignorant_find_batch_size",
    "initialize_tensors",
    "is_namedtuple",
    "is_tensor_information",
    "is_torch_tensor",
    "listify",
    "pad_across_processes",
    "pad_input_tensors",
    "recursively_apply",
    "reduce",
    "send_to_device",
    "slice_tensors",
]


class DistributedOperationException(Exception):
    """Ranks gave a collective different structures, shapes or dtypes."""


class CannotPadNestedTensorWarning(UserWarning):
    """A nested tensor cannot be padded."""


def _checked(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except UserError as error:
            if not error.what.startswith("ranks gave"):
                raise
            raise DistributedOperationException(f"{error.what}: {error.why}; {error.fix}") from error

    return call


def data_group() -> Any:
    """Return the ranks that have different batches; None is all."""
    return getattr(beside.HELD["PartialState"].get("_process"), "data_group", None)


@_checked
def gather(tensor: Any) -> Any:
    """Concatenate every data rank's tensors along dimension 0. Collective."""
    if ops._world(group := data_group()) == 1:
        return tensor
    return ops.gather(tensor, group)


@_checked
def gather_object(object: Any) -> Any:
    """Concatenate every data rank's lists. Collective."""
    return gather_objects(object, data_group())


@_checked
def reduce(tensor: Any, reduction: str = "mean", scale: float = 1.0) -> Any:
    """Combine every data rank's tensors by "sum", "mean" or "max". Collective."""
    if ops._world(group := data_group()) == 1:
        return tensor
    return ops.reduce(tensor, reduction, scale, group)


@_checked
def broadcast(tensor: Any, from_process: int = 0) -> Any:
    """Return rank `from_process`'s tensors on every rank. Collective."""
    return ops.broadcast(tensor, from_process)


@_checked
def pad_across_processes(tensor: Any, dim: int = 0, pad_index: int = 0, pad_first: bool = False) -> Any:
    """Pad every tensor along `dim` to the largest size over data ranks. Collective."""
    if any(getattr(value, "is_nested", False) for _, value in ops.iter_tensors(tensor)):
        warnings.warn("a nested tensor cannot be padded", CannotPadNestedTensorWarning, stacklevel=3)
        return tensor
    return ops.pad_across_processes(tensor, dim, pad_index, pad_first, data_group())


def copy_tensor_to_devices(tensor: Any = None) -> torch.Tensor:
    """Return rank 0's tensor on every rank, on its own device; the others give None. Collective."""
    from distui.compat.accelerate.state import PartialState

    state = PartialState()
    value = ops.broadcast_object(tensor.cpu() if state.is_main_process else None)
    return value.to(state.device)


def is_torch_tensor(tensor: Any) -> bool:
    """Return whether this is a tensor."""
    return isinstance(tensor, torch.Tensor)


def is_tensor_information(tensor_info: Any) -> bool:
    """Return whether this is a `TensorInformation`."""
    return isinstance(tensor_info, TensorInformation)


def is_namedtuple(data: Any) -> bool:
    """Return whether this is a named tuple."""
    return isinstance(data, tuple) and hasattr(data, "_asdict") and hasattr(data, "_fields")


def honor_type(obj: Any, generator: Any) -> Any:
    """Return what `generator` yields as a container of the type of `obj`."""
    return type(obj)(*list(generator)) if is_namedtuple(obj) else type(obj)(generator)


def recursively_apply(
    func: Callable[..., Any],
    data: Any,
    *args: Any,
    test_type: Callable[[Any], bool] = is_torch_tensor,
    error_on_other_type: bool = False,
    **kwargs: Any,
) -> Any:
    """Return `data` with `func` applied to what `test_type` accepts."""
    return ops.map_structure(
        lambda value: func(value, *args, **kwargs), data, leaf=test_type, strict=error_on_other_type
    )


def get_data_structure(data: Any) -> Any:
    """Return `data` with a `TensorInformation` for each tensor."""
    return recursively_apply(lambda tensor: TensorInformation(shape=tensor.shape, dtype=tensor.dtype), data)


def initialize_tensors(data_structure: Any) -> Any:
    """Return empty tensors of the shapes and dtypes of `data_structure`."""
    return recursively_apply(
        lambda info: torch.empty(*info.shape, dtype=info.dtype), data_structure, test_type=is_tensor_information
    )


def ignorant_find_batch_size(data: Any) -> int | None:
    """Return the batch size, or None where there is none."""
    try:
        return find_batch_size(data)
    except (ValueError, TypeError):
        return None


def listify(data: Any) -> Any:
    """Return `data` with lists of numbers for tensors."""

    def convert(tensor: torch.Tensor) -> Any:
        tensor = tensor.detach().cpu()
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).tolist()

    return recursively_apply(convert, data)


def slice_tensors(
    data: Any, tensor_slice: slice, process_index: int | None = None, num_processes: int | None = None
) -> Any:
    """Return `data` with every tensor sliced along dimension 0."""
    return recursively_apply(lambda tensor: tensor[tensor_slice], data)


def pad_input_tensors(tensor: Any, batch_size: int, num_processes: int, dim: int = 0) -> Any:
    """Repeat the last sample until the batch divides among the ranks."""
    missing = -batch_size % num_processes

    def pad(value: torch.Tensor) -> torch.Tensor:
        last = value.narrow(dim, value.shape[dim] - 1, 1)
        return torch.cat([value, *([last] * missing)], dim=dim)

    return recursively_apply(pad, tensor) if missing else tensor


def find_device(data: Any) -> torch.device | None:
    """Return the device of the first tensor."""
    if isinstance(data, Mapping):
        data = list(data.values())
    if isinstance(data, (tuple, list)):
        return next((device for value in data if (device := find_device(value)) is not None), None)
    return data.device if isinstance(data, torch.Tensor) else None


def __getattr__(name: str) -> Any:
    return offered("accelerate.utils.operations", {}, name)
