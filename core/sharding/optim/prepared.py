"""What `engine.prepare(optimizer)` returns on every backend: the user's optimizer and the engine's seams in it."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.optim import optimizer as optimizer_module

from distui.core.errors import UserError


class _hooks:
    """Hooks that torch calls around the step of every optimizer; a part of a prepared one's step is none."""

    pre: dict[int, Callable[..., Any]] = optimizer_module._global_optimizer_pre_hooks
    post: dict[int, Callable[..., Any]] = optimizer_module._global_optimizer_post_hooks

    @classmethod
    @contextlib.contextmanager
    def of_all_held(cls) -> Iterator[None]:
        """Have none of them called inside."""
        kept = [(hooks, dict(hooks)) for hooks in (cls.pre, cls.post)]
        for hooks, _ in kept:
            hooks.clear()
        try:
            yield
        finally:
            for hooks, before in kept:
                hooks.update(before)


class PreparedOptimizer(torch.optim.Optimizer):
    """Steps what its backend trains, by the user's own optimizer `inner`; the engine decides when.

    A backend implements `finish_gradients`, `discard_gradients`, `apply`, `grad_norm`, `scale_gradients` and
    `clamp_gradients`; the rest is torch's interface, and is the same everywhere.
    """

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        # Not Optimizer.__init__: parameters, groups and states are the inner optimizer's.
        self.inner = inner
        self.step_was_skipped = False
        self.grad_factor = 1.0
        """Multiplied into the gradients at the next step: clipping and loss scaling, each without a pass of its own."""
        self.step_allowed: Callable[[], bool] = lambda: True
        """False while gradients accumulate: `step` then does nothing."""
        self.zeroing_allowed: Callable[[], bool] = lambda: True
        """The same of `zero_grad`."""
        self.before_step: Callable[[Any], None] = lambda _: None
        self.after_step: Callable[[Any], None] = lambda _: None
        self.skip_next = False
        """Set before a step that must not happen (fp16 overflow, on all ranks alike)."""
        self.loss_scale = 1.0
        """The loss scale that `grad_factor` takes out already."""
        self.siblings: list[PreparedOptimizer] = [self]
        """The optimizers of the same model, with this one: a step is over when all of them have stepped."""
        self.params_of_groups = [len(group["params"]) for group in inner.param_groups]
        """How many parameters the script gave each group, for whoever loads a checkpoint of it."""
        # A step of the inner one may be a part of a step, or none: what is registered is called here.
        for kind in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
            setattr(self, kind, getattr(inner, kind))
            setattr(inner, kind, OrderedDict())
        for kind in ("state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post"):
            setattr(self, f"_optimizer_{kind}_hooks", getattr(inner, f"_optimizer_{kind}_hooks"))

    # ---- what a backend does -------------------------------------------------------------------------------------

    @abstractmethod
    def finish_gradients(self) -> None:
        """Return when all gradients of the step are there. Collective."""

    @abstractmethod
    def discard_gradients(self, set_to_none: bool) -> None:
        """Forget the gradients."""

    @abstractmethod
    def apply(self, factor: float) -> None:
        """Step with the gradients times `factor`. Collective."""

    def skip(self) -> None:
        """Leave out a step; nothing to do where `zero_grad` is enough."""

    @abstractmethod
    def grad_norm(self, place: Any, norm_type: float) -> torch.Tensor:
        """Return the norm of the gradients at `place` (None: all) over all ranks, times `grad_factor`. Collective."""

    @abstractmethod
    def scale_gradients(self, factor: float, place: Any) -> None:
        """Multiply the gradients at `place` (None: all, and then at the next step, in one pass with it)."""

    @abstractmethod
    def clamp_gradients(self, limit: float, place: Any = None) -> None:
        """Clamp every gradient element at `place` (None: all) to [-limit, limit]."""

    @abstractmethod
    def place_of(self, params: Iterable[torch.Tensor]) -> Any:
        """Return what `grad_norm` and `scale_gradients` take for `params`; None if all that are trainable."""

    # ---- the torch interface -------------------------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's groups; `params` are the model's own parameters."""
        return self.inner.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.inner.param_groups = groups

    @property
    def state(self) -> Any:
        """The inner optimizer's states."""
        return self.inner.state

    @state.setter
    def state(self, state: Any) -> None:
        self.inner.state = state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The inner optimizer's default hyper-parameters."""
        return self.inner.defaults

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's part of the states, for the same number of ranks; `save_state` writes what reshards."""
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` of this rank returned."""
        self.inner.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: what is sharded and reduced is laid out when the model is prepared."""
        raise UserError(
            "a parameter group cannot be added after prepare",
            "the buffers of gradients and shards are laid out already",
            "add every group before engine.prepare(model, optimizer)",
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients; nothing while they accumulate."""
        if self.zeroing_allowed():
            self.discard_gradients(set_to_none)
            self.grad_factor = self.loss_scale = 1.0

    def step(self, closure: Any = None) -> Any:
        """Step on all ranks alike, after a `closure` has run the backward; returns its loss. Collective: all ranks.

        Nothing is stepped while gradients accumulate. Sets `step_was_skipped` where an overflow forbade the step.
        """
        loss, arguments = None, (self,) if closure is None else (self, closure)
        if closure is not None:  # what is called before a step then finds the gradients of the one before, as in torch
            self._call(_hooks.pre, self._optimizer_step_pre_hooks, arguments)
            with torch.enable_grad():
                loss = closure()
        if not self.step_allowed():
            return loss
        self.finish_gradients()
        self.before_step(self)
        if closure is None and not self.skip_next:
            self._call(_hooks.pre, self._optimizer_step_pre_hooks, arguments)
        factor, self.grad_factor, self.loss_scale = self.grad_factor, 1.0, 1.0
        self.step_was_skipped, self.skip_next = self.skip_next, False
        if self.step_was_skipped:
            self.skip()
        else:
            with _hooks.of_all_held():
                self.apply(factor)
            self._call(_hooks.post, self._optimizer_step_post_hooks, arguments)
        self.after_step(self)
        return loss

    step.hooked = True  # type: ignore[attr-defined]  # it calls the hooks; torch wraps a class of which one is unpickled

    def _call(self, of_all: Any, own: Mapping[int, Callable[..., Any]], arguments: tuple[Any, ...]) -> None:
        for hook in [*of_all.values(), *own.values()]:
            if hook(self, arguments, {}) is not None:
                raise UserError(
                    "a step hook that replaces the arguments of step",
                    f"{getattr(hook, '__qualname__', hook)} returned something",
                    "return None, and change gradients by engine.gradients(model) or the clipping functions",
                )

    def train(self) -> None:
        """Put the inner optimizer into training mode, where it has one (schedule-free optimizers)."""
        if callable(getattr(self.inner, "train", None)):
            self.inner.train()  # type: ignore[attr-defined]

    def eval(self) -> None:
        """Put the inner optimizer into evaluation mode, where it has one."""
        if callable(getattr(self.inner, "eval", None)):
            self.inner.eval()  # type: ignore[attr-defined]


def optimizers_of_parameters(objects: Iterable[Any]) -> dict[int, int]:
    """Return which of the optimizers among `objects` steps a parameter, by its identity."""
    optimizers = [value for value in objects if isinstance(value, torch.optim.Optimizer)]
    return {
        id(param): index
        for index, optimizer in enumerate(optimizers)
        for group in optimizer.param_groups
        for param in group["params"]
    }


def unscale(optimizer: PreparedOptimizer, loss_scale: float) -> None:
    """Take the loss scale out of the gradients at the next step, once."""
    # Another model's step may have changed the scale since this was called last.
    optimizer.grad_factor *= optimizer.loss_scale / loss_scale
    optimizer.loss_scale = loss_scale


def prefer_fused(group: dict[str, Any]) -> None:
    """Let torch's optimizers take their fused kernels, which read and write each state once, where nobody chose."""
    if group.get("fused", False) is None and group.get("foreach") is None:
        group["fused"] = not (group.get("differentiable") or group.get("capturable"))


@contextlib.contextmanager
def unfused_momentum(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Keep torch's fused SGD from momenta of which some are not there yet: it takes all of them or none.

    That is so in the step in which parameters get their first gradient after others had theirs.
    """
    mixed = []
    for group in optimizer.param_groups if isinstance(optimizer, torch.optim.SGD) else ():
        if group["fused"] and group["momentum"]:
            stepped = [param for param in group["params"] if param.grad is not None]
            begun = [optimizer.state[param].get("momentum_buffer") is not None for param in stepped]
            if any(begun) and not all(begun):
                mixed.append(group)
    for group in mixed:
        group["fused"] = False
    yield
    for group in mixed:
        group["fused"] = True
