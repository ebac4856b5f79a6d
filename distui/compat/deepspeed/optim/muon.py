"""DeepSpeed's Muon from the JSON: matrices are orthogonalised, everything else is stepped by Adam, in one optimizer.

Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); the Gram form of its iteration
is Dao's (2026), both with DeepSpeed 0.19.8's constants.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from distui.compat.deepspeed.lr_schedules import check_params
from distui.compat.deepspeed.optim.closures import closure_loss
from distui.compat.not_offered import NotOffered
from distui.core.errors import ConfigError, Problem, UserError

_A, _B, _C = 3.4445, -4.7750, 2.0315
_METHODS = ("gram", "standard")
_STEPS = 5
_MUON_KEYS = ("lr", "momentum", "weight_decay", "ns_method")
_ADAM_KEYS = ("lr", "betas", "eps", "weight_decay")


MUON_OPTIMIZER = "muon"
QUERY, KV, MLA_Q, MLA_KV, NOT_HEAD_BLOCKED = "query", "kv", "mla_q", "mla_kv", "not-head-blocked"
"""DeepSpeed's names of how attention's matrices are blocked by heads."""


def set_use_muon(model: nn.Module) -> None:
    """Mark each parameter with `use_muon`: a matrix or more, whose name speaks of no embedding and no head."""
    for name, param in model.named_parameters():
        apart = any(word in name.lower() for word in ("embed", "lm_head"))
        param.use_muon = param.dim() >= 2 and not apart  # type: ignore[attr-defined]


def set_optimizer_flags(config_class: Any, model: nn.Module) -> None:
    """Mark the parameters of `model` where the configuration's optimizer is Muon, as `initialize` does."""
    section = getattr(config_class, "raw", {}).get("optimizer") or {}
    if str(getattr(config_class, "optimizer_name", None) or section.get("type", "")).lower() == MUON_OPTIMIZER:
        set_use_muon(model)


def resolve_per_head_muon_after_sharding(model: nn.Module) -> None:
    """Nothing: no matrix is divided by columns, and per-head Muon is refused with its key."""


def orthogonalized(update: torch.Tensor, method: str) -> torch.Tensor:
    """Return a near-orthogonal matrix beside `update`, by five Newton-Schulz steps; batches of matrices one by one.

    `gram` iterates on the small square matrix X X^T and runs in fp16 on a GPU, `standard` on X in bf16.
    """
    tall = update.size(-2) > update.size(-1)
    x = update.mT if tall else update
    if method == "standard":
        x = x.to(torch.bfloat16)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    if method == "gram" and update.is_cuda:
        x = x.to(torch.float16)
    if method == "standard" or x.size(-1) == x.size(-2):
        for _ in range(_STEPS):
            gram = x @ x.mT
            x = _A * x + (_B * gram + _C * gram @ gram) @ x
    else:
        x = _gram_steps(x)
    return (x.mT if tall else x).to(update.dtype)


def _gram_steps(x: torch.Tensor) -> torch.Tensor:
    eye = torch.eye(x.size(-2), dtype=x.dtype, device=x.device)
    gram, turned = x @ x.mT, None
    for step in range(_STEPS):
        if step == 2:  # half precision drifts: begin again with what two steps gave
            assert turned is not None
            x = turned @ x
            gram, turned = x @ x.mT, None
        part = _B * gram + _C * gram @ gram
        turned = part + _A * eye if turned is None else _A * turned + part @ turned
        if step not in (1, _STEPS - 1):
            half = _A * gram + part @ gram
            gram = _A * half + part @ half
    assert turned is not None
    return turned @ x


class MuonWithAuxAdam(torch.optim.Optimizer):
    """Muon for groups with `use_muon`, Adam for the others.

    Each matrix is stepped by itself and Adam's groups element by element, so the engine gives whole matrices to one
    rank each, and flat shards of everything else to all.
    """

    def __init__(self, params: Iterable[dict[str, Any]], adam_w_mode: bool = True) -> None:
        groups = []
        for group in params:
            muon = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.0, "ns_method": "gram"}
            adam = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-10, "weight_decay": 0.0}
            groups.append({**(muon if group["use_muon"] else adam), "adam_w_mode": adam_w_mode, **group})
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every parameter that has a gradient."""
        loss = closure_loss(closure)
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if group["use_muon"]:
                for param in params:
                    self._step_matrix(param, group)
            elif params:
                self._step_others(params, group)
        return loss

    def _step_matrix(self, param: torch.Tensor, group: Mapping[str, Any]) -> None:
        assert param.grad is not None
        if param.dim() < 2:
            raise ValueError(f"Muon steps matrices, not a tensor of shape {tuple(param.shape)}")
        state = self.state[param]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(param)
        momentum: torch.Tensor = state["momentum_buffer"]
        momentum.lerp_(param.grad, 1 - group["momentum"])
        update = param.grad.lerp(momentum, group["momentum"])
        if param.dim() == 4:
            update = update.view(len(update), -1)
        update = orthogonalized(update, group["ns_method"]).reshape(param.shape)
        rows, columns = param.shape[-2:]
        param.mul_(1 - group["lr"] * group["weight_decay"])
        param.add_(update, alpha=-group["lr"] * math.sqrt(max(1.0, rows / columns)))

    def _step_others(self, params: list[torch.Tensor], group: Mapping[str, Any]) -> None:
        for param in params:
            if "step" not in self.state[param]:
                self.state[param].update(
                    step=torch.zeros(()), exp_avg=torch.zeros_like(param), exp_avg_sq=torch.zeros_like(param)
                )
        grads = [param.grad for param in params if param.grad is not None]
        states = [self.state[param] for param in params]
        first, second = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
        beta1, beta2 = group["betas"]
        if group["adam_w_mode"]:
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        elif group["weight_decay"]:
            grads = list(torch._foreach_add(grads, params, alpha=group["weight_decay"]))
        torch._foreach_lerp_(first, grads, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
        for param, state in zip(params, states, strict=True):
            state["step"] += 1
            step = float(state["step"])
            bound = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
            param.addcdiv_(state["exp_avg"], bound, value=-group["lr"] / (1 - beta1**step))


def _accepted(
    lr: float = 0.02,
    muon_lr: float = 0.02,
    adam_lr: float = 3e-4,
    momentum: float = 0.95,
    weight_decay: float = 0.0,
    ns_method: str = "gram",
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-10,
    adam_w_mode: bool = True,
    torch_adam: bool = False,
    fp32_optimizer_states: bool = True,
    per_head_muon: bool = False,
) -> None:
    """Name what the JSON may say."""


_accepted.__name__ = "Muon"


def build_muon(params: Mapping[str, Any], parameters: Iterable[Any]) -> MuonWithAuxAdam:
    """Return Muon on `parameters`, or groups of them, each divided by the mark `use_muon`; a group's own settings win.

    Raises: ConfigError for a mistyped setting; NotOffered for per-head Muon; UserError for a parameter without a mark.
    """
    check_params("optimizer", _accepted, params)
    method = params.get("ns_method", "gram")
    if method not in _METHODS:
        fix = f"write one of {', '.join(_METHODS)}"
        raise ConfigError([Problem("optimizer.params.ns_method", f"{method!r} is unknown", "how Muon iterates", fix)])
    if params.get("per_head_muon"):
        raise NotOffered(
            "Muon with per_head_muon is not offered by distui",
            "it would orthogonalise each attention head apart",
            "leave per_head_muon out: whole projections are orthogonalised",
        )
    given = list(parameters)
    loose = [item for item in given if not isinstance(item, dict)]
    groups: list[dict[str, Any]] = [item for item in given if isinstance(item, dict)]
    if loose or not groups:
        groups.append({"params": loose})
    made = []
    for group in groups:
        held = [param for param in group["params"] if param.requires_grad]
        unmarked = [param for param in held if not hasattr(param, "use_muon")]
        if unmarked:
            raise UserError(
                f"{len(unmarked)} parameters are not marked for Muon",
                "they are not in the model that deepspeed.initialize was given",
                "set param.use_muon to True or False on them",
            )
        for use_muon, keys, rate in ((True, _MUON_KEYS, "muon_lr"), (False, _ADAM_KEYS, "adam_lr")):
            half = [param for param in held if param.use_muon is use_muon]
            settings = {key: params[key] for key in keys if key in params}
            if rate in params:
                settings["lr"] = params[rate]
            settings |= {key: value for key, value in group.items() if key in keys}
            if half:
                made.append({"params": half, "use_muon": use_muon, **settings})
    return MuonWithAuxAdam(made, adam_w_mode=bool(params.get("adam_w_mode", True)))
