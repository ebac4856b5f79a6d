"""The first numbers of one model, and their way to the device of every rank."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from distui.core.axes.tensors import take
from distui.core.errors import UserError
from distui.core.sharding.cuts import Cuts
from distui.core.sharding.homes.homes import agreed
from distui.core.sharding.start.initialise import Init, Initialiser, make_real
from distui.core.sharding.start.unread import take_unread
from distui.core.sharding.start.weight_files import WeightFiles
from distui.core.sharding.transport.alike import broadcast_alike, check_alike
from distui.core.sharding.units.guarded import DATA, GRAD, place_of
from distui.core.sharding.units.layout import FlatLayout


class Start:
    """Fills units one after the other: from files, from modules' initialisation, or from rank 0's own parameters."""

    def __init__(
        self,
        model: nn.Module,
        group: dist.ProcessGroup | None = None,
        *,
        device: torch.device | None = None,
        seed: int = 0,
        init: Init | None = None,
        weights: str | Path | None = None,
        strict: bool = True,
    ) -> None:
        """Begin with `model` for the ranks of `group`. Collective. Without a `device` tensors stay where they are.

        Raises: UserError on all ranks where their models differ, or the files do not fit.
        """
        if any(isinstance(param, nn.parameter.UninitializedParameter) for param in model.parameters()):
            raise UserError(
                "the model has lazy parameters that are not initialised",
                "their shapes are not known before the first forward",
                "run one forward before engine.prepare(model)",
            )
        self.model, self._device = model, device
        self._group = group if group is not None and dist.get_world_size(group) > 1 else None
        if self._group is not None:
            check_alike(model, self._group)
        unread = take_unread(model, self._group)
        self.files = unread if weights is None else None
        if weights is not None:
            self.files = agreed(lambda: WeightFiles(weights, model, strict), self._group)
        self._experts: set[int] = set()
        """What is cut within the group, by identity: a rank has the numbers of its piece already."""
        self._initialiser: Initialiser | None = None
        if any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()]):
            self._initialiser = Initialiser(model, self.device_for(model.parameters()), seed, init)

    def cut(self, params: Sequence[nn.Parameter], cuts: Cuts) -> None:
        """Leave of `params` what `cuts` says that this rank holds; of others than a file's, the first rank's numbers.

        Collective: the ranks of `cuts`, whose models are alike; for experts all that hold some of these layers'.
        """
        group = cuts.group
        if cuts.experts is not None:
            group = cuts.experts.stage
            self._experts.update(map(id, params))
        assert group is not None
        self.bring(params)
        for param in params:
            cut = cuts.of[id(param)]
            if self.files is not None and self.files.has(param):
                self.files.cuts = {**self.files.cuts, id(param): cut}
                _set_data(param, torch.empty(cut.local_shape, dtype=param.dtype, device="meta"))
                continue
            whole = DATA.__get__(param)
            broadcast_alike([whole], group)
            _set_data(param, take(whole, cut))

    def share(self, tensors: Iterable[torch.Tensor], cuts: Cuts) -> None:
        """Give the ranks of `cuts` the numbers that the first has of what is whole. Collective.

        What is on meta, in files or not, will have the same on all of them.
        """
        assert cuts.group is not None
        broadcast_alike([DATA.__get__(tensor) for tensor in tensors if not tensor.is_meta], cuts.group)

    def device_for(self, tensors: Iterable[torch.Tensor]) -> torch.device:
        """Return where these are to be: the device, or where the first of them is; the CPU for what is on meta."""
        if self._device is not None:
            return self._device
        devices = [tensor.device for tensor in tensors]
        return next((device for device in devices if device.type != "meta"), torch.device("cpu"))

    def bring(self, tensors: Sequence[torch.Tensor]) -> None:
        """Initialise what of these is on meta and in no file."""
        if self._initialiser is not None:
            self._initialiser.bring([tensor for tensor in tensors if self.files is None or not self.files.has(tensor)])

    # ---- units ---------------------------------------------------------------------------------------------------

    def has_files_of(self, params: Iterable[nn.Parameter]) -> bool:
        """Return whether all of `params` are in files, so that each rank reads its part."""
        return self.files is not None and all(self.files.has(param) for param in params)

    def read_part(
        self, params: Sequence[nn.Parameter], layout: FlatLayout, rank: int, device: torch.device
    ) -> torch.Tensor:
        """Return the shard of `rank` out of the files, in their precision."""
        assert self.files is not None
        part = torch.zeros(layout.shard_numel, dtype=self.dtype_for(params), device=device)
        base, _ = layout.shard(rank)
        for index, (param, span) in enumerate(zip(params, layout.spans, strict=True)):
            low, high = layout.owned(index, rank)
            if low < high:
                at = span.offset + low - base
                part[at : at + high - low].copy_(self.files.read(param, low, high))
        return part

    def dtype_for(self, params: Iterable[nn.Parameter]) -> torch.dtype:
        """Return a format that holds what the script or the files have of `params`."""
        dtypes = [self.files.dtype_of(p) if self.files is not None and self.files.has(p) else p.dtype for p in params]
        found = dtypes[0]
        for dtype in dtypes:
            found = torch.promote_types(found, dtype)
        return found

    def fill(self, params: Sequence[nn.Parameter], whole: torch.Tensor, layout: FlatLayout) -> None:
        """Fill the flat `whole` with the parameters that rank 0 has, or each its experts. Collective."""
        group = None if id(params[0]) in self._experts else self._group
        if group is None or dist.get_rank(group) == 0:
            for param, span in zip(params, layout.spans, strict=True):
                in_files = self.files is not None and self.files.has(param)
                source = self.files.read(param) if in_files else DATA.__get__(param)  # type: ignore[union-attr]
                whole[span.offset : span.end].copy_(source.reshape(-1))
        if group is not None:
            broadcast_alike([whole], group)

    # ---- what is in no unit --------------------------------------------------------------------------------------

    def place(self, params: Sequence[nn.Parameter], compute_dtype: torch.dtype | None = None) -> None:
        """Bring these and the model's buffers to the device of every rank, whole, in the compute format. Collective."""
        sent = self._place(params, compute_dtype)
        if self._group is not None:
            broadcast_alike(sent, self._group)

    def _place(self, params: Sequence[nn.Parameter], compute_dtype: torch.dtype | None) -> list[torch.Tensor]:
        buffers = list(self.model.buffers())
        self.bring([*params, *buffers])
        sent: list[torch.Tensor] = []
        for tensor in [*params, *buffers]:
            is_buffer = not isinstance(tensor, nn.Parameter)
            dtype = tensor.dtype
            if compute_dtype is not None and not is_buffer and tensor.is_floating_point():
                dtype = compute_dtype
            device = self.device_for([tensor])
            if self.files is not None and self.files.has(tensor):
                values = self.files.read(tensor).to(device, dtype).view(tensor.shape)
                if tensor.is_meta:
                    make_real(tensor, values)
                else:
                    _set_data(tensor, values)
                continue
            _set_data(tensor, DATA.__get__(tensor).to(device, dtype))
            if id(tensor) not in self._experts:
                sent.append(DATA.__get__(tensor))
        return sent

    def place_all(self) -> None:
        """Bring the whole model to the device, as this rank has it."""
        self._place(list(self.model.parameters()), None)


def refuse_trained(model: nn.Module) -> None:
    """Refuse a model that is about to be cut and has gradients. Raises: UserError."""
    for name, param in model.named_parameters():
        if param.grad is not None and place_of(param) is None:
            raise UserError(
                f"{name} has a gradient already",
                "it would be of the whole parameter",
                "call prepare before any backward",
            )


def _set_data(tensor: torch.Tensor, values: torch.Tensor) -> None:
    grad = GRAD.__get__(tensor)
    if grad is not None and grad.device != values.device:
        GRAD.__set__(tensor, None)
    DATA.__set__(tensor, values)
    if grad is not None and grad.device != values.device:
        GRAD.__set__(tensor, grad.to(values.device, values.dtype))
