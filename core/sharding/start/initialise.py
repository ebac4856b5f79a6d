"""Numbers for what is on the meta device: each module's own initialisation, the same on any number of ranks."""

from __future__ import annotations

import hashlib
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from distui.core.errors import UserError
from distui.core.sharding.units.guarded import DESCRIBES, Kept

Init = Callable[[nn.Module], Any]

_FIX = "give engine.prepare_model(model, init=fn), where fn(module) fills it, or weights=FOLDER"


def make_real(tensor: torch.Tensor, data: torch.Tensor) -> None:
    """Let `tensor`, which is on meta, be `data`, and stay the same object with its class, attributes and hooks.

    Raises: UserError where something else than Python refers to it.
    """
    new: Any = nn.Parameter(data, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data.detach()
    hooks: Any = tensor._backward_hooks
    after: Any = tensor._post_accumulate_grad_hooks
    new.__class__ = type(tensor)
    new.__dict__.update(tensor.__dict__)
    try:
        torch.utils.swap_tensors(tensor, new)
    except RuntimeError as error:
        raise UserError(
            f"a tensor {tuple(tensor.shape)} on the meta device cannot be given memory",
            str(error).splitlines()[0],
            "prepare the model before anything is computed with it, and keep no weak references to its parameters",
        ) from error
    # The two are kept beside the tensor, and go with its old self.
    tensor._backward_hooks = hooks
    tensor._post_accumulate_grad_hooks = after


class Initialiser:
    """Initialises a model's modules as they are needed.

    A module is filled by its `reset_parameters`, then by the `_init_weights` of the model around it (transformers),
    then by the script's `init`: as where the script builds it and calls `model.apply`. Each has a seed of its own, made
    of `seed` and the module's name.
    """

    def __init__(self, model: nn.Module, device: torch.device, seed: int, init: Init | None) -> None:
        self._device, self._seed, self._init = device, seed, init
        self._named = dict(model.named_modules())
        self._holders: defaultdict[int, list[str]] = defaultdict(list)
        self._around: set[str] = set()
        """Modules that have been called because something inside them was initialised."""
        # Inner modules first, as constructors do it; of several that share a parameter the first one's numbers stay.
        for name, module in reversed(list(self._named.items())):
            for _, tensor in _own(module):
                self._holders[id(tensor)].append(name)

    def bring(self, tensors: Iterable[torch.Tensor]) -> None:
        """Give numbers to what is on meta of these parameters and buffers, and to what else their modules hold.

        Raises: UserError that names what nothing initialises.
        """
        wanted = {name for tensor in tensors for name in self._holders[id(tensor)]}
        order = [name for name in reversed(self._named) if name in wanted]
        order = [name for name in order if any(tensor.is_meta for _, tensor in _own(self._named[name]))]
        if not order:
            return
        made: dict[int, tuple[str, torch.Tensor, int]] = {}
        real: list[tuple[torch.Tensor, torch.Tensor]] = []
        prepared: list[tuple[nn.Module, str, Any]] = []
        for name in order:
            for own_name, tensor in _own(self._named[name]):
                if tensor.is_meta:
                    blank = torch.empty_like(tensor, device=self._device, requires_grad=False)
                    make_real(tensor, blank.fill_(torch.nan) if tensor.is_floating_point() else blank.zero_())
                    made[id(tensor)] = (f"{name}.{own_name}" if name else own_name, tensor, tensor._version)
                elif isinstance(tensor, Kept):  # a tied one that a unit has already: a blank one stands for it
                    prepared.append((self._named[name], own_name, tensor))
                    blank = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
                    self._named[name]._parameters[own_name] = nn.Parameter(blank, tensor.requires_grad)
                elif id(tensor) not in made:
                    real.append((tensor, tensor.detach().clone()))
        called = self._with_outer(order)
        try:
            for number, fill in enumerate((_reset, self._init_by_model, self._init_by_script)):
                for name in called:
                    with torch.no_grad(), self._seeded(f"{self._seed}:{number}:{name}"), _OwnOnly(name):
                        fill(name, self._named[name])
        finally:
            for module, own_name, param in prepared:
                module._parameters[own_name] = param
        with torch.no_grad():
            for tensor, before in real:
                tensor.copy_(before)
        for full_name, tensor, version in made.values():
            left = bool(tensor.isnan().any()) if tensor.is_floating_point() else tensor._version == version
            if left and tensor.numel():
                self._refuse(full_name)

    def _with_outer(self, names: list[str]) -> list[str]:
        """Return the modules `names` and, once, those around them: a block may set what its parts hold."""
        outer = {".".join(parts[:end]) for name in names for parts in [name.split(".")] for end in range(len(parts))}
        called = (outer - self._around) | set(names)
        self._around |= called
        return [name for name in reversed(self._named) if name in called]

    def _refuse(self, full_name: str) -> None:
        module = self._named[full_name.rpartition(".")[0]]
        kind = type(module).__name__
        has_reset = _reset_of(module) is not None
        why = f"{kind}.{'reset_parameters leaves it as it is' if has_reset else 'reset_parameters does not exist'}"
        fix = _FIX
        if full_name.rpartition(".")[2] in module._buffers:
            fix = f"build the model in `with distui.init_empty_weights():`, which makes buffers as ever, or {_FIX}"
        raise UserError(f"{full_name} is on the meta device, and nothing gives it numbers", why, fix)

    @contextmanager
    def _seeded(self, text: str) -> Iterator[None]:
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
        beside = self._device.type != "cpu"
        kind = self._device.type if beside else "cuda"
        with torch.random.fork_rng([self._device] if beside else [], device_type=kind):
            torch.default_generator.manual_seed(seed)
            if beside:
                torch.get_device_module(self._device).manual_seed(seed)
            yield

    def _init_by_model(self, name: str, module: nn.Module) -> None:
        """Call the `_init_weights` of the innermost module around `module` that has one."""
        while True:
            around = self._named.get(name)
            init = getattr(around, "_init_weights", None)
            if init is not None:
                break
            if not name:
                return
            name = name.rpartition(".")[0]
        try:
            inspect.signature(init).bind(module)
        except TypeError:
            if self._init is not None:
                return  # which says it all
            raise UserError(
                f"the modules of {type(around).__name__} cannot be initialised one by one",
                "its _init_weights does not take a module",
                _FIX,
            ) from None
        for tensor in dict(_own(module)).values():
            tensor.__dict__.pop("_is_hf_initialized", None)  # transformers' note that numbers are there: they were not
        init(module)

    def _init_by_script(self, name: str, module: nn.Module) -> None:
        if self._init is not None:
            self._init(module)


def _own(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    held: list[tuple[str, torch.Tensor | None]] = [*module._parameters.items(), *module._buffers.items()]
    return [(name, tensor) for name, tensor in held if tensor is not None]


def _reset_of(module: nn.Module) -> Callable[[], Any] | None:
    return getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)


def _reset(name: str, module: nn.Module) -> None:
    reset = _reset_of(module)
    if reset is not None:
        reset()


class _OwnOnly(TorchFunctionMode):
    """Refuses an initialisation that touches parameters which are not there, or not there any more."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in DESCRIBES:
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, torch.Tensor) and (isinstance(leaf, Kept) or leaf.is_meta):
                    raise UserError(
                        f"the initialisation of {self._name or 'the model'} touches parameters of other modules",
                        f"it calls {getattr(func, '__name__', func)} on a tensor {tuple(leaf.shape)} that is not here: "
                        "units are initialised one after the other",
                        "let each module initialise its own parameters, or give weights=FOLDER",
                    )
        return func(*args, **(kwargs or {}))
