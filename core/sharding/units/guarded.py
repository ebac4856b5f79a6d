"""Parameters that cannot be read as if they were whole when they are not.

A prepared parameter stays the same object and an `nn.Parameter`; only its class changes with its unit's state:

    Kept      whole. `data` and `grad` are watched, all else is as fast as ever
    Fetched   not whole, or new numbers are on their way. Whatever is done with it, through whatever name (an attribute,
              a list kept from before, `F.linear(x, block.weight)`), first brings the unit here. Its memory is NaN.

What describes a tensor (shape, dtype, requires_grad, hooks) never fetches.

Beside both a parameter may be `Watched`: this rank has nothing of it, or but a share, which nobody may take for the
whole. Its own module reads it, and the engine; all others get an error that says where the rest is.
"""

from __future__ import annotations

import contextlib
import functools
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from distui.core.errors import UserError

DATA: Any = torch.Tensor.data
GRAD: Any = torch.Tensor.grad
"""torch's own descriptors, for the engine itself: they read and write what is there."""


class Holder(Protocol):
    """What a unit is to its parameters."""

    name: str
    touched: bool

    def reading(self, indices: Iterable[int]) -> contextlib.AbstractContextManager[None]:
        """Enter with these parameters whole and current."""

    def write_data(self, index: int, value: torch.Tensor) -> None:
        """Take what the script assigned to `param.data`."""

    def read_gradient(self, index: int) -> torch.Tensor | None:
        """Return what the script sees as `param.grad`."""

    def write_gradient(self, index: int, value: torch.Tensor | None) -> None:
        """Take what the script assigned to `param.grad`."""


_places: dict[int, tuple[weakref.ref[Any], int]] = {}
"""Identity of a parameter -> its unit and its index there. The unit keeps the parameter alive."""


def place_of(param: torch.Tensor) -> tuple[Holder, int] | None:
    """Return the unit that holds a prepared parameter, and its index there; None for any other tensor."""
    found = _places.get(id(param))
    unit = found[0]() if found is not None else None
    return (unit, found[1]) if found is not None and unit is not None else None


ANSWERS: dict[str, Callable[[Any], Any]] = {}
"""Attributes of prepared parameters that somebody above answers for, at the moment that they are asked."""


class Kept:
    """What a prepared parameter is beside its own class."""

    __slots__ = ()
    distui_original: type
    requires_grad: bool

    @property
    def data(self) -> torch.Tensor:
        """The parameter's numbers; what is written to them is kept."""
        if (place := place_of(self)) is not None:  # type: ignore[arg-type]
            unit, index = place
            with torch.no_grad(), unit.reading((index,)):
                unit.touched = True  # only now: bringing a unit here may take what was written before
                return DATA.__get__(self)
        return DATA.__get__(self)

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        if (place := place_of(self)) is not None:  # type: ignore[arg-type]
            place[0].write_data(place[1], value)
        else:
            DATA.__set__(self, value)

    @property
    def grad(self) -> torch.Tensor | None:
        """The parameter's gradient, where a rank has the whole of it."""
        place = place_of(self)  # type: ignore[arg-type]
        return GRAD.__get__(self) if place is None else place[0].read_gradient(place[1])

    @grad.setter
    def grad(self, value: torch.Tensor | None) -> None:
        if (place := place_of(self)) is not None:  # type: ignore[arg-type]
            place[0].write_gradient(place[1], value)
        else:
            GRAD.__set__(self, value)

    def set_(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: the parameter would lie elsewhere than where it is stepped."""
        if (place := place_of(self)) is None:  # type: ignore[arg-type]
            return torch.Tensor.set_(self, *args, **kwargs)  # type: ignore[call-overload]
        raise UserError(
            f"set_ of a prepared parameter of {place[0].name}",
            "its memory is a part of the flat memory that is stepped and sent",
            "assign to its data, or copy_ to it",
        )

    def register_post_accumulate_grad_hook(self, hook: Any) -> Any:
        """Refused: it would find no gradient, for the ranks' sum is not there before the backward ends."""
        if (place := place_of(self)) is None:  # type: ignore[arg-type]
            return torch.Tensor.register_post_accumulate_grad_hook(self, hook)  # type: ignore[arg-type]
        raise refused_hook(f"a prepared parameter of {place[0].name}")

    def __getattr__(self, name: str) -> Any:
        # Only what the parameter does not have comes here.
        if name in ANSWERS:
            return ANSWERS[name](self)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            copied = self.data.clone(memory_format=torch.preserve_format)
            memo[id(self)] = self.distui_original(copied, self.requires_grad)
        return memo[id(self)]


def refused_view(name: str) -> UserError:
    """Return what is raised where a view wrote to memory of `name`, a parameter or a unit, that was let go."""
    return UserError(
        f"{name} was written to by a view of it from an earlier step",
        "at stage 3 whole parameters are in other memory each time, and the view is of what was let go: NaN",
        "take the view anew (parameter.detach()) where it is written to, write to the parameter itself, or set "
        "strategy.zero_stage to 2 or less",
    )


def refused_hook(whose: str) -> UserError:
    """Return why nobody may be called after a parameter's gradient."""
    return UserError(
        f"a hook after the gradient of {whose} (register_post_accumulate_grad_hook)",
        "a backward brings this rank's gradients only, and their sum over the ranks is there when it has ended",
        "use register_hook for the gradient as it comes, or read and step after engine.backward(loss)",
    )


def _getters(*names: str) -> set[Any]:
    return {getattr(torch.Tensor, name).__get__ for name in names}


DESCRIBES = {
    *_getters("shape", "dtype", "device", "ndim", "requires_grad", "is_leaf", "grad_fn", "layout", "is_meta"),
    *_getters("is_cuda", "is_cpu", "is_sparse", "_backward_hooks", "_post_accumulate_grad_hooks", "output_nr"),
    *_getters("grad", "retains_grad", "is_quantized", "is_nested", "itemsize", "nbytes"),
    *(getattr(torch.Tensor, name).__set__ for name in ("requires_grad", "grad", "_backward_hooks")),
    getattr(torch.Tensor, "_post_accumulate_grad_hooks").__set__,  # noqa: B009
    *(torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.nelement, torch.Tensor.element_size),
    *(torch.Tensor.is_floating_point, torch.Tensor.is_complex, torch.is_floating_point, torch.is_complex, torch.numel),
    *(torch.Tensor.requires_grad_, torch.Tensor.register_hook, torch.Tensor.register_post_accumulate_grad_hook),
    *(torch.Tensor.__len__, torch.Tensor.__hash__, torch.Tensor.get_device, torch.Tensor.is_signed),
}
"""What can be asked of a tensor without its numbers."""


class Fetched(Kept):
    """What a prepared parameter is while it is not whole."""

    __slots__ = ()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in DESCRIBES:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        wanted: dict[int, tuple[Holder, set[int]]] = {}
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Fetched) and (place := place_of(leaf)) is not None:  # type: ignore[arg-type]
                wanted.setdefault(id(place[0]), (place[0], set()))[1].add(place[1])
        with contextlib.ExitStack() as whole:
            for unit, indices in wanted.values():
                whole.enter_context(unit.reading(indices))
            for unit, _ in wanted.values():
                unit.touched = True  # the operation may write
            return func(*args, **kwargs)


class Refusal:
    """Why nobody reads or writes some parameters of a model but their own modules and the engine."""

    def __init__(self, why: str, fix: str, names: dict[int, str]) -> None:
        """`names` are those of the parameters, by identity."""
        self._why, self._fix, self._names = why, fix, names
        self._num_inside = 0

    @contextlib.contextmanager
    def lifted(self) -> Iterator[None]:
        """Let whoever is inside read them."""
        self._num_inside += 1
        try:
            yield
        finally:
            self._num_inside -= 1

    def check(self, param: Any, what: str) -> None:
        """Raise UserError, unless it is lifted, or autograd runs, which has what it needs from the forward."""
        if not self._num_inside and torch._C._current_graph_task_id() == -1:
            raise UserError(f"{what} of {self._names.get(id(param), 'a parameter')}", self._why, self._fix)


REFUSAL = "_distui_refusal"
"""Where a watched parameter has its `Refusal`, in its `__dict__`."""
_OWN_WAYS = {DATA.__get__, DATA.__set__, GRAD.__get__, GRAD.__set__, getattr(torch.Tensor, "_version").__get__}  # noqa: B009


class Watched:
    """What a parameter is beside `Kept` or `Fetched` whose numbers on this rank are not the whole of it."""

    __slots__ = ()

    @property
    def data(self) -> torch.Tensor:
        """Its numbers, for those who may read them."""
        _check(self, "data")
        return super().data  # type: ignore[misc]

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        _check(self, "assigning to data")
        Kept.data.__set__(self, value)  # type: ignore[attr-defined]

    @property
    def grad(self) -> torch.Tensor | None:
        """Its gradient, for those who may read it; None where there is none to come."""
        try:
            found: torch.Tensor | None = Kept.grad.__get__(self)
        except UserError:
            _check(self, "grad")
            raise
        if found is not None or (self.requires_grad and place_of(self) is None):  # type: ignore[attr-defined, arg-type]
            _check(self, "grad")
        return found

    @grad.setter
    def grad(self, value: torch.Tensor | None) -> None:
        if value is not None:
            _check(self, "assigning to grad")
        Kept.grad.__set__(self, value)  # type: ignore[attr-defined]

    def __repr__(self, *args: Any, **kwargs: Any) -> str:
        return f"{type(self).__name__}({list(self.shape)}, of which this rank has a share)"  # type: ignore[attr-defined]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in DESCRIBES and func not in _OWN_WAYS:
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, Watched):
                    _check(leaf, getattr(getattr(func, "__self__", func), "__name__", func.__name__))
            if issubclass(cls, Fetched):
                return Fetched.__torch_function__.__func__(cls, func, types, args, kwargs)  # type: ignore[attr-defined]
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)


def _check(param: Any, what: str) -> None:
    if (refusal := vars(param).get(REFUSAL)) is not None:
        refusal.check(param, what)


@functools.cache
def _classes(original: type, watched: bool) -> tuple[type, type]:
    def derived(mixin: type) -> type:
        def fill(body: dict[str, Any]) -> None:
            body.update(__module__=original.__module__, __qualname__=original.__qualname__, distui_original=original)

        bases = (Watched, mixin, original) if watched else (mixin, original)
        return types.new_class(original.__name__, bases, {}, fill)

    return derived(Kept), derived(Fetched)


@contextlib.contextmanager
def watching(params: Iterable[nn.Parameter], refusal: Refusal) -> Iterator[None]:
    """Have nobody read `params` from here on but where `refusal` is lifted, as it is inside, where units are made."""
    params = list(params)
    for param in params:
        vars(param)[REFUSAL] = refusal
    with refusal.lifted():
        yield
    for param in params:
        if place_of(param) is None:
            param.__class__ = _classes(original_class(param), True)[0]


def unwatch(params: Iterable[nn.Parameter]) -> None:
    """Let everybody read them again, and give those that no unit holds their own class back."""
    for param in params:
        if vars(param).pop(REFUSAL, None) is not None and place_of(param) is None:
            let_go([param])


def original_class(param: torch.Tensor) -> type:
    """Return the class that a parameter had before it was prepared."""
    return param.distui_original if isinstance(param, Kept) else type(param)


def guard(params: Iterable[nn.Parameter], unit: Holder) -> list[tuple[type, type]]:
    """Make `unit` the holder of `params`; returns for each its class while it is whole, and while it is not."""
    classes = []
    reference = weakref.ref(unit)
    for index, param in enumerate(params):
        if isinstance(param, Watched):  # until now in no unit
            param.__class__ = original_class(param)
        _places[id(param)] = (reference, index)
        classes.append(_classes(original_class(param), REFUSAL in vars(param)))
    weakref.finalize(unit, _forget, [id(param) for param in params])
    return classes


def let_go(params: Iterable[nn.Parameter]) -> None:
    """Give parameters their own class back."""
    for param in params:
        _places.pop(id(param), None)
        if isinstance(param, Kept):
            param.__class__ = param.distui_original


def _forget(identities: list[int]) -> None:
    for identity in identities:
        found = _places.get(identity)
        if found is not None and found[0]() is None:
            del _places[identity]
