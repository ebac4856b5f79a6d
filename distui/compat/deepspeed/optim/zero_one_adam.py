"""0/1 Adam: its variance is updated ever more rarely, then frozen; later the momentum is renewed every few steps.

Source: Lu et al., "Maximizing Communication Efficiency for Large-scale Training via 0/1 Adam" (arXiv 2202.06009), as
DeepSpeed 0.19 has it: the first step moves nothing, and no bias is corrected. Ranks exchange whole gradients each step,
in place of one bit a number and of steps of their own. So N ranks give what one gives with the global batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from distui.compat.deepspeed.optim.closures import closure_loss


class _Policy(NamedTuple):
    """What each step does: known from its number alone, so that a resumed run needs no counters."""

    var_freeze_step: int
    var_update_scaler: int
    local_step_scaler: int
    local_step_clipper: int

    def at(self, step: int) -> tuple[bool, bool, bool]:
        """Return whether step number `step`, from 2 on, is frozen, updates the variance, and renews the momentum."""
        last_free = max(2, self.var_freeze_step + 1)
        if step > last_free:
            doublings = (step - last_free - 1) // self.local_step_scaler
            return True, False, step % min(self.local_step_clipper, 2**doublings) == 0
        interval, end = 1, 1 + self.var_update_scaler  # the last step that is updated at this interval
        while step > end:
            interval *= 2
            end = interval * (end // interval + self.var_update_scaler)
        return False, step % interval == 0, False


class ZeroOneAdam(torch.optim.Optimizer):
    """0/1 Adam, element by element, with an exact exchange of gradients."""

    def __init__(
        self,
        params: Any,
        deepspeed: Any = None,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        eps_inside_sqrt: bool = False,
        weight_decay: float = 0.0,
        max_grad_norm: float = 0.0,
        var_freeze_step: int = 100000,
        var_update_scaler: int = 16,
        local_step_scaler: int = 32678,
        local_step_clipper: int = 16,
        amsgrad: bool = False,
        cuda_aware: bool = False,
        comm_backend_name: str = "nccl",
    ) -> None:
        """DeepSpeed's own does nothing with `bias_correction`, `eps_inside_sqrt` and `max_grad_norm` either."""
        if amsgrad:
            raise RuntimeError("0/1 Adam does not support the AMSGrad variant.")
        policy = _Policy(var_freeze_step, var_update_scaler, local_step_scaler, local_step_clipper)
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, **policy._asdict()}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every parameter that has a gradient."""
        loss = closure_loss(closure)
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._step_one(param, param.grad, group)
        return loss

    def _step_one(self, param: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[param]
        if "step" not in state:
            state.update(step=torch.zeros(()), lrs=torch.zeros(()))
            for name in ("exp_avg", "exp_avg_sq", "momentum_accumulator"):
                state[name] = torch.zeros_like(param)
        state["step"] += 1
        if state["step"] == 1:
            return
        policy = _Policy(*(group[name] for name in _Policy._fields))
        frozen, updates_variance, renews = policy.at(int(state["step"]))
        momentum, variance, sum_of_steps = state["exp_avg"], state["exp_avg_sq"], state["momentum_accumulator"]
        beta1, beta2 = group["betas"]
        if updates_variance:
            variance.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        momentum.mul_(beta1).add_(grad, alpha=1 - beta1)
        bound = variance.sqrt().add_(group["eps"])
        update = (momentum / bound).add_(param, alpha=group["weight_decay"]).mul_(-group["lr"])
        param.add_(update)
        if not frozen:
            return
        state["lrs"] += group["lr"]
        sum_of_steps.add_(update)
        if renews:
            momentum.copy_(sum_of_steps).mul_(bound).mul_(-1 / float(state["lrs"]))
            sum_of_steps.zero_()
            state["lrs"].zero_()
