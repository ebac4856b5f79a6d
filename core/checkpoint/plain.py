"""Plain data as JSON and tensors, and back, so that no state of a script is ever pickled.

A tree is JSON. What JSON has no form for is an object with one key, a tag: `{"$tuple": [...]}`. Tensors and arrays of
more than a few pages stand beside the tree, and are in it by number. Reading makes the types that are here, no others.
"""

from __future__ import annotations

import argparse
import base64
import math
import pathlib
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np
import torch

from distui.core.errors import UserError

INLINE_BYTES = 32 << 10
"""Up to here a tensor is written into the tree."""

_FORMATS = (
    "bool uint8 uint16 uint32 uint64 int8 int16 int32 int64 float16 bfloat16 float32 float64 complex32 complex64 "
    "complex128 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu"
)
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in _FORMATS.split() if hasattr(torch, name)}
"""What a checkpoint's tensors may be, by the name that it writes."""

_FACTORIES: dict[str, Any] = {kind.__name__: kind for kind in (list, dict, set, int, float, str)} | {"None": None}
_KINDS = "numbers, text, bytes, None, lists, tuples, sets, dicts, namespaces, paths, tensors and numpy arrays"


class Plain:
    """A value made into a tree, with a copy of what it holds of tensors."""

    def __init__(self, value: Any, what: str, keeps: bool = True) -> None:
        """`what` names the value in errors; without `keeps` tensors are only looked at, and cannot be written.

        Raises: UserError where the value holds anything that is no plain data.
        """
        self.tensors: list[torch.Tensor] = []
        self._keeps = keeps
        try:
            self.tree = self._tree(value, what)
        except RecursionError:
            raise UserError(f"{what} cannot be saved", "it contains itself, or is nested too deeply", _FIX) from None

    def _tree(self, value: Any, path: str) -> Any:
        kind = type(value)
        if value is None or kind in (bool, int, str):
            return value
        if kind is float:
            return value if math.isfinite(value) else {"$float": repr(value)}
        if kind is list:
            return [self._tree(item, f"{path}[{index}]") for index, item in enumerate(value)]
        if kind is dict and all(type(key) is str and not key.startswith("$") for key in value):
            return {key: self._tree(item, f"{path}[{key!r}]") for key, item in value.items()}
        if isinstance(value, pathlib.PurePath):
            return {"$path": str(value)}
        if kind not in _WRITERS:
            found = next((base for base in _WRITERS_OF_BASES if isinstance(value, base)), None)
            if found is None:
                raise _refusal(value, path)
            kind = found
        tag, write = _WRITERS[kind]
        return {f"${tag}": write(self, value, path)}

    def items(self, values: Any, path: str) -> list[Any]:
        """Return the trees of a sequence's items."""
        return [self._tree(item, f"{path}[{index}]") for index, item in enumerate(values)]

    def pairs(self, value: Mapping[Any, Any], path: str) -> list[list[Any]]:
        """Return the trees of a mapping's keys and values."""
        return [
            [self._tree(key, f"{path}.keys()"), self._tree(item, f"{path}[{key!r}]")] for key, item in value.items()
        ]

    def tensor(self, value: torch.Tensor, path: str) -> list[Any]:
        """Return a tensor's format, shape, and bytes or number."""
        name = str(value.dtype).removeprefix("torch.")
        if value.layout is not torch.strided or value.device.type == "meta" or name not in DTYPES:
            why = f"it is a {value.layout} tensor of {value.dtype} on {value.device}"
            raise UserError(f"{path} cannot be saved", why, _FIX)
        return [name, list(value.shape), self._data(value.detach().resolve_conj().resolve_neg())]

    def array(self, value: np.ndarray[Any, Any], path: str) -> list[Any]:
        """Return an array's format, shape, and bytes or number."""
        if value.dtype.hasobject or value.dtype.names is not None:
            raise UserError(f"{path} cannot be saved", f"it is a numpy array of {value.dtype}", _FIX)
        data = np.ascontiguousarray(value).reshape(-1).view(np.uint8) if value.size else np.zeros(0, np.uint8)
        return [value.dtype.str, list(value.shape), self._data(torch.from_numpy(data.copy()))]

    def _data(self, value: torch.Tensor) -> str | int:
        if not self._keeps:
            return ""
        # A copy: the script may change its tensor while this one is being written.
        flat = value.to("cpu", copy=True).contiguous().reshape(-1).view(torch.uint8)
        if flat.numel() <= INLINE_BYTES:
            return base64.b64encode(flat.numpy().tobytes()).decode()
        self.tensors.append(flat)
        return len(self.tensors) - 1


_FIX = f"let state_dict() return plain data: {_KINDS}"


def _refusal(value: Any, path: str) -> UserError:
    kind = type(value)
    return UserError(
        f"{path} cannot be saved",
        f"it is a {kind.__module__}.{kind.__qualname__}: only a pickle could keep it, and reading one can run code",
        _FIX,
    )


def _base64(_: Plain, value: Any, path: str) -> str:
    return base64.b64encode(bytes(value)).decode()


def _scalar(_: Plain, value: np.generic, path: str) -> list[Any]:
    if value.dtype.hasobject or value.dtype.names is not None:
        raise _refusal(value, path)
    return [value.dtype.str, base64.b64encode(value.tobytes()).decode()]


def _default(plain: Plain, value: defaultdict[Any, Any], path: str) -> list[Any]:
    for name, factory in _FACTORIES.items():
        if value.default_factory is factory:
            return [name, plain.pairs(value, path)]
    raise _refusal(value.default_factory, f"{path}.default_factory")


Write = Callable[[Plain, Any, str], Any]
_WRITERS: dict[type, tuple[str, Write]] = {
    tuple: ("tuple", Plain.items),
    dict: ("dict", Plain.pairs),
    set: ("set", Plain.items),
    frozenset: ("frozenset", Plain.items),
    OrderedDict: ("ordered", Plain.pairs),
    Counter: ("counter", Plain.pairs),
    defaultdict: ("default", _default),
    deque: ("deque", lambda plain, value, path: [value.maxlen, plain.items(value, path)]),
    argparse.Namespace: ("namespace", lambda plain, value, path: plain.pairs(vars(value), path)),
    types.SimpleNamespace: ("simple", lambda plain, value, path: plain.pairs(vars(value), path)),
    bytes: ("bytes", _base64),
    bytearray: ("bytearray", _base64),
    complex: ("complex", lambda plain, value, path: plain.items([value.real, value.imag], path)),
    range: ("range", lambda plain, value, path: [value.start, value.stop, value.step]),
    datetime: ("datetime", lambda plain, value, path: value.isoformat()),
    torch.Tensor: ("tensor", Plain.tensor),
    torch.nn.Parameter: ("tensor", Plain.tensor),
    torch.Size: ("size", lambda plain, value, path: list(value)),
    torch.dtype: ("dtype", lambda plain, value, path: str(value).removeprefix("torch.")),
    torch.device: ("device", lambda plain, value, path: str(value)),
    np.ndarray: ("array", Plain.array),
    np.generic: ("scalar", _scalar),
}
_WRITERS_OF_BASES = (np.generic,)


def read_plain(tree: Any, what: str, tensor: Callable[[int], bytearray]) -> Any:
    """Return the value that a tree was made of; `tensor(number)` gives the bytes of what stands beside it.

    Raises: UserError for a tree that `Plain` does not write.
    """

    def read(node: Any) -> Any:
        if isinstance(node, list):
            return [read(item) for item in node]
        if not isinstance(node, dict):
            return node
        tag = next(iter(node), "")
        if len(node) != 1 or not tag.startswith("$"):
            return {key: read(item) for key, item in node.items()}
        return _READERS[tag[1:]](node[tag], read, data)

    def data(place: str | int) -> bytearray:
        return tensor(place) if isinstance(place, int) else bytearray(base64.b64decode(place))

    try:
        return read(tree)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError, RecursionError) as error:
        raise UserError(
            f"{what} cannot be read",
            f"it is not what distui writes ({type(error).__name__}: {error})",
            "load an earlier checkpoint",
        ) from error


Data = Callable[[Any], bytearray]


def as_tensor(data: bytearray, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    """Return `data` as a tensor, which shares its memory. Raises ValueError where it is of another size."""
    if math.prod(shape) * dtype.itemsize != len(data) or any(length < 0 for length in shape):
        raise ValueError(f"{len(data)} bytes are no {dtype} of shape {list(shape)}")
    if not data:
        return torch.empty(tuple(shape), dtype=dtype)
    return torch.frombuffer(data, dtype=torch.uint8).view(dtype).view(tuple(shape))


def _read_array(node: Any, data: Data) -> Any:
    dtype = np.dtype(str(node[0]))
    if dtype.hasobject:
        raise ValueError(f"no array of {dtype}")
    return np.frombuffer(data(node[2]), dtype=dtype).reshape(tuple(node[1]))


def _read_scalar(node: Any) -> Any:
    dtype = np.dtype(str(node[0]))
    if dtype.hasobject:
        raise ValueError(f"no number of {dtype}")
    return np.frombuffer(base64.b64decode(node[1]), dtype=dtype)[0]


def _read_pairs(node: Any, read: Callable[[Any], Any]) -> list[tuple[Any, Any]]:
    return [(read(key), read(value)) for key, value in node]


_READERS: dict[str, Callable[[Any, Callable[[Any], Any], Data], Any]] = {
    "float": lambda node, read, data: float(node),
    "path": lambda node, read, data: pathlib.Path(node),
    "tuple": lambda node, read, data: tuple(read(item) for item in node),
    "dict": lambda node, read, data: dict(_read_pairs(node, read)),
    "set": lambda node, read, data: {read(item) for item in node},
    "frozenset": lambda node, read, data: frozenset(read(item) for item in node),
    "ordered": lambda node, read, data: OrderedDict(_read_pairs(node, read)),
    "counter": lambda node, read, data: Counter(dict(_read_pairs(node, read))),
    "default": lambda node, read, data: defaultdict(_FACTORIES[node[0]], _read_pairs(node[1], read)),
    "deque": lambda node, read, data: deque(read(node[1]), maxlen=node[0]),
    "namespace": lambda node, read, data: argparse.Namespace(**dict(_read_pairs(node, read))),
    "simple": lambda node, read, data: types.SimpleNamespace(**dict(_read_pairs(node, read))),
    "bytes": lambda node, read, data: base64.b64decode(node),
    "bytearray": lambda node, read, data: bytearray(base64.b64decode(node)),
    "complex": lambda node, read, data: complex(*read(node)),
    "range": lambda node, read, data: range(*node),
    "datetime": lambda node, read, data: datetime.fromisoformat(node),
    "tensor": lambda node, read, data: as_tensor(data(node[2]), DTYPES[node[0]], node[1]),
    "size": lambda node, read, data: torch.Size(node),
    "dtype": lambda node, read, data: DTYPES[node],
    "device": lambda node, read, data: torch.device(node),
    "array": lambda node, read, data: _read_array(node, data),
    "scalar": lambda node, read, data: _read_scalar(node),
}
