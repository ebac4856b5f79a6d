"""Parameters that are in files, and are read when somebody wants their numbers: by each rank only its part in prepare.

Until then they are on the meta device, and say that they are on the CPU. Whatever is done with one (an operation, a
copy, an edit) reads it whole first, so nothing is lost that a script does to a model before it is prepared.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from distui.core.ranks import ops
from distui.core.sharding.start.initialise import make_real
from distui.core.sharding.start.weight_files import WeightFiles
from distui.core.sharding.units.guarded import DATA, GRAD, Fetched, guard, let_go, place_of

_SAYS: dict[Any, Any] = {
    getattr(torch.Tensor, "device").__get__: torch.device("cpu"),  # noqa: B009
    getattr(torch.Tensor, "is_meta").__get__: False,  # noqa: B009
    getattr(torch.Tensor, "is_cpu").__get__: True,  # noqa: B009
    torch.Tensor.get_device: -1,
}


class _InFiles:
    """Holds a model's parameters that nobody has read yet."""

    name = "a model whose weights are read when they are wanted"

    def __init__(self, params: list[nn.Parameter], files: WeightFiles) -> None:
        self.params, self.files = params, files
        self.touched = False

    @contextlib.contextmanager
    def reading(self, indices: Iterable[int]) -> Any:
        """Read these whole; they are plain parameters from then on."""
        for index in indices:
            param = self.params[index]
            if isinstance(param, _Unread):
                let_go([param])
                make_real(param, self.files.read(param).clone().view(param.shape))
        yield

    def write_data(self, index: int, value: torch.Tensor) -> None:
        """Take what the script assigns in place of the file's numbers."""
        with self.reading([index]):
            DATA.__set__(self.params[index], value)

    def read_gradient(self, index: int) -> torch.Tensor | None:
        """Return the gradient, which is the parameter's own."""
        found: torch.Tensor | None = GRAD.__get__(self.params[index])
        return found

    def write_gradient(self, index: int, value: torch.Tensor | None) -> None:
        """Take a gradient, of a parameter that has memory."""
        with self.reading([index]):
            GRAD.__set__(self.params[index], value)


class _Unread(Fetched):
    """What a parameter is beside its own class until it is read."""

    __slots__ = ()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _SAYS:
            return _SAYS[func]
        return super().__torch_function__(func, types, args, kwargs)


@functools.cache
def _unread(original: type) -> type:
    def fill(body: dict[str, Any]) -> None:
        body.update(__module__=original.__module__, __qualname__=original.__qualname__, distui_original=original)

    return types.new_class(original.__name__, (_Unread, original), {}, fill)


def read_when_wanted(model: nn.Module, place: str | Path) -> None:
    """Leave the parameters of `model` that are on meta and in the safetensors at `place` there until they are wanted.

    Raises: UserError where a shape does not fit.
    """
    files = WeightFiles(place, model, strict=False)
    params = [param for param in model.parameters() if param.is_meta and files.has(param)]
    holder = _InFiles(params, files)
    guard(params, holder)
    for param in params:
        param.__class__ = _unread(type(param))
        param.__dict__["_distui_in_files"] = holder  # which it keeps alive


def take_unread(model: nn.Module, group: dist.ProcessGroup | None) -> WeightFiles | None:
    """Return the files of what no rank has read of `model`, which is then on meta; None where all of it is read.

    Collective where there is a `group`, of several ranks. What one rank has read, all read: it may have been edited.
    """
    params = list(nn.Module.parameters(model))
    unread = [isinstance(param, _Unread) for param in params]
    if group is not None and params:
        flags = torch.tensor(unread, dtype=torch.uint8, device=ops.device_over(torch.device("cpu"), group))
        dist.all_reduce(flags, op=dist.ReduceOp.MIN, group=group)
        unread = [bool(flag) for flag in flags.tolist()]
    files: WeightFiles | None = None
    for param, is_unread in zip(params, unread, strict=True):
        if not isinstance(param, _Unread):
            continue
        place = place_of(param)
        assert place is not None
        holder: Any = place[0]
        if is_unread and files in (None, holder.files):
            files = holder.files
            let_go([param])
        else:
            with holder.reading([place[1]]):
                continue
    if files is not None:
        files.keep(param for param in params if param.is_meta)
    return files
