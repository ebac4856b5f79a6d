"""The optimizers that DeepSpeed's JSON names, and those that scripts build themselves, as torch's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch

from distui.compat.deepspeed.lr_schedules import check_params
from distui.compat.deepspeed.optim.closures import closure_loss
from distui.compat.deepspeed.optim.lamb import FusedLamb
from distui.compat.deepspeed.optim.muon import build_muon
from distui.compat.deepspeed.optim.zero_one_adam import ZeroOneAdam
from distui.compat.not_offered import NotOffered
from distui.core.config.settings import nearest
from distui.core.errors import ConfigError, Problem

_REFUSED = {
    "onebitlamb": "use Lamb, with compression.gradients = int8 in distui's settings where the network is slow",
    "muadam": "pass mup's optimizer to deepspeed.initialize(optimizer=...)",
    "muadamw": "pass mup's optimizer to deepspeed.initialize(optimizer=...)",
    "musgd": "pass mup's optimizer to deepspeed.initialize(optimizer=...)",
}


class _Made(type):
    """The metaclass of names that build torch's own classes: what was built by one is its instance."""

    def __init__(cls, name: str, bases: tuple[type, ...], names: dict[str, Any]) -> None:
        super().__init__(name, bases, names)
        if bases:  # what it builds is torch's, without a method of the subclass
            raise NotOffered(
                f"{name}, a class of the script's that derives from {bases[0].__name__}, is not offered by distui",
                "its methods would not be called: torch's own optimizer is built",
                "derive from torch.optim.AdamW",
            )

    def __instancecheck__(cls, instance: Any) -> bool:
        made = getattr(instance, "inner", None) or instance  # what `initialize` returns stands for it
        return getattr(made, "_made_by", None) is cls


class FusedAdam(metaclass=_Made):
    """Builds torch's AdamW, or Adam, with the defaults of DeepSpeed's FusedAdam: no decay unless it is given.

    Torch's own class, so that the engine's kernels and homes, which know it, step it.
    """

    def __new__(  # type: ignore[misc]
        cls,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
    ) -> torch.optim.Adam:
        """Raises: NotOffered without the correction of the bias."""
        if not bias_correction:
            raise NotOffered(
                "FusedAdam(bias_correction=False) is not offered by distui",
                "torch's Adam corrects the bias of its moments",
                "leave bias_correction out",
            )
        kind = torch.optim.AdamW if adam_w_mode else torch.optim.Adam
        return _mark(kind(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad), cls)


class DeepSpeedCPUAdam(metaclass=_Made):
    """Builds torch's AdamW or Adam; it steps in host memory where the states' home is there (offload)."""

    def __new__(  # type: ignore[misc]
        cls,
        model_params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        adamw_mode: bool = True,
        fp32_optimizer_states: bool = True,
    ) -> torch.optim.Adam:
        """Raises: NotOffered without the correction of the bias."""
        adam = FusedAdam(model_params, lr, bias_correction, betas, eps, adamw_mode, weight_decay, amsgrad)
        return _mark(adam, cls)


class DeepSpeedCPUAdagrad(metaclass=_Made):
    """Builds torch's Adagrad with DeepSpeed's defaults."""

    def __new__(  # type: ignore[misc]
        cls,
        model_params: Any,
        lr: float = 1e-2,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        fp32_optimizer_states: bool = True,
    ) -> torch.optim.Adagrad:
        """DeepSpeed's own does nothing with `amsgrad` either."""
        return _mark(torch.optim.Adagrad(model_params, lr=lr, eps=eps, weight_decay=weight_decay), cls)


_Kind = TypeVar("_Kind", bound=torch.optim.Optimizer)


def _mark(optimizer: _Kind, maker: type) -> _Kind:
    optimizer._made_by = maker  # type: ignore[attr-defined]
    return optimizer


class FusedLion(torch.optim.Optimizer):
    """Lion: the sign of an interpolated momentum (Chen et al., arXiv 2302.06675, algorithm 2)."""

    def __init__(
        self, params: Any, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every parameter that has a gradient."""
        loss = closure_loss(closure)
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if not params:
                continue
            for param in params:
                if "exp_avg" not in self.state[param]:
                    self.state[param]["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            grads = [param.grad for param in params]
            momenta = [self.state[param]["exp_avg"] for param in params]
            beta1, beta2 = group["betas"]
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            updates = torch._foreach_mul(momenta, beta1)
            torch._foreach_add_(updates, grads, alpha=1 - beta1)
            for param, update in zip(params, updates, strict=True):
                param.add_(update.sign_(), alpha=-group["lr"])
            torch._foreach_mul_(momenta, beta2)
            torch._foreach_add_(momenta, grads, alpha=1 - beta2)
        return loss


DeepSpeedCPULion = FusedLion

_OWN: dict[str, type[torch.optim.Optimizer]] = {
    **dict.fromkeys(("lion", "fusedlion", "cpulion"), FusedLion),
    **dict.fromkeys(("lamb", "fusedlamb"), FusedLamb),
    "zerooneadam": ZeroOneAdam,
}


def build_optimizer(
    section: Mapping[str, Any], parameters: Iterable[Any], in_host: bool = False
) -> torch.optim.Optimizer | None:
    """Return the optimizer that the JSON's `optimizer` names, on `parameters`; None where there is none.

    Adam is AdamW unless `adam_w_mode` is false, and decays nothing by default, both as in DeepSpeed; with `in_host`
    (states offloaded to host memory) it counts as a `DeepSpeedCPUAdam`, else as a `FusedAdam`.

    Raises: ConfigError for an unknown name or parameter; NotOffered for one that nothing here stands for.
    """
    name = section.get("type")
    if name is None or name == "auto":
        return None
    params = {key: value for key, value in (section.get("params") or {}).items() if value != "auto"}
    if "max_grad_norm" in params:
        raise ConfigError(
            [
                Problem(
                    "optimizer.params.max_grad_norm",
                    "is no parameter of an optimizer",
                    "DeepSpeed clips by its own key",
                    f"write gradient_clipping: {params['max_grad_norm']}",
                )
            ]
        )
    lowered = str(name).lower()
    if lowered in _REFUSED:
        raise NotOffered(
            f"DeepSpeed's optimizer {name} is not offered by distui",
            "no torch.optim class stands for it",
            _REFUSED[lowered],
        )
    if lowered == "muon":
        return build_muon(params, parameters)
    kind: Any
    if lowered in ("adam", "adamw", "fusedadam", "cpuadam", "onebitadam"):
        own = bool(params.pop("torch_adam", False))
        for unused in ("fp32_optimizer_states", "fused", "foreach"):
            params.pop(unused, None)
        if lowered.startswith("onebit"):
            for wire in ("freeze_step", "cuda_aware", "comm_backend_name", "pipeline_enable"):
                params.pop(wire, None)
        decoupled = bool(params.pop("adam_w_mode", True)) or lowered == "adamw"
        kind = FusedAdam
        if own:
            kind = torch.optim.AdamW if decoupled else torch.optim.Adam
        if not own:
            params["adam_w_mode"] = decoupled
    elif lowered in _OWN:
        kind = _OWN[lowered]
    else:
        names = {kind.lower(): kind for kind in dir(torch.optim) if isinstance(getattr(torch.optim, kind), type)}
        if lowered not in names or not issubclass(getattr(torch.optim, names[lowered]), torch.optim.Optimizer):
            near = nearest(str(name), ["Adam", "AdamW", "Lion", "Lamb", "Adagrad", "SGD", "RMSprop", *names.values()])
            known = "Adam, AdamW, Lion, Lamb, ZeroOneAdam, Muon, and every class of torch.optim"
            fix = f"write {near}" if near else f"use {known}"
            raise ConfigError([Problem("optimizer.type", f"{name!r} is no optimizer", f"known: {known}", fix)])
        kind = getattr(torch.optim, names[lowered])
    if "betas" in params:
        params["betas"] = tuple(params["betas"])
    check_params("optimizer", kind, params)
    optimizer: torch.optim.Optimizer = kind(parameters, **params)
    return _mark(optimizer, DeepSpeedCPUAdam) if in_host and kind is FusedAdam else optimizer
