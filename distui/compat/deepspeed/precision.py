"""fp16's loss scale by DeepSpeed's rules, and outputs in the format in which the model gave them."""

from __future__ import annotations

from typing import Any

from torch import nn

from distui.compat.deepspeed.configuration import DeepSpeedConfig
from distui.core.ranks.precision import LossScaler
from distui.core.sharding.hooks import Hook


class DeepSpeedLossScaler(LossScaler):
    """Halves after `hysteresis` overflows, not below `minimum`; a fixed scale only counts."""

    def __init__(
        self, initial: float, window: int, minimum: float, hysteresis: int, refills: bool, is_static: bool
    ) -> None:
        super().__init__(initial, window, minimum)
        self.hysteresis, self.refills, self.is_static = hysteresis, refills, is_static
        self._left = hysteresis

    def update(self, overflow: bool) -> None:
        """Account one step."""
        if overflow and (self.is_static or self._left > 1):
            self._left -= not self.is_static
            self.good_steps = 0
            self.num_skipped += 1
            return
        if self.is_static:
            return
        before = self.scale
        super().update(overflow)
        if not overflow and (self.refills or self.scale != before):
            self._left = self.hysteresis


def scaler_of(config: DeepSpeedConfig) -> LossScaler | None:
    """Return the loss scale that the JSON's fp16 section describes; None under other formats."""
    precision = config.config.precision
    if precision.dtype != "fp16":
        return None
    fixed = float(config.get("fp16.loss_scale", 0) or 0)
    return DeepSpeedLossScaler(
        fixed or precision.initial_loss_scale,
        precision.loss_scale_window,
        float(config.get("fp16.min_loss_scale", 1)),
        int(config.get("fp16.hysteresis", 2)),
        bool(config.get("fp16.consecutive_hysteresis", False)),
        bool(fixed),
    )


class OwnOutputs:
    """Gives a model's outputs as its forward returned them, without the engine's cast to fp32, as DeepSpeed does.

    A loss that the model computes in fp32 stays fp32, logits in bf16 stay bf16.
    """

    def __init__(self) -> None:
        self._kept: Any = None

    def keep(self, model: nn.Module) -> None:
        """Register before the model is prepared."""
        model.register_forward_hook(Hook(self._keep))

    def restore(self, model: nn.Module) -> None:
        """Register after the model is prepared."""
        model.register_forward_hook(Hook(self._restore))

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:
        self._kept = output

    def _restore(self, module: nn.Module, args: Any, output: Any) -> Any:
        kept, self._kept = self._kept, None
        return kept
