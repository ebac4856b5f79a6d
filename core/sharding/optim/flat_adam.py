"""Adam and AdamW on flat shards by one kernel a run, with moments in fp32 or in 8 bits.

Takes the place of the inner optimizer's own `step`: hyper-parameters, groups, step hooks and schedulers stay the
optimizer's. The kernel reads the gradient in its own format, applies the factor of clipping and loss scale, steps the
fp32 master and writes the 16-bit weights: no converted gradient, no pass to scale it, no pass to publish.

In 8 bits a run's moments are held as codes with a scale a block. Blocks count from the run's start, which moves with
the number of ranks, so a state that leaves (a checkpoint, `state_dict`) is fp32, and one that comes in is quantised.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from distui.core.errors import UserError
from distui.kernels import fused_adamw as fused
from distui.kernels.adamw8bit import Moments, adamw8bit, dequantize_moments, quantize_moments, zero_moments

if TYPE_CHECKING:
    from distui.core.sharding.optim.runs import FlatRun

_CODES = ("exp_avg_codes", "exp_avg_scales", "exp_avg_sq_codes", "exp_avg_sq_scales")
_OTHER_OPTIONS = ("amsgrad", "maximize", "differentiable", "capturable")


def why_not_flat(inner: torch.optim.Optimizer) -> str:
    """Return why the kernels cannot step `inner`; empty where they can."""
    if type(inner) not in (torch.optim.Adam, torch.optim.AdamW):
        return f"it is {type(inner).__name__}, and the kernels step torch.optim.Adam and torch.optim.AdamW"
    for group in inner.param_groups:
        for option in _OTHER_OPTIONS:
            if group.get(option):
                return f"{option}=True is not in the kernels"
        coupled = type(inner) is torch.optim.Adam and not group.get("decoupled_weight_decay")
        if coupled and group["weight_decay"]:
            return f"Adam with weight_decay={group['weight_decay']} adds it to the gradient; AdamW decays the weights"
    return ""


class FlatAdam:
    """Steps the runs of one Adam or AdamW."""

    def __init__(self, inner: torch.optim.Optimizer, runs: list[list[FlatRun]], bits: int) -> None:
        self._inner, self._runs, self._bits = inner, runs, bits
        # The optimizer's name in a profile stays, and what was registered for steps of all optimizers.
        self._hooked_step = torch.optim.Optimizer.profile_hook_step(self._step)
        self._factor = 1.0

    @staticmethod
    def serves(inner: torch.optim.Optimizer, runs: list[list[FlatRun]]) -> bool:
        """Return whether the fp32 kernel should step: on a GPU, where the script did not choose another way."""
        every = [run.param for group_runs in runs for run in group_runs]
        return (
            fused.triton is not None
            and bool(every)
            and all(param.is_cuda and param.dtype == torch.float32 for param in every)
            and all(group.get("fused") and not torch.is_tensor(group["lr"]) for group in inner.param_groups)
            and not why_not_flat(inner)
        )

    @classmethod
    def of(cls, inner: torch.optim.Optimizer, runs: list[list[FlatRun]], state_bits: int) -> FlatAdam | None:
        """Return what steps `runs` in the place of `inner`; None where it steps itself.

        Raises: UserError where states in 8 bits are asked for that cannot be.
        """
        if state_bits == 8:
            if reason := why_not_flat(inner):
                raise UserError(
                    f"optimizer.state_bits=8 does not work with {type(inner).__name__} as it is set",
                    reason,
                    "set optimizer.state_bits to 32, or use torch.optim.AdamW without these options",
                )
            wide = next((run.param for of_group in runs for run in of_group if run.param.dtype != torch.float32), None)
            if wide is not None:
                raise UserError(
                    f"optimizer.state_bits=8 does not work with parameters in {wide.dtype}",
                    f"{wide.numel()} of them have no fp32 master",
                    "build the model in float32 or a 16-bit format, or set optimizer.state_bits to 32",
                )
            return cls(inner, runs, 8)
        return cls(inner, runs, 32) if cls.serves(inner, runs) else None

    def step(self, factor: float) -> None:
        """Step all runs with their units' gradients times `factor`."""
        self._factor = factor
        self._hooked_step(self._inner)
        # What a scheduler looks at, to warn of a schedule that runs before the optimizer.
        self._inner._opt_called = True  # type: ignore[attr-defined]

    @torch.no_grad()
    def _step(self, inner: torch.optim.Optimizer) -> None:
        for group, runs in zip(inner.param_groups, self._runs, strict=True):
            beta1, beta2 = group["betas"]
            hyper = {
                "lr": float(group["lr"]),
                "beta1": float(beta1),
                "beta2": float(beta2),
                "eps": group["eps"],
                "weight_decay": group["weight_decay"],
                "grad_factor": self._factor,
            }
            for run in runs:
                unit = run.unit
                if not run.has_gradient:
                    continue
                assert unit.grad_shard is not None
                grad = unit.grad_shard[run.start : run.end]
                out = None if unit.master is unit.shard else unit.shard[run.start : run.end]
                state = inner.state[run.param]
                step = int(state["step"]) + 1 if "step" in state else 1
                if self._bits == 8:
                    adamw8bit(run.param.detach(), grad, self._moments(run, state, step), out, step=step, **hyper)
                else:
                    for name in ("exp_avg", "exp_avg_sq"):
                        if name not in state:
                            state[name] = torch.zeros_like(run.param, requires_grad=False)
                    moments = state["exp_avg"], state["exp_avg_sq"]
                    fused.fused_adamw(run.param.detach(), grad, *moments, out, step=step, **hyper)
                # On the host, where it is read before every step without waiting for the GPU.
                state["step"] = torch.tensor(float(step))
                unit.shard_is_current = True

    @staticmethod
    def _moments(run: FlatRun, state: dict[str, Any], step: int) -> Moments:
        if "exp_avg" in state:
            moments = quantize_moments(state.pop("exp_avg").float(), state.pop("exp_avg_sq").float(), step)
            state.update(zip(_CODES, moments, strict=True))
        elif _CODES[0] not in state:
            state.update(zip(_CODES, zero_moments(run.param.numel(), run.param.device), strict=True))
        codes, scales, sq_codes, sq_scales = (state[name] for name in _CODES)
        return codes, scales, sq_codes, sq_scales

    # ---- states that leave and come in ---------------------------------------------------------------------------

    def full_state(self, run: FlatRun) -> dict[str, Any]:
        """Return the state of a run as torch's own optimizer has it: a copy in fp32 where it is in 8 bits."""
        return self.full_state_of(self._inner.state.get(run.param, {}))

    @staticmethod
    def full_state_of(state: dict[str, Any]) -> dict[str, Any]:
        """Return `state` as torch's own optimizer has it."""
        if _CODES[0] not in state:
            return state
        codes, scales, sq_codes, sq_scales = (state[name] for name in _CODES)
        exp_avg, exp_avg_sq = dequantize_moments((codes, scales, sq_codes, sq_scales))
        return {"step": state["step"], "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}

    def forget(self) -> None:
        """Drop 8-bit states, since others are about to be loaded in fp32."""
        for runs in self._runs:
            for run in runs:
                if _CODES[0] in self._inner.state.get(run.param, {}):
                    self._inner.state[run.param].clear()

    def narrow(self) -> None:
        """Bring what was loaded into the format in which it is kept."""
        for runs in self._runs:
            for run in runs:
                state = self._inner.state.get(run.param, {})
                if self._bits == 8 and "exp_avg" in state:
                    self._moments(run, state, int(state["step"]))
