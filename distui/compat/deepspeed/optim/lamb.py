"""LAMB: Adam's direction, scaled for each parameter by the norm of its weights over that of its step.

Source: You et al., "Large Batch Optimization for Deep Learning" (arXiv 1904.00962), with the limits and defaults of
DeepSpeed 0.19's FusedLamb.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from distui.compat.deepspeed.optim.closures import closure_loss
from distui.compat.not_offered import NotOffered


class FusedLamb(torch.optim.Optimizer):
    """LAMB in plain torch; each parameter is stepped by itself, so under ZeRO each has one rank that steps it whole."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        eps_inside_sqrt: bool = False,
        weight_decay: float = 0.0,
        max_grad_norm: float = 0.0,
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
        amsgrad: bool = False,
    ) -> None:
        if amsgrad:
            raise RuntimeError("FusedLamb does not support the AMSGrad variant.")
        if max_grad_norm:
            raise NotOffered(
                f"FusedLamb(max_grad_norm={max_grad_norm}) is not offered by distui",
                "it would clip by a norm that its caller hands to step",
                f"write gradient_clipping: {max_grad_norm} in the JSON",
            )
        super().__init__(
            params,
            {
                "lr": lr,
                "bias_correction": bias_correction,
                "betas": betas,
                "eps": eps,
                "eps_inside_sqrt": eps_inside_sqrt,
                "weight_decay": weight_decay,
                "max_coeff": max_coeff,
                "min_coeff": min_coeff,
            },
        )
        self.lamb_coeffs: list[torch.Tensor] = []

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every parameter that has a gradient."""
        loss = closure_loss(closure)
        self.lamb_coeffs = []
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self.lamb_coeffs.append(self._step_one(param, param.grad, group))
        return loss

    def _step_one(self, param: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        state = self.state[param]
        if "step" not in state:
            state.update(step=torch.zeros(()), exp_avg=torch.zeros_like(param), exp_avg_sq=torch.zeros_like(param))
        state["step"] += 1
        beta1, beta2 = group["betas"]
        state["exp_avg"].lerp_(grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        eps, second = group["eps"], state["exp_avg_sq"]
        bound = (second + eps).sqrt_() if group["eps_inside_sqrt"] else second.sqrt().add_(eps)
        update = (state["exp_avg"] / bound).add_(param, alpha=group["weight_decay"])
        weights, length = param.norm(), update.norm()
        ratio = (weights / length).clamp(group["min_coeff"], group["max_coeff"])
        coefficient = torch.where((weights != 0) & (length != 0), ratio, torch.ones_like(ratio))
        rate = group["lr"]
        if group["bias_correction"]:
            step = float(state["step"])
            rate *= math.sqrt(1 - beta2**step) / (1 - beta1**step)
        param.sub_(update.mul_(coefficient * rate))
        return coefficient

    def get_lamb_coeffs(self) -> list[float]:
        """Return what the last step multiplied the rate by, for each parameter that this rank stepped."""
        return [float(coefficient) for coefficient in self.lamb_coeffs]
