"""Collectives on nested structures: tuples, lists, dicts, named tuples, dataclasses and mappings such as ModelOutput.

Names and semantics follow `accelerate.utils.operations`, except where noted. Everything works in one process without
a process group. Structures that differ over ranks are an error on every rank that says which rank has what, instead
of a hang: each operation first compares a 64-bit digest of what it was given (one element from each rank).
`group` is who takes part; None is the world.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist

from distui.core.errors import UserError

REDUCTIONS = ("sum", "mean", "max")


Group = dist.ProcessGroup | None


def _world(group: Group = None) -> int:
    return dist.get_world_size(group) if dist.is_initialized() else 1


def device_over(device: torch.device, group: dist.ProcessGroup | None = None) -> torch.device:
    """Return where a tensor of `device` travels over `group` (None: the world): there, unless it leads from GPUs only.

    Such is a group that the script made with backend="nccl".
    """
    if device.type != "cpu" or not dist.is_initialized():
        return device
    kinds = {found.type for found in (group or dist.group.WORLD)._device_types}  # type: ignore[union-attr]
    return device if "cpu" in kinds or "cuda" not in kinds else torch.device("cuda", torch.cuda.current_device())


def object_device(group: Group = None) -> torch.device:
    """Return where small tensors that describe something travel: the host, unless the group has NCCL only."""
    return device_over(torch.device("cpu"), group)


# ---- structures ------------------------------------------------------------------------------------------------


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def map_structure(
    function: Callable[[Any], Any], data: Any, *, leaf: Callable[[Any], bool] = _is_tensor, strict: bool = False
) -> Any:
    """Return `data` with `function` applied to what `leaf` accepts, and every container of its own type.

    Other values stay as they are, or with `strict` raise TypeError.
    """

    def inner(value: Any) -> Any:
        return map_structure(function, value, leaf=leaf, strict=strict)

    if leaf(data):
        return function(data)
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        return type(data)(*(inner(value) for value in data))
    if isinstance(data, (tuple, list)):
        return type(data)(inner(value) for value in data)
    if isinstance(data, defaultdict):
        return type(data)(data.default_factory, {key: inner(value) for key, value in data.items()})
    if isinstance(data, Mapping):
        return type(data)({key: inner(value) for key, value in data.items()})  # type: ignore[call-arg]
    if dataclasses.is_dataclass(data) and not isinstance(data, type):
        fields = [field.name for field in dataclasses.fields(data) if field.init]
        return dataclasses.replace(data, **{name: inner(getattr(data, name)) for name in fields})
    if strict:
        raise TypeError(f"{type(data).__name__} is neither a tensor nor a tuple, list, dict or dataclass of them")
    return data


def iter_tensors(data: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of `data` with its path, such as `[0]['loss']`, in a fixed order."""
    if isinstance(data, torch.Tensor):
        yield path, data
    elif isinstance(data, Mapping):
        for key, value in data.items():
            yield from iter_tensors(value, f"{path}[{key!r}]")
    elif isinstance(data, (tuple, list)):
        for index, value in enumerate(data):
            yield from iter_tensors(value, f"{path}[{index}]")
    elif dataclasses.is_dataclass(data) and not isinstance(data, type):
        for field in dataclasses.fields(data):
            yield from iter_tensors(getattr(data, field.name), f"{path}.{field.name}")


def find_batch_size(data: Any) -> int:
    """Return the size of dimension 0 of the first tensor that has one.

    Raises: ValueError where there is none.
    """
    for _, tensor in iter_tensors(data):
        if tensor.ndim:
            return tensor.shape[0]
    raise ValueError(f"{type(data).__name__} holds no tensor with a batch dimension")


def take_first(data: Any, count: int) -> Any:
    """Return the first `count` entries of every tensor (along dimension 0), or of a list of other objects."""
    if isinstance(data, list) and not any(True for _ in iter_tensors(data)):
        return data[:count]
    return map_structure(lambda tensor: tensor[:count], data)


def concatenate(data: Any, dim: int = 0) -> Any:
    """Join structures of one form, given in a list or tuple, tensor by tensor along `dim`.

    A single entry that holds no tensors comes back as it is.
    """
    first = data[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(list(data), dim=dim)
    if isinstance(first, (tuple, list)):
        joined = [concatenate([entry[index] for entry in data], dim) for index in range(len(first))]
        return type(first)(*joined) if hasattr(first, "_fields") else type(first)(joined)
    if isinstance(first, Mapping):
        return type(first)({key: concatenate([entry[key] for entry in data], dim) for key in first})  # type: ignore[call-arg]
    if len(data) == 1:
        return first
    raise TypeError(f"can only concatenate tensors, not {type(first).__name__}")


def send_to_device(
    data: Any,
    device: torch.device | str | int,
    non_blocking: bool = False,
    skip_keys: str | list[str] | None = None,
) -> Any:
    """Return `data` with all tensors, and what else has a `to` method, on `device`.

    Values under `skip_keys` of a mapping stay where they are.
    """
    skipped = [skip_keys] if isinstance(skip_keys, str) else skip_keys or []

    def send(value: Any) -> Any:
        try:
            return value.to(device, non_blocking=non_blocking)
        except TypeError:  # a `to` of its own without that option
            return value.to(device)

    def inner(value: Any) -> Any:
        if isinstance(value, Mapping) and skipped and not hasattr(value, "to"):
            sent = {key: item if key in skipped else inner(item) for key, item in value.items()}
            return type(value)(sent)  # type: ignore[call-arg]
        if isinstance(value, (tuple, list, Mapping)) and not hasattr(value, "to"):
            return map_structure(inner, value, leaf=lambda item: item is not value)
        return send(value) if hasattr(value, "to") else value

    return inner(data)


def convert_to_fp32(data: Any) -> Any:
    """Return `data` with its fp16 and bf16 tensors as fp32."""
    return map_structure(
        lambda tensor: tensor.float(),
        data,
        leaf=lambda value: isinstance(value, torch.Tensor) and value.dtype in (torch.float16, torch.bfloat16),
    )


def convert_outputs_to_fp32(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `forward` so that its fp16 and bf16 outputs are fp32."""

    @functools.wraps(forward)
    def converted(*args: Any, **kwargs: Any) -> Any:
        return convert_to_fp32(forward(*args, **kwargs))

    return converted


# ---- the same on every rank? -----------------------------------------------------------------------------------


def _describe(data: Any, same: Callable[[torch.Tensor], Any]) -> list[str]:
    return [f"{path or 'tensor'}: {same(tensor)}" for path, tensor in iter_tensors(data)]


def _shape_and_dtype(tensor: torch.Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _ndim_and_dtype(tensor: torch.Tensor) -> str:
    return f"{tensor.ndim} dimensions, {str(tensor.dtype).removeprefix('torch.')}"


def check_same(
    operation: str, data: Any, same: Callable[[torch.Tensor], Any] = _shape_and_dtype, group: Group = None
) -> None:
    """Raise on every rank where ranks gave `operation` different structures, shapes or dtypes. Collective.

    Raises: UserError with what each rank has.
    """
    mine = _describe(data, same)
    digest = int.from_bytes(hashlib.blake2b("\n".join(mine).encode(), digest_size=8).digest(), "big", signed=True)
    own = torch.tensor([digest], device=object_device(group))
    digests = [torch.empty_like(own) for _ in range(_world(group))]
    dist.all_gather(digests, own, group=group)
    if len({int(value) for value in digests}) == 1:
        return
    described: list[Any] = [None] * _world(group)
    dist.all_gather_object(described, mine, group=group)
    lines = [f"rank {rank}: {'; '.join(given) or 'no tensors'}" for rank, given in enumerate(described)]
    raise UserError(
        f"ranks gave {operation} different tensors",
        " | ".join(lines),
        "give the same structure, shapes and dtypes on every rank; pad_across_processes evens out a dimension",
    )


# ---- collectives -----------------------------------------------------------------------------------------------


def _gather_one(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    own = (tensor[None] if tensor.ndim == 0 else tensor).detach().to(device_over(tensor.device, group)).contiguous()
    if own.device.type == "cuda":
        whole = own.new_empty(_world(group) * own.shape[0], *own.shape[1:])
        dist.all_gather_into_tensor(whole, own, group=group)
        return whole.to(tensor.device)
    parts = [torch.empty_like(own) for _ in range(_world(group))]
    dist.all_gather(parts, own, group=group)
    return torch.cat(parts)


def gather(data: Any, group: Group = None) -> Any:
    """Concatenate every rank's tensors along dimension 0, in the order of ranks. Collective.

    Shapes: `[B, ...]` gives `[world * B, ...]`; `[]` gives `[world]`, also in one process (Accelerate: `[]` there).

    Raises: TypeError for anything but tensors; UserError for shapes or dtypes that differ over ranks.
    """
    if _world(group) == 1:
        return map_structure(lambda tensor: tensor[None] if tensor.ndim == 0 else tensor, data, strict=True)
    map_structure(lambda tensor: tensor, data, strict=True)
    check_same("gather", data, group=group)
    return map_structure(lambda tensor: _gather_one(tensor, group), data, strict=True)


def gather_object(data: Any, group: Group = None) -> list[Any]:
    """Return every rank's list of objects as one list, in the order of ranks. Collective."""
    if _world(group) == 1:
        return data
    gathered: list[Any] = [None] * _world(group)
    dist.all_gather_object(gathered, data, group=group)
    return [entry for entries in gathered for entry in entries]


def gather_for_metrics(data: Any, num_real: int, use_gather_object: bool = False, group: Group = None) -> Any:
    """Gather, and keep the first `num_real` samples (all where it is not positive). Collective.

    Tensors without a batch dimension, such as a loss, keep every rank's value. What holds anything but tensors is
    gathered as a list of objects.
    """
    if not use_gather_object:
        try:
            map_structure(lambda tensor: tensor, data, strict=True)
        except TypeError:
            use_gather_object = True
    if use_gather_object:
        objects = gather_object(data, group)
        return objects[:num_real] if num_real > 0 else objects
    gathered = gather(data, group)
    if num_real <= 0:
        return gathered
    scalars = iter([tensor.ndim == 0 for _, tensor in iter_tensors(data)])
    return map_structure(lambda tensor: tensor if next(scalars) else tensor[:num_real], gathered)


def reduce(data: Any, reduction: str = "mean", scale: float = 1.0, group: Group = None) -> Any:
    """Combine every rank's tensors by "sum", "mean" or "max", times `scale`; `data` stays as it is. Collective.

    The mean of whole numbers is a float.

    Raises: UserError for another reduction, or shapes or dtypes that differ over ranks.
    """
    if reduction not in REDUCTIONS:
        raise UserError(f"reduction={reduction!r} is unknown", f"known: {', '.join(REDUCTIONS)}", "use one of them")
    if _world(group) > 1:
        check_same("reduce", data, group=group)
    op = dist.ReduceOp.MAX if reduction == "max" else dist.ReduceOp.SUM

    def reduce_one(tensor: torch.Tensor) -> torch.Tensor:
        result = tensor.detach().clone(memory_format=torch.contiguous_format)
        if _world(group) > 1:
            travelling = result.to(device_over(result.device, group))
            dist.all_reduce(travelling, op=op, group=group)
            result = travelling.to(result.device)
        if reduction == "mean":
            result = result / _world(group)
        return result * scale if scale != 1.0 else result

    return map_structure(reduce_one, data, strict=True)


def _size(tensor: torch.Tensor, dim: int) -> int:
    return tensor.shape[dim] if -tensor.ndim <= dim < tensor.ndim else 0


def pad_across_processes(
    data: Any, dim: int = 0, pad_index: int = 0, pad_first: bool = False, group: Group = None
) -> Any:
    """Pad every tensor along `dim` with `pad_index` to the largest size over ranks, so that it can be gathered.

    `pad_first` pads at the beginning. Tensors that have no dimension `dim` stay as they are. Collective.
    """
    map_structure(lambda tensor: tensor, data, strict=True)
    if _world(group) == 1:
        return data
    check_same("pad_across_processes", data, _ndim_and_dtype, group)
    sizes = [_size(tensor, dim) for _, tensor in iter_tensors(data)]
    largest = torch.tensor(sizes, dtype=torch.int64, device=object_device(group))
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    targets = iter(largest.tolist())

    def pad_one(tensor: torch.Tensor) -> torch.Tensor:
        missing = next(targets) - _size(tensor, dim)
        if missing <= 0:
            return tensor
        shape = list(tensor.shape)
        shape[dim] = missing
        padding = tensor.new_full(shape, pad_index)
        return torch.cat([padding, tensor] if pad_first else [tensor, padding], dim=dim)

    return map_structure(pad_one, data, strict=True)


def broadcast(data: Any, from_process: int = 0) -> Any:
    """Return rank `from_process`'s tensors on every rank; `data` stays as it is. Collective.

    Raises: UserError for shapes or dtypes that differ over ranks.
    """
    if _world() == 1:
        return data
    check_same("broadcast", data)

    def broadcast_one(tensor: torch.Tensor) -> torch.Tensor:
        result = tensor.detach().clone(memory_format=torch.contiguous_format).to(device_over(tensor.device))
        dist.broadcast(result, src=from_process)
        return result.to(tensor.device)

    return map_structure(broadcast_one, data, strict=True)


def broadcast_object(value: Any, from_process: int = 0) -> Any:
    """Return rank `from_process`'s `value` on every rank; it is pickled. Collective."""
    return broadcast_object_list([value], from_process)[0]


def broadcast_object_list(values: list[Any], from_process: int = 0) -> list[Any]:
    """Replace `values` in place by rank `from_process`'s, and return the list; all must have one length. Collective."""
    if _world() > 1:
        dist.broadcast_object_list(values, src=from_process)
    return values
