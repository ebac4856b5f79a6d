"""Weights in safetensors files, of which every rank reads only what it keeps."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from distui.core.axes.cut import Cut
from distui.core.errors import UserError

FORMATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_SHOWN = 12


class WeightFiles(Mapping[str, torch.Tensor]):
    """The tensors of one model in a safetensors file, or in a folder of them with or without an index."""

    def __init__(
        self,
        place: str | Path,
        model: nn.Module,
        strict: bool = True,
        cuts: Mapping[int, Cut] = MappingProxyType({}),
    ) -> None:
        """Open the files, and find what `model` needs in them; a tied weight may have any of its names.

        With `strict=False` the model may have what the files lack, and the other way round.

        Raises: UserError that lists what does not fit, or where there are no such files.
        """
        self.place = Path(place)
        self._slices: dict[str, tuple[Any, Any]] = {}
        try:
            for path in _files(self.place):
                file = safe_open(path, framework="pt")
                self._slices.update({name: (file, file.get_slice(name)) for name in file.keys()})  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self.place} cannot be read", str(error), "give a folder of safetensors files") from None
        self._keys: dict[int, str] = {}
        self.cuts: Mapping[int, Cut] = cuts
        """Of the model's tensors, by identity, those that are pieces of what is in the files."""
        self._fit(model, strict)

    def _fit(self, model: nn.Module, strict: bool) -> None:
        transient = {
            f"{prefix}.{name}" if prefix else name
            for prefix, module in model.named_modules()
            for name in module._non_persistent_buffers_set
        }
        named: list[tuple[str, torch.Tensor]] = list(nn.Module.named_parameters(model, remove_duplicate=False))
        named += nn.Module.named_buffers(model, remove_duplicate=False)
        named = [(name, tensor) for name, tensor in named if name not in transient]
        problems = []
        for name, tensor in named:
            if name not in self._slices:
                continue
            shape, kind = self.shape(name), self._slices[name][1].get_dtype()
            own = self.cuts[id(tensor)].shape if id(tensor) in self.cuts else tuple(tensor.shape)
            if shape != own:
                problems.append(f"{name} is {list(shape)} in them and {list(own)} in the model")
            elif kind not in FORMATS or FORMATS[kind].is_floating_point != tensor.is_floating_point():
                problems.append(f"{name} is {kind} in them and {tensor.dtype} in the model")
            self._keys[id(tensor)] = name  # of several names the last, as with load_state_dict
        if strict:
            known = {name for name, _ in named}
            missing = [name for name, tensor in named if id(tensor) not in self._keys]
            extra = [name for name in self._slices if name not in known]
            for names, what in ((missing, "they lack"), (extra, "the model lacks")):
                if names:
                    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
                    problems.append(f"{what} {', '.join(names[:_SHOWN])}{more}")
        if problems:
            raise UserError(
                f"the weights in {self.place} do not fit {type(model).__name__}",
                "; ".join(problems[:_SHOWN]),
                "give the files of this model, or strict=False for what either side lacks",
            )

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._slices[name][0].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        """Go over the names of what the files and the model both have."""
        return iter(self._keys.values())

    def __len__(self) -> int:
        return len(self._keys)

    def keep(self, tensors: Iterable[torch.Tensor]) -> None:
        """Forget all but these of the model's tensors: of others the model has numbers of its own."""
        wanted = {id(tensor) for tensor in tensors}
        self._keys = {number: name for number, name in self._keys.items() if number in wanted}

    def has(self, tensor: torch.Tensor) -> bool:
        """Return whether the model's `tensor` is in the files."""
        return id(tensor) in self._keys

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor in the files."""
        return tuple(self._slices[name][1].get_shape())

    def dtype_of(self, tensor: torch.Tensor) -> torch.dtype:
        """Return the format that the model's `tensor` has in the files."""
        return FORMATS[self._slices[self._keys[id(tensor)]][1].get_dtype()]

    def read(self, tensor: torch.Tensor, low: int = 0, high: int | None = None) -> torch.Tensor:
        """Return the elements [low, high) of the model's `tensor`, flattened, in the files' format.

        Read are whole rows along the first dimension, no others.
        """
        name = self._keys[id(tensor)]
        file, piece = self._slices[name]
        shape = self.shape(name)
        if (cut := self.cuts.get(id(tensor))) is not None:
            return _pieces(piece, cut).reshape(-1)[low:high]
        high = math.prod(shape) if high is None else high
        row = math.prod(shape[1:])
        found: torch.Tensor
        if low >= high:
            return torch.empty(0, dtype=self.dtype_of(tensor))
        if not shape:
            found = file.get_tensor(name)
            return found.reshape(-1)[low:high]
        first, last = low // row, -(-high // row)
        found = piece[first:last]
        return found.reshape(-1)[low - first * row : high - first * row]


def _pieces(source: Any, cut: Cut) -> torch.Tensor:
    """Return what a rank holds of a tensor in a file; along one dimension no more is read."""
    dims = [dim for dim, pieces in enumerate(cut.pieces) if pieces != ((0, cut.shape[dim]),)]
    if not dims:
        found: torch.Tensor = source[:]
        return found
    ahead = (slice(None),) * dims[0]
    wanted = [(*ahead, slice(begin, begin + length)) for begin, length in cut.pieces[dims[0]]]
    found = torch.cat([source[index if ahead else index[0]] for index in wanted], dims[0])
    for dim in dims[1:]:
        found = torch.cat([found.narrow(dim, begin, length) for begin, length in cut.pieces[dim]], dim)
    return found


def _files(place: Path) -> list[Path]:
    if place.is_file():
        return [place]
    indexes = sorted(place.glob("*.safetensors.index.json"))
    if len(indexes) == 1:
        try:
            names = set(json.loads(indexes[0].read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{indexes[0]} is no index", repr(error), "write the weights once more") from None
        if outside := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
            raise UserError(f"{indexes[0]} is no index", f"{outside[0]!r} is no file beside it", "mend the index")
        return [place / name for name in sorted(names)]
    found = sorted(place.glob("*.safetensors"))
    if not found or len(indexes) > 1:
        what = f"it has {len(indexes)} indexes and {len(found)} safetensors files"
        raise UserError(
            f"{place} holds no weights",
            what if place.is_dir() else "there is no such file or folder",
            "give a .safetensors file, or a folder with model.safetensors",
        )
    return found
